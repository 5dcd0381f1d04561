"""Evaluations of a run by name, and the report that closes a run."""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from cola_jax import release, rng, runs, sharding
from cola_jax.config import Config, EvaluationConfig, TrainConfig
from cola_jax.data import corpora, pipeline
from cola_jax.data.stories import Stories
from cola_jax.evaluation import prior, scenes, stories, texts
from cola_jax.evaluation.statistics import Proportion, per_token
from cola_jax.families.interface import Family
from cola_jax.likelihood import Settings
from cola_jax.likelihood.rows import stack
from cola_jax.runs import Run
from cola_jax.train import saved
from cola_jax.train.experiment import data_seed
from cola_jax.train.trainer import HeldOut
from cola_jax.types import UserError

Log = Callable[[str], None]
# (run, what to evaluate, seed, log) -> what goes into the report
Evaluator = Callable[[Run, EvaluationConfig, int, Log], dict]

_LIKELIHOOD_ROWS = 64  # scored at a time
_PRIOR_TEXTS, _PRIOR_DRAWS = 64, 32


def reconstruction(run: Run, evaluation: EvaluationConfig, seed: int, log: Log) -> dict:
    """Share of held-out tokens that the decoder recovers from one posterior sample of their latents."""
    data, count = run.config.data, evaluation.count
    batches = itertools.islice(pipeline.create(data, run.tokenizer, "holdout", seed), -(-count // data.batch_size))
    right = total = 0
    for index, batch in enumerate(batches):
        keys = rng.key(seed, "evaluate", index, np.arange(len(batch["tokens"])))
        r, t = run.family.reconstruct(run.model, run.params, batch, keys)
        right, total = right + int(r), total + int(t)
    found = Proportion(right, total)
    log(f"held-out reconstruction accuracy {found} of {found.total} tokens")
    return {"reconstruction": found.mean, "reconstruction_interval": found.interval}


def held_out(run: Run, evaluation: EvaluationConfig, seed: int, log: Log) -> dict:
    """Loss and terms of the last stage over held-out batches: for Cola the flow loss, for AR the cross-entropy."""
    del seed  # the batches and draws are those of the evaluations in training
    config = run.config
    stages = run.family.stages(run.model, config)
    number = max(i for i, stage in enumerate(stages) if stage.steps or i == len(stages) - 1) + 1
    mesh = sharding.make_mesh(TrainConfig(mesh_data=1), jax.local_devices()[:1])
    evaluate = HeldOut(stages[number - 1], mesh, config.seed, sharding.make_rules(config.train.axes))
    dataset = pipeline.create(config.data, run.tokenizer, "holdout", data_seed(config.data_seed, number))
    size = config.data.batch_size
    batches = evaluate.read(dataset, -(-evaluation.count // size), size)
    found = evaluate(run.params, {}, batches)
    log("held out: " + "  ".join(f"{name} {value:.4g}" for name, value in found.items()))
    return {"held_out": found}


def generated_stories(run: Run, evaluation: EvaluationConfig, seed: int, log: Log) -> dict:
    """Validity and coherence of generated stories."""
    return {"generation": stories.report(run, evaluation.count, seed, log)}


def prior_field(run: Run, evaluation: EvaluationConfig, seed: int, log: Log) -> dict:
    """Where the prior is bad, without a solve: the error of its field by flow time, and its bound in nats per token."""
    try:
        run.family.check_scorable(run.model, run.params)
    except UserError as error:
        log(f"nothing to measure: {error}")
        return {}
    documents = corpora.documents(run.config.data, "holdout", run.config.data_seed)
    sample = prior.draw(run, min(evaluation.count, _PRIOR_TEXTS, len(documents)), seed)
    errors = prior.field_error(run, sample, prior.TIMES)
    bound = prior.bound(run, sample, _PRIOR_DRAWS, seed)
    for line in (*errors, bound):
        log(str(line))
    by_time = {f"{row.time:g}": row.error.mean for row in errors}
    found = {"field_error": by_time, "bound": bound.total.mean, "bound_error": bound.total.error}
    found |= {"reconstruction": bound.reconstruction.mean, "best_times": bound.best_times}
    found |= {"bits_per_byte": bound.bits_per_byte.mean, "bits_per_byte_error": bound.bits_per_byte.error}
    if bound.excess is not None:
        found |= {"above_entropy": bound.excess.mean, "above_entropy_error": bound.excess.error}
    return {"prior": found}


def _log_probs(run: Run, written: Sequence[str], seed: int) -> tuple[np.ndarray, texts.Cut, str]:
    """log p of each text under a run, cut to its context, the cut texts, and whether log p is exact or a bound."""
    data, settings, key = run.config.data, run.family.score_settings(), rng.key(seed, "likelihood")
    run.family.check_scorable(run.model, run.params)
    cut, log_prob, bound = texts.cut(written, run.tokenizer, data), [], ""
    for start in range(0, len(written), _LIKELIHOOD_ROWS):
        tokens, segments = stack(cut.ids[start : start + _LIKELIHOOD_ROWS], data.sequence_length)
        scores = run.family.score(run.model, run.params, tokens, segments, settings, jax.random.fold_in(key, start))
        log_prob.append(np.asarray(scores.log_prob))
        bound = scores.bound
    return np.concatenate(log_prob), cut, bound


def _held_out(run: Run, count: int) -> Sequence[str]:
    """The first held-out documents of a run's corpus, at most ``count``."""
    documents = corpora.documents(run.config.data, "holdout", run.config.data_seed)
    return [documents[i] for i in range(min(count, len(documents)))]


def likelihood(run: Run, evaluation: EvaluationConfig, seed: int, log: Log) -> dict:
    """``-log p(x)`` of held-out documents, nats per token; on `stories` beside the corpus's exact entropy."""
    data = run.config.data
    chosen = _held_out(run, evaluation.count)
    log_prob, cut, bound = _log_probs(run, chosen, seed)
    rate, error = per_token(-log_prob, cut.tokens)
    bits, bits_error = per_token(-log_prob / math.log(2), cut.bytes)
    found = {"nats_per_token": rate, "error": error, "bound": bound, "documents": len(chosen)}
    found |= {"bits_per_byte": bits, "bits_per_byte_error": bits_error}
    line = f"held out: {'' if bound == 'exact' else 'bound on '}-log p(x) {rate:.4f} +- {error:.4f} nats a token"
    line += f", {bits:.4f} +- {bits_error:.4f} bits a byte"
    if data.corpus == "stories":
        known = Stories(data.stories)
        entropy, spread = per_token(-np.array([known.log_prob(text) for text in chosen]), cut.tokens)
        found |= {"entropy": entropy, "entropy_error": spread}
        line += f"; exact entropy of the same stories {entropy:.4f} +- {spread:.4f}"
    log(f"{line} ({len(chosen)} documents)")
    return {"likelihood": found}


def perplexity(run: Run, evaluation: EvaluationConfig, seed: int, log: Log) -> dict:
    """Generative perplexity: ``exp(-log p / tokens)`` of generated texts under another run, the scorer.

    A text that repeats itself has a low one, too. Therefore the entropy of the scorer's tokens within a text (nats,
    mean over texts) is reported as well, and that of held-out texts of the scorer.
    """
    path, count = evaluation.scorer, evaluation.count
    if not path:
        raise UserError("config.evaluation.scorer = '': must name the run that scores generated texts")
    scorer = runs.load(path, flag="config.evaluation.scorer")
    written = [text for text in stories.write(run, [""] * count, run.settings, seed) if text.strip()]
    log_prob, cut, _ = _log_probs(scorer, written, seed)
    rate, error = per_token(-log_prob, cut.tokens)
    real = texts.cut(_held_out(scorer, count), scorer.tokenizer, scorer.config.data)
    entropy, entropy_error = texts.unigram_entropy(cut)
    known = texts.unigram_entropy(real).mean
    log(
        f"generative perplexity under {path}: {math.exp(rate):.3f} ({rate:.4f} +- {error:.4f} nats a token); "
        f"entropy of a text's tokens {entropy:.3f} +- {entropy_error:.3f} nats, of held-out texts {known:.3f}"
    )
    found = {"value": math.exp(rate), "nats_per_token": rate, "error": error, "scorer": path}
    found |= {"entropy": entropy, "entropy_error": entropy_error, "held_out_entropy": known}
    return {"perplexity": found}


def generated_scenes(run: Run, evaluation: EvaluationConfig, seed: int, log: Log) -> dict:
    """What a joint model of text and images draws and says, judged by a program (`evaluation.scenes`)."""
    found = scenes.report(run, evaluation.count, seed, log)
    return {"scenes": {name: scenes.as_dict(shares) for name, shares in found.items()}}


EVALUATORS: Mapping[str, Evaluator] = {
    "scenes": generated_scenes,
    "reconstruction": reconstruction,
    "stories": generated_stories,
    "held_out": held_out,
    "prior": prior_field,
    "likelihood": likelihood,
    "perplexity": perplexity,
}


def names(evaluation: EvaluationConfig, config: Config, family: Family) -> tuple[str, ...]:
    """The evaluators that are asked for, or those that suit a run's family and corpus and are quick.

    Raises:
      UserError: one that does not exist, or that the family or the corpus cannot have; no checkpoint of the scorer.
    """
    on_stories, on_scenes = config.data.corpus == "stories", config.data.corpus == "scenes"
    has_images = config.data.image_size > 0
    if evaluation.scorer and not release.is_released(evaluation.scorer):
        try:  # before anything expensive starts
            saved.stage_directory(evaluation.scorer)
        except UserError as error:
            raise UserError(f"config.evaluation.scorer: {error}") from error
    if not evaluation.evaluators:
        suiting = {
            "reconstruction": family.reconstruct is not None,
            "stories": on_stories,
            "scenes": on_scenes and family.name == "unified",
            "held_out": not on_stories,
            "prior": family.score_settings is Settings and not has_images,
            "likelihood": family.score_settings is not Settings,  # whose bound needs an ODE
            "perplexity": bool(evaluation.scorer),
        }
        return tuple(name for name, suits in suiting.items() if suits)
    for name in evaluation.evaluators:
        where = f"config.evaluation.evaluators = {evaluation.evaluators!r}"
        if name not in EVALUATORS:
            raise UserError(f"{where}: {name!r} must be one of {', '.join(EVALUATORS)}")
        if name == "reconstruction" and family.reconstruct is None:
            raise UserError(f"{where}: 'reconstruction' needs latents, which family {family.name!r} does not have")
        if name == "prior" and family.score_settings is not Settings:
            raise UserError(f"{where}: 'prior' needs a flow prior, which family {family.name!r} does not have")
        if name == "scenes" and not (on_scenes and family.name == "unified"):
            raise UserError(f"{where}: 'scenes' needs config.data.corpus = 'scenes' and family 'unified'")
        if name == "stories" and not on_stories:
            raise UserError(f"{where}: 'stories' needs config.data.corpus = 'stories'")
        if name == "perplexity" and not evaluation.scorer:
            raise UserError(f"{where}: 'perplexity' needs config.evaluation.scorer, the run that scores")
    return tuple(evaluation.evaluators)


def report(run: Run, evaluation: EvaluationConfig, seed: int, log: Log) -> dict:
    """What the run's evaluators find, together; see `EVALUATORS`."""
    found, chosen = {}, names(evaluation, run.config, run.family)
    for index, name in enumerate(chosen):
        start = time.monotonic()
        log(f"evaluation {index + 1} of {len(chosen)}: {name}")
        found |= EVALUATORS[name](run, evaluation, seed, log)
        log(f"evaluation {index + 1} of {len(chosen)}: {name} took {time.monotonic() - start:.0f} s")
    return found
