"""How well a model has learnt the embedded corpus: the stories that it generates."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cola_jax import rng, sampling
from cola_jax.data import corpora
from cola_jax.data.stories import Stories
from cola_jax.evaluation.statistics import Mean, Proportion
from cola_jax.runs import Run

# Settings of a generation that a report names, where the family has them.
_SHOWN = (
    *("prior", "solver", "churn", "guidance_scale", "steps", "conditioning", "repaint_cycles", "repaint_fraction"),
    *("temperature", "top_k", "top_p"),
)


class Variant(NamedTuple):
    """One way to generate stories: from nothing, or to complete held-out ones.

    Attributes:
      settings: of the generation (`Family.settings`).
      prompted: after the first sentence of a held-out story, or after its first ``prompt_tokens`` tokens.
      prompt_tokens: 0: the first sentence.
      gap: tokens that are missing somewhere in a held-out story, in place of a prompt; 0: none.
    """

    settings: Any
    prompted: bool = False
    prompt_tokens: int = 0
    gap: int = 0

    def as_dict(self) -> dict:
        """JSON-able."""
        names = [name for name in _SHOWN if hasattr(self.settings, name)]
        shown = {name: getattr(self.settings, name) for name in names}
        return {**shown, "prompted": self.prompted, "prompt_tokens": self.prompt_tokens, "gap": self.gap}

    def __str__(self) -> str:
        settings = self.settings
        if getattr(settings, "prior", "flow") == "normal":
            return "latents from N(0, I)"
        what = "after a first sentence" if self.prompted else "from nothing"
        if self.prompted and self.prompt_tokens:
            what = f"after {self.prompt_tokens} tokens"
        what = f"in gaps of {self.gap} tokens" if self.gap else what
        if not hasattr(settings, "conditioning"):
            return f"{what}, temperature {settings.temperature:g}"
        how = settings.conditioning
        if how == "repaint":
            how += f" r = {settings.repaint_cycles}, m = {settings.repaint_fraction:g}"
        how = "" if how == "clean" else f", {how}"
        churn = f", churn {settings.churn:g}" if settings.churn else ""
        return f"{what}{how}, guidance {settings.guidance_scale:g}, {settings.steps} steps{churn}"


class Scores(NamedTuple):
    """Scores of generated stories.

    Attributes:
      valid: sentences that the grammar can produce.
      coherent: stories with a positive probability under the corpus's distribution; after a prompt, prompt and
        continuation together.
      factors: distinct global factors among the coherent stories (slots that a story leaves open count as one).
    """

    valid: Proportion
    coherent: Proportion
    factors: int

    def as_dict(self) -> dict:
        """JSON-able: shares with intervals, counts."""
        return {
            "stories": self.coherent.total,
            "valid": self.valid.mean,
            "valid_interval": self.valid.interval,
            "coherent": self.coherent.mean,
            "coherent_interval": self.coherent.interval,
            "factors": self.factors,
            "sentences": self.valid.total / max(self.coherent.total, 1),
        }


def write(run: Run, prompts: Sequence[str], settings, seed: int, batch_size: int = 128) -> list[str]:
    """Prompts with their continuations; an empty prompt gives a story from nothing.

    Args:
      seed: of the noise, stream "sample"; story i depends on (seed, i) alone.
      batch_size: prompts generated at a time.
    """
    ids = [run.tokenizer.encode(prompt) for prompt in prompts]
    new = run.family.generate_batches(run.model, run.params, ids, settings, rng.key(seed, "sample"), batch_size)
    return [run.tokenizer.decode([*ids[index], *tokens]) for index, tokens in new]


def score(stories: Stories, texts: Sequence[str]) -> Scores:
    """Scores of whole stories (prompt included)."""
    parses = [stories.parse(text) for text in texts]
    sentences = [sentence.valid for parse in parses for sentence in parse.sentences]
    coherent = [parse for parse in parses if parse.coherent]
    factors = {tuple(sorted(parse.factor.items())) for parse in coherent}
    return Scores(Proportion(sum(sentences), len(sentences)), Proportion(len(coherent), len(parses)), len(factors))


def held_out_prompts(run: Run, seed: int, count: int, tokens: int = 0) -> list[str]:
    """First sentences of held-out stories, or their first ``tokens`` tokens."""
    data = run.config.data
    stories, texts = Stories(data.stories), corpora.documents(data, "holdout", seed)
    chosen = [texts[index % len(texts)] for index in range(count)]
    if not tokens:
        return [stories.first_sentence(text) for text in chosen]
    return [run.tokenizer.decode(run.tokenizer.encode(text)[:tokens]) for text in chosen]


def fill_gaps(run: Run, length: int, settings: sampling.Settings, seed: int, count: int, batch_size: int = 128):
    """Held-out stories, and the same with a gap of ``length`` tokens filled: (originals, filled).

    The gap is anywhere but at the very beginning; its place depends on (seed, story) alone.
    """
    texts = corpora.documents(run.config.data, "holdout", seed)
    originals = [texts[index % len(texts)] for index in range(count)]
    draw, gaps, filled = np.random.default_rng(seed), [], []
    for text in originals:
        ids = run.tokenizer.encode(text)
        start = int(draw.integers(1, len(ids) - length + 1))
        gaps.append((ids[:start], length, ids[start + length :]))
    key = rng.key(seed, "sample")
    for start in range(0, count, batch_size):
        chunk = gaps[start : start + batch_size]
        ids = range(start, start + len(chunk))
        out = sampling.infill(run.model, run.params, chunk, settings, key, sample_ids=ids)
        for (before, _, after), new in zip(chunk, out.tokens.tolist(), strict=True):
            filled.append(run.tokenizer.decode([*before, *new, *after]))
    return originals, filled


def excess_log_prob(stories: Stories, originals: Sequence[str], written: Sequence[str], paired: bool) -> Mean | None:
    """Mean of log p* of what a model wrote, where that is coherent, less that of held-out stories, in nats.

    Draws from the corpus's distribution have a mean of 0, texts that are too likely a positive one. None where fewer
    than two texts are coherent.

    Args:
      stories: the corpus.
      originals: held-out stories.
      written: the model's; if ``paired``, written[i] is originals[i] with a gap filled: each is compared with its own.
      paired: see there.
    """
    found = np.array([stories.log_prob(text) for text in written])
    known = np.array([stories.log_prob(text) for text in originals])
    coherent = np.isfinite(found)
    if coherent.sum() < 2 or len(known) < 2:
        return None
    if paired:
        values = (found - known)[coherent]
        return Mean(float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))))
    found = found[coherent]
    error = math.sqrt(found.var(ddof=1) / len(found) + known.var(ddof=1) / len(known))
    return Mean(float(found.mean() - known.mean()), error)


def table(run: Run, count: int, seed: int, variants: Sequence[Variant], log: Callable[[str], None]) -> list[dict]:
    """Generates ``count`` stories in each way, logs a line for each, and returns the rows.

    Args:
      run: from `runs.load`.
      count: stories a row.
      seed: of the noise and of the held-out prompts.
      variants: ways to generate.
      log: prints a line.
    """
    stories, rows = Stories(run.config.data.stories), []
    for index, variant in enumerate(variants):
        start, more, added = time.monotonic(), "", {}
        if variant.gap:
            originals, texts = fill_gaps(run, variant.gap, variant.settings, seed, count)
        else:
            prompts = [""] * count
            if variant.prompted:
                prompts = held_out_prompts(run, seed, count, variant.prompt_tokens)
            texts = write(run, prompts, variant.settings, seed)
        if not variant.prompted:
            if not variant.gap:
                held_out = corpora.documents(run.config.data, "holdout", run.config.data_seed)
                originals = [held_out[index] for index in range(min(count, len(held_out)))]
            excess = excess_log_prob(stories, originals, texts, paired=variant.gap > 0)
            if excess is not None:
                more = f", log p* above held-out stories' {excess.mean:.2f} +- {excess.error:.2f}"
                added = {"excess_log_prob": excess.mean, "excess_log_prob_error": excess.error}
        scores, seconds = score(stories, texts), time.monotonic() - start
        rows.append({**variant.as_dict(), **scores.as_dict(), **added, "seed": seed, "examples": texts[:4]})
        log(
            f"[{index + 1}/{len(variants)}] {variant}: valid sentences {scores.valid}, coherent stories "
            f"{scores.coherent}, distinct factors {scores.factors}{more} ({count} stories, {seconds:.0f} s)"
        )
    return rows


def report(run: Run, count: int, seed: int, log: Callable[[str], None]) -> list[dict]:
    """The rows of a run's closing report: stories from nothing, from noise instead of a prior, and after prompts."""
    settings = run.settings
    variants = [Variant(settings)]
    if hasattr(settings, "prior"):
        variants.append(Variant(dataclasses.replace(settings, prior="normal")))
    variants.append(Variant(fitted(settings, run, seed, count), prompted=True))
    rows = table(run, count, seed, variants, log)
    for text in rows[0]["examples"]:
        log(f"  story: {text}")
    return rows


def fitted(settings, run: Run, seed: int, count: int, tokens: int = 0):
    """``settings`` with the budget that the longest prompt leaves of the context."""
    prompts = held_out_prompts(run, seed, count, tokens)
    longest = max(len(run.tokenizer.encode(prompt)) for prompt in prompts)
    room = run.config.data.sequence_length - longest
    return dataclasses.replace(settings, max_new_tokens=min(settings.max_new_tokens, room))
