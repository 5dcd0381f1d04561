"""The path from data to noise: interpolant and its velocity (9.31-9.32)."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

Alpha = Callable[[Array], Array]


def linear(t: Array) -> Array:
    """``alpha(t) = t``, the paper's path."""
    return t


def interpolate(z0: Array, z1: Array, t: Array, alpha: Alpha = linear) -> tuple[Array, Array]:
    """Point and target velocity at time t of the path between data and noise.

    ``z_t = (1 - alpha) z_0 + alpha z_1``, ``u = alpha'(t) (z_1 - z_0)``.

    Args:
      z0: data, time 0.
      z1: noise, time 1; same shape.
      t: times in [0, 1], of a shape that broadcasts against z0 (same rank).
      alpha: increasing, differentiable, 0 at 0 and 1 at 1.

    Returns:
      z_t and u, shaped as z0.
    """
    weight, slope = jax.jvp(alpha, (t,), (jax.numpy.ones_like(t),))
    return (1 - weight) * z0 + weight * z1, slope * (z1 - z0)


def to_data(z_t: Float[Array, "*S"], velocity: Float[Array, "*S"], t: Array) -> Float[Array, "*S"]:
    """The data that a velocity points back to on the linear path: ``z_t - t v``."""
    return z_t - t * velocity
