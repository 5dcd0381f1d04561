"""A model small enough to compile at once, with the groups, boxes and terms of the real one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cola_jax import rng
from cola_jax.families import cola, parse
from cola_jax.types import Term

VOCAB, WIDTH, LENGTH = 32, 16, 8


def kernel(module, name, shape, names):
    init = nn.with_logical_partitioning(nn.initializers.normal(0.3), names)
    return module.param(name, init, shape)


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return jnp.tanh(kernel(self, "wte", (VOCAB, WIDTH), ("vocab", "embed"))[tokens])


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, z):
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros_init(), ("vocab",)), (VOCAB,))
        return z @ kernel(self, "kernel", (WIDTH, VOCAB), ("embed", "vocab")) + bias[None, None]


class VAE(nn.Module):
    def setup(self):
        self.encoder, self.decoder = Encoder(), Decoder()


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = jnp.tanh(x @ kernel(self, "kernel", (WIDTH, 2 * WIDTH), ("embed", "mlp")))
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros_init(), ("embed",)), (WIDTH,))
        return x + h @ kernel(self, "out", (2 * WIDTH, WIDTH), ("mlp", "embed")) + bias[None, None], None


class DiT(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(name="layers")(x, None)[0]


class Toy(nn.Module):
    def setup(self):
        self.vae, self.dit = VAE(), DiT()

    def encode(self, tokens):
        return self.vae.encoder(tokens)

    def decode(self, z):
        return self.vae.decoder(z)

    def velocity(self, z):
        return self.dit(z)

    def __call__(self, tokens):
        z = self.encode(tokens)
        return self.decode(z), self.velocity(z)


MODEL = Toy()


def init(key):
    return MODEL.init(key, jnp.zeros((1, LENGTH), jnp.int32))


def stage1_terms(params, batch, keys, frozen=None):
    z = MODEL.apply(params, batch["tokens"], method="encode")
    noisy = z + 0.1 * rng.normal(keys, z.shape[1:])
    logits = jax.nn.log_softmax(MODEL.apply(params, noisy, method="decode"))
    real = (batch["segment_ids"] > 0).astype(jnp.float32)
    loss = -jnp.take_along_axis(logits, batch["tokens"][..., None], axis=-1)[..., 0]
    return {
        "reconstruction": Term(jnp.sum(loss * real, axis=1), jnp.sum(real, axis=1), 1.0),
        "power": Term(jnp.sum(jnp.mean(z**2, -1) * real, axis=1), jnp.sum(real, axis=1), 0.0),
    }


def stage2_terms(params, batch, keys, frozen=None):
    z = MODEL.apply(params, batch["tokens"], method="encode")
    noise = rng.normal(keys, z.shape[1:])
    real = (batch["segment_ids"] > 0).astype(jnp.float32)
    error = jnp.mean((MODEL.apply(params, z + noise, method="velocity") - noise) ** 2, axis=-1)
    terms = stage1_terms(params, batch, keys) | {
        "flow": Term(jnp.sum(error * real, axis=1), jnp.sum(real, axis=1), 1.0)
    }
    if frozen:
        anchor = MODEL.apply(frozen["reference"], batch["tokens"], method="encode")
        distance = jnp.mean((z - anchor) ** 2, axis=-1)
        terms["reference_kl"] = Term(jnp.sum(distance * real, axis=1), jnp.sum(real, axis=1), 0.1)
    return terms


def batch(step: int, size: int = 8, seed: int = 0) -> dict:
    """Tokens with padding of very different amounts, so that weights differ between microbatches."""
    draw = np.random.default_rng([seed, step])
    tokens = draw.integers(0, VOCAB, (size, LENGTH)).astype(np.int32)
    lengths = draw.integers(1, LENGTH + 1, size)
    segments = (np.arange(LENGTH)[None] < lengths[:, None]).astype(np.int32)
    return {"tokens": tokens, "segment_ids": segments}


def stages(config, first=stage1_terms, second=stage2_terms):
    """The toy's stages, those of the family "cola" with other terms."""
    return cola.stages_with_terms(config, first, second)


def config(**changes) -> cola.ColaConfig:
    """A valid configuration for the toy; ``changes`` are groups of fields."""
    values = {
        "data": {"sequence_length": LENGTH, "batch_size": 8, "align": 1},
        "dit": {"block_size": 8},
        "stage1": {"steps": 12},
        "stage2": {"steps": 12, "strategy": "joint", "reference_weight": 0.01},
        "optimizer1": {"warmup_steps": 2, "learning_rate": 0.02},
        "optimizer2": {"warmup_steps": 2, "learning_rate": 0.02},
        "train": {"log_every": 2, "eval_every": 5, "eval_batches": 2, "checkpoint_every": 4, "mesh_data": 1},
    }
    for name, fields in changes.items():
        values[name] = values.get(name, {}) | fields if isinstance(fields, dict) else fields
    return parse(values)
