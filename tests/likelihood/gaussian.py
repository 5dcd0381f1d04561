"""Flows whose densities are known: the marginal velocity of Gaussian data under the linear path."""

import jax.numpy as jnp
import numpy as np


def velocity(mean, covariance):
    """``E[z_1 - z_0 | z_t]`` for z_0 ~ N(mean, covariance), z_1 ~ N(0, I); on [K, D] states of any K * D."""
    identity = jnp.eye(len(mean))

    def field(z, t):
        spread = (1 - t) ** 2 * covariance + t**2 * identity
        gain = (t * identity - (1 - t) * covariance) @ jnp.linalg.inv(spread)
        return (gain @ (z.reshape(-1) - (1 - t) * mean) - mean).reshape(z.shape)

    return field


def covariance(size: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed).standard_normal((size, size)) / np.sqrt(size)
    return draw @ draw.T + 0.1 * np.eye(size)


def log_prob(z, mean, covariance) -> float:
    difference = np.asarray(z, np.float64).reshape(-1) - mean
    _, logdet = np.linalg.slogdet(2 * np.pi * covariance)
    return float(-0.5 * (difference @ np.linalg.solve(covariance, difference) + logdet))
