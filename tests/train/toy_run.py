"""A run of the toy in the test's process, or in processes of its own: ``python toy_run.py --workdir=DIR ...``."""

import dataclasses
import functools
import time
from pathlib import Path

import grain
import jax
import numpy as np
import toy_model
from absl import flags

from cola_jax import cli
from cola_jax.data import pipeline
from cola_jax.train import loop
from cola_jax.train.experiment import Experiment
from cola_jax.types import Term
from tests.data import prepared_corpora


class Batches:
    """Batch i of a stream of so many."""

    def __init__(self, seed: int, count: int):
        self._seed, self._count = seed, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict:
        return toy_model.batch(int(index), seed=self._seed)

    def __repr__(self) -> str:
        return f"Batches({self._seed}, {self._count})"


def dataset(split: str, seed: int, wanted=None):
    source = grain.MapDataset.source(Batches(seed if split == "train" else 1, 1000 if split == "train" else 2))
    if split == "train":
        source = source.shuffle(seed=seed % 2**31).repeat()
    if wanted is not None:
        source = source.map(lambda batch: {name: values[wanted] for name, values in batch.items()})
    return source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


def write_corpus(directory: Path) -> None:
    """A prepared corpus of the toy's tokens, in several shards."""
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, toy_model.VOCAB, draw.integers(1, 30)) for _ in range(300)]
    prepared_corpora.write_ids(directory, {"train": documents, "holdout": documents[:50]}, 1, shard_tokens=1500)


def prepared_experiment(config, directory: Path, workers: int = 0) -> Experiment:
    """The toy on the corpus of `write_corpus`."""
    data = {"corpus": "prepared", "files": str(directory), "tokenizer": "bytes", "num_workers": workers}
    data = dataclasses.replace(config.data, **data)
    return dataclasses.replace(
        experiment(config),
        dataset=functools.partial(pipeline.create, data, prepared_corpora.TOKENIZER),
        fingerprint=functools.partial(pipeline.fingerprint, data, prepared_corpora.TOKENIZER),
    )


def experiment(config, name="toy", poison_from=None) -> Experiment:
    """The toy as an experiment; stage 2's loss is not finite where the tokens of a row sum to ``poison_from``."""

    def stage2_terms(params, batch, keys, frozen):
        found = toy_model.stage2_terms(params, batch, keys, frozen)
        if poison_from is None:
            return found
        bad = batch["tokens"].sum(axis=1).max() >= poison_from  # whichever microbatch it is in
        value = jax.numpy.where(bad, np.inf, 0.0) * jax.numpy.ones(batch["tokens"].shape[0])
        return found | {"poison": Term(value, jax.numpy.ones_like(value), 1.0)}

    return Experiment(
        config=config,
        init=toy_model.init,
        stages=toy_model.stages(config, second=stage2_terms),
        dataset=dataset,
        fingerprint=lambda seed: {"name": name, "seed": seed},
    )


def sampler(stage, step, variables):
    total = sum(float(x.sum()) for x in jax.tree.leaves(variables))
    return [f"stage {stage} step {step}: {total!r}"]


def settings(steps=12, mesh=(1, 1, 1), accumulation=2, **train):
    return toy_model.config(
        stage1={"steps": steps},
        stage2={"steps": steps, "strategy": "interval", "interval": 3, "reference_weight": 0.1},
        optimizer2={"ema": 0.9, "accumulation": accumulation},
        train={**dict(zip(("mesh_data", "mesh_fsdp", "mesh_tensor"), mesh, strict=True)), **train},
    )


def _define_flags():
    """Flags of a run; returns a function that carries it out."""
    workdir = flags.DEFINE_string("workdir", None, "directory of the run")
    steps = flags.DEFINE_integer("steps", 120, "of each stage")
    accumulation = flags.DEFINE_integer("accumulation", 2, "of stage 2")
    mesh = flags.DEFINE_list("mesh", ["1", "1", "1"], "data,fsdp,tensor")
    hang_timeout = flags.DEFINE_float("hang_timeout", 0.0, "config.train.hang_timeout")
    hang_at = flags.DEFINE_string("hang_at", None, "line of the console that never ends")
    poison = flags.DEFINE_integer("poison_from", None, "see `experiment`")
    data = flags.DEFINE_string("data", None, "directory of a corpus of `write_corpus`, read in place of made batches")
    workers = flags.DEFINE_integer("workers", 0, "processes that read it")
    start = cli.machine_flags()

    def log(line):
        print(line, flush=True)
        while hang_at.value and hang_at.value in line:
            time.sleep(1)

    def run():
        start()
        config = settings(steps.value, tuple(map(int, mesh.value)), accumulation.value, hang_timeout=hang_timeout.value)
        one = jax.process_count() == 1
        trained = experiment(config, poison_from=poison.value)
        if data.value:
            trained = prepared_experiment(config, Path(data.value), workers.value)
        loop.train(config, workdir.value, trained, sampler if one else None, log)

    return run


if __name__ == "__main__":
    cli.run(_define_flags())
