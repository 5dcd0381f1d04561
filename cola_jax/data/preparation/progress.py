"""What a directory that is being prepared holds so far, so that a killed preparation can go on.

`progress.json` names the shards that are complete. It is written after each of them, and removed when the manifest is
there. Files that it does not name are made again.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
from pathlib import Path

from cola_jax import nested, paths
from cola_jax.data import manifest
from cola_jax.types import UserError

NAME = "progress.json"
VERSION = 1
SPLITS = ("train", "holdout")
_OURS = re.compile(
    r"(((train|holdout)-\d{5,}\.(bin|idx)|progress\.json|tokenizer\.(model|json))(\.partial)?"
    r"|manifest\.json\.partial|tokenizer\.model\.\d+\.partial)"
)


@dataclasses.dataclass(frozen=True)
class Done:
    """A complete shard, and the hash of all documents of its split up to its end."""

    info: manifest.ShardInfo
    documents_digest: str


@dataclasses.dataclass
class Progress:
    """The state of a directory.

    Attributes:
      settings: what was asked for, JSON-able (`manifest.Manifest.source`).
      tokenizer: its fingerprint.
      shards: the complete ones of each split, in order.
    """

    settings: dict
    tokenizer: str
    shards: dict[str, list[Done]]

    def write(self, directory: Path) -> None:
        """A reader sees all of it or nothing."""
        shards = {
            split: [{**dataclasses.asdict(d.info), "documents_digest": d.documents_digest} for d in found]
            for split, found in self.shards.items()
        }
        body = {"version": VERSION, "settings": self.settings, "tokenizer": self.tokenizer, "shards": shards}
        replace(directory / NAME, (json.dumps(body, indent=1) + "\n").encode())


def replace(path: Path, content: bytes) -> None:
    """Writes a file of which a reader sees all or nothing, whenever the machine stops."""
    paths.write_atomically(path, content)
    sync(path.parent)


def sync(directory: Path) -> None:
    """Makes the names of new files last."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(directory: Path) -> Progress | None:
    """The state of a directory; None if nothing was begun in it.

    Raises:
      UserError: it is damaged, or another version wrote it.
    """
    path = directory / NAME
    again = f"remove {directory} and prepare again"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["version"] != VERSION:
            raise UserError(f"{path}: version = {body['version']!r}: must be {VERSION}; {again}")
        shards = {}
        for split in SPLITS:
            found = [dict(shard) for shard in body["shards"][split]]
            digests = [shard.pop("documents_digest") for shard in found]
            infos = [manifest.ShardInfo(**shard) for shard in found]
            shards[split] = [Done(info, digest) for info, digest in zip(infos, digests, strict=True)]
        return Progress(body["settings"], body["tokenizer"], shards)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {again}") from None
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: must be as launch/prepare.py wrote it ({error!r}); {again}") from None


def refuse_differences(directory: Path, before: dict, after: dict) -> None:
    """Raises:
    UserError: the directory was begun with other settings.
    """
    found = nested.differences(before, after)
    if found:
        shown = "; ".join(map(str, found[:4])) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")
        raise UserError(f"--output = {directory}: was begun with other settings ({shown}); must be a new directory")


def refuse_foreign(directory: Path) -> None:
    """Raises:
    UserError: the directory holds what no preparation wrote, or is no directory.
    """
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"--output = {directory}: is a file; must be a new directory")
    names = sorted(path.name for path in directory.iterdir())
    there = [name for name in names if not (name.endswith(".partial") and _OURS.fullmatch(name))]
    if there and NAME not in there and manifest.NAME not in there:
        raise UserError(f"--output = {directory}: holds {there[0]} already; must be a new directory, or one begun here")


def intact(directory: Path, done: list[Done]) -> list[Done]:
    """The shards before the first one whose files are not what they were."""
    for number, shard in enumerate(done):
        for suffix, expected in ((".bin", shard.info.bin_sha256), (".idx", shard.info.idx_sha256)):
            try:
                if manifest.file_sha256(directory / (shard.info.name + suffix)) != expected:
                    return done[:number]
            except OSError:
                return done[:number]
    return done


def clean(directory: Path, keep: set[str]) -> None:
    """Removes what a preparation wrote, except files whose name without suffix is in ``keep``."""
    for path in directory.iterdir():
        if _OURS.fullmatch(path.name) and (path.suffix == ".partial" or path.stem not in keep):
            path.unlink()


def remove(directory: Path) -> None:
    """Takes back all that was begun, and the directory if there is nothing else in it."""
    with contextlib.suppress(OSError):
        clean(directory, keep=set())
        directory.rmdir()


@contextlib.contextmanager
def alone(directory: Path):
    """Holds the directory: no other process prepares it meanwhile.

    Raises:
      UserError: another one does.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output = {directory}: another process is preparing it") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)
