"""Image VAEs small enough to compile in a second, with every parameter away from zero; pictures of rectangles."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cola_jax.models import image_vae
from cola_jax.models.image_vae import ImageVAEConfig


def config(**changes) -> ImageVAEConfig:
    fields = {"latent_dim": 4, "downsampling": 4, "patch_size": 2, "widths": (8, 12), "logsnr": 2.0}
    return ImageVAEConfig(**(fields | changes))


def abstract(model):
    """Shapes of the parameters, without boxes."""
    side, channels = 2 * model.config.downsampling, model.config.channels
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, channels))))


@functools.cache
def _create(settings: ImageVAEConfig, dtype: str):
    model, draw = image_vae.create(settings, dtype), np.random.default_rng(1)

    def leaf(path, x):
        values, name = draw.standard_normal(x.shape).astype(np.float32), path[-1].key
        if name == "kernel":
            return jnp.asarray(values / math.sqrt(math.prod(x.shape[:3]) if x.ndim == 4 else x.shape[0]))
        return jnp.asarray(0.2 * values + (name == "scale"))

    return model, jax.tree_util.tree_map_with_path(leaf, abstract(model))


def create(dtype: str = "float32", **changes):
    """(model, params): the same objects for the same arguments."""
    return _create(config(**changes), dtype)


def pictures(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Two coloured rectangles on white each, uint8 [count, height, width, 3]."""
    draw, images = np.random.default_rng(seed), np.full((count, height, width, 3), 255, np.uint8)
    for image in images:
        for _ in range(2):
            (top, left), (rows, columns) = (
                draw.integers(0, (height // 2, width // 2)),
                draw.integers(3, height // 2 + 1, 2),
            )
            image[top : top + rows, left : left + columns] = draw.integers(0, 256, 3)
    return images
