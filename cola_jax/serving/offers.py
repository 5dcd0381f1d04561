"""The ways to generate that a server offers: each is a program, compiled before the first request."""

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cola_jax import fields
from cola_jax.families.interface import Engine, Family, Pictures
from cola_jax.runs import Run
from cola_jax.sampling.choose import Choice, choice_of
from cola_jax.serving import whole
from cola_jax.serving.settings import ServeSettings
from cola_jax.types import UserError


class Chosen(NamedTuple):
    """What a request's settings come to: the offer, and how tokens are chosen."""

    index: int
    choice: Choice


class Offers:
    """The first offer is what requests get that ask for nothing else.

    Settings that a family's engine has for each sequence (`Engine.own`) may be anything in their range. All others are
    those of an offer: a new combination would have to be compiled while everybody waits.

    Attributes:
      settings: of each offer.
      pictures: of the run, or None.
      family: its name.
      engine: the family's, of texts.
      max_tokens, context: limits of a sequence, in tokens.
    """

    def __init__(self, run: Run, base: Any, others: Sequence[str], limits: ServeSettings):
        """Args:
          run: what is served.
          base: settings of the first offer.
          others: changes of the further ones, as "steps=8,guidance_scale=3".
          limits: of the server.

        Raises:
          UserError: a setting that the family does not have, a value out of range, or limits beyond the model's.
        """
        trained = run.config.data.sequence_length
        self.context = limits.context or trained
        if self.context > trained and run.family.engine is None:
            raise UserError(f"--context = {self.context}: must be at most {trained}, what the model was trained on")
        self.max_tokens = min(limits.max_tokens or self.context, self.context)
        of_run = run.family.pictures
        self.pictures: Pictures | None = None if of_run is None else of_run(run.config, run.tokenizer)
        self.engine: Engine = whole.engine(run.family) if self.pictures is None else self.pictures.texts
        self._family: Family = run.family
        self.family = run.family.name
        base = dataclasses.replace(base, **self._fixed(base))
        self.settings = [base]
        for text in others:
            changed = self._changed(base, _parsed(text), "--offer: ")
            if changed not in self.settings:
                self.settings.append(changed)

    def _fixed(self, base: Any) -> dict[str, Any]:
        """Budget and context of the programs, as far as the family has such settings."""
        fixed = {"max_new_tokens": self.max_tokens, "context": self.context}
        if self._family.engine is None:
            # A whole batch has one budget, and its prompts must leave room for it.
            fixed["max_new_tokens"] = max(1, min(base.max_new_tokens, self.max_tokens, self.context // 2))
        return {name: value for name, value in fixed.items() if hasattr(base, name)}

    def _changed(self, base: Any, given: Mapping[str, Any], prefix: str) -> Any:
        """``base`` with other values.

        Raises:
          UserError: no such setting, or a value out of range.
        """
        known = {name: entry for name, entry in fields.entries(type(base)).items() if entry.rule.flag}
        known.pop("max_new_tokens", None)
        values = {}
        for name, value in given.items():
            if name not in known:
                has = ", ".join(known)
                raise UserError(f"{prefix}{name[:64]}: family {self._family.name!r} has no such setting; it has {has}")
            values[name] = tuple(value) if isinstance(value, list) else value
            fields.check_value(known[name], values[name], f"{prefix}{name}")
            values[name] = _as_float(values[name]) if _is_float(known[name]) else values[name]
        changed = dataclasses.replace(base, **values)
        fields.check(changed, prefix)
        return changed

    def choose(self, given: Mapping[str, Any], prefix: str) -> Chosen:
        """The offer that has the settings of a request, and the sequence's own ones.

        Args:
          given: by name; what is not there is as in the first offer.
          prefix: of names in errors.

        Raises:
          UserError: no such setting, a value out of range, or one that is not offered.
        """
        changed = self._changed(self.settings[0], given, prefix)
        own = {name: getattr(self.settings[0], name) for name in self.engine.own if hasattr(changed, name)}
        shared = dataclasses.replace(changed, **own)
        if shared not in self.settings:
            asked = ", ".join(f"{prefix}{name} = {value!r}" for name, value in given.items() if name not in own)
            raise UserError(f"{asked}: not offered; the offers are {'; '.join(self.described())}")
        choice = choice_of(changed if self.engine.own else shared)
        return Chosen(self.settings.index(shared), choice)

    def described(self) -> list[str]:
        """Each offer in words: how it differs from the others."""
        rows = [dataclasses.asdict(settings) for settings in self.settings]
        names = [name for name in rows[0] if any(row[name] != rows[0][name] for row in rows)]
        if not names:
            return ["the defaults"]
        return [", ".join(f"{name} = {row[name]!r}" for name in names) for row in rows]


def _is_float(entry: fields.Entry) -> bool:
    """Whether a field holds a number that need not be whole, or several."""
    return any(kind is float or float in typing.get_args(kind) for kind in entry.types)


def _as_float(value: Any) -> Any:
    """A number of JSON, which may be whole, or several, as floats."""
    if isinstance(value, tuple):
        return tuple(map(_as_float, value))
    return value if value is None else float(value)


def _parsed(text: str) -> dict[str, Any]:
    """ "steps=8,solver=heun" as a mapping. Numbers are those of JSON; a tuple has ":" between its parts."""
    found = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not name:
            raise UserError(f"--offer = {text!r}: must be settings such as steps=8,guidance_scale=3")
        parts = [_value(each) for each in value.split(":")]
        found[name] = parts if len(parts) > 1 else parts[0]
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
