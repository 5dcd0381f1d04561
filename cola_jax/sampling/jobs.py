"""What a batch whose sequences come and go needs to know of each of them, and what it tells."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cola_jax import rng
from cola_jax.sampling.choose import Choice
from cola_jax.types import Key

Ids = Sequence[int]


class Picture(NamedTuple):
    """What a text may follow: pixels, uint8 [S, S, 3], and token ids of what is said before them (empty: nothing)."""

    pixels: np.ndarray
    said: Ids = ()


class Job(NamedTuple):
    """One sequence that is to be generated.

    Attributes:
      prompt: token ids; empty: from nothing.
      max_new_tokens: budget, or the length of the gap.
      choice: how its tokens are chosen, in numbers.
      seed, sample: the draws are those of this sample of ``rng.key(seed, "sample")``.
      suffix: what stands behind the gap that is filled; None: the prompt is continued.
      picture: what the text follows; None: nothing.
      drawing: of an image, `images.ImageSettings`; None: the program's.
    """

    prompt: Ids
    max_new_tokens: int
    choice: Choice
    seed: int = 0
    sample: int = 0
    suffix: Ids | None = None
    picture: Picture | None = None
    drawing: Any = None

    @property
    def known(self) -> tuple:
        """What its start depends on: sequences of which this is equal start equally."""
        seen = () if self.picture is None else (self.picture.pixels.tobytes(), tuple(self.picture.said))
        if self.suffix is None:
            return tuple(self.prompt), *seen
        return tuple(self.prompt), self.max_new_tokens, tuple(self.suffix), *seen


class Progress(NamedTuple):
    """How far the sequences of a batch are.

    Attributes:
      tokens: [B, L], new tokens.
      ready: [B], how many of them are final; those behind them are not there yet.
      done: [B], whether that is all.
      log_probs: of the new tokens, where the family has them (`autoregressive.LogProbs`).
      pictures: uint8 [B, S, S, 3], of those that are done, where images are drawn.
    """

    tokens: Any
    ready: Any
    done: Any
    log_probs: Any = None
    pictures: Any = None


def choices(jobs: Sequence[Job]) -> Choice:
    """The choices of several sequences, as arrays [B]."""
    ends = [-1 if job.choice.eos_id is None else job.choice.eos_id for job in jobs]
    columns = zip(*(job.choice._replace(eos_id=end) for job, end in zip(jobs, ends, strict=True)), strict=True)
    kinds = Choice(np.float32, np.int32, np.float32, np.float32, np.int32)
    return Choice(*(np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)))


def keys(jobs: Sequence[Job]) -> Key:
    """The keys [B] of several sequences."""
    seeds = np.array([job.seed % 2**32 for job in jobs], np.uint32)
    return _keys(seeds, np.array([job.sample for job in jobs], np.int32))


_keys = jax.jit(lambda seeds, samples: rng.keys(seeds, "sample", samples))
