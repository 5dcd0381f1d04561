"""One model of text and images: two VAEs, and one block-causal prior over the latents of both (5.5).

A text is a `ColaDLM`'s, and with its methods. What stands before it, a picture say, is a `Before` among the variables
(`with_before`): then the same methods, and all that samples and scores with them, are conditional on it.
"""

import jax.numpy as jnp
from flax.linen import meta
from jaxtyping import Array, Float, Int

from cola_jax.models.cola import ColaDLM
from cola_jax.models.dit_layer import Before
from cola_jax.models.image_dit import ImageDiTConfig, ImageStream
from cola_jax.models.image_vae import ImageVAE, ImageVAEConfig
from cola_jax.types import Params, Posterior


class UnifiedDLM(ColaDLM):
    """`ColaDLM` with an image VAE and the image stream of the prior.

    Who sees whom, with clean text C, noisy text N, instruction P, image I: N and C as in `ColaDLM`. I alone sees itself
    and what is before it: all of C where the image is drawn for a text. Where a text is written for an image, P and I
    are one clean block before it (`joined`) that sees nothing else.
    """

    image_vae_config: ImageVAEConfig = ImageVAEConfig()
    image_dit_config: ImageDiTConfig = ImageDiTConfig()

    def setup(self):
        super().setup()
        self.image_vae = ImageVAE(self.image_vae_config, self.dtype)
        self.image_dit = ImageStream(self.image_dit_config, self.dit_config, self.dtype)

    def _text_layers(self) -> Params:
        return meta.unbox(self.dit.variables["params"]["layers"])

    def encode_image(self, images: Float[Array, "B Y X C"]) -> Posterior:
        """Posterior of an image's latents; see `ImageVAE.encode`."""
        return self.image_vae.encode(images)

    def decode_image(self, latents: Float[Array, "B N D"], grid: tuple[int, int]) -> Float[Array, "B Y X C"]:
        """Images of normalised latents; see `ImageVAE.decode`."""
        return self.image_vae.decode(latents, grid)

    def normalize_image(self, latents):
        """From the image encoder's latents to those of decoder and prior."""
        return (latents - self.image_vae_config.shift) * self.image_vae_config.scale

    def image_velocity(
        self,
        latents: Float[Array, "B N D"],
        times: Float[Array, " #B"],
        grid: tuple[int, int],
        before: Before | None = None,
        ids: Int[Array, "B N"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Velocity of noisy latents of images; see `ImageStream.velocity`."""
        return self.image_dit.velocity(latents, times, grid, self._text_layers(), before, ids)[0]

    def text_before(self, latents: Float[Array, "B N D"], segment_ids: Int[Array, "B N"]) -> Before:
        """Normalised latents of a clean text as what stands before; 0 in ``segment_ids`` is padding."""
        return Before(*self.dit.prefill(latents, segment_ids), segment_ids)

    def image_before(
        self, latents: Float[Array, "B N D"], grid: tuple[int, int], before: Before | None = None
    ) -> Before:
        """Normalised latents of a clean image that reads ``before``, as what stands before."""
        return self.image_dit.velocity(latents, jnp.zeros(1), grid, self._text_layers(), before)[1]

    def joined(
        self,
        words: Float[Array, "B M E"],
        words_ids: Int[Array, "B M"],
        latents: Float[Array, "B N D"],
        grid: tuple[int, int],
        before: Before | None = None,
    ) -> Before:
        """A clean block of text (an instruction) and an image that see each other, as what stands before.

        Args:
          words: normalised latents of the text, which stands before the image.
          words_ids: 0 for padding.
          latents: normalised latents of the image.
          grid: their rows and columns.
          before: what the block reads besides itself.
        """
        positions = jnp.arange(words.shape[1])[None] - max(grid) - words.shape[1]
        stream = self.dit.clean_stream(words, positions)
        return self.image_dit.joined(*stream, words_ids, latents, grid, self._text_layers(), before)

    def __call__(self, tokens: Int[Array, "B T"], images: Float[Array, "B Y X C"] | None = None):
        """Touches every parameter; for initialisation."""
        found = super().__call__(tokens)
        if images is None:
            return found
        grid = self.image_vae_config.grid(*images.shape[1:3])
        z = self.normalize_image(self.encode_image(images).mean)
        return *found, self.decode_image(z, grid), self.image_velocity(z, jnp.zeros(z.shape[0]), grid)


def before_in(params: Params) -> Before | None:
    """What `with_before` put among the variables."""
    return params["before"]["dit"]["is"] if "before" in params else None


def with_before(params: Params, before: Before | None) -> Params:
    """The variables with which texts follow ``before``."""
    others = {name: value for name, value in params.items() if name != "before"}
    return others if before is None else {**others, "before": {"dit": {"is": before}}}
