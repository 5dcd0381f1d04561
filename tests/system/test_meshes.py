"""The short version of `meshes.py`: the real program in two processes of two devices each."""

import meshes
import pytest

pytestmark = pytest.mark.slow
STEPS = 12


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    meshes.train(workdir, "1x1:1,1,1", STEPS)
    return meshes.result(workdir)


def test_a_mesh_trains_as_one_device_does(expected, tmp_path):
    meshes.train(tmp_path / "run", "2x2:1,2,2", STEPS)
    losses, parameters = meshes.differences(meshes.result(tmp_path / "run"), expected)
    assert len(expected[0]) > 2 * STEPS
    assert losses < 5e-6 and parameters < 1e-4  # found: 5e-7 and 6e-6
