"""Flows whose densities are known: the marginal velocity of Gaussian data, along every path in closed form."""

import jax.numpy as jnp
import numpy as np

# Of each path: signal, its slope, noise, its slope; written down here a second time, on purpose.
CURVES = {
    "linear": lambda t, xp=np: (1 - t, 0 * t - 1, t, 0 * t + 1),
    "trigonometric": lambda t, xp=np: (
        xp.cos(np.pi * t / 2),
        -np.pi / 2 * xp.sin(np.pi * t / 2),
        xp.sin(np.pi * t / 2),
        np.pi / 2 * xp.cos(np.pi * t / 2),
    ),
    "quadratic": lambda t, xp=np: (1 - (t + t**2) / 2, -(1 + 2 * t) / 2, (t + t**2) / 2, (1 + 2 * t) / 2),
}


def velocity(mean, covariance, path: str = "linear"):
    """``E[u | z_t]`` for z_0 ~ N(mean, covariance), z_1 ~ N(0, I); on [K, D] states of any K * D."""
    identity = jnp.eye(len(mean))

    def field(z, t):
        signal, signal_slope, noise, noise_slope = CURVES[path](t, jnp)
        spread = signal**2 * covariance + noise**2 * identity
        gain = (signal * signal_slope * covariance + noise * noise_slope * identity) @ jnp.linalg.inv(spread)
        return (signal_slope * mean + gain @ (z.reshape(-1) - signal * mean)).reshape(z.shape)

    return field


def covariance(size: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed).standard_normal((size, size)) / np.sqrt(size)
    return draw @ draw.T + 0.1 * np.eye(size)


def log_prob(z, mean, covariance) -> float:
    difference = np.asarray(z, np.float64).reshape(-1) - mean
    _, logdet = np.linalg.slogdet(2 * np.pi * covariance)
    return float(-0.5 * (difference @ np.linalg.solve(covariance, difference) + logdet))
