"""A trained model as the binaries use it: parameters, tokenizer and config of one run."""

from pathlib import Path
from typing import NamedTuple

from cola_jax import config as configs
from cola_jax import sampling
from cola_jax.data import tokenizers
from cola_jax.models import cola
from cola_jax.train import checkpoint
from cola_jax.types import Params, UserError


class Trained(NamedTuple):
    """Everything that sampling and evaluation need."""

    model: cola.ColaDLM
    params: Params
    tokenizer: tokenizers.Tokenizer
    config: configs.Config
    step: int


def load(path: str | None, flag: str = "--checkpoint") -> Trained:
    """The newest valid checkpoint of a run's directory.

    Args:
      path: what the flag holds.
      flag: its name, for the error.

    Raises:
      UserError: no flag, no checkpoint, or a tokenizer that is missing or not the checkpoint's.
    """
    if not path:
        raise UserError(f"{flag} is missing: allowed is the directory of a run")
    loaded = checkpoint.load_params(path)
    config = loaded.config
    file = loaded.tokenizer_path
    if config.data.tokenizer == "sentencepiece" and not config.data.tokenizer_path and not Path(file).exists():
        raise UserError(f"{file}: missing; the checkpoint needs the tokenizer that it was trained with")
    tokenizer = tokenizers.create(config.data, file)
    if f"{tokenizer.name} {tokenizer.fingerprint}" != loaded.tokenizer:
        raise UserError(f"{file}: not the tokenizer that the checkpoint {path} was trained with (its hash differs)")
    vae = cola.with_vocabulary(config.vae, tokenizer.vocab_size)
    model = cola.create(vae, config.dit, config.train.compute_dtype)
    return Trained(model, loaded.variables, tokenizer, config, loaded.step)


def settings(config: configs.Config, tokenizer: tokenizers.Tokenizer) -> sampling.Settings:
    """How the run's config wants text to be generated."""
    sample = config.sample
    return sampling.Settings(
        steps=sample.steps,
        guidance_scale=sample.guidance_scale,
        max_new_tokens=sample.max_new_tokens,
        temperature=sample.temperature,
        repetition_penalty=sample.repetition_penalty,
        eos_id=tokenizer.eos_id,
        context=config.data.sequence_length,
    )
