"""Speed of generation and of the training step (the last stage), random weights, against this device's matmul rate.

    python launch/benchmark.py --config=configs/benchmark.py --batch=1,8
    python launch/benchmark.py --config=configs/paper_2b.py --what=generation --dtype=bfloat16 --batch=1,8,32

Prints a line for each row; with --json=FILE the rows are also written there.
"""

import dataclasses
import json
from pathlib import Path

from absl import flags

from cola_jax import cli, families
from cola_jax.evaluation import benchmark
from cola_jax.types import UserError

_CONFIG = cli.config_flag()
_WHAT = flags.DEFINE_list("what", ["generation", "training"], "what to measure")
_DTYPE = flags.DEFINE_list("dtype", ["float32"], "of the computation: float32, bfloat16")
_BATCH = flags.DEFINE_list("batch", ["1", "8"], "sequences at a time")
_PROMPT = flags.DEFINE_integer("prompt", 64, "tokens of a prompt")
_REPEATS = flags.DEFINE_integer("repeats", 5, "the fastest counts")
_JSON = flags.DEFINE_string("json", None, "file for the rows")


class _NoTokenizer:
    """Random tokens have no end of text."""

    eos_id = pad_id = None


def _log(row: dict) -> None:
    print(
        f"{row['what']:10s} {row['dtype']:8s} batch {row['batch']:3d}: {row['tokens_per_s']:8.1f} tokens/s, "
        f"{row['flops_per_s'] / 1e9:.0f} of {row['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s of matmul "
        f"({100 * row['share_of_matmul']:.0f} %), compiled in {row['compile_s']:.1f} s, "
        f"peak memory {row['peak_memory_bytes'] / 2**30:.2f} GiB",
        flush=True,
    )


def main() -> None:
    config = cli.read_config(_CONFIG)
    if not benchmark.vocabulary(config):
        raise UserError("config: the model's vocab_size = 0: must be the size of a vocabulary here")
    try:
        batches = [int(size) for size in _BATCH.value]
    except ValueError:
        raise UserError(f"--batch = {','.join(_BATCH.value)}: must be numbers with commas between") from None
    checks = {"what": ("generation", "training"), "dtype": ("float32", "bfloat16")}
    for flag in (_WHAT, _DTYPE):
        if wrong := [value for value in flag.value if value not in checks[flag.name]]:
            raise UserError(f"--{flag.name} = {wrong[0]!r}: must be one of {', '.join(checks[flag.name])}")
    if min(batches) < 1 or _REPEATS.value < 1 or _PROMPT.value < 0:
        raise UserError("--batch and --repeats must be at least 1, --prompt at least 0")
    family = families.of(config)
    settings = dataclasses.replace(family.default_settings(config, _NoTokenizer()), context=None)
    rows = []
    for dtype in _DTYPE.value:
        for what in _WHAT.value:
            for batch in batches:
                if what == "generation":
                    row = benchmark.generation(config, dtype, batch, _PROMPT.value, settings, _REPEATS.value)
                else:
                    row = benchmark.training(config, dtype, batch, _REPEATS.value)
                rows.append(row)
                _log(row)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, huge_pages=True)
