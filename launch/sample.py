"""Continues prompts with a trained model, fills gaps in them, or rewrites parts of them.

    python launch/sample.py --checkpoint=runs/quickstart "Mia was a girl from the village."
    python launch/sample.py --checkpoint=runs/quickstart --prompts_file=prompts.txt --json
    echo "Tom was a boy from the library." | python launch/sample.py --checkpoint=runs/quickstart - --stream
    python launch/sample.py --checkpoint=runs/quickstart --unconditional=4 --steps=8 --guidance_scale=3
    python launch/sample.py --checkpoint=runs/quickstart --mode=infill "Mia was a[[4]] village."
    python launch/sample.py --checkpoint=runs/quickstart --mode=edit --strength=0.6 "Mia was[[ a girl]] here."

Prints a text for each prompt, in order (a continuation, or the whole text with what is new in it); with --json one
object a line: prompt, text (what is new), tokens. Double brackets mark the gap by its length in tokens, or the words
to be rewritten.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from cola_jax import cli, cli_settings, rng, runs
from cola_jax.types import UserError

_LOAD, _SETTINGS = cli.checkpoint_flags(), cli_settings.generation_flags()
_MODE = flags.DEFINE_enum("mode", "continue", ["continue", "infill", "edit"], "what to do with a prompt")
_STRENGTH = flags.DEFINE_float("strength", 0.5, "mode edit: the time to which words are noised, up to 1")
_STREAM = flags.DEFINE_bool("stream", False, "mode continue: print each block as it comes, one prompt after another")
_PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "a UTF-8 file with one prompt a line")
_UNCONDITIONAL = flags.DEFINE_integer("unconditional", 0, "samples from nothing, besides the prompts")
_JSON = flags.DEFINE_bool("json", False, "one JSON object a line instead of text")
_SEED = flags.DEFINE_integer("seed", 0, "of the noise; sample i depends on (seed, i) alone")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "prompts generated at a time")
_CUT = "\ufffd"  # what the bytes of a character that is not whole decode to


def read_prompts(arguments: list[str]) -> list[str]:
    """Prompts from the command line ("-": lines of standard input), the file, and the empty ones asked for."""
    prompts = []
    for argument in arguments:
        prompts += sys.stdin.read().splitlines() if argument == "-" else [argument]
    if _PROMPTS_FILE.value:
        try:
            prompts += Path(_PROMPTS_FILE.value).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts_file = {_PROMPTS_FILE.value}: must be a UTF-8 file ({error})") from error
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise UserError(f"prompt {index} is empty: it must be text (--unconditional=N generates from nothing)")
    if not prompts and _UNCONDITIONAL.value < 1:
        raise UserError("no prompt: give arguments, '-' for standard input, --prompts_file or --unconditional=N")
    return prompts + [""] * _UNCONDITIONAL.value


def marked(index: int, prompt: str) -> tuple[str, str, str]:
    """The text before, in, and after the double brackets of a prompt."""
    found = re.fullmatch(r"(.*?)\[\[(.+?)\]\](.*)", prompt, re.DOTALL)
    if not found or (_MODE.value == "infill" and not found[2].isdecimal()):
        inside = "[[N]], N tokens" if _MODE.value == "infill" else "[[words]]"
        raise UserError(f"prompt {index} = {prompt!r}: with --mode={_MODE.value} must be text with one {inside}")
    return found.groups()


def continuations(run: runs.Run, prompts, settings, key) -> Iterator[list[int]]:
    ids = [run.tokenizer.encode(prompt) for prompt in prompts]
    if "max_new_tokens" not in _SETTINGS.given():  # the budget shrinks to the context; a prompt must leave room
        room = run.config.data.sequence_length - max(map(len, ids))
        settings = dataclasses.replace(settings, max_new_tokens=max(1, min(settings.max_new_tokens, room)))
    if not _STREAM.value:
        batches = run.family.generate_batches(run.model, run.params, ids, settings, key, _BATCH_SIZE.value)
        yield from (tokens for _, tokens in batches)
        return
    for index, prompt in enumerate(ids):
        tokens, text, shown = [], "", 0
        for piece in run.family.stream(run.model, run.params, [prompt], settings, key, sample_ids=[index]):
            tokens = tokens + piece.tokens[0]
            text = run.tokenizer.decode(tokens)
            ready = max(shown, len(text.rstrip(_CUT)))  # of a character only its first bytes may be there yet
            print(text[shown:ready], end="", flush=True)
            shown = ready
        print(text[shown:], end="", flush=True)
        yield tokens


def changes(run: runs.Run, prompts, settings, key) -> Iterator[tuple[list[int], str]]:
    """For each prompt, its new tokens and the whole text."""
    parts = [marked(index, prompt) for index, prompt in enumerate(prompts)]
    sides = [(run.tokenizer.encode(before), run.tokenizer.encode(after)) for before, _, after in parts]
    if _MODE.value == "infill":
        texts = [(b, int(part[1]), a) for (b, a), part in zip(sides, parts, strict=True)]
        function, options = run.family.infill, {}
    else:
        inside = [run.tokenizer.encode(part[1]) for part in parts]
        texts = [(b + i + a, len(b), len(b) + len(i)) for (b, a), i in zip(sides, inside, strict=True)]
        function, options = run.family.edit, {"strength": _STRENGTH.value}
    for start in range(0, len(texts), _BATCH_SIZE.value):
        chunk = slice(start, start + _BATCH_SIZE.value)
        ids = range(len(texts))[chunk]
        out = function(run.model, run.params, texts[chunk], settings, key=key, sample_ids=ids, **options)
        for (before, after), tokens, length in zip(sides[chunk], out.tokens.tolist(), out.lengths, strict=True):
            yield tokens[: int(length)], run.tokenizer.decode([*before, *tokens[: int(length)], *after])


def main(arguments: list[str]) -> None:
    prompts = read_prompts(arguments)
    _SETTINGS.check()  # before anything is loaded
    if _MODE.value != "continue":
        for index, prompt in enumerate(prompts):
            marked(index, prompt)
    if _BATCH_SIZE.value < 1:
        raise UserError(f"--batch_size = {_BATCH_SIZE.value}: must be at least 1")
    run = _LOAD()
    key, settings = rng.key(_SEED.value, "sample"), _SETTINGS(run.settings, run.family.name)
    if _MODE.value != "continue" and getattr(run.family, _MODE.value) is None:
        raise UserError(f"--mode = {_MODE.value}: family {run.family.name!r} only continues texts")
    if _MODE.value == "continue":
        found = ((tokens, None) for tokens in continuations(run, prompts, settings, key))
    else:
        found = changes(run, prompts, settings, key)
    for prompt, (tokens, whole) in zip(prompts, found, strict=True):
        text = run.tokenizer.decode(tokens)
        if _JSON.value:
            print(json.dumps({"prompt": prompt, "text": text, "tokens": tokens}), flush=True)
        else:
            print("" if _STREAM.value and whole is None else whole or text, flush=True)


if __name__ == "__main__":
    cli.run(main, arguments=True)
