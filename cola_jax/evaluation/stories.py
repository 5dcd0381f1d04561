"""How well a model has learnt the embedded corpus: reconstruction, and the stories that it generates."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from cola_jax import rng, sampling
from cola_jax.data import corpora, pipeline
from cola_jax.data.stories import Stories
from cola_jax.data.tokenizers import Tokenizer
from cola_jax.models.cola import ColaDLM
from cola_jax.objectives import common
from cola_jax.types import Params


class Proportion(NamedTuple):
    """A share, with its 95 % Wilson interval."""

    successes: int
    total: int

    @property
    def mean(self) -> float:
        return self.successes / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end; (0, 1) without observations."""
        if not self.total:
            return 0.0, 1.0
        z, n, p = 1.959964, self.total, self.mean
        centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
        return max(low, 0.0), min(high, 1.0)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.mean:.2f} % [{100 * low:.2f}, {100 * high:.2f}]"


class Variant(NamedTuple):
    """One way to generate stories: from nothing, or to complete held-out ones.

    Attributes:
      settings: of the generation.
      prompted: after the first sentence of a held-out story, or after its first ``prompt_tokens`` tokens.
      prompt_tokens: 0: the first sentence.
      gap: tokens that are missing somewhere in a held-out story, in place of a prompt; 0: none.
    """

    settings: sampling.Settings
    prompted: bool = False
    prompt_tokens: int = 0
    gap: int = 0

    def as_dict(self) -> dict:
        """JSON-able."""
        return {
            "prior": self.settings.prior,
            "guidance_scale": self.settings.guidance_scale,
            "steps": self.settings.steps,
            "conditioning": self.settings.conditioning,
            "repaint_cycles": self.settings.repaint_cycles,
            "repaint_fraction": self.settings.repaint_fraction,
            "prompted": self.prompted,
            "prompt_tokens": self.prompt_tokens,
            "gap": self.gap,
        }

    def __str__(self) -> str:
        if self.settings.prior == "normal":
            return "latents from N(0, I)"
        what = "after a first sentence" if self.prompted else "from nothing"
        if self.prompted and self.prompt_tokens:
            what = f"after {self.prompt_tokens} tokens"
        what = f"in gaps of {self.gap} tokens" if self.gap else what
        how = self.settings.conditioning
        if how == "repaint":
            how += f" r = {self.settings.repaint_cycles}, m = {self.settings.repaint_fraction:g}"
        how = "" if how == "clean" else f", {how}"
        return f"{what}{how}, guidance {self.settings.guidance_scale:g}, {self.settings.steps} steps"


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
        }


def reconstruction(model: ColaDLM, params: Params, batches: Iterable[dict], seed: int = 0) -> Proportion:
    """Share of tokens that the decoder recovers (its first choice) from one posterior sample of their latents.

    Args:
      batches: dicts of tokens and segment_ids [B, T]; padding does not count.
      seed: of the posterior samples, stream "evaluate".
    """

    @jax.jit
    def count(params, batch, keys):
        segments = common.latent_segments(batch, model.vae_config.patch_size)
        inputs = common.encoder_tokens(batch, model.vae_config.vocab_size)
        posterior = model.apply(params, inputs, segments, method="encode")
        z = model.normalize(common.draw(posterior, keys))
        right = common.accuracy(model.apply(params, z, segments, method="decode"), batch["tokens"])
        real = batch["segment_ids"] > 0
        return (right * real).sum(), real.sum()

    right = total = 0
    for index, batch in enumerate(batches):
        keys = rng.key(seed, "evaluate", index, np.arange(len(batch["tokens"])))
        r, t = count(params, {k: batch[k] for k in ("tokens", "segment_ids")}, keys)
        right, total = right + int(r), total + int(t)
    return Proportion(right, total)


def write(
    model: ColaDLM,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: sampling.Settings,
    seed: int,
    batch_size: int = 128,
) -> list[str]:
    """Prompts with their continuations; an empty prompt gives a story from nothing.

    Args:
      seed: of the noise, stream "sample"; story i depends on (seed, i) alone.
      batch_size: prompts generated at a time.
    """
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    key = rng.key(seed, "sample")
    new = sampling.generate_batches(model, params, ids, settings, key, batch_size)
    return [tokenizer.decode([*ids[index], *tokens]) for index, tokens in new]


def score(stories: Stories, texts: Sequence[str]) -> Scores:
    """Scores of whole stories (prompt included)."""
    parses = [stories.parse(text) for text in texts]
    sentences = [sentence.valid for parse in parses for sentence in parse.sentences]
    coherent = [parse for parse in parses if parse.coherent]
    factors = {tuple(sorted(parse.factor.items())) for parse in coherent}
    return Scores(Proportion(sum(sentences), len(sentences)), Proportion(len(coherent), len(parses)), len(factors))


def held_out_prompts(trained, seed: int, count: int, tokens: int = 0) -> list[str]:
    """First sentences of held-out stories, or their first ``tokens`` tokens."""
    data = trained.config.data
    stories, texts = Stories(data.stories), corpora.documents(data, "holdout", seed)
    chosen = [texts[index % len(texts)] for index in range(count)]
    if not tokens:
        return [stories.first_sentence(text) for text in chosen]
    return [trained.tokenizer.decode(trained.tokenizer.encode(text)[:tokens]) for text in chosen]


def fill_gaps(trained, length: int, settings: sampling.Settings, seed: int, count: int, batch_size: int = 128):
    """Held-out stories, and the same with a gap of ``length`` tokens filled: (originals, filled).

    The gap is anywhere but at the very beginning; its place depends on (seed, story) alone.
    """
    texts = corpora.documents(trained.config.data, "holdout", seed)
    originals = [texts[index % len(texts)] for index in range(count)]
    draw, gaps, filled = np.random.default_rng(seed), [], []
    for text in originals:
        ids = trained.tokenizer.encode(text)
        start = int(draw.integers(1, len(ids) - length + 1))
        gaps.append((ids[:start], length, ids[start + length :]))
    key = rng.key(seed, "sample")
    for start in range(0, count, batch_size):
        chunk = gaps[start : start + batch_size]
        ids = range(start, start + len(chunk))
        out = sampling.infill(trained.model, trained.params, chunk, settings, key, sample_ids=ids)
        for (before, _, after), new in zip(chunk, out.tokens.tolist(), strict=True):
            filled.append(trained.tokenizer.decode([*before, *new, *after]))
    return originals, filled


def excess_log_prob(stories: Stories, originals: Sequence[str], filled: Sequence[str]) -> tuple[float, float]:
    """Mean of ``log p*(filled) - log p*(original)`` over coherent fills, and its standard error, in nats.

    The original is a draw from the corpus's exact distribution of the gap given the rest: draws from that
    distribution have a mean of 0, fills that are too likely a positive one.
    """
    values = np.array([stories.log_prob(b) - stories.log_prob(a) for a, b in zip(originals, filled, strict=True)])
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return math.nan, math.nan
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def table(trained, count: int, seed: int, variants: Sequence[Variant], say: Callable[[str], None]) -> list[dict]:
    """Generates ``count`` stories in each way, says a line for each, and returns the rows.

    Args:
      trained: model, params, tokenizer and config (`trained.Trained`).
      count: stories a row.
      seed: of the noise and of the held-out prompts.
      variants: ways to generate.
      say: prints a line.
    """
    stories, rows = Stories(trained.config.data.stories), []
    for index, variant in enumerate(variants):
        start, more, added = time.monotonic(), "", {}
        if variant.gap:
            originals, texts = fill_gaps(trained, variant.gap, variant.settings, seed, count)
            mean, error = excess_log_prob(stories, originals, texts)
            more = f", log p* over that of the originals {mean:.2f} +- {error:.2f}"
            added = {"excess_log_prob": mean, "excess_log_prob_error": error}
        else:
            prompts = [""] * count
            if variant.prompted:
                prompts = held_out_prompts(trained, seed, count, variant.prompt_tokens)
            texts = write(trained.model, trained.params, trained.tokenizer, prompts, variant.settings, seed)
        scores, seconds = score(stories, texts), time.monotonic() - start
        rows.append({**variant.as_dict(), **scores.as_dict(), **added, "seed": seed, "examples": texts[:4]})
        say(
            f"[{index + 1}/{len(variants)}] {variant}: valid sentences {scores.valid}, coherent stories "
            f"{scores.coherent}, distinct factors {scores.factors}{more} ({count} stories, {seconds:.0f} s)"
        )
    return rows


def report(trained, settings: sampling.Settings, count: int, seed: int, say: Callable[[str], None]) -> dict:
    """The closing report of a run: held-out reconstruction, and stories from the prior, from noise, after prompts."""
    data = trained.config.data
    batches = pipeline.create(data, trained.tokenizer, "holdout", seed)
    enough = itertools.islice(batches, -(-count // data.batch_size))
    accuracy = reconstruction(trained.model, trained.params, enough, seed)
    say(f"held-out reconstruction accuracy {accuracy} of {accuracy.total} tokens")
    noise = dataclasses.replace(settings, prior="normal")
    variants = [Variant(settings), Variant(noise), Variant(fitted(settings, trained, seed, count), prompted=True)]
    rows = table(trained, count, seed, variants, say)
    for text in rows[0]["examples"]:
        say(f"  story: {text}")
    return {"reconstruction": accuracy.mean, "reconstruction_interval": accuracy.interval, "generation": rows}


def fitted(settings: sampling.Settings, trained, seed: int, count: int, tokens: int = 0) -> sampling.Settings:
    """``settings`` with the budget that the longest prompt leaves of the context."""
    prompts = held_out_prompts(trained, seed, count, tokens)
    longest = max(len(trained.tokenizer.encode(prompt)) for prompt in prompts)
    room = trained.config.data.sequence_length - longest
    return dataclasses.replace(settings, max_new_tokens=min(settings.max_new_tokens, room))
