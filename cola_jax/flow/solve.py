"""Integrating the flow from noise to data."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def time_grid(steps: int) -> jax.Array:
    """``steps + 1`` times from 1 (noise) down to 0 (data), evenly spaced."""
    return jnp.linspace(1.0, 0.0, steps + 1)


def euler(velocity: Callable[[jax.Array, jax.Array], jax.Array], z: jax.Array, times: jax.Array) -> jax.Array:
    """Euler steps of ``dz/dt = velocity(z, t)`` along ``times`` (first to last)."""

    def step(z, pair):
        now, following = pair
        return z + (following - now) * velocity(z, now), None

    return jax.lax.scan(step, z, (times[:-1], times[1:]))[0]
