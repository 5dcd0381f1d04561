"""What a run is made of: model, terms, data; and the directory that belongs to it alone."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cola_jax import config as configs
from cola_jax.config import Config
from cola_jax.data import pipeline, tokenizers
from cola_jax.models import cola
from cola_jax.train import distributed, setup
from cola_jax.train import metrics as reports
from cola_jax.train import step as steps
from cola_jax.types import Key, Params, UserError


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of; tests put a toy in the place of the model.

    Attributes:
      config: with everything resolved (the vocabulary size).
      init: variables of the whole model from a key, boxed with logical axes.
      terms: of stage 1 and stage 2, ``(params, batch, keys, reference) -> {name: Term}``.
      dataset: ``(split, seed) -> grain.IterDataset`` of batches, the same in every process.
      fingerprint: ``seed -> dict``, what defines the order of the data.
      difference: lines that tell two fingerprints apart.
      model, tokenizer: for the sampler.
    """

    config: Config
    init: Callable[[Key], Params]
    terms: tuple[steps.TermsFn, steps.TermsFn]
    dataset: Callable[[str, int], Any]
    fingerprint: Callable[[int], dict]
    difference: Callable[[dict, dict], list[str]]
    model: Any = None
    tokenizer: Any = None


def build(config: Config, workdir: Path) -> Parts:
    """The parts of a real run; trains the tokenizer if the run has none yet.

    Raises:
      UserError: see the tokenizers and the corpora.
    """
    tokenizer = distributed.first(lambda: tokenizers.create(config.data, workdir / "tokenizer.model"))
    config = dataclasses.replace(config, vae=cola.with_vocabulary(config.vae, tokenizer.vocab_size))
    made = setup.model(config)
    return Parts(
        config=config,
        init=made.init,
        terms=made.terms,
        dataset=lambda split, seed: pipeline.create(config.data, tokenizer, split, seed),
        fingerprint=functools.partial(pipeline.fingerprint, config.data, tokenizer),
        difference=pipeline.difference,
        model=made.model,
        tokenizer=tokenizer,
    )


def flat(tree: dict, prefix: str = "") -> dict:
    """The leaves of nested dicts by their dotted path."""
    found = {}
    for name, value in tree.items():
        found.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return found


# Where and how a run is computed, not what: these may change from one start to the next.
_FREE_FIELDS = ("train.mesh_data", "train.mesh_fsdp", "train.mesh_tensor", "train.hang_timeout", "train.peak_flops")


def claim_workdir(config: Config, workdir: Path) -> None:
    """Writes `config.json`, or checks that the run in this directory has the same config.

    The mesh may differ, and how long a step may take: they say where a run is computed, not what.

    Raises:
      UserError: another config; names each field that differs. Nothing is touched. Or the directory cannot be
        written.
    """
    distributed.first(functools.partial(_claim, config, workdir))


def _claim(config: Config, workdir: Path) -> None:
    path = workdir / "config.json"
    now = json.loads(json.dumps(configs.to_dict(config)))
    if path.exists():
        try:
            saved = json.loads(path.read_text())
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: not a JSON file ({error}); it must be the file that the run wrote") from error
        # A field that did not exist when the run began had the value that is the default now.
        before, after = {**flat(configs.default()), **flat(saved)}, flat(now)
        names = [name for name in {**before, **after} if name not in _FREE_FIELDS]
        fields = [name for name in names if before.get(name) != after.get(name)]
        if fields:
            changes = ", ".join(f"{name}: {before.get(name)!r} -> {after.get(name)!r}" for name in fields)
            raise UserError(f"{workdir}: holds a run with another config ({changes}); choose another --workdir")
    elif jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            reports.write_atomically(path, json.dumps(now, indent=2).encode() + b"\n")
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"--workdir = {workdir}: must be a directory that can be written ({reason})") from error
    else:
        raise UserError(f"--workdir = {workdir}: must be a directory that all processes see")


def data_seed(seed: int, stage: int) -> int:
    """The seed of a stage's order of the data; the stages do not see the same order."""
    return int(np.random.SeedSequence([seed, stage]).generate_state(1)[0])
