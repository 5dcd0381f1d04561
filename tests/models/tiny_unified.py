"""A joint model of text and images that is small enough for tests, with weights that are nowhere zero."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta

from cola_jax.models.dit_config import DiTConfig
from cola_jax.models.image_dit import ImageDiTConfig
from cola_jax.models.image_vae import ImageVAEConfig
from cola_jax.models.text_vae import VAEConfig
from cola_jax.models.unified import UnifiedDLM
from cola_jax.types import Params

SIDE, GRID = 16, (2, 2)  # pixels, latents


@functools.cache
def make(
    dual_layers: int = 1,
    prediction: str = "velocity",
    vocab_size: int = 20,
    alignment: tuple[int, int] = (0, 0),
    **dit,
) -> tuple[UnifiedDLM, Params]:
    """The model and its variables; ``alignment``: size and layer of the alignment head."""
    sizes = {"latent_dim": 4, "block_size": 2, "dim": 16, "num_heads": 2, "head_dim": 8, "num_layers": 3}
    sizes |= {"rope_dim": 8, "time_dim": 8, **dit}
    variance = 0.2 if prediction == "mean" else None
    image = ImageDiTConfig(
        3,
        dual_layers,
        prediction,
        variance,
        position_sines=True,
        alignment_size=alignment[0],
        alignment_layer=alignment[1],
    )
    model = UnifiedDLM(
        VAEConfig(vocab_size=vocab_size, dim=16, ffn_dim=32, num_heads=2, latent_dim=4, block_size=2),
        DiTConfig(**sizes),
        image_vae_config=ImageVAEConfig(latent_dim=3, downsampling=8, patch_size=4, widths=(8, 8)),
        image_dit_config=image,
    )
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, SIDE, SIDE, 3))))
    params = meta.unbox(init(jax.random.key(0)))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    return model, tree.unflatten([x + 0.2 * rng.standard_normal(x.shape, np.float32) for x in leaves])


def batch(task: int = 0, rows: int = 3, length: int = 8, instruction: int = 4) -> dict:
    """Rows of text (the last one is short), images and instructions (the first one is short)."""
    rng = np.random.default_rng(1)
    segments, said = np.ones((rows, length), np.int32), np.ones((rows, instruction), np.int32)
    segments[-1, length - 3 :], said[0, instruction - 1 :] = 0, 0
    found = {
        "tokens": rng.integers(0, 20, (rows, length), np.int32),
        "segment_ids": segments,
        "image": rng.integers(0, 256, (rows, SIDE, SIDE, 3), np.uint8),
        "task": np.full(rows, task, np.int32),
    }
    if instruction:
        found |= {"instruction": rng.integers(0, 20, said.shape, np.int32), "instruction_segment_ids": said}
    return jax.tree.map(jnp.asarray, found)
