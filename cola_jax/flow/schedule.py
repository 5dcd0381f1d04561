"""Which flow times are trained, and the signal-to-noise ratio of latents."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cola_jax import rng
from cola_jax.types import Key, Posterior


def sample_times(
    keys: Key, count: int, distribution: str = "logit_normal", loc: float = 1.0, scale: float = 1.0
) -> Float[Array, "B M"]:
    """Flow times in (0, 1), ``count`` for each key.

    Args:
      keys: [B].
      count: M.
      distribution: "logit_normal", ``t = sigmoid(loc + scale * normal)`` (16.5-16.10): a larger ``loc`` means
        more noise; or "uniform".
    """
    if distribution == "uniform":
        return rng.uniform(keys, (count,))
    return jax.nn.sigmoid(loc + scale * rng.normal(keys, (count,)))


def logsnr(posterior: Posterior, mask: Float[Array, "B N"] | None = None) -> Float[Array, ""]:
    """``log(E[mean^2] / E[variance])`` over data and coordinates (16.2-16.4)."""
    signal, noise = jnp.square(posterior.mean), jnp.exp(posterior.logvar)
    if mask is not None:
        signal, noise = signal * mask[..., None], noise * mask[..., None]
    return jnp.log(jnp.sum(signal)) - jnp.log(jnp.sum(noise))
