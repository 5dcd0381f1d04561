"""What README and docs/ point at exists."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def names(source: str) -> set[str]:
    """Functions, classes and assigned names of a module, also inside classes."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        for target in [*getattr(node, "targets", []), getattr(node, "target", None)]:
            if isinstance(target, ast.Name):
                found.add(target.id)
    return found


def test_every_equation_has_the_function_that_it_names():
    text = (ROOT / "docs" / "equations.md").read_text()
    places = re.findall(r"`([a-z_/0-9]+\.py):([A-Za-z_.]+)`", text)
    assert len(places) > 60
    for file, name in places:
        there = names((ROOT / "cola_jax" / file).read_text())
        assert set(name.split(".")) <= there, f"{file}:{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for command in re.findall(r"(?:launch|configs)/\w+\.(?:py|sh)", text):
        assert (ROOT / command).exists() or command == "configs/mine.py", command


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_every_section_of_the_specification_that_the_code_names_is_there():
    sections = set(re.findall(r"^## (\d+)", (ROOT / "docs" / "spec.md").read_text(), re.MULTILINE))
    named = set()
    for folder in ("cola_jax", "configs", "launch"):
        for file in (ROOT / folder).rglob("*.py"):
            named |= set(re.findall(r"SPEC (\d+)", file.read_text()))
    assert named and named <= sections, named - sections
