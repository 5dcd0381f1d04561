"""Scores the stories that a trained model writes: how many are valid and coherent, for each way to generate.

    python launch/evaluate.py --checkpoint=runs/quickstart --count=512 --guidance=1,3,7 --steps=16
    python launch/evaluate.py --checkpoint=runs/quickstart --prompted --guidance=2 --steps=1,2,4,8,16
    python launch/evaluate.py --checkpoint=runs/quickstart --prompt_tokens=11 \\
        --conditioning=clean,repaint:1:1,repaint:3:0.7,left_pad,right_pad
    python launch/evaluate.py --checkpoint=runs/quickstart --gap=6

Prompts and gaps come from held-out stories. With --json=FILE the rows (with intervals and examples) are also written
there.
"""

import dataclasses
import itertools
import json
from pathlib import Path

from absl import flags

from cola_jax import cli, cli_settings, families
from cola_jax.evaluation import stories
from cola_jax.types import UserError

_LOAD = cli.checkpoint_flags()
_COUNT = flags.DEFINE_integer("count", 512, "stories a row")
_SEED = flags.DEFINE_integer("seed", 1, "of the noise")
_GUIDANCE = flags.DEFINE_list("guidance", None, "guidance scales; default: the run's config")
_STEPS = flags.DEFINE_list("steps", None, "steps a block; default: the run's config")
_CONDITIONING = flags.DEFINE_list("conditioning", ["clean"], "of the first block; repaint:R:M with its r and m")
_SETTINGS = cli_settings.generation_flags(
    skip=("guidance_scale", "steps", "conditioning", "repaint_cycles", "repaint_fraction")
)
_PROMPTED = flags.DEFINE_bool("prompted", False, "after first sentences, not from nothing")
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 0, "tokens of each prompt; 0: generate from nothing")
_GAP = flags.DEFINE_integer("gap", 0, "length in tokens of the gaps to fill; 0: write stories")
_JSON = flags.DEFINE_string("json", None, "file for the rows")


def _numbers(flag, kind, default: float) -> list:
    try:
        return [kind(value) for value in flag.value] if flag.value else [default]
    except ValueError:
        raise UserError(f"--{flag.name} = {','.join(flag.value)}: must be numbers with commas between") from None


def _conditioning(text: str) -> dict:
    name, *numbers = text.split(":")
    if name != "repaint" or not numbers:
        return {"conditioning": name}
    try:
        return {"conditioning": name, "repaint_cycles": int(numbers[0]), "repaint_fraction": float(numbers[1])}
    except (ValueError, IndexError):
        raise UserError(f"--conditioning = {text}: must be repaint:R:M, as repaint:3:0.7") from None


def main() -> None:
    prompted = _PROMPTED.value or _PROMPT_TOKENS.value > 0
    if _COUNT.value < 1 or _PROMPT_TOKENS.value < 0 or _GAP.value < 0:
        raise UserError("--count must be at least 1, --prompt_tokens and --gap at least 0")
    if prompted and _GAP.value:
        raise UserError("--gap: not allowed together with prompts")
    _SETTINGS.check()
    ways = [_conditioning(text) for text in _CONDITIONING.value]
    run = _LOAD()
    if run.config.data.corpus != "stories":
        raise UserError(f"config.data.corpus = {run.config.data.corpus!r}: only a model of 'stories' can be scored so")
    family = families.of(run.config)
    base = _SETTINGS(family.default_settings(run.config, run.tokenizer), family.name)
    if prompted:
        base = stories.fitted(base, run, _SEED.value, _COUNT.value, _PROMPT_TOKENS.value)
    variants = []
    guidance, steps = _numbers(_GUIDANCE, float, base.guidance_scale), _numbers(_STEPS, int, base.steps)
    for way, scale, number in itertools.product(ways, guidance, steps):
        settings = dataclasses.replace(base, guidance_scale=scale, steps=number, **way)
        settings.validate()
        variants.append(stories.Variant(settings, prompted, _PROMPT_TOKENS.value, _GAP.value))
    rows = stories.table(run, _COUNT.value, _SEED.value, variants, lambda line: print(line, flush=True))
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, huge_pages=True)
