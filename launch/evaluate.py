"""Scores the stories that a trained model writes: how many are valid and coherent, for each way to generate.

    python launch/evaluate.py --checkpoint=runs/quickstart --count=512 --guidance=1,3,7 --steps=16
    python launch/evaluate.py --checkpoint=runs/quickstart --prompted --guidance=2 --steps=1,2,4,8,16
    python launch/evaluate.py --checkpoint=runs/quickstart --prompt_tokens=11 \\
        --conditioning=clean,repaint:1:1,repaint:3:0.7,left_pad,right_pad
    python launch/evaluate.py --checkpoint=runs/quickstart --gap=6
    python launch/evaluate.py --checkpoint=runs/text --evaluators=held_out,perplexity --scorer=runs/ar

Prompts and gaps come from held-out stories. With --json=FILE the rows (with intervals and examples) are also written
there.
"""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

from absl import flags

from cola_jax import cli, cli_settings
from cola_jax.config import EvaluationConfig
from cola_jax.evaluation import evaluators, stories
from cola_jax.types import UserError

_LOAD = cli.checkpoint_flags()
_COUNT = flags.DEFINE_integer("count", 512, "stories a row, or texts of an evaluator")
_SEED = flags.DEFINE_integer("seed", 1, "of the noise")
_GUIDANCE = flags.DEFINE_list("guidance", None, "guidance scales; default: the run's config")
_STEPS = flags.DEFINE_list("steps", None, "steps a block; default: the run's config")
_CONDITIONING = flags.DEFINE_list("conditioning", None, "of the first block; repaint:R:M with its r and m")
_SETTINGS = cli_settings.generation_flags(
    skip=("guidance_scale", "steps", "conditioning", "repaint_cycles", "repaint_fraction")
)
_EVALUATORS = flags.DEFINE_list(
    "evaluators", None, f"instead of judging stories in several ways: {', '.join(evaluators.EVALUATORS)}"
)
_SCORER = flags.DEFINE_string("scorer", "", "evaluator 'perplexity': the run that scores generated texts")
_PROMPTED = flags.DEFINE_bool("prompted", False, "after first sentences, not from nothing")
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 0, "tokens of each prompt; 0: generate from nothing")
_GAP = flags.DEFINE_integer("gap", 0, "length in tokens of the gaps to fill; 0: write stories")
_JSON = flags.DEFINE_string("json", None, "file for the rows")


def _numbers(flag, kind) -> list:
    try:
        return [kind(value) for value in flag.value or ()]
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


def _variants(run, base, prompted: bool) -> list[stories.Variant]:
    """Every combination of the ways to generate that the flags name."""
    ways = [_conditioning(text) for text in _CONDITIONING.value or ()] or [{}]
    for flag, name in ((_GUIDANCE, "guidance_scale"), (_STEPS, "steps"), (_CONDITIONING, "conditioning")):
        if flag.value and not hasattr(base, name):
            raise UserError(f"--{flag.name}: the checkpoint's family {run.family.name!r} has no such setting")
    if _GAP.value and run.family.infill is None:
        raise UserError(f"--gap: family {run.family.name!r} only continues texts")
    axes = {"guidance_scale": _numbers(_GUIDANCE, float), "steps": _numbers(_STEPS, int)}
    axes = {name: values for name, values in axes.items() if values}
    variants = []
    for way, *values in itertools.product(ways, *axes.values()):
        settings = dataclasses.replace(base, **dict(zip(axes, values, strict=True)), **way)
        settings.validate()
        variants.append(stories.Variant(settings, prompted, _PROMPT_TOKENS.value, _GAP.value))
    return variants


def main() -> None:
    prompted = _PROMPTED.value or _PROMPT_TOKENS.value > 0
    if _COUNT.value < 1 or _PROMPT_TOKENS.value < 0 or _GAP.value < 0:
        raise UserError("--count must be at least 1, --prompt_tokens and --gap at least 0")
    if prompted and _GAP.value:
        raise UserError("--gap: cannot be given together with prompts")
    _SETTINGS.check()
    run, log = _LOAD(), functools.partial(print, flush=True)
    if _EVALUATORS.value:
        asked = EvaluationConfig(tuple(_EVALUATORS.value), _COUNT.value, _SCORER.value)
        found = evaluators.report(run, asked, _SEED.value, log)
    else:
        if run.config.data.corpus != "stories":
            corpus = run.config.data.corpus
            raise UserError(f"config.data.corpus = {corpus!r}: only 'stories' can be judged; --evaluators names others")
        base = _SETTINGS(run.settings, run.family.name)
        if prompted:
            base = stories.fitted(base, run, _SEED.value, _COUNT.value, _PROMPT_TOKENS.value)
        found = stories.table(run, _COUNT.value, _SEED.value, _variants(run, base, prompted), log)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, huge_pages=True)
