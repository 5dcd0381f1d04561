"""Continues prompts with a trained model.

    python launch/sample.py --checkpoint=runs/quickstart "Mia was a girl from the village."
    python launch/sample.py --checkpoint=runs/quickstart --prompts_file=prompts.txt --json
    echo "Tom was a boy from the library." | python launch/sample.py --checkpoint=runs/quickstart -
    python launch/sample.py --checkpoint=runs/quickstart --unconditional=4

Prints a continuation for each prompt, in order; with --json one object a line: prompt, text, tokens.
"""

import dataclasses
import json
import sys
from pathlib import Path

from absl import flags

from cola_jax import cli, rng, sampling
from cola_jax.evaluation import trained
from cola_jax.types import UserError

_LOAD = cli.checkpoint_flags()
_PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "a UTF-8 file with one prompt a line")
_UNCONDITIONAL = flags.DEFINE_integer("unconditional", 0, "samples from nothing, besides the prompts")
_JSON = flags.DEFINE_bool("json", False, "one JSON object a line instead of text")
_SEED = flags.DEFINE_integer("seed", 0, "of the noise; sample i depends on (seed, i) alone")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "prompts generated at a time")
_SETTINGS = {
    "steps": flags.DEFINE_integer("steps", None, "Euler steps a block; default: the run's config"),
    "guidance_scale": flags.DEFINE_float("guidance_scale", None, "1: no guidance; default: the run's config"),
    "max_new_tokens": flags.DEFINE_integer("max_new_tokens", None, "default: the run's config, or what fits"),
    "temperature": flags.DEFINE_float("temperature", None, "0: the most likely token; default: the run's config"),
    "repetition_penalty": flags.DEFINE_float("repetition_penalty", None, "1: none; default: the run's config"),
}


def read_prompts(arguments: list[str]) -> list[str]:
    """Prompts from the command line ("-": lines of standard input), the file, and the empty ones asked for."""
    prompts = []
    for argument in arguments:
        prompts += sys.stdin.read().splitlines() if argument == "-" else [argument]
    if _PROMPTS_FILE.value:
        try:
            prompts += Path(_PROMPTS_FILE.value).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts_file = {_PROMPTS_FILE.value}: allowed is a UTF-8 file ({error})") from error
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise UserError(f"prompt {index} is empty: allowed is text (--unconditional=N generates from nothing)")
    if not prompts and _UNCONDITIONAL.value < 1:
        raise UserError("no prompt: allowed are arguments, '-' for standard input, --prompts_file, --unconditional=N")
    return prompts + [""] * _UNCONDITIONAL.value


def main(arguments: list[str]) -> None:
    prompts = read_prompts(arguments)
    model, params, tokenizer, config, _ = _LOAD()
    settings = trained.settings(config, tokenizer)
    given = {name: flag.value for name, flag in _SETTINGS.items() if flag.value is not None}
    settings = dataclasses.replace(settings, **given)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    if "max_new_tokens" not in given:  # the budget shrinks to the context; a prompt that fills it is refused
        room = config.data.sequence_length - max(map(len, ids))
        settings = dataclasses.replace(settings, max_new_tokens=max(1, min(settings.max_new_tokens, room)))
    batches = sampling.generate_batches(
        model, params, ids, settings, rng.key(_SEED.value, "sample"), batch_size=_BATCH_SIZE.value
    )
    for prompt, (_, tokens) in zip(prompts, batches, strict=True):
        text = tokenizer.decode(tokens)
        print(json.dumps({"prompt": prompt, "text": text, "tokens": tokens}) if _JSON.value else text, flush=True)


if __name__ == "__main__":
    cli.run(main, arguments=True)
