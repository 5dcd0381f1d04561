import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import VOCAB, apply, assert_close, create, parameters, tokens

from cola_jax import rng
from cola_jax.objectives import stage2
from cola_jax.objectives.stage2 import Stage2Config

SEGMENTS = jnp.array([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3, [1] * 2 + [0] * 10])
BATCH = {"tokens": tokens(3, 12), "segment_ids": SEGMENTS}
KEYS = rng.key(0, "train", 5, jnp.arange(3))
# Everything at once.
JOINT = Stage2Config(
    strategy="joint", prompt_blocks=0.5, history_dropout=0.3, noise_copies=2, vae_weight=0.5, entropy_weight=0.2
)
OPTIONS = {"no_history_vector": True}
BY_TIME = {f"flow_from_{low:g}" for low in stage2.TIME_BINS[:-1]}


@functools.cache
def compiled(stage):
    model, _ = create(dit=OPTIONS)
    return jax.jit(lambda params, batch, keys, reference: stage2.terms(model, stage, params, batch, keys, reference))


@functools.cache
def other_parameters(model):
    return parameters(model, seed=7)


def terms(batch=BATCH, keys=KEYS, same_reference=False, params=None, stage=JOINT):
    model, own = create(dit=OPTIONS)
    reference = own if same_reference else other_parameters(model)
    return compiled(stage)(own if params is None else params, batch, keys, reference)


def test_padding_changes_nothing():
    other = BATCH | {"tokens": jnp.where(SEGMENTS > 0, BATCH["tokens"], (BATCH["tokens"] + 7) % VOCAB)}
    expected = terms()
    for name, term in terms(other).items():
        np.testing.assert_allclose(term.value, expected[name].value, rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(term.weight, expected[name].weight, err_msg=name)


def test_an_example_does_not_depend_on_its_batch():
    """The second row keeps its values when the tokens, documents and keys of the others change."""
    other = {"tokens": tokens(3, 12, seed=9), "segment_ids": jnp.ones((3, 12), jnp.int32)}
    other = jax.tree.map(lambda new, old: new.at[1].set(old[1]), other, BATCH)
    whole, changed = terms(), terms(other, rng.key(0, "train", 5, jnp.array([7, 1, 9])))
    for name in whole:
        np.testing.assert_allclose(changed[name].value[1], whole[name].value[1], rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(changed[name].weight[1], whole[name].weight[1], err_msg=name)
        if name not in BY_TIME:  # no time may have been drawn there
            assert np.any(changed[name].value[::2] != whole[name].value[::2]), name


def test_an_example_does_not_depend_on_its_place():
    order = jnp.array([2, 0, 1])
    whole, moved = terms(), terms(jax.tree.map(lambda x: x[order], BATCH), KEYS[order])
    for name in whole:
        np.testing.assert_allclose(moved[name].value, whole[name].value[order], rtol=1e-6, err_msg=name)


def test_weights_of_the_terms():
    coefficients = {name: float(term.coefficient) for name, term in terms().items()}
    assert coefficients == pytest.approx(
        {
            "flow": JOINT.flow_weight,
            "reconstruction": 0.5,
            "entropy": 0.5 * 0.2,
            "mask": 0.5 * JOINT.mask_weight,
            "reference_kl": JOINT.reference_weight,
            "accuracy": 0.0,
            "latent_signal": 0.0,
            "latent_noise": 0.0,
        }
        | dict.fromkeys(BY_TIME, 0.0)
    )
    real = np.sum(SEGMENTS > 0, axis=1)
    for name in ("reconstruction", "entropy", "reference_kl", "accuracy"):
        np.testing.assert_array_equal(terms()[name].weight, real)


def test_the_kl_to_an_equal_reference_is_zero():
    np.testing.assert_allclose(terms(same_reference=True)["reference_kl"].value, 0.0, atol=1e-6)
    assert np.all(terms()["reference_kl"].value > 0.1)


def test_entropy_and_reference_kl_by_hand():
    """E_q[log q] (it is added to the loss: broad posteriors are better) and KL(q || q_ref), in this order."""
    model, own = create(dit=OPTIONS)
    inputs = jnp.where(SEGMENTS > 0, BATCH["tokens"], VOCAB)
    q, anchor = (
        [np.asarray(x, np.float64) for x in apply(model, params, inputs, SEGMENTS, method="encode")]
        for params in (own, other_parameters(model))
    )
    real = np.asarray(SEGMENTS > 0)
    entropy = -0.5 * (q[1] + np.log(2 * np.pi) + 1).sum(-1)
    ratio = np.exp(q[1] - anchor[1])
    kl = 0.5 * (ratio + (q[0] - anchor[0]) ** 2 / np.exp(anchor[1]) - 1 - np.log(ratio)).sum(-1)
    out = terms()
    assert_close(out["entropy"].value, (entropy * real).sum(1), 1e-5)
    assert_close(out["reference_kl"].value, (kl * real).sum(1), 1e-5)
    assert out["entropy"].coefficient > 0 and out["reference_kl"].coefficient > 0


def test_the_terms_of_the_vae_reach_its_encoder():
    """Through the sample that is decoded, too; the reference is fixed."""
    model, own = create(dit=OPTIONS)
    names = ("reconstruction", "entropy", "mask", "reference_kl")

    def sums(encoder, reference):
        vae = own["params"]["vae"] | {"encoder": encoder}
        anchor = {"params": {"vae": {"encoder": reference}}}
        out = stage2.terms(model, JOINT, {"params": own["params"] | {"vae": vae}}, BATCH, KEYS, anchor)
        return jnp.stack([jnp.sum(out[name].value) for name in names])

    encoders = [params["params"]["vae"]["encoder"] for params in (own, other_parameters(model))]
    encoder, reference = jax.jit(jax.jacrev(sums, argnums=(0, 1)))(*encoders)
    for index, name in enumerate(names):
        assert any(np.any(leaf[index] != 0) for leaf in jax.tree.leaves(encoder)), name
        assert all(np.all(leaf[index] == 0) for leaf in jax.tree.leaves(reference)), name


def shapes(stage, reference):
    model, params = create(dit=OPTIONS)
    return jax.eval_shape(functools.partial(stage2.terms, model, stage), params, BATCH, KEYS, reference)


def test_which_terms_a_strategy_has():
    _, params = create(dit=OPTIONS)
    statistics = {"latent_signal", "latent_noise"} | BY_TIME
    frozen = dataclasses.replace(JOINT, strategy="fix_vae")
    assert set(shapes(frozen, params)) == {"flow"} | statistics
    vae = {"flow", "reconstruction", "entropy", "accuracy"} | statistics
    assert set(shapes(JOINT, None)) == vae | {"mask"}
    assert set(shapes(dataclasses.replace(JOINT, mask_weight=0.0), params)) == vae | {"reference_kl"}


@pytest.mark.parametrize("encoder_gradient", [True, False])
def test_flow_matching_reaches_the_encoder_only_where_told(encoder_gradient):
    """By the flow term alone: never the decoder, always the DiT."""
    model, params = create(dit=OPTIONS)
    stage = Stage2Config(strategy="joint", encoder_gradient=encoder_gradient, mask_weight=0.0, prompt_blocks=0.0)

    def loss(vae, dit):
        return jnp.sum(stage2.terms(model, stage, {"params": {"vae": vae, "dit": dit}}, BATCH, KEYS)["flow"].value)

    parts = (0, 1) if encoder_gradient else (0,)
    vae, *dit = jax.jit(jax.grad(loss, argnums=parts))(params["params"]["vae"], params["params"]["dit"])
    for leaf in jax.tree.leaves(vae["decoder"]):
        np.testing.assert_array_equal(leaf, 0.0)
    for leaf in jax.tree.leaves(vae["encoder"]):
        assert np.any(leaf != 0) == encoder_gradient
    for gradient in dit:
        np.testing.assert_array_equal(gradient.pop("no_history"), 0.0)  # no block's history was dropped
        assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))


def test_the_flow_term_starts_at_the_power_of_the_target():
    """Velocity 0: the mean of (z_1 - z_0)^2 is 1 + E[z^2], the power of noise and of latents."""
    _, params = create(dit=OPTIONS)
    head = jax.tree.map(jnp.zeros_like, params["params"]["dit"]["out_layer"])
    start = {"params": params["params"] | {"dit": params["params"]["dit"] | {"out_layer": head}}}
    sums = dict.fromkeys(("flow", "latent_signal", "latent_noise"), 0.0)
    weights = dict(sums)
    for step in range(60):
        out = terms(keys=rng.key(0, "train", step, jnp.arange(3)), params=start)
        for name in sums:
            sums[name] += float(np.sum(out[name].value))
            weights[name] += float(np.sum(out[name].weight))
    flow, signal, noise = (sums[name] / weights[name] for name in sums)
    assert abs(flow / (1 + signal + noise) - 1) < 0.06  # 6600 independent elements of noise: 3 standard errors
