"""Paths that people give: in the file systems of this machine, or in a bucket (gs://, s3://, az://).

What is only read (a checkpoint, a tokenizer) may be in any bucket: it is copied here first. The directory of a run may
be in Google Cloud Storage (`directory`); all else that is written is local or mounted (NFS, gcsfuse), as files of a
bucket cannot grow. A path that cannot be used is refused in one line: `pathlib` would make a folder of the name "gs:".
"""

import atexit
import contextlib
import functools
import glob
import importlib.util
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import fsspec
import fsspec.core
import tqdm
from etils import epath

from cola_jax.types import Place, TemporaryError, UserError

# The package behind each scheme; etils.epath would have TensorFlow in its place where that is installed.
os.environ.setdefault("EPATH_USE_TF", "false")
_BACKENDS = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # one slash is left where pathlib has had it
# Orbax and other processes write there too, which a kept listing would not show.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # tracebacks of what is then said in one line

_TOGETHER = 64  # small files of a bucket that are read at a time

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


def directory(value: StrPath, field: str) -> Place:
    """The directory of a run: an absolute path of this machine, or one in Google Cloud Storage (gs://bucket/name).

    Args:
      value: what was given.
      field: the flag or field that it was given for, as "--workdir".

    Raises:
      UserError: it is another URL, or the package that reads it is not installed.
    """
    found = scheme(value)
    if not found:
        return Path(value).expanduser().absolute()
    if found != "gs":
        raise UserError(f"{field} = {os.fspath(value)}: must be a path of this machine, or begin with gs://")
    check(value, field)
    return epath.Path(re.sub("^gs:/+", "gs://", os.fspath(value)))


def make(place: Place) -> None:
    """Makes a directory of this machine, with those above it; a bucket has none."""
    if not scheme(place):
        place.mkdir(parents=True, exist_ok=True)


def matching(pattern: str, field: str) -> list[str]:
    """The files of this machine that a name or a glob means, sorted; of the URL of a file, the copy.

    Raises:
      UserError: there is none, or the URL cannot be read.
      TemporaryError: the network failed.
    """
    if scheme(pattern):
        return [copied(pattern, field)]
    if os.path.isfile(pattern):  # a name that exists is meant literally, even if it looks like a pattern
        return [pattern]
    if found := sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True))):
        return found
    raise UserError(f"{field} = {pattern!r}: no such file; must be a file or a glob that matches one")


def write_atomically(path: Place, content: bytes) -> None:
    """Replaces a file: a reader, or a process killed at any time, finds the old content or the new.

    Raises:
      OSError: it cannot be written; UserError or TemporaryError where it is in a bucket.
    """
    if scheme(path):
        with reaching(path, verb="written", absent="there is no such bucket"):
            path.write_bytes(content)
        return
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def move(source: Place, target: Place) -> None:
    """Gives a directory another name, which nothing has. In a bucket its files are copied, then removed."""
    if not scheme(source):
        source.rename(target)
        return
    with reaching(source, verb="moved"):
        for name, file in files(source):
            file.copy(target / name, overwrite=True)
        source.rmtree()


def check(value: StrPath, field: str) -> None:
    """Raises UserError for a URL that this machine cannot read: of an unknown scheme, or without its package."""
    found = scheme(value)
    if not found:
        return
    if found not in _BACKENDS:
        known = ", ".join(f"{name}://" for name in _BACKENDS)
        raise UserError(f"{field} = {os.fspath(value)}: must be a path of this machine, or begin with one of {known}")
    package = _BACKENDS[found]
    if not _is_installed(package):
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
    with reaching(value, field):
        return _copy(os.fspath(value).rstrip("/"), wanted)


@functools.cache
def copied(value: str, field: str) -> str:
    """``value`` itself, or the one copy that this process makes of what is in the bucket, as of `fetched`."""
    return str(fetched(value, field)) if scheme(value) else value


def listed(value: StrPath, field: str) -> list[str]:
    """The names in a directory, of a bucket or of this machine; [] if there is none.

    Raises:
      UserError, TemporaryError: as `fetched`.
    """
    check(value, field)

    with reaching(value, field):
        place = epath.Path(os.fspath(value))
        return sorted(child.name for child in place.iterdir()) if place.is_dir() else []


@contextlib.contextmanager
def reaching(value: StrPath, field: str = "", verb: str = "read", absent: str = "nothing is there") -> Iterator[None]:
    """Makes one line of what the packages of buckets raise.

    Args:
      value: what is read or written.
      field: the flag or field that it was given for; "" for none.
      verb: what is done to it: "read", "written".
      absent: what it means that something is not found.

    Raises:
      UserError: it is not there, or this may not be done.
      TemporaryError: the network or the service failed.
    """
    named = f"{field} = {os.fspath(value)}" if field else os.fspath(value)
    try:
        yield
    except (UserError, TemporaryError):
        raise
    except FileNotFoundError as error:
        raise UserError(f"{named}: {absent}") from error
    except Exception as error:
        if isinstance(error, PermissionError) or status(error) in (401, 403):
            raise UserError(f"{named}: may not be {verb} from here") from error
        line = " ".join(str(error).split())[:200]
        kind = TemporaryError if isinstance(error, OSError) or is_of_network(error) else UserError
        raise kind(f"{named}: cannot be {verb}: {type(error).__name__}: {line}") from error


def status(error: BaseException) -> int:
    """The HTTP status that an exception of a bucket's package stands for; 0 for none."""
    if type(error) is OSError and str(error).startswith("Forbidden: "):  # gcsfs
        return 403
    code = getattr(error, "code", None)
    return int(code) if isinstance(code, int | str) and str(code).isdigit() else 0


def is_of_network(error: BaseException) -> bool:
    """Whether an exception of a bucket's package says that the service or the way to it failed."""
    return (
        status(error) in (408, 429)
        or status(error) >= 500
        or type(error).__module__.startswith(("aiohttp", "requests"))
    )


@functools.cache
def _store() -> Path:
    """Where the copies of this process are."""
    place = Path(tempfile.mkdtemp(prefix="cola_jax-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def scratch() -> Path:
    """A new directory of this machine, which goes when the process ends."""
    return Path(tempfile.mkdtemp(dir=_store()))


def files(place: Place, below: PurePosixPath | str = "") -> Iterator[tuple[PurePosixPath, Place]]:
    """The files under a directory, of a bucket or of this machine, with their paths in it."""
    for child in sorted(place.iterdir()):
        name = PurePosixPath(below, child.name)
        if child.is_dir():
            yield from files(child, name)
        else:
            yield name, child


def sizes(place: Place) -> dict[PurePosixPath, int]:
    """The bytes of each file under the directory of a run, by its path there; in a bucket by one request for many."""
    if not scheme(place):
        return {name: epath.Path(file).stat().length for name, file in files(place)}
    service, root = fsspec.core.url_to_fs(os.fspath(place))
    found = service.find(root, detail=True)
    return {PurePosixPath(name).relative_to(root): facts["size"] for name, facts in found.items()}


def contents(place: Place, names: Sequence[PurePosixPath]) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Files under the directory of a run, with what they hold; in a bucket many are read at a time."""
    if not scheme(place):
        yield from ((name, (place / name).read_bytes()) for name in names)
        return
    service, root = fsspec.core.url_to_fs(os.fspath(place))
    for first in range(0, len(names), _TOGETHER):
        found = service.cat([f"{root}/{name}" for name in names[first : first + _TOGETHER]])
        yield from ((PurePosixPath(name).relative_to(root), content) for name, content in found.items())


def _copy(url: str, wanted) -> Path:
    source, target = epath.Path(url), scratch() / url.rpartition("/")[2]
    if source.is_dir():
        target.mkdir()
        found = [(name, file) for name, file in files(source) if wanted is None or wanted(name)]
    elif source.exists():
        found = [(PurePosixPath(), source)]
    else:
        raise FileNotFoundError(url)
    for name, file in tqdm.tqdm(found, f"copying {url}", unit=" files", disable=None, leave=False):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as reader, open(target / name, "wb") as writer:
            shutil.copyfileobj(reader, writer, 2**24)
    return target
