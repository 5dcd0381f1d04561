"""Convolutions with named axes, and the exchange of resolution for channels, of images [B, H, W, C]."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cola_jax.nn.layers import zeros


class Convolution(nn.Module):
    """A convolution over positions, each output from ``size x size`` inputs around it; outside the image is 0.

    Attributes:
      features: output channels.
      names: logical names of the kernel's axes of channels: input, output.
      size: an odd number.
      zero: kernel starts at zero (bias always does).
    """

    features: int
    names: Sequence[str | None]
    size: int = 3
    zero: bool = False
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W F"]:
        shape = (self.size, self.size, x.shape[-1], self.features)
        init = zeros() if self.zero else nn.initializers.truncated_normal(1.0 / math.sqrt(math.prod(shape[:3])))
        names = (None, None, *self.names)
        kernel = self.param("kernel", nn.with_logical_partitioning(init, names), shape, jnp.float32)
        bias = self.param("bias", nn.with_logical_partitioning(zeros(), names[3:]), shape[3:], jnp.float32)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype), kernel.astype(self.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + bias.astype(self.dtype)[None, None, None]


def space_to_depth(x: Float[Array, "B H W C"], factor: int) -> Float[Array, "B h w C2"]:
    """Squares of ``factor x factor`` positions as one with all their channels, row by row of the square."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // factor, factor, width // factor, factor, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // factor, width // factor, factor**2 * channels)


def depth_to_space(x: Float[Array, "B h w C2"], factor: int) -> Float[Array, "B H W C"]:
    """The inverse of `space_to_depth`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, factor, factor, channels // factor**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height * factor, width * factor, channels // factor**2)
