"""Bounds on log p(image), also given a text (5.5): ``log p(x) >= E_q[log p(x|z) + log p(z) - log q(z|x)]``.

An image's latents are one block, whose density under the prior is that of its flow (`flow.density`). What the image
reads, a text say, is a `Before`. Pixels have an observation model (`pixels`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from cola_jax import rng
from cola_jax.fields import require
from cola_jax.flow import density as flow_density
from cola_jax.likelihood import density, estimators, pixels, weights
from cola_jax.likelihood.density import Density
from cola_jax.likelihood.estimators import Likelihood
from cola_jax.likelihood.pixels import Pixels
from cola_jax.likelihood.settings import Settings
from cola_jax.models.dit_layer import Before
from cola_jax.models.image_vae import to_float
from cola_jax.models.unified import UnifiedDLM
from cola_jax.nn.visibility import AnyArray
from cola_jax.types import Key, Params, UserError


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def log_prob(
    model: UnifiedDLM,
    params: Params,
    latents: Float[Array, "B N D"],
    grid: tuple[int, int],
    settings: Settings,
    before: Before | None = None,
    keys: Key | None = None,
) -> Density:
    """``log p(z)`` of images' latents under the prior, given what each of them reads.

    Args:
      model, params: the joint model; only its prior is used.
      latents: normalised, row by row.
      grid: their rows and columns.
      settings: see `Settings`.
      before: of each image (`UnifiedDLM.text_before`); None: the images read nothing.
      keys: [B], for Hutchinson's probes; None where the divergence is exact.

    Returns:
      A `Density` with one block an image. A solve that fails has ``ok`` False; the others are not touched.
    """
    model, params = density.precise(model, params, settings, ("dit", "image_dit"))
    # Forward-mode derivatives pass through attention, which splash has not.
    model = model.clone(dit_config=dataclasses.replace(model.dit_config, attention_kernel="xla"))
    dtype = jnp.dtype(settings.dtype)
    parts = None if before is None else (*(x.astype(dtype) for x in before.pair), before.ids)

    def of_image(z, parts, key):
        own = None if parts is None else Before(parts[0][:, None], parts[1][:, None], parts[2][None])

        def velocity(z, t):
            return model.apply(params, z[None], t[None], grid, own, method="image_velocity")[0]

        probes = None if key is None else density.draw_probes(key, settings, z.shape)
        flow = flow_density.transport(
            velocity, z, settings.method, probes=probes, scale=model.image_dit_config.deviation
        )
        return flow_density.log_prob(flow), flow

    of_before = None if before is None else (1, 1, 0)
    per_image = jax.vmap(of_image, in_axes=(0, of_before, None if keys is None else 0))
    log_p, flow = per_image(latents.astype(dtype), parts, keys)
    return Density(log_p[:, None], flow.end, flow.ok[:, None], flow.steps[:, None])


@functools.partial(jax.jit, static_argnums=(0, 4, 6))
def terms(
    model: UnifiedDLM,
    params: Params,
    images: UInt8[Array, "B Y X C"],
    ids: Int[Array, " B"],
    settings: Settings,
    scale: Float[Array, ""],
    kind: str,
    key: Key,
    samples: Int[Array, " S"],
    before: Before | None = None,
) -> weights.Terms:
    """The parts of ``log w`` for samples of every image, with one block an image.

    Args:
      model, params, images, settings, key, before: as in `log_likelihood`.
      ids: identity of each image in the random stream.
      scale, kind: of `Pixels`.
      samples: numbers of the samples.
    """
    batch, count, grid = images.shape[0], samples.shape[0], model.image_vae_config.grid(*images.shape[1:3])
    posterior = model.apply(params, to_float(images), method="encode_image")
    keys = weights.sample_keys(key, ids, samples).reshape(-1)
    noise_keys, probe_keys = rng.split(keys, 2)

    def spread(x, axis=0):  # one row for each of its samples
        return jnp.repeat(x, count, axis)

    mean, logvar = spread(posterior.mean), spread(posterior.logvar)
    noise = rng.normal(noise_keys, mean.shape[1:])
    z = model.normalize_image(mean + jnp.exp(0.5 * logvar) * noise)
    # The normalised latents' density: that of z over the Jacobian of z -> (z - shift) scale.
    jacobian = math.log(abs(model.image_vae_config.scale))
    q = jnp.sum(-0.5 * (jnp.square(noise) + logvar + math.log(2 * math.pi)) - jacobian, axis=(1, 2))
    decoded = model.apply(params, z, grid, method="decode_image")
    seen = jnp.sum(pixels.log_prob(spread(images), decoded, scale, kind), axis=(1, 2, 3))
    if before is not None:
        before = Before(*(spread(x, 1) for x in before.pair), spread(before.ids))
    prior = log_prob(model, params, z, grid, settings, before, None if settings.divergence == "exact" else probe_keys)
    blocks = (x.reshape(batch, count, 1) for x in (seen, prior.log_prob, q))
    return weights.Terms(*blocks, prior.ok.reshape(batch, count), prior.steps.reshape(batch, count))


def log_likelihood(
    model: UnifiedDLM,
    params: Params,
    images: UInt8[AnyArray, "B Y X C"],
    observed: Pixels,
    settings: Settings,
    key: Key,
    before: Before | None = None,
    ids=None,
    report: Callable[[int, int], None] | None = None,
) -> Likelihood:
    """Estimates ``log p(x)`` of each image with K posterior samples, given what it reads.

    Args:
      model, params: the joint model.
      images: pixels, all of one size.
      observed: what decoded images say of pixels, fitted on other images (`fit`).
      settings: see `Settings`; ``rows`` images times samples are solved at a time, or all images of one sample.
      key: source of all draws; what image i draws depends on (key, its id, sample) alone.
      before: of each image (`objectives.unified.text_before`); None: the images read nothing.
      ids: [B], identity of each image in the random stream; by default its index. Images with the same id share draws:
        an image given several texts then differs by the density of its latents alone.
      report: called with (samples done, samples) as the estimate grows.

    Returns:
      A `Likelihood`, nats, whose ``tokens`` are the channels of pixels (`bits_per_dimension`) and which has one block
      an image. The ELBO is a lower bound in expectation; the IWAE, which is nearer, is given with the exact divergence.

    Raises:
      UserError: a setting, image or model that cannot be used.
    """
    settings.validate()
    observed.validate()
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8 or not images.size:
        raise UserError(f"images are {images.dtype}{list(images.shape)}: must be uint8 [B, Y, X, C], B > 0")
    model.image_vae_config.grid(*images.shape[1:3])
    if missing := {"dit", "image_dit", "image_vae"} - set(params["params"]):
        raise UserError(f"params: no {', '.join(sorted(missing))}; needs a joint model that has been through stage 2")
    count = len(images)
    if before is not None:
        require(before.ids.shape[0] == count, "rows of before", before.ids.shape[0], f"{count}, one for each image")
    ids = np.arange(count) if ids is None else np.asarray(ids)
    require(ids.shape == (count,), "shape of ids", ids.shape, f"({count},), one number for each image")

    def of_samples(samples):
        rows = jnp.asarray(images), jnp.asarray(ids, jnp.int32)
        return terms(model, params, *rows, settings, jnp.float32(observed.scale), observed.kind, key, samples, before)

    return estimators.estimate(of_samples, settings, count, np.full(count, images[0].size), report)


@functools.partial(jax.jit, static_argnums=0)
def _decoded(model: UnifiedDLM, params: Params, images, keys: Key):
    posterior = model.apply(params, to_float(images), method="encode_image")
    noise = rng.normal(keys, posterior.mean.shape[1:])
    z = model.normalize_image(posterior.mean + jnp.exp(0.5 * posterior.logvar) * noise)
    return model.apply(params, z, model.image_vae_config.grid(*images.shape[1:3]), method="decode_image")


def fit(
    model: UnifiedDLM, params: Params, images: UInt8[AnyArray, "B Y X C"], key: Key, kind: str = "logistic"
) -> Pixels:
    """The observation model under which images are most likely, given a sample of their latents each.

    Args:
      model, params: the joint model.
      images: pixels, of training: not those whose bound is asked for.
      key: of the samples.
      kind: see `Pixels`.
    """
    images = jnp.asarray(images)
    keys = rng.fold_in(key, jnp.arange(images.shape[0]))
    return pixels.fit(images, _decoded(model, params, images, keys), kind)


def bits_per_dimension(log_prob, dimensions):
    """``-L / (dimensions log 2)``; a dimension is a channel of a pixel."""
    return -np.asarray(log_prob, np.float64) / (np.asarray(dimensions) * math.log(2))
