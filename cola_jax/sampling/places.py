"""The places of a batch: sequences join it, leave it and move in it.

A batch is a tree whose leaves begin with the sequences; stacked caches [layers, B, H, S, C] do with their second axis.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from cola_jax.types import PyTree


def _axis(leaf) -> int:
    return 1 if leaf.ndim == 5 else 0


@functools.partial(jax.jit, donate_argnums=0)
def insert(batch: PyTree, new: PyTree, rows: Int[Array, " R"]) -> PyTree:
    """Puts R new sequences in the places ``rows`` of a batch; a place outside of it drops its sequence."""

    def leaf(old, new):
        return old.at[(slice(None),) * _axis(old) + (rows,)].set(new, mode="drop")

    return jax.tree.map(leaf, batch, new)


@jax.jit
def select(batch: PyTree, rows: Int[Array, " R"]) -> PyTree:
    """The batch of R sequences that stand in the places ``rows``."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=_axis(leaf)), batch)
