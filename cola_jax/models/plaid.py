"""Plaid: continuous diffusion on learned embeddings of the tokens, the limit of Cola in which a latent is its token.

Cola's encoder gives ``N(mean(x), sigma_0^2)``; here the mean of a position is the embedding of its own token, and one
block holds the whole text (11.17-11.19, Table 1). There is no encoder network and no decoder network: a token is read
back by Bayes' rule from the embedding that its latent is near to. The network is the prior's, and the embeddings are
its codes: it predicts a distribution over tokens at every position, and their mean is what the diffusion aims at.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cola_jax.flow import prediction
from cola_jax.models.cola import ColaDLM
from cola_jax.models.dit import BlockCausalDiT
from cola_jax.models.dit_config import DiTConfig
from cola_jax.models.text_vae import VAEConfig
from cola_jax.nn.visibility import BlockPlan
from cola_jax.types import Posterior


class Plaid(ColaDLM):
    """A `ColaDLM` whose codec are the prior's embeddings: all that generates and scores with Cola does with it.

    Of ``vae_config`` only the sizes are used. A ``plan`` of the codec has no meaning: a latent knows its token alone.
    """

    def setup(self):
        self.dit = BlockCausalDiT(self.dit_config, self.dtype, self.stacked)

    def encode(
        self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B N"] | None = None, plan: BlockPlan | None = None
    ) -> Posterior:
        """``N(embedding, sigma_0^2)`` of each token; of the mask token V, ``N(0, sigma_0^2)``."""
        codes = self.dit.codes.astype(jnp.float32)
        mean = jnp.take(jnp.pad(codes, ((0, 1), (0, 0))), tokens, axis=0)
        return Posterior(mean, jnp.full_like(mean, math.log(self.dit_config.prediction_variance)))

    def decode(
        self,
        latents: Float[Array, "B N D"],
        segment_ids: Int[Array, "B N"] | None = None,
        plan: BlockPlan | None = None,
    ) -> Float[Array, "B T V"]:
        """``log P(token | z_0)`` up to a constant, by Bayes' rule with all tokens alike."""
        one = jnp.ones((1, 1, 1), latents.dtype)
        return prediction.code_scores(0.0, self.dit.codes, latents, one / self.dit_config.prediction_variance, one)

    def decode_reduced(self, latents, tokens, reduce, segment_ids=None, plan=None):
        """``reduce(decode(latents), tokens)``."""
        return reduce(self.decode(latents), tokens)

    def prefill(self, latents, segment_ids, plan=None, decoder_plan=None):
        """The prior's cache of the latents of prompts, and an empty one: a decoder without a network has none."""
        return self.dit.prefill(latents, segment_ids, plan), ()

    def decode_next(self, latents, cache, cache_mask, positions, plan=None):
        """Logits of the next latents, and an empty cache."""
        return self.decode(latents), ()


def create(config: DiTConfig, dtype="float32") -> Plaid:
    """The model; ``config.num_codes``, the vocabulary, and ``config.prediction_variance`` must be known."""
    codec = VAEConfig(vocab_size=config.num_codes, latent_dim=config.latent_dim)
    return Plaid(codec, config, jnp.dtype(dtype))
