"""Next-token prediction of documents packed in rows (SPEC 7)."""

import jax.numpy as jnp

from cola_jax.models.autoregressive import Autoregressive
from cola_jax.objectives import common
from cola_jax.types import Key, Params, Term


def terms(model: Autoregressive, config, params: Params, batch: dict, keys: Key) -> dict[str, Term]:
    """Cross-entropy ``-log p(x_t | x_<t)`` of every token of every document, the first one and the end of text too.

    Args:
      model: an `Autoregressive`.
      config: not read; in the place where other objectives have theirs.
      params: its variables.
      batch: tokens, segment_ids [B, T]; segment 0 is padding and counts nowhere.
      keys: [B]; not read: nothing is drawn.

    Returns:
      Terms per example: "next_token" in nats per token, "accuracy" (reported only).
    """
    del config, keys
    tokens, segments = batch["tokens"], batch["segment_ids"]
    real = (segments > 0).astype(jnp.float32)

    def reduce(logits, tokens):
        return common.TokenScores(common.cross_entropy(logits, tokens), common.accuracy(logits, tokens))

    scores = model.apply(params, tokens, reduce, segments, method="logits_reduced")
    return {
        "next_token": common.per_example(scores.cross_entropy, real),
        "accuracy": common.per_example(scores.accuracy, real, 0.0),
    }
