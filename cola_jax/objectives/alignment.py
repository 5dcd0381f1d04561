"""Alignment of a network's states with features that another one makes of the same clean images (REPA).

Yu et al., "Representation Alignment for Generation", 2024: minus the cosine of every position, at a layer of the first
third, through a small head.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, UInt8

from cola_jax.fields import require
from cola_jax.models.image_vae import to_float
from cola_jax.types import UserError

# Images [B, Y, X, 3] with pixels in [-1, 1] -> features [B, M, F] of positions, row by row, or [B, rows, columns, F].
# It is traced, and knows its own weights, which are not trained.
Features = Callable[[Array], Array]

_EPSILON = 1e-12  # the smallest squared norm


def error(found: Float[Array, "B N F"], wanted: Float[Array, "B N F"]) -> Float[Array, "B N"]:
    """Minus the cosine at each position, -1 to 1; features that are 0 have 0."""
    found, wanted = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (found, wanted))
    return -optax.cosine_similarity(found, wanted, epsilon=_EPSILON)


def wanted(
    size: int,
    images: UInt8[Array, "B Y X 3"],
    grid: tuple[int, int],
    means: Float[Array, "B N D"],
    features: Features | None = None,
) -> Float[Array, "B N F"]:
    """Features of clean images at the positions of their latents, float32, without a gradient.

    Args:
      size: F, `ImageDiTConfig.alignment_size`.
      images: pixels.
      grid: rows and columns of latents.
      means: normalised latents: the features where no others are given.
      features: see `Features`. On another grid than the latents' they are resampled (linear, antialiased).

    Raises:
      UserError: features of another size or shape, or none and the latents have not F channels.
    """
    if features is None:
        need = f"the latents' {means.shape[-1]} channels where no features of images are given"
        require(size == means.shape[-1], "image_dit.alignment_size", size, need)
        return jax.lax.stop_gradient(means)
    found = _as_grid(features(to_float(images)), images.shape)
    require(size == found.shape[-1], "image_dit.alignment_size", size, f"the {found.shape[-1]} features that are given")
    if found.shape[1:3] != grid:
        found = jax.image.resize(found, (found.shape[0], *grid, size), "linear")
    return jax.lax.stop_gradient(found.reshape(found.shape[0], -1, size))


def _as_grid(found: Array, images: tuple[int, ...]) -> Float[Array, "B rows columns F"]:
    """Features as float32 by row and column; those in a row have as many columns for their rows as the images."""
    count, height, width, _ = images
    shape = found.shape
    if found.ndim == 3:
        rows = max(1, round(math.sqrt(shape[1] * height / width)))
        shape = (shape[0], rows, shape[1] // rows, shape[2])
    if len(shape) != 4 or shape[0] != count or math.prod(shape) != found.size:
        need = f"[{count}, rows * columns, F] with the images' {height}:{width}, or [{count}, rows, columns, F]"
        raise UserError(f"features of images have the shape {list(found.shape)}: must be {need}")
    return found.reshape(shape).astype(jnp.float32)
