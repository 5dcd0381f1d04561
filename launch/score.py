"""Likelihood of text (exact, or ELBO and IWAE with error bars), scores of responses and candidates, as JSON lines.

    python launch/score.py --checkpoint=runs/quickstart --input=texts.jsonl --output=scores.jsonl --samples=10

A line of the input is {"text": ...}, {"prefix": ..., "response": ...} or {"prefix": ..., "candidates": [...]}; a
response follows its prefix as it is, with no space put between. A prefix that ends inside a block of the prior has no
plug-in score. Line i of the output belongs to line i of the input.
The same command resumes a run that was stopped. docs/likelihood.md explains the fields.
"""

import dataclasses
import hashlib
from pathlib import Path

import jax
from absl import flags
from tqdm import tqdm

from cola_jax import cli, cli_settings, rng, sharding
from cola_jax.config import MESH_AXES, TrainConfig
from cola_jax.evaluation import score_file
from cola_jax.likelihood import requests
from cola_jax.types import UserError

_LOAD = cli.checkpoint_flags()
_INPUT = flags.DEFINE_string("input", None, "JSON lines")
_OUTPUT = flags.DEFINE_string("output", None, "file for the results")
_SEED = flags.DEFINE_integer("seed", 0, "of all draws; those of line i depend on (seed, i) alone")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "rows scored at a time", lower_bound=1)
_END_OF_TEXT = flags.DEFINE_bool("end_of_text", True, "texts and responses are complete: score their end, too")
_MESH = {n: flags.DEFINE_integer(f"mesh_{n}", 1, "devices; 0: all that are left") for n in MESH_AXES}
_SETTINGS = cli_settings.scoring_flags()


def read(path: str | None, form: requests.Format) -> tuple[list[requests.Request], str]:
    """The requests of a file, and its hash."""
    if not path:
        raise UserError("--input is missing: it must name a file of JSON lines")
    try:
        content = Path(path).read_bytes()
        lines = content.decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input = {path}: must be a UTF-8 file ({error})") from error
    if not lines:
        raise UserError(f"--input = {path}: empty; there must be at least one line, {requests.FORMS}")
    found = [form.request(i, line, f"{path} line {i + 1}") for i, line in enumerate(lines)]
    return found, hashlib.sha256(content).hexdigest()


def main() -> None:
    _SETTINGS.check()
    if not _OUTPUT.value:
        raise UserError("--output is missing: it must name a file for the results")
    run = _LOAD()
    family, data, context = run.family, run.config.data, run.config.data.sequence_length
    settings = _SETTINGS(family.score_settings(), family.name)
    family.check_scorable(run.model, run.params)
    unit = family.tokens_per_latent(run.config)
    form = requests.Format(run.tokenizer, context, data.align, unit, _END_OF_TEXT.value)
    asked, digest = read(_INPUT.value, form)
    mesh = sharding.make_mesh(TrainConfig(**{f"mesh_{name}": flag.value for name, flag in _MESH.items()}))
    abstract = jax.eval_shape(family.init(run.model, run.config), jax.random.key(0))
    params = jax.device_put(run.params, sharding.shardings(abstract, mesh))
    checkpoint = f"{Path(flags.FLAGS.checkpoint).absolute()} step {run.step}"
    identity = {"input": digest, "checkpoint": checkpoint, "seed": _SEED.value, "end_of_text": _END_OF_TEXT.value}
    identity |= {name: value for name, value in dataclasses.asdict(settings).items() if name != "rows"}
    output, key = Path(_OUTPUT.value), rng.key(_SEED.value, "likelihood")
    done = score_file.resume(output, identity)
    scorer = family.scorer(run.model, params, settings, key, context, _BATCH_SIZE.value, mesh)
    failed = []
    with tqdm(unit="sample", dynamic_ncols=True) as bar:

        def report(now, total):
            bar.total = total
            bar.update(now - bar.n)

        for results in scorer.score(asked[done:], report):
            score_file.append(output, results)
            failed += [result["index"] for result in results if "error" in result]
    print(f"{output}: {len(asked)} lines, {done} of them were there; not scored: {failed or 'none'}", flush=True)


if __name__ == "__main__":
    cli.run(main, huge_pages=True)
