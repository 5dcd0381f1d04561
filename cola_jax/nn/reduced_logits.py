"""Logits that are reduced chunk by chunk: those of a whole batch, the largest array of a step by far, never exist."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def reduced_logits(
    head: Callable[[Array], Array],
    hidden: Float[Array, "B T C"],
    tokens: Int[Array, "B T"],
    reduce: Callable[[Array, Array], Any],
    chunk: int,
) -> Any:
    """``reduce(head(hidden), tokens)``, some positions of each sequence at a time.

    A chunk's logits are computed again for its gradient. Weights and their gradient keep their own type: only
    inside a chunk is the computation in a narrower one.

    Args:
      head: module that maps [B, S, C] to logits [B, S, V].
      hidden: what it reads.
      tokens: the target at each position, handed to ``reduce``.
      reduce: ``(logits [B, S, V] in float32, tokens [B, S]) -> tree of arrays [B, S]``, each position for itself.
      chunk: positions S at a time; 0: all at once.

    Returns:
      What ``reduce`` returns, of arrays [B, T].
    """
    batch, length = tokens.shape

    def one(head, carry, part):
        return carry, reduce(head(part[0]).astype(jnp.float32), part[1])

    if not 0 < chunk < length:
        return one(head, None, (hidden, tokens))[1]
    chunks = -(-length // chunk)
    parts = (jnp.pad(x, ((0, 0), (0, chunks * chunk - length)) + ((0, 0),) * (x.ndim - 2)) for x in (hidden, tokens))
    parts = tuple(x.reshape(batch, chunks, chunk, *x.shape[2:]) for x in parts)
    scan = nn.scan(
        nn.remat(one, prevent_cse=False),
        variable_broadcast="params",
        split_rngs={"params": False},
        in_axes=1,
        out_axes=1,
    )
    _, values = scan(head, None, parts)
    return jax.tree.map(lambda x: x.reshape(batch, chunks * chunk)[:, :length], values)
