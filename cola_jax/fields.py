"""Settings as frozen dataclasses: the default, meaning and range of a field stand where it is defined, and only there.

    @dataclasses.dataclass(frozen=True)
    class Settings:
        steps: int = setting(16, "steps of the solver in each block", at_least=1)

`check` validates, `build` makes the dataclass from a nested mapping, `describe` tells what there is; command-line flags
follow from the same (`cola_jax.cli_settings`).
"""

import dataclasses
import math
import numbers
import types as python_types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cola_jax.types import UserError

# Of float32, in which models compute: what is larger is infinite there, what is smaller (and not 0) is 0.
_LARGEST, _SMALLEST = (2 - 2**-23) * 2.0**127, 2.0**-126


@dataclasses.dataclass(frozen=True)
class Rule:
    """Meaning and range of a field. Bounds of a tuple field hold for each of its elements.

    Attributes:
      meaning: in a few words, units included.
      at_least, above: lower bounds.
      at_most, below: upper bounds.
      choices: the values that are allowed; (): the bounds say.
      where: (predicate of the value, what a value for which it is False should have been).
      flag: False for a field that the program fills in: it gets no command-line flag.
    """

    meaning: str
    at_least: int | float | None = None
    above: int | float | None = None
    at_most: int | float | None = None
    below: int | float | None = None
    choices: tuple = ()
    where: tuple[Callable[[Any], bool], str] | None = None
    flag: bool = True

    def allows(self, value) -> bool:
        """Whether a value of the right type is in range."""
        elements = value if isinstance(value, tuple) else (value,)
        return all(map(self._within, elements)) and (self.where is None or bool(self.where[0](value)))

    def _within(self, value) -> bool:
        return (
            (not self.choices or value in self.choices)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def words(self, each: bool = False) -> str:
        """The range, so that "must be" goes before it; "" for none."""
        parts = ["one of " + ", ".join(map(repr, self.choices))] if self.choices else []
        if self.at_least is not None and self.at_most is not None:
            parts.append(f"from {self.at_least:,} to {self.at_most:,}")
        else:
            bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
            parts += [f"{words} {bound:,}" for words, bound in bounds.items() if bound is not None]
        if each and parts:
            parts[0] = f"each {parts[0]}"
        return " and ".join(parts + ([self.where[1]] if self.where else []))


def setting(default, meaning: str, **rule) -> Any:
    """A dataclass field with its default, meaning and range (see `Rule`)."""
    return dataclasses.field(default=default, metadata={"rule": Rule(meaning, **rule)})


def like(cls, name: str, default=dataclasses.MISSING) -> Any:
    """The field ``name`` of another dataclass: the same meaning and range, with another default if one is given."""
    (field,) = [field for field in dataclasses.fields(cls) if field.name == name]
    default = field.default if default is dataclasses.MISSING else default
    return dataclasses.field(default=default, metadata=field.metadata)


class Entry(NamedTuple):
    """One field of a dataclass of settings, or of a group in it.

    Attributes:
      name: "group.field".
      kind: its annotated type.
      default: its default.
      rule: its meaning and range.
    """

    name: str
    kind: Any
    default: Any
    rule: Rule

    @property
    def types(self) -> tuple:
        """The types that its values have, None apart."""
        return tuple(kind for kind in _kinds(self.kind) if kind is not type(None))

    @property
    def optional(self) -> bool:
        """Whether None is a value of it."""
        return type(None) in _kinds(self.kind)

    @property
    def range(self) -> str:
        """What its values must be, "" for any of its type."""
        return self.rule.words(typing.get_origin(self.kind) is tuple)


def entries(cls) -> dict[str, Entry]:
    """The fields of a dataclass of settings by name, those of its groups as "group.field"."""
    hints, found = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            inner = entries(kind).values()
            found |= {
                f"{field.name}.{entry.name}": entry._replace(name=f"{field.name}.{entry.name}") for entry in inner
            }
        else:
            found[field.name] = Entry(field.name, kind, field.default, field.metadata["rule"])
    return found


def describe(cls) -> str:
    """A line for each field: its name, default, meaning and range."""
    lines = []
    for entry in entries(cls).values():
        limits = f" ({entry.range})" if entry.range else ""
        lines.append(f"{entry.name} = {entry.default!r}: {entry.rule.meaning}{limits}")
    return "\n".join(lines)


def require(ok: bool, field: str, value, allowed: str) -> None:
    """Raises UserError, which names the field, its value and what it must be, unless ``ok``."""
    if not ok:
        raise UserError(f"{field} = {value!r}: must be {allowed}")


def check(config, prefix: str) -> None:
    """Raises UserError for the first field of a dataclass of settings that is out of range.

    Groups in it are checked as well. Where the class has a method ``check_together(prefix)``, it is called at the end,
    for fields that must fit each other.

    Args:
      config: the settings.
      prefix: what stands before the names of the fields in errors, as "config.vae." or "sampling ".
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check(value, f"{prefix}{field.name}.")
        else:
            entry = Entry(field.name, hints[field.name], field.default, field.metadata["rule"])
            check_value(entry, value, f"{prefix}{field.name}")
    if hasattr(config, "check_together"):
        config.check_together(prefix)


def check_value(entry: Entry, value, name: str) -> None:
    """Raises UserError, which calls the field ``name``, unless the value has its type and is in its range."""
    if value is None and entry.optional:
        return
    require(any(_fits(value, kind) for kind in entry.types), name, value, _type_words(entry.types))
    none = "None or " if entry.optional else ""
    floats = [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, float)]
    require(all(map(math.isfinite, floats)), name, value, f"{none}a finite number")
    held = all(x == 0 or _SMALLEST <= abs(x) <= _LARGEST for x in floats)
    require(held, name, value, f"{none}0, or from {_SMALLEST:.3g} to {_LARGEST:.3g} in magnitude: float32")
    require(entry.rule.allows(value), name, value, none + entry.rule.words(isinstance(value, tuple)))


def build(cls, values, path: str = "", default=None):
    """The dataclass ``cls`` from a mapping, groups in groups; absent fields keep their defaults.

    Args:
      cls: with annotations that are types, tuples of types, dataclasses, or unions of types.
      values: the mapping, as JSON or a ConfigDict holds it: a list may stand for a tuple.
      path: of the group, for errors.
      default: what absent fields are taken from; None: ``cls()``.

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
    default = cls() if default is None else default
    given = {k: _convert(v, hints[k], f"{path}.{k}" if path else k, getattr(default, k)) for k, v in values.items()}
    return dataclasses.replace(default, **given)


def _convert(value, kind, path: str, default):
    """``value`` as the annotated type ``kind``; raises UserError that names ``path``."""
    if dataclasses.is_dataclass(kind):
        return build(kind, value, path, default)
    if isinstance(value, list):
        value = tuple(value)
    fitting = next((each for each in _kinds(kind) if _fits(value, each)), None)
    require(fitting is not None, f"config.{path}", value, _type_words(_kinds(kind)))
    if fitting is float:
        return float(value)
    if typing.get_origin(fitting) is tuple:
        return tuple(float(x) if _element_kind(fitting, i) is float else x for i, x in enumerate(value))
    return value


def _kinds(kind) -> tuple:
    """The types of a union, or the one type."""
    return typing.get_args(kind) if isinstance(kind, python_types.UnionType) else (kind,)


def _element_kind(kind, index: int):
    """The type of an element of ``tuple[X, ...]`` or ``tuple[X, Y]``."""
    kinds = typing.get_args(kind)
    return kinds[0] if kinds[-1] is Ellipsis else kinds[index]


def _fits(value, kind) -> bool:
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        sized = isinstance(value, tuple) and (kinds[-1] is Ellipsis or len(value) == len(kinds))
        return sized and all(_fits(x, _element_kind(kind, i)) for i, x in enumerate(value))
    return isinstance(value, kind)


def _type_words(types: tuple) -> str:
    names = [str(kind) if typing.get_args(kind) else kind.__name__ for kind in types if kind is not type(None)]
    return "a value of type " + " or ".join(names)
