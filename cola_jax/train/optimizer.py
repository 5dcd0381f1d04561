"""AdamW or Muon with warm-up and cosine decay, each group of parameters at its own rate (SPEC 4, 7).

The optimizer sees only the groups that a stage trains: what it does not see has no gradient, no moments and cannot
change.
"""

import math

import jax
import optax
from optax import contrib

from cola_jax.config import OptimizerConfig
from cola_jax.families.interface import Group, Stage
from cola_jax.types import Params, PyTree

# Names of the parameters that weight decay applies to: kernels of linear maps, token embeddings.
DECAYED = ("kernel", "embedding", "wte")
# Names of the modules whose parameters are those of several layers, stacked (`nn.layers.scan_layers`).
STACKED = ("layers", "dual", "modulations")
# Muon's updates then have the size of AdamW's, so that both have one learning rate (arXiv 2502.16982, 2.2).
_RMS = 0.2


def split_groups(variables: Params, groups: tuple[str, ...]) -> tuple[PyTree, PyTree]:
    """``variables["params"]`` as (trained, frozen) groups."""
    params = variables["params"]
    trained = {name: params[name] for name in groups}
    return trained, {name: value for name, value in params.items() if name not in groups}


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear from ``initial_learning_rate`` to ``learning_rate`` in ``warmup_steps``, then cosine to
    ``final_learning_rate`` at ``steps``; update number n (from 0) has the rate of n.
    """
    decay = optax.cosine_decay_schedule(
        config.learning_rate,
        max(steps - config.warmup_steps, 1),
        alpha=config.final_learning_rate / config.learning_rate,
    )
    if not config.warmup_steps:
        return decay
    warmup = optax.linear_schedule(config.initial_learning_rate, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def _names(path) -> list[str]:
    return [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]


def is_decayed(path, leaf) -> bool:
    """Whether weight decay applies.

    By name, because `nn.scan` stacks biases and norm scales into arrays that look like matrices.
    """
    names = _names(path)
    return bool(names) and names[-1] in DECAYED and leaf.ndim >= 2


def _decay_mask(params: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(is_decayed, params)


def matrix_axes(path, leaf) -> contrib.MuonDimensionNumbers | None:
    """Which axes of a kernel are the inputs and outputs of a linear map; None for what is no kernel.

    The other axes count maps: layers that are stacked, and the parts of a kernel of several short outputs
    (query, key, value). A convolution's inputs are all that it reads for a position.
    """
    names = _names(path)
    if not names or names[-1] != "kernel":
        return None
    stacked = int(any(name in STACKED for name in names))
    inputs, *outputs = range(stacked, leaf.ndim)
    if not stacked and leaf.ndim == 4:
        return contrib.MuonDimensionNumbers((0, 1, 2), (3,))
    parts, *others = outputs
    if others and leaf.shape[parts] < min(leaf.shape[inputs], math.prod(leaf.shape[axis] for axis in others)):
        outputs = others
    return contrib.MuonDimensionNumbers((inputs,), tuple(outputs))


def _matrix_axes(params: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(matrix_axes, params)


def _method(config: OptimizerConfig) -> optax.GradientTransformation:
    """From clipped gradients to what is subtracted, at a learning rate of 1."""
    if config.name == "muon":
        step = contrib.muon(
            -1.0,  # it turns the sign; the rate comes later
            beta=config.momentum,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            eps=config.eps,
            muon_weight_dimension_numbers=_matrix_axes,
            consistent_rms=_RMS,
        )
    else:
        step = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    return optax.chain(step, optax.add_decayed_weights(config.weight_decay, mask=_decay_mask))


def _per_group(transforms: dict[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    """Each group through its own transformation; the labels follow the groups that are there."""
    return optax.partition(transforms, lambda params: {name: name for name in params})


def create(stage: Stage) -> optax.GradientTransformation:
    """The optimizer of a stage, over ``{group: parameters}`` of the groups that it trains.

    A group has the stage's learning rate times its ratio. While a group is not active (`families.interface.Group`) its
    parameters and moments stay as they are, and its gradient does not enter the clipping norm.
    """
    config = stage.optimizer
    method = _method(config)
    rate = optax.scale_by_learning_rate(learning_rate(config, stage.steps))
    clip = optax.clip_by_global_norm(config.clip_norm)
    if list(stage.trained.values()) == [Group()]:
        return optax.chain(clip, method, rate)

    def while_active(transform):
        return {
            name: transform if group.active is None else optax.conditionally_mask(transform, group.active)
            for name, group in stage.trained.items()
        }

    def scale(group: Group) -> optax.GradientTransformation:
        return optax.identity() if group.ratio == 1.0 else optax.scale(group.ratio)

    return optax.chain(
        _per_group(while_active(optax.identity())),
        clip,
        _per_group(while_active(method)),
        rate,
        _per_group({name: scale(group) for name, group in stage.trained.items()}),
    )
