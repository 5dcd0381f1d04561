"""How well a model has learnt the embedded corpus: reconstruction, and the stories that it generates."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from cola_jax import rng, sampling
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
        posterior = model.apply(params, batch["tokens"], segments, method="encode")
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
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Prompts with their continuations; an empty prompt gives a story from nothing.

    Args:
      seed: of the noise, stream "sample"; story i depends on (seed, i) alone.
      batch_size: prompts generated at a time.
      progress: called with (written, of how many) after each batch.
    """
    texts: list[str] = []
    ids = [tokenizer.encode(p) if p else [] for p in prompts]
    for start in range(0, len(ids), batch_size):
        chunk = ids[start : start + batch_size]
        # The last batch is filled up, so that it does not need a program of its own.
        filled = chunk + [chunk[-1]] * (min(batch_size, len(ids)) - len(chunk))
        numbers = range(start, start + len(filled))
        out = sampling.generate(model, params, filled, settings, rng.key(seed, "sample"), sample_ids=numbers)
        tokens, lengths = np.asarray(out.tokens), np.asarray(out.lengths)
        for row, prompt in enumerate(chunk):
            texts.append(tokenizer.decode([*prompt, *tokens[row, : lengths[row]].tolist()]))
        if progress:
            progress(len(texts), len(ids))
    return texts


def score(stories: Stories, texts: Sequence[str]) -> Scores:
    """Scores of whole stories (prompt included)."""
    parses = [stories.parse(text) for text in texts]
    sentences = [sentence.valid for parse in parses for sentence in parse.sentences]
    coherent = [parse for parse in parses if parse.coherent]
    factors = {tuple(sorted(parse.factor.items())) for parse in coherent}
    return Scores(
        Proportion(sum(sentences), len(sentences)), Proportion(len(coherent), len(parses)), len(factors)
    )
