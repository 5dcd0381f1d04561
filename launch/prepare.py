"""Makes a corpus ready for training: documents of any format to shards of tokens, once, in bounded memory.

    python launch/prepare.py --input='raw/*.jsonl.zst' --format=jsonl --tokenizer=train --vocab_size=32000 \
        --output=corpora/mine

The same command goes on with a preparation that was stopped. docs/data.md has the formats, and what it costs.
"""

import os
import sys

from absl import flags

from cola_jax import paths
from cola_jax.config import DataConfig
from cola_jax.data.preparation import prepare, sources
from cola_jax.data.preparation.tokenizer_choice import Choice
from cola_jax.types import UserError

_INPUT = flags.DEFINE_string("input", None, "a file or a glob; with --format=tfds a data set, NAME or NAME:VERSION")
_FORMAT = flags.DEFINE_string("format", None, " | ".join(sources.FORMATS))
_TEXT_FIELD = flags.DEFINE_string("text_field", None, "field that holds the text; default: text, of arrayrecord none")
_SEPARATOR = flags.DEFINE_string("document_separator", "\n\n", "of text; '': one document a file; $'\\n---\\n' in bash")
_SPLIT = flags.DEFINE_string("split", "train", "of tfds")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "of tfds; default: its own")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "bytes | train | a SentencePiece .model | a tokenizer.json")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 32_000, "most pieces, with --tokenizer=train", lower_bound=300)
_IDS = [flags.DEFINE_integer(n, -1, "of a tokenizer.json; -1: in the file", -1) for n in ("eos_id", "pad_id")]
_OUTPUT = flags.DEFINE_string("output", None, "directory to make, or one that was begun")
_ALIGN = flags.DEFINE_integer("align", 1, "documents end at a multiple of so many tokens (data.align)", lower_bound=1)
_HOLDOUT = flags.DEFINE_float("holdout", DataConfig().holdout, "share that is never trained on", 0.0, 0.999)
_SHARD_TOKENS = flags.DEFINE_integer("shard_tokens", 2**28, "most tokens of a shard", lower_bound=1)
_DEDUPLICATE = flags.DEFINE_bool("deduplicate", False, "of equal documents keep the first")
_STRICT = flags.DEFINE_bool("strict", False, "stop at the first bad record; default: skip and count them")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count(), "processes that make tokens; 0: this one does", 0)


def main() -> None:
    for flag in (_INPUT, _FORMAT, _TOKENIZER, _OUTPUT):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing: it must be given ({flags.FLAGS[flag.name].help})")
    paths.local(_OUTPUT.value, "--output")
    choice = Choice(_TOKENIZER.value, _VOCAB_SIZE.value, *(flag.value for flag in _IDS))
    where = (_TEXT_FIELD.value, _SEPARATOR.value, _SPLIT.value, _DATA_DIR.value)
    source = sources.create(_FORMAT.value, _INPUT.value, *where)
    options = prepare.Options(
        align=_ALIGN.value,
        holdout=_HOLDOUT.value,
        shard_tokens=_SHARD_TOKENS.value,
        deduplicate=_DEDUPLICATE.value,
        strict=_STRICT.value,
        workers=_WORKERS.value,
    )
    with interrupts.Signals() as signals:
        try:
            prepare.prepare(source, choice, options, _OUTPUT.value, say, lambda: signals.received is not None)
        except prepare.Unfinished as error:
            if signals.received is not None:
                raise interrupts.Interrupted(str(error), signals.received) from error
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(interrupts.RESTART)


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    # Worker processes import this file; only the first one needs these.
    from cola_jax import cli
    from cola_jax.train import interrupts

    cli.run(main)
