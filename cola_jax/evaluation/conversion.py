"""Released checkpoints to runs and back, with what each needs besides the parameters."""

import dataclasses
import shutil
import time
from pathlib import Path

from jax.sharding import Mesh

from cola_jax import config as configs
from cola_jax import paths, release
from cola_jax.data import run_tokenizer
from cola_jax.families import cola
from cola_jax.released import files
from cola_jax.train import checkpoint, saved
from cola_jax.types import UserError

ORIGIN = "released.json"  # in a run's directory: what the files of the released checkpoint held besides parameters
is_released = release.is_released


class _Report:
    """Progress and the time that is left, at most one line in five seconds."""

    def __init__(self, what: str):
        self._what, self._began, self._last = what, time.monotonic(), time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < 5 and done < total:
            return
        self._last = now
        left = (now - self._began) * (total - done) / max(done, 1)
        print(f"{self._what}: {done / 1e9:.2f} of {total / 1e9:.2f} GB, ETA {left:.0f} s", flush=True)


def _has_tokenizer(path: Path, data: configs.DataConfig) -> str:
    """Name and fingerprint of the tokenizer.json in a directory, "" if there is none or its package is missing."""
    if not (path / release.TOKENIZER).exists():
        return ""
    found = run_tokenizer.create(data, path / release.TOKENIZER)
    return f"{found.name} {found.fingerprint}"


def to_run(
    source: str, target: str, dtype: str = "float32", mesh: Mesh | None = None, eos_id: int = -1, pad_id: int = -1
) -> None:
    """Writes the directory of a run that holds a released model: all of it, or nothing under this name.

    Args:
      source: the released directory.
      target: a directory that is new or empty.
      dtype: of the parameters.
      mesh: the devices to read onto; None: one.
      eos_id, pad_id: of the tokenizer; -1: found in its file.

    Raises:
      UserError: see `release.load`; the target is not empty; the disk is full.
    """
    source, target = saved.fetched(source, "--from").absolute(), paths.local(target, "--to")
    config = cola.released_config(release.read_model(source), eos_id, pad_id)
    tokenizer = _has_tokenizer(source, config.data)
    dtype = files.dtype_of(dtype, "--dtype").name
    needed = files.total_bytes(release.specs(release.read_model(source), dtype).values())
    release.prepare_target(target, needed, overwrite=False)
    kept = release.origin(source)
    _, params = release.open_lazily(source, param_dtype=dtype, mesh=mesh)
    with release.new_directory(target) as temporary:
        files.write_json(temporary / "config.json", configs.to_dict(config))
        files.write_json(temporary / ORIGIN, kept)
        if (source / release.TOKENIZER).exists():
            shutil.copyfile(source / release.TOKENIZER, temporary / release.TOKENIZER)
        checkpoint.save_params(temporary / "stage2", 0, params, config, tokenizer, _Report("converting"))
    print(f"{target}: a run with the released model as step 0 of stage 2", flush=True)


def _kept(run: Path) -> dict | None:
    file = run / ORIGIN
    if not file.exists():
        return None
    kept = files.read_json(file)
    expected = {"config": dict, "dtypes": dict, "frequencies": dict}
    for part in release.PARTS:
        for name, kind in expected.items():
            if not isinstance(kept.get(part), dict) or not isinstance(kept[part].get(name), kind):
                raise UserError(f"{file}: {part} {name}: not what the conversion wrote; without the file ours is used")
    return kept


def _own_tokenizer(run: Path, data: configs.DataConfig, trained_with: str) -> Path | None:
    """The tokenizer.json to publish with a run: one that can be read as such, and that its checkpoint was trained with.

    The config of a run that somebody else made may name any file of this machine.

    Args:
      run: the run's directory, where the file is looked for first.
      data: its config.
      trained_with: name and fingerprint, as the checkpoint has them; "": not known, then only the directory's own.

    Raises:
      UserError: the file is no tokenizer.json, or another one.
    """
    own = run / release.TOKENIZER
    file = own if own.exists() or not data.tokenizer_path else Path(data.tokenizer_path)
    if data.tokenizer != "huggingface" or not file.exists():
        return None
    found = run_tokenizer.create(dataclasses.replace(data, tokenizer_path=str(file)), file)
    known = trained_with or file == own
    if not known or trained_with and f"{found.name} {found.fingerprint}" != trained_with:
        raise UserError(
            f"{file}: not the tokenizer of this run (its hash differs) and not published: "
            f"must be the one that it was trained with, as {own}"
        )
    return file


def to_released(
    source: str,
    target: str,
    dtype: str | None = None,
    max_shard_size: int = 50 * 10**9,
    overwrite: bool = False,
    step: int | None = None,
) -> None:
    """Writes a checkpoint of a run in the released layout: all of it, or nothing under this name.

    Args:
      source: the run's directory.
      target: a directory that is new or empty, or a released one with ``overwrite``.
      dtype: of the tensors; None: what they were where the run came from a released checkpoint, else float32.
      step: of the run's last stage; None: the newest checkpoint.
      max_shard_size, overwrite: see `release.save`.

    Raises:
      UserError: see `saved.open_lazily` and `release.save`.
    """
    target = str(paths.local(target, "--to"))
    loaded = saved.open_lazily(saved.fetched(source, "--from", step), step)
    run, data, config = loaded.tokenizer_path.parent, loaded.config.data, loaded.config
    if not isinstance(config, cola.ColaConfig):
        raise UserError(f"{source}: a run of family {config.family!r}; the released layout is that of 'cola'")
    if not config.vae.vocab_size:
        config = cola.resolve(config, run_tokenizer.create(data, loaded.tokenizer_path).vocab_size)
    model = cola.make_model(config)
    file = _own_tokenizer(run, data, loaded.tokenizer)
    release.save(
        target,
        model,
        loaded.variables,
        dtype=None if dtype is None else files.dtype_of(dtype, "--dtype").name,
        kept=_kept(run),
        tokenizer=file,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=_Report("converting"),
    )
    print(f"{target}: step {loaded.step} of {source} in the released layout", flush=True)
    if file is None:
        print(f"without {release.TOKENIZER}: the run's tokenizer is {data.tokenizer}", flush=True)
