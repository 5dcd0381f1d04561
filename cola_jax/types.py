"""Shared vocabulary: dimension names, array aliases, user-facing errors.

Dimensions, here and in every docstring:

====  =====================================================
B     batch
T     tokens in a sequence
P     patch size of the VAE: tokens per latent
N     latents in a sequence, ``N = T / P``
D     latent channels
K     latents per block; blocks are the unit of generation
M     distinct flow times in a sequence (1, ``N / K`` or N)
H     attention heads
V     vocabulary
====  =====================================================

Flow time ``t`` runs from 0 (data) to 1 (noise).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float

PyTree = Any
Params = PyTree  # Flax variables: {"params": ...}
Key = jax.Array  # typed PRNG key(s)
Place = Path | epath.Path  # a path of this machine, or one in a bucket


class UserError(ValueError):
    """Something that the user can fix, reported in one line: the field or file, its value, what it must be."""


class TemporaryError(Exception):
    """Something outside the program failed (a disk, the network, another process), reported in one line.

    The same command may succeed: a program ends with the status that asks for another start, not with that of an error.
    """


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array on the disk, read when it is needed and not kept: what is converted need not fit into memory."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], jax.Array]


class Posterior(NamedTuple):
    """Diagonal Gaussian ``q(z|x)`` over latents, before latent normalisation (SPEC 2)."""

    mean: Float[Array, "B N D"]
    logvar: Float[Array, "B N D"]


class Term(NamedTuple):
    """One loss term of a batch, before reduction: its mean is ``sum(value) / sum(weight)`` over all examples.

    The reduction happens once, over the global batch, so that sharding and accumulation do not change it.
    """

    value: Float[Array, " B"]  # summed over the example's elements
    weight: Float[Array, " B"]  # how many elements that was
    coefficient: float = 1.0  # weight of the mean in the loss; 0: reported only
