"""Checkpoints in the released layout (SPEC 9): read into a model and its parameters, and written from them.

A directory holds ``cola_vae/`` and ``cola_dit/``, each with config.json and model.safetensors (or several files and
model.safetensors.index.json), and often a tokenizer.json. Both directions go tensor by tensor and are exact to the
bit: float32 holds bfloat16 and float16. What the files hold beyond model and parameters (metadata, types, the stored
rotary frequencies) is what `origin` reads and `save` takes back.
"""

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, Sharding

from cola_jax import paths, sharding
from cola_jax.models import cola
from cola_jax.released import files, layout, options
from cola_jax.released.options import DIT, PARTS, VAE
from cola_jax.types import LazyArray, Params, PyTree, UserError

TOKENIZER = "tokenizer.json"
# (bytes done, bytes in all)
Progress = Callable[[int, int], None]
_GROUPS = {VAE: "vae", DIT: "dit"}
# Stored frequencies are rounded once more in a file of a narrower type.
_TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-9}


def is_released(path: str | os.PathLike) -> bool:
    """Whether a directory has the released layout, or one of its two parts."""
    return any((Path(path) / part).is_dir() for part in PARTS)


def read_model(path: str | os.PathLike, dtype="float32") -> cola.ColaDLM:
    """The model of a released directory from its two config files alone.

    Args:
      path: the directory.
      dtype: compute type.

    Raises:
      UserError: a part or field that is missing or not supported.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"{root}: not a directory: must be one with {VAE}/ and {DIT}/")
    for part in PARTS:
        if not (root / part).is_dir():
            raise UserError(f"{root / part}: missing: a released checkpoint has {VAE}/ and {DIT}/")
    file = {part: root / part / "config.json" for part in PARTS}
    vae = options.vae_config(files.read_json(file[VAE]), file[VAE])
    dit = options.dit_config(files.read_json(file[DIT]), file[DIT])
    options.check_pair(vae, dit, file[DIT])
    return cola.create(vae, dit, dtype)


@functools.lru_cache(maxsize=4)  # tracing takes a second
def abstract(model: cola.ColaDLM) -> PyTree:
    """Shapes of a model's parameters, boxed with their logical axes; nothing is computed."""
    tokens = jnp.zeros((1, model.dit_config.block_size * model.vae_config.patch_size), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def _check_frequencies(weights: files.Weights, name: str, model: cola.ColaDLM) -> None:
    """Raises UserError if a stored buffer is not the one that the config's rotary embedding has."""
    expected = layout.frequencies(model.dit_config)
    weights.require(name, expected.shape)
    stored = weights.read(name)
    if not np.allclose(stored.astype(np.float32), expected, rtol=_TOLERANCE[stored.dtype.name], atol=0):
        raise UserError(
            f"{weights.file(name)}: tensor {name} does not hold the frequencies of rope_dim = "
            f"{model.dit_config.rope_dim} and theta = {model.dit_config.rope_theta:g}"
        )


def _checked_weights(folder: Path, part: str, model: cola.ColaDLM, leaves: list[layout.Leaf]) -> files.Weights:
    """The opened weights of a part, every tensor accounted for."""
    weights = files.Weights(folder)
    used = set(layout.frequency_names(part, model.dit_config))
    for leaf in leaves:
        used.update(leaf.names)
        for name in leaf.names:
            weights.require(name, leaf.released_shape)
    if extra := sorted(set(weights.specs) - used):
        raise UserError(f"{weights.file(extra[0])}: tensor {extra[0]} has no place in a model of this config")
    for name in layout.frequency_names(part, model.dit_config):
        if name in weights.specs:
            _check_frequencies(weights, name, model)
    return weights


def _key(index: tuple, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(entry.indices(size)[:2] for entry, size in zip(index, shape, strict=True))


def _place(leaf: layout.Leaf, weights: files.Weights, dtype: np.dtype, target: Sharding) -> jax.Array:
    """One parameter, each shard of it filled from one tensor at a time."""
    indices = target.addressable_devices_indices_map(leaf.shape).values()
    shards = {}
    for index in indices:
        key = _key(index, leaf.shape)
        if key not in shards:
            shards[key] = np.empty([stop - start for start, stop in key], dtype)
    for layer, name in enumerate(leaf.names):
        value = leaf.to_ours(weights.read(name))
        for key, shard in shards.items():
            rest = tuple(slice(start, stop) for start, stop in (key[1:] if leaf.stacked else key))
            if not leaf.stacked:
                shard[...] = value[rest]
            elif key[0][0] <= layer < key[0][1]:
                shard[layer - key[0][0]] = value[rest]
    return jax.make_array_from_callback(leaf.shape, target, lambda index: shards[_key(index, leaf.shape)])


def open_lazily(
    path: str | os.PathLike, *, dtype="float32", param_dtype="float32", mesh: Mesh | None = None
) -> tuple[cola.ColaDLM, Params]:
    """`load`, with each parameter a `LazyArray` that is read, onto its devices, when it is asked for.

    Everything that does not need the values is checked here.
    """
    root = Path(path)
    param_dtype = files.dtype_of(jnp.dtype(param_dtype).name, "param_dtype")
    model = read_model(root, dtype)
    boxed = abstract(model)
    if mesh is None:
        home = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        targets = jax.tree.map(lambda _: home, nn.unbox(boxed))
    else:
        targets = sharding.shardings(boxed, mesh)
    found = {}
    for part in PARTS:
        group = _GROUPS[part]
        leaves = layout.leaves(part, nn.unbox(boxed)[group])
        weights = _checked_weights(root / part, part, model, leaves)
        places = traverse_util.flatten_dict(targets[group], sep="/")
        for leaf in leaves:
            read = functools.partial(_place, leaf, weights, param_dtype, places[leaf.path])
            found[f"{group}/{leaf.path}"] = LazyArray(leaf.shape, param_dtype, read)
    return model, {"params": traverse_util.unflatten_dict(found, sep="/")}


def load(
    path: str | os.PathLike, *, dtype="float32", param_dtype="float32", mesh: Mesh | None = None
) -> tuple[cola.ColaDLM, Params]:
    """Model and parameters of a released directory.

    Besides the parameters there is never more than the largest of them in memory.

    Args:
      path: the directory; in a bucket (gs://) it is copied to this machine first.
      dtype: compute type of the model.
      param_dtype: type of the parameters; float32 holds every released type exactly.
      mesh: None: all on the first device. Given: each shard goes where `cola_jax.sharding` puts it.

    Raises:
      UserError: a part, tensor or option that is missing or does not fit; one line that names file and tensor.
    """
    model, lazy = open_lazily(paths.fetched(path, "path"), dtype=dtype, param_dtype=param_dtype, mesh=mesh)
    leaves, structure = jax.tree.flatten(lazy)
    sizes = [int(np.prod(leaf.shape)) for leaf in leaves]
    # The largest first: what is in flight besides the parameters is most when they are few.
    for index in np.argsort(sizes, kind="stable")[::-1]:
        leaves[index] = jax.block_until_ready(leaves[index].read())
    return model, jax.tree.unflatten(structure, leaves)


def origin(path: str | os.PathLike) -> dict:
    """What the files of a released directory hold beyond model and parameters, as JSON can hold it.

    Returns:
      For each part: ``config`` (the file as it is), ``dtypes`` (of each tensor), ``frequencies`` (each stored
      rotary buffer, float32).
    """
    found = {}
    model = read_model(path)
    for part in PARTS:
        weights = files.Weights(Path(path) / part)
        buffers = [name for name in layout.frequency_names(part, model.dit_config) if name in weights.specs]
        found[part] = {
            "config": files.read_json(Path(path) / part / "config.json"),
            "dtypes": {name: spec.dtype.name for name, spec in sorted(weights.specs.items())},
            "frequencies": {name: weights.read(name).astype(np.float32).tolist() for name in buffers},
        }
    return found


def _specs(part: str, leaves: list[layout.Leaf], model: cola.ColaDLM, dtype, kept: dict) -> dict[str, files.Spec]:
    shapes = {name: leaf.released_shape for leaf in leaves for name in leaf.names}
    stored = layout.frequency_names(part, model.dit_config)
    if kept:  # a file without the buffers stays without
        stored = [name for name in stored if name in kept["frequencies"]]
    shapes |= {name: layout.frequencies(model.dit_config).shape for name in stored}
    types = {} if dtype is not None else kept.get("dtypes", {})
    default = np.dtype(np.float32) if dtype is None else dtype
    return {
        name: files.Spec(files.dtype_of(types[name], name) if name in types else default, shape)
        for name, shape in shapes.items()
    }


def specs(model: cola.ColaDLM, dtype="float32") -> dict[str, dict[str, files.Spec]]:
    """Type and shape of every tensor that `save` writes for a model, by part and name; nothing is computed."""
    shapes = nn.unbox(abstract(model))
    dtype = files.dtype_of(jnp.dtype(dtype).name, "dtype")
    return {part: _specs(part, layout.leaves(part, shapes[_GROUPS[part]]), model, dtype, {}) for part in PARTS}


def _checked_params(model: cola.ColaDLM, params: Params) -> dict:
    """The parameters by path; raises UserError unless they are exactly the model's."""
    needed = traverse_util.flatten_dict(nn.unbox(abstract(model)), sep="/")
    given = traverse_util.flatten_dict(nn.unbox(params)["params"], sep="/")
    for name in sorted(set(needed) | set(given)):
        if name not in given or name not in needed:
            raise UserError(f"parameter {name}: {'missing' if name not in given else 'not one of this model'}")
        if tuple(given[name].shape) != needed[name].shape:
            raise UserError(f"parameter {name} has shape {given[name].shape}: the model needs {needed[name].shape}")
        if not getattr(given[name], "is_fully_addressable", True):
            raise UserError(f"parameter {name}: spread over processes; only one process can save it")
    return given


def _cast(value: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = value.astype(dtype)
    if dtype == np.float16 and not np.array_equal(np.isfinite(cast), np.isfinite(value)):
        raise UserError(f"tensor {name}: {np.max(np.abs(value)):.3g} does not fit into float16")
    return cast


def _tensors(leaves, given, part: str, model, kept: dict, specs_of_part) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of a part's tensors, one parameter after another."""
    for leaf in leaves:
        value = given[f"{_GROUPS[part]}/{leaf.path}"]
        value = value.read() if isinstance(value, LazyArray) else value
        if not isinstance(value, jax.Array) or len(value.sharding.device_set) == 1:
            value = np.asarray(value)  # a view; of an array on several devices it would be a copy
        for layer, name in enumerate(leaf.names):
            one = np.asarray(value[layer] if leaf.stacked else value)
            yield name, leaf.to_released(_cast(one, specs_of_part[name].dtype, name))
    frequencies = layout.frequencies(model.dit_config)
    for name in layout.frequency_names(part, model.dit_config):
        if name in specs_of_part:
            stored = np.asarray(kept.get("frequencies", {}).get(name, frequencies), np.float32)
            yield name, _cast(stored, specs_of_part[name].dtype, name)


def prepare_target(path: Path, needed: int, overwrite: bool) -> None:
    """Raises UserError unless a directory of this size can be made here."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file: it must be a directory, or a name that is free")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise UserError(f"{path}: not empty: must be a directory that is new or empty (or overwriting)")
        if others := sorted(entry.name for entry in path.iterdir() if entry.name not in (*PARTS, TOKENIZER)):
            raise UserError(f"{path}: holds {others[0]}: only a released checkpoint is overwritten")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror})") from None
    if free < needed:
        raise UserError(f"{path}: needs {needed / 1e9:.3f} GB of disk, {free / 1e9:.3f} GB are free")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``path`` at the end, or vanishes on an error.

    What ``path`` held before is removed only after the new directory has its name.

    Raises:
      UserError: the disk is full or cannot be written.
    """
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        temporary.chmod(0o755)
        yield temporary
        old = None
        if path.is_dir() and any(path.iterdir()):
            old = temporary.with_suffix(".replaced")
            path.rename(old)
        temporary.rename(path)
        if old is not None:
            shutil.rmtree(old)
    except OSError as error:
        raise UserError(f"{path}: not written: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _described(part: str, model: cola.ColaDLM, shapes: PyTree, dtype, origin_of: dict) -> tuple:
    """What a part will hold: (its leaves, what it came from, its tensors, its config file)."""
    leaves = layout.leaves(part, shapes[_GROUPS[part]])
    part_specs = _specs(part, leaves, model, dtype, origin_of)
    config = options.released_config(
        part,
        model.vae_config if part == VAE else model.dit_config,
        max(part_specs.values(), key=lambda spec: spec.nbytes).dtype.name,
        origin_of.get("config"),
    )
    return leaves, origin_of, part_specs, config


def save(
    path: str | os.PathLike,
    model: cola.ColaDLM,
    params: Params,
    *,
    dtype=None,
    kept: dict | None = None,
    tokenizer: str | os.PathLike | None = None,
    max_shard_size: int = 50 * 10**9,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes a released directory: all of it, or nothing under this name.

    Args:
      path: the directory, new or empty.
      model: its configs decide the layout.
      params: its variables, of any float type, on one device or sharded over those of this process, or lazy.
      dtype: float32, bfloat16 or float16; None: that of ``kept``, else float32.
      kept: what `origin` read from the directory that the model came from; None: metadata is ours.
      tokenizer: a tokenizer.json to put beside the parts.
      max_shard_size: bytes of a weights file; above it there are several and an index.
      overwrite: replace a released directory of this name.
      progress: called after each tensor.

    Raises:
      UserError: an option that the layout cannot express, parameters that are not the model's, a target that is
        not empty, too little disk.
    """
    path = paths.local(path, "path")
    for part, config in ((VAE, model.vae_config), (DIT, model.dit_config)):
        options.check_expressible(part, config)
    given = _checked_params(model, params)
    dtype = None if dtype is None else files.dtype_of(jnp.dtype(dtype).name, "dtype")
    if max_shard_size < 1:
        raise UserError(f"max_shard_size = {max_shard_size}: must be at least 1 byte")
    kept, shapes = kept or {}, nn.unbox(abstract(model))
    parts = {part: _described(part, model, shapes, dtype, kept.get(part, {})) for part in PARTS}
    needed = files.total_bytes(part_specs for _, _, part_specs, _ in parts.values())
    prepare_target(path, needed, overwrite)
    total, done = sum(spec.nbytes for _, _, part, _ in parts.values() for spec in part.values()), 0

    def report(tensor: tuple[str, np.ndarray]) -> tuple[str, np.ndarray]:
        nonlocal done
        done += tensor[1].nbytes
        if progress is not None:
            progress(done, total)
        return tensor

    with new_directory(path) as temporary:
        for part, (leaves, origin_of, part_specs, config) in parts.items():
            folder = temporary / part
            folder.mkdir()
            files.write_json(folder / "config.json", config)
            tensors = _tensors(leaves, given, part, model, origin_of, part_specs)
            files.write(folder, part_specs, map(report, tensors), max_shard_size)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / TOKENIZER)
