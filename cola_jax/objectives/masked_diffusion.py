"""Masked diffusion of tokens, the objective of LLaDA (11.13-11.16)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cola_jax import rng
from cola_jax.fields import setting
from cola_jax.models.llada import LLaDA
from cola_jax.objectives import common
from cola_jax.types import Key, Params, Term


@dataclasses.dataclass(frozen=True)
class MaskedDiffusionConfig:
    """Training of LLaDA."""

    steps: int = setting(1000, "updates", at_least=0)
    smallest_time: float = setting(1e-3, "masking ratios are uniform from this to 1", above=0, below=1)
    random_length: float = setting(
        0.0, "share of the rows that are cut to a uniformly random length; LLaDA has 0.01", at_least=0, at_most=1
    )


def corrupt(keys: Key, length: int, smallest: float) -> tuple[Float[Array, " B"], Bool[Array, "B T"]]:
    """Masking ratios t ~ U(smallest, 1) [B], and masks [B, T] in which each position is masked with probability t.

    It is the forward process of 11.15 at one time: a chain in which every token jumps to the mask at a rate ``beta(s)``
    and stays there has left its token with probability ``t = 1 - exp(-integral of beta)`` (11.16).

    Args:
      keys: [B].
      length: T.
      smallest: ratio, in (0, 1).
    """
    ratio_keys, mask_keys = rng.split(keys, 2)
    ratio = smallest + (1 - smallest) * rng.uniform(ratio_keys, ())
    return ratio, rng.uniform(mask_keys, (length,)) < ratio[:, None]


def shortened(keys: Key, segments: Int[Array, "B T"], share: float) -> Int[Array, "B T"]:
    """``segments`` with padding behind a length that is uniform in 1..T, in a share of the rows."""
    choose, size = rng.split(keys, 2)
    length = segments.shape[1]
    kept = 1 + jnp.floor(rng.uniform(size, ()) * length)
    kept = jnp.where(rng.uniform(choose, ()) < share, kept, length)
    return jnp.where(jnp.arange(length)[None] < kept[:, None], segments, 0)


def terms(model: LLaDA, stage: MaskedDiffusionConfig, params: Params, batch: dict, keys: Key) -> dict[str, Term]:
    """``E_t[(1 / t) sum over masked of -log p(token | tokens that are not)]``, a bound on -log p(x) (11.13-11.14).

    Args:
      model: a `LLaDA`.
      stage: its settings.
      params: its variables.
      batch: tokens, segment_ids [B, T]; segment 0 is padding and counts nowhere.
      keys: [B].

    Returns:
      Terms per example: "masked" in nats per token; "accuracy" of the masked tokens (reported only).
    """
    tokens, segments = batch["tokens"], batch["segment_ids"]
    mask_keys, length_keys = rng.split(keys, 2)
    if stage.random_length:
        segments = shortened(length_keys, segments, stage.random_length)
    real = segments > 0
    ratio, masked = corrupt(mask_keys, tokens.shape[1], stage.smallest_time)
    masked = masked & real

    def reduce(logits, tokens):
        return common.TokenScores(common.cross_entropy(logits, tokens), common.accuracy(logits, tokens))

    scores = model.apply(params, tokens, masked, reduce, segments, method="logits_reduced")
    surprise = jnp.where(masked, scores.cross_entropy, 0.0) / ratio[:, None]
    return {
        "masked": common.per_example(surprise, real.astype(jnp.float32)),
        "accuracy": common.per_example(scores.accuracy, masked.astype(jnp.float32), 0.0),
    }
