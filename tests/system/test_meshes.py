"""The short version of `meshes.py`: the real program in two processes."""

import meshes
import pytest


@pytest.mark.slow
def test_two_processes_train_as_one_device_does(tmp_path):
    meshes.train(tmp_path / "one", "1x1:1,1,1")
    meshes.train(tmp_path / "two", "2x2:1,2,2")
    expected, found = (meshes.result(tmp_path / name) for name in ("one", "two"))
    losses, parameters = meshes.differences(found, expected)
    assert len(expected[0]) > 50
    assert losses < 1e-4 and parameters < 1e-3  # 25 steps of Adam, after 25 that had differed by rounding
