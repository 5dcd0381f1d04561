"""Next-token prediction of documents packed in rows (SPEC 7)."""

import dataclasses

import jax.numpy as jnp

from cola_jax.fields import setting
from cola_jax.models.autoregressive import Autoregressive
from cola_jax.objectives import common
from cola_jax.types import Params, Term


@dataclasses.dataclass(frozen=True)
class NextTokenConfig:
    """Next-token training."""

    steps: int = setting(1000, "updates", at_least=0)


def terms(model: Autoregressive, params: Params, batch: dict) -> dict[str, Term]:
    """Cross-entropy ``-log p(x_t | x_<t)`` of every token of every document, the first one and the end of text too.

    Args:
      model: an `Autoregressive`.
      params: its variables.
      batch: tokens, segment_ids [B, T]; segment 0 is padding and counts nowhere.

    Returns:
      Terms per example: "next_token" in nats per token, "accuracy" (reported only).
    """
    tokens, segments = batch["tokens"], batch["segment_ids"]
    real = (segments > 0).astype(jnp.float32)

    def reduce(logits, tokens):
        return common.TokenScores(common.cross_entropy(logits, tokens), common.accuracy(logits, tokens))

    scores = model.apply(params, tokens, reduce, segments, method="logits_reduced")
    return {
        "next_token": common.per_example(scores.cross_entropy, real),
        "accuracy": common.per_example(scores.accuracy, real, 0.0),
    }
