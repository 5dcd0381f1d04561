"""The real program on meshes of all kinds, in one process and in several, against one device.

    python tests/system/meshes.py                            # 1 x 8, 2 x 2 and 4 x 2 processes x devices
    python tests/system/meshes.py 2x2:1,2,2                  # some: processes x devices : data, fsdp, tensor

50 steps of tests/system/tiny.py, 25 of each stage, stage 2 joint. Prints the largest relative difference of a loss and
the largest difference of a parameter at the end.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "train")]
MESHES = [
    *[f"1x8:{mesh}" for mesh in ("8,1,1", "1,8,1", "1,1,8", "2,2,2")],
    *[f"2x2:{mesh}" for mesh in ("4,1,1", "1,4,1", "1,1,4", "1,2,2")],
    *[f"4x2:{mesh}" for mesh in ("8,1,1", "1,8,1", "1,1,8", "2,2,2")],
]
# Eight heads, so that the tensor axis has what to divide.
SIZES = ["--config.vae.dim=64", "--config.vae.num_heads=8", "--config.vae.ffn_dim=128", "--config.dit.dim=64"]
SIZES += ["--config.dit.num_heads=8"]
REPORT = ["--config.train.log_every=1", "--config.train.num_samples=0"]


def train(workdir: Path, name: str, steps: int = 25) -> None:
    """One run of so many steps a stage; `name` as in MESHES."""
    import environment
    import processes

    places, sizes = name.split(":")
    count, devices = (int(number) for number in places.split("x"))
    mesh = [f"--config.train.mesh_{a}={n}" for a, n in zip(("data", "fsdp", "tensor"), sizes.split(","), strict=True)]
    command = [sys.executable, ROOT / "launch" / "train.py", "--config=tests/system/tiny.py", f"--workdir={workdir}"]
    command += [f"--config.{field}={steps}" for field in ("stage1.steps", "stage2.steps", "train.checkpoint_every")]
    command += [*SIZES, *REPORT, *mesh, f"--compilation_cache={workdir.parent / 'cache'}"]
    env = environment.process(devices)
    port, started = processes.free_port(), []
    for index in range(count):
        several = [f"--coordinator=127.0.0.1:{port}", f"--process_count={count}", f"--process_id={index}"]
        with open(f"{workdir}.{index}.log", "w") as log:
            started.append(
                subprocess.Popen(command + (several if count > 1 else []), cwd=ROOT, env=env, stdout=log, stderr=log)
            )
    if any(processes.wait(started, 1200)):
        raise RuntimeError(Path(f"{workdir}.0.log").read_text()[-3000:])


def result(workdir: Path) -> tuple[list, dict]:
    """(losses in the order of the steps, parameters at the end)."""
    from cola_jax.train import saved

    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows], saved.load(workdir).variables["params"]


def differences(found: tuple, expected: tuple) -> tuple[float, float]:
    """Largest relative difference of the losses, largest difference of the parameters."""
    import jax
    import numpy as np

    losses = max(abs(a - b) / abs(b) for a, b in zip(found[0], expected[0], strict=True))
    each = jax.tree.map(lambda a, b: float(np.max(np.abs(np.asarray(a) - np.asarray(b)))), found[1], expected[1])
    return losses, max(jax.tree.leaves(each))


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder) / "one", "1x1:1,1,1")
        expected = result(Path(folder) / "one")
        print(f"one device: {len(expected[0])} losses, the last one {expected[0][-1]:.4f}", flush=True)
        for index, name in enumerate(names or MESHES):
            workdir = Path(folder) / str(index)
            train(workdir, name)
            losses, parameters = differences(result(workdir), expected)
            print(f"{name:12s} losses {losses:.1e} (relative)  parameters {parameters:.1e}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
