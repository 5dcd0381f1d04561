"""Config files of released checkpoints, field by field: to our configs and back (SPEC 9).

Every field has a fate: it is honoured, or only one value of it is supported, or it cannot change a number and is
kept as it is. A field that is in none of these lists is refused, since nobody knows what it would change.
"""

import math
from typing import Any, NamedTuple

from cola_jax.models.dit_config import DiTConfig
from cola_jax.models.text_vae import VAEConfig
from cola_jax.types import UserError

VAE, DIT = "cola_vae", "cola_dit"
PARTS = (VAE, DIT)


class _Field(NamedTuple):
    """A released option: our name for it, and the kind of its values."""

    name: str
    kind: str


_SIZE, _FLAG, _NUMBER, _POSITIVE, _LIMIT, _ACTIVATION = "size", "flag", "number", "positive", "limit", "activation"

_HONOURED = {
    VAE: {
        "vocab_size": _Field("vocab_size", _SIZE),
        "dim": _Field("dim", _SIZE),
        "ffn_dim": _Field("ffn_dim", _SIZE),
        "num_heads": _Field("num_heads", _SIZE),
        "encoder_num_blocks": _Field("encoder_layers", _SIZE),
        "decoder_num_blocks": _Field("decoder_layers", _SIZE),
        "latent_dim": _Field("latent_dim", _SIZE),
        "patch_size": _Field("patch_size", _SIZE),
        "block_size": _Field("block_size", _SIZE),
        "post_norm": _Field("post_norm", _FLAG),
        "qk_norm": _Field("qk_norm", _FLAG),
        "qk_norm_affine": _Field("qk_norm_affine", _FLAG),
        "qk_bias": _Field("qkv_bias", _FLAG),
        "bias": _Field("bias", _FLAG),
        "act": _Field("activation", _ACTIVATION),
        "clip_qkv": _Field("clip_qkv", _LIMIT),
        "layer_norm_affine": _Field("norm_affine", _FLAG),
        "layer_norm_eps": _Field("norm_eps", _POSITIVE),
        "rope_theta": _Field("rope_theta", _POSITIVE),
        "rope_full_precision": _Field("rope_full_precision", _FLAG),
        "encoder_last_ln": _Field("normalize_mean", _FLAG),
        "use_variation": _Field("variational", _FLAG),
        "scaling_factor": _Field("scale", _NUMBER),
        "shifting_factor": _Field("shift", _NUMBER),
    },
    DIT: {
        "txt_in_channels": _Field("latent_dim", _SIZE),
        "txt_dim": _Field("dim", _SIZE),
        "emb_dim": _Field("time_dim", _SIZE),
        "heads": _Field("num_heads", _SIZE),
        "head_dim": _Field("head_dim", _SIZE),
        "expand_ratio": _Field("mlp_ratio", _SIZE),
        "num_layers": _Field("num_layers", _SIZE),
        "norm_eps": _Field("norm_eps", _POSITIVE),
        "qk_bias": _Field("qkv_bias", _FLAG),
        "rope_dim": _Field("rope_dim", _SIZE),
        "block_size": _Field("block_size", _SIZE),
    },
}
_ALLOWED = {
    _SIZE: "a whole number of at least 1",
    _FLAG: "true or false",
    _NUMBER: "a number",
    _POSITIVE: "a positive number",
    _LIMIT: "null or a positive number",
    _ACTIVATION: "one of 'swiglu', 'silu', 'gelu'",
}
# One value is supported; where the field is absent, that one is meant.
_FIXED = {
    VAE: {
        "model_type": "cola_text_vae",
        "shared_heads_kv": 1,
        "layer_norm_type": "layer_norm",
        "use_emb": True,
        "is_encoder_decoder": False,
    },
    DIT: {"model_type": "cola_dit", "patch_size": 1, "is_encoder_decoder": False},
}
# No number of inference depends on these: kept where we have them, written with these values where we have not.
_METADATA = {
    VAE: {
        "architectures": ["ColaTextVAEModel"],
        "transformers_version": "5.23.0",
        "dropout": 0.0,
        "attn_dropout": 0.0,
        "init_fn": "normal",
        "init_std": 0.02,
        "init_cutoff_factor": 3,
    },
    DIT: {"architectures": ["ColaDiTModel"], "transformers_version": "5.23.0"},
}
_IGNORED = frozenset(
    "dtype torch_dtype _name_or_path auto_map output_hidden_states output_attentions return_dict problem_type id2label "
    "label2id chunk_size_feed_forward _attn_implementation _attn_implementation_autoset use_cache torchscript".split()
)
_MASKS = ("causal", "block_causal")  # together they are our `attention`
_ROPE_THETA = 10_000.0  # of the DiT; released configs have no field for it
# Options of ours that released configs have no field for, with the value that a released model has.
_OURS = {
    VAE: {"logsnr": None},
    DIT: {
        "block_position": False,
        "no_history_vector": False,
        "rope_theta": _ROPE_THETA,
        "prediction": "velocity",
        "self_conditioning": False,
        "time_frequency": 1000.0,
    },
}


def _fits(kind: str, value) -> bool:
    if kind == _FLAG:
        return isinstance(value, bool)
    if kind == _ACTIVATION:
        return value in ("swiglu", "silu", "gelu")
    if kind == _LIMIT and value is None:
        return True
    if isinstance(value, bool) or not isinstance(value, int if kind == _SIZE else int | float):
        return False
    return math.isfinite(value) and (kind == _NUMBER or value >= 1 or kind != _SIZE and value > 0)


def _honoured(part: str, released: dict, file) -> dict:
    """Our fields of one config, each checked; raises UserError that names the first that is not supported."""
    known = (_HONOURED[part], _FIXED[part], _METADATA[part], _IGNORED, _MASKS if part == VAE else ("txt_out_channels",))
    for name, value in released.items():
        if not any(name in group for group in known):
            raise UserError(f"{file}: {name} = {value!r}: not an option that is known here, so it is not ignored")
    for name, supported in _FIXED[part].items():
        value = released.get(name, supported)
        if value != supported or type(value) is not type(supported):
            raise UserError(f"{file}: {name} = {value!r}: supported is {supported!r}")
    found = {}
    for name, field in _HONOURED[part].items():
        if name not in released:
            raise UserError(f"{file}: {name} is missing: it must be {_ALLOWED[field.kind]}")
        value = released[name]
        if not _fits(field.kind, value):
            raise UserError(f"{file}: {name} = {value!r}: must be {_ALLOWED[field.kind]}")
        is_float = field.kind in (_NUMBER, _POSITIVE, _LIMIT) and value is not None
        found[field.name] = float(value) if is_float else value
    return found


def _checked(config, file):
    try:
        config.validate()
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return config


def vae_config(released: dict, file="cola_vae/config.json") -> VAEConfig:
    """Our config of a released Text VAE.

    Args:
      released: the JSON object.
      file: where it came from, for errors.

    Raises:
      UserError: a field that is missing, not known, of a wrong type, or of a value that is not supported.
    """
    fields = _honoured(VAE, released, file)
    for name in _MASKS:
        if not isinstance(released.get(name), bool):
            raise UserError(f"{file}: {name} = {released.get(name)!r}: must be {_ALLOWED[_FLAG]}")
    if not (released["causal"] or released["block_causal"]):
        raise UserError(f"{file}: causal = False, block_causal = False: supported is at least one of them True")
    # Block-causal wins where both are set, as in the released forward pass.
    fields["attention"] = "block_causal" if released["block_causal"] else "causal"
    return _checked(VAEConfig(**fields), file)


def dit_config(released: dict, file="cola_dit/config.json") -> DiTConfig:
    """Our config of a released DiT; arguments and errors as for `vae_config`."""
    fields = _honoured(DIT, released, file)
    channels, needed = released.get("txt_out_channels"), fields["latent_dim"]
    if channels not in (None, needed):
        raise UserError(f"{file}: txt_out_channels = {channels!r}: supported is txt_in_channels = {needed}")
    return _checked(DiTConfig(**fields, rope_theta=_ROPE_THETA), file)


def check_pair(vae: VAEConfig, dit: DiTConfig, file="cola_dit/config.json") -> None:
    """Raises UserError if the two parts do not belong together."""
    if dit.latent_dim != vae.latent_dim:
        allowed = f"cola_vae's latent_dim = {vae.latent_dim}"
        raise UserError(f"{file}: txt_in_channels = {dit.latent_dim}: must be {allowed}")
    if vae.attention == "block_causal" and dit.block_size % vae.block_size:
        raise UserError(
            f"{file}: block_size = {dit.block_size}: must be a multiple of cola_vae's block_size = {vae.block_size}"
        )


def check_expressible(part: str, config: VAEConfig | DiTConfig) -> None:
    """Raises UserError that names an option of ours which the released layout cannot express."""
    for name, value in _OURS[part].items():
        if getattr(config, name) != value:
            raise UserError(
                f"{part}: {name} = {getattr(config, name)!r}: the released layout has no such option; "
                f"what can be written is {value!r}"
            )


def _parse(part: str, released: dict):
    return vae_config(released) if part == VAE else dit_config(released)


def released_config(part: str, config: VAEConfig | DiTConfig, dtype: str, kept: dict | None = None) -> dict[str, Any]:
    """The config file of one part.

    Args:
      part: "cola_vae" or "cola_dit".
      config: ours.
      dtype: of the tensors.
      kept: the config file that the model came with, whose metadata is kept; None for our own values.

    Raises:
      UserError: an option of ours that the released layout cannot express.
    """
    check_expressible(part, config)
    fields = {theirs: getattr(config, field.name) for theirs, field in _HONOURED[part].items()}
    if part == VAE:
        block_causal = config.attention == "block_causal"
        fields |= {"causal": not block_causal, "block_causal": block_causal}
        if float(config.rope_theta).is_integer():
            fields["rope_theta"] = int(config.rope_theta)
    else:
        fields["txt_out_channels"] = config.latent_dim
    fields = _METADATA[part] | _FIXED[part] | {"dtype": dtype} | fields
    fields.pop("is_encoder_decoder")
    if kept is not None:
        # Where the file says the same in other words (both masks set, 1 for 1.0), its words stay.
        agrees = _parse(part, kept) == _parse(part, fields)
        fields = dict(kept) if agrees else {**kept, **fields}
        if "torch_dtype" in fields and "dtype" not in kept:
            fields = {name: value for name, value in fields.items() if name != "dtype"} | {"torch_dtype": dtype}
        elif "dtype" in fields:
            fields["dtype"] = dtype
    written = dict(sorted(fields.items()))
    _parse(part, written)  # what is written can be read
    return written
