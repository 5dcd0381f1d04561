"""Parameters that a run begins from: those of another run or of a released checkpoint, group by group."""

from collections.abc import Mapping

import jax

from cola_jax import release
from cola_jax.nested import leaves
from cola_jax.train import saved
from cola_jax.types import LazyArray, PyTree, UserError


def load(init_from: str | Mapping[str, str], target: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """What `config.train.init_from` names: {group: parameters}, each array where its target lives.

    Args:
      init_from: a path for all groups of the target, or a path for each of some groups; "" or {}: none.
      target: {group: tree of ShapeDtypeStructs with shardings}, the run's parameters.

    Raises:
      UserError: an unknown group, nothing at the path, a group or shape that does not fit. Only what is named is read.
    """
    paths = dict.fromkeys(target, init_from) if isinstance(init_from, str) and init_from else dict(init_from or {})
    for group in paths:
        if group not in target:
            known = ", ".join(target)
            raise UserError(f"config.train.init_from = {init_from!r}: {group!r} must be a parameter group, of {known}")
    found = {}
    for path in dict.fromkeys(paths.values()):
        groups = {group: target[group] for group in target if paths.get(group) == path}
        try:
            place = str(saved.fetched(path, "config.train.init_from"))
            found |= _released(place, groups) if release.is_released(place) else saved.load_groups(place, groups)
        except UserError as error:
            raise UserError(f"config.train.init_from = {init_from!r}: {error}") from error
    return found


def _released(path: str, target: Mapping[str, PyTree]) -> dict[str, PyTree]:
    mesh = jax.tree.leaves(dict(target))[0].sharding.mesh
    params = release.open_lazily(path, mesh=mesh)[1]["params"]
    for group, tree in target.items():
        if group not in params:
            raise UserError(f"{path}: holds no parameters {group!r}; it has {', '.join(params)}")
        needed, given = leaves(tree), leaves(params[group])
        for name in sorted({*needed, *given}):
            shapes = [list(arrays[name].shape) if name in arrays else None for arrays in (given, needed)]
            if shapes[0] != shapes[1]:
                raise UserError(f"{path}: {group}/{name} is {shapes[0]}, this run needs {shapes[1]}")
    return {group: jax.tree.map(_read, tree, params[group]) for group, tree in target.items()}


def _read(target: jax.ShapeDtypeStruct, array: LazyArray) -> jax.Array:
    return jax.device_put(array.read(), target.sharding)
