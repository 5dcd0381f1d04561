"""Paths in buckets, against one in memory: what is read is copied, what is written is refused in one line."""

import pathlib
import subprocess
import sys

import environment
import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cola_jax import paths, release
from cola_jax.train import experiment, loop, saved
from cola_jax.types import TemporaryError, UserError

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "tiny"


class Bucket(MemoryFileSystem):
    """What gcsfs is to etils.epath, in memory."""

    protocol, store, pseudo_dirs, broken = ("gcs", "gs"), {}, [""], None

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def _open(self, *arguments, **options):
        if self.broken is not None:
            raise self.broken
        return super()._open(*arguments, **options)


@pytest.fixture
def bucket(monkeypatch):
    """Puts a directory of this machine into gs://bucket."""
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    monkeypatch.setattr(paths, "_is_installed", lambda package: package == "gcsfs")
    files = Bucket()

    def put(source: pathlib.Path, name: str) -> str:
        for path in [source] if source.is_file() else source.rglob("*"):
            if path.is_file():
                place = f"gs://bucket/{name}/{path.relative_to(source)}".removesuffix("/.")
                files.pipe_file(place, path.read_bytes())
        return f"gs://bucket/{name}"

    yield put
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    Bucket.broken = None


@pytest.mark.parametrize("value", ["gs://bucket/run", "s3://x/y", "file:///tmp/x", pathlib.Path("gs://bucket/run")])
def test_a_url_is_no_path_of_this_machine(value):
    with pytest.raises(UserError, match="--workdir = .*:// cannot be used here; must be a path of this") as caught:
        paths.local(value, "--workdir")
    assert "\n" not in str(caught.value)
    assert paths.scheme(value) in ("gs", "s3", "file")


@pytest.mark.parametrize("value", ["run", "/a/b", "~/x", "a:b", "C:/x", "10.0.0.2:/volume", "x=1: y/z", ""])
def test_other_paths_are(value):
    assert paths.scheme(value) == "" and paths.local(value, "x") == pathlib.Path(value).expanduser().absolute()
    assert paths.fetched(value, "x") == paths.local(value, "x")


def test_what_cannot_be_read_says_why(monkeypatch):
    for value in ("ftp://host/x", "memory://x", "file:///x"):
        with pytest.raises(UserError, match=f"--checkpoint = {value}: must be a path .* one of gs://, s3://, az://"):
            paths.check(value, "--checkpoint")
    monkeypatch.setattr(paths, "_is_installed", lambda package: False)
    for value, package in (("gs://b/x", "gcsfs"), ("s3://b/x", "s3fs"), ("az://b/x", "adlfs")):
        with pytest.raises(UserError, match=f"x = {value}: needs the package {package}: pip install {package}"):
            paths.fetched(value, "x")
    monkeypatch.setattr(paths, "_is_installed", lambda package: package == "tensorflow")
    paths.check("gs://b/x", "x")


def test_files_and_directories_are_copied(bucket, tmp_path):
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "one").write_bytes(b"1")
    (tmp_path / "d" / "e" / "two").write_bytes(b"22")
    url = bucket(tmp_path / "d", "place/d")
    assert paths.listed(url, "x") == ["e", "one"] and paths.listed("gs://bucket/none", "x") == []
    copy = paths.fetched(url + "/", "x")
    assert copy.name == "d" and (copy / "one").read_bytes() == b"1" and (copy / "e" / "two").read_bytes() == b"22"
    some = paths.fetched(url, "x", lambda name: name.parts[0] == "e")
    assert (some / "e" / "two").exists() and not (some / "one").exists() and some != copy
    one = paths.fetched(url + "/one", "x")
    assert one.name == "one" and one.read_bytes() == b"1"
    with pytest.raises(UserError, match="x = gs://bucket/none: nothing is there"):
        paths.fetched("gs://bucket/none", "x")


@pytest.mark.parametrize(
    "error, kind, words",
    [
        (PermissionError("403"), UserError, "may not be read from here"),
        (OSError("reset by peer"), TemporaryError, "cannot be read: OSError: reset by peer"),
        (RuntimeError("no\ncredentials"), UserError, "cannot be read: RuntimeError: no credentials"),
    ],
)
def test_a_bucket_that_fails(bucket, tmp_path, error, kind, words):
    (tmp_path / "f").write_text("x")
    url = bucket(tmp_path / "f", "f")
    Bucket.broken = error
    with pytest.raises(kind, match=f"x = gs://bucket/f: {words}") as caught:
        paths.fetched(url, "x")
    assert "\n" not in str(caught.value)


def test_a_released_checkpoint_is_loaded_from_a_bucket(bucket, tmp_path):
    import jax
    import numpy as np

    url = bucket(GOLDEN, "cola")
    expected, found = release.load(GOLDEN), release.load(url)
    assert expected[0] == found[0]
    jax.tree.map(np.testing.assert_array_equal, expected[1], found[1])
    with pytest.raises(UserError, match="path = gs://bucket/new: .* must be a path of this machine"):
        release.save("gs://bucket/new", *found)


def test_of_a_run_one_checkpoint_is_copied(bucket, tmp_path):
    names = [
        "config.json",
        "tokenizer.model",
        "metrics.jsonl",
        "stage1/9/meta/m",
        "stage2/4/meta/m",
        "stage2/12/meta/m",
    ]
    for name in names:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(name)
    url = bucket(tmp_path / "run", "run")

    def there(place):
        return sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())

    assert there(saved.fetched(url, "--checkpoint")) == ["config.json", "stage2/12/meta/m", "tokenizer.model"]
    assert "stage2/4/meta/m" in there(saved.fetched(url, "--checkpoint", 4))
    stage = saved.fetched(url + "/stage1", "--checkpoint")
    assert stage.name == "stage1" and there(stage.parent) == ["config.json", "stage1/9/meta/m", "tokenizer.model"]
    with pytest.raises(UserError, match="--step = 5: run/stage2 has no such checkpoint; it must be one of 4, 12"):
        saved.fetched(url, "--checkpoint", 5)
    with pytest.raises(UserError, match="--checkpoint = gs://bucket/run/none: no checkpoint here"):
        saved.fetched(url + "/none", "--checkpoint")
    released = saved.fetched(bucket(GOLDEN, "cola"), "--checkpoint")
    assert release.is_released(released) and set(there(GOLDEN)) - set(there(released)) == {"io.npz"}


def test_a_tokenizer_is_copied(bucket, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    url = bucket(tmp_path / "tokenizer.json", "tokenizer.json")
    copy = pathlib.Path(experiment.local_tokenizer(url))
    assert copy.name == "tokenizer.json" and copy.read_text() == "{}" and copy.parent != tmp_path
    for path in ("", "here/tokenizer.json"):
        assert experiment.local_tokenizer(path) == path


def test_a_run_is_not_kept_in_a_bucket(tmp_path, monkeypatch):
    from cola_jax import families

    monkeypatch.chdir(tmp_path)
    for directory in ("gs://bucket/run", pathlib.Path("gs://bucket/run")):
        with pytest.raises(UserError, match="--workdir = gs:/.*: gs:// cannot be used here; must be a path of this"):
            loop.train(families.parse({}), directory)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--workdir=gs://bucket/run"], "--workdir = gs://bucket/run: gs:// cannot be used here"),
        (["--compilation_cache=ftp://x/y"], "--compilation_cache = ftp://x/y: must be a path of this machine, or"),
        (["--workdir=file:///tmp/x"], "--workdir = file:///tmp/x: file:// cannot be used here"),
    ],
)
def test_flags_with_urls_are_refused_before_anything_starts(tmp_path, flags, words):
    command = [sys.executable, ROOT / "launch/train.py", f"--config={ROOT}/configs/quickstart.py", *flags]
    env = environment.process(PYTHONPATH=str(ROOT), GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and words in result.stderr
    assert not list(tmp_path.iterdir())
