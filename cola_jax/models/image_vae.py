"""Image VAE: pixels to a diagonal Gaussian over a grid of latents, and latents to pixels (5.5).

Convolutions and norms of single positions: the same weights serve every resolution, and a latent depends on the pixels
around it only, unless there is attention in the middle.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from cola_jax import sharding
from cola_jax.fields import check, like, require, setting
from cola_jax.models import posterior
from cola_jax.models.text_vae import VAEConfig
from cola_jax.nn import attention
from cola_jax.nn.convolution import Convolution, depth_to_space, space_to_depth
from cola_jax.nn.layers import LayerNorm, Linear, unstack_axis
from cola_jax.nn.visibility import AnyArray, BlockPlan
from cola_jax.types import Posterior, UserError


def _is_power_of_two(value: int) -> bool:
    return value & (value - 1) == 0


_POWER = (_is_power_of_two, "a power of two")


@dataclasses.dataclass(frozen=True)
class ImageVAEConfig:
    """Image VAE (5.5). The paper has a downsampling of 16 and 64 channels."""

    channels: int = setting(3, "of a pixel", at_least=1)
    latent_dim: int = like(VAEConfig, "latent_dim")
    downsampling: int = setting(16, "pixels on a side of the square that is a latent, f", at_least=1, where=_POWER)
    patch_size: int = setting(
        4, "pixels on a side of the squares that the first layer reads and the last writes", at_least=1, where=_POWER
    )
    widths: tuple[int, ...] = setting(
        (64, 96, 128), "channels at each resolution, of patches first, halved until a position is a latent", at_least=1
    )
    encoder_blocks: int = setting(1, "residual blocks of the encoder at each resolution", at_least=0)
    decoder_blocks: int = setting(1, "residual blocks of the decoder at each resolution", at_least=0)
    num_heads: int = setting(
        0, "heads of the attention among all latents in encoder and decoder; 0: there is none", at_least=0
    )
    norm_eps: float = like(VAEConfig, "norm_eps")
    normalize_mean: bool = like(VAEConfig, "normalize_mean")
    logsnr: float | None = like(VAEConfig, "logsnr")
    remat: bool = setting(False, "residual blocks are computed again in the backward pass")
    shift: float = like(VAEConfig, "shift")
    scale: float = like(VAEConfig, "scale")

    @property
    def posterior_outputs(self) -> int:
        """Numbers for each channel of a latent: a mean, and a log-variance where that is learned."""
        return 2 if self.logsnr is None else 1

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the latents of an image.

        Raises:
          UserError: the downsampling does not divide it.
        """
        factor = self.downsampling
        if height < 1 or width < 1 or height % factor or width % factor:
            raise UserError(
                f"an image of {height} x {width} pixels: height and width must be multiples of {factor}, the "
                "downsampling of the image VAE"
            )
        return height // factor, width // factor

    def validate(self) -> None:
        check(self, "config.image_vae.")

    def check_together(self, prefix: str) -> None:
        factor, patch, levels = self.downsampling, self.patch_size, len(self.widths)
        require(patch <= factor, f"{prefix}patch_size", patch, f"at most downsampling = {factor}")
        need = f"{(factor // patch).bit_length()} widths (downsampling / patch_size = {factor // patch})"
        require(2 ** (levels - 1) * patch == factor, f"{prefix}widths", self.widths, need)
        if self.num_heads:
            need = f"a divisor of the last of widths = {self.widths}"
            require(self.widths[-1] % self.num_heads == 0, f"{prefix}num_heads", self.num_heads, need)
        if self.logsnr is not None:
            require(self.normalize_mean, f"{prefix}normalize_mean", False, "True where logsnr is fixed")


def forward_flops(config: ImageVAEConfig, height: int, width: int) -> tuple[float, float]:
    """Forward FLOPs of encoder and decoder for an image of ``height x width`` pixels.

    2 for each weight and position that it meets (a convolution meets nothing outside of the image); 4 for each pair of
    latents and channel of attention. Norms and activations are left out.

    Raises:
      UserError: the downsampling does not divide the image.
    """
    rows, columns = config.grid(height, width)
    positions, widths, top = rows * columns, config.widths, config.widths[-1]
    both, encoder, decoder = 0.0, 0.0, 0.0
    for level, channels in enumerate(widths):
        h, w = (side * 2 ** (len(widths) - 1 - level) for side in (rows, columns))
        taps = 2.0 * (3 * h - 2) * (3 * w - 2)
        encoder += config.encoder_blocks * 2 * taps * channels**2
        decoder += config.decoder_blocks * 2 * taps * channels**2
        if level == 0:
            both += taps * config.patch_size**2 * config.channels * channels
        else:
            both += 2.0 * h * w * 4 * widths[level - 1] * channels
    if config.num_heads:
        both += 8.0 * positions * top**2 + 4.0 * positions**2 * top
    latents = 2.0 * positions * top * config.latent_dim
    return both + encoder + config.posterior_outputs * latents, both + decoder + latents


def to_float(images: UInt8[AnyArray, "B H W C"]) -> Float[Array, "B H W C"]:
    """Pixels 0 to 255 as -1 to 1."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def to_uint8(images: Float[Array, "B H W C"]) -> UInt8[Array, "B H W C"]:
    """Pixels -1 to 1 as 0 to 255, rounded; what is beyond is cut off."""
    return jnp.clip(jnp.round((images + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def _norm(config: ImageVAEConfig, name: str) -> LayerNorm:
    return LayerNorm(config.norm_eps, name=name)


class ResidualBlock(nn.Module):
    """``x + conv(silu(norm(conv(silu(norm(x))))))``; it begins as the identity."""

    config: ImageVAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        channels = x.shape[-1]
        h = nn.silu(_norm(self.config, "norm_in")(x))
        h = Convolution(channels, ("embed", "mlp"), dtype=self.dtype, name="conv_in")(h)
        h = sharding.constrain(h, "batch", None, None, "mlp")
        h = nn.silu(LayerNorm(self.config.norm_eps, name_of_axis="mlp", name="norm_out")(h))
        h = Convolution(channels, ("mlp", "embed"), zero=True, dtype=self.dtype, name="conv_out")(h)
        return sharding.constrain(x + h, "batch", None, None, None)


class MiddleAttention(nn.Module):
    """Attention among all positions, added to them; positions are known by their content only."""

    config: ImageVAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        config, (batch, height, width, channels) = self.config, x.shape
        length, heads = height * width, config.num_heads
        h = _norm(config, "norm")(x).reshape(batch, length, channels)
        qkv = Linear((3, channels), ("embed", None, "heads"), use_bias=False, dtype=self.dtype, name="qkv_proj")(h)
        q, k, v = (part.reshape(batch, length, heads, channels // heads) for part in unstack_axis(qkv, 2))
        layout = attention.RowLayout(length, BlockPlan.equal(length))
        y = attention.attend_row(q, k, v, layout).reshape(batch, length, channels)
        out = Linear((channels,), ("heads", "embed"), zero=True, dtype=self.dtype, name="attn_out_proj")(y)
        return sharding.constrain(x + out.reshape(x.shape), "batch", None, None, None)


def _blocks(config: ImageVAEConfig, dtype, level: int, count: int, x):
    """The residual blocks of one resolution."""
    kind = nn.remat(ResidualBlock) if config.remat else ResidualBlock
    for index in range(count):
        x = kind(config, dtype, name=f"level_{level}_block_{index}")(x)
    return x


class ImageEncoder(nn.Module):
    """Images to the posterior of their latents."""

    config: ImageVAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Posterior:
        config, dtype = self.config, self.dtype
        rows, columns = config.grid(*images.shape[1:3])
        x = space_to_depth(images.astype(dtype), config.patch_size)
        x = Convolution(config.widths[0], (None, "embed"), dtype=dtype, name="patch_embedder")(x)
        for level, channels in enumerate(config.widths):
            if level:
                x = space_to_depth(x, 2)
                x = Linear((channels,), ("mlp", "embed"), dtype=dtype, name=f"down_{level}")(x)
            x = _blocks(config, dtype, level, config.encoder_blocks, x)
        if config.num_heads:
            x = MiddleAttention(config, dtype, name="attention")(x)
        x = nn.silu(_norm(config, "final_norm")(x)).reshape(images.shape[0], rows * columns, -1)
        shape, names = (config.posterior_outputs, config.latent_dim), ("embed", None, "latent")
        x = Linear(shape, names, dtype=dtype, name="final_layer")(x).astype(jnp.float32)
        norm = LayerNorm(config.norm_eps, affine=False, name="last_norm") if config.normalize_mean else None
        return posterior.gaussian(x, norm, config.logsnr)


class ImageDecoder(nn.Module):
    """Normalised latents to images, float32."""

    config: ImageVAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, latents: Float[Array, "B N D"], grid: tuple[int, int]) -> Float[Array, "B H W C"]:
        config, dtype = self.config, self.dtype
        x = Linear((config.widths[-1],), ("latent", "embed"), dtype=dtype, name="in_layer")(latents)
        x = x.reshape(latents.shape[0], *grid, -1)
        if config.num_heads:
            x = MiddleAttention(config, dtype, name="attention")(x)
        for level in reversed(range(len(config.widths))):
            x = _blocks(config, dtype, level, config.decoder_blocks, x)
            if level:
                x = Linear((4 * config.widths[level - 1],), ("embed", "mlp"), dtype=dtype, name=f"up_{level}")(x)
                x = sharding.constrain(depth_to_space(x, 2), "batch", None, None, None)
        x = nn.silu(_norm(config, "final_norm")(x))
        pixels = config.patch_size**2 * config.channels
        x = Convolution(pixels, ("embed", None), dtype=dtype, name="unpatch_layer")(x)
        return depth_to_space(x, config.patch_size).astype(jnp.float32)


class ImageVAE(nn.Module):
    """Encoder and decoder. Latents go to `decode` normalised as ``(z - shift) * scale``."""

    config: ImageVAEConfig
    dtype: jnp.dtype = jnp.dtype("float32")

    def setup(self):
        self.encoder = ImageEncoder(self.config, self.dtype)
        self.decoder = ImageDecoder(self.config, self.dtype)

    def encode(self, images: Float[Array, "B H W C"]) -> Posterior:
        """The posterior of the latents [B, N, D], row by row of the image, before normalisation.

        Args:
          images: pixels in [-1, 1] (`to_float`).

        Raises:
          UserError: the downsampling does not divide them, or they have other channels.
        """
        given, channels = images.shape[-1], self.config.channels
        require(given == channels, "channels of an image", given, str(channels))
        return self.encoder(images)

    def decode(self, latents: Float[Array, "B N D"], grid: tuple[int, int]) -> Float[Array, "B H W C"]:
        """Images, float32. Trained towards [-1, 1], not cut off there (`to_uint8` does).

        Args:
          latents: normalised, row by row.
          grid: rows and columns of latents (`ImageVAEConfig.grid`), whose product is N.
        """
        if grid[0] * grid[1] != latents.shape[1]:
            raise ValueError(f"a grid of {grid[0]} x {grid[1]} latents: must hold {latents.shape[1]}")
        return self.decoder(latents, grid)

    def normalize(self, latents: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """``(z - shift) * scale``: from the encoder's latents to those of decoder and prior."""
        return (latents - self.config.shift) * self.config.scale

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Touches every parameter; for initialisation."""
        return self.decode(self.normalize(self.encode(images).mean), self.config.grid(*images.shape[1:3]))


def create(config: ImageVAEConfig, dtype: str = "float32") -> ImageVAE:
    """The model of a config that is valid."""
    return ImageVAE(config, jnp.dtype(dtype))
