"""Rotary positions and the embedding of flow time."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope_angles(positions: Int[Array, "B N"], dim: int, theta: float) -> Float[Array, "B N C"]:
    """Rotation angles ``position * theta^(-2i / dim)`` for the ``C = dim / 2`` channel pairs."""
    frequencies = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / max(dim, 1))
    return positions[..., None].astype(jnp.float32) * frequencies[None, None, :]


def rope_angles_2d(
    rows: Int[Array, "B N"], columns: Int[Array, "B N"], dim: int, theta: float
) -> Float[Array, "B N C"]:
    """`rope_angles` of places in a picture: even channel pairs turn with the row, odd ones with the column.

    Where row and column are equal these are the angles of a text's position: both modalities share one frame.
    """
    by_row, by_column = (rope_angles(places, dim, theta) for places in (rows, columns))
    return jnp.where(jnp.arange(by_row.shape[-1]) % 2 == 0, by_row, by_column)


def apply_rope(
    x: Float[Array, "B N H C"], angles: Float[Array, "#B N R"], interleaved: bool, full_precision: bool = True
) -> Float[Array, "B N H C"]:
    """Rotates the first ``2R`` channels of every head.

    Args:
      x: queries or keys.
      angles: from `rope_angles`, R pairs.
      interleaved: pairs are channels (2i, 2i + 1), as in the DiT; else (i, i + R), as in the VAE.
      full_precision: rotate in float32 (or wider); else sines, cosines and products have the type of ``x``.
    """
    dtype, pairs = x.dtype, angles.shape[-1]
    compute = jnp.promote_types(dtype, jnp.float32) if full_precision else dtype
    cos, sin = (f(angles).astype(compute)[:, :, None, :] for f in (jnp.cos, jnp.sin))
    # x cos + partner sin, where the partner of a channel is the other one of its pair: without a concatenation of
    # what is turned, XLA fuses all of it, and what comes before, into one pass.
    shape, axis = ((pairs, 2), -1) if interleaved else ((2, pairs), -2)
    cos, sin = jnp.stack([cos, cos], axis), jnp.stack([-sin, sin], axis)
    cos, sin = (factor.reshape(*factor.shape[:3], 2 * pairs) for factor in (cos, sin))
    rotated, rest = x[..., : 2 * pairs].astype(compute), x[..., 2 * pairs :]
    partner = jnp.flip(rotated.reshape(*rotated.shape[:-1], *shape), axis).reshape(rotated.shape)
    turned = (rotated * cos + partner * sin).astype(dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def time_features(times: Float[Array, "B M"], num_features: int = 256, top: float = 1000.0) -> Float[Array, "B M F"]:
    """Sines, then cosines, of ``top t * 10000^(-2i / F)`` (SPEC 9: top = 1000), float32 (or wider)."""
    half = num_features // 2
    dtype = jnp.promote_types(times.dtype, jnp.float32)
    frequencies = jnp.exp(-math.log(10_000.0) * jnp.arange(half, dtype=dtype) / half)
    angles = top * times.astype(dtype)[..., None] * frequencies[None, None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
