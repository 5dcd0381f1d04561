"""Paths in buckets, against a server that stands for Google's: what is read is copied, what cannot be used refused."""

import pathlib
import subprocess
import sys

import aiohttp
import environment
import pytest

from cola_jax import config, paths, release
from cola_jax.data import corpora, mixture
from cola_jax.train import experiment, interrupts, loop, saved
from cola_jax.types import TemporaryError, UserError

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "tiny"


@pytest.fixture
def put(bucket):
    """Puts a file or a directory of this machine into gs://bucket; gives its URL."""

    def copy(source: pathlib.Path, name: str) -> str:
        for path in [source] if source.is_file() else source.rglob("*"):
            if path.is_file():
                place = f"{name}/{path.relative_to(source)}".removesuffix("/.")
                bucket.write("bucket", place, path.read_bytes())
        return f"gs://bucket/{name}"

    return copy


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
    with pytest.raises(UserError, match="--workdir = gs://b/x: needs the package gcsfs"):
        paths.directory("gs://b/x", "--workdir")


def test_files_and_directories_are_copied(put, tmp_path):
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "one").write_bytes(b"1")
    (tmp_path / "d" / "e" / "two").write_bytes(b"22")
    url = put(tmp_path / "d", "place/d")
    assert paths.listed(url, "x") == ["e", "one"] and paths.listed("gs://bucket/none", "x") == []
    copy = paths.fetched(url + "/", "x")
    assert copy.name == "d" and (copy / "one").read_bytes() == b"1" and (copy / "e" / "two").read_bytes() == b"22"
    some = paths.fetched(url, "x", lambda name: name.parts[0] == "e")
    assert (some / "e" / "two").exists() and not (some / "one").exists() and some != copy
    one = paths.fetched(url + "/one", "x")
    assert one.name == "one" and one.read_bytes() == b"1"
    with pytest.raises(UserError, match="x = gs://bucket/none: nothing is there"):
        paths.fetched("gs://bucket/none", "x")


class Answer(Exception):
    """What gcsfs raises for an HTTP status."""

    def __init__(self, code):
        super().__init__(f"status\n{code}")
        self.code = code


@pytest.mark.parametrize(
    "error, kind, words",
    [
        (FileNotFoundError("x"), UserError, "nothing is there"),
        (PermissionError("403"), UserError, "may not be read from here"),
        (Answer(401), UserError, "may not be read from here"),
        (Answer("403"), UserError, "may not be read from here"),
        (OSError("reset by peer"), TemporaryError, "cannot be read: OSError: reset by peer"),
        (Answer(503), TemporaryError, "cannot be read: Answer: status 503"),
        (Answer(429), TemporaryError, "cannot be read: Answer: status 429"),
        (Answer(400), UserError, "cannot be read: Answer: status 400"),
        (aiohttp.ClientPayloadError("torn"), TemporaryError, "cannot be read: ClientPayloadError: torn"),
        (RuntimeError("no\ncredentials"), UserError, "cannot be read: RuntimeError: no credentials"),
    ],
)
def test_a_bucket_that_fails(error, kind, words):
    with pytest.raises(kind, match=f"x = gs://bucket/f: {words}") as caught, paths.reaching("gs://bucket/f", "x"):
        raise error
    assert "\n" not in str(caught.value)
    assert interrupts.is_temporary(caught.value) == (kind is TemporaryError)


def test_what_one_may_not_read_or_write(bucket):
    bucket.refuse = lambda method, name: 403
    with pytest.raises(UserError, match="x = gs://bucket/f: may not be read from here"):
        paths.fetched("gs://bucket/f", "x")
    with pytest.raises(UserError, match="gs://bucket/f: may not be written from here"):
        paths.write_atomically(paths.directory("gs://bucket/f", "x"), b"")
    bucket.refuse = lambda method, name: None
    with pytest.raises(UserError, match="gs://none/f: there is no such bucket"):
        paths.write_atomically(paths.directory("gs://none/f", "x"), b"")


def test_a_released_checkpoint_is_loaded_from_a_bucket(put, tmp_path):
    import jax
    import numpy as np

    url = put(GOLDEN, "cola")
    expected, found = release.load(GOLDEN), release.load(url)
    assert expected[0] == found[0]
    jax.tree.map(np.testing.assert_array_equal, expected[1], found[1])
    with pytest.raises(UserError, match="path = gs://bucket/new: .* must be a path of this machine"):
        release.save("gs://bucket/new", *found)


def test_of_a_run_one_checkpoint_is_copied(put, tmp_path):
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
    url = put(tmp_path / "run", "run")

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
    released = saved.fetched(put(GOLDEN, "cola"), "--checkpoint")
    assert release.is_released(released) and set(there(GOLDEN)) - set(there(released)) == {"io.npz"}


def test_a_tokenizer_is_copied(put, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    url = put(tmp_path / "tokenizer.json", "tokenizer.json")
    copy = pathlib.Path(experiment.local_tokenizer(url))
    assert copy.name == "tokenizer.json" and copy.read_text() == "{}" and copy.parent != tmp_path
    for path in ("", "here/tokenizer.json"):
        assert experiment.local_tokenizer(path) == path


def test_corpora_are_copied_once(bucket, put, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(name)
        put(tmp_path / name, f"data/{name}")
    text = "gs://bucket/data/a=0.7, gs://bucket/data/b=0.3; 10:gs://bucket/data/a"
    first, second = mixture.parse(text)
    one, two = first.shares
    assert [pathlib.Path(place, "manifest.json").read_text() for place in (one, two)] == ["a", "b"]
    assert first.shares == {one: 0.7, two: pytest.approx(0.3)} and second == mixture.Phase(10, {one: 1.0})
    asked = len(bucket.requests)
    assert mixture.parse(text) == (first, second) and len(bucket.requests) == asked
    (tmp_path / "corpus.txt").write_text("\n\n".join(map(str, range(50))))
    data = config.DataConfig(corpus="text", files=put(tmp_path / "corpus.txt", "corpus.txt"), holdout=0.5)
    found = [corpora.documents(data, split, 0) for split in ("train", "holdout")]  # training, then evaluation
    assert sorted(int(text) for documents in found for text in documents) == list(range(50))
    with pytest.raises(UserError, match="config.data.files = gs://bucket/none: nothing is there"):
        mixture.parse("gs://bucket/none")


@pytest.mark.parametrize("value", ["s3://bucket/run", "az://bucket/run", "file:///tmp/run"])
def test_a_run_is_not_kept_in_other_buckets(value, tmp_path, monkeypatch):
    from cola_jax import families

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--workdir = {value}: must be a path of this machine, or begin with gs://"):
        loop.train(families.parse({}), value)
    assert not list(tmp_path.iterdir())


def test_files_and_names_in_a_bucket(bucket, tmp_path):
    place = paths.directory(pathlib.Path("gs://bucket/run"), "--workdir")  # pathlib has taken one slash
    assert str(place) == "gs://bucket/run" and paths.directory(str(place), "--workdir") == place
    paths.make(place)
    assert not bucket.objects
    for name in ("old/a", "old/b/c"):
        paths.write_atomically(place / name, name.encode())
    paths.write_atomically(place / "old" / "a", b"again")
    assert bucket.read("run/old/a") == b"again"
    paths.move(place / "old", place / "new" / "old-1")
    assert bucket.names() == ["run/new/old-1/a", "run/new/old-1/b/c"] and bucket.read("run/new/old-1/b/c") == b"old/b/c"
    assert [str(name) for name, _ in paths.files(place)] == ["new/old-1/a", "new/old-1/b/c"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--workdir=s3://bucket/run"], "--workdir = s3://bucket/run: must be a path of this machine, or begin"),
        (["--compilation_cache=ftp://x/y"], "--compilation_cache = ftp://x/y: must be a path of this machine, or"),
        (["--workdir=file:///tmp/x"], "--workdir = file:///tmp/x: must be a path of this machine, or"),
    ],
)
def test_flags_with_urls_are_refused_before_anything_starts(tmp_path, flags, words):
    command = [sys.executable, ROOT / "launch/train.py", f"--config={ROOT}/configs/quickstart.py", *flags]
    env = environment.process(PYTHONPATH=str(ROOT), GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and words in result.stderr
    assert not list(tmp_path.iterdir())
