"""Stage 1: the Text VAE alone (3.16)."""

import dataclasses

import jax
import jax.numpy as jnp

from cola_jax import rng
from cola_jax.fields import setting
from cola_jax.flow import path
from cola_jax.objectives import common, masked_tokens
from cola_jax.types import Key, Params, Term


@dataclasses.dataclass(frozen=True)
class Stage1Config:
    """Text VAE alone (3.16)."""

    steps: int = setting(300, "updates; 0: the stage is skipped", at_least=0)
    kl_weight: float = setting(1e-3, "beta; the KL is summed over the D channels of a latent", at_least=0)
    mask_weight: float = setting(0.1, "lambda_mask", at_least=0)
    mask_ratio: float = setting(
        0.3, "share of the input tokens that is replaced by the mask token", at_least=0, at_most=1
    )
    noisy_decoding: float = setting(
        0.5, "share of the sequences that is decoded from z_t [ours]", at_least=0, at_most=1
    )
    noisy_decoding_max_time: float = setting(0.3, "with t uniform from 0 to this", at_least=0, at_most=1)


def terms(model, stage: Stage1Config, params: Params, batch: dict, keys: Key) -> dict[str, Term]:
    """``recon + beta KL(q || N(0, I)) + lambda_mask L_mask``.

    Args:
      model: a `ColaDLM`; only its VAE is used.
      stage: weights and ratios.
      params: variables that hold at least the VAE's.
      batch: tokens, segment_ids [B, T]; segment 0 is padding and counts nowhere.
      keys: [B].

    Returns:
      Terms per example. Reconstruction is per token, the KL per latent (summed over its channels).
    """
    draw_keys, noise_keys, mask_keys = rng.split(keys, 3)
    segments = common.latent_segments(batch, model.vae_config.patch_size)
    tokens, real = batch["tokens"], (batch["segment_ids"] > 0).astype(jnp.float32)
    written = common.reconstructed(batch, model.vae_config.patch_size)
    latents = (segments > 0).astype(jnp.float32)
    inputs = common.encoder_tokens(batch, model.vae_config.vocab_size)
    posterior = model.apply(params, inputs, segments, method="encode")
    z = model.normalize(common.draw(posterior, draw_keys))
    scores = common.token_scores(model, params, _some_noisy(z, stage, noise_keys), tokens, segments)
    out = {
        "reconstruction": common.per_example(scores.cross_entropy, written),
        "kl": common.per_example(
            common.kl(posterior, common.standard_normal_like(posterior)), latents, stage.kl_weight
        ),
        "accuracy": common.per_example(scores.accuracy, real, 0.0),
        **common.posterior_statistics(posterior, latents),
    }
    if stage.mask_weight:
        out["mask"] = masked_tokens.term(model, params, batch, mask_keys, stage.mask_ratio, stage.mask_weight)
    return out


def _some_noisy(z: jax.Array, stage, keys: Key) -> jax.Array:
    """A share of the sequences moved to a small flow time, so that the decoder tolerates the prior's errors."""
    if not stage.noisy_decoding:
        return z
    choose, time, noise = rng.split(keys, 3)
    chosen = rng.uniform(choose, (1,)) < stage.noisy_decoding
    t = jnp.where(chosen, rng.uniform(time, (1,)) * stage.noisy_decoding_max_time, 0.0)
    return path.interpolate(path.LINEAR, z, rng.normal(noise, z.shape[1:]), t[..., None])[0]
