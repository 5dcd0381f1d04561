"""AdamW with warm-up and cosine decay, each group of parameters at its own rate (SPEC 4, 7).

The optimizer sees only the groups that a stage trains: what it does not see has no gradient, no moments and cannot
change.
"""

import jax
import optax

from cola_jax.config import OptimizerConfig
from cola_jax.families.interface import Group, Stage
from cola_jax.types import Params, PyTree

# Names of the parameters that weight decay applies to: kernels of linear maps, token embeddings.
DECAYED = ("kernel", "embedding", "wte")


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


def is_decayed(path, leaf) -> bool:
    """Whether weight decay applies.

    By name, because `nn.scan` stacks biases and norm scales into arrays that look like matrices.
    """
    names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    return bool(names) and names[-1] in DECAYED and leaf.ndim >= 2


def _decay_mask(params: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(is_decayed, params)


def _per_group(transforms: dict[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    """Each group through its own transformation; the labels follow the groups that are there."""
    return optax.partition(transforms, lambda params: {name: name for name in params})


def create(stage: Stage) -> optax.GradientTransformation:
    """The optimizer of a stage, over ``{group: parameters}`` of the groups that it trains.

    A group has the stage's learning rate times its ratio. While a group is not active (`families.interface.Group`) its
    parameters and moments stay as they are, and its gradient does not enter the clipping norm.
    """
    config = stage.optimizer
    adam = optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=_decay_mask),
    )
    rate = optax.scale_by_learning_rate(learning_rate(config, stage.steps))
    clip = optax.clip_by_global_norm(config.clip_norm)
    if list(stage.trained.values()) == [Group()]:
        return optax.chain(clip, adam, rate)

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
        _per_group(while_active(adam)),
        rate,
        _per_group({name: scale(group) for name, group in stage.trained.items()}),
    )
