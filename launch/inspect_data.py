"""Shows what a run trains on: a prepared corpus, or the data of a config.

    python launch/inspect_data.py --data=runs/data/web
    python launch/inspect_data.py --config=configs/text.py --config.data.files=corpus.txt --rows=3
    python launch/inspect_data.py --data=runs/data/web --steps=0:1000 --batch_size=32 --sequence_length=512 --digest

Lengths of documents, fertility of the tokenizer, how full rows are, shares of a mixture, rows as text: `|` is the end
of a block, `[2]` the beginning of the second document of a row. --digest prints one sha256 of exactly the tokens of
these steps, the same for any number of processes and workers; docs/data.md explains it.
"""

import dataclasses
import re
import tempfile
from pathlib import Path

from absl import flags

from cola_jax import cli, fields
from cola_jax.config import DataConfig
from cola_jax.data import inspection, manifest, mixture, run_tokenizer
from cola_jax.train.experiment import data_seed
from cola_jax.types import UserError

_CONFIG = cli.config_flag()
_DATA = flags.DEFINE_string("data", None, "prepared corpus, or a mixture (as config.data.files); instead of --config")
_SEED = flags.DEFINE_integer("seed", 0, "with --data: config.seed of the run", 0)
_STAGE = flags.DEFINE_integer("stage", 1, "stage of the run whose data is shown; stages have orders of their own", 1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "with --data: rows a step", 1)
_LENGTH = flags.DEFINE_integer("sequence_length", 512, "with --data: tokens of a row", 1)
_PACKING = flags.DEFINE_enum("packing", "concat", ["concat", "pad", "best_fit"], "with --data: config.data.packing")
_SHUFFLE = flags.DEFINE_enum("shuffle", "documents", ["documents", "rows"], "with --data: config.data.shuffle")
_STEPS = flags.DEFINE_string("steps", "0:10", "FIRST:LAST; steps FIRST + 1 to LAST are read")
_ROWS = flags.DEFINE_integer("rows", 2, "rows shown as text", 0)
_BLOCK = flags.DEFINE_integer("block", 16, "tokens of a block in rows shown as text", 1)
_DIGEST = flags.DEFINE_bool("digest", False, "only print the sha256 of the tokens of these steps")
_PROCESSES = flags.DEFINE_integer("processes", 1, "with --digest: read as so many processes would", 1)
_WORKERS = flags.DEFINE_integer("workers", None, "with --digest: worker processes that read; default: the config's", 0)
_VERIFY = flags.DEFINE_bool("verify", False, "read all shards and compare their hashes")


def chosen() -> tuple[DataConfig, int]:
    """The data and its seed."""
    if _DATA.value is None and _CONFIG.value is None:
        raise UserError("--data is missing: it must name a prepared corpus; or --config a config file")
    if _DATA.value is None:
        found = cli.read_config(_CONFIG)
        return found.data, data_seed(found.data_seed, _STAGE.value)
    directory = mixture.directories(mixture.parse(_DATA.value, "--data"))[0]
    given = {"batch_size": _BATCH_SIZE.value, "sequence_length": _LENGTH.value, "packing": _PACKING.value}
    given |= {"shuffle": _SHUFFLE.value, "tokenizer": manifest.read(directory).tokenizer.name}
    data = DataConfig(corpus="prepared", files=_DATA.value, **given)
    fields.check(data, "data.")
    return data, data_seed(_SEED.value, _STAGE.value)


def main() -> None:
    found = re.fullmatch(r"(\d+):(\d+)", _STEPS.value)
    if not found or int(found[1]) >= int(found[2]):
        raise UserError(f"--steps = {_STEPS.value}: must be FIRST:LAST with FIRST < LAST")
    start, stop = int(found[1]), int(found[2])
    data, seed = chosen()
    with tempfile.TemporaryDirectory() as place:
        tokenizer = run_tokenizer.create(data, Path(place) / manifest.TOKENIZER_FILES.get(data.tokenizer, "tokenizer"))
    if _DIGEST.value:
        data = data if _WORKERS.value is None else dataclasses.replace(data, num_workers=_WORKERS.value)
        print(inspection.digest(data, tokenizer, seed, start, stop, _PROCESSES.value))
        return
    if data.corpus == "prepared":
        for line in (*inspection.corpora(data, _VERIFY.value), *inspection.shares(data, stop)):
            print(line)
    print(inspection.fill(data, tokenizer, seed, start, stop))
    shown = next(inspection.batches(data, tokenizer, seed, start, start + 1))
    for index in range(min(_ROWS.value, data.batch_size)):
        row = {name: values[index] for name, values in shown.items()}
        print(f"step {start + 1}, row {index}: {inspection.show_row(row, tokenizer, _BLOCK.value)!r}")


if __name__ == "__main__":
    cli.run(main)
