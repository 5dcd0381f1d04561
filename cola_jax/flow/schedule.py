"""Which flow times are trained, and how much each counts (15.12-15.19, 16.5-16.10)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cola_jax import rng
from cola_jax.flow import path as paths
from cola_jax.flow.path import LINEAR, Path
from cola_jax.types import Key, Posterior

DISTRIBUTIONS = ("logit_normal", "uniform", "uniform_log_snr", "table")
WEIGHTS = ("as_drawn", "logit_normal", "uniform", "likelihood")


class Times(NamedTuple):
    """A distribution of flow times in [0, 1].

    Attributes:
      distribution: "logit_normal", ``t = sigmoid(loc + scale * normal)`` (16.5-16.8): a larger ``loc`` means more
        noise; "uniform"; "uniform_log_snr": the log-SNR of the path is uniform from ``low`` to ``high``; or "table".
      loc, scale: of the logit; scale above 0.
      low, high: log-SNRs, low < high; the low one is the noisy end.
      path: whose log-SNR is meant.
      grid: training times are multiples of 1 / grid (see `discretize`); 0: continuous.
      share: of the times that come from a second logit-normal instead, so that times near the data and near the noise
        are both drawn.
      second_loc, second_scale: of that one.
      table: of "table", what equal parts of [0, 1] get, up to a factor; uniform inside each part.
    """

    distribution: str = "logit_normal"
    loc: float = 1.0
    scale: float = 1.0
    low: float = -10.0
    high: float = 10.0
    path: Path = LINEAR
    grid: int = 0
    share: float = 0.0
    second_loc: float = -1.5
    second_scale: float = 1.0
    table: tuple[float, ...] = ()


def _table_cdf(times: Times) -> tuple[Array, Array]:
    """Ends of the parts of a table, and the probability of a time up to each."""
    shares = np.cumsum([0.0, *times.table]) / np.sum(times.table)
    return jnp.linspace(0.0, 1.0, len(shares)), jnp.asarray(shares, jnp.float32)


def sample(times: Times, keys: Key, count: int) -> Float[Array, "B M"]:
    """Flow times in [0, 1], ``count`` for each key.

    Args:
      times: their distribution.
      keys: [B].
      count: M.
    """
    if times.distribution == "uniform":
        t = rng.uniform(keys, (count,))
    elif times.distribution == "logit_normal":
        t = jax.nn.sigmoid(times.loc + times.scale * rng.normal(keys, (count,)))
    elif times.distribution == "table":
        ends, shares = _table_cdf(times)
        t = jnp.interp(rng.uniform(keys, (count,)), shares, ends)
    else:
        t = paths.time_at(times.path, times.low + (times.high - times.low) * rng.uniform(keys, (count,)))
    if times.share:
        choose, draw = (rng.fold_in(keys, number) for number in (1, 2))
        second = jax.nn.sigmoid(times.second_loc + times.second_scale * rng.normal(draw, (count,)))
        t = jnp.where(rng.uniform(choose, (count,)) < times.share, second, t)
    return discretize(t, times.grid) if times.grid else t


def discretize(t: Array, num: int, mode: str = "round") -> Array:
    """Times on the training grid ``0, 1 / num, .., 1`` (16.7: ``T t`` rounded or floored, with T = num).

    Args:
      t: times in [0, 1].
      num: T, at least 1.
      mode: "round" or "floor"; floored times below 1 never reach 1.
    """
    whole = jnp.round(t * num) if mode == "round" else jnp.floor(t * num)
    return whole / num


def _logit(s: Array) -> Array:
    return jnp.log(s) - jnp.log1p(-s)


def pdf(times: Times, t: Array, horizon: float = 1.0) -> Array:
    """Density of the times before they are put on a grid (16.9), on ``[0, horizon]`` (16.10).

    Args:
      times: a distribution.
      t: in [0, horizon]; the density is 0 outside.
      horizon: T; times are T times those of `sample`.
    """
    s = t / horizon
    inside = (s > 0) & (s < 1)
    s = jnp.where(inside, s, 0.5)
    if times.distribution == "uniform":
        density = jnp.ones_like(s)
    elif times.distribution == "logit_normal":
        density = _logit_normal_pdf(s, times.loc, times.scale)
    elif times.distribution == "table":
        parts = len(times.table)
        heights = jnp.asarray(times.table, jnp.float32) * (parts / sum(times.table))
        density = heights[jnp.minimum((s * parts).astype(jnp.int32), parts - 1)]
    else:
        value = paths.log_snr(times.path, s)
        speed = -paths.log_snr_slope(times.path, s)
        density = jnp.where((value >= times.low) & (value <= times.high), speed / (times.high - times.low), 0.0)
    if times.share:
        second = _logit_normal_pdf(s, times.second_loc, times.second_scale)
        density = (1 - times.share) * density + times.share * second
    return jnp.where(inside, density, 0.0) / horizon


def _logit_normal_pdf(s: Array, loc: float, scale: float) -> Array:
    away = (_logit(s) - loc) / scale
    return jnp.exp(-0.5 * away**2) / (scale * math.sqrt(2 * math.pi) * s * (1 - s))


def _logit_normal_cdf(s: Array, loc: float, scale: float) -> Array:
    return jax.scipy.stats.norm.cdf((_logit(s) - loc) / scale)


def cdf(times: Times, t: Array, horizon: float = 1.0) -> Array:
    """Probability of a time up to t, the integral of `pdf`. Args as there."""
    s = jnp.clip(t / horizon, 0.0, 1.0)
    if times.distribution == "uniform":
        found = s
    elif times.distribution == "logit_normal":
        found = _logit_normal_cdf(s, times.loc, times.scale)
    elif times.distribution == "table":
        found = jnp.interp(s, *_table_cdf(times))
    else:
        found = jnp.clip((times.high - paths.log_snr(times.path, s)) / (times.high - times.low), 0.0, 1.0)
    if times.share:
        second = _logit_normal_cdf(s, times.second_loc, times.second_scale)
        found = (1 - times.share) * found + times.share * second
    return found


class Weight(NamedTuple):
    """How much the squared velocity error of each time counts.

    Attributes:
      kind: "as_drawn": the loss is the mean over the times that are drawn; else its expectation is
        ``E_{t ~ uniform}[weight(t) error(t)]`` whatever density the times are drawn from, with the weight 1
        ("uniform"), the density of a logit-normal, or `path.likelihood_weight`: then a sum over elements is in nats.
      loc, scale: of "logit_normal".
    """

    kind: str = "as_drawn"
    loc: float = 1.0
    scale: float = 1.0


def importance(weight: Weight, times: Times, t: Array) -> Array:
    """What an error at a drawn time counts: the weight over the density that the time was drawn from.

    Args:
      weight: that the loss shall have.
      times: what t was drawn from, without a grid; its density must not be 0 where the weight is not.
      t: in (0, 1).
    """
    if weight.kind == "as_drawn":
        return jnp.ones_like(t)
    # Float32 rounds times that are very near to 0 or 1 onto them, where no ratio exists.
    t = jnp.clip(t, 1e-6, 1 - 1e-6)
    if weight.kind == "uniform":
        wanted = jnp.ones_like(t)
    elif weight.kind == "logit_normal":
        wanted = _logit_normal_pdf(t, weight.loc, weight.scale)
    else:
        wanted = paths.likelihood_weight(times.path, t)
    return wanted / pdf(times, t)


def log_snr_pdf(times: Times, path: Path, value: Array) -> Array:
    """The density that times induce on the log-SNR of a path: ``p(t(lambda)) |dt / d lambda|`` (15.14-15.16).

    With it, the loss over times is one over lambda with effective weight ``|dt / d lambda|`` (15.19).

    Args:
      times: a distribution.
      path: with an inverse of its log-SNR.
      value: lambda, any real.
    """
    t, slope = jax.jvp(lambda v: paths.time_at(path, v), (value,), (jnp.ones_like(value),))
    return pdf(times, t) * jnp.abs(slope)


def shift_time(t: Array, shift: float | Array) -> Array:
    """``shift t / (1 + (shift - 1) t)``: more noise for a shift above 1; `solve.Grid` shifts its times so.

    On the linear path this adds ``-2 log(shift)`` to the log-SNR, whatever t is, and ``log(shift)`` to the loc of
    logit-normal times.
    """
    return shift * t / (1 + (shift - 1) * t)


def shift_log_snr(path: Path, t: Array, delta: float | Array) -> Array:
    """The time at which the log-SNR is ``lambda(t) + delta`` (15.6-15.8): less noise for a delta above 0.

    Args:
      path: with an inverse of its log-SNR. On the linear path: ``shift_time(t, exp(-delta / 2))``.
      t: times in (0, 1).
      delta: of the log-SNR.
    """
    return paths.time_at(path, paths.log_snr(path, t) + delta)


def logsnr(posterior: Posterior, mask: Float[Array, "B N"] | None = None) -> Float[Array, ""]:
    """``log(E[mean^2] / E[variance])`` over data and coordinates (16.2-16.4): the VAE's own, at t = 0.

    What the flow's noise makes of it at other times is `path.effective_log_snr`.
    """
    signal, noise = jnp.square(posterior.mean), jnp.exp(posterior.logvar)
    if mask is not None:
        signal, noise = signal * mask[..., None], noise * mask[..., None]
    return jnp.log(jnp.sum(signal)) - jnp.log(jnp.sum(noise))
