"""The masked-token loss of the Text VAE (3.16)."""

import jax.numpy as jnp

from cola_jax import rng
from cola_jax.objectives import common
from cola_jax.types import Key, Term


def term(model, params, batch: dict, keys: Key, mask_ratio: float, coefficient: float) -> Term:
    """``L_mask`` (3.16): a share of the input tokens is the mask token; cross-entropy on those only.

    The masked sequence is encoded and decoded through a sample of its posterior.
    """
    choose_keys, draw_keys = rng.split(keys, 2)
    tokens, real = batch["tokens"], batch["segment_ids"] > 0
    segments = common.latent_segments(batch, model.vae_config.patch_size)
    chosen = (rng.uniform(choose_keys, tokens.shape[1:]) < mask_ratio) & real
    masked = jnp.where(chosen | ~real, model.vae_config.vocab_size, tokens)
    z = common.draw(model.apply(params, masked, segments, method="encode"), draw_keys)
    scores = common.token_scores(model, params, model.normalize(z), tokens, segments)
    return common.per_example(scores.cross_entropy, chosen.astype(jnp.float32), coefficient)
