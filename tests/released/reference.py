"""The released networks once more, in NumPy and float64, straight from released names and config fields.

It shares no code with the package. Tensors are drawn when a network first asks for one, so that a forward pass also
says which tensors a checkpoint of this config has, and of which shapes.
"""

import json
import math

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np
from safetensors.numpy import save_file


class Draw(dict):
    """Tensors by name, random at the first request, float32."""

    def __init__(self, seed: int):
        super().__init__()
        self._random = np.random.default_rng(seed)

    def __call__(self, name: str, *shape: int) -> np.ndarray:
        if name not in self:
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            size = 0.3 if len(shape) == 1 else 1.2 / math.sqrt(shape[1])
            self[name] = (center + size * self._random.standard_normal(shape)).astype(np.float32)
        assert self[name].shape == shape
        return self[name].astype(np.float64)

    def linear(self, name: str, x: np.ndarray, out: int, bias: bool = True) -> np.ndarray:
        y = x @ self(f"{name}.weight", out, x.shape[-1]).T
        return y + self(f"{name}.bias", out) if bias else y

    def norm(self, name: str, x: np.ndarray, eps: float, affine: bool = True) -> np.ndarray:
        y = plain_norm(x, eps)
        return y * self(f"{name}.weight", x.shape[-1]) + self(f"{name}.bias", x.shape[-1]) if affine else y


def plain_norm(x, eps):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + eps)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rotate(x, positions, dim, theta, interleaved):
    """The first ``dim`` channels of x [B, N, H, C], as complex numbers."""
    turn = np.exp(1j * positions[:, None] * theta ** (-np.arange(0, dim, 2) / dim))[None, :, None]
    first = x[..., 0:dim:2] if interleaved else x[..., : dim // 2]
    second = x[..., 1:dim:2] if interleaved else x[..., dim // 2 : dim]
    turned, out = (first + 1j * second) * turn, x.copy()
    if interleaved:
        out[..., 0:dim:2], out[..., 1:dim:2] = turned.real, turned.imag
    else:
        out[..., : dim // 2], out[..., dim // 2 : dim] = turned.real, turned.imag
    return out


def attend(q, k, v, mask):
    logits = np.einsum("bnhc,bmhc->bhnm", q, k) / math.sqrt(q.shape[-1])
    logits = np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhnm,bmhc->bnhc", weights, v).reshape(*q.shape[:2], -1)


def visible(length, config):
    index = np.arange(length) // (config["block_size"] if config.get("block_causal", True) else 1)
    return index[:, None] >= index[None]


def vae_block(draw, name, x, config):
    eps, dim, heads = config["layer_norm_eps"], config["dim"], config["num_heads"]
    affine = config["layer_norm_affine"]
    h = x if config["post_norm"] else draw.norm(f"{name}.norm_attn", x, eps, affine)
    qkv = draw.linear(f"{name}.qkv_proj", h, 3 * dim, config["qk_bias"])
    if config["clip_qkv"] is not None:
        qkv = np.clip(qkv, -config["clip_qkv"], config["clip_qkv"])
    q, k, v = np.split(qkv, 3, -1)
    if config["qk_norm"]:
        q = draw.norm(f"{name}.q_norm", q, eps, config["qk_norm_affine"])
        k = draw.norm(f"{name}.k_norm", k, eps, config["qk_norm_affine"])
    q, k, v = (a.reshape(*x.shape[:2], heads, dim // heads) for a in (q, k, v))
    positions, theta = np.arange(x.shape[1]), config["rope_theta"]
    q, k = (rotate(a, positions, dim // heads, theta, interleaved=False) for a in (q, k))
    y = draw.linear(f"{name}.attn_out_proj", attend(q, k, v, visible(x.shape[1], config)), dim, config["bias"])
    x = (draw.norm(f"{name}.norm_attn", x, eps, affine) if config["post_norm"] else x) + y
    h = x if config["post_norm"] else draw.norm(f"{name}.norm_ffn", x, eps)
    h = draw.linear(f"{name}.ffn_proj", h, config["ffn_dim"], config["bias"])
    if config["act"] == "swiglu":
        value, gate = np.split(h, 2, -1)
        h = value * silu(gate)
    else:
        h = {"silu": silu, "gelu": gelu}[config["act"]](h)
    h = draw.linear(f"{name}.ffn_out", h, dim, config["bias"])
    return x + (draw.norm(f"{name}.norm_ffn", h, eps) if config["post_norm"] else h)


def encode(draw, config, ids):
    """Posterior mean and log-variance (None without variance head)."""
    dim, patch, eps = config["dim"], config["patch_size"], config["layer_norm_eps"]
    x = draw("encoder.wte.weight", config["vocab_size"] + 1, dim)[ids]
    x = x.reshape(ids.shape[0], -1, patch, dim)
    x = np.einsum("bnpi,oip->bno", x, draw("encoder.patch_embedder.weight", dim, dim, patch))
    x = x + draw("encoder.patch_embedder.bias", dim)
    for layer in range(config["encoder_num_blocks"]):
        x = vae_block(draw, f"encoder.blocks.{layer}", x, config)
    channels, variational = config["latent_dim"], config["use_variation"]
    x = draw.linear("encoder.final_layer", x, (1 + variational) * channels, config["bias"])
    if not variational:
        return plain_norm(x, eps), None
    mean, logvar = x[..., :channels], np.clip(x[..., channels:], -30, 20)
    return plain_norm(mean, eps) if config["encoder_last_ln"] else mean, logvar


def decode(draw, config, latents):
    """Logits."""
    dim, patch = config["dim"], config["patch_size"]
    x = draw.linear("decoder.in_layer", latents, dim, config["bias"])
    for layer in range(config["decoder_num_blocks"]):
        x = vae_block(draw, f"decoder.blocks.{layer}", x, config)
    x = draw.linear("decoder.unpatch_layer", x, dim * patch).reshape(*x.shape[:2], dim, patch)
    x = x.transpose(0, 1, 3, 2).reshape(x.shape[0], -1, dim)
    x = draw.norm("decoder.final_norm", x, config["layer_norm_eps"])
    return draw.linear("decoder.final_layer", x, config["vocab_size"], config["bias"])


def velocity(draw, config, latents, times, positions, mask):
    """Of latents [B, N, D] at flow times [B, N], for any positions and mask."""
    dim, heads, head_dim, eps = config["txt_dim"], config["heads"], config["head_dim"], config["norm_eps"]
    # Angles of up to 1000 radians: their rounding to float32 is part of the numbers.
    exponents = np.float32(-math.log(10_000)) * np.arange(128, dtype=np.float32) / np.float32(128)
    angles = ((1000 * times).astype(np.float32)[..., None] * np.exp(exponents)).astype(np.float64)
    time = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    for name in ("proj_in", "proj_hid"):
        time = silu(draw.linear(f"emb_in.{name}", time, dim))
    time = silu(draw.linear("emb_in.proj_out", time, config["emb_dim"]))

    def modulate(name, x):
        shift, scale = np.split(draw.linear(name, time, 2 * dim), 2, -1)
        return x * (1 + scale) + shift

    x = draw.linear("txt_in.proj", latents, dim)
    for layer in range(config["num_layers"]):
        name = f"blocks.{layer}"
        h = modulate(f"{name}.ada.msa_in.1", plain_norm(x, eps))
        qkv = draw.linear(f"{name}.msa.proj_qkv", h, 3 * heads * head_dim, config["qk_bias"])
        q, k, v = (a.reshape(*x.shape[:2], heads, head_dim) for a in np.split(qkv, 3, -1))
        q, k = draw.norm(f"{name}.msa.norm_q", q, eps), draw.norm(f"{name}.msa.norm_k", k, eps)
        q, k = (rotate(a, positions, config["rope_dim"], 10_000.0, interleaved=True) for a in (q, k))
        y = draw.linear(f"{name}.msa.proj_out", attend(q, k, v, mask), dim, config["qk_bias"])
        x = x + draw.linear(f"{name}.ada.msa_out.1", time, dim) * y
        h = modulate(f"{name}.ada.mlp_in.1", plain_norm(x, eps))
        h = gelu_tanh(draw.linear(f"{name}.mlp.proj_in", h, config["expand_ratio"] * dim))
        x = x + draw.linear(f"{name}.ada.mlp_out.1", time, dim) * draw.linear(f"{name}.mlp.proj_out", h, dim)
    x = modulate("txt_out_ada.out_in.1", draw.norm("txt_out_norm", x, eps))
    return draw.linear("txt_out.proj", x, config["txt_in_channels"])


def frequencies(config):
    dim = config["rope_dim"]
    buffer = (1 / 10_000.0 ** (np.arange(0, dim, 2) / dim)).astype(np.float32)
    return {f"blocks.{layer}.msa.rope.rope.freqs": buffer for layer in range(config["num_layers"])}


def write_part(folder, config, tensors, dtype="float32"):
    """A part in the released layout, written by the safetensors library."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: np.ascontiguousarray(tensor.astype(dtype)) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
