"""Paths that people give: in the file systems of this machine, or in a bucket (gs://, s3://, az://).

What is only read (a checkpoint, a tokenizer) may be in a bucket: it is copied here first. What is written, the
directory of a run above all, is local or mounted (NFS, gcsfuse): in a bucket files cannot grow and names cannot change.
A path that cannot be used is refused in one line: `pathlib` would make a folder of the name "gs:".
"""

import atexit
import functools
import glob
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from etils import epath

from cola_jax.types import TemporaryError, UserError

# The package behind each scheme (etils.epath has TensorFlow read them instead where it is installed).
_BACKENDS = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # one slash is left where pathlib has had it

StrPath = str | os.PathLike


def scheme(value: StrPath) -> str:
    """That of a URL, as "gs"; "" for a path of this machine."""
    found = _SCHEME.match(os.fspath(value))
    return found.group(1).lower() if found else ""


def local(value: StrPath, field: str) -> Path:
    """An absolute path of this machine.

    Args:
      value: what was given.
      field: the flag or field that it was given for, as "--workdir".

    Raises:
      UserError: it is a URL.
    """
    if found := scheme(value):
        raise UserError(
            f"{field} = {os.fspath(value)}: {found}:// cannot be used here; must be a path of this machine, "
            "where a bucket can be mounted (docs/scaling.md)"
        )
    return Path(value).expanduser().absolute()


def matching(pattern: str, field: str) -> list[str]:
    """The files of this machine that a name or a glob means, sorted.

    Raises:
      UserError: there is none, or it is a URL.
    """
    local(pattern, field)
    if os.path.isfile(pattern):  # a name that exists is meant literally, even if it looks like a pattern
        return [pattern]
    if found := sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True))):
        return found
    raise UserError(f"{field} = {pattern!r}: no such file; must be a file or a glob that matches one")


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file: a reader, or a process killed at any time, finds the old content or the new."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def check(value: StrPath, field: str) -> None:
    """Raises UserError for a URL that this machine cannot read: of an unknown scheme, or without its package."""
    found = scheme(value)
    if not found:
        return
    if found not in _BACKENDS:
        known = ", ".join(f"{name}://" for name in _BACKENDS)
        raise UserError(f"{field} = {os.fspath(value)}: must be a path of this machine, or begin with one of {known}")
    if not _is_installed(_BACKENDS[found]) and not _is_installed("tensorflow"):
        package = _BACKENDS[found]
        raise UserError(f"{field} = {os.fspath(value)}: needs the package {package}: pip install {package}")


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def fetched(value: StrPath, field: str, wanted: Callable[[PurePosixPath], bool] | None = None) -> Path:
    """A path of this machine with the content of ``value``: itself, or a copy of what is in the bucket.

    The copy is in a temporary directory, which goes when the process ends.

    Args:
      value: a file or a directory.
      field: the flag or field that it was given for.
      wanted: of a directory, which files to copy by their path in it; None: all.

    Raises:
      UserError: nothing is there, or it cannot be read from here.
      TemporaryError: the network failed.
    """
    if not scheme(value):
        return Path(value).expanduser().absolute()
    check(value, field)
    return _reading(value, field, lambda: _copy(os.fspath(value).rstrip("/"), wanted))


def listed(value: StrPath, field: str) -> list[str]:
    """The names in a directory, of a bucket or of this machine; [] if there is none.

    Raises:
      UserError, TemporaryError: as `fetched`.
    """
    check(value, field)

    def names() -> list[str]:
        place = epath.Path(os.fspath(value))
        return sorted(child.name for child in place.iterdir()) if place.is_dir() else []

    return _reading(value, field, names)


def _reading(value: StrPath, field: str, read: Callable):
    try:
        return read()
    except FileNotFoundError as error:
        raise UserError(f"{field} = {os.fspath(value)}: nothing is there") from error
    except PermissionError as error:
        raise UserError(f"{field} = {os.fspath(value)}: may not be read from here") from error
    except Exception as error:  # packages of buckets raise errors of their own
        line = " ".join(str(error).split())[:200]
        kind = TemporaryError if isinstance(error, OSError) else UserError
        raise kind(f"{field} = {os.fspath(value)}: cannot be read: {type(error).__name__}: {line}") from error


@functools.cache
def _store() -> Path:
    """Where the copies of this process are."""
    place = Path(tempfile.mkdtemp(prefix="cola_jax-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def _files(place: epath.Path, below: PurePosixPath) -> Iterator[tuple[PurePosixPath, epath.Path]]:
    """The files under a directory of a bucket, with their paths in it."""
    for child in place.iterdir():
        name = below / child.name
        if child.is_dir():
            yield from _files(child, name)
        else:
            yield name, child


def _copy(url: str, wanted) -> Path:
    source, target = epath.Path(url), Path(tempfile.mkdtemp(dir=_store())) / url.rpartition("/")[2]
    if source.is_dir():
        target.mkdir()
        found = [(name, file) for name, file in _files(source, PurePosixPath()) if wanted is None or wanted(name)]
    elif source.exists():
        found = [(PurePosixPath(), source)]
    else:
        raise FileNotFoundError(url)
    for name, file in found:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as reader, open(target / name, "wb") as writer:
            shutil.copyfileobj(reader, writer, 2**24)
    return target
