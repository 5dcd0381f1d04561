"""Every option of a released config against an independent forward pass, and options that are refused."""

import dataclasses
import functools
import json
import pathlib

import numpy as np
import pytest
from models.tiny_models import apply, assert_close
from released import reference

from cola_jax import release
from cola_jax.released import options
from cola_jax.types import UserError

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


@functools.cache
def golden(part):
    return (GOLDEN / "tiny" / part / "config.json").read_text()


def vae(**changes) -> dict:
    small = {"vocab_size": 19, "dim": 16, "ffn_dim": 24, "num_heads": 2, "latent_dim": 4, "block_size": 2}
    small |= {"encoder_num_blocks": 2, "decoder_num_blocks": 1}
    return json.loads(golden("cola_vae")) | small | changes


def dit(**changes) -> dict:
    small = {"txt_in_channels": 4, "txt_out_channels": 4, "txt_dim": 16, "emb_dim": 16, "heads": 2, "head_dim": 8}
    small |= {"rope_dim": 4, "num_layers": 2, "block_size": 4}
    return json.loads(golden("cola_dit")) | small | changes


def build(folder, vae_changes=None, dit_changes=None, dtype="float32"):
    """Writes a random released checkpoint; returns (vae config, its tensors, dit config, its tensors)."""
    first, second = vae(**(vae_changes or {})), dit(**(dit_changes or {}))
    vae_draw, dit_draw = reference.Draw(1), reference.Draw(2)
    patch, channels = first["patch_size"], first["latent_dim"]
    reference.encode(vae_draw, first, np.zeros((1, 4 * patch), int))
    reference.decode(vae_draw, first, np.zeros((1, 4, channels)))
    zeros, mask = np.zeros((1, 4, second["txt_in_channels"])), np.ones((4, 4), bool)
    reference.velocity(dit_draw, second, zeros, np.zeros((1, 4)), np.arange(4), mask)
    reference.write_part(folder / "cola_vae", first, vae_draw, dtype)
    reference.write_part(folder / "cola_dit", second, {**dit_draw, **reference.frequencies(second)}, dtype)
    return first, vae_draw, second, dit_draw


VAE_OPTIONS = {
    "as released": {},
    "pre-norm, no qk-norm, causal, no biases": {
        "post_norm": False,
        "qk_norm": False,
        "causal": True,
        "block_causal": False,
        "bias": False,
    },
    "clip, qkv bias, gelu, patches of 4": {"clip_qkv": 0.4, "qk_bias": True, "act": "gelu", "patch_size": 4},
    "silu, norms without affine, both masks": {
        "act": "silu",
        "ffn_dim": 23,
        "layer_norm_affine": False,
        "qk_norm_affine": False,
        "causal": True,
    },
    "no last norm, eps, theta, patches of 2": {
        "encoder_last_ln": False,
        "layer_norm_eps": 0.1,
        "rope_theta": 50,
        "rope_full_precision": False,
        "patch_size": 2,
    },
    "deterministic, pre-norm, one head": {
        "use_variation": False,
        "encoder_last_ln": False,
        "post_norm": False,
        "num_heads": 1,
        "block_size": 4,
    },
    "scale and shift": {"scaling_factor": 0.7, "shifting_factor": -0.3},
}


@pytest.mark.parametrize("changes", VAE_OPTIONS.values(), ids=VAE_OPTIONS)
def test_vae_options(tmp_path, changes):
    config, draw, _, _ = build(tmp_path, changes)
    model, params = release.load(tmp_path)
    random = np.random.default_rng(3)
    ids = random.integers(0, config["vocab_size"] + 1, (2, 8 * config["patch_size"]))
    mean, logvar = reference.encode(draw, config, ids)
    posterior = apply(model, params, ids.astype(np.int32), method="encode")
    assert_close(posterior.mean, mean, 1e-5)
    if logvar is None:
        np.testing.assert_array_equal(posterior.logvar, -30)
    else:
        assert_close(posterior.logvar, logvar, 1e-5)
    latents = random.standard_normal((2, 8, 4)).astype(np.float32)
    logits = apply(model, params, latents, method="decode")
    assert_close(logits, reference.decode(draw, config, latents), 1e-5)
    expected = (mean - config["shifting_factor"]) * config["scaling_factor"]
    assert_close(model.normalize(posterior.mean), expected, 1e-5)


def test_log_variance_is_clamped(tmp_path):
    config, draw, *_ = build(tmp_path)
    name = "encoder.final_layer.bias"
    draw[name] = draw[name] + np.repeat([0, 0, -100, 100], 2).astype(np.float32)
    reference.write_part(tmp_path / "other" / "cola_vae", config, draw)
    (tmp_path / "other" / "cola_dit").symlink_to(tmp_path / "cola_dit")
    model, params = release.load(tmp_path / "other")
    logvar = apply(model, params, np.zeros((1, 4), np.int32), method="encode").logvar
    np.testing.assert_array_equal(logvar[..., :2], -30)
    np.testing.assert_array_equal(logvar[..., 2:], 20)


DIT_OPTIONS = {
    "as released": {},
    "biases, all channels rotated, ratio 3, eps": {"qk_bias": True, "rope_dim": 8, "expand_ratio": 3, "norm_eps": 0.1},
    "emb_dim, heads wider than the model": {"emb_dim": 12, "heads": 3, "rope_dim": 2, "num_layers": 1, "block_size": 2},
}


@pytest.mark.parametrize("changes", DIT_OPTIONS.values(), ids=DIT_OPTIONS)
def test_dit_options(tmp_path, changes):
    _, _, config, draw = build(tmp_path, {"block_size": 2}, changes)
    model, params = release.load(tmp_path)
    random = np.random.default_rng(4)
    clean, noisy = random.standard_normal((2, 2, 8, 4)).astype(np.float32)
    # Times of which float32 holds 1000 t exactly: the fastest sine shows every other rounding.
    times = (random.integers(0, 257, (2, 8)) / 256).astype(np.float32)
    mask = reference.visible(8, config)
    expected = reference.velocity(draw, config, noisy, times.astype(float), np.arange(8), mask)
    assert_close(apply(model, params, noisy, times, method="velocity"), expected, 1e-5)
    # Training: the clean copy before the noisy one, under the mask of 2N positions.
    blocks = np.arange(8) // config["block_size"]
    strict, own = blocks[:, None] > blocks[None], blocks[:, None] == blocks[None]
    both = np.block([[mask, np.zeros_like(mask)], [strict, own]])
    time = times[:, :1]
    all_times = np.concatenate([np.zeros((2, 8)), np.repeat(time, 8, 1).astype(float)], 1)
    joined = np.concatenate([clean, noisy], 1)
    expected = reference.velocity(draw, config, joined, all_times, np.tile(np.arange(8), 2), both)[:, 8:]
    assert_close(apply(model, params, noisy, time[:, 0], history=clean, method="velocity"), expected, 1e-5)


REFUSED = [
    ("cola_vae", {"act": "relu"}, "act = 'relu': must be one of 'swiglu', 'silu', 'gelu'"),
    ("cola_vae", {"shared_heads_kv": 2}, "shared_heads_kv = 2: supported is 1"),
    ("cola_vae", {"shared_heads_kv": True}, "shared_heads_kv = True: supported is 1"),
    ("cola_vae", {"layer_norm_type": "rms_norm"}, "layer_norm_type = 'rms_norm'"),
    ("cola_vae", {"use_emb": False}, "use_emb = False"),
    ("cola_vae", {"block_causal": False}, "causal = False, block_causal = False"),
    ("cola_vae", {"causal": None}, "causal = None: must be true or false"),
    ("cola_vae", {"num_heads": 3}, "num_heads = 3"),
    ("cola_vae", {"ffn_dim": 23}, "ffn_dim = 23"),
    ("cola_vae", {"dim": "16"}, "dim = '16': must be a whole number of at least 1"),
    ("cola_vae", {"dim": 16.0}, "dim = 16.0: must be a whole number"),
    ("cola_vae", {"patch_size": 0}, "patch_size = 0"),
    ("cola_vae", {"clip_qkv": 0}, "clip_qkv = 0: must be null or a positive number"),
    ("cola_vae", {"scaling_factor": float("nan")}, "scaling_factor = nan"),
    ("cola_vae", {"scaling_factor": 0.0}, "scale = 0.0"),
    ("cola_vae", {"post_norm": 1}, "post_norm = 1: must be true or false"),
    ("cola_vae", {"residual_scale": 2.0}, "residual_scale = 2.0: not an option that is known here"),
    ("cola_vae", {"model_type": "cola_dit"}, "model_type = 'cola_dit': supported is 'cola_text_vae'"),
    ("cola_dit", {"patch_size": 2}, "patch_size = 2: supported is 1"),
    ("cola_dit", {"txt_out_channels": 8}, "txt_out_channels = 8: supported is txt_in_channels = 4"),
    ("cola_dit", {"rope_dim": 10}, "rope_dim = 10"),
    ("cola_dit", {"rope_dim": 3}, "rope_dim = 3"),
    ("cola_dit", {"qk_norm": False}, "qk_norm = False: not an option that is known here"),
]


@pytest.mark.parametrize("part, changes, words", REFUSED, ids=[words[:50] for _, _, words in REFUSED])
def test_option_is_refused_by_name(part, changes, words):
    with pytest.raises(UserError) as caught:
        options.vae_config(vae(**changes)) if part == "cola_vae" else options.dit_config(dit(**changes))
    assert str(caught.value).startswith(f"{part}/config.json: ") and words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["cola_vae", "cola_dit"])
def test_every_needed_field_is_missed_by_name(part):
    whole = vae() if part == "cola_vae" else dit()
    parse = options.vae_config if part == "cola_vae" else options.dit_config
    harmless = {"architectures", "transformers_version", "dropout", "attn_dropout", "init_fn", "init_std", "dtype"}
    harmless |= {"init_cutoff_factor", "model_type", "shared_heads_kv", "layer_norm_type", "use_emb"}
    harmless |= {"patch_size", "txt_out_channels"} if part == "cola_dit" else set()
    for name in whole:
        less = {key: value for key, value in whole.items() if key != name}
        if name in harmless:
            assert parse(less) == parse(whole)
        else:
            with pytest.raises(UserError, match=name):
                parse(less)


def test_parts_must_fit_each_other():
    first, second = options.vae_config(vae()), options.dit_config(dit())
    with pytest.raises(UserError, match="txt_in_channels = 4: must be cola_vae's latent_dim = 6"):
        options.check_pair(dataclasses.replace(first, latent_dim=6), second)
    with pytest.raises(UserError, match="block_size = 4: must be a multiple of cola_vae's block_size = 3"):
        options.check_pair(dataclasses.replace(first, block_size=3), second)


@pytest.mark.parametrize("changes", VAE_OPTIONS.values(), ids=VAE_OPTIONS)
def test_vae_config_survives_a_round_trip(changes):
    released = vae(**changes)
    config = options.vae_config(released)
    assert options.released_config("cola_vae", config, "float32", kept=released) == released
    again = options.released_config("cola_vae", config, "float32")
    assert options.vae_config(again) == config
    if not (released["causal"] and released["block_causal"]):  # together they say what block_causal alone says
        assert again == released


@pytest.mark.parametrize("changes", DIT_OPTIONS.values(), ids=DIT_OPTIONS)
def test_dit_config_survives_a_round_trip(changes):
    released = dit(**changes)
    config = options.dit_config(released)
    assert options.released_config("cola_dit", config, "float32") == released
    kept = released | {"return_dict": True, "id2label": {"0": "LABEL_0"}, "transformers_version": "4.40.0"}
    assert options.released_config("cola_dit", config, "bfloat16", kept=kept) == kept | {"dtype": "bfloat16"}


@pytest.mark.parametrize(
    "part, name, value",
    [
        ("cola_vae", "logsnr", 1.5),
        ("cola_dit", "block_position", True),
        ("cola_dit", "no_history_vector", True),
        ("cola_dit", "rope_theta", 500.0),
        ("cola_dit", "prediction", "mean"),
        ("cola_dit", "self_conditioning", True),
        ("cola_dit", "time_frequency", 30.0),
    ],
)
def test_what_the_layout_cannot_say_is_refused(part, name, value):
    config = options.vae_config(vae()) if part == "cola_vae" else options.dit_config(dit())
    with pytest.raises(UserError, match=f"{part}: {name} = {value!r}: the released layout has no such option"):
        options.released_config(part, dataclasses.replace(config, **{name: value}), "float32")
