"""The latent of one token with everything before it given: its densities and what the decoder makes of it (5.1-5.2)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cola_jax.flow import density as flow_density
from cola_jax.flow.solve import Velocity
from cola_jax.likelihood import density
from cola_jax.likelihood.settings import Settings
from cola_jax.models.cola import ColaDLM
from cola_jax.types import Key, Params, UserError


class Token(NamedTuple):
    """A token of a text and what is known of its latent.

    Attributes:
      row: ids [1, N] up to and with the token, which ends its block.
      latents: the posterior means of the row, normalised, [1, N, D].
      mean, deviation: of the token's posterior, normalised, [D].
    """

    row: np.ndarray
    latents: Float[Array, "1 N D"]
    mean: Float[Array, " D"]
    deviation: Float[Array, " D"]


def token(model: ColaDLM, params: Params, tokens, index: int) -> Token:
    """The token at an index.

    Args:
      model, params: the Cola DLM, without patches (P = 1).
      tokens: ids of a text.
      index: of a token that ends a block: its block is then one as in training, with a known part at time 0.

    Raises:
      UserError: the index is none of those.
    """
    size = model.dit_config.block_size
    if model.vae_config.patch_size != 1 or not 0 <= index < len(tokens) or (index + 1) % size:
        raise UserError(f"token {index} of {len(tokens)}: must be a token that ends a block of {size}, without patches")
    row = jnp.asarray(tokens, jnp.int32)[None, : index + 1]
    posterior = model.apply(params, row, jnp.ones_like(row), method="encode")
    latents = model.normalize(posterior.mean)
    deviation = jnp.exp(0.5 * posterior.logvar[0, -1]) * abs(model.vae_config.scale)
    return Token(np.asarray(row), latents, latents[0, -1], deviation)


def _prior(model, params, place: Token, settings: Settings) -> Velocity:
    """Velocity of the token's latent alone, [1, D]; the rest of its block is at time 0."""
    size = model.dit_config.block_size
    model, params = density.precise(model, params, settings)
    latents = place.latents.astype(settings.dtype)
    cache = model.apply(params, latents, jnp.ones(latents.shape[:2], jnp.int32), method="history")
    real, known = jnp.ones(size, bool), jnp.arange(size) < size - 1
    index = jnp.int32(latents.shape[1] // size - 1)
    block = density.block_velocity(model, params, jax.tree.map(lambda x: x[:, 0], cache), index, real, known)
    before = latents[0, -size:-1]
    return lambda z, t: block(jnp.concatenate([before, z]), t)[-1:]


@functools.partial(jax.jit, static_argnums=(0, 4))
def prior_log_prob(
    model: ColaDLM, params: Params, place: Token, points: Float[Array, "S D"], settings: Settings
) -> Float[Array, " S"]:
    """``log p(z_n | z_<n)`` at values of the token's latent, nats, with the exact divergence; nan where not solved."""
    velocity = _prior(model, params, place, settings)

    def log_prob(point):
        flow = flow_density.transport(velocity, point[None].astype(settings.dtype), settings.method)
        return jnp.where(flow.ok, flow_density.log_prob(flow), jnp.nan)

    return jax.vmap(log_prob)(points)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def prior_samples(
    model: ColaDLM, params: Params, place: Token, key: Key, settings: Settings, count: int
) -> Float[Array, "S D"]:
    """Latents of the token drawn from the prior, with what comes before it given."""
    velocity = _prior(model, params, place, settings)

    def sample(key):
        noise = jax.random.normal(key, (1, place.mean.shape[0]), settings.dtype)
        unused = jnp.zeros((1, *noise.shape), noise.dtype)  # a probe: the density of samples is not needed
        return flow_density.transport(velocity, noise, settings.method, 1.0, 0.0, probes=unused).end[0]

    return jax.vmap(sample)(jax.random.split(key, count))


def posterior_samples(place: Token, key: Key, count: int) -> Float[Array, "S D"]:
    """Latents of the token drawn from the encoder."""
    return place.mean[None] + place.deviation[None] * jax.random.normal(key, (count, *place.mean.shape))


@functools.partial(jax.jit, static_argnums=0)
def token_probs(model: ColaDLM, params: Params, place: Token, points: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """The decoder's distribution of the token for values of its latent."""
    rows = jnp.repeat(place.latents, points.shape[0], axis=0).at[:, -1].set(points)
    logits = model.apply(params, rows, jnp.ones(rows.shape[:2], jnp.int32), method="decode")
    return jax.nn.softmax(logits[:, -1], axis=-1)


def plane(place: Token, cloud: Float[Array, "S D"]) -> Float[Array, "2 D"]:
    """Orthonormal axes of a plane through the posterior mean: towards a cloud's mean, and along its widest spread."""
    centre = jnp.mean(cloud, axis=0)
    first = centre - place.mean
    first = first / jnp.linalg.norm(first)
    rest = cloud - centre[None]
    rest = rest - (rest @ first)[:, None] * first[None]
    second = jnp.linalg.svd(rest, full_matrices=False)[2][0]
    return jnp.stack([first, second])
