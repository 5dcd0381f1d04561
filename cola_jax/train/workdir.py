"""The directory that belongs to one run alone."""

import fnmatch
import functools
import json

import jax

from cola_jax import config as configs
from cola_jax import families, nested, paths
from cola_jax.config import Config
from cola_jax.train import distributed
from cola_jax.types import Place, UserError

# How a run is computed, watched, kept and evaluated: these may change from one start to the next, so that a run can
# move to other devices. All of them leave what is computed as it is, but for rounding.
_FREE_FIELDS = (
    # where: the mesh, and what it divides
    *(f"train.mesh_{axis}" for axis in configs.MESH_AXES),
    "train.axes.*",
    # what it reads, if that has the fingerprint of what it has read so far: another folder, or a mixture's next phase
    "data.files",
    # how: memory against time, kernels, who prepares batches (whether their order allows it, their fingerprint says)
    *("*.accumulation", "*.remat", "*.unroll", "*.attention_kernel", "*.logit_chunk", "data.num_workers"),
    # what is told, and how often
    *("train.log_every", "train.eval_every", "train.eval_batches", "train.sample_every", "train.num_samples"),
    *("train.peak_flops", "train.hang_timeout"),
    # what is saved and kept
    *("train.checkpoint_every", "train.checkpoint_minutes", "train.keep_checkpoints", "train.milestone_*"),
    # how texts are generated and judged
    *("sample.*", "image_sample.*", "evaluation.*"),
)


def is_free(name: str) -> bool:
    """Whether a field of a config ("group.field") may change when a run is started again."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _FREE_FIELDS)


def claim(config: Config, workdir: Place) -> None:
    """Writes `config.json`, or checks that the run in this directory has the same config.

    These may differ (`is_free`): the devices and how they are used (mesh, accumulation, what is computed again,
    kernels), how often something is logged, evaluated and saved, what is kept, how the run is evaluated. A run that
    ended before it had anything but its config (a file of its data was missing, say) may begin with another.

    Raises:
      UserError: another config; names each field that differs. Nothing is touched. Or the directory cannot be
        written.
    """
    distributed.first(functools.partial(_claim, config, workdir))


def read_config(workdir: Place) -> dict:
    """The config of the run in a directory, as its `config.json` holds it.

    Raises:
      UserError: the file cannot be read.
    """
    path = workdir / "config.json"
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not a JSON file ({error}); it must be the file that the run wrote") from error


def _claim(config: Config, workdir: Place) -> None:
    now = json.loads(json.dumps(configs.to_dict(config)))
    with paths.reaching(workdir, "--workdir"):
        begun = any(name not in ("config.json", "starts.jsonl") for name in paths.listed(workdir, "--workdir"))
        is_there = (workdir / "config.json").exists()
    if is_there and (begun or jax.process_index() > 0):
        _check(read_config(workdir), now, workdir)
    elif jax.process_index() == 0:
        try:
            paths.make(workdir)
            paths.write_atomically(workdir / "config.json", json.dumps(now, indent=2).encode() + b"\n")
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"--workdir = {workdir}: must be a directory that can be written ({reason})") from error
    else:
        raise UserError(f"--workdir = {workdir}: must be a directory that all processes see")


def _check(saved: dict, now: dict, workdir: Place) -> None:
    """Raises UserError for fields that differ; one that did not exist when the run began had today's default."""
    saved = families.upgraded(saved)
    family = saved["family"]
    if family != now["family"]:
        raise UserError(f"{workdir}: holds a run of family {family!r}, not {now['family']!r}; choose another --workdir")
    default = json.loads(json.dumps(families.default(family)))
    before = nested.leaves(nested.filled(saved, default))
    changes = [change for change in nested.differences(before, nested.leaves(now)) if not is_free(change.name)]
    if changes:
        shown = ", ".join(map(str, changes))
        raise UserError(f"{workdir}: holds a run with another config ({shown}); choose another --workdir")
