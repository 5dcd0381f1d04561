"""The image VAE alone: reconstruction, KL or entropy, and errors of features that the user chooses (5.5)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from cola_jax.fields import require, setting
from cola_jax.models.image_vae import ImageVAE, to_float
from cola_jax.objectives import common
from cola_jax.types import Key, Params, PyTree, Term

# Images [B, H, W, 3] with pixels in [-1, 1] -> arrays [B, ...]; it knows its own weights, which are not trained.
Features = Callable[[Array], PyTree]


@dataclasses.dataclass(frozen=True)
class ImageStageConfig:
    """Weights of the terms of an image VAE (5.5)."""

    loss: str = setting("l1", "error of a channel of a pixel: its size or its square", choices=("l1", "l2"))
    kl_weight: float = setting(
        1e-4,
        "on KL(q || N(0, I)), summed over the channels of a latent; constant where vae.logsnr is fixed",
        at_least=0,
    )
    entropy_weight: float = setting(
        0.0, "beta, on E_q[log q] in the place of the KL, where a prior is learned along", at_least=0
    )
    perceptual_weight: float = setting(0.0, "on squared errors of features, if any are given", at_least=0)

    def check_together(self, prefix: str) -> None:
        need = "0 where kl_weight > 0, which holds E_q[log q] already"
        ok = not (self.kl_weight and self.entropy_weight)
        require(ok, f"{prefix}entropy_weight", self.entropy_weight, need)


def terms(
    model: ImageVAE,
    stage: ImageStageConfig,
    params: Params,
    batch: dict,
    keys: Key,
    weight: Shaped[Array, " B"] | None = None,
    features: Features | None = None,
) -> dict[str, Term]:
    """``|x - x'| + kl_weight KL(q || N(0, I)) + entropy_weight E_q[log q] + perceptual_weight |f(x) - f(x')|^2``.

    x' is decoded from a sample of the posterior.

    Args:
      model: of the images.
      stage: kind of error, weights.
      params: its variables.
      batch: image [B, H, W, C], uint8.
      keys: [B].
      weight: of each example: 0 for a row that is padding; None: 1 for all.
      features: with ``perceptual_weight``, what should look alike.

    Returns:
      Terms per example. Reconstruction is per channel of a pixel, of pixels in [-1, 1]; KL and entropy are per latent;
      the perceptual term is the mean over the elements of each array of features, summed over the arrays.
      "pixel_error" is reported: the mean absolute error of what is shown, as a share of the range of a pixel.

    Raises:
      UserError: there is a weight of the perceptual term, but no features.
    """
    needed = stage.perceptual_weight > 0
    ok = features is not None or not needed
    require(ok, "perceptual_weight", stage.perceptual_weight, "0 where no features of images are given")
    images = to_float(batch["image"])
    posterior = model.apply(params, images, method="encode")
    z = model.normalize(common.draw(posterior, keys))
    decoded = model.apply(params, z, model.config.grid(*images.shape[1:3]), method="decode")
    weight = jnp.ones(images.shape[0]) if weight is None else weight.astype(jnp.float32)
    latents = jnp.broadcast_to(weight[:, None], z.shape[:2])
    error = decoded - images
    shown = jnp.abs(jnp.clip(decoded, -1.0, 1.0) - images) / 2
    out = {
        "reconstruction": _mean(jnp.abs(error) if stage.loss == "l1" else jnp.square(error), weight),
        "kl": common.per_example(
            common.kl(posterior, common.standard_normal_like(posterior)), latents, stage.kl_weight
        ),
        "pixel_error": _mean(shown, weight, 0.0),
        **common.posterior_statistics(posterior, latents),
    }
    if stage.entropy_weight:
        out["entropy"] = common.per_example(common.negative_entropy(posterior), latents, stage.entropy_weight)
    if needed:
        out["perceptual"] = _perceptual(features(decoded), features(images), weight, stage.perceptual_weight)
    return out


def _mean(values: Array, weight: Float[Array, " B"], coefficient: float = 1.0) -> Term:
    """A term that counts each element of an example."""
    values = values.reshape(values.shape[0], -1)
    return Term(jnp.sum(values, axis=1) * weight, values.shape[1] * weight, coefficient)


def _perceptual(found: PyTree, wanted: PyTree, weight: Float[Array, " B"], coefficient: float) -> Term:
    def distance(a, b):
        squares = jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32))
        return jnp.mean(squares.reshape(squares.shape[0], -1), axis=1)

    total = sum(jax.tree.leaves(jax.tree.map(distance, found, wanted)))
    return Term(total * weight, weight, coefficient)
