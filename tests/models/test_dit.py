import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import (
    BLOCK,
    apply,
    assert_close,
    create,
    dit_config,
    normal,
    uniform,
    vae_config,
)

from cola_jax.evaluation import benchmark
from cola_jax.models import cola, dit
from cola_jax.nn import visibility
from cola_jax.nn.visibility import BlockPlan

LENGTH, BLOCKS = 12, 3
NOISY, CLEAN, TIMES = normal(2, LENGTH, 4, seed=1), normal(2, LENGTH, 4, seed=2), uniform(2, BLOCKS)
OPTIONS = {"block_position": True, "no_history_vector": True, "qkv_bias": True}
MEAN = OPTIONS | {"prediction": "mean", "prediction_variance": 0.2, "time_frequency": 30.0}
MIXTURE = MEAN | {"prediction": "mixture", "num_codes": 5}
FED_BACK = MEAN | {"self_conditioning": True}


# Every argument is given in every call, so that one compiled program serves most tests.
def whole(latents, times, pinned=None, segments=None, options=OPTIONS):
    model, params = create(dit=options)
    pinned = jnp.zeros((2, LENGTH), bool) if pinned is None else pinned
    segments = jnp.ones((2, LENGTH), jnp.int32) if segments is None else segments
    return apply(model, params, latents, times, pinned=pinned, segment_ids=segments, method="velocity")


def training(noisy, times, clean, pinned=None, segments=None, dropped=None, params=None, options=OPTIONS):
    model, own = create(dit=options)
    total = noisy.shape[1]
    return apply(
        model,
        own if params is None else params,
        noisy,
        times,
        history=clean,
        pinned=jnp.zeros((2, total), bool) if pinned is None else pinned,
        segment_ids=jnp.ones((2, LENGTH), jnp.int32) if segments is None else segments,
        drop_history=jnp.zeros((2, total // BLOCK), bool) if dropped is None else dropped,
        method="velocity",
    )


def test_training_layout_equals_the_whole_sequence_path_block_by_block():
    """Velocity of noisy block b = that of [clean blocks < b, noisy block b] at times [0 ... 0, t_b]."""
    velocity = training(NOISY, TIMES, CLEAN)
    for b in range(BLOCKS):
        here = slice(b * BLOCK, (b + 1) * BLOCK)
        latents = CLEAN.at[:, here].set(NOISY[:, here])  # what follows block b does not matter
        times = jnp.zeros((2, BLOCKS)).at[:, b].set(TIMES[:, b])
        assert_close(velocity[:, here], whole(latents, times)[:, here], 1e-5)


def test_noisy_copies_equal_separate_passes():
    other, other_times = normal(2, LENGTH, 4, seed=3), uniform(2, BLOCKS, seed=1)
    both = training(jnp.concatenate([NOISY, other], axis=1), jnp.concatenate([TIMES, other_times], axis=1), CLEAN)
    assert_close(both[:, :LENGTH], training(NOISY, TIMES, CLEAN), 1e-5)
    assert_close(both[:, LENGTH:], training(other, other_times, CLEAN), 1e-5)


def test_velocity_of_a_document_does_not_depend_on_where_it_is_packed():
    """Documents that begin at a block boundary: only distances enter."""
    behind = jnp.array([[1] * BLOCK + [2] * 2 * BLOCK] * 2)
    before = jnp.array([[1] * 2 * BLOCK + [2] * BLOCK] * 2)

    def move(x):
        return jnp.roll(x, -x.shape[1] // BLOCKS, axis=1)

    last = training(NOISY, TIMES, CLEAN, segments=behind)
    first = training(move(NOISY), move(TIMES), move(CLEAN), segments=before)
    assert_close(last[:, BLOCK:], first[:, : 2 * BLOCK], 1e-5)
    last = whole(NOISY, TIMES, segments=behind)
    first = whole(move(NOISY), move(TIMES), segments=before)
    assert_close(last[:, BLOCK:], first[:, : 2 * BLOCK], 1e-5)


def test_a_block_without_history_equals_a_first_block_but_for_the_vector():
    _, params = create(dit=OPTIONS)
    no_vector = {"params": {**params["params"], "dit": params["params"]["dit"] | {"no_history": jnp.zeros(16)}}}
    dropped = jnp.array([[False, False, True]] * 2)
    last = slice(2 * BLOCK, 3 * BLOCK)
    first = whole(jnp.roll(NOISY, BLOCK, axis=1), jnp.roll(TIMES, 1, axis=1))[:, :BLOCK]
    assert_close(training(NOISY, TIMES, CLEAN, dropped=dropped, params=no_vector)[:, last], first, 1e-5)
    assert np.max(np.abs(training(NOISY, TIMES, CLEAN, dropped=dropped)[:, last] - first)) > 0.01


def test_times_of_sequence_block_and_latent_agree():
    per_sequence = uniform(2)
    per_block, per_latent = (jnp.tile(per_sequence[:, None], (1, n)) for n in (BLOCKS, LENGTH))
    expected = whole(NOISY, per_block)
    assert_close(whole(NOISY, per_sequence), expected, 1e-6)
    assert_close(whole(NOISY, per_latent), expected, 1e-6)
    by_block = training(NOISY, TIMES, CLEAN)
    assert_close(training(NOISY, jnp.repeat(TIMES, BLOCK, axis=1), CLEAN), by_block, 1e-6)
    assert np.max(np.abs(training(NOISY, TIMES[:, ::-1], CLEAN) - by_block)) > 0.01


def test_pinned_positions_are_at_time_zero():
    pinned = jnp.asarray(np.random.default_rng(0).random((2, LENGTH)) < 0.4)
    times = jnp.where(pinned, 0.0, jnp.repeat(TIMES, BLOCK, axis=1))
    assert_close(whole(NOISY, TIMES, pinned), whole(NOISY, times), 1e-6)
    assert_close(training(NOISY, TIMES, CLEAN, pinned), training(NOISY, times, CLEAN), 1e-6)


def test_a_predicted_mean_makes_the_velocity():
    """``skip(t) z + gate(t) output``: positions at time 0, pinned ones too, have -z whatever the network says."""
    output = training(NOISY, TIMES, CLEAN, options=MEAN | {"prediction": "velocity"})
    pinned = jnp.zeros((2, LENGTH), bool).at[:, 1].set(True)
    velocity = training(NOISY, TIMES, CLEAN, options=MEAN)
    t = jnp.repeat(TIMES, BLOCK, axis=1)[..., None]
    spread = (1 - t) ** 2 * 0.2 + t**2
    assert_close(velocity, (t - (1 - t) * 0.2) / spread * NOISY - t / spread * output, 1e-5)
    at_data = training(NOISY, TIMES.at[0].set(0.0), CLEAN, pinned, options=MEAN)
    assert_close(at_data[0], -NOISY[0], 1e-6)
    assert_close(at_data[:, 1], -NOISY[:, 1], 1e-6)


def mixture_shares(logits, codes, times):
    """P(code | z_t) of NOISY by Gaussian densities written out, [2, LENGTH, 5]; and t and the spread [2, LENGTH, 1]."""
    t = np.repeat(np.asarray(times, np.float64), BLOCK, axis=1)[..., None]
    spread = (1 - t) ** 2 * 0.2 + t**2
    distance = np.square(np.asarray(NOISY, np.float64)[:, :, None] - (1 - t[..., None]) * codes).sum(-1)
    weights = np.exp(np.asarray(logits, np.float64) - distance / (2 * spread))
    return weights / weights.sum(-1, keepdims=True), t, spread


def test_a_mixture_reads_what_the_latent_tells_of_its_code():
    model, params = create(dit=MIXTURE)
    own = params["params"]["dit"]

    def read(m, z, times):
        context = dit.DiTContext(*m.dit._time(times), None, jnp.zeros(()))
        return m.dit._input(z, jnp.arange(LENGTH)[None], BlockPlan.equal(BLOCK), context)

    times = TIMES.at[0, 0].set(0.0)
    silent = {"params": {**params["params"], "dit": {**own, "code_embedding": jnp.zeros((5, 16))}}}
    found = model.apply(params, NOISY, times, method=read) - model.apply(silent, NOISY, times, method=read)
    shares, _, _ = mixture_shares(0.0, np.asarray(own["codes"], np.float64), times)
    assert_close(found, jnp.asarray(shares @ np.asarray(own["code_embedding"]), jnp.float32), 1e-5)


def test_a_mixture_adds_the_expectation_of_its_codes():
    """Under the logits and what z_t itself says; the scores are there for who asks."""
    model, params = create(dit=MIXTURE)
    own = params["params"]["dit"] | {"code_embedding": jnp.zeros((5, 16))}  # so that nothing is read of the codes
    params = {"params": {**params["params"], "dit": own}}
    silent = {"params": {**params["params"], "dit": own | {"codes": jnp.zeros((5, 4))}}}
    estimate = functools.partial(model.apply, method="first_estimate", mutable=["scores"])
    mean, recorded = estimate(params, NOISY, TIMES, history=CLEAN)
    residual, logits = estimate(silent, NOISY, TIMES, history=CLEAN)  # codes of norm 0 tell nothing
    (scores,), (logits,) = (x["scores"]["dit"]["codes"] for x in (recorded, logits))
    codes = np.asarray(own["codes"], np.float64)
    shares, t, spread = mixture_shares(logits, codes, TIMES)
    np.testing.assert_allclose(jax.nn.softmax(scores, axis=-1), shares, rtol=1e-3, atol=1e-6)
    assert_close(mean, residual + jnp.asarray(shares @ codes, jnp.float32), 1e-5)
    velocity = model.apply(params, NOISY, TIMES, history=CLEAN, method="velocity")
    assert_close(velocity, (t - (1 - t) * 0.2) / spread * NOISY - t / spread * mean, 1e-5)


@pytest.mark.parametrize(
    ("stacked", "options"), [(True, OPTIONS), (False, OPTIONS), (False, FED_BACK), (False, MIXTURE)]
)
def test_cached_blocks_equal_the_training_layout(stacked, options):
    """`prefill`, then `extend`; one sequence stands a block ahead of the other."""
    model, params = create(dit=options)
    if not stacked:
        params, model = dit.unstack(params, model.dit_config.num_layers), model.clone(stacked=False)
    prefilled, _ = apply(model, params, CLEAN, jnp.ones((2, LENGTH), jnp.int32), method="prefill")
    start = jnp.array([BLOCK, 2 * BLOCK])
    filled = jnp.arange(LENGTH)[None] < start[:, None]
    # What is not committed must not matter: rubbish is there.
    cache = jax.tree.map(lambda x: jnp.where(filled[:, None, :, None], x, 7.0), prefilled)
    positions = start[:, None] + jnp.arange(BLOCK)[None]

    def block(x):
        return jnp.take_along_axis(x, positions[..., None], axis=1)

    extend = functools.partial(apply, model, params, method="extend")
    clean, new, _ = extend(block(CLEAN), jnp.zeros(()), positions, cache, filled, pinned=jnp.ones((2, BLOCK), bool))
    assert_close(clean, block(whole(CLEAN, jnp.zeros((2, BLOCKS)), options=options)), 1e-5)
    for ours, all_at_once in zip(jax.tree.leaves(new), jax.tree.leaves(prefilled), strict=True):
        index = jnp.expand_dims(positions, (1, 3))
        index = index if all_at_once.ndim == 4 else index[None]
        assert_close(ours, jnp.take_along_axis(all_at_once, index, axis=-2), 1e-5)
    times = jnp.take_along_axis(TIMES, start[:, None] // BLOCK, axis=1)[:, 0]
    expected = block(training(NOISY, TIMES, CLEAN, options=options))
    noisy, *_ = extend(block(NOISY), times, positions, cache, filled)
    assert_close(noisy, expected, 1e-5)

    # In one pass: the block before, clean and not in the cache yet; the block; and the block without a history.
    before = positions - BLOCK
    latents = jnp.concatenate([jnp.take_along_axis(CLEAN, before[..., None], axis=1), block(NOISY), block(NOISY)], 1)
    pinned = jnp.arange(3 * BLOCK)[None] < jnp.array([[BLOCK]] * 2)
    earlier = jnp.arange(LENGTH)[None] < before[:, :1]
    together = jnp.concatenate([before, positions, positions], axis=1)
    own = visibility.block_causal(BlockPlan.equal(BLOCK), 2 * BLOCK)
    out, *_ = extend(latents, times, together, cache, earlier, own, pinned)
    assert_close(out[:, BLOCK : 2 * BLOCK], expected, 1e-5)
    dropped = training(NOISY, TIMES, CLEAN, dropped=jnp.ones((2, BLOCKS), bool), options=options)
    assert_close(out[:, 2 * BLOCK :], block(dropped), 1e-5)

    # The same from a table of modulations.
    grid = jnp.concatenate([times[:1], jnp.zeros(1)])
    table = apply(model, params, grid, method="modulations")
    from_table, *_ = extend(latents, jnp.int32(0), together, cache, earlier, own, pinned, table)
    assert_close(from_table[:1], out[:1], 1e-5)


@pytest.mark.parametrize("remat", ["none", pytest.param("attention", marks=pytest.mark.slow)])
def test_separate_layers_equal_the_loop_at_less_work(remat):
    """Compiled one by one, the last layer leaves the clean copy where it is: values and gradients are the same."""
    noisy, times = jnp.tile(NOISY, (1, 2, 1)), jnp.tile(TIMES, (1, 2))
    pinned = jnp.zeros((2, 2 * LENGTH), bool).at[0, 3].set(True)

    def measure(unroll):
        model, params = create(dit=OPTIONS | {"unroll": unroll, "remat": remat})

        def velocity(dit, noisy, clean):
            dropped = jnp.zeros((2, 2 * BLOCKS), bool).at[1, 1].set(True)
            options = {"history": clean, "pinned": pinned, "drop_history": dropped}
            return model.apply({"params": {"dit": dit}}, noisy, times, **options, method="velocity")

        arguments = (params["params"]["dit"], noisy, CLEAN)
        gradient = jax.jit(jax.grad(lambda *given: jnp.sum(velocity(*given) ** 2), (0, 1, 2)))
        return velocity(*arguments), gradient(*arguments), benchmark.count_flops(velocity, *arguments)

    (*loop, flops_of_loop), (*apart, flops) = measure(1), measure(2)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), apart, loop)
    # Not done: the attention's output map and the MLP of the clean copies, of width 16 with 32 inside.
    assert flops_of_loop - flops == 2 * (2 * LENGTH) * (16 * 16 + 2 * 16 * 32)


@pytest.mark.parametrize("remat", ["none", "full", "attention", "dots"])
def test_layers_are_computed_again_where_told(remat):
    """That values and gradients stay the same is shown of `scan_layers`; here, that the option arrives there."""
    model, params = create()
    other = cola.create(model.vae_config, dataclasses.replace(model.dit_config, remat=remat))
    trace = jax.make_jaxpr(lambda params: other.apply(params, NOISY, TIMES, method="velocity"))(params)
    assert ("prevent_cse" in str(trace)) == (remat != "none")


ZERO = ("attention_modulation", "attention_gate", "mlp_modulation", "mlp_gate")


def test_velocity_is_exactly_zero_at_the_start():
    """Modulations, gates and output head start at zero; with any values of the other parameters v = 0."""
    model, params = create(dit=OPTIONS)

    @jax.jit
    def initial_zeros(key):
        dit = model.init(key, jnp.zeros((1, BLOCK), jnp.int32))["params"]["dit"]
        return dit["out_layer"], dit["out_modulation"], {name: dit["layers"][name] for name in ZERO}

    zeros = initial_zeros(jax.random.key(0))
    for leaf in jax.tree.leaves(zeros):
        np.testing.assert_array_equal(leaf, 0.0)
    dit = params["params"]["dit"]
    start = dit | {"out_layer": jax.tree.map(jnp.zeros_like, dit["out_layer"])}
    velocity = training(NOISY, TIMES, CLEAN, params={"params": {**params["params"], "dit": start}})
    np.testing.assert_array_equal(velocity, 0.0)


def test_closed_gates_leave_the_residual_stream_as_it_is():
    """With gates of zero no position depends on another, whatever the rest."""
    _, params = create(dit=OPTIONS)
    dit = params["params"]["dit"]
    closed = {name: jax.tree.map(jnp.zeros_like, dit["layers"][name]) for name in ("attention_gate", "mlp_gate")}
    closed = {"params": {**params["params"], "dit": dit | {"layers": dit["layers"] | closed}}}
    base = training(NOISY, TIMES, CLEAN, params=closed)
    other = training(NOISY.at[:, 1].add(1.0), TIMES, CLEAN + 1, params=closed)
    np.testing.assert_array_equal(np.any(base != other, axis=(0, 2)), np.arange(LENGTH) == 1)


def test_bfloat16_velocity_is_close_and_float32():
    model, params = create(dit=OPTIONS)
    half = cola.create(model.vae_config, model.dit_config, "bfloat16")
    expected = training(NOISY, TIMES, CLEAN)
    actual = apply(half, params, NOISY, TIMES, history=CLEAN, method="velocity")
    assert actual.dtype == jnp.float32
    assert_close(actual, expected, 0.05)
    assert np.max(np.abs(actual - expected)) > 1e-4  # it did compute in bfloat16


def test_bfloat16_model_has_float32_parameters():
    model = cola.create(vae_config(), dit_config(**OPTIONS), "bfloat16")
    abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, BLOCK), jnp.int32))
    assert {x.dtype for x in jax.tree.leaves(abstract)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("options", [{"block_position": False}, {"block_position": True}], ids=["rope", "position"])
def test_only_a_block_position_tells_apart_orders_within_the_block(options):
    """A reversed first block has reversed distances: with all distances equal to 0 only the index is left."""
    model, params = create(dit=OPTIONS | {"rope_dim": 0} | options)
    z = normal(1, BLOCK, 4)
    velocity = apply(model, params, z, jnp.full(1, 0.5), method="velocity")
    swapped = apply(model, params, z[:, ::-1], jnp.full(1, 0.5), method="velocity")[:, ::-1]
    same = np.max(np.abs(velocity - swapped)) < 1e-5
    assert same == (not options["block_position"])
