"""Who sees whom: blocks of latents as a value, and the one predicate that every path of attention reads (3.7)."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

AnyArray = np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """How a sequence is cut into blocks, one after another: equal ones without an end, or some of given sizes.

    Made by `equal` or `of_sizes`; a static value (hashable). A sequence may end anywhere, also inside a block, but
    not beyond the last of the given sizes.

    Attributes:
      size: of equal blocks; None: they are those of ``sizes``.
      sizes: of each block.
    """

    size: int | None = None
    sizes: tuple[int, ...] = ()

    def __post_init__(self):
        sizes = self.sizes if self.size is None else (self.size,)
        if (self.size is not None and self.sizes) or not sizes or min(sizes) < 1:
            raise ValueError(f"block sizes {self.size}, {self.sizes}: must be one of equal blocks or some, at least 1")

    @classmethod
    def equal(cls, size: int) -> "BlockPlan":
        """Blocks of ``size`` positions, as many as a sequence has; of 1: attention is causal."""
        return cls(size=size)

    @classmethod
    def of_sizes(cls, sizes: Sequence[int]) -> "BlockPlan":
        """Blocks of these sizes, for an image among text say."""
        return cls(sizes=tuple(int(size) for size in sizes))

    def block_sizes(self, length: int) -> np.ndarray:
        """Sizes of the blocks of a sequence of ``length`` positions [G]; the last one is what is left of it."""
        whole = [self.size] * -(-length // self.size) if self.size else list(self.sizes)
        ends = np.minimum(np.cumsum(np.array(whole, np.int32), dtype=np.int32), length)
        if length and ends[-1] < length:
            raise ValueError(f"{length} positions: the plan's blocks must hold them, but hold {ends[-1]}")
        sizes = np.diff(ends, prepend=np.int32(0))
        return sizes[sizes > 0]

    def count(self, length: int) -> int:
        """Blocks G of a sequence of ``length`` positions."""
        return len(self.block_sizes(length))

    def starts(self, length: int) -> np.ndarray:
        """First position of each block [G]."""
        sizes = self.block_sizes(length)
        return np.cumsum(sizes, dtype=np.int32) - sizes

    def ids(self, length: int) -> np.ndarray:
        """Block of each position [N]."""
        return np.repeat(np.arange(self.count(length), dtype=np.int32), self.block_sizes(length))

    def id_of(self, positions: Int[AnyArray, "*S"]) -> Int[AnyArray, "*S"]:
        """Block of positions that need not be known before the program runs; NumPy arrays stay such."""
        if self.size:
            return positions // self.size
        find = np.searchsorted if isinstance(positions, np.ndarray) else jnp.searchsorted
        return find(np.cumsum(self.sizes, dtype=np.int32), positions, side="right").astype(positions.dtype)

    def offset_of(self, positions: Int[AnyArray, "*S"]) -> Int[AnyArray, "*S"]:
        """Index inside its block of each position."""
        if self.size:
            return positions % self.size
        ends = np.cumsum((0, *self.sizes), dtype=np.int32)  # one more: where positions beyond all blocks begin
        xp = np if isinstance(positions, np.ndarray) else jnp
        return positions - xp.take(xp.asarray(ends), self.id_of(positions))

    def is_whole(self, length: int) -> bool:
        """Whether a sequence of ``length`` positions ends with a block, not inside one."""
        return length % self.size == 0 if self.size else length in np.cumsum(self.sizes)

    def stretches(self, length: int, count: int, copies: int = 1) -> tuple[int, ...] | None:
        """Positions that each of ``count`` values has in ``copies`` of a sequence: a block's; None: equally many."""
        sizes = () if self.size else tuple(self.block_sizes(length).tolist()) * copies
        return sizes if len(sizes) == count else None

    def runs(self, length: int) -> list[tuple[int, int, int]]:
        """(begin, end, block size) of the stretches of equal blocks; ``length`` may cut the last block of the last."""
        if self.size:
            return [(0, length, self.size)]
        runs, begin = [], 0
        for size, blocks in itertools.groupby(self.sizes):
            end = min(begin + size * len(list(blocks)), length)
            if begin < end:
                runs.append((begin, end, size))
            begin = end
        return runs


class Place(NamedTuple):
    """Where positions are in a row of copies of one sequence; the three broadcast against each other, ranks equal.

    Attributes:
      copy: 0 the clean copy, 1 and more the noisy ones.
      block: of the copy.
      segment: document.
    """

    copy: Int[AnyArray, "*#B #N"]
    block: Int[AnyArray, "*#B #N"]
    segment: Int[AnyArray, "*#B #N"]


def visible(query: Place, key: Place) -> Bool[AnyArray, "*B N M"]:
    """Whether each query [..., N] may see each key [..., M] (3.7).

    A position sees, in its own segment, the strictly earlier blocks of the clean copy and its own block of its own
    copy. Without noisy copies that is block-causal attention; with blocks of one position, causal.
    """
    query, key = (Place(*place) for place in ((x[..., :, None] for x in query), (x[..., None, :] for x in key)))
    earlier = (key.copy == 0) & (key.block < query.block)
    own = (key.copy == query.copy) & (key.block == query.block)
    return (key.segment == query.segment) & (earlier | own)


def clean_place(block: Int[AnyArray, "*#B #N"], segment: Int[AnyArray, "*#B #N"] | None = None) -> Place:
    """Positions of the clean copy; ``segment`` None: all of one document."""
    zero = np.zeros((1,) * block.ndim, np.int32)
    return Place(zero, block, zero if segment is None else segment)


def block_causal(plan: BlockPlan, length: int) -> Bool[Array, "1 N N"]:
    """Who sees whom among the first positions of a sequence, or among any from the start of a block of equal ones."""
    place = clean_place(jnp.asarray(plan.ids(length))[None])
    return visible(place, place)


def of_cache(held: Bool[Array, "B S"], queries: int) -> Bool[Array, "B N S"]:
    """Which cached positions each of N ``queries`` sees: clean ones, of earlier blocks all, where ``held`` says so.

    Those that are not held are of a segment that no query has.
    """
    query = clean_place(np.ones((1, queries), np.int32), np.ones((1, queries), np.int32))
    return visible(query, clean_place(np.zeros((1, 1), np.int32), held.astype(jnp.int32)))
