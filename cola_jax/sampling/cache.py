"""The sampler's caches: keys and values of finished positions, as values that go in and come out."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cola_jax import sharding

# Keys and values [..., B, H, S, C] of the history: what `BlockCausalDiT.prefill` and `TextVAE.decode_prompt` make.
Cache = Any


def commit(cache: Cache, new, start: Array) -> Cache:
    """The cache with ``new`` [..., B, H, n, C] in it, from each sequence's own position ``start`` [B] on."""

    def leaf(c, n):
        # One scatter whose batch stays in its place; vmap would move it to the front, and so copy the cache.
        batch = c.ndim - 4
        dims = jax.lax.ScatterDimensionNumbers(
            update_window_dims=tuple(axis for axis in range(c.ndim) if axis != batch),
            inserted_window_dims=(),
            scatter_dims_to_operand_dims=(batch + 2,),
            operand_batching_dims=(batch,),
            scatter_indices_batching_dims=(0,),
        )
        return jax.lax.scatter(c, start[:, None], n, dims, unique_indices=True, mode="clip")

    return constrain(jax.tree.map(leaf, cache, new))


def grow(cache: Cache, room: int) -> Cache:
    """The cache with room for more positions behind those that it has."""
    return constrain(jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, room), (0, 0)]), cache))


def constrain(cache: Cache) -> Cache:
    """Heads over the mesh axis "tensor", sequences over the others."""
    names = (None, "batch", "heads", "length", "kv")
    return jax.tree.map(lambda x: sharding.constrain(x, *names[-x.ndim :]), cache)


def rows_at(x: Array, index: Array) -> Array:
    """x[b, index[b]] for every sequence."""
    return jax.vmap(lambda row, i: jnp.take(row, i, axis=0))(x, index)
