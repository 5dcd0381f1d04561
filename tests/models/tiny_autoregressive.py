"""An autoregressive model small enough to compile in a second, and the same network written in NumPy."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from models.tiny_models import VOCAB

from cola_jax.models import autoregressive
from cola_jax.models.transformer import TransformerConfig


def config(**changes) -> TransformerConfig:
    fields = {"vocab_size": VOCAB, "dim": 16, "ffn_dim": 12, "num_heads": 2, "head_dim": 6, "num_layers": 2}
    return TransformerConfig(**(fields | {"logit_chunk": 4, "logit_rows": 0} | changes))


def boxed(model):
    """Shapes of the variables, with the names of their axes."""
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))


@functools.cache
def _create(make, config: TransformerConfig, dtype: str, seed: int):
    model, draw = make(config, dtype), np.random.default_rng(seed)

    def leaf(path, x):
        names = [entry.key for entry in path]
        values = draw.standard_normal(x.shape).astype(np.float32)
        if names[-1] == "kernel":
            return jnp.asarray(1.5 * values / math.sqrt(x.shape[1 if "layers" in names else 0]))
        return jnp.asarray(values if names[-1] in ("wte", "begin", "mask") else 0.2 * values + (names[-1] == "scale"))

    return model, jax.tree_util.tree_map_with_path(leaf, nn.unbox(boxed(model)))


def create(dtype: str = "float32", seed: int = 1, make=autoregressive.create, **changes):
    """(model, params) with no parameter at zero: the same objects for the same arguments."""
    return _create(make, config(**changes), dtype, seed)


def _normalised(x, params, config):
    if config.norm == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps)
    return x * params["scale"] + params.get("bias", 0.0)


def _rotated(x, theta):
    """[T, H, C]: the first half of the channels is rotated with the second."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def reference(config: TransformerConfig, params, document) -> np.ndarray:
    """Logits [T, V] of the tokens of one document, float64, with loops instead of masks."""
    return network(config, params, [-1, *document[:-1]], causal=True)


def network(config: TransformerConfig, params, read, causal: bool) -> np.ndarray:
    """Logits [T, V] where each position reads one of ``read``; -1 is the extra vector."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"]["transformer"])
    (extra,) = (params[name] for name in ("begin", "mask") if name in params)
    x = np.stack([extra if token < 0 else params["wte"][token] for token in read])
    for index in range(config.num_layers):
        layer = jax.tree.map(lambda x, index=index: x[index], params["layers"])
        h = _normalised(x, layer["norm_attention"], config)
        q, k, v = np.einsum("td,dphc->pthc", h, layer["qkv"]["kernel"])
        if config.qk_norm:
            q, k = _normalised(q, layer["norm_q"], config), _normalised(k, layer["norm_k"], config)
        q, k, mixed = _rotated(q, config.rope_theta), _rotated(k, config.rope_theta), np.zeros_like(v)
        for t in range(len(x)):
            for head in range(config.num_heads):
                end = t + 1 if causal else len(x)
                weights = np.exp(k[:end, head] @ q[t, head] / np.sqrt(config.head_dim))
                mixed[t, head] = weights @ v[:end, head] / weights.sum()
        x = x + mixed.reshape(len(x), -1) @ layer["out"]["kernel"]
        value, gate = np.einsum("td,dpf->ptf", _normalised(x, layer["norm_mlp"], config), layer["mlp_in"]["kernel"])
        x = x + (value * gate / (1 + np.exp(-gate))) @ layer["mlp_out"]["kernel"]
    return _normalised(x, params["final_norm"], config) @ params["head"]["kernel"]


def log_probs(config: TransformerConfig, params, document) -> np.ndarray:
    """``log p(x_t | x_<t)`` [T] of one document by `reference`."""
    logits = reference(config, params, document)
    return np.array([row[token] - np.log(np.exp(row).sum()) for row, token in zip(logits, document, strict=True)])
