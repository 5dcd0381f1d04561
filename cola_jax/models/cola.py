"""Cola DLM: a Text VAE and a block-causal flow prior over its latents, as one model (3.1)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cola_jax.models.dit import BlockCausalDiT
from cola_jax.models.dit_config import DiTConfig
from cola_jax.models.text_vae import TextVAE, VAEConfig
from cola_jax.nn.visibility import BlockPlan
from cola_jax.types import Posterior


class ColaDLM(nn.Module):
    """Apply its methods by name: ``model.apply(params, tokens, method="encode")``.

    `encode` and `decode` need only the parameters under "vae", `velocity` only those under "dit". A ``plan`` says the
    blocks of the network that reads it, where they are not those of its config: see `TextVAE.encode`, `BlockCausalDiT`.
    """

    vae_config: VAEConfig
    dit_config: DiTConfig
    dtype: jnp.dtype = jnp.dtype("float32")
    stacked: bool = True  # see `BlockCausalDiT`

    def setup(self):
        self.vae = TextVAE(self.vae_config, self.dtype)
        self.dit = BlockCausalDiT(self.dit_config, self.dtype, self.stacked)

    def encode(
        self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B N"] | None = None, plan: BlockPlan | None = None
    ) -> Posterior:
        """Posterior of the latents [B, N, D], before normalisation; see `TextVAE.encode`."""
        return self.vae.encode(tokens, segment_ids, plan)

    def decode(
        self,
        latents: Float[Array, "B N D"],
        segment_ids: Int[Array, "B N"] | None = None,
        plan: BlockPlan | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits [B, N * P, V] of normalised latents; see `TextVAE.decode`."""
        return self.vae.decode(latents, segment_ids, plan)

    def decode_reduced(self, latents, tokens, reduce, segment_ids=None, plan=None):
        """What ``reduce`` makes of the logits, without all logits at once; see `TextVAE.decode_reduced`."""
        return self.vae.decode_reduced(latents, tokens, reduce, segment_ids, plan)

    def velocity(
        self,
        latents: Float[Array, "B Q D"],
        times: Float[Array, " B"] | Float[Array, "B M"],
        history: Float[Array, "B N D"] | None = None,
        pinned: Bool[Array, "B Q"] | None = None,
        segment_ids: Int[Array, "B N"] | None = None,
        drop_history: Bool[Array, "B G"] | None = None,
        plan: BlockPlan | None = None,
        estimate: Float[Array, "B Q D"] | None = None,
    ) -> Float[Array, "B Q D"]:
        """Velocity ``v(z_t, t)`` of normalised latents.

        Args:
          latents: z_t.
          times: flow times in [0, 1]: one a sequence [B], one a latent [B, N], one a block, or one for each of M
            equal stretches.
          history: None: ``latents`` attend to each other block-causally. Given, the training layout: each
            noisy block attends to the strictly earlier clean blocks of ``history`` and to itself.
          pinned, segment_ids, drop_history, plan, estimate: see `BlockCausalDiT`.
        """
        times = times[:, None] if times.ndim == 1 else times
        if history is None:
            return self.dit(latents, times, pinned, segment_ids, plan, estimate)
        return self.dit.denoise(latents, times, history, pinned, segment_ids, drop_history, plan, estimate)

    def first_estimate(self, latents, times, history, pinned=None, segment_ids=None, drop_history=None, plan=None):
        """See `BlockCausalDiT.first_estimate`."""
        return self.dit.first_estimate(latents, times, history, pinned, segment_ids, drop_history, plan)

    def prefill(self, latents, segment_ids, plan=None, decoder_plan=None):
        """Caches of prior and decoder that hold the latents of prompts; see `BlockCausalDiT.prefill`."""
        prior = self.dit.prefill(latents, segment_ids, plan)
        return prior, self.vae.decode_prompt(latents, segment_ids, decoder_plan)

    def decode_next(self, latents, cache, cache_mask, positions, plan=None):
        """See `TextVAE.decode_next`."""
        return self.vae.decode_next(latents, cache, cache_mask, positions, plan)

    def history(self, latents, segment_ids, plan=None):
        """The prior's cache of clean latents; see `BlockCausalDiT.prefill`."""
        return self.dit.prefill(latents, segment_ids, plan)

    def extend(self, latents, time, positions, cache, cache_mask, *arguments, **named):
        """See `BlockCausalDiT.extend`."""
        return self.dit.extend(latents, time, positions, cache, cache_mask, *arguments, **named)

    def modulations(self, times):
        """See `BlockCausalDiT.modulations`."""
        return self.dit.modulations(times)

    def __call__(self, tokens: Int[Array, "B T"]) -> tuple[jax.Array, jax.Array]:
        """Touches every parameter; for initialisation."""
        z = self.normalize(self.encode(tokens).mean)
        return self.decode(z), self.velocity(z, jnp.zeros(z.shape[0]), history=z)

    def normalize(self, latents):
        """``(z - shift) * scale``: from the encoder's latents to those of decoder and prior."""
        return (latents - self.vae_config.shift) * self.vae_config.scale


def create(vae: VAEConfig, dit: DiTConfig, dtype="float32") -> ColaDLM:
    """The model; ``vae.vocab_size`` must be known (see `with_vocabulary`)."""
    return ColaDLM(vae, dit, jnp.dtype(dtype))


def with_vocabulary(vae: VAEConfig, vocab_size: int) -> VAEConfig:
    """``vae`` with the tokenizer's vocabulary size where the config leaves it open."""
    return vae if vae.vocab_size else dataclasses.replace(vae, vocab_size=vocab_size)
