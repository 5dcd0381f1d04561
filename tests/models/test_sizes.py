"""Parameter counts at the paper's full size; nothing is allocated."""

import math

import jax
import pytest
from models.tiny_models import abstract

from cola_jax.config import DiTConfig, VAEConfig
from cola_jax.models import cola

VAE = VAEConfig(
    vocab_size=100_278,
    dim=1536,
    ffn_dim=6144,
    num_heads=12,
    encoder_layers=4,
    decoder_layers=4,
    latent_dim=16,
    patch_size=1,
    block_size=16,
)
DIT = DiTConfig(
    latent_dim=16,
    block_size=16,
    dim=2048,
    num_heads=16,
    head_dim=128,
    num_layers=24,
    mlp_ratio=4,
    time_dim=2048,
    rope_dim=96,
)


@pytest.mark.parametrize(("part", "count"), [("vae", 501_871_574), ("dit", 1_829_875_728)])
def test_released_size(part, count):
    """The released files' tensors, less the DiT's 24 rope buffers of 48 numbers, which are derived."""
    params = abstract(cola.create(VAE, DIT))["params"][part]
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == count
