"""Multi-head attention: of block-causal sequences, against a sequence under a mask, and of blocks with a cache.

Logits and softmax are float32 (or wider) whatever the compute type. Keys arrive after norm and RoPE.
"""

import functools
import math
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from cola_jax.nn import masks

KERNELS = ("auto", "xla", "splash", "splash_interpreted")
_MASKED = -1e30  # finite, so that a row without any key gives no NaN


@flax.struct.dataclass
class Layout:
    """Who sees whom in a row of copies of one sequence: clean data first, then noisy copies of it, or none.

    A position sees the strictly earlier blocks of the clean copy and its own block of its own copy (3.7), where
    these have its segment. Without noisy copies that is block-causal attention; with blocks of 1, causal.

    Attributes:
      length: positions N of a copy. Only the clean copy of a row without noisy ones may end inside a block.
      block_size: positions of a block.
      segment_ids: document of each position of the row; None: all are of one.
      kernel: one of `KERNELS` (see `choose_kernel`).
    """

    length: int = flax.struct.field(pytree_node=False)
    block_size: int = flax.struct.field(pytree_node=False)
    segment_ids: Int[Array, "#B R"] | None = None
    kernel: str = flax.struct.field(pytree_node=False, default="xla")


def attend_layout(
    q: Float[Array, "B R H C"], k: Float[Array, "B R H C"], v: Float[Array, "B R H C"], layout: Layout
) -> Float[Array, "B R H C"]:
    """Softmax attention of a row of ``R / layout.length`` copies under `Layout`, without a mask of R x R."""
    kernel = choose_kernel(layout.kernel, q.shape[-1], q.shape[1], jax.default_backend())
    if kernel == "xla":
        return checkpoint_name(_xla(q, k, v, layout), "attention")
    from cola_jax.nn import splash  # loads Pallas

    interpret = kernel == "splash_interpreted"
    return splash.attend(q, k, v, layout.segment_ids, layout.length, layout.block_size, interpret)


def choose_kernel(kernel: str, channels: int, row: int, platform: str) -> str:
    """What "auto" stands for, heads of ``channels`` and rows of ``row`` positions given: splash on a TPU if it suits.

    "splash" is `cola_jax.nn.splash` for TPUs, "splash_interpreted" the same anywhere, slowly, for tests; "xla" is
    plain JAX.
    """
    if kernel != "auto":
        return kernel
    return "splash" if platform == "tpu" and channels % 128 == 0 and row >= 128 else "xla"


def _chunks(length: int, block_size: int) -> list[tuple[int, int]]:
    """Ranges of whole blocks, at least 128 positions and an eighth of the sequence each (except the last)."""
    size = block_size * -(-max(128, length // 8) // block_size)
    return [(begin, min(begin + size, length)) for begin in range(0, length, size)]


def _xla(q, k, v, layout: Layout):
    """Chunk by chunk of the queries, each against the keys up to its end: about half of all pairs."""
    (batch, row, heads, channels), length, size = q.shape, layout.length, layout.block_size
    copies = row // length - 1
    ids = jnp.zeros((1, row), jnp.int32) if layout.segment_ids is None else layout.segment_ids
    clean_q, clean_k, clean_v, clean_ids = (x[:, :length] for x in (q, k, v, ids))
    noisy = [x[:, length:].reshape(x.shape[0], copies, length, *x.shape[2:]) for x in (q, k, v, ids)]
    clean_out, noisy_out = [], []
    for begin, end in _chunks(length, size):
        here = slice(begin, end)
        causal = masks.blocks(jnp.arange(begin, end), jnp.arange(end), size)
        mask = causal & masks.same_segment(clean_ids[:, here], clean_ids[:, :end])
        clean_out.append(attend(clean_q[:, here], clean_k[:, :end], clean_v[:, :end], mask))
        if not copies:
            continue
        part_q, part_k, part_v, part_ids = (
            x[:, :, here].reshape(x.shape[0], copies * (end - begin), *x.shape[3:]) for x in noisy
        )
        past = end - size  # the chunk's last block sees nothing later
        earlier = masks.blocks(jnp.arange(begin, end), jnp.arange(past), size, strict=True)
        earlier = jnp.tile(earlier, (1, copies, 1)) & masks.same_segment(part_ids, clean_ids[:, :past])
        by_block = part_ids.reshape(part_ids.shape[0], -1, size)
        own = by_block[..., :, None] == by_block[..., None, :]
        history = (clean_k[:, :past], clean_v[:, :past])
        part = attend_history(part_q, part_k, part_v, history, earlier, own)
        noisy_out.append(part.reshape(batch, copies, end - begin, heads, channels))
    if not copies:
        return jnp.concatenate(clean_out, axis=1)
    noisy_row = jnp.concatenate(noisy_out, axis=2).reshape(batch, copies * length, heads, channels)
    return jnp.concatenate([*clean_out, noisy_row], axis=1)


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
      history: keys and values of the clean latents, or of a cache.
      history_mask: True where a query may see a history position.
      block_mask: True where a query may see a position of its own block.
    """
    batch, length, heads, channels = q.shape
    groups, block = block_mask.shape[1:3]
    history_k, history_v = history

    def split(x):
        return x.reshape(batch, groups, block, heads, channels)

    q = _scaled(q)
    past = _logits(q, history_k, history_mask[:, None], "bnhc,bmhc->bhnm")
    own = _logits(split(q), split(k), block_mask[:, None], "bgihc,bgjhc->bhgij")
    (past, own), total = _softmax([past, own.reshape(batch, heads, length, block)], v.dtype)
    own = own.reshape(batch, heads, groups, block, block)
    out = _weighted(own, split(v), "bhgij,bgjhc->bgihc").reshape(q.shape)
    return _divided(out + _weighted(past, history_v, "bhnm,bmhc->bnhc"), total, v.dtype)
