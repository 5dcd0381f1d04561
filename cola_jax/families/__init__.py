"""Model families by name, and the configs of all of them."""

import dataclasses
import types as python_types
import typing
from collections.abc import Mapping

import ml_collections

from cola_jax import fields
from cola_jax.config import Config, to_dict
from cola_jax.families import autoregressive, cola, llada, plaid, unified
from cola_jax.families.interface import Family
from cola_jax.types import UserError

FAMILIES: dict[str, Family] = {
    family.name: family for family in (cola.FAMILY, autoregressive.FAMILY, llada.FAMILY, plaid.FAMILY, unified.FAMILY)
}
DEFAULT = cola.FAMILY.name  # of configs that were saved before there were families


def of(config: Config) -> Family:
    """The family of a config."""
    return get(config.family)


def get(name: str) -> Family:
    """The family of this name.

    Raises:
      UserError: there is none.
    """
    if name not in FAMILIES:
        raise UserError(f"config.family = {name!r}: must be one of {', '.join(map(repr, FAMILIES))}")
    return FAMILIES[name]


def parse(values: Mapping | ml_collections.ConfigDict) -> Config:
    """A validated config from a ConfigDict or any nested mapping; absent fields keep their defaults.

    Raises:
      UserError: an unknown family or field, a field of another family, a wrong type, an inconsistent value.
    """
    plain = upgraded(values.to_dict() if isinstance(values, ml_collections.ConfigDict) else values)
    family = get(plain["family"])
    _check_groups(family, plain)
    config = fields.build(family.config, plain)
    config.validate()
    return config


def upgraded(saved: Mapping) -> dict:
    """A saved config in today's fields: those that have moved since it was written are in their new places."""
    plain = {"family": DEFAULT, **saved}
    sample = plain.get("sample")
    if isinstance(sample, Mapping) and "report_stories" in sample:  # until there were evaluations of every corpus
        sample = dict(sample)
        count = sample.pop("report_stories")
        plain = {**plain, "sample": sample, "evaluation": {"count": count, **plain.get("evaluation", {})}}
    return plain


def _check_groups(family: Family, plain: Mapping) -> None:
    """Raises UserError for a group that belongs to other families only."""
    own = {field.name for field in dataclasses.fields(family.config)}
    for name in plain:
        others = [
            other.name for other in FAMILIES.values() if name in {f.name for f in dataclasses.fields(other.config)}
        ]
        if name not in own and others:
            raise UserError(f"config.{name}: belongs to family {others[0]!r}; config.family is {family.name!r}")


def default(family: str = DEFAULT) -> dict:
    """Every field of a family's config with its default, as a nested dict."""
    return to_dict(get(family).config())


def default_config(family: str = DEFAULT) -> ml_collections.ConfigDict:
    """The same as a ConfigDict, what `configs/*.py` start from; a field takes every type that its annotation names."""
    return _config_dict(get(family).config())


def _config_dict(config) -> ml_collections.ConfigDict:
    hints = typing.get_type_hints(type(config))
    return ml_collections.ConfigDict({name: _config_value(getattr(config, name), hints[name]) for name in hints})


def _config_value(value, kind):
    if dataclasses.is_dataclass(value):
        return _config_dict(value)
    kinds = [each for each in typing.get_args(kind) if each is not type(None)]
    if not isinstance(kind, python_types.UnionType):
        return value
    return ml_collections.FieldReference(value, field_type=kinds[0] if len(kinds) == 1 else object)
