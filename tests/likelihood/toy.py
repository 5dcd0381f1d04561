"""A latent-variable model whose p(x) is a two-dimensional integral: two tokens, two blocks of one latent."""

import itertools
import math

import jax.numpy as jnp
import numpy as np

from cola_jax.models.cola import ColaDLM
from cola_jax.models.dit_config import DiTConfig
from cola_jax.models.text_vae import VAEConfig
from cola_jax.types import Posterior

VOCAB, SLOPE, SPREAD = 3, 0.6, 0.7
SHIFT, SCALE = 0.3, 2.0
LOGITS = np.array([[1.0, 0.2], [-0.8, 0.1], [0.3, -0.5]])  # slope and offset of each token
PARAMS = {"params": {"dit": {}}}


class Toy(ColaDLM):
    """z_1 ~ N(0, SPREAD^2), z_2 | z_1 ~ N(SLOPE z_1, SPREAD^2), tokens softmax(a z + b), all normalised latents.

    `informative` False: tokens that do not depend on z, blocks independent, and q equal to the prior.
    """

    informative: bool = True

    def setup(self):
        pass

    def encode(self, tokens, segment_ids=None):
        if not self.informative:  # the prior, before normalisation
            mean = jnp.full((*tokens.shape, 1), SHIFT)
            return Posterior(mean, jnp.full_like(mean, 2 * math.log(SPREAD / SCALE)))
        centre = jnp.array([0.9, -0.9, 0.1])[tokens][..., None]
        return Posterior(centre / SCALE / 2 + SHIFT, jnp.full_like(centre, 2 * math.log(0.6 / SCALE)))

    def decode(self, latents, segment_ids=None):
        slope, offset = LOGITS[:, 0] * self.informative, LOGITS[:, 1]
        return latents * jnp.asarray(slope, latents.dtype)[None, None] + jnp.asarray(offset, latents.dtype)[None, None]

    def history(self, latents, segment_ids):
        return (latents[None, :, None], latents[None, :, None])

    def extend(self, z, time, positions, cache, cache_mask, own_mask=None, pinned=None, modulations=None):
        before = jnp.sum(jnp.where(cache_mask[..., None], cache[0][0, :, 0], 0.0), axis=1, keepdims=True)
        mean, t = SLOPE * self.informative * before, jnp.reshape(time, (-1, 1, 1))
        spread = (1 - t) ** 2 * SPREAD**2 + t**2
        return (t - (1 - t) * SPREAD**2) / spread * (z - (1 - t) * mean) - mean, None


def create(informative: bool = True) -> Toy:
    vae = VAEConfig(vocab_size=VOCAB, latent_dim=1, shift=SHIFT, scale=SCALE)
    return Toy(vae, DiTConfig(latent_dim=1, block_size=1), informative=informative)


def texts() -> np.ndarray:
    """All of them, [9, 2]."""
    return np.array(list(itertools.product(range(VOCAB), repeat=2)), np.int32)


def log_prob(informative: bool = True) -> np.ndarray:
    """log p(x) of all texts, by quadrature."""
    grid, step = np.linspace(-9, 9, 1501, retstep=True)
    logits = informative * LOGITS[:, :1] * grid + LOGITS[:, 1:]
    tokens = np.exp(logits - np.logaddexp.reduce(logits, axis=0))  # [V, grid]

    def normal(x, mean):
        return np.exp(-0.5 * ((x - mean) / SPREAD) ** 2) / (SPREAD * math.sqrt(2 * math.pi))

    joint = normal(grid, 0)[:, None] * normal(grid[None], informative * SLOPE * grid[:, None])
    return np.log([tokens[a] @ joint @ tokens[b] * step**2 for a, b in texts()])
