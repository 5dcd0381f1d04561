"""Tensors of released checkpoints: their names and shapes, and how each becomes one of our parameters (SPEC 9)."""

import dataclasses
import math

import numpy as np
from flax import traverse_util

from cola_jax.models.dit_config import DiTConfig
from cola_jax.released.options import DIT, VAE

# Released name -> path in our tree. "{i}" is the layer, which our trees stack on a leading axis.
_VAE_LAYER = {
    "norm_attn": "norm_attn",
    "qkv_proj": "qkv_proj",
    "q_norm": "q_norm",
    "k_norm": "k_norm",
    "attn_out_proj": "attn_out_proj",
    "norm_ffn": "norm_ffn",
    "ffn_proj": "ffn_proj",
    "ffn_out": "ffn_out",
}
_VAE_MODULES = {
    "encoder.patch_embedder": "encoder/patch_embedder",
    "encoder.final_layer": "encoder/final_layer",
    "decoder.in_layer": "decoder/in_layer",
    "decoder.unpatch_layer": "decoder/unpatch_layer",
    "decoder.final_norm": "decoder/final_norm",
    "decoder.final_layer": "decoder/final_layer",
    **{f"encoder.blocks.{{i}}.{theirs}": f"encoder/layers/{ours}" for theirs, ours in _VAE_LAYER.items()},
    **{f"decoder.blocks.{{i}}.{theirs}": f"decoder/layers/{ours}" for theirs, ours in _VAE_LAYER.items()},
}
_DIT_LAYER = {
    "msa.proj_qkv": "qkv",
    "msa.proj_out": "out",
    "msa.norm_q": "norm_q",
    "msa.norm_k": "norm_k",
    "mlp.proj_in": "mlp_in",
    "mlp.proj_out": "mlp_out",
    "ada.msa_in.1": "attention_modulation/linear",
    "ada.msa_out.1": "attention_gate/linear",
    "ada.mlp_in.1": "mlp_modulation/linear",
    "ada.mlp_out.1": "mlp_gate/linear",
}
_DIT_MODULES = {
    "txt_in.proj": "in_layer",
    "emb_in.proj_in": "time_in",
    "emb_in.proj_hid": "time_hidden",
    "emb_in.proj_out": "time_out",
    "txt_out_norm": "out_norm",
    "txt_out_ada.out_in.1": "out_modulation/linear",
    "txt_out.proj": "out_layer",
    **{f"blocks.{{i}}.{theirs}": f"layers/{ours}" for theirs, ours in _DIT_LAYER.items()},
}
_NAMES = {VAE: {"encoder/wte": "encoder.wte.weight"}, DIT: {}}
for _part, _modules in ((VAE, _VAE_MODULES), (DIT, _DIT_MODULES)):
    for _theirs, _ours in _modules.items():
        _NAMES[_part] |= {f"{_ours}/{leaf}": f"{_theirs}.weight" for leaf in ("kernel", "scale")}
        _NAMES[_part][f"{_ours}/bias"] = f"{_theirs}.bias"
_FREQUENCIES = "blocks.{i}.msa.rope.rope.freqs"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our parameters and the released tensors that it is made of.

    Attributes:
      path: in our tree, with slashes.
      shape: ours; with a leading axis of layers if there is more than one tensor or ``stacked``.
      names: released tensors, one a layer.
      released_shape: of each of them.
      stacked: whether the first axis counts layers.
    """

    path: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    released_shape: tuple[int, ...]
    stacked: bool

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """One released tensor as a layer of our parameter; a view where that can be had."""
        shape = self.shape[1:] if self.stacked else self.shape
        if not self.path.endswith("kernel"):
            return tensor.reshape(shape)
        if tensor.ndim == 3:  # a convolution (out, in, patch); ours flattens (patch, in)
            return tensor.transpose(2, 1, 0).reshape(shape)
        return tensor.T.reshape(shape)

    def to_released(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`, contiguous."""
        if not self.path.endswith("kernel"):
            tensor = value.reshape(self.released_shape)
        elif len(self.released_shape) == 3:
            tensor = value.reshape(self.released_shape[::-1]).transpose(2, 1, 0)
        else:
            tensor = value.reshape(value.shape[0], -1).T
        return np.ascontiguousarray(tensor)


def _released_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if path.endswith("patch_embedder/kernel"):
        size = shape[-1]
        return size, size, shape[0] // size
    if path.endswith("kernel"):
        return math.prod(shape[1:]), shape[0]
    return shape if path.endswith("wte") else (math.prod(shape),)


def leaves(part: str, abstract: dict) -> list[Leaf]:
    """What a part's parameters are made of.

    Args:
      part: "cola_vae" or "cola_dit".
      abstract: the part's parameter tree, of anything that has shapes.
    """
    found = []
    for path, leaf in traverse_util.flatten_dict(dict(abstract), sep="/").items():
        name, shape = _NAMES[part][path], tuple(leaf.shape)
        stacked = "{i}" in name
        names = tuple(name.replace("{i}", str(i)) for i in range(shape[0])) if stacked else (name,)
        found.append(Leaf(path, shape, names, _released_shape(path, shape[1:] if stacked else shape), stacked))
    return found


def frequency_names(part: str, config: DiTConfig | None) -> tuple[str, ...]:
    """The buffers of rotary frequencies, one a layer of the DiT; derivable, but the files hold them."""
    return tuple(_FREQUENCIES.replace("{i}", str(i)) for i in range(config.num_layers)) if part == DIT else ()


def frequencies(config: DiTConfig) -> np.ndarray:
    """``theta^(-2i / rope_dim)`` [rope_dim / 2], rounded to float32 in the steps of the released code."""
    exponents = np.arange(0, config.rope_dim, 2, dtype=np.float32) / np.float32(config.rope_dim)
    powers = np.power(config.rope_theta, exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1) / powers
