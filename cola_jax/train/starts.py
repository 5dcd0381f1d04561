"""What each start of a run found: versions, devices, and the fields of its config that are not as it began.

`starts.jsonl` has a line for each start. A run that goes on under other versions rounds in another way, or needs other
memory, and says so in one line.
"""

import importlib.metadata
import json
import platform
import re
import time
from collections.abc import Callable

import jax

from cola_jax import config as configs
from cola_jax import families, nested, paths
from cola_jax.config import Config
from cola_jax.train import workdir as workdirs
from cola_jax.types import Place

FILE = "starts.jsonl"
# What computes, compiles, saves and orders the data; jax's plugins for GPUs have the CUDA version in their names.
_PACKAGES = re.compile(
    r"(cola-jax|jax|jaxlib|libtpu|jax-cuda\d+-(plugin|pjrt)|flax|optax|orbax-checkpoint|tensorstore|grain|diffrax|numpy"
    r"|ml-dtypes|sentencepiece|tokenizers)"
)


def versions() -> dict[str, str]:
    """The versions of Python and of the installed packages that a run depends on."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()  # spellings differ by builder
        if _PACKAGES.fullmatch(name):
            found.setdefault(name, distribution.version)  # the first on the path is the one that is imported
    return {"python": platform.python_version(), **dict(sorted(found.items()))}


def record(config: Config, workdir: Place, log: Callable[[str], None]) -> None:
    """Notes this start in the directory of a run that was claimed; tells what is not as it was at the last one.

    In process 0 alone.

    Args:
      config: the run's, as it was given: before the vocabulary is known.
      workdir: the run's directory.
      log: prints a line.
    """
    if jax.process_index():
        return
    now = {
        "time": time.time(),
        "versions": versions(),
        "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        "processes": jax.process_count(),
        "changed": {change.name: _plain(change.after) for change in _changes(config, workdir)},
    }
    before = last(workdir)
    if before is not None and (moved := nested.differences(before["versions"], now["versions"])):
        shown = ", ".join(f"{name} {_shown(old)} -> {_shown(new)}" for name, old, new in moved)
        log(f"warning: other versions than at the last start: {shown}; results may differ by rounding")
    if before is not None and (changed := nested.differences(before["changed"], now["changed"])):
        log(f"since the last start: {', '.join(map(str, changed))} (absent: as in config.json)")
    noted = (workdir / FILE).read_bytes() if (workdir / FILE).exists() else b""
    torn = noted and not noted.endswith(b"\n")
    paths.write_atomically(workdir / FILE, noted + b"\n" * bool(torn) + json.dumps(now).encode() + b"\n")


def last(workdir: Place) -> dict | None:
    """What the last start noted; None if there was none, or its line was torn."""
    path = workdir / FILE
    for line in reversed(path.read_text().splitlines() if path.exists() else []):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and all(isinstance(entry.get(name), dict) for name in ("versions", "changed")):
            return entry
    return None


def _changes(config: Config, workdir: Place) -> list[nested.Difference]:
    default = configs.to_dict(families.get(config.family).config())
    saved = nested.filled(families.upgraded(workdirs.read_config(workdir)), json.loads(json.dumps(default)))
    now = json.loads(json.dumps(configs.to_dict(config)))
    return [change for change in nested.differences(saved, now) if workdirs.is_free(change.name)]


def _plain(value):
    return None if value is nested.ABSENT else value


def _shown(value) -> str:
    return "absent" if value is nested.ABSENT else str(value)
