"""What a decoded image says of pixels: a channel's 256 levels under a rounded logistic or normal variable."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from scipy import optimize

from cola_jax.fields import check, setting
from cola_jax.nn.visibility import AnyArray

_CDFS = {"logistic": jax.nn.log_sigmoid, "normal": jax.scipy.special.log_ndtr}
_SCALES = 0.02, 200.0  # levels, between which the fit looks


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Distribution of a channel of a pixel around what the decoder says, with one scale for all."""

    scale: float = setting(2.0, "levels of 0 to 255: of the logistic, or the normal's deviation", above=0)
    kind: str = setting("logistic", "distribution that is rounded to levels", choices=tuple(_CDFS))

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        check(self, "pixels ")


def log_prob(
    levels: UInt8[AnyArray, "*S"], decoded: Float[AnyArray, "*S"], scale: float | Float[Array, ""], kind: str
) -> Float[Array, "*S"]:
    """``log P(level)`` of each channel of each pixel, nats: the mass within half a level, of all beyond at 0 and 255.

    As of PixelCNN++ (Salimans et al., 2017), without a mixture.

    Args:
      levels: pixels, 0 to 255.
      decoded: centres, of pixels in [-1, 1]; what is beyond is allowed.
      scale, kind: see `Pixels`.
    """
    x, centre = jnp.asarray(levels, jnp.float32), (jnp.asarray(decoded, jnp.float32) + 1.0) * 127.5
    # Both ends in the lower tail, where logarithms are exact: the distributions are symmetric.
    mirrored = (x == 255.0) | ((x > 0.0) & (centre < x))
    gap = jnp.where(mirrored, centre - x, x - centre)
    high, low = (_CDFS[kind]((gap + end) / scale) for end in (0.5, -0.5))
    is_end = (x == 0.0) | (x == 255.0)
    return high + jnp.log1p(-jnp.where(is_end, 0.0, jnp.exp(low - high)))


def fit(levels: UInt8[AnyArray, "*S"], decoded: Float[AnyArray, "*S"], kind: str = "logistic") -> Pixels:
    """The scale under which images are most likely. A bound needs other images than those that are scored.

    Args:
      levels, decoded, kind: see `log_prob`.
    """
    levels, decoded = jnp.asarray(levels), jnp.asarray(decoded)
    mean = jax.jit(lambda scale: -jnp.mean(log_prob(levels, decoded, scale, kind)))
    low, high = np.log(_SCALES)
    found = optimize.minimize_scalar(lambda x: float(mean(np.exp(x))), bounds=(low, high), method="bounded")
    return Pixels(float(np.exp(found.x)), kind)
