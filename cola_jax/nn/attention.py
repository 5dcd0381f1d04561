"""Multi-head attention: against a sequence, and of blocks against a history and themselves.

Logits and softmax are float32 (or wider) whatever the compute type. Keys arrive after norm and RoPE.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_MASKED = -1e30  # finite, so that a row without any key gives no NaN


def _logits(q, k, mask, equation: str):
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum(equation, q, k, preferred_element_type=dtype) / math.sqrt(q.shape[-1])
    return logits if mask is None else jnp.where(mask, logits, _MASKED)


def attend(
    q: Float[Array, "B N H C"],
    k: Float[Array, "B M H C"],
    v: Float[Array, "B M H C"],
    mask: Bool[Array, "#B N M"] | None = None,
) -> Float[Array, "B N H C"]:
    """Softmax attention; ``mask`` is True where a query may see a key."""
    logits = _logits(q, k, None if mask is None else mask[:, None], "bnhc,bmhc->bhnm")
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhnm,bmhc->bnhc", weights, v)


def attend_history(
    q: Float[Array, "B N H C"],
    k: Float[Array, "B N H C"],
    v: Float[Array, "B N H C"],
    history: tuple[Float[Array, "B M H C"], Float[Array, "B M H C"]],
    history_mask: Bool[Array, "#B N M"],
    block_mask: Bool[Array, "#B G K K"],
) -> Float[Array, "B N H C"]:
    """Each of the G = N / K blocks of queries attends to [history | its own block] in one softmax.

    Equal to attention over history and all queries' keys under the mask in which blocks do not see each
    other, at a cost of M + K keys a query instead of M + N.

    Args:
      q, k, v: queries, and the keys and values of the same positions.
      history: keys and values of the clean latents, or of a cache.
      history_mask: True where a query may see a history position.
      block_mask: True where a query may see a position of its own block.
    """
    batch, length, heads, channels = q.shape
    groups, block = block_mask.shape[1:3]
    history_k, history_v = history

    def split(x):
        return x.reshape(batch, groups, block, heads, channels)

    past = _logits(q, history_k, history_mask[:, None], "bnhc,bmhc->bhnm")
    own = _logits(split(q), split(k), block_mask[:, None], "bgihc,bgjhc->bhgij")
    logits = jnp.concatenate([past, own.reshape(batch, heads, length, block)], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    past_w, own_w = jnp.split(weights, [history_k.shape[1]], axis=-1)
    out = jnp.einsum("bhnm,bmhc->bnhc", past_w, history_v)
    own_w = own_w.reshape(batch, heads, groups, block, block)
    return out + jnp.einsum("bhgij,bgjhc->bgihc", own_w, split(v)).reshape(q.shape)
