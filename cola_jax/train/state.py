"""The training state: everything that a step reads and writes."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from cola_jax import sharding
from cola_jax.families.interface import Stage
from cola_jax.train import optimizer as optimizers
from cola_jax.types import Key, Params, PyTree


@flax.struct.dataclass
class Guard:
    """What decides whether an update is applied or skipped (`OptimizerConfig.max_skipped`, ``spike_factor``)."""

    norm: PyTree  # float32 scalar: running average of the gradient norm over the applied updates
    applied: PyTree  # int32 scalar: updates in that average
    in_row: PyTree  # int32 scalar: updates skipped since the last applied one
    skipped: PyTree  # int32 scalar: updates skipped so far


@flax.struct.dataclass
class TrainState:
    """State after ``step`` updates, skipped ones included.

    ``finite`` becomes False with the first loss or gradient that is not finite and may not be skipped, and from then
    on the state stays as it is: the host may look late without losing the last good state.
    """

    # Any, not jax.Array: the same tree also holds abstract arrays and shardings.
    step: PyTree  # int32 scalar
    params: Params  # {"params": {group: ...}}, float32
    opt_state: PyTree  # of the trained groups
    ema: PyTree | None  # moving average of the trained groups
    frozen: dict[str, Params]  # what the stage's terms need as it was when the stage began: name -> variables
    finite: PyTree  # bool scalar
    guard: PyTree | None = None  # a Guard; None where no update may be skipped


def evaluation_params(state: TrainState) -> Params:
    """The variables to evaluate and sample with: the moving average where there is one."""
    return {"params": {**state.params["params"], **(state.ema or {})}}


def make_init(init: Callable[[Key], Params], stage: Stage) -> Callable[..., TrainState]:
    """A pure function ``(key, initial) -> TrainState`` to be traced, with the parameters' boxes still on.

    Args:
      init: variables of the whole model from a key, boxed with their logical axes.
      stage: which groups the state holds, which of them are trained and how, what is frozen.

    Returns:
      The function; ``initial`` is ``{group: parameters}`` that replace the fresh ones of these groups.
    """
    settings, optimizer = stage.optimizer, optimizers.create(stage)

    def make(key: Key, initial: Mapping[str, PyTree] = MappingProxyType({})) -> TrainState:
        fresh = init(key)["params"]
        params = {"params": {name: fresh[name] for name in stage.groups}}
        for name, values in initial.items():
            params["params"][name] = _rebox(fresh[name], values)
        if stage.begin is not None:
            params = stage.begin(params, tuple(initial))
        active, _ = optimizers.split_groups(params, tuple(stage.trained))
        guarded = settings.max_skipped > 0 or settings.spike_factor > 0
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(active),
            # Copies, because donation wants every leaf of the state in a buffer of its own.
            ema=jax.tree.map(jnp.copy, active) if settings.ema > 0 else None,
            frozen={name: {"params": _copy_at(params["params"], path)} for name, path in stage.frozen.items()},
            finite=jnp.ones((), bool),
            guard=Guard(jnp.zeros(()), *(jnp.zeros((), jnp.int32) for _ in range(3))) if guarded else None,
        )

    return make


def _copy_at(params: PyTree, path: tuple[str, ...]) -> PyTree:
    """A tree of the same nesting that holds a copy of what stands at ``path``, and nothing else."""
    if not path:
        return jax.tree.map(jnp.copy, params)
    return {path[0]: _copy_at(params[path[0]], path[1:])}


def _rebox(boxed: PyTree, values: PyTree) -> PyTree:
    return jax.tree.map(
        lambda box, value: box.replace_boxed(value) if isinstance(box, nn.Partitioned) else value,
        boxed,
        values,
        is_leaf=lambda x: isinstance(x, nn.Partitioned),
    )


def abstract(
    make: Callable[..., TrainState], mesh: Mesh | AbstractMesh, rules: sharding.Rules = sharding.RULES
) -> TrainState:
    """The state as ShapeDtypeStructs that carry their shardings; nothing is computed."""
    boxed = jax.eval_shape(make, jax.random.key(0))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        nn.meta.unbox(boxed),
        sharding.shardings(boxed, mesh, rules),
    )


def create(
    make: Callable[..., TrainState], target: TrainState, key: Key, initial: Mapping[str, PyTree] = MappingProxyType({})
) -> TrainState:
    """A fresh state, each shard of it computed where it lives.

    Args:
      make: from `make_init`.
      target: from `abstract`: where the state lives.
      key: from `rng.key(seed, "init")`.
      initial: {group: parameters} to start from.
    """
    homes = jax.tree.map(lambda x: x.sharding, target)
    return jax.jit(lambda k, given: nn.meta.unbox(make(k, given)), out_shardings=homes)(key, dict(initial))
