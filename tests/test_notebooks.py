"""Notebooks run from top to bottom, as they are stored."""

import contextlib
import io
import json
import pathlib

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "colabs").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_notebook_runs_and_its_outputs_are_stored(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    space: dict = {}
    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 3
    for cell in cells:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("".join(cell["source"]), space)
        stored = "".join(line for output in cell["outputs"] for line in output["text"])
        assert len(stored.splitlines()) == len(printed.getvalue().splitlines()), "".join(cell["source"])
