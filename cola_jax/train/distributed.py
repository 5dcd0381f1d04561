"""Runs of several processes: how they find each other, agree, and notice that one of them is lost.

Every process runs the same program over one mesh. Process 0 logs and writes; checkpoints are written by all of them
into one directory that all of them see.
"""

import functools
import os
import re
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cola_jax.train import interrupts
from cola_jax.types import TemporaryError, UserError

T = TypeVar("T")

JOIN_TIMEOUT = 300.0  # seconds that a process waits for the others to start
_COLLECTIVES = 16  # that a CPU device may wait in at a time: one of each loop that runs, and those are few
_SHUTDOWN_TIMEOUT = 60  # seconds that a process that is done waits for the others to be done
_LOST = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "Gloo", "Connection closed", "NCCL")


def reserve_threads(several: bool = False) -> None:
    """Gives XLA's CPU backend the threads to wait in its collectives. Before any use of a device.

    All virtual devices of a process share one pool, with a thread for each of them or for each core, and a collective
    holds its thread until the others come. Programs with two loops that run at the same time then block for ever, each
    device in another loop's collective; XLA aborts after 40 s. ``NPROC`` is what XLA reads; one that is set is kept.

    Args:
      several: whether other processes take part, so that one device has somebody to wait for.
    """
    flagged = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    devices = max(1, jax.config.jax_num_cpu_devices, *map(int, flagged))
    if several or devices > 1:
        os.environ.setdefault("NPROC", str(max(os.cpu_count() or 1, _COLLECTIVES * devices)))


def _cluster() -> dict | None:
    """What `jax.distributed.initialize` needs in a SLURM step of several tasks or on a TPU VM; None elsewhere."""
    environment = os.environ
    if environment.get("JAX_PLATFORMS", "").startswith("cpu") and "SLURM_STEP_NODELIST" not in environment:
        return None
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        found = {"cluster_detection_method": "slurm"}
        # JAX gives each task one GPU, the one of its local index: right for one task a GPU, wrong for one a node.
        gpus = environment.get("SLURM_GPUS_ON_NODE", "")
        if environment.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0] == "1" and gpus.isdigit():
            found["local_device_ids"] = list(range(int(gpus)))
        return found
    if "TPU_WORKER_HOSTNAMES" in environment or "TPU_ML_PLATFORM" in environment:
        return {}  # JAX asks the TPU VM
    return None


def _given(coordinator: str | None, process_count: int | None, process_id: int | None) -> dict:
    values = {"coordinator": coordinator, "process_count": process_count, "process_id": process_id}
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise UserError(f"--{missing[0]} is missing: --coordinator, --process_count, --process_id belong together")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator = {coordinator}: must be host:port of process 0")
    if process_count < 1:
        raise UserError(f"--process_count = {process_count}: must be a number of at least 1")
    if not 0 <= process_id < process_count:
        raise UserError(f"--process_id = {process_id}: must be a number from 0 to {process_count - 1}")
    return {
        "coordinator_address": coordinator,
        "num_processes": process_count,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",
    }


def _give_up(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(interrupts.RESTART)


def initialize(
    coordinator: str | None = None,
    process_count: int | None = None,
    process_id: int | None = None,
    timeout: float = JOIN_TIMEOUT,
) -> None:
    """Joins the other processes; on a single machine without arguments, nothing. Before any use of a device.

    Without arguments the processes are found on TPU VMs and in SLURM steps of several tasks.

    Args:
      coordinator: ``host:port`` of process 0, which listens there.
      process_count: how many processes there are.
      process_id: from 0 to ``process_count - 1``.
      timeout: seconds to wait for the others. If they do not join, the process ends with one line and the status that
        asks for another start (`interrupts.RESTART`): JAX itself would abort it.

    Raises:
      UserError: a value is not allowed.
      TemporaryError: JAX cannot start (a port or a device is taken, a machine is not there).
    """
    if timeout <= 0:
        raise UserError(f"--join_timeout = {timeout:g}: must be a positive number of seconds")
    given = (coordinator, process_count, process_id) != (None, None, None)
    arguments = _given(coordinator, process_count, process_id) if given else _cluster()
    if arguments is None:
        return
    reserve_threads(several=True)
    place = f"--coordinator = {coordinator}, process {process_id} of {process_count}" if given else "the cluster"
    message = f"{place}: not all processes joined within {timeout:g} s; all must be started at the same time"
    timer = threading.Timer(timeout, _give_up, [message])
    timer.daemon = True
    timer.start()
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        patience = {"initialization_timeout": int(timeout) + 60, "shutdown_timeout_seconds": _SHUTDOWN_TIMEOUT}
        jax.distributed.initialize(**arguments, **patience)
        jax.devices()  # the first use of a device waits for the others too
    except (RuntimeError, ValueError) as error:
        lines = str(error).splitlines() or [""]
        kind = UserError if isinstance(error, ValueError) else TemporaryError
        raise kind(f"{place}: {type(error).__name__}: {lines[0]}") from error
    finally:
        timer.cancel()


def all_true(value: bool) -> bool:
    """Whether ``value`` is true in every process. Every process calls it, in the same order."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.asarray(value, np.int32))))


@functools.cache
def _over_devices() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """A sharding with one row on each device, and the maximum over such rows, which every process has."""
    mesh = Mesh(np.asarray(jax.devices()), ("devices",))
    largest = jax.jit(functools.partial(jnp.max, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))
    return NamedSharding(mesh, PartitionSpec("devices")), largest


def any_true(*values: bool) -> jax.Array:
    """Which of some values are true in any process. Every process calls it, in the same order.

    Returns:
      Booleans [number of values] that are there when the computations before them are done: nobody waits for them here.
    """
    sharding, maximum = _over_devices()
    mine = np.asarray([values], bool)
    shape = (jax.device_count(), len(values))
    return maximum(jax.make_array_from_callback(shape, sharding, lambda index: mine))


def same(values: list[int], size: int = 64) -> bool:
    """Whether every process has the same list of integers (its first ``size`` are compared, and its length)."""
    if jax.process_count() == 1:
        return True
    padded = np.zeros(size + 1, np.int32)
    padded[0], padded[1 : 1 + len(values[:size])] = len(values), values[:size]
    gathered = multihost_utils.process_allgather(padded)
    return bool(np.all(gathered == gathered[:1]))


def first(make: Callable[[], T]) -> T:
    """``make()`` in process 0, then in the others: what it writes once, they find.

    Raises:
      UserError, TemporaryError: ``make`` raised it, or an OSError; in every process, whichever it was.
    """
    if jax.process_count() == 1:
        return make()
    result, error = None, None
    for turn in (True, False):
        if turn == (jax.process_index() == 0):
            try:
                result = make()
            except (UserError, TemporaryError, OSError) as caught:
                error = caught
        if not all_true(error is None):
            lasting = all_true(error is None or not interrupts.is_temporary(error))
            if error is not None:
                raise error
            raise (UserError if lasting else TemporaryError)("another process could not go on; it has said why")
    return result


def is_lost_peer(error: BaseException) -> bool:
    """Whether an exception of JAX says that another process is gone, rather than that something here is wrong."""
    return jax.process_count() > 1 and any(word in str(error) for word in _LOST)
