"""What proves that a checkpoint is as it was written: a hash of every array, a checksum of every file.

Orbax has no checksums over arrays: one flipped bit would load silently. The hash of an array does not depend on the
mesh; the checksums cover what the arrays do not need, such as Orbax's own descriptions.
"""

import errno
import gc
import json
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from cola_jax import paths
from cola_jax.train import distributed, interrupts
from cola_jax.types import Place, TemporaryError, UserError

_FILES = "files.json"
_COMMITTED = "commit_success.txt"  # Orbax's last file of a step
# Larger files hold arrays, which have hashes: reading them once more would double the time of a restore.
_LARGEST_SUMMED = 64 * 2**20
_LARGEST_SUMMED_FAR = 2**20  # in a bucket, which has checksums of its own


def _array_hash(x: jax.Array) -> jax.Array:
    """``sum_i w_i x_i`` over the bits of the elements, modulo 2^32, with odd pseudo-random weights w_i.

    Integer sums do not depend on order, so every mesh and number of processes gives the same value; odd weights
    make the change of any one bit visible.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    index, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    mixed = index * jnp.uint32(0x9E3779B1)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA77)
    return jnp.sum(bits * (mixed | jnp.uint32(1)), dtype=jnp.uint32)


_hash = jax.jit(_array_hash)


def hashes(items: dict[str, dict[str, jax.Array]]) -> dict[str, dict[str, int]]:
    """The hash of every array by item and name; of global arrays in all processes together.

    One array after another: what XLA's CPU backend needs besides is as large as what it hashes.
    """
    return {item: {name: int(_hash(x)) for name, x in arrays.items()} for item, arrays in items.items()}


def checksum(body: dict) -> int:
    """CRC-32 of a JSON-able value."""
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def one_line(error: BaseException) -> str:
    """Type and first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def step_directories(directory: Place, complete: bool = True) -> list[int]:
    """The steps saved under a stage's directory, newest first.

    In a bucket, where a directory has its name from its first file on, those that were saved to their end; all, unless
    ``complete``.
    """
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if path.name.isdigit()]
    if complete and paths.scheme(directory):
        found = [path for path in found if (path / _COMMITTED).exists()]
    return sorted((int(path.name) for path in found), reverse=True)


def newest_valid(
    directory: Place,
    load: Callable[[Place], Any],
    report: Callable[[str], None],
    verify: Callable[[Any], str | None] = lambda _: None,
    steps: list[int] | None = None,
):
    """``(step, load(path of the step))`` of the newest step that all processes can read, or None; reports the others.

    Args:
      directory: of the stage.
      load: reads the files of a step; raises anything if they are damaged, UserError if they do not fit. No
        collective operation: one process may fail alone.
      report: called with one line for each step that is skipped.
      verify: what is wrong with what was loaded, or None; all processes come to the same result together.
      steps: which to try, newest first; None: all.

    Raises:
      UserError: from ``load``.
      TemporaryError: the processes do not see the same steps (a file system that is late: `workdir.claim` has seen that
        they share it); or a step could not be read now, which says nothing of its files (`interrupts.is_temporary`; an
        input/output error may be a bad sector, which stays, so that it counts as damage).
    """
    steps = step_directories(directory) if steps is None else steps
    if not distributed.same(steps):
        raise TemporaryError(
            f"checkpoint {directory}: the processes do not see the same steps; all must see one directory"
        )
    hook = sys.unraisablehook
    # Orbax abandons coroutines when a file is damaged, and Python would print a traceback for each.
    sys.unraisablehook = lambda _: None
    try:
        for step in steps:
            found, failure, away = None, None, None
            try:
                found = load(directory / str(step))
            except UserError:
                raise
            except Exception as error:  # a damaged file raises whatever its reader raises
                failure = one_line(error)
                if interrupts.is_temporary(error, but=(errno.EIO,)) or paths.status(error) in (401, 403):
                    away = TemporaryError(f"checkpoint {directory / str(step)}: cannot be read now: {failure}")
            if distributed.all_true(failure is None):
                failure = verify(found)
                if failure is None:
                    return step, found
            del found
            gc.collect()
            if away is not None:
                raise away
            failure = failure or "another process cannot read it"
            report(f"checkpoint {directory / str(step)} is damaged and not used: {failure}")
        return None
    finally:
        gc.collect()
        sys.unraisablehook = hook


def read_meta(path: Place) -> dict:
    """The description of the step at ``path``, which has a checksum of itself; raises if it is damaged."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        meta = checkpointer.restore(path / "meta")
    if checksum(meta["body"]) != meta["checksum"]:
        raise ValueError("its description does not match its checksum")
    return meta["body"]


def read_arrays(path: Place, target: dict[str, jax.ShapeDtypeStruct], partial: bool = False) -> dict[str, jax.Array]:
    """The arrays of one item of a step by name, not yet verified; raises if a file is damaged.

    Each process reads what its own devices hold. The handler alone: a `Checkpointer` would then wait for the other
    processes, of which one may have failed. ``partial``: the item holds more arrays than the target.
    """
    handler = ocp.PyTreeCheckpointHandler() if partial else ocp.StandardCheckpointHandler()
    args = ocp.args.StandardRestore(target)
    if partial:
        how = {n: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype) for n, x in target.items()}
        args = ocp.args.PyTreeRestore(item=target, restore_args=how, partial_restore=True)
    try:
        return handler.restore(path, args=args)
    finally:
        handler.close()


def mismatch(items: dict[str, dict[str, jax.Array]], expected: dict[str, dict[str, int]]) -> str | None:
    """Names the first array whose hash is not the expected one."""
    for item, values in hashes(items).items():
        for name, value in values.items():
            if value != expected[item][name]:
                return f"{item} {name} does not match its hash"
    return None


def _file_sums(directory: Place, skip: str) -> dict[str, list[int]]:
    """Size and checksum of every file of the items under a step, by its path; a checksum of -1 was not computed."""
    largest = _LARGEST_SUMMED_FAR if paths.scheme(directory) else _LARGEST_SUMMED
    found = paths.sizes(directory)
    found = {name: found[name] for name in sorted(found) if len(name.parts) > 1 and name.parts[0] != skip}
    summed = [name for name, size in found.items() if size <= largest]
    sums = {name: zlib.crc32(content) for name, content in paths.contents(directory, summed)}
    return {name.as_posix(): [size, sums.get(name, -1)] for name, size in found.items()}


def check_files(path: Place) -> None:
    """Raises ValueError that names a file of a step that is not as it was when the step was committed.

    Each process looks at its share of the files; `newest_valid` has all of them agree.
    """
    saved, item = json.loads((path / "files" / _FILES).read_text()), "files"
    if checksum(saved["files"]) != saved["checksum"]:
        raise ValueError(f"{item}/{_FILES} does not match its checksum")
    mine = sorted(saved["files"])[jax.process_index() :: jax.process_count()]
    expected, there = {PurePosixPath(name): saved["files"][name] for name in mine}, paths.sizes(path)
    for name, (size, _) in expected.items():
        if name not in there:
            raise ValueError(f"{name} is missing")
        if there[name] != size:
            raise ValueError(f"{name} has {there[name]} bytes instead of {size}")
    for name, content in paths.contents(path, [name for name, (_, sum_) in expected.items() if sum_ >= 0]):
        if zlib.crc32(content) != expected[name][1]:
            raise ValueError(f"{name} does not match its checksum")


class FilesHandler(ocp.CheckpointHandler):
    """The last item of a step: checksums of the files of the others, written just before the step is committed."""

    def save(self, directory: os.PathLike, args: "FilesSave") -> None:
        """Nothing yet: the others are still being written."""

    def restore(self, directory: os.PathLike, args=None) -> None:
        """Nothing: see `check_files`."""

    def finalize(self, directory: os.PathLike) -> None:
        """In process 0, when the other items have their final names (Orbax: in the order of their registration)."""
        place = epath.Path(directory)
        files = _file_sums(place.parent, place.name)
        (place / _FILES).write_text(json.dumps({"files": files, "checksum": checksum(files)}))


@ocp.args.register_with_handler(FilesHandler, for_save=True, for_restore=True)
class FilesSave(ocp.args.CheckpointArgs):
    """Asks for the item of `FilesHandler`."""
