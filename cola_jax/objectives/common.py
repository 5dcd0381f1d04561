"""What the terms of both stages share: masked sums, cross-entropy, draws from the posterior."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cola_jax import rng
from cola_jax.types import Key, Posterior, Term


def latent_segments(batch: dict, patch_size: int) -> Int[Array, "B N"]:
    """The document of each latent (0: nothing but padding). A patch holds tokens of one document, and padding."""
    segments = batch["segment_ids"]
    return jnp.max(segments.reshape(segments.shape[0], -1, patch_size), axis=-1)


def reconstructed(batch: dict, patch_size: int) -> Float[Array, "B T"]:
    """Weights of the tokens that the decoder learns to write: all of every real latent, padding in it included.

    So the first token of a text that begins inside a patch can be distinguished from the padding before it.
    """
    return jnp.repeat(latent_segments(batch, patch_size) > 0, patch_size, axis=1).astype(jnp.float32)


def encoder_tokens(batch: dict, mask_token: int) -> Int[Array, "B T"]:
    """What the encoder reads: padding is the mask token, as in generation."""
    return jnp.where(batch["segment_ids"] > 0, batch["tokens"], mask_token)


def per_example(values: Float[Array, "B N"], mask: Float[Array, "B N"], coefficient: float = 1.0) -> Term:
    """A term from values at positions, counted where the mask is 1."""
    return Term(jnp.sum(values * mask, axis=1), jnp.sum(mask, axis=1), coefficient)


def cross_entropy(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """``-log p(token)`` in nats, float32."""
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def accuracy(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """1 where the most likely token is the right one."""
    return (jnp.argmax(logits, axis=-1) == tokens).astype(jnp.float32)


class TokenScores(NamedTuple):
    """Of each token: its cross-entropy, and whether it is the most likely one (no gradient)."""

    cross_entropy: Float[Array, "B T"]
    accuracy: Float[Array, "B T"]


def token_scores(model, params, latents, tokens: Int[Array, "B T"], segments: Int[Array, "B N"]) -> TokenScores:
    """Scores of the tokens under the decoder of normalised latents, without all logits at once."""

    def reduce(logits, tokens):
        return TokenScores(cross_entropy(logits, tokens), accuracy(logits, tokens))

    return model.apply(params, latents, tokens, reduce, segments, method="decode_reduced")


def draw(posterior: Posterior, keys: Key) -> Float[Array, "B N D"]:
    """One reparameterised sample of each latent."""
    return posterior.mean + jnp.exp(0.5 * posterior.logvar) * rng.normal(keys, posterior.mean.shape[1:])


def kl(p: Posterior, q: Posterior) -> Float[Array, "B N"]:
    """``KL(p || q)`` of diagonal Gaussians in nats, summed over the channels of each latent."""
    ratio = jnp.exp(p.logvar - q.logvar)
    distance = jnp.square(p.mean - q.mean) * jnp.exp(-q.logvar)
    return 0.5 * jnp.sum(ratio + distance - 1.0 - p.logvar + q.logvar, axis=-1)


def standard_normal_like(posterior: Posterior) -> Posterior:
    """N(0, I)."""
    return Posterior(jnp.zeros_like(posterior.mean), jnp.zeros_like(posterior.logvar))


def negative_entropy(posterior: Posterior) -> Float[Array, "B N"]:
    """``E_q[log q]`` in nats, in closed form, summed over the channels of each latent."""
    return -0.5 * jnp.sum(posterior.logvar + jnp.log(2 * jnp.pi) + 1.0, axis=-1)


def posterior_statistics(posterior: Posterior, mask: Float[Array, "B N"]) -> dict[str, Term]:
    """Signal and noise power of the latents, whose log-ratio is the VAE's logSNR (16.2)."""
    return {
        "latent_signal": per_example(jnp.mean(jnp.square(posterior.mean), axis=-1), mask, 0.0),
        "latent_noise": per_example(jnp.mean(jnp.exp(posterior.logvar), axis=-1), mask, 0.0),
    }
