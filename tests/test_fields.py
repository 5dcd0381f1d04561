"""Settings defined once: ranges, texts, conversions, and that every field of the system has a meaning."""

import dataclasses

import numpy as np
import pytest

from cola_jax import families, fields
from cola_jax.fields import like, setting
from cola_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = setting(2, "of it", at_least=1)
    factor: float = setting(1.0, "times", above=0, below=2)

    def check_together(self, prefix: str) -> None:
        fields.require(self.size < 100 * self.factor, f"{prefix}size", self.size, "below 100 factor")


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str = setting("a", "kind", choices=("a", "b"))
    limit: float | None = setting(None, "m; None: no limit", at_most=5)
    pair: tuple[float, float] = setting((0.0, 1.0), "times", at_least=0, where=(lambda p: p[0] <= p[1], "in order"))
    steps: tuple[int, ...] = setting((), "where", at_least=1)
    source: str | dict = setting("", "path or paths")
    even: int = setting(4, "number", at_least=2, where=(lambda n: n % 2 == 0, "even"))
    own: bool = setting(False, "or not", flag=False)
    inner: Inner = Inner()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "c"}, "x name = 'c': must be one of 'a', 'b'"),
        ({"limit": 6.0}, "x limit = 6.0: must be None or at most 5"),
        ({"limit": float("nan")}, "x limit = nan: must be None or a finite number"),
        ({"limit": float("-inf")}, "x limit = -inf: must be None or a finite number"),
        ({"limit": -1e39}, "x limit = -1e+39: must be None or 0, or from 1.18e-38 to 3.4e+38 in magnitude: float32"),
        ({"pair": (0.0, 1e-40)}, "x pair = (0.0, 1e-40): must be 0, or from 1.18e-38 to 3.4e+38 in magnitude: float32"),
        ({"pair": (2.0, 1.0)}, "x pair = (2.0, 1.0): must be each at least 0 and in order"),
        ({"pair": (-1.0, 1.0)}, "x pair = (-1.0, 1.0): must be each at least 0 and in order"),
        ({"pair": (0.0, float("nan"))}, "x pair = (0.0, nan): must be a finite number"),
        ({"steps": (3, 0)}, "x steps = (3, 0): must be each at least 1"),
        ({"even": 5}, "x even = 5: must be at least 2 and even"),
        ({"inner": Inner(size=0)}, "x inner.size = 0: must be at least 1"),
        ({"inner": Inner(factor=2.0)}, "x inner.factor = 2.0: must be above 0 and below 2"),
        ({"inner": Inner(size=100)}, "x inner.size = 100: must be below 100 factor"),
    ],
)
def test_a_value_out_of_range_is_told(change, message):
    with pytest.raises(UserError) as error:
        fields.check(dataclasses.replace(Outer(), **change), "x ")
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("even", "4", "int"),
        ("even", True, "int"),
        ("even", 4.0, "int"),
        ("own", 1, "bool"),
        ("name", None, "str"),
        ("limit", "1", "float"),
        ("pair", (1.0,), "tuple[float, float]"),
        ("pair", (1.0, "2"), "tuple[float, float]"),
        ("source", 3, "str or dict"),
    ],
)
def test_a_value_of_another_type_is_told(name, value, kind):
    entry = fields.entries(Outer)[name]
    with pytest.raises(UserError) as error:
        fields.check_value(entry, value, f"x {name}")
    assert str(error.value) == f"x {name} = {value!r}: must be a value of type {kind}"


@pytest.mark.parametrize(
    "change",
    [
        {"limit": None},
        {"limit": np.float32(5)},
        {"even": np.int64(6)},
        {"pair": (0.0, 0.0)},
        {"steps": (1, 2, 3)},
        {"source": {"vae": "x"}},
        {"inner": Inner(size=1, factor=1.9)},
    ],
)
def test_a_value_in_range_passes(change):
    for name, value in change.items():
        if name != "inner":
            fields.check_value(fields.entries(Outer)[name], value, name)
    fields.check(Outer(), "x ")


def test_built_from_what_json_holds():
    built = fields.build(Outer, {"pair": [0, 1], "steps": [1, 2], "source": {"a": "b"}, "inner": {"factor": 1}})
    assert built == Outer(pair=(0.0, 1.0), steps=(1, 2), source={"a": "b"})
    assert all(isinstance(x, float) for x in (*built.pair, built.inner.factor))


def test_one_field_can_be_like_another():
    @dataclasses.dataclass(frozen=True)
    class Other:
        even: int = like(Outer, "even")
        more: int = like(Outer, "even", 8)

    assert Other() == Other(even=4, more=8)
    with pytest.raises(UserError, match="more = 3: must be at least 2 and even"):
        fields.check(Other(more=3), "")


def test_everything_is_described():
    lines = fields.describe(Outer).splitlines()
    assert lines[0] == "name = 'a': kind (one of 'a', 'b')"
    assert lines[3] == "steps = (): where (each at least 1)"
    assert lines[-1] == "inner.factor = 1.0: times (above 0 and below 2)"


@pytest.mark.parametrize("family", families.FAMILIES.values(), ids=families.FAMILIES)
def test_every_field_of_the_system_has_a_meaning_and_a_default_in_range(family):
    for cls in (family.config, family.settings, family.score_settings):
        for entry in fields.entries(cls).values():
            assert entry.rule.meaning and "\n" not in entry.rule.meaning + entry.range, entry.name
            if entry.name != "family":
                fields.check_value(entry, entry.default, entry.name)


@pytest.mark.parametrize("family", families.FAMILIES.values(), ids=families.FAMILIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_field_of_the_system_takes_what_is_no_number(family, value):
    for cls in (family.config, family.settings, family.score_settings):
        for entry in fields.entries(cls).values():
            if entry.kind in (float, float | None):
                with pytest.raises(UserError, match="a finite number"):
                    fields.check_value(entry, value, entry.name)
