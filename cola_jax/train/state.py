"""The training state: everything that a step reads and writes."""

from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from cola_jax import sharding
from cola_jax.train import optimizer as optimizers
from cola_jax.types import Key, Params, PyTree


@flax.struct.dataclass
class Guard:
    """What decides whether an update is applied or skipped (`config.optimizerN.max_skipped`, ``spike_factor``)."""

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
    params: Params  # {"params": {"vae": ..., "dit": ...}}, float32
    opt_state: PyTree  # of the trained groups
    ema: PyTree | None  # moving average of the trained groups
    reference: Params | None  # the encoder as stage 2 began: {"params": {"vae": {"encoder": ...}}}
    finite: PyTree  # bool scalar
    guard: PyTree | None = None  # a Guard; None where no update may be skipped


def evaluation_params(state: TrainState) -> Params:
    """The variables to evaluate and sample with: the moving average where there is one."""
    return {"params": {**state.params["params"], **(state.ema or {})}}


def make_init(
    init: Callable[[Key], Params],
    optimizer: optax.GradientTransformation,
    trained: tuple[str, ...],
    *,
    groups: tuple[str, ...] = ("vae", "dit"),
    ema: bool = False,
    reference: bool = False,
    guard: bool = False,
) -> Callable[[Key, PyTree | None], TrainState]:
    """A pure function ``(key, vae, dit) -> TrainState`` to be traced, with the parameters' boxes still on.

    Args:
      init: variables of the whole model from a key, boxed with their logical axes.
      optimizer: over the trained groups.
      trained: see `optimizer.trained_groups`.
      groups: which of the model's groups the stage holds (stage 1: only "vae").
      ema: keep a moving average.
      reference: keep a copy of the encoder.
      guard: count skipped updates.

    Returns:
      The function; ``vae`` replaces the fresh VAE parameters (stage 2 starts from stage 1's), ``dit`` those of the
      prior; None keeps them.
    """

    def make(key: Key, vae: PyTree | None = None, dit: PyTree | None = None) -> TrainState:
        fresh = init(key)["params"]
        params = {"params": {name: fresh[name] for name in groups}}
        for name, values in (("vae", vae), ("dit", dit)):
            if values is not None:
                params["params"][name] = _rebox(fresh[name], values)
        active, _ = optimizers.split_groups(params, trained)
        # Copies, because donation wants every leaf of the state in a buffer of its own.
        encoder = jax.tree.map(jnp.copy, params["params"]["vae"]["encoder"]) if reference else None
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(active),
            ema=jax.tree.map(jnp.copy, active) if ema else None,
            reference={"params": {"vae": {"encoder": encoder}}} if reference else None,
            finite=jnp.ones((), bool),
            guard=Guard(jnp.zeros(()), *(jnp.zeros((), jnp.int32) for _ in range(3))) if guard else None,
        )

    return make


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
    make: Callable[..., TrainState], target: TrainState, key: Key, vae: PyTree | None = None, dit: PyTree | None = None
) -> TrainState:
    """A fresh state, each shard of it computed where it lives.

    Args:
      make: from `make_init`.
      target: from `abstract`: where the state lives.
      key: from `rng.key(seed, "init")`.
      vae, dit: the parameters to start from, or None.
    """
    homes = jax.tree.map(lambda x: x.sharding, target)
    return jax.jit(lambda k, v, d: nn.meta.unbox(make(k, v, d)), out_shardings=homes)(key, vae, dit)
