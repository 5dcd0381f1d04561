"""Reads checkpoints in the released layout (SPEC 9).

A directory holds ``cola_vae/`` and ``cola_dit/``, each with config.json and model.safetensors.
"""

import json
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from cola_jax.config import DiTConfig, VAEConfig
from cola_jax.models import cola
from cola_jax.types import Params, UserError

# Released tensor name -> path in our tree. "{i}" is the layer, which our trees stack on a leading axis.
_VAE_LAYER = {
    "norm_attn.weight": "norm_attn.scale",
    "norm_attn.bias": "norm_attn.bias",
    "qkv_proj.weight": "qkv_proj.kernel",
    "qkv_proj.bias": "qkv_proj.bias",
    "q_norm.weight": "q_norm.scale",
    "q_norm.bias": "q_norm.bias",
    "k_norm.weight": "k_norm.scale",
    "k_norm.bias": "k_norm.bias",
    "attn_out_proj.weight": "attn_out_proj.kernel",
    "attn_out_proj.bias": "attn_out_proj.bias",
    "norm_ffn.weight": "norm_ffn.scale",
    "norm_ffn.bias": "norm_ffn.bias",
    "ffn_proj.weight": "ffn_proj.kernel",
    "ffn_proj.bias": "ffn_proj.bias",
    "ffn_out.weight": "ffn_out.kernel",
    "ffn_out.bias": "ffn_out.bias",
}
_VAE = {"encoder.wte.weight": "encoder.wte", "decoder.final_norm.weight": "decoder.final_norm.scale"}
_VAE |= {"decoder.final_norm.bias": "decoder.final_norm.bias"}
for _linear in ("encoder.patch_embedder", "encoder.final_layer", "decoder.in_layer", "decoder.unpatch_layer"):
    _VAE |= {f"{_linear}.weight": f"{_linear}.kernel", f"{_linear}.bias": f"{_linear}.bias"}
_VAE |= {
    "decoder.final_layer.weight": "decoder.final_layer.kernel",
    "decoder.final_layer.bias": "decoder.final_layer.bias",
}
for _part in ("encoder", "decoder"):
    _VAE |= {f"{_part}.blocks.{{i}}.{k}": f"{_part}.layers.{v}" for k, v in _VAE_LAYER.items()}

_DIT_LAYER = {
    "msa.proj_qkv.weight": "qkv.kernel",
    "msa.proj_qkv.bias": "qkv.bias",
    "msa.proj_out.weight": "out.kernel",
    "msa.proj_out.bias": "out.bias",
    "msa.norm_q.weight": "norm_q.scale",
    "msa.norm_q.bias": "norm_q.bias",
    "msa.norm_k.weight": "norm_k.scale",
    "msa.norm_k.bias": "norm_k.bias",
    "mlp.proj_in.weight": "mlp_in.kernel",
    "mlp.proj_in.bias": "mlp_in.bias",
    "mlp.proj_out.weight": "mlp_out.kernel",
    "mlp.proj_out.bias": "mlp_out.bias",
}
for _theirs, _ours in (
    ("msa_in", "attention_modulation"),
    ("msa_out", "attention_gate"),
    ("mlp_in", "mlp_modulation"),
    ("mlp_out", "mlp_gate"),
):
    _DIT_LAYER |= {f"ada.{_theirs}.1.weight": f"{_ours}.linear.kernel", f"ada.{_theirs}.1.bias": f"{_ours}.linear.bias"}
_DIT = {f"blocks.{{i}}.{k}": f"layers.{v}" for k, v in _DIT_LAYER.items()}
for _theirs, _ours in (
    ("txt_in.proj", "in_layer"),
    ("emb_in.proj_in", "time_in"),
    ("emb_in.proj_hid", "time_hidden"),
    ("emb_in.proj_out", "time_out"),
    ("txt_out_ada.out_in.1", "out_modulation.linear"),
    ("txt_out.proj", "out_layer"),
):
    _DIT |= {f"{_theirs}.weight": f"{_ours}.kernel", f"{_theirs}.bias": f"{_ours}.bias"}
_DIT |= {"txt_out_norm.weight": "out_norm.scale", "txt_out_norm.bias": "out_norm.bias"}
_DERIVED = re.compile(r"blocks\.\d+\.msa\.rope\.rope\.freqs")


# Options of which only one value is supported.
_VAE_FIXED = {"act": "swiglu", "shared_heads_kv": 1, "layer_norm_type": "layer_norm", "use_emb": True}
_DIT_FIXED = {"patch_size": 1}


def _refuse_others(part: str, released: dict, supported: dict) -> None:
    for name, value in supported.items():
        if released.get(name, value) != value:
            raise UserError(f"{part}/config.json: {name} = {released[name]!r}: supported is {value!r}")


def vae_config(released: dict) -> VAEConfig:
    """Our config of a released cola_vae/config.json; raises UserError for an option that is not supported."""
    _refuse_others("cola_vae", released, _VAE_FIXED)
    if not (released["causal"] or released["block_causal"]):
        raise UserError("cola_vae/config.json: causal = block_causal = False: supported is one of them")
    return VAEConfig(
        vocab_size=released["vocab_size"],
        dim=released["dim"],
        ffn_dim=released["ffn_dim"],
        num_heads=released["num_heads"],
        encoder_layers=released["encoder_num_blocks"],
        decoder_layers=released["decoder_num_blocks"],
        latent_dim=released["latent_dim"],
        patch_size=released["patch_size"],
        block_size=released["block_size"],
        attention="block_causal" if released["block_causal"] else "causal",
        post_norm=released["post_norm"],
        qk_norm=released["qk_norm"],
        qk_norm_affine=released["qk_norm_affine"],
        qkv_bias=released["qk_bias"],
        bias=released["bias"],
        clip_qkv=released["clip_qkv"],
        norm_affine=released["layer_norm_affine"],
        norm_eps=released["layer_norm_eps"],
        rope_theta=float(released["rope_theta"]),
        normalize_mean=released["encoder_last_ln"],
        variational=released["use_variation"],
        shift=released["shifting_factor"],
        scale=released["scaling_factor"],
    )


def dit_config(released: dict) -> DiTConfig:
    """Our config of a released cola_dit/config.json; raises UserError for an option that is not supported."""
    _refuse_others("cola_dit", released, _DIT_FIXED | {"txt_out_channels": released["txt_in_channels"]})
    return DiTConfig(
        latent_dim=released["txt_in_channels"],
        block_size=released["block_size"],
        dim=released["txt_dim"],
        num_heads=released["heads"],
        head_dim=released["head_dim"],
        num_layers=released["num_layers"],
        mlp_ratio=released["expand_ratio"],
        time_dim=released["emb_dim"],
        rope_dim=released["rope_dim"],
        qkv_bias=released["qk_bias"],
        norm_eps=released["norm_eps"],
    )


def _ours_from_theirs(path: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """One released tensor (out, in) as our (in, *out) kernel of the given shape; other tensors as they are."""
    if not path.endswith("kernel"):
        return tensor.reshape(shape)
    if path.endswith("patch_embedder.kernel"):  # a convolution (out, in, patch); ours flattens (patch, in)
        return tensor.transpose(2, 1, 0).reshape(shape)
    return tensor.T.reshape(shape)


def _flat(tree, prefix=""):
    for name, value in tree.items():
        path = f"{prefix}.{name}" if prefix else name
        if hasattr(value, "items"):
            yield from _flat(value, path)
        else:
            yield path, value


def _read_part(folder: pathlib.Path, names: dict[str, str], abstract: dict) -> dict:
    """The parameter tree of one part, every tensor accounted for."""
    file = folder / "model.safetensors"
    released_name = {path: theirs for theirs, path in names.items()}
    try:
        with safe_open(file, framework="numpy") as tensors:
            present = set(tensors.keys())
            tree: dict = {}
            for path, leaf in _flat(abstract):
                theirs = released_name[path]
                stacked = "{i}" in theirs
                used = [theirs.replace("{i}", str(i)) for i in range(leaf.shape[0])] if stacked else [theirs]
                if missing := [name for name in used if name not in present]:
                    raise UserError(f"{file}: tensor {missing[0]} is missing")
                shape = leaf.shape[1:] if stacked else leaf.shape
                parts = []
                for name in used:
                    tensor = tensors.get_tensor(name)
                    if tensor.size != np.prod(shape):
                        raise UserError(f"{file}: tensor {name} has shape {tensor.shape}, the config needs {shape}")
                    parts.append(_ours_from_theirs(path, tensor.astype(np.float32), shape))
                present -= set(used)
                node = tree
                *parents, last = path.split(".")
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = jnp.asarray(np.stack(parts) if stacked else parts[0])
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error})") from None
    if extra := sorted(name for name in present if not _DERIVED.fullmatch(name)):
        raise UserError(f"{file}: tensor {extra[0]} has no place in a model of this config")
    return tree


def load(path) -> tuple[cola.ColaDLM, Params]:
    """Model and parameters (float32) of a released directory.

    Raises:
      UserError: a part, tensor or option that is missing or does not fit.
    """
    root = pathlib.Path(path)
    read = {}
    for part in ("cola_vae", "cola_dit"):
        try:
            read[part] = json.loads((root / part / "config.json").read_text())
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{root / part / 'config.json'}: not a readable config ({error})") from None
    model = cola.create(vae_config(read["cola_vae"]), dit_config(read["cola_dit"]))
    tokens = jnp.zeros((1, model.dit_config.block_size * model.vae_config.patch_size), jnp.int32)
    abstract = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))["params"]
    vae = _read_part(root / "cola_vae", _VAE, abstract["vae"])
    dit = _read_part(root / "cola_dit", _DIT, abstract["dit"])
    return model, {"params": {"vae": vae, "dit": dit}}
