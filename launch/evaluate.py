"""Scores the stories that a trained model writes: how many are valid and coherent, for each way to generate.

    python launch/evaluate.py --checkpoint=runs/quickstart --count=512 --guidance=1,3,7 --steps=16
    python launch/evaluate.py --checkpoint=runs/quickstart --prompted --guidance=2 --steps=1,2,4,8,16

With --json=FILE the rows (with intervals and examples) are also written there.
"""

import dataclasses
import json
from pathlib import Path

from absl import flags

from cola_jax import cli
from cola_jax.evaluation import stories, trained
from cola_jax.types import UserError

_LOAD = cli.checkpoint_flags()
_COUNT = flags.DEFINE_integer("count", 512, "stories a row")
_SEED = flags.DEFINE_integer("seed", 1, "of the noise")
_GUIDANCE = flags.DEFINE_list("guidance", None, "guidance scales; default: the run's config")
_STEPS = flags.DEFINE_list("steps", None, "Euler steps a block; default: the run's config")
_PROMPTED = flags.DEFINE_bool("prompted", False, "after first sentences of held-out stories, not from nothing")
_JSON = flags.DEFINE_string("json", None, "file for the rows")


def _numbers(flag, kind, default: float) -> list:
    try:
        return [kind(value) for value in flag.value] if flag.value else [default]
    except ValueError:
        raise UserError(f"--{flag.name} = {','.join(flag.value)}: allowed are numbers with commas between") from None


def main() -> None:
    run = _LOAD()
    if run.config.data.corpus != "stories":
        raise UserError(f"config.data.corpus = {run.config.data.corpus!r}: only a model of 'stories' can be scored so")
    if _COUNT.value < 1:
        raise UserError(f"--count = {_COUNT.value}: allowed is at least 1")
    base = trained.settings(run.config, run.tokenizer)
    if _PROMPTED.value:
        base = stories.fitted(base, run, _SEED.value, _COUNT.value)
    variants = []
    for guidance in _numbers(_GUIDANCE, float, base.guidance_scale):
        for steps in _numbers(_STEPS, int, base.steps):
            settings = dataclasses.replace(base, guidance_scale=guidance, steps=steps)
            settings.validate()
            variants.append(stories.Variant(settings, _PROMPTED.value))
    rows = stories.table(run, _COUNT.value, _SEED.value, variants, lambda line: print(line, flush=True))
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, huge_pages=True)
