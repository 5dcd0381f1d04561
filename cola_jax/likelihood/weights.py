"""Importance weights of posterior samples: ``log w = log p(x|z) + log p(z) - log q(z|x)`` (3.8), block by block."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cola_jax import rng
from cola_jax.likelihood import density
from cola_jax.likelihood.rows import Rows
from cola_jax.likelihood.settings import Settings
from cola_jax.models.cola import ColaDLM
from cola_jax.objectives import common
from cola_jax.types import Key, Params, Posterior


class Terms(NamedTuple):
    """The parts of ``log w`` in nats, for S samples of each row and each of its G blocks.

    Both densities are those of normalised latents, ``(z - shift) scale``.
    """

    reconstruction: Float[Array, "B S G"]  # log p(x_b | z)
    prior: Float[Array, "B S G"]  # log p(z_b | z_<b)
    posterior: Float[Array, "B S G"]  # log q(z_b | x)
    ok: Bool[Array, "B S"]
    steps: Int[Array, "B S"]  # of the slowest block's solver


def sample_keys(key: Key, ids: Int[Array, " B"], samples: Int[Array, " S"]) -> Key:
    """A key for each row and sample [B, S]: what is drawn depends on (key, row's id, sample) alone."""
    return rng.fold_in(rng.fold_in(key, ids)[:, None], samples[None])


@functools.partial(jax.jit, static_argnums=0)
def encode(model: ColaDLM, params: Params, rows: Rows) -> Posterior:
    """The posterior of every row's latents, before normalisation.

    Those of given tokens are the prefix's, encoded alone as generation does: a block-causal encoder would let them see
    the response in their block.
    """
    patch = model.vae_config.patch_size
    segments, given = rows.real[:, ::patch], rows.given[:, ::patch]
    whole = model.apply(params, rows.tokens, segments, method="encode")
    if model.vae_config.attention == "causal":
        return whole
    alone = model.apply(params, rows.tokens, segments * given, method="encode")
    return jax.tree.map(lambda prefix, full: jnp.where(given[..., None], prefix, full), alone, whole)


@functools.partial(jax.jit, static_argnums=(0, 3))
def terms(
    model: ColaDLM, params: Params, rows: Rows, settings: Settings, posterior: Posterior, key: Key, samples: Array
) -> Terms:
    """The parts of ``log w`` for samples of every row.

    Args:
      model, params: the Cola DLM.
      rows: see `rows.Rows`. Only tokens and latents that are real and not given count.
      settings: see `Settings`.
      posterior: of `encode`.
      key: source of all draws; see `sample_keys`.
      samples: [S], numbers of the samples.
    """
    size, patch = model.dit_config.block_size, model.vae_config.patch_size
    batch, length, channels = posterior.mean.shape
    blocks, count = length // size, samples.shape[0]
    keys = rng.fold_in(sample_keys(key, rows.ids, samples)[..., None], jnp.arange(blocks)[None, None])
    keys = keys.reshape(batch * count, blocks)
    pairs = jax.vmap(jax.vmap(jax.random.split))(keys)  # for the latents, for the probes

    def spread(x):  # one row for each of its samples
        return jnp.repeat(x, count, axis=0)

    mean, logvar = spread(posterior.mean), spread(posterior.logvar)
    noise = jax.vmap(jax.vmap(lambda k: jax.random.normal(k, (size, channels))))(pairs[..., 0]).reshape(mean.shape)
    segments, given = spread(rows.real[:, ::patch]), spread(rows.given[:, ::patch])
    fixed = given if settings.prefix == "mean" else jnp.zeros_like(given)
    z = model.normalize(mean + jnp.where(fixed[..., None], 0.0, jnp.exp(0.5 * logvar) * noise))
    logits = model.apply(params, z, segments, method="decode")
    probe_keys = None if settings.divergence == "exact" else pairs[..., 1]
    prior = density.log_prob(model, params, z, settings, probe_keys, segments, given)

    # The normalised latents' density: that of z over the Jacobian of z -> (z - shift) scale.
    jacobian = math.log(abs(model.vae_config.scale))
    q = jnp.sum(-0.5 * (jnp.square(noise) + logvar + math.log(2 * math.pi)) - jacobian, axis=-1)
    counted = spread((rows.real > 0) & ~rows.given)
    reconstruction = -jnp.where(counted, common.cross_entropy(logits, spread(rows.tokens)), 0.0)
    q = jnp.where((segments > 0) & ~given, q, 0.0)

    def by_block(x, width):
        return x.reshape(batch, count, blocks, width).sum(-1)

    return Terms(
        by_block(reconstruction, size * patch),
        prior.log_prob.reshape(batch, count, blocks),
        by_block(q, size),
        jnp.all(prior.ok, axis=1).reshape(batch, count),
        jnp.max(prior.steps, axis=1).reshape(batch, count),
    )
