"""What a network predicts, and how that becomes a velocity.

With latents of fixed variance around their means, ``z_0 = m + sigma eps``, everything that is unknown in a noisy
latent is its mean: given m, both z_0 and z_1 follow from z_t in closed form. A network that predicts ``E[m | z_t]``
has the exact field near the data for nothing, whatever its weights are.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cola_jax.flow.path import Path

PREDICTIONS = ("velocity", "mean", "mixture")


def spread(path: Path, t: Array, variance: float | Array) -> Array:
    """Variance ``signal^2 variance + noise^2`` of z_t around ``signal m``, for ``z_0 ~ N(m, variance)``."""
    return path.signal(t) ** 2 * variance + path.noise(t) ** 2


def mean_coefficients(path: Path, t: Array, variance: float | Array) -> tuple[Array, Array]:
    """``skip(t)`` and ``gate(t)`` of the velocity ``v = skip z_t + gate E[m | z_t]``.

    For ``z_0 ~ N(m, variance)``: z_t given m has the variance ``s = signal^2 variance + noise^2``, and

        v = E[u | z_t, m] = signal' m + (s' / 2 s) (z_t - signal m),

    which is linear in m. At t = 0 the gate is 0 and the skip ``signal' / signal``: on the linear path ``v = -z``. With
    variance 0 this is the prediction of the data (x-prediction), singular at t = 0.

    Args:
      path: between data and noise.
      t: times in [0, 1].
      variance: of the latents around their means, above 0; an array must broadcast against t.
    """

    s, slope = jax.jvp(lambda t: spread(path, t, variance), (t,), (jnp.ones_like(t),))
    signal, signal_slope = jax.jvp(path.signal, (t,), (jnp.ones_like(t),))
    skip = 0.5 * slope / s
    return skip, signal_slope - skip * signal


def code_scores(logits: float | Array, codes: Array, z_t: Array, precision: Array, signal: Array) -> Array:
    """``log P(code | z_t)`` up to a constant, where the mean m of a latent is one of finitely many codes.

    By Bayes' rule ``P(code | z_t) ~ P(code) N(z_t; signal code, s)``: ``logits`` are the log of the first factor, and
    the second one, which the network need not learn, is added to them. ``E[m | z_t]`` is the expectation of the codes
    under the softmax of these scores. The softmax over embeddings is that of CDCD (Dieleman et al. 2022) and Plaid
    (Gulrajani and Hashimoto 2023), the second factor is Plaid's "output prior".

    Args:
      logits: [B, Q, C]; 0: all alike.
      codes: [C, D].
      z_t: noisy latents, [B, Q, D].
      precision: ``signal / s`` with the `spread` s, broadcast against z_t.
      signal: of the path.
    """
    power = 0.5 * jnp.square(codes).sum(axis=-1)[None, None]
    # Near the data the precision is large: what an accelerator rounds here by default would be nats.
    product = jnp.matmul(z_t, codes.T, precision="highest")
    return logits + precision * (product - signal * power)


def posterior_velocity(path: Path, z_t: Array, t: Array, mean: Array, variance: Array) -> Array:
    """``E[u | z_t, x]``: the velocity target when the noise of the latents is averaged out.

    For ``z_0 ~ N(mean, variance)`` as the encoder says of the text x. Its expectation given z_t alone is the same
    field that the target u itself has (Rao-Blackwell), so that a regression has the same solution with less noise. What
    nobody can predict of u has, on the linear path, the variance ``sigma^2 / s``: 1 at t = 0, sigma^2 at t = 1.

    Args:
      path: between data and noise.
      z_t: points on it, [.., D].
      t: times in [0, 1], of a shape that broadcasts against z_t.
      mean, variance: of the normalised latents, [.., D].
    """
    skip, gate = mean_coefficients(path, jnp.broadcast_to(t, z_t.shape), jnp.broadcast_to(variance, z_t.shape))
    return skip * z_t + gate * mean


def follow_mean(
    path: Path,
    z: Array,
    mean: Array,
    now: Array,
    later: Array,
    variance: float | Array,
    churn: float = 0.0,
    fresh: Array | None = None,
) -> Array:
    """From one time to another while the predicted mean stays as it is, in closed form.

    The standard score ``e = (z - signal m) / sqrt(s)``, with s the `spread`, is constant along the flow: a step without
    an error but that of the mean (an exponential integrator; with variance 0, DDIM's step). With ``churn`` above 0 the
    step is a stochastic process with the same marginals: e forgets at ``churn / 2`` times the rate of the log-SNR
    ``log(signal^2 / s)``,

        e_later = rho e_now + sqrt(1 - rho^2) fresh,  rho = (SNR_now / SNR_later)^(churn / 2).

    1 is the reverse of the process that only adds noise (with variance 0, DDPM's ancestral step).

    Args:
      path: between data and noise.
      z: state at ``now``.
      mean: predicted there.
      now, later: flow times; with churn, ``later`` is the nearer to the data.
      variance: of the latents around their means; with 0, ``now`` must be above 0.
      churn: at least 0; 0 is the flow.
      fresh: noise N(0, I) shaped as z; only needed with churn.
    """
    start, end = spread(path, now, variance), spread(path, later, variance)
    away = z - path.signal(now) * mean
    if not churn:
        return path.signal(later) * mean + jnp.sqrt(end / start) * away
    ratio = path.signal(now) ** 2 * end / (path.signal(later) ** 2 * start)
    kept = ratio**churn
    return path.signal(later) * mean + jnp.sqrt(end) * (jnp.sqrt(kept / start) * away + jnp.sqrt(1 - kept) * fresh)
