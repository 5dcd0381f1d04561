"""Frozen dataclasses of settings: made from nested mappings, with checks that name the field in one line."""

import dataclasses
import types as python_types
import typing
from collections.abc import Mapping

from cola_jax.types import UserError


def require(ok: bool, field: str, value, allowed: str) -> None:
    """Raises UserError, which names the field, its value and what it must be, unless ``ok``."""
    if not ok:
        raise UserError(f"config.{field} = {value!r}: must be {allowed}")


def require_at_least(minimum, part: str, config, *fields: str) -> None:
    """`require` for fields of ``config``, which is the group ``part``."""
    for name in fields:
        value = getattr(config, name)
        require(value >= minimum, f"{part}.{name}", value, f"a number of at least {minimum}")


def require_fraction(part: str, config, *fields: str) -> None:
    for name in fields:
        value = getattr(config, name)
        require(0.0 <= value <= 1.0, f"{part}.{name}", value, "a number from 0 to 1")


def require_choice(part: str, config, name: str, choices: tuple) -> None:
    value = getattr(config, name)
    require(value in choices, f"{part}.{name}", value, "one of " + ", ".join(map(repr, choices)))


def _convert(value, kind, path: str):
    """``value`` as the annotated type ``kind``; raises UserError that names ``path``."""
    if dataclasses.is_dataclass(kind):
        return build(kind, value, path)
    if isinstance(kind, python_types.UnionType):  # "X | None"
        if value is None:
            return None
        (kind,) = [k for k in typing.get_args(kind) if k is not type(None)]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, bool) or not isinstance(value, kind):
        raise UserError(f"config.{path} = {value!r}: must be a value of type {kind.__name__}")
    return value


def build(cls, values, path: str = ""):
    """The dataclass ``cls`` from a mapping, groups in groups; absent fields keep their defaults.

    Args:
      cls: with annotations that are types, dataclasses, or either of these or None.
      values: the mapping.
      path: of the group, for errors.

    Raises:
      UserError: an unknown field, or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"config.{path} = {values!r}: must be a group of fields")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            field = f"{path}.{name}" if path else name
            raise UserError(f"config.{field}: no such field; the fields are {', '.join(hints)}")
    return cls(**{k: _convert(v, hints[k], f"{path}.{k}" if path else k) for k, v in values.items()})
