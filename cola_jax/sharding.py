"""Where arrays live: one mesh (data, fsdp, tensor), and rules from logical axis names to its axes.

Modules name the axes of their parameters and activations; only this file knows the mesh. The same code runs on
one device, on many, and in many processes.
"""

import contextlib
import functools
import logging

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from cola_jax.config import MESH_AXES, AxesConfig, TrainConfig, to_dict
from cola_jax.types import PyTree, UserError

BATCH_AXES = ("data", "fsdp")

# Logical axis names and the mesh axes that divide them.
Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]


def make_rules(config: AxesConfig) -> Rules:
    """Every logical name with its rule: a name without one is an error, never a silent replication."""
    chosen = [(name, axis or None) for name, axis in to_dict(config).items()]
    return (("batch", BATCH_AXES), *chosen, ("length", None), ("layers", None))


RULES = make_rules(AxesConfig())


def make_mesh(config: TrainConfig, devices=None) -> Mesh:
    """The mesh of ``mesh_data * mesh_fsdp * mesh_tensor`` devices; an axis of 0 takes all that are left.

    Args:
      config: sizes of the axes.
      devices: None for all devices of the run. Explicit sizes may use only the first of them.

    Raises:
      UserError: the sizes need more devices than there are, or do not divide their number, or leave out devices of
        a run of several processes.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.mesh_data, config.mesh_fsdp, config.mesh_tensor]
    fixed = int(np.prod([size for size in sizes if size]))
    if 0 in sizes:
        if len(devices) % fixed:
            raise UserError(
                f"config.train.mesh_* = {tuple(sizes)}: must be sizes whose product {fixed} divides the "
                f"{len(devices)} devices"
            )
        sizes[sizes.index(0)] = len(devices) // fixed
    total = int(np.prod(sizes))
    if total > len(devices):
        raise UserError(f"config.train.mesh_* = {tuple(sizes)}: must be a product of at most {len(devices)} devices")
    if total < len(devices) and jax.process_count() > 1:  # a process without devices in the mesh has nothing to do
        raise UserError(
            f"config.train.mesh_* = {tuple(sizes)}: must be a product of all {len(devices)} devices of "
            f"{jax.process_count()} processes"
        )
    # Auto axes: Linen's logical constraints raise on Explicit ones, the default of jax.make_mesh.
    return Mesh(arrange(tuple(sizes), devices[:total]), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def arrange(sizes: tuple[int, int, int], devices: list) -> np.ndarray:
    """Devices as an array of the mesh's sizes, so that the axes that communicate most have the fastest links.

    Where the devices are several TPU slices, or several GPU nodes, the data axis goes over them, or fsdp if data does
    not divide into them.
    """
    by_process = devices[0].platform == "gpu"
    islands = len({device.process_index if by_process else getattr(device, "slice_index", 0) for device in devices})
    axis = next((i for i in (0, 1) if sizes[i] % islands == 0), None)
    if islands == 1 or axis is None:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    across = [islands if i == axis else 1 for i in range(len(sizes))]
    within = [size // part for size, part in zip(sizes, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, process_is_granule=by_process, allow_split_physical_axes=True
    )


@functools.cache
def _report_undivided(name: str, size: int, axis: str, axis_size: int, instead: str | None) -> None:
    what = f"{instead!r} is divided instead" if instead else "is replicated"
    message = "logical axis %r of size %d %s: mesh axis %r of %d does not divide it"
    logging.getLogger(__name__).warning(message, name, size, what, axis, axis_size)


# Where a mesh axis goes that does not divide a dimension of a parameter, if it divides the other one: a vocabulary has
# whatever size its tokenizer has, and the largest parameters should not be whole on every device for that.
_INSTEAD = {"vocab": "embed"}


def _axes(rule: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (rule,) if isinstance(rule, str) else rule or ()


def partition_spec(names, shape, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> PartitionSpec:
    """The partition of an array whose axes have these logical names (None: not partitioned).

    A mesh axis that does not divide the dimension is dropped (small models), or moved from the vocabulary to the width
    of a parameter that has both. Either is logged once.

    Raises:
      ValueError: a name without a rule, or two names that want the same mesh axis.
    """
    known, used = dict(rules), []
    if len(names) != len(shape):
        raise ValueError(f"logical axes {tuple(names)} do not fit the shape {tuple(shape)}")
    for name in names:
        if name is not None and name not in known:
            raise ValueError(f"logical axis {name!r} in {tuple(names)} has no rule; known are {', '.join(known)}")
        for axis in _axes(known.get(name)):
            if axis in used:
                raise ValueError(f"logical axes {tuple(names)} use the mesh axis {axis!r} twice")
            used.append(axis)
    spec = [known.get(name) for name in names]

    def parts(*rules) -> int:
        return int(np.prod([mesh.shape[axis] for rule in rules for axis in _axes(rule)]))

    undivided = [i for i, size in enumerate(shape) if size % parts(spec[i])]
    for i in undivided:
        rule, spec[i] = spec[i], None
        other = names.index(_INSTEAD[names[i]]) if _INSTEAD.get(names[i]) in names else None
        if other is not None and (other in undivided or shape[other] % parts(spec[other], rule)):
            other = None
        _report_undivided(names[i], shape[i], str(rule), parts(rule), None if other is None else names[other])
        if other is not None:
            spec[other] = (*_axes(spec[other]), *_axes(rule))
    return PartitionSpec(*spec)


def shardings(boxed: PyTree, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> PyTree:
    """NamedShardings for a tree of abstract arrays, with the boxes of `nn.with_logical_partitioning` removed.

    Args:
      boxed: a tree from `jax.eval_shape`; leaves without a box are replicated.
      mesh: from `make_mesh`.
      rules: from `make_rules`.
    """

    def leaf(x):
        if isinstance(x, nn.Partitioned):
            # What an optimizer keeps nothing of has an empty node in its box.
            return jax.tree.map(lambda y: NamedSharding(mesh, partition_spec(x.names, y.shape, mesh, rules)), x.value)
        return replicated(mesh)

    return jax.tree.map(leaf, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples over all devices but those of the tensor axis."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch(batch_size: int, accumulation: int, mesh: Mesh, field: str = "optimizer.accumulation") -> None:
    """Raises UserError if the examples of a microbatch cannot be shared out evenly over the mesh."""
    parts = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    if batch_size % (parts * accumulation):
        raise UserError(
            f"config.data.batch_size = {batch_size}: must be a multiple of {parts * accumulation} "
            f"(mesh data * fsdp = {parts}, {field} = {accumulation})"
        )


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a batch this process's devices hold, in order: int64, 0 to B - 1.

    A process cannot know them from its number: devices along the tensor axis share rows.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in held.values()]))


def put_batch(mesh: Mesh, batch: dict, batch_size: int | None = None) -> dict:
    """Global arrays [B, ...] from numpy arrays of the rows that this process needs.

    Args:
      mesh: whose devices but those of the tensor axis share out the rows.
      batch: arrays [b, ...], of `local_rows`.
      batch_size: B; None: the arrays have all rows, the same in every process.
    """
    given = next(iter(batch.values())).shape[0]
    size = batch_size or given
    check_batch(size, 1, mesh)
    rows = np.arange(size) if given == size else local_rows(mesh, size)
    sharding = batch_sharding(mesh)

    def place(values: np.ndarray) -> jax.Array:
        def part(index) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            first = int(np.searchsorted(rows, start))
            return values[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback((size, *values.shape[1:]), sharding, part)

    return {name: place(values) for name, values in batch.items()}


@contextlib.contextmanager
def activate(mesh: Mesh, rules: Rules = RULES):
    """Makes `constrain` and Linen's logical constraints act on ``mesh`` while a function is traced."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(rules):
        yield


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Keeps an activation partitioned as its logical axis names say; outside `activate`, ``x`` as it is."""
    mesh, rules = jax.sharding.get_abstract_mesh(), nn.get_logical_axis_rules()
    if mesh.empty or not rules:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(names, x.shape, mesh, rules))


def active_spec(names, shape) -> PartitionSpec:
    """`partition_spec` on the mesh and with the rules of `activate`, inside of it."""
    return partition_spec(names, shape, jax.sharding.get_abstract_mesh(), nn.get_logical_axis_rules())


def active_axes(name: str) -> tuple[tuple[str, ...], int]:
    """The mesh axes that should divide a logical axis, and their devices, inside of `activate`; else ((), 1)."""
    mesh, rules = jax.sharding.get_abstract_mesh(), nn.get_logical_axis_rules()
    axes = () if mesh.empty or not rules else _axes(dict(rules)[name])
    return axes, int(np.prod([mesh.shape[axis] for axis in axes]))


def active_batch_axes(batch_size: int) -> tuple[str, ...]:
    """Axes of the mesh of `activate` that share so many examples out; () outside of it, or if they do not.

    Empty, too, where all of them have one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not nn.get_logical_axis_rules():
        return ()
    parts = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    return BATCH_AXES if parts > 1 and batch_size % parts == 0 else ()
