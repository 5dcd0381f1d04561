import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import VOCAB, abstract, apply, assert_close, create, normal, tokens, vae_config

from cola_jax.flow import schedule
from cola_jax.models import cola

TOKENS = tokens(2, 12)


def test_a_fixed_logsnr_is_the_logsnr():
    """log(E[mean^2] / E[variance]) holds by construction (16.2)."""
    model, params = create({"logsnr": 1.5})
    posterior = apply(model, params, TOKENS, method="encode")
    assert abs(float(schedule.logsnr(posterior)) - 1.5) < 1e-5


def test_a_learnable_variance_differs_between_latents():
    model, params = create()
    posterior = apply(model, params, TOKENS, method="encode")
    assert np.std(posterior.logvar) > 0.1
    assert abs(float(schedule.logsnr(posterior)) - 4.5) > 0.1


def test_a_deterministic_autoencoder_has_no_variance_head():
    model, params = create({"variational": False})
    posterior = apply(model, params, TOKENS, method="encode")
    np.testing.assert_array_equal(posterior.logvar, -30.0)
    assert params["params"]["vae"]["encoder"]["final_layer"]["kernel"].shape == (16, 1, 4)


def test_logvar_is_clamped():
    model, params = create()
    encoder = params["params"]["vae"]["encoder"]
    kernel = encoder["final_layer"]["kernel"].at[:, 1].multiply(1e3)
    encoder = encoder | {"final_layer": encoder["final_layer"] | {"kernel": kernel}}
    logvar = apply(model, {"params": {"vae": {"encoder": encoder}}}, TOKENS, method="encode").logvar
    assert (float(logvar.min()), float(logvar.max())) == (-30.0, 20.0)


@pytest.mark.parametrize("normalized", [True, False])
def test_mean_passes_through_a_norm_where_told(normalized):
    model, params = create({"normalize_mean": normalized})
    mean = np.asarray(apply(model, params, TOKENS, method="encode").mean)
    power = np.mean(mean**2, axis=-1)
    assert np.allclose(mean.mean(-1), 0, atol=1e-5) == normalized
    assert np.allclose(power, 1, atol=1e-3) == normalized


def test_the_mask_token_reads_its_own_row_of_the_embedding():
    """Row V has a gradient just where the mask token is in the input; it is not clamped to row V - 1."""
    model, params = create()
    encoder = params["params"]["vae"]["encoder"]
    assert encoder["wte"].shape == (VOCAB + 1, 16)

    @jax.jit
    def gradient(tokens):
        def total(table):
            variables = {"params": {"vae": {"encoder": encoder | {"wte": table}}}}
            return jnp.sum(normal(2, 12, 4) * model.apply(variables, tokens, method="encode").mean)

        return jax.grad(total)(encoder["wte"])

    without = TOKENS % (VOCAB - 1)  # neither row V - 1 nor V
    np.testing.assert_array_equal(gradient(without)[VOCAB - 1 :], 0.0)
    masked = gradient(without.at[0, 3].set(VOCAB))
    assert np.all(masked[VOCAB] != 0)
    np.testing.assert_array_equal(masked[VOCAB - 1], 0.0)


@pytest.mark.parametrize("post_norm", [True, False])
def test_layer_is_the_released_one(post_norm):
    """One layer against NumPy: attention before (post-norm) or after (pre-norm) its norm, gate after value."""
    config = vae_config(decoder_layers=1, post_norm=post_norm, num_heads=1, clip_qkv=0.7)
    model, params = create(dataclasses.asdict(config))
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"]["vae"]["decoder"])
    layer = jax.tree.map(lambda x: x[0], p["layers"])

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * layer[name]["scale"] + layer[name]["bias"]

    def attention(x):  # a first position: it sees itself only, and RoPE turns by 0
        value = np.clip(x @ layer["qkv_proj"]["kernel"][:, 2], -0.7, 0.7)
        return value @ layer["attn_out_proj"]["kernel"] + layer["attn_out_proj"]["bias"]

    def mlp(x):
        value, gate = (x @ layer["ffn_proj"]["kernel"][:, i] + layer["ffn_proj"]["bias"][i] for i in range(2))
        return (gate / (1 + np.exp(-gate)) * value) @ layer["ffn_out"]["kernel"] + layer["ffn_out"]["bias"]

    z = normal(1, 1, 4)
    x = np.asarray(z, np.float64) @ p["in_layer"]["kernel"] + p["in_layer"]["bias"]
    if post_norm:
        x = norm(x, "norm_attn") + attention(x)
        x = x + norm(mlp(x), "norm_ffn")
    else:
        x = x + attention(norm(x, "norm_attn"))
        x = x + mlp(norm(x, "norm_ffn"))
    x = x @ p["unpatch_layer"]["kernel"][:, :, 0] + p["unpatch_layer"]["bias"][:, 0]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = x * p["final_norm"]["scale"] + p["final_norm"]["bias"]
    expected = x @ p["final_layer"]["kernel"] + p["final_layer"]["bias"]
    assert_close(apply(model, params, z, method="decode"), expected, 1e-5)


def decode_prompt(model, latents, segment_ids):
    return model.vae.decode_prompt(latents, segment_ids)


@pytest.mark.parametrize(("attention", "patch"), [("causal", 1), ("block_causal", 2)])
def test_decoding_with_a_cache_equals_decoding_the_whole(attention, patch):
    """Sequences that stand at different positions; what the cache holds beyond them does not matter."""
    model, params = create({"attention": attention, "patch_size": patch})
    z = normal(2, 12, 4)
    whole = apply(model, params, z, method="decode")
    k, v = apply(model, params, z, jnp.ones((2, 12), jnp.int32), method=decode_prompt)
    start = jnp.array([0, 8])
    filled = jnp.arange(12)[None] < start[:, None]
    cache = tuple(jnp.where(filled[None, :, None, :, None], x, 7.0) for x in (k, v))
    positions = start[:, None] + jnp.arange(4)[None]
    following = jnp.take_along_axis(z, positions[..., None], axis=1)
    logits, (new_k, _) = apply(model, params, following, cache, filled, positions, method="decode_next")
    for row, begin in enumerate((0, 8)):
        assert_close(logits[row], whole[row, begin * patch : (begin + 4) * patch], 1e-5)
        assert_close(new_k[:, row], k[:, row, :, begin : begin + 4], 1e-5)


def test_padding_behind_a_document_does_not_matter():
    model, params = create({"attention": "block_causal", "block_size": 4})
    segments = jnp.array([[1] * 6 + [0] * 6] * 2)
    padded = TOKENS.at[:, 6:].set(5)
    first, second = (apply(model, params, t, segments, method="encode") for t in (TOKENS, padded))
    np.testing.assert_array_equal(first.mean[:, :6], second.mean[:, :6])
    alone = apply(model, params, TOKENS[:, :6], method="encode")
    assert_close(first.mean[:, :6], alone.mean, 1e-5)


def test_normalize_shifts_then_scales():
    model, _ = create({"shift": 0.5, "scale": 3.0})
    np.testing.assert_allclose(model.normalize(jnp.array([0.5, 1.5])), [0.0, 3.0])


def test_bfloat16_posterior_and_logits_are_close_and_float32():
    model, params = create()
    half = cola.create(model.vae_config, model.dit_config, "bfloat16")
    expected, actual = (apply(m, params, TOKENS, method="encode") for m in (model, half))
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == jnp.float32
        assert_close(ours, theirs, 0.05)
    assert np.max(np.abs(actual.mean - expected.mean)) > 1e-4  # it did compute in bfloat16
    expected, actual = (apply(m, params, normal(2, 12, 4), method="decode") for m in (model, half))
    assert actual.dtype == jnp.float32
    assert_close(actual, expected, 0.05)


def test_with_vocabulary_fills_in_what_the_config_leaves_open():
    assert cola.with_vocabulary(vae_config(vocab_size=0), 77).vocab_size == 77
    assert cola.with_vocabulary(vae_config(vocab_size=31), 77).vocab_size == 31


def test_encode_and_decode_need_the_vae_only_and_velocity_the_dit_only():
    model, params = create()
    shapes = abstract(model)["params"]
    assert set(shapes) == {"vae", "dit"}
    vae, dit = ({"params": {name: params["params"][name]}} for name in ("vae", "dit"))

    def shape(params, *arguments, method):
        return jax.eval_shape(functools.partial(model.apply, method=method), params, *arguments)

    assert shape(vae, TOKENS, method="encode").mean.shape == (2, 12, 4)
    assert shape(vae, normal(2, 12, 4), method="decode").shape == (2, 12, VOCAB)
    assert shape(dit, normal(2, 12, 4), jnp.zeros(2), method="velocity").shape == (2, 12, 4)
