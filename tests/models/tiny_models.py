"""Models small enough to compile in a second, with every parameter away from zero; draws; comparison."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cola_jax.models import cola
from cola_jax.models.dit_config import DiTConfig
from cola_jax.models.text_vae import VAEConfig

VOCAB, CHANNELS, BLOCK = 31, 4, 4


def vae_config(**changes) -> VAEConfig:
    """Blocks of the VAE are smaller than those of the DiT, so that the two cannot be confused."""
    fields = {"vocab_size": VOCAB, "dim": 16, "ffn_dim": 24, "num_heads": 2, "latent_dim": CHANNELS, "block_size": 2}
    return VAEConfig(**(fields | {"encoder_layers": 2, "decoder_layers": 2, "logit_rows": 0} | changes))


def dit_config(**changes) -> DiTConfig:
    fields = {"latent_dim": CHANNELS, "block_size": BLOCK, "dim": 16, "num_heads": 2, "head_dim": 8, "num_layers": 2}
    return DiTConfig(**(fields | {"mlp_ratio": 2, "time_dim": 12, "rope_dim": 4} | changes))


def abstract(model):
    """Shapes of the parameters, without boxes."""
    tokens = jnp.zeros((1, model.dit_config.block_size * model.vae_config.patch_size), jnp.int32)
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))


def parameters(model, seed: int = 1):
    """Random parameters, none of them zero: gates and output head too, so that every path carries a gradient."""
    draw = np.random.default_rng(seed)

    def leaf(path, x):
        names = [entry.key for entry in path]
        values = draw.standard_normal(x.shape).astype(np.float32)
        if names[-1] == "kernel":
            return jnp.asarray(values / math.sqrt(x.shape[1 if "layers" in names else 0]))
        return jnp.asarray(0.2 * values + (names[-1] == "scale"))

    return jax.tree_util.tree_map_with_path(leaf, abstract(model))


@functools.cache
def _create(vae: VAEConfig, dit: DiTConfig, dtype: str):
    model = cola.create(vae, dit, dtype)
    return model, parameters(model)


def create(vae: dict | None = None, dit: dict | None = None, dtype: str = "float32"):
    """(model, params): the same objects for the same arguments."""
    return _create(vae_config(**(vae or {})), dit_config(**(dit or {})), dtype)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("method", "plan", "decoder_plan"))
def apply(model, params, *args, method: str, **kwargs):
    return model.apply(params, *args, method=method, **kwargs)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def uniform(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).uniform(0.1, 0.9, shape).astype(np.float32))


def tokens(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32))


def assert_close(actual, expected, relative: float):
    """Largest difference, relative to the largest expected value (which is not zero)."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    size = np.max(np.abs(expected))
    assert actual.shape == expected.shape and size > 0
    error = np.max(np.abs(actual - expected)) / size
    assert error < relative, f"relative error {error:.2e}, must be below {relative:.0e}"


def assert_trees_close(actual, expected, relative: float):
    jax.tree.map(lambda a, b: assert_close(a, b, relative), actual, expected)
