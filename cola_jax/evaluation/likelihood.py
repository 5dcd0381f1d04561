"""What the likelihood of a model of `stories` says: its gap to the corpus's entropy, ranking, cost of the solvers."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cola_jax import families, likelihood, rng
from cola_jax.config import Config
from cola_jax.data import corpora, packing
from cola_jax.data.stories import Stories
from cola_jax.evaluation import prior
from cola_jax.evaluation.statistics import Mean, Proportion, per_token
from cola_jax.likelihood import Settings, density
from cola_jax.runs import Run
from cola_jax.types import UserError


class Texts(NamedTuple):
    """Held-out stories.

    Attributes:
      texts: as they are.
      ids: their tokens with the ends of text that the training filled them up with.
      tokens: [B], tokens of each text and one end of text: the T of rates per token.
      log_prob: [B], exact log p*(x), nats.
    """

    texts: list[str]
    ids: list[list[int]]
    tokens: np.ndarray
    log_prob: np.ndarray


def held_out(run: Run, count: int, seed: int) -> Texts:
    """The first held-out stories of a run.

    Raises:
      UserError: the run's corpus is not `stories`, or it has fewer.
    """
    data = run.config.data
    if data.corpus != "stories":
        raise UserError(f"config.data.corpus = {data.corpus!r}: only a model of 'stories' has a known entropy")
    stories, documents = Stories(data.stories), corpora.documents(data, "holdout", seed)
    if count > len(documents):
        raise UserError(f"count = {count}: must be at most the {len(documents)} held-out stories")
    texts = [documents[i] for i in range(count)]
    ids = [packing.document_tokens(text, run.tokenizer, data.align).tolist() for text in texts]
    tokens = np.array([len(run.tokenizer.encode(text)) + 1 for text in texts])
    return Texts(texts, ids, tokens, np.array([stories.log_prob(text) for text in texts]))


def gap(run, settings: Settings, count: int, seed: int, counts: Sequence[int], report=None) -> dict[str, Mean]:
    """Nats per token of held-out stories: the model's bounds, the exact entropy, and the parts of the ELBO (3.5).

    ``-ELBO = reconstruction + rate + mismatch``. The rate ``I_q(X; Z)`` lies between ``H(X) - reconstruction``
    (Barber and Agakov's bound) and H(X); H(X) is what is reported, so that rate and mismatch are uncertain by the
    reconstruction term. "filling" is the share of -ELBO of the blocks that hold nothing but end-of-text tokens.
    "effective sample size" is no rate but a mean over stories, from 1 to K.

    Args:
      run: from `runs.load`.
      settings: K samples; see `Settings`.
      count: stories.
      seed: of the draws; the stories are those of the run.
      counts: values of K of the IWAE, up to ``settings.samples``; without the exact divergence it is left out.
      report: of `likelihood.log_likelihood`.
    """
    texts = held_out(run, count, run.config.data_seed)
    tokens, segments = likelihood.stack(texts.ids)
    key = rng.key(seed, "likelihood")
    found = likelihood.log_likelihood(run.model, run.params, tokens, settings, key, segments, report=report)
    size = run.model.dit_config.block_size * run.model.vae_config.patch_size
    last = -(-(texts.tokens - 1) // size)  # blocks with a token of the text
    filling = np.where(np.arange(found.blocks.elbo.shape[1])[None] >= last[:, None], -found.blocks.elbo, 0).sum(axis=1)
    counts = counts if settings.divergence == "exact" else ()
    parts = {
        "entropy": -texts.log_prob,
        "-ELBO": -found.elbo,
        **{f"-IWAE {k}": -likelihood.iwae_curve(found.log_weights, [k])[:, 0] for k in counts},
        "reconstruction": -found.reconstruction,
        "rate": -texts.log_prob,
        "mismatch": -found.elbo + found.reconstruction + texts.log_prob,
        "filling": filling,
        "-prior": -found.prior,
        "posterior": found.posterior,
    }
    out = {name: per_token(value, texts.tokens) for name, value in parts.items()}
    if settings.samples > 1:
        error = np.sqrt(np.square(found.elbo_error).sum()) / texts.tokens.sum()
        out["Monte-Carlo error of -ELBO"] = Mean(float(error), 0.0)
        out["effective sample size"] = per_token(found.ess, np.ones_like(found.ess))
    return out


def ranking(run, settings: Settings, count: int, seed: int) -> dict[str, Proportion]:
    """How often a story's true continuation scores above another story's, after its first sentence.

    The other continuation has as many tokens, sentences that are all valid, and makes the story incoherent
    (p* = 0): only the global factor tells the two apart.

    Returns:
      For the plug-in score (3.14) and the block-level score of the response (10.21-10.22): how often it is right. The
      plug-in score is left out where a first sentence ends inside a block, the IWAE without the exact divergence.

    Raises:
      UserError: no story has such a partner, or a score is not finite.
    """
    stories = Stories(run.config.data.stories)
    documents = corpora.documents(run.config.data, "holdout", run.config.data_seed)
    pool = held_out(run, max(count, min(4 * count, len(documents))), run.config.data_seed).texts
    prefixes, responses = [], []
    for index in range(count):
        first = stories.first_sentence(pool[index])
        for other in pool[index + 1 :] + pool[:index]:
            rest = other[len(stories.first_sentence(other)) :]
            true = pool[index][len(first) :]
            same = len(run.tokenizer.encode(rest)) == len(run.tokenizer.encode(true))
            if same and not np.isfinite(stories.log_prob(first + rest)):
                prefixes += [first, first]
                responses += [true, rest]
                break
    if not prefixes:
        raise UserError(f"--count = {count}: must be large enough for pairs that differ in their global factor")
    align, encode = run.config.data.align, run.tokenizer.encode
    prefix_ids = [encode(text) for text in prefixes]
    response_ids = []
    for prefix, response in zip(prefixes, responses, strict=True):
        whole = packing.document_tokens(prefix + response, run.tokenizer, align).tolist()
        response_ids.append(whole[len(encode(prefix)) :])
    key, ids = rng.key(seed, "likelihood"), np.arange(len(prefixes)) // 2
    tokens, segments = likelihood.stack([p + r for p, r in zip(prefix_ids, response_ids, strict=True)])
    lengths = [len(p) for p in prefix_ids]
    local = likelihood.log_likelihood(run.model, run.params, tokens, settings, key, segments, lengths, ids)
    scores, bound = {}, settings.divergence == "exact"
    size = run.model.dit_config.block_size * run.model.vae_config.patch_size
    if not any(length % size for length in lengths):
        plug_in = likelihood.conditional(run.model, run.params, prefix_ids, response_ids, settings, key, ids)
        scores |= {"plug-in ELBO": plug_in.elbo} | ({"plug-in IWAE": plug_in.iwae} if bound else {})
    scores |= {"response": local.elbo} | ({"response IWAE": local.iwae} if bound else {})
    scores["response, prior term"] = local.prior
    return {name: _share(name, score) for name, score in scores.items()}


def _share(name: str, scores: np.ndarray) -> Proportion:
    """How often the first of two scores is the higher one; ties do not count as such."""
    if bad := int((~np.isfinite(scores)).sum()):
        need = "likelihood max_steps must be larger"
        raise UserError(f"{name}: {bad} of {len(scores)} scores of the ranking are not finite; {need}")
    return Proportion(int((scores[::2] > scores[1::2]).sum()), len(scores) // 2)


class Setting(NamedTuple):
    """One row of `sweep` and `probes`: errors in nats per token against the reference, and the cost.

    Attributes:
      bias: mean error over sequences.
      rms: root mean square error of a sequence.
      seconds: per sequence, compilation apart.
      steps: mean solver steps of a block.
      failed: sequences.
    """

    settings: Settings
    bias: float
    rms: float
    seconds: float
    steps: float
    failed: int

    def __str__(self) -> str:
        return (
            f"{describe(self.settings)}: bias {self.bias:+.4f}, rms {self.rms:.4f} nats/token, "
            f"{self.seconds:.3f} s/sequence, {self.steps:.1f} steps, {self.failed} failed"
        )


def _solve(run, sample: prior.Sample, settings: Settings) -> density.Density:
    keys = None if settings.divergence == "exact" else sample.probes
    found = density.log_prob(run.model, run.params, sample.z, settings, keys, sample.segments)
    return jax.block_until_ready(found)


def truth(run, sample: prior.Sample, settings: Settings) -> np.ndarray:
    """log p(z) of each sequence, [B], nats, by the settings that errors are measured against.

    Raises:
      UserError: a solve ran out of steps.
    """
    found = _solve(run, sample, settings)
    if bad := int((~np.asarray(found.ok).all(axis=1)).sum()):
        what = f"the reference was not solved for {bad} of {len(sample.tokens)} sequences"
        raise UserError(f"{what}; likelihood max_steps = {settings.max_steps}: must be larger")
    return np.asarray(found.log_prob, np.float64).sum(axis=1)


def compare(run, sample: prior.Sample, settings: Settings, right: np.ndarray) -> Setting:
    """Error and cost of one way to solve, against `truth`."""
    _solve(run, sample, settings)  # compiles
    start = time.perf_counter()
    result = _solve(run, sample, settings)
    seconds = (time.perf_counter() - start) / len(right)
    ok = np.asarray(result.ok).all(axis=1)
    error = ((np.asarray(result.log_prob, np.float64).sum(axis=1) - right) / sample.tokens)[ok]
    real = np.asarray(sample.segments)[:, :: run.model.dit_config.block_size] > 0
    steps = float(np.asarray(result.steps)[real].mean())
    rms = float(np.sqrt(np.mean(np.square(error))))
    return Setting(settings, float(error.mean()), rms, seconds, steps, int((~ok).sum()))


VARIANTS = (
    {"solver": "euler", "steps": 64},
    *({"solver": "heun", "steps": n} for n in (8, 16, 64)),
    *({"solver": "bosh3", "steps": n} for n in (4, 8, 16)),
    *({"solver": "dopri5", "steps": n} for n in (4, 6, 12)),
    *({"solver": "heun", "steps": n, "power": 2.0} for n in (16, 64, 128)),
    *({"solver": "dopri5", "steps": n, "power": 2.0} for n in (8, 16, 24, 64)),
    *({"solver": "dopri8", "steps": n, "power": 2.0} for n in (8, 32)),
    *({"solver": "dopri5", "rtol": r, "atol": r} for r in (1e-3, 1e-4, 1e-5)),
    *({"solver": "tsit5", "rtol": r, "atol": r} for r in (1e-3, 1e-5)),
    *({"solver": "dopri8", "rtol": r, "atol": r} for r in (1e-3, 1e-4)),
)


def sweep(run, base: Settings, count: int, seed: int, log: Callable[[str], None]) -> list[Setting]:
    """Error of log p(z) and seconds of solvers, steps and tolerances, on one posterior sample of held-out stories.

    The truth is dopri8 at tolerances of 1e-6, in float64 where JAX's 64-bit mode is on. All have the same probes of
    Hutchinson's estimator, so that the error is the solver's alone; `probes` has the estimator's.

    Args:
      run: from `runs.load`.
      base: what `VARIANTS` leave open.
      count: sequences.
      seed: of posterior samples and probes.
      log: prints a line.
    """
    sample = prior.draw(run, count, seed)
    dtype = "float64" if jax.config.jax_enable_x64 else "float32"
    reference = dataclasses.replace(base, solver="dopri8", steps=0, rtol=1e-6, atol=1e-6, max_steps=4000, dtype=dtype)
    right = truth(run, sample, reference)
    found = []
    for variant in VARIANTS:
        settings = dataclasses.replace(base, **({"steps": 0, "power": 1.0} | variant))
        found.append(compare(run, sample, settings, right))
        log(str(found[-1]))
    return found


def probes(run, base: Settings, count: int, seed: int, log: Callable[[str], None]) -> list[Setting]:
    """As `sweep`, for the divergence: the truth is the exact one, the solver is that of ``base``."""
    sample = prior.draw(run, count, seed)
    exact = dataclasses.replace(base, divergence="exact")
    right = truth(run, sample, exact)
    found = []
    for probe, number in (("rademacher", 1), ("gaussian", 1), ("rademacher", 8), ("rademacher", 64)):
        found.append(compare(run, sample, dataclasses.replace(base, probe=probe, probes=number), right))
        log(str(found[-1]))
    found.append(compare(run, sample, exact, right))
    log(str(found[-1]))
    return found


def speed(config: Config, settings: Settings, count: int, length: int = 128) -> tuple[float, float]:
    """Seconds a sequence for K samples, with random weights.

    Args:
      config: of a Cola run whose ``vae.vocab_size`` is known (configs/benchmark.py).
      settings: see `Settings`.
      count: sequences.
      length: tokens of each.

    Returns:
      Seconds of the first call, with compilation, and of the second; a sequence each.
    """
    model, seconds = families.of(config).model(config), []
    tokens = np.random.default_rng(0).integers(0, config.vae.vocab_size, (count, length))
    params = nn.unbox(jax.jit(model.init)(rng.key(0, "init"), jnp.asarray(tokens[:1], jnp.int32)))
    for _ in range(2):
        start = time.perf_counter()
        likelihood.log_likelihood(model, params, tokens, settings, rng.key(0, "likelihood"))
        seconds.append((time.perf_counter() - start) / count)
    return tuple(seconds)


def describe(settings: Settings) -> str:
    """Solver, step control, divergence and type in words."""
    control = f"rtol {settings.rtol:g}, atol {settings.atol:g}"
    if settings.steps:
        control = f"{settings.steps} steps, power {settings.power:g}"
    how = "exact" if settings.divergence == "exact" else f"{settings.probes} {settings.probe}"
    return f"{settings.solver}, {control}, {how}, {settings.dtype}"
