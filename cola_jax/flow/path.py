"""Paths from data to noise: the point at a time, its velocity, the signal-to-noise ratio (9.31-9.32, 15.1-15.8).

``z_t = signal(t) z_0 + noise(t) z_1`` with ``z_1 ~ N(0, I)``. Flow time t runs from 0 (data) to 1 (noise).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# A smooth function of flow time, elementwise.
Curve = Callable[[Array], Array]


class Path(NamedTuple):
    """A path is a value: two curves.

    Attributes:
      name: as settings call it.
      signal: weight of the data, falling from 1 at t = 0 to exactly 0 at t = 1.
      noise: weight of the noise, rising from 0 to 1: at t = 1 every path is N(0, I).
      time_at: the time of a log-SNR, the inverse of `log_snr`; None where it is not known.
    """

    name: str
    signal: Curve
    noise: Curve
    time_at: Curve | None = None


def bridge(name: str, alpha: Curve, inverse: Curve | None = None) -> Path:
    """``z_t = (1 - alpha(t)) z_0 + alpha(t) z_1``, hence ``u = alpha'(t) (z_1 - z_0)`` (9.31-9.32).

    Args:
      name: of the path.
      alpha: smooth, rising from 0 at t = 0 to 1 at t = 1. Where its slope is zero, the velocity says nothing of the
        data (`to_data` divides by it).
      inverse: the time at which alpha has a value, if it is known.
    """
    time_at = None if inverse is None else lambda log_snr: inverse(jax.nn.sigmoid(-0.5 * log_snr))
    return Path(name, lambda t: 1 - alpha(t), alpha, time_at)


def from_log_snr(name: str, curve: Curve, inverse: Curve | None = None) -> Path:
    """The variance-preserving path of a log-SNR curve: ``signal^2 = sigmoid(lambda)`` and
    ``noise^2 = sigmoid(-lambda)`` (15.2-15.5).

    Args:
      name: of the path.
      curve: lambda(t), falling; where it is finite at 0 or 1, the path ends short of data or noise.
      inverse: the time at which lambda has a value, if it is known.
    """

    def root(sign):
        return lambda t: jnp.exp(0.5 * jax.nn.log_sigmoid(sign * curve(t)))

    return Path(name, root(1), root(-1), inverse)


LINEAR = bridge("linear", lambda t: t, lambda alpha: alpha)
# Variance preserving: cos(pi t / 2) and sin(pi t / 2), the first in a form that is exactly 0 at t = 1.
TRIGONOMETRIC = Path(
    "trigonometric",
    lambda t: jnp.sin(0.5 * math.pi * (1 - t)),
    lambda t: jnp.sin(0.5 * math.pi * t),
    lambda log_snr: jnp.arctan(jnp.exp(-0.5 * log_snr)) * (2 / math.pi),
)
# Slow near the data, where a flow changes fastest; its slope is 1/2 at t = 0 and 3/2 at t = 1, nowhere zero.
QUADRATIC = bridge("quadratic", lambda t: 0.5 * t * (1 + t), lambda alpha: 4 * alpha / (1 + jnp.sqrt(1 + 8 * alpha)))

PATHS = {path.name: path for path in (LINEAR, TRIGONOMETRIC, QUADRATIC)}


def _with_slope(curve: Curve, t: Array) -> tuple[Array, Array]:
    return jax.jvp(curve, (t,), (jnp.ones_like(t),))


def interpolate(path: Path, z0: Array, z1: Array, t: Array) -> tuple[Array, Array]:
    """Point and target velocity at time t: ``z_t = signal z_0 + noise z_1``, ``u = d z_t / dt`` (9.31-9.32).

    Args:
      path: one of `PATHS`, or another.
      z0: data, time 0.
      z1: noise, time 1; same shape.
      t: times in [0, 1], of a shape that broadcasts against z0 (same rank).

    Returns:
      z_t and u, shaped as z0.
    """
    signal, signal_slope = _with_slope(path.signal, t)
    noise, noise_slope = _with_slope(path.noise, t)
    return signal * z0 + noise * z1, signal_slope * z0 + noise_slope * z1


def _solve(path: Path, z_t: Array, velocity: Array, t: Array) -> tuple[Array, Array]:
    """(z_0, z_1) of ``signal z_0 + noise z_1 = z_t`` and ``signal' z_0 + noise' z_1 = velocity``."""
    signal, signal_slope = _with_slope(path.signal, t)
    noise, noise_slope = _with_slope(path.noise, t)
    determinant = signal * noise_slope - noise * signal_slope  # exactly 1 on the linear path
    data = (noise_slope * z_t - noise * velocity) / determinant
    return data, (signal * velocity - signal_slope * z_t) / determinant


def to_data(path: Path, z_t: Float[Array, "*S"], velocity: Float[Array, "*S"], t: Array) -> Float[Array, "*S"]:
    """The data that a velocity points back to; on the linear path ``z_t - t v``.

    Args:
      path: on which z_t is.
      z_t: state at time t.
      velocity: there.
      t: times in [0, 1], of a shape that broadcasts against z_t.
    """
    return _solve(path, z_t, velocity, t)[0]


def to_noise(path: Path, z_t: Float[Array, "*S"], velocity: Float[Array, "*S"], t: Array) -> Float[Array, "*S"]:
    """The noise that a velocity points on to; on the linear path ``z_t + (1 - t) v``. Args as `to_data`."""
    return _solve(path, z_t, velocity, t)[1]


def renoise(path: Path, now: Array, later: Array) -> tuple[Array, Array]:
    """From a time nearer to the data back to a noisier one: ``z_now = ratio z_later + spread N(0, I)``.

    The transition that leaves ``z_now`` distributed as the path says, given ``z_later`` as it says there.

    Args:
      path: of the states.
      now: the noisier time, in [0, 1].
      later: the time that is nearer to the data, below ``now`` (sampling reaches it later).

    Returns:
      The ratio of the signals, and the standard deviation of the noise that is added.
    """
    ratio = path.signal(now) / path.signal(later)
    spread = jnp.sqrt(jnp.maximum(path.noise(now) ** 2 - (ratio * path.noise(later)) ** 2, 0.0))
    return ratio, spread


def log_snr(path: Path, t: Array) -> Array:
    """``lambda(t) = log(signal^2 / noise^2)`` (15.2): falls from inf at t = 0 to -inf at t = 1."""
    return 2 * (jnp.log(path.signal(t)) - jnp.log(path.noise(t)))


def log_snr_slope(path: Path, t: Array) -> Array:
    """``d lambda / dt``, negative. Velocities along lambda are ``u_lambda = u_t / (d lambda / dt)`` (15.17-15.18)."""
    return _with_slope(lambda t: log_snr(path, t), t)[1]


def likelihood_weight(path: Path, t: Array) -> Array:
    """Weight of the squared velocity error in nats of likelihood: ``2 / (noise^2 |lambda'|)``, ``(1 - t) / t`` on the
    linear path.

    Its integral over t of the squared error, summed over elements, is what the diffusion with the path's marginals
    loses in ``KL(q(z_0) || p(z_0))``: half of ``g^2 |score error|^2`` with ``g^2 = noise^2 |lambda'|``.

    Args:
      path: of the flow.
      t: times in (0, 1); the weight has a pole at 0.
    """
    return 2 / (path.noise(t) ** 2 * jnp.abs(log_snr_slope(path, t)))


def time_at(path: Path, value: Array) -> Array:
    """The flow time of a log-SNR: the inverse of `log_snr`.

    Raises:
      ValueError: the path has no inverse.
    """
    if path.time_at is None:
        raise ValueError(f"path {path.name!r}: its log-SNR has no inverse")
    return path.time_at(value)


def effective_log_snr(path: Path, t: Array, mean_power, variance) -> Array:
    """Log-SNR of the posterior means inside z_t, when the encoder's own variance counts as noise (15.29-15.31).

    ``log(signal^2 E[mean^2] / (signal^2 E[variance] + noise^2))``: at t = 0 the VAE's logSNR (16.2), not inf.

    Args:
      path: of z_t.
      t: times in [0, 1].
      mean_power, variance: E[mean^2] and E[variance] of normalised latents.
    """
    signal, noise = path.signal(t) ** 2, path.noise(t) ** 2
    return jnp.log(signal * mean_power) - jnp.log(signal * variance + noise)
