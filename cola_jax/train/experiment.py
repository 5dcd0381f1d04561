"""What a run trains: the model and stages of its family, and its data."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cola_jax import families, paths
from cola_jax.config import Config, DataConfig
from cola_jax.data import manifest, pipeline, run_tokenizer
from cola_jax.data.tokenizers import Tokenizer
from cola_jax.families.interface import Family, Stage
from cola_jax.train import distributed
from cola_jax.types import Key, Params, Place, UserError


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a run trains; tests put a toy in the place of the model.

    Attributes:
      config: with everything resolved (the vocabulary size).
      init: variables of the whole model from a key, boxed with logical axes.
      stages: in their order.
      dataset: ``(split, seed, rows) -> grain.IterDataset`` of batches, of which it has the rows that the process needs.
      fingerprint: ``seed -> dict``, what defines the order of the data.
      model, tokenizer: for the sampler.
    """

    config: Config
    init: Callable[[Key], Params]
    stages: Sequence[Stage]
    dataset: Callable[[str, int, np.ndarray], Any]
    fingerprint: Callable[[int], dict]
    model: Any = None
    tokenizer: Any = None


def build(config: Config, workdir: Place, family: Family | None = None) -> Experiment:
    """The experiment of a config; trains the tokenizer if the run has none yet.

    Args:
      config: the run's.
      workdir: its directory.
      family: of the config; None: the one that its name says.

    Raises:
      UserError: see the tokenizers and the corpora.
    """
    file = workdir / manifest.TOKENIZER_FILES.get(config.data.tokenizer, "tokenizer.model")
    data = dataclasses.replace(config.data, tokenizer_path=local_tokenizer(config.data.tokenizer_path))
    tokenizer = distributed.first(lambda: _tokenizer(data, file))
    family = family or families.of(config)
    config = family.resolve(config, tokenizer.vocab_size)
    model = family.model(config)
    return Experiment(
        config=config,
        init=family.init(model, config),
        stages=family.stages(model, config),
        dataset=functools.partial(pipeline.create, config.data, tokenizer),
        fingerprint=functools.partial(pipeline.fingerprint, config.data, tokenizer),
        model=model,
        tokenizer=tokenizer,
    )


def _tokenizer(config: DataConfig, file: Place) -> Tokenizer:
    """`run_tokenizer.create`, also where the directory of the run is in a bucket."""
    if not paths.scheme(file):
        return run_tokenizer.create(config, file)
    is_kept = file.exists()
    here = paths.fetched(file, "--workdir") if is_kept else paths.scratch() / file.name
    tokenizer = run_tokenizer.create(config, here)
    if here.exists() and not is_kept:
        paths.write_atomically(file, here.read_bytes())
    return tokenizer


def local_tokenizer(path: str) -> str:
    """`config.data.tokenizer_path`, or a copy of it where it is in a bucket."""
    return str(paths.fetched(path, "config.data.tokenizer_path")) if paths.scheme(path) else path


def data_seed(seed: int, stage: int) -> int:
    """The seed of the order of the data in a stage (counted from 1); the stages do not see the same order."""
    return int(np.random.SeedSequence([seed, stage]).generate_state(1)[0])


def check_samples(config: Config) -> None:
    """Raises UserError for samples that are longer than the context: they are generated when all is trained."""
    budget, context = config.sample.max_new_tokens, config.data.sequence_length
    if config.train.num_samples and budget > context:
        raise UserError(f"config.sample.max_new_tokens = {budget}: must be at most data.sequence_length = {context}")
