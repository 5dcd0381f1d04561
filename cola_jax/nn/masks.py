"""Who attends to whom, as boolean masks (True: may attend) that broadcast over batch and heads."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def causal(length: int) -> Bool[Array, "1 N N"]:
    """Position i attends to positions <= i."""
    index = jnp.arange(length)
    return (index[:, None] >= index[None, :])[None]


def block_causal(length: int, block_size: int, strict: bool = False) -> Bool[Array, "1 N N"]:
    """Position i attends to its own block and earlier ones; ``strict``: to earlier ones only."""
    block = jnp.arange(length) // block_size
    return (block[:, None] > block[None, :] if strict else block[:, None] >= block[None, :])[None]


def same_segment(query: Int[Array, "B N"], key: Int[Array, "B M"]) -> Bool[Array, "B N M"]:
    """Positions attend within their own document only."""
    return query[:, :, None] == key[:, None, :]
