"""The notebook on released checkpoints runs from top to bottom, as it is stored."""

import contextlib
import io
import json
import pathlib

import pytest

FILE = pathlib.Path(__file__).parent.parent / "colabs" / "released.ipynb"


@pytest.mark.slow
def test_notebook_runs_and_its_outputs_are_stored(monkeypatch):
    monkeypatch.chdir(FILE.parent)
    space: dict = {}
    cells = [cell for cell in json.loads(FILE.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 3
    for cell in cells:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("".join(cell["source"]), space)
        stored = "".join(line for output in cell["outputs"] for line in output["text"])
        assert len(stored.splitlines()) == len(printed.getvalue().splitlines()), "".join(cell["source"])
