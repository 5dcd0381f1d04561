"""Who attends to whom, as boolean masks (True: may attend) that broadcast over batch and heads."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def causal(length: int) -> Bool[Array, "1 N N"]:
    """Position i attends to positions <= i."""
    return block_causal(length, 1)


def block_causal(length: int, block_size: int, strict: bool = False) -> Bool[Array, "1 N N"]:
    """Position i attends to its own block and earlier ones; ``strict``: to earlier ones only."""
    index = jnp.arange(length)
    return blocks(index, index, block_size, strict)


def blocks(
    query: Int[Array, " N"], key: Int[Array, " M"], block_size: int, strict: bool = False
) -> Bool[Array, "1 N M"]:
    """`block_causal` between any positions of a sequence."""
    query, key = query[:, None] // block_size, key[None, :] // block_size
    return (query > key if strict else query >= key)[None]


def same_segment(query: Int[Array, "B N"], key: Int[Array, "B M"]) -> Bool[Array, "B N M"]:
    """Positions attend within their own document only."""
    return query[:, :, None] == key[:, None, :]
