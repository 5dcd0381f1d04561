"""The posterior from the encoder's last layer: a mean of fixed power, a variance learned or fixed (16.1, 16.2)."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from cola_jax.types import Posterior

# What a deterministic autoencoder reports as its log-variance: the smallest that the variance head can give.
MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0


def gaussian(values: Float[Array, "B N O D"], norm: Callable[[Array], Array] | None, logsnr: float | None) -> Posterior:
    """The diagonal Gaussian (16.1).

    Args:
      values: what the encoder gives for each channel: a mean and a log-variance (O = 2), or a mean alone (O = 1).
      norm: of the mean, which makes ``E[mean^2]`` 1; None: it has none.
      logsnr: with O = 1, the fixed ``log(E[mean^2] / E[variance])`` (16.2): since the mean has a norm, a constant
        variance is enough. None: the autoencoder is deterministic.
    """
    mean = values[:, :, 0] if norm is None else norm(values[:, :, 0])
    if values.shape[2] == 2:
        return Posterior(mean, jnp.clip(values[:, :, 1], MIN_LOGVAR, MAX_LOGVAR))
    return Posterior(mean, jnp.full_like(mean, MIN_LOGVAR if logsnr is None else -logsnr))
