import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model

from cola_jax import rng, sharding
from cola_jax.config import AxesConfig, OptimizerConfig, TrainConfig
from cola_jax.train import state as states
from cola_jax.train import step as steps
from cola_jax.train import trainer
from cola_jax.types import Term

OPTIMIZER = OptimizerConfig(learning_rate=0.02, warmup_steps=2)
ONE = TrainConfig(mesh_data=1)


def stage_of(stage, strategy="joint", optimizer=OPTIMIZER, terms=None, interval=0, total=20, **changes):
    """Stage 1 or 2 of the toy."""
    settings = {"strategy": strategy, "interval": interval, "reference_weight": 0.01, "steps": total, **changes}
    config = toy_model.config(stage1={"steps": total}, stage2=settings)
    config = dataclasses.replace(config, optimizer1=optimizer, optimizer2=optimizer)
    own = toy_model.stages(config)[stage - 1]
    return own if terms is None else own._replace(terms=terms)


@functools.cache
def compiled(stage, strategy, optimizer, train, terms, interval, total):
    """What tests with the same settings share: compilation is most of their time."""
    mesh, rules = sharding.make_mesh(train), sharding.make_rules(train.axes)
    own = stage_of(stage, strategy, optimizer, terms, interval, total)
    make = states.make_init(toy_model.init, own)
    target = states.abstract(make, mesh, rules)
    initial = jax.tree.map(np.array, states.create(make, target, rng.key(0, "init")))
    step = steps.make_train_step(own, target, mesh, seed=0, rules=rules)
    return initial, step, mesh, target


def build(stage=2, strategy="joint", optimizer=OPTIMIZER, train=ONE, terms=None, interval=0, total=20):
    """(state, step, mesh, target) of the toy; the state is the caller's own."""
    initial, step, mesh, target = compiled(stage, strategy, optimizer, train, terms, interval, total)
    # A jitted copy: a buffer that is shared with numpy cannot be donated.
    homes = jax.tree.map(lambda x: x.sharding, target)
    state = jax.tree.map(lambda x, home: jax.device_put(x, home), initial, homes)
    return jax.tree.map(jnp.copy, state), step, mesh, target


def run(state, step, mesh, count, first=0):
    history = []
    for i in range(first, first + count):
        state, metrics = step(state, sharding.put_batch(mesh, toy_model.batch(i)))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def values(tree):
    return [np.array(x) for x in jax.tree.leaves(tree)]


def same_bits(a, b):
    return all(x.tobytes() == y.tobytes() for x, y in zip(values(a), values(b), strict=True))


@pytest.mark.parametrize("stage", [1, 2])
def test_learns(stage):
    state, step, mesh, _ = build(stage)
    state, history = run(state, step, mesh, 20)
    assert int(state.step) == 20
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert set(state.params["params"]) == ({"vae"} if stage == 1 else {"vae", "dit"})


def test_no_recompilation():
    traces = []

    def terms(*args):
        traces.append(1)
        return toy_model.stage1_terms(*args)

    state, step, mesh, _ = build(1, terms=terms)
    state, _ = run(state, step, mesh, 1)
    before = len(traces)
    run(state, step, mesh, 3, first=1)
    assert len(traces) == before


def test_accumulation_is_exact():
    one, four = (build(2, optimizer=dataclasses.replace(OPTIMIZER, accumulation=n)) for n in (1, 4))
    (state1, history1), (state4, history4) = run(*one[:3], 3), run(*four[:3], 3)
    for first, second in zip(history1, history4, strict=True):
        np.testing.assert_allclose([*second.values()], [*first.values()], rtol=1e-5, atol=1e-6)
    for a, b in zip(values(state1.params), values(state4.params), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


def test_weights_of_microbatches_cost_no_model():
    def dots(accumulation):
        state, step, mesh, _ = build(2, optimizer=dataclasses.replace(OPTIMIZER, accumulation=accumulation))
        compiled = step.lower(state, sharding.put_batch(mesh, toy_model.batch(0))).compile()
        return compiled.as_text().count(" dot(")

    assert dots(4) == dots(1) > 0


@pytest.mark.parametrize(
    "axes, name",
    [
        (AxesConfig(), "adamw"),
        (AxesConfig(embed="data", vocab="fsdp", mlp="", heads=""), "adamw"),
        (AxesConfig(), "muon"),
    ],
)
def test_mesh_does_not_change_losses(axes, name):
    optimizer = dataclasses.replace(OPTIMIZER, name=name)
    _, one = run(*build(2, optimizer=optimizer)[:3], 20)
    train = TrainConfig(mesh_data=2, mesh_fsdp=2, mesh_tensor=2, axes=axes)
    state, step, mesh, target = build(2, train=train, optimizer=dataclasses.replace(optimizer, accumulation=2))
    kernel = state.params["params"]["dit"]["layers"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, axes.embed or None, axes.mlp or None)
    state, eight = run(state, step, mesh, 20)
    np.testing.assert_allclose([h["loss"] for h in eight], [h["loss"] for h in one], rtol=2e-5)
    moments = [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith("dit/layers/kernel") and x.ndim
    ]
    assert len(moments) == (1 if name == "muon" else 2) and {x.sharding for x in moments} == {kernel.sharding}


def test_loss_is_the_weighted_mean_over_the_batch():
    state, step, mesh, _ = build(1)
    params = jax.tree.map(np.array, state.params)
    data = toy_model.batch(0)
    keys = rng.key(0, "train", 0, sample=jnp.arange(8))
    term = toy_model.stage1_terms(params, data, keys)["reconstruction"]
    expected = np.sum(np.asarray(term.value, np.float64)) / np.sum(term.weight)
    _, history = run(state, step, mesh, 1)
    np.testing.assert_allclose(history[0]["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_guard_keeps_the_last_good_state(bad):
    def terms(params, batch, keys, frozen):
        # 7 as the very first segment marks the batch that fails.
        poisoned = batch["segment_ids"][0, 0] == 7
        if bad == "loss":
            value = jnp.where(poisoned, jnp.inf, 0.0)
        else:  # the square root of 0 is 0, its slope is not finite
            weight = jnp.sum(params["params"]["dit"]["layers"]["kernel"] ** 2)
            value = jnp.sqrt(jnp.where(poisoned, 0.0, 1.0) * weight)
        found = toy_model.stage2_terms(params, batch, keys, frozen)
        return found | {"poison": Term(jnp.full(8, value), jnp.ones(8), 1.0)}

    state, step, mesh, _ = build(2, terms=terms, optimizer=dataclasses.replace(OPTIMIZER, ema=0.9))
    state, _ = run(state, step, mesh, 2)
    good = jax.tree.map(np.array, state.replace(finite=None))
    data = toy_model.batch(2)
    data["segment_ids"][0, 0] = 7
    state, metrics = step(state, sharding.put_batch(mesh, data))
    assert metrics["finite"] == 0
    assert np.isfinite(float(metrics["loss"])) == (bad == "gradient")
    state, metrics = step(state, sharding.put_batch(mesh, toy_model.batch(3)))
    assert metrics["finite"] == 0 and int(state.step) == 2
    assert same_bits(good, state.replace(finite=None))


def test_noise_follows_the_step_of_the_run():
    state, step, mesh, target = build(1)
    data = sharding.put_batch(mesh, toy_model.batch(0))
    state, first = step(state, data)  # at a rate of 0: the parameters stay
    _, second = step(state, data)
    assert float(first["loss"]) != float(second["loss"])
    later = steps.make_train_step(stage_of(1), target, mesh, seed=0, first_step=1)
    _, offset = later(build(1)[0], data)
    assert float(offset["loss"]) == float(second["loss"])


def test_moving_average():
    state, step, mesh, _ = build(2, strategy="fix_vae", optimizer=dataclasses.replace(OPTIMIZER, ema=0.5))
    expected = np.array(state.params["params"]["dit"]["layers"]["kernel"])
    for i in range(3):
        state, _ = run(state, step, mesh, 1, first=i)
        decay = min(0.5, (1 + i) / (10 + i))
        expected = decay * expected + (1 - decay) * np.array(state.params["params"]["dit"]["layers"]["kernel"])
    used = states.evaluation_params(state)["params"]
    np.testing.assert_allclose(used["dit"]["layers"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    assert same_bits(used["vae"], state.params["params"]["vae"])


def test_stage_two_starts_from_stage_one():
    first, step, mesh, _ = build(1)
    first, _ = run(first, step, mesh, 2)
    vae = first.params["params"]["vae"]
    make = states.make_init(toy_model.init, stage_of(2))
    target = states.abstract(make, mesh)
    second = states.create(make, target, rng.key(0, "init"), {"vae": vae})
    assert same_bits(second.params["params"]["vae"], vae)
    assert same_bits(second.frozen["reference"]["params"]["vae"]["encoder"], vae["encoder"])
    fresh = states.create(make, target, rng.key(0, "init"))
    assert not same_bits(fresh.params["params"]["vae"], vae)
    assert int(second.step) == 0


def test_evaluation_sums_over_batches():
    state, _, mesh, _ = build(1)
    evaluate = steps.make_eval_step(toy_model.stage1_terms, mesh, seed=0)
    batches = [toy_model.batch(i) for i in range(2)]
    sums = [evaluate(state.params, {}, sharding.put_batch(mesh, b), i) for i, b in enumerate(batches)]
    found = steps.summarize(sums)
    terms = [
        toy_model.stage1_terms(state.params, b, rng.key(0, "evaluate", i, sample=jnp.arange(8)))
        for i, b in enumerate(batches)
    ]
    value = sum(np.sum(t["reconstruction"].value) for t in terms)
    weight = sum(np.sum(t["reconstruction"].weight) for t in terms)
    np.testing.assert_allclose(found["reconstruction"], value / weight, rtol=1e-5)
    np.testing.assert_allclose(found["loss"], value / weight, rtol=1e-5)
    assert "power" in found


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 1)])
def test_evaluation_in_microbatches_is_that_of_the_whole_batch(sizes):
    """Draws of examples too; and no microbatch is as large as the batch."""
    rows = []

    def terms(params, batch, keys, frozen):
        rows.append(len(batch["tokens"]))
        return toy_model.stage2_terms(params, batch, keys)

    names = ("mesh_data", "mesh_fsdp", "mesh_tensor")
    train = TrainConfig(**dict(zip(names, sizes, strict=True)))
    state, _, mesh, _ = build(2, train=train)
    batch = sharding.put_batch(mesh, toy_model.batch(0))
    whole = steps.make_eval_step(toy_model.stage2_terms, mesh, seed=0)(state.params, {}, batch, 1)
    parts = steps.make_eval_step(terms, mesh, seed=0, microbatches=2)(state.params, {}, batch, 1)
    assert set(rows) == {4}
    found, expected = (steps.summarize([sums]) for sums in (parts, whole))
    assert found.keys() == expected.keys() and expected["flow"] > 0
    np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=1e-6)


def test_held_out_batches_are_divided_as_in_training():
    rows = []

    def terms(params, batch, keys, frozen):
        rows.append(len(batch["tokens"]))
        return toy_model.stage1_terms(params, batch, keys)

    state, _, mesh, _ = build(1)
    stage = stage_of(1, optimizer=dataclasses.replace(OPTIMIZER, accumulation=4), terms=terms)
    trainer.HeldOut(stage, mesh, 0)(state.params, {}, [sharding.put_batch(mesh, toy_model.batch(0))])
    assert set(rows) == {2}


def test_logsnr_from_latent_powers():
    means = steps.add_derived({"latent_signal": jnp.asarray(1.0), "latent_noise": jnp.asarray(0.1)})
    np.testing.assert_allclose(means["logsnr"], np.log(10.0), rtol=1e-6)


def guarded(limit, factor=0.0):
    """A step whose loss is multiplied by the first token of the batch, and its state with a guard."""
    optimizer = dataclasses.replace(OPTIMIZER, max_skipped=limit, spike_factor=factor, ema=0.9)
    mesh = sharding.make_mesh(ONE)

    def terms(params, batch, keys, frozen):
        scale = batch["scale"][0, 0]
        found = toy_model.stage1_terms(params, batch, keys)
        return {name: term._replace(value=term.value * scale) for name, term in found.items()}

    own = stage_of(1, optimizer=optimizer, terms=terms, total=100)
    make = states.make_init(toy_model.init, own)
    target = states.abstract(make, mesh)
    step = steps.make_train_step(own, target, mesh, seed=0)

    def advance(state, number, scale=1.0):
        batch = toy_model.batch(number) | {"scale": np.full((8, 1), scale, np.float32)}
        return step(state, sharding.put_batch(mesh, batch))

    return states.create(make, target, rng.key(0, "init")), advance


def test_skipped_updates_change_nothing_but_the_step():
    state, advance = guarded(limit=2)
    state, _ = advance(state, 0)
    before = jax.tree.map(np.array, (state.params, state.opt_state, state.ema))
    for number, scale in ((1, np.nan), (2, np.inf)):
        state, metrics = advance(state, number, scale)
        assert metrics["finite"] == 1 and metrics["skipped"] == number
        assert same_bits((state.params, state.opt_state, state.ema), before)
    assert int(state.step) == 3 and int(state.guard.in_row) == 2
    state, metrics = advance(state, 3)
    assert metrics["skipped"] == 2 and int(state.guard.in_row) == 0 and int(state.guard.applied) == 2
    # What the optimizer counts are the updates it has seen: this was its second.
    assert metrics["learning_rate"] == pytest.approx(0.01)
    assert not same_bits(state.params, before[0])
    for number in (4, 5):
        state, metrics = advance(state, number, np.nan)
    held = jax.tree.map(np.array, state)
    state, metrics = advance(state, 6, np.nan)
    assert metrics["finite"] == 0 and same_bits(state.replace(finite=held.finite), held)
    state, metrics = advance(state, 7)  # nothing moves any more, even where all would be well
    assert metrics["finite"] == 0 and same_bits(state.replace(finite=held.finite), held)


def test_spikes_are_skipped_once_an_average_is_known():
    state, advance = guarded(limit=1, factor=4.0)
    norms = []
    for number in range(20):
        state, metrics = advance(state, number, 20.0 if number == 3 else 1.0)  # too early to be called a spike
        norms.append(float(metrics["grad_norm"]))
        assert metrics["skipped"] == 0
    assert float(state.guard.norm) == pytest.approx(np.mean(norms), rel=1e-5)
    average = float(state.guard.norm)
    state, metrics = advance(state, 20, 50.0)
    assert metrics["skipped"] == 1 and metrics["grad_norm"] > 4 * average
    assert float(state.guard.norm) == average
    state, metrics = advance(state, 21)
    assert metrics["skipped"] == 1 and metrics["finite"] == 1
    state, _ = advance(state, 22, 50.0)
    state, metrics = advance(state, 23, 50.0)
    assert metrics["finite"] == 0 and int(state.step) == 23


def test_norms_by_part_add_up():
    state, step, mesh, _ = build(2)
    _, (_, metrics) = run(state, step, mesh, 2)  # the first update has a rate of 0
    for norm in ("grad_norm", "update_norm"):
        parts = [metrics[f"{norm}/{group}"] for group in ("vae", "dit")]
        assert metrics[norm] == pytest.approx(np.hypot(*parts), rel=1e-5) and min(parts) > 0
