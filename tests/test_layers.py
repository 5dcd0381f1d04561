"""Imports go one way (DESIGN, Layout)."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LEVELS = (
    ("types", "fields", "config", "nested", "paths", "rng"),
    ("nn", "flow", "data", "sharding"),
    ("models",),
    ("objectives", "sampling", "likelihood", "released"),
    ("families",),
    ("train", "release"),
    ("runs", "evaluation"),
    ("serving",),
    ("launch", "cli", "cli_settings", "cli_evaluation"),
)
LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}
# What the trainer must not know: it walks the stages of a family, whatever its model is. A server walks its engine.
FORBIDDEN = {"train": {"models", "objectives", "sampling", "likelihood"}, "serving": {"evaluation", "train", "models"}}
# Tighter than their level.
ONLY = {
    "types": set(),
    "fields": {"types"},
    "config": {"types", "fields"},
    "nested": set(),
    "paths": {"types"},
    "rng": {"types"},
    "flow": {"flow", "rng", "types"},
    "nn": {"nn", "types"},
}


def imports(source: str) -> list[str]:
    """Full dotted names of what a module imports, also inside functions; relative ones begin with a dot."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += ["." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names]
    return names


def violations(part: str, source: str) -> list[str]:
    """Imports of a module in ``cola_jax/<part>`` that break the rules."""
    wrong = []
    for name in imports(source):
        first, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if not first or "_src" in name.split(".") or first in ("launch", "configs", "tests"):
            wrong.append(name)
        elif first == "cola_jax":
            upward = LEVEL.get(other, len(LEVELS)) > LEVEL[part]
            if upward or part in ONLY and other not in ONLY[part] or other in FORBIDDEN.get(part, ()):
                wrong.append(name)
    return wrong


def config_violations(source: str) -> list[str]:
    return [
        name
        for name in imports(source)
        if name.partition(".")[0] not in ("ml_collections", "configs")
        and not f"{name}.".startswith("cola_jax.families.")
    ]


FILES = sorted((ROOT / "cola_jax").rglob("*.py"))


def part_of(file: pathlib.Path) -> str:
    return file.relative_to(ROOT / "cola_jax").with_suffix("").parts[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_module_imports_nothing_above_it(file):
    if file == ROOT / "cola_jax" / "__init__.py":  # the package itself loads nothing
        assert not imports(file.read_text())
        return
    assert part_of(file) in LEVEL, f"{file}: not a part of the layout"
    assert not violations(part_of(file), file.read_text())


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.py")), ids=lambda file: file.name)
def test_config_imports_only_ml_collections_and_configs(file):
    assert not config_violations(file.read_text())


@pytest.mark.parametrize("file", sorted((ROOT / "launch").rglob("*.py")), ids=lambda file: file.name)
def test_binary_uses_no_private_module_and_no_tests(file):
    wrong = [name for name in imports(file.read_text()) if "_src" in name.split(".") or name.startswith("tests")]
    assert not wrong


def test_there_is_no_utils():
    files = [file for folder in ("cola_jax", "launch", "configs") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 20
    assert not [file for file in files if file.stem in ("utils", "util", "helpers", "misc")]


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("flow", "from cola_jax.models import dit"),
        ("flow", "from cola_jax.nn import visibility"),
        ("nn", "from cola_jax import models"),
        ("models", "import cola_jax.sampling.generate"),
        ("objectives", "def f():\n    from cola_jax.train import step"),
        ("data", "from cola_jax import release"),
        ("types", "from cola_jax import config"),
        ("train", "from jax._src import core"),
        ("train", "from cola_jax import cli"),
        ("train", "from cola_jax.models import cola"),
        ("train", "from cola_jax.objectives import stage1"),
        ("families", "from cola_jax.train import loop"),
        ("evaluation", "from cola_jax.serving import app"),
        ("serving", "from cola_jax.models import cola"),
        ("train", "from launch import train"),
        ("train", "from . import state"),
        ("models", "from cola_jax import unheard_of"),
    ],
)
def test_the_check_finds(part, source):
    assert violations(part, source)


@pytest.mark.parametrize("source", ["import os", "from cola_jax import models", "from cola_jax.configs import x"])
def test_the_check_of_configs_finds(source):
    assert config_violations(source)


@pytest.mark.parametrize(
    "source", ["from configs import base", "from cola_jax import families", "import ml_collections"]
)
def test_the_check_of_configs_allows(source):
    assert not config_violations(source)
