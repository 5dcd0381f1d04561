"""Opens what has been trained: a run's directory, or a released checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from cola_jax import families, paths, release
from cola_jax.config import Config, DataConfig
from cola_jax.data import run_tokenizer, tokenizers
from cola_jax.families import cola
from cola_jax.families.interface import Family
from cola_jax.train import experiment, saved
from cola_jax.types import Params, UserError


class Run(NamedTuple):
    """Everything that sampling, scoring and evaluation need."""

    family: Family
    model: Any
    params: Params
    tokenizer: tokenizers.Tokenizer
    config: Config
    step: int

    @property
    def settings(self) -> Any:
        """How the run's config wants text to be generated (`Family.settings`)."""
        return self.family.default_settings(self.config, self.tokenizer)


def load(
    path: str | None,
    step: int | None = None,
    flag: str = "--checkpoint",
    tokenizer: str | None = None,
    eos_id: int = -1,
    pad_id: int = -1,
) -> Run:
    """A checkpoint of a run, or a released checkpoint.

    Args:
      path: what the flag holds: a run's directory, one of its stages, or a released directory.
      step: of the run's last stage; None: the newest that is intact.
      flag: its name, for the error.
      tokenizer: a tokenizer.json; None: the one in the directory. Only where the model has such a tokenizer.
      eos_id, pad_id: its special ids; -1: found in its file.

    Raises:
      UserError: no flag, no checkpoint, or a tokenizer that is missing or not the checkpoint's.
    """
    if not path:
        raise UserError(f"{flag} is missing: it must name the directory of a run, or of a released checkpoint")
    path = str(saved.fetched(path, flag, step))
    if tokenizer and paths.scheme(tokenizer):
        tokenizer = str(paths.fetched(tokenizer, "--tokenizer"))
    if release.is_released(path):
        if step is not None:
            raise UserError(f"--step = {step}: {path} is a released checkpoint, which has no steps")
        return _load_released(Path(path), tokenizer, eos_id, pad_id)
    found = saved.load(path, step)
    config = dataclasses.replace(found.config, data=_data(found.config.data, tokenizer, eos_id, pad_id))
    family, file = families.of(config), found.tokenizer_path
    if config.data.tokenizer == "sentencepiece" and not config.data.tokenizer_path and not file.exists():
        raise UserError(f"{file}: missing; the checkpoint needs the tokenizer that it was trained with")
    if config.data.tokenizer == "huggingface":
        file = Path(config.data.tokenizer_path or file.parent / release.TOKENIZER)
        opened = _open_tokenizer(file, config.data)
    else:
        opened = run_tokenizer.create(config.data, file)
    if found.tokenizer and f"{opened.name} {opened.fingerprint}" != found.tokenizer:
        raise UserError(f"{file}: not the tokenizer that the checkpoint {path} was trained with (its hash differs)")
    config = family.resolve(config, opened.vocab_size)
    _check_complete(path, found, {group for stage in family.stages(None, config) for group in stage.groups})
    return Run(family, family.model(config), found.variables, opened, config, found.step)


def _load_released(path: Path, tokenizer: str | None, eos_id: int, pad_id: int) -> Run:
    config = cola.released_config(release.read_model(path), eos_id, pad_id)
    config = dataclasses.replace(config, data=_data(config.data, tokenizer, eos_id, pad_id))
    file = Path(config.data.tokenizer_path or path / release.TOKENIZER)
    opened = _open_tokenizer(file, config.data)
    if opened.vocab_size > config.vae.vocab_size:
        sizes = f"{opened.vocab_size} ids, the model {config.vae.vocab_size}"
        raise UserError(f"{file}: has {sizes}: must be a tokenizer of the model's vocabulary")
    model, params = release.load(path)
    return Run(families.of(config), model, params, opened, config, 0)


def _data(config: DataConfig, tokenizer: str | None, eos_id: int, pad_id: int) -> DataConfig:
    """``config`` with what flags say of the tokenizer."""
    if config.tokenizer != "huggingface":
        if tokenizer or eos_id >= 0 or pad_id >= 0:
            raise UserError(
                f"--tokenizer, --eos_id, --pad_id: cannot be given here: the run has its own {config.tokenizer}"
            )
        return dataclasses.replace(config, tokenizer_path=experiment.local_tokenizer(config.tokenizer_path))
    changes = {"tokenizer_path": tokenizer or config.tokenizer_path}
    changes["tokenizer_path"] = experiment.local_tokenizer(changes["tokenizer_path"])
    changes |= {name: value for name, value in (("eos_id", eos_id), ("pad_id", pad_id)) if value >= 0}
    return dataclasses.replace(config, **changes)


def _open_tokenizer(file: Path, data: DataConfig) -> tokenizers.Tokenizer:
    if not file.exists():
        raise UserError(f"{file}: missing; --tokenizer names a tokenizer.json that is somewhere else")
    return run_tokenizer.create(data, file)


def _check_complete(path: str | Path, found: saved.Saved, groups: set[str]) -> None:
    """Raises UserError for a checkpoint of an early stage, which does not hold the whole model."""
    there = found.variables["params"]
    if missing := sorted(groups - set(there)):
        raise UserError(
            f"checkpoint {path}: its {found.stage} holds {', '.join(there)} only; generating and scoring "
            f"also need {', '.join(missing)}, which a later stage trains"
        )
