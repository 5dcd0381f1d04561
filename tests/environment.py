"""The environment of tests and of the processes that they start: virtual CPU devices, and quick compilation.

Most of the time of these tests is compilation. Without most optimizations, without XLA's fusion emitters and with one
LLVM module a program it takes a quarter; what programs then take longer to run is less.
"""

import importlib.metadata
import os

# Flags come and go with XLA, which ends a process that is given one it does not know.
_KNOWN = importlib.metadata.version("jax").startswith("0.10.")
_QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 " if _KNOWN else ""


def variables(devices: int = 1, cache: str | os.PathLike | None = None, **others: str) -> dict[str, str]:
    """What a process needs that has so many devices.

    Args:
      cache: directory of compiled programs that processes share; None for none.
      others: more variables.
    """
    found = {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"{_QUICK}--xla_force_host_platform_device_count={devices}",
    }
    if cache is not None:
        found["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        found["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        found["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    return found | others


def process(devices: int = 1, cache: str | os.PathLike | None = None, **others: str) -> dict[str, str]:
    """The whole environment of a process: this one's, and `variables`."""
    return os.environ | variables(devices, cache, **others)
