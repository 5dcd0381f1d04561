"""Checkpoints that are verified when read: parameters, optimizer, data position and config of one step together.

A step directory holds the items "params", "ema" (if there is one), "training" (step, optimizer, frozen trees, guard),
"meta" (config, data position, data fingerprint, a hash of every array, a checksum of itself) and "files" (checksums of
the files of the others). Orbax writes it under a temporary name and renames it, or in a bucket marks it at the end, so
a process killed at any time leaves the earlier steps as they were. What proves that a step is intact is in `verified`.
"""

import asyncio
import json
import math
from collections.abc import Callable, Collection
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, CustomSteps, LatestN

from cola_jax import config as configs
from cola_jax import paths
from cola_jax.train import verified
from cola_jax.train.state import TrainState
from cola_jax.types import LazyArray, Params, Place, PyTree, TemporaryError, UserError

_COMMIT_TIMEOUT = 1200  # seconds that a process waits for the others to have written their part of a step
_ARRAY_ITEMS = ("params", "ema", "training")


def _flat(tree: PyTree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _items(state: TrainState) -> dict[str, dict]:
    """The arrays of a state (or of its abstract form), by item and name."""
    training = {"step": state.step, "opt_state": state.opt_state, "guard": state.guard, **state.frozen}
    items = {"params": _flat(state.params["params"]), "training": _flat(training)}
    return items if state.ema is None else {**items, "ema": _flat(state.ema)}


def _check_shapes(path: Place, items: dict[str, dict[str, jax.ShapeDtypeStruct]], saved: dict) -> None:
    """Raises UserError that names the first array whose name, shape or type is not the model's."""
    if set(items) != set(saved):
        raise UserError(f"checkpoint {path}: holds {sorted(saved)}, this run needs {sorted(items)}")
    for item, arrays in items.items():
        for name in sorted(set(arrays) | set(saved[item])):
            needs = [list(arrays[name].shape), str(arrays[name].dtype)] if name in arrays else None
            holds = saved[item].get(name)
            if needs != holds:
                raise UserError(f"checkpoint {path}: {item} {name} is {holds}, this run needs {needs}")


class Checkpoints:
    """The checkpoints of one stage: saved in the background, verified when restored.

    Kept are the newest ``keep`` and those of the steps ``milestones``.
    """

    def __init__(
        self, directory: Place, keep: int, report: Callable[[str], None] = print, milestones: Collection[int] = ()
    ):
        self.directory = paths.directory(directory, "directory")
        self._report, self._keep, self._milestones = report, keep, sorted(milestones)
        # Made by the first save: it cleans up in a thread, which must not outlive a run that fails at its start.
        self._manager: ocp.CheckpointManager | None = None
        paths.make(self.directory)

    def _make_manager(self) -> ocp.CheckpointManager:
        handlers = {item: ocp.StandardCheckpointHandler() for item in _ARRAY_ITEMS}
        return ocp.CheckpointManager(
            self.directory,
            # "files" is the last: it sees the others complete.
            item_handlers={**handlers, "meta": ocp.JsonCheckpointHandler(), "files": verified.FilesHandler()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(self._keep), CustomSteps(self._milestones)]),
                # What a killed process left half written; finished steps have no temporary name.
                cleanup_tmp_directories=True,
                lightweight_initialize=True,
                async_options=ocp.AsyncOptions(timeout_secs=_COMMIT_TIMEOUT),
            ),
        )

    def save(self, step: int, state: TrainState, *, config: configs.Config, fingerprint: dict, data: str) -> None:
        """Begins to save a step; the state may be donated as soon as this returns.

        Args:
          step: updates done.
          state: the state after them.
          config: of the run.
          fingerprint: of the data (`pipeline.fingerprint`).
          data: the position in the data, as JSON; the same for all processes.

        Raises:
          TemporaryError: this or the previous save failed (the disk is full, for example).
        """
        items = _items(state)
        body = {
            "config": configs.to_dict(config),
            "fingerprint": fingerprint,
            "data": data,
            "hashes": verified.hashes(items),
            "arrays": {k: {n: [list(x.shape), str(x.dtype)] for n, x in v.items()} for k, v in items.items()},
            "files": True,
        }
        body = json.loads(json.dumps(body))  # what will be read back: tuples are lists
        arguments = {item: ocp.args.StandardSave(arrays) for item, arrays in items.items()}
        meta = ocp.args.JsonSave({"body": body, "checksum": verified.checksum(body)})
        self._manager = self._manager or self._make_manager()
        try:
            self._manager.save(
                step, args=ocp.args.Composite(**arguments, meta=meta, files=verified.FilesSave()), force=True
            )
        except Exception as error:
            place = self.directory / str(step)
            raise TemporaryError(f"checkpoint {place}: not saved: {verified.one_line(error)}") from error

    def wait(self) -> None:
        """Returns when what was saved is on disk; raises TemporaryError if it could not be written."""
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise TemporaryError(f"checkpoint {self.directory}: not saved: {verified.one_line(error)}") from error

    def close(self) -> None:
        """Waits and frees the background threads."""
        self.wait()
        if self._manager is not None:
            self._manager.close()

    def restore(self, target: TrainState) -> tuple[int, TrainState, dict] | None:
        """The newest step that passes verification; None if nothing was ever saved.

        A step that fails is reported in one line; it and what is newer than the restored step are moved to
        ``rejected/`` beside the stage, since the run will save those steps again.

        Args:
          target: the state as abstract arrays with shardings (`state.abstract`), of any mesh.

        Returns:
          The step, the state, and the meta item: config, fingerprint, data.

        Raises:
          UserError: arrays differ from the target's in name, shape or type, or no step passes.
        """
        items = _items(target)

        def load(path: Place) -> tuple[dict, dict]:
            body = verified.read_meta(path)
            _check_shapes(path, items, body["arrays"])
            if body.get("files"):  # steps from before there were checksums of files have none
                verified.check_files(path)
            return body, {k: verified.read_arrays(path / k, v) for k, v in items.items()}

        def verify(loaded: tuple[dict, dict]) -> str | None:
            return verified.mismatch(loaded[1], loaded[0]["hashes"])

        steps = verified.step_directories(self.directory)
        found = verified.newest_valid(self.directory, load, self._report, verify)
        if found is None:
            if steps:
                raise UserError(f"checkpoint {self.directory}: none of the steps {steps} can be read; move them away")
            return None
        step, (body, arrays) = found
        self._set_aside([other for other in steps if other > step])
        return step, _rebuild(target, arrays), body

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        # Beside the stages: what is in a stage's directory, in a bucket and without Orbax's mark, Orbax removes.
        rejected = self.directory.parent / "rejected"
        if jax.process_index() == 0:
            paths.make(rejected)
            for step in steps:
                names = (f"{self.directory.name}-{step}-{number}" for number in range(1, 10**6))
                place = next(rejected / name for name in names if not (rejected / name).exists())
                paths.move(self.directory / str(step), place)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("rejected checkpoints")
        if self._manager is not None:
            self._manager.reload()


def _rebuild(target: TrainState, arrays: dict[str, dict[str, jax.Array]]) -> TrainState:
    def fill(tree, values, prefix=""):
        names = [prefix + name for name in _flat(tree)]
        return jax.tree.unflatten(jax.tree.structure(tree), [values[name] for name in names])

    training = arrays["training"]
    return TrainState(
        step=training["step"],
        params={"params": fill(target.params["params"], arrays["params"])},
        opt_state=fill(target.opt_state, training, "opt_state/"),
        ema=None if target.ema is None else fill(target.ema, arrays["ema"]),
        frozen={name: fill(tree, training, f"{name}/") for name, tree in target.frozen.items()},
        finite=jax.jit(lambda: jnp.ones((), bool), out_shardings=target.finite.sharding)(),
        guard=None if target.guard is None else fill(target.guard, training, "guard/"),
    )


class _LazyHandler(ocp.type_handlers.ArrayHandler):
    """Writes `LazyArray`s one after another, so that memory holds one at a time."""

    def __init__(self, note: Callable[[str, jax.Array], None]):
        super().__init__(array_metadata_store=None, enable_write_sharding_file=False)
        self._note = note

    async def serialize(self, values, infos, args=None):
        for value, info, arg in zip(values, infos, args, strict=True):
            array = value.read()
            self._note(info.name, array)
            for written in await super().serialize([array], [info], [arg]):
                await asyncio.to_thread(written.result)
        return []


def save_params(
    directory: Place,
    step: int,
    params: Params,
    config: configs.Config,
    tokenizer: str,
    progress: Callable[[int, int], None],
) -> None:
    """Writes the variables of a model as one step that `saved.load` reads; training cannot resume from it.

    Args:
      directory: of the stage; the caller sees to it that it gets its name when it is complete.
      step: name of the step.
      params: variables whose leaves are `LazyArray`s.
      config: of the run that could have made them.
      tokenizer: its name and fingerprint, or "" if it is not known.
      progress: called with (bytes done, bytes in all) as each array begins to be written.

    Raises:
      UserError: they cannot be written (the disk is full, for example).
    """
    arrays, hashes, done = _flat(params["params"]), {}, 0
    total = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays.values())

    def note(name: str, array: jax.Array) -> None:
        nonlocal done
        hashes[name] = verified.hashes({"params": {name: array}})["params"][name]
        done += array.nbytes
        progress(done, total)

    place = Path(directory).absolute() / str(step)
    types = [(LazyArray, _LazyHandler(note)), (jax.Array, ocp.type_handlers.ArrayHandler())]
    registry = ocp.type_handlers.create_type_handler_registry(*types)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
            checkpointer.save(place / "params", args=ocp.args.PyTreeSave(arrays))
        body = {
            "config": configs.to_dict(config),
            "fingerprint": {"tokenizer": tokenizer},
            "data": "",
            "hashes": {"params": hashes},
            "arrays": {"params": {name: [list(x.shape), x.dtype.name] for name, x in arrays.items()}},
        }
        body = json.loads(json.dumps(body))
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            checkpointer.save(
                place / "meta", args=ocp.args.JsonSave({"body": body, "checksum": verified.checksum(body)})
            )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"checkpoint {place}: not saved: {verified.one_line(error)}") from error
