"""`config.train.init_from`: all groups of another run or of a released checkpoint, or some of them."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_model
import toy_run

from cola_jax import release, sharding
from cola_jax.config import AxesConfig, TrainConfig
from cola_jax.families import cola
from cola_jax.train import initialise, loop, saved
from cola_jax.train import state as states
from cola_jax.train.trainer import Monitors, Trainer
from cola_jax.types import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny"
STEPS, ONE, EIGHT = 3, (1, 1, 1), (2, 2, 2)


def config(first: int, second: int, init_from="", mesh=ONE, **stage2):
    axes = dict(zip(("mesh_data", "mesh_fsdp", "mesh_tensor"), mesh, strict=True))
    prior = {"steps": second, "strategy": "fix_vae", "reference_weight": 0.0} | stage2
    return toy_model.config(
        stage1={"steps": first},
        stage2=prior,
        optimizer1={"ema": 0.5},
        train={"init_from": init_from, "eval_every": 100} | axes,
    )


def train(directory, asked):
    return loop.train(asked, directory, toy_run.experiment(asked), None, lambda line: None)


def begun(directory, asked):
    """The trainer of stage 2 before its first step."""
    mesh = sharding.make_mesh(asked.train)
    with Monitors(asked, directory, None, 2) as monitors:
        with Trainer(toy_run.experiment(asked), 1, directory, mesh, monitors, print, None) as trainer:
            trainer.begin(initialise.load(asked.train.init_from, trainer.target.params["params"]))
            return trainer


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), dict(a), dict(b))


def differs(a, b) -> bool:
    return any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The directory of a run that has trained stage 1 alone."""
    directory = tmp_path_factory.mktemp("vae")
    train(directory, config(STEPS, 0))
    return directory


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The directory of a run that has trained both groups."""
    directory = tmp_path_factory.mktemp("both")
    train(directory, config(STEPS, STEPS))
    return directory


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """{group: parameters} as they are drawn where nothing is given."""
    asked = config(0, 2, strategy="scratch")
    return begun(tmp_path_factory.mktemp("fresh"), asked).state.params["params"]


def test_one_path_is_for_all_groups(both, fresh, tmp_path):
    found = begun(tmp_path, config(0, 2, str(both))).state.params["params"]
    expected = saved.load(both).variables["params"]
    assert set(expected) == {"vae", "dit"}
    same(found, expected)
    assert differs(found["vae"], fresh["vae"]) and differs(found["dit"], fresh["dit"])


@pytest.mark.parametrize("whole", [False, True], ids=["the run's directory", "its stage's"])
def test_the_vae_of_another_run_serves_a_new_prior(vae, fresh, tmp_path, whole):
    path = str(vae / "stage1" if whole else vae)
    found = begun(tmp_path, config(0, 2, {"vae": path})).state.params["params"]
    same(found["vae"], saved.load(vae).variables["params"]["vae"])  # its moving average
    same(found["dit"], fresh["dit"])


def test_a_prior_trains_on_it_and_resumes(vae, fresh, tmp_path):
    asked = config(0, STEPS, {"vae": str(vae)})
    state = train(tmp_path, asked)
    same(state.params["params"]["vae"], saved.load(vae).variables["params"]["vae"])
    assert differs(state.params["params"]["dit"], fresh["dit"])
    assert not (tmp_path / "stage1").exists()
    same(train(tmp_path, asked).params, state.params)  # the same command on the same directory
    with pytest.raises(UserError, match="holds a run with another config .*train.init_from"):
        train(tmp_path, config(0, STEPS, "."))
    assert saved.load(tmp_path).config.train.init_from == {"vae": str(vae)}


def test_two_runs_give_a_group_each(vae, both, tmp_path):
    asked = config(0, 2, {"vae": str(vae), "dit": str(both)})
    found = begun(tmp_path, asked).state.params["params"]
    same(found["vae"], saved.load(vae).variables["params"]["vae"])
    same(found["dit"], saved.load(both).variables["params"]["dit"])


@pytest.mark.slow
def test_stage_1_begins_from_it_and_stage_2_from_stage_1(vae, both, tmp_path):
    """What is given for the prior waits until stage 1 is done."""
    asked = config(1, 1, {"vae": str(vae), "dit": str(both)})
    tiny = {"learning_rate": 1e-12, "warmup_steps": 0, "weight_decay": 0.0}
    asked = dataclasses.replace(
        asked,
        optimizer1=dataclasses.replace(asked.optimizer1, **tiny),
        optimizer2=dataclasses.replace(asked.optimizer2, **tiny),
    )
    found = train(tmp_path, asked).params["params"]
    expected = {"vae": saved.load(vae).variables["params"]["vae"], "dit": saved.load(both).variables["params"]["dit"]}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-9), dict(found), expected)


@pytest.mark.parametrize("mesh", [ONE, EIGHT])
def test_arrays_are_where_their_targets_live(vae, fresh, tmp_path, mesh):
    asked = config(0, 2, {"vae": str(vae)}, mesh)
    trainer = begun(tmp_path, asked)
    given = initialise.load(asked.train.init_from, trainer.target.params["params"])
    for found, target in ((given["vae"], trainer.target.params["params"]["vae"]), (trainer.state, trainer.target)):
        jax.tree.map(
            lambda x, t: (x.sharding == t.sharding) or pytest.fail(f"{x.sharding}, {t.sharding}"), found, target
        )
    split = [not x.sharding.is_fully_replicated for x in jax.tree.leaves(given)]
    assert any(split) == (mesh == EIGHT)
    same(trainer.state.params["params"]["vae"], saved.load(vae).variables["params"]["vae"])
    same(trainer.state.params["params"]["dit"], fresh["dit"])


@pytest.mark.slow
def test_a_run_on_eight_devices_begins_from_one_of_one(vae, tmp_path):
    one, eight = (
        train(tmp_path / name, config(0, 2, {"vae": str(vae)}, mesh)) for name, mesh in (("one", ONE), ("eight", EIGHT))
    )
    same(eight.params["params"]["vae"], saved.load(vae).variables["params"]["vae"])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), dict(one.params), dict(eight.params)
    )


@functools.cache
def released_target(mesh, **axes):
    asked = cola.released_config(release.read_model(GOLDEN), eos_id=0, pad_id=0)
    model = cola.make_model(asked)
    make = states.make_init(cola.make_init(model, asked), cola.make_stages(model, asked)[1])
    sizes = TrainConfig(**dict(zip(("mesh_data", "mesh_fsdp", "mesh_tensor"), mesh, strict=True)))
    rules = sharding.make_rules(AxesConfig(**axes))
    return states.abstract(make, sharding.make_mesh(sizes), rules).params["params"]


@pytest.mark.parametrize("axes", [{}, {"embed": "", "mlp": ""}], ids=["usual", "others"])
def test_a_released_checkpoint_on_eight_devices(axes):
    target, expected = released_target(EIGHT, **axes), release.load(GOLDEN)[1]["params"]
    found = initialise.load(str(GOLDEN), target)
    same(found, expected)
    jax.tree.map(lambda x, t: (x.sharding == t.sharding) or pytest.fail(f"{x.sharding}, {t.sharding}"), found, target)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(found))


def test_only_the_named_part_of_a_released_checkpoint_is_read(monkeypatch):
    read, place = [], release._place
    monkeypatch.setattr(release, "_place", lambda leaf, *rest: read.append(leaf.path) or place(leaf, *rest))
    found = initialise.load({"dit": str(GOLDEN)}, released_target(ONE))
    assert set(found) == {"dit"} and len(read) == len(jax.tree.leaves(found))


def refused(init_from, target=None) -> str:
    with pytest.raises(UserError) as caught:
        initialise.load(init_from, target or released_target(ONE))
    message = str(caught.value)
    assert message.startswith(f"config.train.init_from = {init_from!r}: ") and "\n" not in message
    return message


def test_what_cannot_be_begun_from(vae, both, tmp_path):
    target = begun(tmp_path / "target", config(0, 2, strategy="scratch")).target.params["params"]
    assert refused({"decoder": str(vae)}, target).endswith("'decoder' must be a parameter group, of dit, vae")
    message = refused(str(vae), target)
    assert message.endswith("stage1/3: holds no parameters 'dit'; it has vae")
    assert "holds no parameters 'dit'; it has vae" in refused({"vae": str(both), "dit": str(vae)}, target)
    nowhere = str(tmp_path / "nowhere")
    assert f"{nowhere}: no checkpoint here" in refused(nowhere, target)
    assert f"{nowhere}: no checkpoint here" in refused({"dit": nowhere}, target)
    assert "needs" in refused({"vae": str(both)})  # other shapes
    assert "needs" in refused({"vae": str(GOLDEN)}, target)
    assert initialise.load("", target) == {} == initialise.load({}, target)


def test_a_group_that_is_missing_stops_the_run_before_it_trains(vae, tmp_path):
    with pytest.raises(UserError, match="holds no parameters 'dit'; it has vae"):
        train(tmp_path, config(0, 2, str(vae)))
    assert not (tmp_path / "metrics.jsonl").exists()
    with pytest.raises(UserError, match="config.train.init_from = .*must be a path"):
        config(0, 2, {"vae": 3})
    with pytest.raises(UserError, match=r"config.stage1.steps = 0: must be at least 1 \(stage2.strategy = 'fix_vae'"):
        config(0, 2, {"dit": str(vae)})
