"""Scores what a trained model writes: its stories, its answers to the benchmarks of the paper, or other measures.

    python launch/evaluate.py --checkpoint=runs/quickstart --count=512 --guidance=1,3,7 --steps=16
    python launch/evaluate.py --checkpoint=runs/quickstart --prompted --guidance=2 --steps=1,2,4,8,16
    python launch/evaluate.py --checkpoint=runs/quickstart --prompt_tokens=11 \\
        --conditioning=clean,repaint:1:1,repaint:3:0.7,left_pad,right_pad
    python launch/evaluate.py --checkpoint=runs/quickstart --gap=6
    python launch/evaluate.py --checkpoint=runs/text --evaluators=held_out,perplexity --scorer=runs/ar
    python launch/evaluate.py --checkpoint=runs/text --task=lambada,mmlu --data=benchmarks --output=answers
    python launch/evaluate.py --task=mmlu --data=mmlu.jsonl --predictions=written.jsonl --matcher=released

Stories are the default: valid and coherent ones, for each way to generate; their prompts and gaps come from held-out
stories. docs/tasks.md explains --task; its last line is JSON. With --json=FILE the numbers are also written there.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from cola_jax import cli, cli_evaluation, cli_settings
from cola_jax.config import EvaluationConfig
from cola_jax.evaluation import evaluators, stories, story_variants
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
_TASKS = cli_evaluation.TaskFlags()


def ways(run, base, prompted: bool = False) -> list[stories.Variant]:
    """Every combination of the ways to generate that flags name."""
    named = (_GUIDANCE.value, _STEPS.value, _CONDITIONING.value)
    return story_variants.combinations(run, base, *named, prompted, _PROMPT_TOKENS.value, _GAP.value)


def judge_stories(log) -> list[dict]:
    """The rows of the table of stories."""
    prompted = _PROMPTED.value or _PROMPT_TOKENS.value > 0
    if _PROMPT_TOKENS.value < 0 or _GAP.value < 0:
        raise UserError("--prompt_tokens and --gap must be at least 0")
    if prompted and _GAP.value:
        raise UserError("--gap: cannot be given together with prompts")
    run = _LOAD()
    if run.config.data.corpus != "stories":
        corpus = run.config.data.corpus
        raise UserError(f"config.data.corpus = {corpus!r}: only 'stories' can be judged; --evaluators names others")
    base = _SETTINGS(run.settings, run.family.name)
    if prompted:
        base = stories.fitted(base, run, _SEED.value, _COUNT.value, _PROMPT_TOKENS.value)
    return stories.table(run, _COUNT.value, _SEED.value, ways(run, base, prompted), log)


def answering(run) -> tuple[Any, int | None]:
    """The settings with which tasks are answered, and the budget that was asked for."""
    found = ways(run, _SETTINGS(run.settings, run.family.name))
    if len(found) > 1:
        raise UserError("--task: --guidance, --steps and --conditioning must have one value each")
    return found[0].settings, _SETTINGS.given().get("max_new_tokens")


def main() -> None:
    if _COUNT.value < 1:
        raise UserError(f"--count = {_COUNT.value}: must be at least 1")
    _SETTINGS.check()
    log = functools.partial(print, flush=True)
    if _TASKS.given:
        found = _TASKS(_LOAD, answering, _SEED.value, _COUNT.value, log)
        log(json.dumps(found))
    elif _EVALUATORS.value:
        asked = EvaluationConfig(tuple(_EVALUATORS.value), _COUNT.value, _SCORER.value)
        found = evaluators.report(_LOAD(), asked, _SEED.value, log)
    else:
        found = judge_stories(log)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    # To judge predictions is no long computation.
    cli.run(main, huge_pages=not any(argument.lstrip("-").startswith("predictions") for argument in sys.argv[1:]))
