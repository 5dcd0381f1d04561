"""Command-line flags that follow from settings: one for each field, with the field's meaning, range and default.

A binary that calls these functions has the flags as its own: its --help lists them.
"""

import dataclasses
import typing
from collections.abc import Collection
from typing import Any

from absl import flags

from cola_jax import families, fields
from cola_jax.fields import Entry
from cola_jax.types import UserError

flags.disclaim_key_flags()  # they are those of the module that asks for them

_NONE = object()  # value of a flag that is given as none: that of one that is not given is None


class _Parser(flags.ArgumentParser):
    """Text of a flag as a value of a field: a number, text, or several with commas between; "none" where it may be."""

    def __init__(self, entry: Entry):
        super().__init__()
        self.syntactic_help = ""
        self._optional = entry.optional
        (self._kind,) = entry.types

    def parse(self, argument: Any) -> Any:
        if self._optional and argument == "none":
            return _NONE
        if typing.get_origin(self._kind) is not tuple:
            return _scalar(argument, self._kind)
        kind = typing.get_args(self._kind)[0]
        return tuple(_scalar(part, kind) for part in argument.split(",")) if argument else ()


def _scalar(text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError("must be a whole number" if kind is int else "must be a number") from None


class SettingsFlags:
    """The flags of some classes of settings; calling it applies those that were given to settings.

    Args:
      classes: of settings; a name that several have is one flag.
      skip: fields that get no flag.
      of_run: fields whose default is what the run's config says.
      flag_values: where the flags are defined.
      prefix: of the flags' names, where a binary has flags of several kinds of settings.
    """

    def __init__(
        self,
        classes: Collection[type],
        skip: Collection[str] = (),
        of_run: Collection[str] = (),
        flag_values: flags.FlagValues = flags.FLAGS,
        prefix: str = "",
    ):
        self._prefix = prefix
        self._classes = list(dict.fromkeys(classes))
        found: dict[str, list[Entry]] = {}
        for cls in self._classes:
            for entry in fields.entries(cls).values():
                if entry.rule.flag and entry.name not in skip:
                    found.setdefault(entry.name, []).append(entry)
        self._flags = {name: _define(prefix, entries, name in of_run, flag_values) for name, entries in found.items()}

    def given(self) -> dict[str, Any]:
        """The fields whose flags were given, with their values."""
        values = {name: flag.value for name, flag in self._flags.items() if flag.value is not None}
        return {name: None if value is _NONE else value for name, value in values.items()}

    def __call__(self, settings, family: str = ""):
        """``settings`` with what was given, validated.

        Args:
          settings: of one of the classes.
          family: whose settings these are, for the error.

        Raises:
          UserError: a flag that is no field of these settings, or a value out of range.
        """
        given, known = self.given(), fields.entries(type(settings))
        for name in given:
            if name not in known:
                raise UserError(f"--{self._prefix}{name}: the checkpoint's family {family!r} has no such setting")
        self._check_values(type(settings))
        settings = dataclasses.replace(settings, **given)
        settings.validate()
        return settings

    def _check_values(self, cls: type) -> None:
        entries = fields.entries(cls)
        for name, value in self.given().items():
            fields.check_value(entries[name], value, f"--{self._prefix}{name}")

    def check(self) -> None:
        """Raises UserError for flags that no class of settings takes: before a checkpoint is loaded.

        Whether values fit each other is known only with the other settings, which are the run's.
        """
        given = self.given()
        able = [cls for cls in self._classes if set(given) <= set(fields.entries(cls))]
        if not able:
            names = ", ".join(f"--{self._prefix}{name}" for name in given)
            raise UserError(f"{names}: no model family has all of these settings")
        errors = []
        for cls in able:
            try:
                self._check_values(cls)
            except UserError as error:
                errors.append(error)
        if len(errors) == len(able):
            raise errors[0]


def _define(prefix: str, entries: list[Entry], of_run: bool, flag_values: flags.FlagValues) -> flags.FlagHolder:
    """The flag of a field, from what the classes that have it say of it."""
    first, name = entries[0], prefix + entries[0].name
    if any(entry.kind != first.kind for entry in entries):
        raise TypeError(f"{first.name}: of different types in several classes of settings")
    meaning, limits, defaults = (
        " or ".join(dict.fromkeys(texts))
        for texts in zip(*((e.rule.meaning, e.range, _shown(e.default)) for e in entries), strict=True)
    )
    default = "default: as the run's config says" if of_run else f"default: {defaults}"
    text = f"{meaning} ({'; '.join(filter(None, [limits, default]))})"
    if first.kind is bool:
        return flags.DEFINE_bool(name, None, text, flag_values)
    return flags.DEFINE(_Parser(first), name, None, text, flag_values)


def _shown(default) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default).lower()


def generation_flags(skip: Collection[str] = ()) -> SettingsFlags:
    """A flag for each generation setting of any family."""
    every = families.FAMILIES.values()
    of_run = {name for family in every for name in fields.entries(type(family.config().sample))}
    return SettingsFlags([family.settings for family in every], skip, of_run)


def scoring_flags(skip: Collection[str] = (), prefix: str = "") -> SettingsFlags:
    """A flag for each scoring setting of any family."""
    return SettingsFlags([family.score_settings for family in families.FAMILIES.values()], skip, prefix=prefix)


def config_help(flag: str = "config") -> str:
    """What --help says of a config flag: every field that can be overridden, those of a family under its name."""
    lines, seen = ["a file of configs/; each of its fields is a flag, too:"], set()
    for family in families.FAMILIES.values():
        new = [line for line in fields.describe(family.config).splitlines() if line not in seen]
        lines += [f"family {family.name!r}:", *(f"  --{flag}.{line}" for line in new)]
        seen.update(new)
    return "\n".join(lines)
