"""Multi-head attention: of block-causal sequences, against a sequence under a mask, and of blocks with a cache.

Logits and softmax are float32 (or wider) whatever the compute type. Keys arrive after norm and RoPE.
"""

import functools
import math
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from cola_jax.nn.visibility import BlockPlan, Place, clean_place, visible

KERNELS = ("auto", "xla", "splash", "splash_interpreted")
_MASKED = -1e30  # finite, so that a row without any key gives no NaN


@flax.struct.dataclass
class RowLayout:
    """A row of copies of one sequence: clean data first, then noisy copies of it, or none (see `visible`).

    Attributes:
      length: positions N of a copy. Only the clean copy of a row without noisy ones may end inside a block.
      plan: blocks of a copy.
      segment_ids: document of each position of the row; None: all are of one.
      kernel: one of `KERNELS` (see `choose_kernel`).
      context_ids: document of each position of a context that stands before the row; None: there is none.
    """

    length: int = flax.struct.field(pytree_node=False)
    plan: BlockPlan = flax.struct.field(pytree_node=False)
    segment_ids: Int[Array, "#B R"] | None = None
    kernel: str = flax.struct.field(pytree_node=False, default="xla")
    context_ids: Int[Array, "#B S"] | None = None


def attend_row(
    q: Float[Array, "B R H C"],
    k: Float[Array, "B R H C"],
    v: Float[Array, "B R H C"],
    layout: RowLayout,
    context: tuple[Float[Array, "B H S C"], Float[Array, "B H S C"]] | None = None,
) -> Float[Array, "B R H C"]:
    """Softmax attention of a row of ``R / layout.length`` copies, each query to what is `visible` to it.

    No mask of R x R is made.

    Args:
      q, k, v: of the row.
      layout: of the row; its ``context_ids`` are the segments of the context's positions.
      context: keys and values, as they were `kept`, of clean data that stands before the row: an earlier block.
    """
    if q.shape[1] > layout.length and not layout.plan.is_whole(layout.length):
        raise ValueError(f"{layout.length} positions: must end with a block where noisy copies follow")
    kernel = choose_kernel(layout.kernel, q.shape[-1], q.shape[1], jax.default_backend())
    if kernel == "xla" or context is not None:
        return checkpoint_name(_xla(q, k, v, layout, context), "attention")
    from cola_jax.nn import splash  # loads Pallas

    return splash.attend(q, k, v, layout.segment_ids, layout.length, layout.plan, kernel == "splash_interpreted")


def choose_kernel(kernel: str, channels: int, row: int, platform: str) -> str:
    """What "auto" stands for, heads of ``channels`` and rows of ``row`` positions given: splash on a TPU if it suits.

    "splash" is `cola_jax.nn.splash` for TPUs, "splash_interpreted" the same anywhere, slowly, for tests; "xla" is
    plain JAX.
    """
    if kernel != "auto":
        return kernel
    return "splash" if platform == "tpu" and channels % 128 == 0 and row >= 128 else "xla"


def _chunks(length: int, plan: BlockPlan) -> list[tuple[int, int, int]]:
    """(begin, end, block size) of ranges of whole blocks of one size.

    They have at least 128 positions and an eighth of the sequence each, where as many blocks of one size follow each
    other.
    """
    chunks = []
    for begin, end, size in plan.runs(length):
        step = size * -(-max(128, length // 8) // size)
        chunks += [(first, min(first + step, end), size) for first in range(begin, end, step)]
    return chunks


def _xla(q, k, v, layout: RowLayout, context=None):
    """Chunk by chunk of the queries, each against the keys up to its end: about half of all pairs."""
    (batch, row, heads, channels), length = q.shape, layout.length
    copies = row // length - 1
    ids = jnp.zeros((1, row), jnp.int32) if layout.segment_ids is None else layout.segment_ids
    clean, noisy = _places(layout.plan, ids, length)
    clean_q, clean_k, clean_v = (x[:, :length] for x in (q, k, v))
    keys, held = clean, 0
    if context is not None:
        keys, held = _after_context(clean, layout.context_ids), layout.context_ids.shape[1]
        clean_k, clean_v = (
            jnp.concatenate(pair, axis=1) for pair in zip(kept(*context), (clean_k, clean_v), strict=True)
        )
    noisy_qkv = [x[:, length:].reshape(batch, copies, length, heads, channels) for x in (q, k, v)]
    clean_out, noisy_out = [], []
    for begin, end, size in _chunks(length, layout.plan):
        mask, seen = visible(_at(clean, begin, end), _at(keys, 0, held + end)), slice(held + end)
        clean_out.append(attend(clean_q[:, begin:end], clean_k[:, seen], clean_v[:, seen], mask))
        if not copies:
            continue
        part_qkv = (x[:, :, begin:end].reshape(batch, -1, heads, channels) for x in noisy_qkv)
        past = held + end - size  # the chunk's last block sees nothing later
        here = _at(noisy, begin, end)
        earlier = visible(here, Place(*(x[:, None] for x in _at(keys, 0, past))))
        earlier = earlier.reshape(earlier.shape[0], copies * (end - begin), past)
        own = visible(*[_by_block(here, size)] * 2)
        own = own.reshape(own.shape[0], -1, size, size)
        part = attend_history(*part_qkv, (clean_k[:, :past], clean_v[:, :past]), earlier, own)
        noisy_out.append(part.reshape(batch, copies, end - begin, heads, channels))
    if not copies:
        return jnp.concatenate(clean_out, axis=1)
    noisy_row = jnp.concatenate(noisy_out, axis=2).reshape(batch, copies * length, heads, channels)
    return jnp.concatenate([*clean_out, noisy_row], axis=1)


def _places(plan: BlockPlan, ids: Array, length: int) -> tuple[Place, Place]:
    """Places of the clean copy [#B, N] and of the noisy copies [#B, copies, N] of a row with segments [#B, R]."""
    block, copies = jnp.asarray(plan.ids(length)), ids.shape[1] // length - 1
    copy = np.arange(1, 1 + copies, dtype=np.int32)[None, :, None]
    noisy = Place(copy, block[None, None], ids[:, length:].reshape(ids.shape[0], copies, length))
    return clean_place(block[None], ids[:, :length]), noisy


def _after_context(clean: Place, context_ids: Array) -> Place:
    """Places of a context, the block before the first one, and of the clean copy behind it."""
    ids = (context_ids, clean.segment)
    batch = max(x.shape[0] for x in ids)
    block = jnp.pad(clean.block, ((0, 0), (context_ids.shape[1], 0)), constant_values=-1)
    return clean_place(block, jnp.concatenate([jnp.broadcast_to(x, (batch, x.shape[1])) for x in ids], axis=1))


def _at(place: Place, begin: int, end: int) -> Place:
    """A range of positions of each copy."""
    return Place(place.copy, place.block[..., begin:end], place.segment[..., begin:end])


def _by_block(place: Place, size: int) -> Place:
    """Blocks of ``size`` on an axis of their own: [..., G * K] to [..., G, K]."""
    block, segment = (x.reshape(*x.shape[:-1], -1, size) for x in place[1:])
    return Place(place.copy[..., None], block, segment)


def _logits(q, k, mask, equation: str):
    """Logits [B, H, ...] of queries that have the factor 1 / sqrt(C) already (see `_scaled`)."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum(equation, q, k, preferred_element_type=dtype)
    return logits if mask is None else jnp.where(mask, logits, _MASKED)


def _softmax(logits: Sequence[Array], dtype) -> tuple[list[Array], Array]:
    """One softmax over several sets of keys, [B, H, N, M] each: weights in ``dtype`` before division, divisor.

    Dividing the output instead of the weights saves two passes over the pairs.
    """
    highest = functools.reduce(jnp.maximum, [jnp.max(x, axis=-1, keepdims=True) for x in logits if x.shape[-1]])
    weights = [jnp.exp(x - jax.lax.stop_gradient(highest)) for x in logits]
    total = sum(jnp.sum(x, axis=-1) for x in weights)
    return [x.astype(dtype) for x in weights], jnp.swapaxes(total, 1, 2)[..., None]


def _scaled(q):
    return q * jnp.asarray(1.0 / math.sqrt(q.shape[-1]), q.dtype)


def _weighted(weights, v, equation: str):
    return jnp.einsum(equation, weights, v, preferred_element_type=jnp.promote_types(v.dtype, jnp.float32))


def _divided(out, total, dtype):
    return (out / total).astype(dtype)


def attend(
    q: Float[Array, "B N H C"],
    k: Float[Array, "B M H C"],
    v: Float[Array, "B M H C"],
    mask: Bool[Array, "#B N M"] | None = None,
) -> Float[Array, "B N H C"]:
    """Softmax attention; ``mask`` is True where a query may see a key."""
    logits = _logits(_scaled(q), k, None if mask is None else mask[:, None], "bnhc,bmhc->bhnm")
    (weights,), total = _softmax([logits], v.dtype)
    return _divided(_weighted(weights, v, "bhnm,bmhc->bnhc"), total, v.dtype)


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
      history: keys and values of the clean latents.
      history_mask: True where a query may see a history position.
      block_mask: True where a query may see a position of its own block.
    """
    return _attend_history(q, k, v, history, history_mask, block_mask, "bmhc")


def _attend_history(q, k, v, history, history_mask, block_mask, axes: str):
    """`attend_history`; ``axes`` of the history's keys and values."""
    batch, length, heads, channels = q.shape
    groups, block = block_mask.shape[1:3]
    history_k, history_v = history

    def split(x):
        return x.reshape(batch, groups, block, heads, channels)

    q = _scaled(q)
    past = _logits(q, history_k, history_mask[:, None], f"bnhc,{axes}->bhnm")
    own = _logits(split(q), split(k), block_mask[:, None], "bgihc,bgjhc->bhgij")
    (past, own), total = _softmax([past, own.reshape(batch, heads, length, block)], v.dtype)
    own = own.reshape(batch, heads, groups, block, block)
    out = _weighted(own, split(v), "bhgij,bgjhc->bgihc").reshape(q.shape)
    return _divided(out + _weighted(past, history_v, f"bhnm,{axes}->bnhc"), total, v.dtype)


def kept(
    k: Float[Array, "B N H C"], v: Float[Array, "B N H C"]
) -> tuple[Float[Array, "B H N C"], Float[Array, "B H N C"]]:
    """Keys and values as a cache keeps them: each head's positions lie together, as `attend_cached` reads them."""
    return jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)


def attend_cached(
    q: Float[Array, "B Q H C"],
    k: Float[Array, "B Q H C"],
    v: Float[Array, "B Q H C"],
    history: tuple[Float[Array, "B H M C"], Float[Array, "B H M C"]],
    history_mask: Bool[Array, "#B N M"],
    own_mask: Bool[Array, "#B 1 N N"],
) -> Float[Array, "B Q H C"]:
    """The first N queries attend to [history | each other]; those behind them are one block without history.

    The history is as it was `kept`.
    """
    seen = history_mask.shape[1]
    out = _attend_history(q[:, :seen], k[:, :seen], v[:, :seen], history, history_mask, own_mask, "bhmc")
    if seen == q.shape[1]:
        return out
    return jnp.concatenate([out, attend(q[:, seen:], k[:, seen:], v[:, seen:])], axis=1)
