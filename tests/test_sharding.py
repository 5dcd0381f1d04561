import importlib
import json
import logging
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from cola_jax import families, sharding
from cola_jax.config import MESH_AXES, AxesConfig, TrainConfig
from cola_jax.train import state as states
from cola_jax.types import UserError

CUBE = TrainConfig(mesh_data=2, mesh_fsdp=2, mesh_tensor=2)


def box(shape, *names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ((0, 1, 1), (8, 1, 1)),
        ((0, 2, 2), (2, 2, 2)),
        ((2, 0, 1), (2, 4, 1)),
        ((1, 1, 1), (1, 1, 1)),
        ((3, 1, 1), (3, 1, 1)),
    ],
)
def test_mesh_sizes(sizes, expected):
    mesh = sharding.make_mesh(TrainConfig(mesh_data=sizes[0], mesh_fsdp=sizes[1], mesh_tensor=sizes[2]))
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), expected, strict=True))


@pytest.mark.parametrize("sizes", [(0, 3, 1), (4, 4, 1), (16, 1, 1)])
def test_mesh_that_does_not_fit(sizes):
    with pytest.raises(UserError, match=r"config.train.mesh_\*.*8 devices"):
        sharding.make_mesh(TrainConfig(mesh_data=sizes[0], mesh_fsdp=sizes[1], mesh_tensor=sizes[2]))


def test_mesh_of_some_devices():
    assert sharding.make_mesh(TrainConfig(), jax.devices()[:3]).shape["data"] == 3


@pytest.mark.parametrize(
    "shape, names, expected",
    [
        ((4, 8, 6), ("layers", "embed", "mlp"), (None, "fsdp", "tensor")),
        ((8, 3, 4, 2), ("embed", None, "heads", "kv"), ("fsdp", None, "tensor", None)),
        ((10, 8), ("vocab", "embed"), ("tensor", "fsdp")),
        ((8, 5), ("batch", "length"), (("data", "fsdp"), None)),
        ((8,), ("latent",), (None,)),
    ],
)
def test_rules(shape, names, expected):
    mesh = sharding.make_mesh(CUBE)
    assert sharding.shardings(box(shape, *names), mesh).spec == PartitionSpec(*expected)


def test_rules_of_a_config():
    mesh, rules = (
        sharding.make_mesh(CUBE),
        sharding.make_rules(AxesConfig(embed="data", time="fsdp", heads="", kv="tensor")),
    )
    assert sharding.shardings(box((4, 8, 6), "layers", "embed", "mlp"), mesh, rules).spec == PartitionSpec(
        None, "data", "tensor"
    )
    assert sharding.shardings(box((8, 4, 2), "time", "heads", "kv"), mesh, rules).spec == PartitionSpec(
        "fsdp", None, "tensor"
    )
    with sharding.activate(mesh, rules), pytest.raises(ValueError, match="'fsdp' twice"):
        jax.eval_shape(lambda x: sharding.constrain(x, "batch", "time"), jnp.ones((8, 8)))


@pytest.mark.parametrize(
    "axes, message",
    [
        ({"embed": "model"}, "axes.embed = 'model': must be one of '', 'data', 'fsdp', 'tensor'"),
        ({"mlp": "fsdp"}, "axes.mlp = 'fsdp': must be one of '', 'tensor'"),
        ({"embed": "tensor"}, "axes.embed = 'tensor': must be another axis than that of vocab, mlp, heads"),
        ({"kv": "tensor"}, "axes.heads = 'tensor': must be another axis than that of kv"),
    ],
)
def test_rules_that_cannot_be(axes, message):
    with pytest.raises(UserError, match=message):
        families.parse({"train": {"axes": axes}})


def test_unknown_name_is_an_error():
    mesh = sharding.make_mesh(CUBE)
    with pytest.raises(ValueError, match="'hidden'.*has no rule"):
        sharding.shardings({"kernel": box((8, 8), "embed", "hidden")}, mesh)
    with pytest.raises(ValueError, match="'tensor' twice"):
        sharding.shardings({"kernel": box((8, 8), "heads", "mlp")}, mesh)
    with pytest.raises(ValueError, match="do not fit"):
        sharding.partition_spec(("embed",), (8, 8), mesh)


def test_dimension_that_is_not_divided_is_replicated_and_logged_once(caplog):
    mesh = sharding.make_mesh(CUBE)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert sharding.shardings(box((8, 7), "embed", "mlp"), mesh).spec == PartitionSpec("fsdp", None)
    assert len([r for r in caplog.records if "'mlp' of size 7 is replicated" in r.getMessage()]) == 1


@pytest.mark.parametrize(
    ("shape", "names", "expected"),
    [
        ((8, 7), ("embed", "vocab"), (("fsdp", "tensor"), None)),
        ((7, 8), ("vocab", "embed"), (None, ("fsdp", "tensor"))),
        ((7, 6), ("vocab", "embed"), (None, "fsdp")),  # 6 is not divided by 4
        ((7, 5), ("vocab", "embed"), (None, None)),
        ((7,), ("vocab",), (None,)),
        ((7, 8), ("vocab", "latent"), (None, None)),
        ((6, 8), ("vocab", "embed"), ("tensor", "fsdp")),  # as ever
    ],
)
def test_a_vocabulary_that_is_not_divided_leaves_its_axis_to_the_width(caplog, shape, names, expected):
    sharding._report_undivided.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert sharding.shardings(box(shape, *names), sharding.make_mesh(CUBE)).spec == PartitionSpec(*expected)
    moved = "'vocab' of size 7 'embed' is divided instead: mesh axis 'tensor' of 2 does not divide it"
    assert (moved in caplog.text) == (("fsdp", "tensor") in expected)


def test_no_large_parameter_of_the_full_size_is_whole_along_the_tensor_axis():
    """100,278 entries and the mask token, on meshes whose tensor axis divides neither."""
    config = families.parse(importlib.import_module("configs.paper_2b").get_config())
    model = families.cola.make_model(config)
    make = states.make_init(families.cola.make_init(model, config), families.cola.make_stages(model, config)[0])
    for sizes in ((1, 4, 4), (2, 2, 8)):
        target = states.abstract(make, AbstractMesh(sizes, MESH_AXES))
        vocabulary = [leaf for leaf in jax.tree.leaves(target) if leaf.size > 1e8]
        assert len(vocabulary) == 6  # embedding and head, and two moments of each
        for leaf in vocabulary:
            assert leaf.size == sizes[1] * sizes[2] * np.prod(leaf.sharding.shard_shape(leaf.shape))


def test_boxes_are_removed():
    mesh = sharding.make_mesh(CUBE)
    tree = {"a": box((8,), "embed"), "b": jax.ShapeDtypeStruct((3,), jnp.int32)}
    found = sharding.shardings(tree, mesh)
    assert found["a"].spec == PartitionSpec("fsdp") and found["b"].spec == PartitionSpec()


def test_batch():
    mesh = sharding.make_mesh(CUBE)
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    placed = sharding.put_batch(mesh, {"tokens": rows})["tokens"]
    np.testing.assert_array_equal(placed, rows)
    assert placed.sharding == sharding.batch_sharding(mesh) and placed.addressable_shards[0].data.shape == (2, 3)
    with pytest.raises(UserError, match="config.data.batch_size = 6: must be a multiple of 4"):
        sharding.put_batch(mesh, {"tokens": rows[:6]})
    with pytest.raises(UserError, match="multiple of 16 .*optimizer2.accumulation = 4"):
        sharding.check_batch(8, 4, mesh, "optimizer2.accumulation")


def test_constrain_acts_only_on_a_mesh():
    x = jnp.ones((8, 4, 6))
    assert sharding.constrain(x, "batch", None, "mlp") is x
    mesh = sharding.make_mesh(CUBE)

    @jax.jit
    def f(x):
        with sharding.activate(mesh):
            y = nn.with_logical_constraint(x * 2, ("batch", None, "embed"))
            return sharding.constrain(x, "batch", None, "mlp"), y

    ours, linen = f(jax.device_put(x, sharding.replicated(mesh)))
    assert ours.sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert linen.sharding.spec[0] == ("data", "fsdp")
    with pytest.raises(ValueError, match="no rule"), sharding.activate(mesh):
        sharding.constrain(x, "batch", None, "channels")


class _Device:
    """Looks like a device to the functions that lay out meshes."""

    def __init__(self, index, process, slice_index, platform):
        self.id, self.process_index, self.slice_index, self.platform = index, process, slice_index, platform
        self.device_kind = platform

    def __repr__(self):
        return str(self.id)


@pytest.mark.parametrize(
    "platform, sizes, axis",
    [("gpu", (2, 4, 1), 0), ("gpu", (1, 8, 1), 1), ("gpu", (4, 1, 2), 0), ("cpu", (2, 2, 2), 0), ("cpu", (1, 4, 2), 1)],
)
def test_slices_and_nodes_are_crossed_by_one_axis(platform, sizes, axis):
    """Two islands of four: along every other axis, and inside each half of that one, devices share an island."""
    devices = [_Device(i, i // 4 if platform == "gpu" else 0, i // 4, platform) for i in range(8)]
    found = np.moveaxis(sharding.arrange(sizes, devices), axis, 0)
    islands = np.vectorize(lambda device: device.id // 4)(found)
    half = len(islands) // 2
    assert found.shape[0] == sizes[axis] and len({d.id for d in found.flat}) == 8
    assert len(set(islands[:half].flat)) == len(set(islands[half:].flat)) == 1
    assert islands[0].flat[0] != islands[-1].flat[0]


def test_every_parameter_of_the_full_size_lies_where_it_should():
    """The golden file has the partition of each parameter and of its moments on data 2 x fsdp 4 x tensor 2."""
    config = families.parse(importlib.import_module("configs.paper_2b").get_config())
    mesh = AbstractMesh((2, 4, 2), MESH_AXES)
    model = families.cola.make_model(config)
    stage = families.cola.make_stages(model, config)[1]
    target = states.abstract(states.make_init(families.cola.make_init(model, config), stage), mesh)

    def specs(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}

    found = specs(target.params["params"])
    shown = {name: f"{list(leaf.shape)} {tuple(leaf.sharding.spec)}" for name, leaf in found.items()}
    path = Path(__file__).parent / "golden" / "full_size_shardings.json"
    assert shown == json.loads(path.read_text())
    large = {name: leaf for name, leaf in found.items() if leaf.size > 5e6}
    assert all(set(jax.tree.leaves(tuple(leaf.sharding.spec))) & {"fsdp", "tensor"} for leaf in large.values())
    moments = specs(target.opt_state)
    for name, leaf in found.items():
        same = [value for key, value in moments.items() if key.endswith("." + name)]
        assert len(same) == 2 and all(value.sharding.spec == leaf.sharding.spec for value in same), name
