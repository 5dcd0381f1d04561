"""What a run has saved, for those who do not resume its training: the parameters of a checkpoint, verified."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from flax import traverse_util

from cola_jax import config as configs
from cola_jax import families, paths
from cola_jax.train import verified
from cola_jax.types import LazyArray, Params, PyTree, UserError

_RELEASED_PARTS = ("cola_vae", "cola_dit")


class Saved(NamedTuple):
    """A checkpoint of a run."""

    config: configs.Config
    variables: Params  # the moving average where there is one
    tokenizer_path: Path
    tokenizer: str  # its name and hash, from the data fingerprint
    stage: str  # the stage's directory
    step: int


def stage_directory(path: str | Path) -> tuple[Path, list[int]]:
    """The directory of the last stage of a run that has saved a step, and its steps, newest first.

    Args:
      path: the run's directory, or that of one of its stages.

    Raises:
      UserError: nothing is saved there.
    """
    path = Path(path).absolute()
    if steps := verified.step_directories(path):
        return path, steps
    for directory in sorted(path.glob("stage*"), reverse=True):
        if steps := verified.step_directories(directory):
            return directory, steps
    raise UserError(f"{path}: no checkpoint here; it must be the directory of a run with stage1/<step>")


def fetched(path: str | Path, field: str, step: int | None = None) -> Path:
    """The directory of a run, of one of its stages, or a released one: where it is, or a copy of it out of a bucket.

    Of a run in a bucket only one checkpoint is copied: ``step``, or the newest of the last stage.

    Args:
      path: the directory.
      field: the flag or field that it was given for.
      step: of the last stage.

    Raises:
      UserError: nothing is there, or it cannot be read from here.
      TemporaryError: the network failed.
    """
    if not paths.scheme(path):
        return Path(path)
    url = str(path).rstrip("/")
    names = paths.listed(url, field)
    stages = sorted((name for name in names if name.startswith("stage")), reverse=True)
    inside = ""
    if any(name.isdigit() for name in names):  # of a stage
        url, _, inside = url.rpartition("/")
        stages = [inside]
    with paths.reaching(path, field):
        found = (
            (stage, numbers)
            for complete in (True, False)  # of a model that was converted no step has the mark of its end
            for stage in stages
            if (numbers := verified.step_directories(epath.Path(f"{url}/{stage}"), complete))
        )
        stage, numbers = next(found, ("", []))
    if numbers:
        newest = _steps_to_try(Path(url.rpartition("/")[2]) / stage, numbers, step)[0]
        folders = {(stage, str(newest))}
    else:
        folders = {(name,) for name in names if name in _RELEASED_PARTS}
    if not folders:
        raise UserError(f"{field} = {path}: no checkpoint here; it must be the directory of a run with stage1/<step>")

    def wanted(name: PurePosixPath) -> bool:
        return (
            len(name.parts) == 1
            and name.suffix in (".json", ".model")
            or any(name.parts[: len(folder)] == folder for folder in folders)
        )

    return paths.fetched(url, field, wanted) / inside


def _steps_to_try(directory: Path, steps: list[int], step: int | None) -> list[int]:
    if step is None:
        return steps
    if step not in steps:
        there = ", ".join(map(str, sorted(steps)))
        raise UserError(f"--step = {step}: {directory} has no such checkpoint; it must be one of {there}")
    return [step]


def _find(path: str | Path, step: int | None, load: Callable, report: Callable[[str], None], verify=lambda _: None):
    """(stage's directory, step, what ``load`` made of it) of the asked step, or of the newest that is intact."""
    directory, steps = stage_directory(path)
    steps = _steps_to_try(directory, steps, step)
    found = verified.newest_valid(directory, load, report, verify, steps)
    if found is None:
        raise UserError(f"checkpoint {directory}: none of the steps {steps} can be read")
    return directory, *found


def load(path: str | Path, step: int | None = None, report: Callable[[str], None] = print) -> Saved:
    """The parameters of a run, on the first device.

    Args:
      path: a run's directory, whose last stage is read, or the directory of one stage.
      step: a step of that stage; None: the newest that passes verification.
      report: called with one line for each damaged step that is skipped.

    Raises:
      UserError: there is no checkpoint, not this step, or none that passes verification.
    """
    home = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def load_step(place: Path) -> tuple[dict, dict]:
        body, items = verified.read_meta(place), {}
        for item in ("params", "ema"):
            target = _targets(body, item, lambda name: home)
            items |= {item: verified.read_arrays(place / item, target)} if target else {}
        return body, items

    def verify(loaded: tuple[dict, dict]) -> str | None:
        return verified.mismatch(loaded[1], loaded[0]["hashes"])

    directory, found, (body, items) = _find(path, step, load_step, report, verify)
    return _saved(directory, found, body, {**items["params"], **items.get("ema", {})})


def load_groups(
    path: str | Path, targets: Mapping[str, PyTree], report: Callable[[str], None] = print
) -> dict[str, PyTree]:
    """Some groups of a run's parameters, each array where its target lives; nothing else is read.

    Args:
      path: as in `load`.
      targets: {group: tree of ShapeDtypeStructs with shardings}.
      report: as in `load`.

    Raises:
      UserError: as `load`; a group is not there, or an array of it has another shape.
    """
    wanted = traverse_util.flatten_dict(dict(targets), sep="/")

    def load_step(place: Path) -> tuple[dict, dict]:
        body = verified.read_meta(place)
        _check_groups(place, body, wanted)
        items = {}
        for item in ("params", "ema"):
            names = set(body["arrays"].get(item, {})) & set(wanted)
            if item == "params":  # the moving average, where there is one, replaces the parameters
                names -= set(body["arrays"].get("ema", {}))
            target = _targets(body, item, lambda name: wanted[name].sharding, names)
            items |= {item: verified.read_arrays(place / item, target, partial=True)} if target else {}
        return body, items

    def verify(loaded: tuple[dict, dict]) -> str | None:
        return verified.mismatch(loaded[1], loaded[0]["hashes"])

    _, _, (_, items) = _find(path, None, load_step, report, verify)
    arrays = {name: array for item in items.values() for name, array in item.items()}
    return traverse_util.unflatten_dict(arrays, sep="/")


def _check_groups(place: Path, body: dict, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raises UserError unless a step holds the wanted groups in the wanted shapes."""
    given = {name: shape for name, (shape, _) in body["arrays"]["params"].items()}
    there = sorted({name.partition("/")[0] for name in given})
    for group in sorted({name.partition("/")[0] for name in wanted}):
        if group not in there:
            raise UserError(f"checkpoint {place}: holds no parameters {group!r}; it has {', '.join(there)}")
        names = {name for name in (*given, *wanted) if name.partition("/")[0] == group}
        for name in sorted(names):
            shapes = given.get(name), list(wanted[name].shape) if name in wanted else None
            if shapes[0] != shapes[1]:
                raise UserError(f"checkpoint {place}: {name} is {shapes[0]}, this run needs {shapes[1]}")


def open_lazily(path: str | Path, step: int | None = None, report: Callable[[str], None] = print) -> Saved:
    """`load`, with each array a `LazyArray` that is read and verified when it is asked for.

    Raises:
      UserError: there is no checkpoint, or none whose description can be read; later, a damaged array.
    """
    home = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    directory, found, body = _find(path, step, verified.read_meta, report)
    place = directory / str(found)

    def read(item: str, name: str, target: jax.ShapeDtypeStruct) -> jax.Array:
        try:
            array = verified.read_arrays(place / item, {name: target}, partial=True)[name]
            intact = verified.hashes({item: {name: array}})[item][name] == body["hashes"][item][name]
        except Exception as error:  # a damaged file raises whatever its reader raises
            raise UserError(f"checkpoint {place}: {item} {name} cannot be read: {verified.one_line(error)}") from None
        if not intact:
            raise UserError(f"checkpoint {place}: {item} {name} does not match its hash")
        return array

    arrays = {}
    for item in ("params", "ema"):
        for name, target in _targets(body, item, lambda name: home).items():
            arrays[name] = LazyArray(target.shape, target.dtype, functools.partial(read, item, name, target))
    return _saved(directory, found, body, arrays)


def _targets(body: dict, item: str, sharding: Callable, names=None) -> dict[str, jax.ShapeDtypeStruct]:
    """What to restore of an item: its arrays (or those of ``names``) with their shardings."""
    return {
        name: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=sharding(name))
        for name, (shape, dtype) in body["arrays"].get(item, {}).items()
        if names is None or name in names
    }


def _saved(directory: Path, step: int, body: dict, arrays: dict) -> Saved:
    variables = {"params": traverse_util.unflatten_dict(arrays, sep="/")}
    config, tokenizer = families.parse(body["config"]), body["fingerprint"].get("tokenizer", "")
    return Saved(config, variables, directory.parent / "tokenizer.model", tokenizer, directory.name, step)
