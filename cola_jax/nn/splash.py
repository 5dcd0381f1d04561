"""Attention of a row of copies by JAX's TPU splash kernel: tiles of pairs that nobody sees are never computed.

On other devices the kernel can only be interpreted: slow, for tests. It has no forward-mode derivative.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from cola_jax.nn.visibility import BlockPlan, Place, visible

LANES = 128  # rows are filled up to a multiple of this
_PADDING = np.iinfo(np.int32).min  # a segment of its own


@dataclasses.dataclass(frozen=True)
class _Mask(splash_attention.Mask):
    """Who is `visible` to whom but for segments, which the kernel knows apart; computed tile by tile."""

    row: int
    length: int
    plan: BlockPlan

    @property
    def shape(self) -> tuple[int, int]:
        return self.row, self.row

    def __getitem__(self, index) -> np.ndarray:
        return visible(*(self._place(np.arange(*part.indices(self.row))) for part in index))

    def _place(self, index: np.ndarray) -> Place:
        copy, position = np.divmod(index, self.length)
        return Place(copy, self.plan.id_of(position), np.zeros_like(index))


@functools.lru_cache(maxsize=32)
def _kernel(heads: int, row: int, length: int, plan: BlockPlan, interpret: bool):
    tile = max(size for size in (LANES, 2 * LANES) if row % size == 0)
    sizes = splash_attention.BlockSizes(
        **{f"block_{name}": tile for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")},
        **{f"block_{name}": tile for name in ("q_dq", "kv_dq")},
    )
    mask = splash_attention.MultiHeadMask([_Mask(row, length, plan)] * heads)
    with jax.core.eval_context():
        made = splash_attention.make_splash_mha(
            mask,
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name="attention",
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, made)  # kept between traces: no array of JAX, which may belong to one


def attend(
    q: Float[Array, "B R H C"],
    k: Float[Array, "B R H C"],
    v: Float[Array, "B R H C"],
    segment_ids: Int[Array, "#B R"] | None,
    length: int,
    plan: BlockPlan,
    interpret: bool = False,
) -> Float[Array, "B R H C"]:
    """Softmax attention under the `RowLayout` of these segments, length and plan."""
    batch, row, heads, channels = q.shape
    padded = row + -row % LANES
    ids = jnp.zeros((1, row), jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    ids = jnp.pad(ids, ((0, 0), (0, padded - row)), constant_values=_PADDING)
    ids = jnp.broadcast_to(ids, (batch, padded))
    q = q * jnp.asarray(channels**-0.5, q.dtype)
    q, k, v = (jnp.pad(x, ((0, 0), (0, padded - row), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q, k, v))

    def local(q, k, v, ids):
        kernel = _kernel(q.shape[1], padded, length, plan, interpret)
        one = lambda q, k, v, ids: kernel(q, k, v, segment_ids=splash_attention.SegmentIds(ids, ids))  # noqa: E731
        return jax.vmap(one)(q, k, v, ids)

    out = _on_mesh(local, batch, heads)(q, k, v, ids)
    return out.swapaxes(1, 2)[:, :row]


def _on_mesh(function, batch: int, heads: int):
    """``function`` on each device's own examples and heads: XLA does not partition a kernel by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function
    axes = nn.logical_to_mesh_axes(("batch", "heads"))

    def size(axis) -> int:
        return int(np.prod([mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis or ())]))

    over_batch, over_heads = (a if n % size(a) == 0 else None for a, n in zip(axes, (batch, heads), strict=True))
    array = PartitionSpec(over_batch, over_heads)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(array, array, array, PartitionSpec(over_batch)),
        out_specs=array,
        check_vma=False,
    )
