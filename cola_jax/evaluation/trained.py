"""A trained model as the binaries use it: parameters, tokenizer and config of one run, or of a released directory."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from cola_jax import config as configs
from cola_jax import release, sampling
from cola_jax.data import tokenizers
from cola_jax.models import cola
from cola_jax.train import checkpoint
from cola_jax.types import Params, UserError

_RELEASED_CONTEXT = 512  # tokens that the released model was trained on


class Trained(NamedTuple):
    """Everything that sampling and evaluation need."""

    model: cola.ColaDLM
    params: Params
    tokenizer: tokenizers.Tokenizer
    config: configs.Config
    step: int


def released_config(model: cola.ColaDLM, eos_id: int = -1, pad_id: int = -1) -> configs.Config:
    """The config of a run that a released model could have come from: its networks, and how it generates by default.

    Args:
      model: from `release.load`.
      eos_id, pad_id: of the tokenizer; -1: found in its file.
    """
    patch = model.vae_config.patch_size
    per_block = model.dit_config.block_size * patch
    config = configs.Config(
        data=configs.DataConfig(
            tokenizer="huggingface",
            eos_id=eos_id,
            pad_id=pad_id,
            align=patch,
            sequence_length=max(1, _RELEASED_CONTEXT // per_block) * per_block,
        ),
        vae=model.vae_config,
        dit=model.dit_config,
        sample=configs.SampleConfig(steps=16, guidance_scale=7.0, max_new_tokens=32, pad_prompts=True),
    )
    config.validate()
    return config


def _data(config: configs.DataConfig, tokenizer: str | None, eos_id: int, pad_id: int) -> configs.DataConfig:
    """``config`` with what flags say of the tokenizer."""
    if config.tokenizer != "huggingface":
        if tokenizer or eos_id >= 0 or pad_id >= 0:
            raise UserError(
                f"--tokenizer, --eos_id, --pad_id: not allowed here: the run has its own {config.tokenizer}"
            )
        return config
    changes = {"tokenizer_path": tokenizer or config.tokenizer_path}
    changes |= {name: value for name, value in (("eos_id", eos_id), ("pad_id", pad_id)) if value >= 0}
    return dataclasses.replace(config, **changes)


def _open_released(path: Path, data: configs.DataConfig, model: cola.ColaDLM) -> tokenizers.Tokenizer:
    file = Path(data.tokenizer_path or path / release.TOKENIZER)
    if not file.exists():
        raise UserError(f"{file}: missing; --tokenizer names a tokenizer.json that is somewhere else")
    tokenizer = tokenizers.create(data, file)
    if tokenizer.vocab_size > model.vae_config.vocab_size:
        sizes = f"{tokenizer.vocab_size} ids, the model {model.vae_config.vocab_size}"
        raise UserError(f"{file}: has {sizes}: must be a tokenizer of the model's vocabulary")
    return tokenizer


def load(
    path: str | None, flag: str = "--checkpoint", tokenizer: str | None = None, eos_id: int = -1, pad_id: int = -1
) -> Trained:
    """The newest valid checkpoint of a run's directory, or a released checkpoint.

    Args:
      path: what the flag holds.
      flag: its name, for the error.
      tokenizer: a tokenizer.json; None: the one in the directory. Only where the model has such a tokenizer.
      eos_id, pad_id: its special ids; -1: found in its file.

    Raises:
      UserError: no flag, no checkpoint, or a tokenizer that is missing or not the checkpoint's.
    """
    if not path:
        raise UserError(f"{flag} is missing: it must name the directory of a run, or of a released checkpoint")
    if release.is_released(path):
        config = released_config(release.read_model(path), eos_id, pad_id)
        config = dataclasses.replace(config, data=_data(config.data, tokenizer, eos_id, pad_id))
        found = _open_released(Path(path), config.data, release.read_model(path))
        model, params = release.load(path)
        return Trained(model, params, found, config, 0)
    loaded = checkpoint.load_params(path)
    config = dataclasses.replace(loaded.config, data=_data(loaded.config.data, tokenizer, eos_id, pad_id))
    file = loaded.tokenizer_path
    if config.data.tokenizer == "sentencepiece" and not config.data.tokenizer_path and not Path(file).exists():
        raise UserError(f"{file}: missing; the checkpoint needs the tokenizer that it was trained with")
    if config.data.tokenizer == "huggingface":
        model = cola.create(config.vae, config.dit, config.train.compute_dtype)
        found = _open_released(file.parent, config.data, model)
    else:
        found = tokenizers.create(config.data, file)
    if loaded.tokenizer and f"{found.name} {found.fingerprint}" != loaded.tokenizer:
        raise UserError(f"{file}: not the tokenizer that the checkpoint {path} was trained with (its hash differs)")
    vae = cola.with_vocabulary(config.vae, found.vocab_size)
    model = cola.create(vae, config.dit, config.train.compute_dtype)
    return Trained(model, loaded.variables, found, config, loaded.step)


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
        pad_id=tokenizer.pad_id if sample.pad_prompts else None,
        context=config.data.sequence_length,
    )
