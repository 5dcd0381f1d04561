"""log p(x) from importance weights: ELBO, IWAE, scores of responses, rates per token (3.8-3.14, 10.7-10.22)."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cola_jax import sharding
from cola_jax.likelihood import weights
from cola_jax.likelihood.rows import Rows, make_rows, stack
from cola_jax.likelihood.settings import Settings
from cola_jax.models.cola import ColaDLM
from cola_jax.types import Key, Params, UserError


class BlockTerms(NamedTuple):
    """Terms of each block [B, G], means over samples, nats; 0 for blocks of padding or of a prefix."""

    reconstruction: np.ndarray
    prior: np.ndarray
    posterior: np.ndarray

    @property
    def elbo(self) -> np.ndarray:
        """Each block's share of the ELBO; of the response's only block, its score (10.21-10.22)."""
        return self.reconstruction + self.prior - self.posterior


# Effective samples below which the first-order error of the IWAE means nothing.
_LEAST_ESS = 10


class Likelihood(NamedTuple):
    """Estimates of log p(x), or of a response given a prefix, one for each example, in nats, float64.

    Monte-Carlo standard errors are over the K samples (nan for K = 1); that of the IWAE is first-order.
    An example with a failed solve has nan everywhere and a count in ``failed``.

    Attributes:
      elbo: mean of log w (3.12), of which reconstruction + prior - posterior are the parts.
      iwae: log of the mean of w; nan with Hutchinson's divergence, whose noise enters the exponential, so that it
        would be no bound.
      iwae_error: nan where ``ess`` is below 10, too.
      ess: effective sample size of the weights, ``(sum w)^2 / sum w^2``, from 1 to K.
      reconstruction: mean of log p(x|z).
      prior: mean of log p(z), normalised latents.
      posterior: mean of log q(z|x), normalised latents.
      blocks: the same parts by block.
      log_weights: [B, K], log w of every sample.
      tokens: scored tokens.
      failed: samples whose ODE could not be solved.
      steps: mean over samples of the slowest block's solver steps.
    """

    elbo: np.ndarray
    elbo_error: np.ndarray
    iwae: np.ndarray
    iwae_error: np.ndarray
    ess: np.ndarray
    reconstruction: np.ndarray
    prior: np.ndarray
    posterior: np.ndarray
    blocks: BlockTerms
    log_weights: np.ndarray
    tokens: np.ndarray
    failed: np.ndarray
    steps: np.ndarray


class Conditional(NamedTuple):
    """Scores of responses given prefixes (nats), [B].

    Attributes:
      elbo, iwae: plug-in estimates ``log p(prefix, response) - log p(prefix)`` (3.14); no bounds. The IWAE's is nan
        where the `Likelihood`s have none.
      elbo_error, iwae_error: standard errors; the two estimates share their draws, which the ELBO's counts.
      joint, prefix: the two `Likelihood`s.
    """

    elbo: np.ndarray
    elbo_error: np.ndarray
    iwae: np.ndarray
    iwae_error: np.ndarray
    joint: Likelihood
    prefix: Likelihood


def log_mean_exp(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``log mean exp`` over the last axis, and its standard error by the delta method (nan for one sample)."""
    peak = log_weights.max(axis=-1, keepdims=True)
    value = peak[..., 0] + np.log(np.mean(np.exp(log_weights - peak), axis=-1))
    return value, mean_error(np.exp(log_weights - value[..., None]))  # of weights with mean 1


def effective_sample_size(log_weights: np.ndarray) -> np.ndarray:
    """``(sum w)^2 / sum w^2`` over the last axis: from 1 (one weight is all) to K (all are equal)."""
    w = np.exp(log_weights - log_weights.max(axis=-1, keepdims=True))
    return np.square(w.sum(axis=-1)) / np.square(w).sum(axis=-1)


def mean_error(values: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the last axis; nan for one value."""
    count = values.shape[-1]
    return np.std(values, axis=-1, ddof=1) / math.sqrt(count) if count > 1 else np.full(values.shape[:-1], math.nan)


def log_likelihood(
    model: ColaDLM,
    params: Params,
    tokens,
    settings: Settings,
    key: Key,
    segment_ids=None,
    prefix=None,
    ids=None,
    mesh=None,
    report: Callable[[int, int], None] | None = None,
) -> Likelihood:
    """Estimates ``log p(x)`` of each row with K posterior samples (3.8-3.12).

    With ``prefix``, scores only what follows it: ``log p(x_res | z) + log p(z_res | z_pre) - log q(z_res | x)``, the
    block-level and local score (10.21-10.22, 5.2). In the block that a prefix ends inside, its positions are pinned
    to time 0, as in generation.

    A row that ends inside a block has a log p that means something only if it is complete, ending with its ends of
    text: training cuts no document there. It is computed all the same; `conditional` and `requests` refuse it.

    Args:
      model: a `ColaDLM` with a variational VAE.
      params: its variables.
      tokens: ids [B, T], one document a row; T a multiple of the patch size.
      settings: see `Settings`.
      key: source of all draws; what row i draws depends on (key, its id, sample) alone, not on its batch.
      segment_ids: [B, T], 1 for the document, 0 for padding behind it; None: no padding.
      prefix: [B], tokens that are given, a multiple of the patch size and fewer than the row has; None: none.
      ids: [B], identity of each row in the random stream; by default its index. Rows with the same id share draws.
      mesh: from `sharding.make_mesh`: rows are shared out over its batch axes; params must lie on it.
      report: called with (samples done, samples) as the estimate grows.

    Returns:
      A `Likelihood`.

    Raises:
      UserError: a setting, row or model that cannot be used.
    """
    settings.validate()
    check_model(model, params)
    rows = make_rows(model, tokens, segment_ids, prefix, ids)
    scored = (rows.real * ~rows.given).sum(axis=1)
    if mesh is not None:
        rows = _share_out(rows, mesh)
    posterior = weights.encode(model, params, rows)

    def of_samples(samples):
        return weights.terms(model, params, rows, settings, posterior, key, samples)

    return estimate(of_samples, settings, len(scored), scored, report)


def estimate(
    of_samples: Callable[[Array], weights.Terms],
    settings: Settings,
    count: int,
    tokens: np.ndarray,
    report: Callable[[int, int], None] | None = None,
) -> Likelihood:
    """A `Likelihood` of all samples that the settings ask for, computed some at a time.

    Args:
      of_samples: numbers of samples [S] -> `weights.Terms` of at least ``count`` rows; those behind do not count.
      settings: see `Settings`.
      count: B.
      tokens: [B], what is scored of each.
      report: called with (samples done, samples).
    """
    parts, means = [], None
    for samples in sample_chunks(settings, count):
        terms = jax.device_get(of_samples(jnp.asarray(samples)))
        new = samples < settings.samples
        blocks = BlockTerms(*[x[:, new].astype(np.float64) for x in terms[:3]])
        parts.append([blocks.elbo.sum(axis=-1), terms.ok[:, new], terms.steps[:, new]])
        sums = [x.sum(axis=1) for x in blocks]
        means = sums if means is None else [a + b for a, b in zip(means, sums, strict=True)]
        if report is not None:
            report(min(int(samples[-1]) + 1, settings.samples), settings.samples)
    log_w, ok, steps = (np.concatenate(part, axis=1)[:count] for part in zip(*parts, strict=True))
    blocks = BlockTerms(*[m[:count] / settings.samples for m in means])
    return _likelihood(log_w, ok, steps, blocks, tokens, settings)


def _share_out(rows: Rows, mesh) -> Rows:
    """Rows on the devices of a mesh; the last one is repeated until they can be shared out evenly."""
    fill = -len(rows.ids) % math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    filled = {name: np.concatenate([x, np.repeat(x[-1:], fill, axis=0)]) for name, x in rows._asdict().items()}
    return Rows(**sharding.put_batch(mesh, filled))


def _likelihood(log_w, ok, steps, blocks: BlockTerms, tokens, settings: Settings) -> Likelihood:
    failed = (~ok).sum(axis=1)
    log_w = np.where((failed > 0)[:, None], math.nan, log_w)
    blocks = BlockTerms(*[np.where((failed > 0)[:, None], math.nan, part) for part in blocks])
    iwae, iwae_error = log_mean_exp(log_w if settings.divergence == "exact" else np.full_like(log_w, math.nan))
    ess = effective_sample_size(log_w)
    return Likelihood(
        elbo=log_w.mean(axis=1),
        elbo_error=mean_error(log_w),
        iwae=iwae,
        iwae_error=np.where(ess < _LEAST_ESS, math.nan, iwae_error),
        ess=ess,
        reconstruction=blocks.reconstruction.sum(axis=1),
        prior=blocks.prior.sum(axis=1),
        posterior=blocks.posterior.sum(axis=1),
        blocks=blocks,
        log_weights=log_w,
        tokens=tokens,
        failed=failed,
        steps=steps.mean(axis=1),
    )


def sample_chunks(settings: Settings, batch: int) -> list[np.ndarray]:
    """Numbers of the samples to compute at a time, chunks of one size; the last may go beyond K (not counted)."""
    most = max(1, settings.rows // batch)
    chunks = -(-settings.samples // most)
    size = -(-settings.samples // chunks)
    return [np.arange(start, start + size, dtype=np.int32) for start in range(0, chunks * size, size)]


def check_model(model: ColaDLM, params: Params) -> None:
    """Raises UserError for a model whose likelihood is not defined."""
    if "dit" not in params["params"]:
        raise UserError("params: no prior (dit); likelihood needs a model that has been through stage 2")
    if not model.vae_config.variational:
        raise UserError("config.vae.variational = False: must be True: likelihood needs a posterior with a density")


def take(likelihood: Likelihood, index: Sequence[int]) -> Likelihood:
    """Rows of a `Likelihood`."""
    return jax.tree.map(lambda x: x[np.asarray(index, int)], likelihood)


def join(parts: Sequence[Likelihood]) -> Likelihood:
    """The rows of several `Likelihood`s of the same settings."""
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def nothing_like(likelihood: Likelihood) -> Likelihood:
    """The likelihood of empty texts: log p = 0 without error, in the shapes of another one."""
    return jax.tree.map(np.zeros_like, likelihood)


def unknown(settings: Settings) -> Likelihood:
    """One row of which nothing is known: nan everywhere, no failed solve; without blocks."""
    nan, none = np.full(1, math.nan), BlockTerms(*[np.zeros((1, 0))] * 3)
    values = dict.fromkeys(Likelihood._fields, nan) | {"tokens": np.zeros(1, int), "failed": np.zeros(1, int)}
    return Likelihood(**(values | {"blocks": none, "log_weights": np.full((1, settings.samples), math.nan)}))


def ends_inside_block(tokens: int, block: int) -> str:
    """What is wrong with a row of so many tokens that is not complete; "" where it ends with a block of ``block``."""
    return f"ends inside a block of {block}; it must be a multiple of {block}" if tokens % block else ""


def plug_in(joint: Likelihood, prefix: Likelihood) -> Conditional:
    """Differences of the estimates of whole texts and of their prefixes (3.14)."""
    return Conditional(
        joint.elbo - prefix.elbo,
        mean_error(joint.log_weights - prefix.log_weights),
        joint.iwae - prefix.iwae,
        np.hypot(joint.iwae_error, prefix.iwae_error),
        joint,
        prefix,
    )


def conditional(
    model: ColaDLM,
    params: Params,
    prefixes: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    settings: Settings,
    key: Key,
    ids=None,
    **options,
) -> Conditional:
    """Plug-in score ``log p(prefix, response) - log p(prefix)`` (3.14, 10.13-10.14): not a bound.

    All texts and prefixes are one batch. A text and its prefix share their draws, so that the noise of the prefix's
    latents and probes cancels from the difference.

    Args:
      prefixes, responses: id lists; a prefix may be empty (log p = 0), a response may not. A prefix ends with a
        block: inside one its log p means nothing.
      ids: identity of each pair in the random stream: candidates of one prefix with the same id share its draws,
        and their prefix is scored once.
      **options: of `log_likelihood`: mesh, report.

    Raises:
      UserError: as `log_likelihood`, an empty response, or a prefix that ends inside a block.
    """
    for index, response in enumerate(responses):
        if not len(response):
            raise UserError(f"example {index}: the response is empty; it must have at least one token")
    block = model.dit_config.block_size * model.vae_config.patch_size
    for index, prefix in enumerate(prefixes):
        if reason := ends_inside_block(len(prefix), block):
            raise UserError(f"example {index}: prefix of {len(prefix)} tokens {reason}")
    count = len(prefixes)
    ids = list(range(count)) if ids is None else [int(i) for i in ids]
    names = [(i, tuple(p)) for i, p in zip(ids, prefixes, strict=True)]
    unique = sorted({name for name in names if name[1]})
    texts = [[*p, *r] for p, r in zip(prefixes, responses, strict=True)] + [list(p) for _, p in unique]
    tokens, segments = stack(texts)
    rows = [*ids, *(i for i, _ in unique)]
    scores = log_likelihood(model, params, tokens, settings, key, segments, None, rows, **options)
    places = [count + unique.index(name) if name[1] else 0 for name in names]
    nothing = np.array([not name[1] for name in names])
    prefix = take(scores, places)
    prefix = jax.tree.map(
        lambda x, zero: np.where(nothing.reshape(-1, *(1,) * (x.ndim - 1)), zero, x), prefix, nothing_like(prefix)
    )
    return plug_in(take(scores, range(count)), prefix)


def perplexity(log_prob, tokens):
    """``exp(-L / T)`` (10.7, 10.10)."""
    return np.exp(-np.asarray(log_prob, np.float64) / tokens)


def bits_per_byte(log_prob, num_bytes):
    """``-L / (bytes log 2)``: comparable between tokenizers."""
    return -np.asarray(log_prob, np.float64) / (np.asarray(num_bytes) * math.log(2))


def iwae_curve(log_weights: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """IWAE_k of each row for several k from the same samples: the mean over disjoint groups of k of them.

    Args:
      log_weights: [B, K]; with the exact divergence, or what is returned is no bound.
      counts: values of k, from 1 (the ELBO) to K.

    Returns:
      [B, len(counts)].
    """
    columns = []
    for k in counts:
        groups = log_weights.shape[1] // k
        grouped = log_weights[:, : groups * k].reshape(len(log_weights), groups, k)
        columns.append(log_mean_exp(grouped)[0].mean(axis=1))
    return np.stack(columns, axis=1)
