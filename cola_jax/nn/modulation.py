"""Adaptive norms: shifts, scales and gates from the flow time, computed once for each distinct time (SPEC 9)."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from cola_jax.nn.layers import Linear, unstack_axis


class Modulation(nn.Module):
    """Linear map of the time embedding [B, M, E] to [B, M, parts, C], zero at the start."""

    features: tuple[int, ...]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, time: Array) -> Array:
        return Linear(self.features, ("time", None, "embed"), zero=True, dtype=self.dtype, name="linear")(time)


class ModulationTables(NamedTuple):
    """Shifts, scales and gates of every layer for a grid of M times, so that no step computes them again.

    Attributes:
      layers: of each layer, [layers, M, parts, C] for each of its maps, or a tuple with an entry a layer.
      output: of the output head, [M, 2, C].
      coefficients: what makes a velocity of the output, [M, parts, 1]; None: it is the velocity.
    """

    layers: tuple
    output: Array
    coefficients: Array | None = None


def table_rows(table: Array, index: Array) -> Array:
    """Modulations [1, 2, parts, C] of t = 0, the table's last row, and of row ``index``."""
    return jnp.stack([table[-1], table[index]])[None]


def spread(
    values: Array, pinned: Array | None, length: int, clean: int, stretches: Sequence[int] | None = None
) -> list[Array]:
    """Modulations of t = 0 and of M stretches, for each position of a row.

    Args:
      values: [B, 1 + M, parts, C].
      pinned: [B, R], positions at t = 0.
      length: positions of the M stretches.
      clean: positions before them, at t = 0.
      stretches: positions of each of the M; None: equal ones.

    Returns:
      Parts times [B, R, C], R = clean + length (or 1 if all have the same).
    """
    zero, values = values[:, :1], values[:, 1:]
    batch, distinct, parts, channels = values.shape
    if stretches is not None:
        values = _repeated(zero, values, (clean, *stretches))
    elif distinct > 1 or clean:
        stretch = length // distinct
        before = jnp.broadcast_to(zero, (batch, clean // stretch, parts, channels))
        values = jnp.concatenate([before, values], axis=1)[:, :, None]
        values = jnp.broadcast_to(values, (batch, values.shape[1], stretch, parts, channels))
        values = values.reshape(batch, clean + length, parts, channels)
    if pinned is not None:
        values = jnp.where(pinned[:, :, None, None], zero, values)
    return unstack_axis(values, 2)


def _repeated(zero: Array, values: Array, sizes: Sequence[int]) -> Array:
    """[zero | values], each as often as ``sizes`` say: broadcast run by run, so that no gradient is a scatter."""
    values, parts, begin = jnp.concatenate([zero, values], axis=1), [], 0
    for size, run in itertools.groupby(sizes):
        end = begin + len(list(run))
        part = values[:, begin:end, None]
        part = jnp.broadcast_to(part, (*part.shape[:2], size, *part.shape[3:]))
        parts.append(part.reshape(part.shape[0], (end - begin) * size, *part.shape[3:]))
        begin = end
    return jnp.concatenate(parts, axis=1)
