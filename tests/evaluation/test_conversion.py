"""Released checkpoints to runs and back, and released directories in the place of runs."""

import filecmp
import json
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from cola_jax import config as configs
from cola_jax import families, release, rng, runs, sampling, sharding
from cola_jax.evaluation import conversion
from cola_jax.released import files
from cola_jax.train import checkpoint, verified, workdir
from cola_jax.types import UserError

tokenizers = pytest.importorskip("tokenizers")
GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "tiny"
LETTERS = "abcdefghijklmnopqrstuvwxyz ."


def tokenizer_json() -> str:
    """One token a letter; the special ids of the golden model."""
    vocabulary = {letter: index for index, letter in enumerate(LETTERS)} | {"?": 60}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    data = json.loads(made.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data["added_tokens"] = [{"id": i, "content": c} | flags for i, c in ((65, "<|endoftext|>"), (66, "<|pad|>"))]
    data["model"]["vocab"] |= {"<|endoftext|>": 65, "<|pad|>": 66}
    return json.dumps(data)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The golden checkpoint in bfloat16, with foreign metadata and a tokenizer."""
    place = tmp_path_factory.mktemp("released") / "cola"
    for part in release.PARTS:
        (place / part).mkdir(parents=True)
        tensors = {n: x.astype("bfloat16") for n, x in load_file(GOLDEN / part / "model.safetensors").items()}
        save_file(tensors, place / part / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((GOLDEN / part / "config.json").read_text()) | {"dtype": "bfloat16", "return_dict": True}
        (place / part / "config.json").write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")
    (place / "tokenizer.json").write_text(tokenizer_json())
    return place


@pytest.fixture(scope="module")
def run(released, tmp_path_factory):
    place = tmp_path_factory.mktemp("run") / "run"
    conversion.to_run(str(released), str(place))
    return place


def assert_same_directories(one, other):
    names = sorted(path.relative_to(one) for path in one.rglob("*"))
    assert names == sorted(path.relative_to(other) for path in other.rglob("*")) and len(names) == 7
    for name in names:
        assert (one / name).is_dir() or filecmp.cmp(one / name, other / name, shallow=False), name


def test_there_and_back_is_byte_for_byte_the_same(released, run, tmp_path):
    conversion.to_released(str(run), str(tmp_path / "back"))
    assert_same_directories(released, tmp_path / "back")


@pytest.mark.slow  # small programs for each parameter on each layout
def test_the_way_over_a_mesh_is_the_same(released, tmp_path):
    mesh = sharding.make_mesh(configs.TrainConfig(mesh_data=2, mesh_fsdp=2, mesh_tensor=2))
    conversion.to_run(str(released), str(tmp_path / "run"), "bfloat16", mesh)
    stored = json.loads((tmp_path / "run/stage2/0/params/_METADATA").read_text())["tree_metadata"]
    assert len(stored) == len(jax.tree.leaves(release.open_lazily(released)[1]))
    conversion.to_released(str(tmp_path / "run"), str(tmp_path / "back"), max_shard_size=10**9)
    assert_same_directories(released, tmp_path / "back")


def test_a_run_is_accepted_wherever_runs_are(released, run):
    first, second = runs.load(str(released)), runs.load(str(run))
    assert first.model == second.model and first.config == second.config
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert {x.dtype.name for x in jax.tree.leaves(second.params)} == {"float32"}
    settings = first.settings
    assert (settings.steps, settings.guidance_scale, settings.max_new_tokens) == (16, 7.0, 32)
    assert (settings.eos_id, settings.pad_id, settings.context) == (65, 66, 512)
    assert first.tokenizer.decode(first.tokenizer.encode("a cat.")) == "a cat."
    prompt = first.tokenizer.encode("a cat.")
    key = rng.key(0, "sample")
    out = [sampling.generate(run.model, run.params, [prompt], settings, key) for run in (first, second)]
    np.testing.assert_array_equal(out[0].tokens, out[1].tokens)
    assert np.isfinite(out[0].latents).all()


def test_parameters_are_verified(run, tmp_path):
    """An array that is not what its hash says is refused, lazily too."""
    place = tmp_path / "run"
    shutil.copytree(run, place)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        meta = checkpointer.restore(place / "stage2/0/meta")
        meta["body"]["hashes"]["params"]["vae/encoder/wte"] ^= 1
        meta["checksum"] = verified.checksum(meta["body"])
        shutil.rmtree(place / "stage2/0/meta")
        checkpointer.save(place / "stage2/0/meta", args=ocp.args.JsonSave(meta))
    with pytest.raises(UserError, match="stage2/0: params vae/encoder/wte does not match its hash"):
        conversion.to_released(str(place), str(tmp_path / "back"))
    assert not (tmp_path / "back").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_run_of_another_config_does_not_take_its_directory(run):
    with pytest.raises(UserError, match="with another config .*tokenizer: 'huggingface' -> 'sentencepiece'"):
        workdir.claim(families.cola.ColaConfig(), run)


def test_type_of_the_tensors(run, tmp_path):
    conversion.to_released(str(run), str(tmp_path / "wide"), "float32")
    assert {spec.dtype.name for spec in files.Weights(tmp_path / "wide" / "cola_vae").specs.values()} == {"float32"}
    with pytest.raises(UserError, match="--dtype = 'int8': must be one of"):
        conversion.to_released(str(run), str(tmp_path / "narrow"), "int8")


def test_nothing_is_replaced_or_half_written(released, run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="run: not empty"):
        conversion.to_run(str(released), str(run))
    with pytest.raises(UserError, match="no checkpoint here"):
        conversion.to_released(str(tmp_path), str(tmp_path / "out"))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint._LazyHandler, "serialize", full)
    with pytest.raises(UserError, match="not saved: OSError: .*No space left on device"):
        conversion.to_run(str(released), str(tmp_path / "out"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="GB are free"):
        conversion.to_run(str(released), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_tokenizer_of_a_released_directory(released, run, tmp_path):
    place = tmp_path / "cola"
    place.mkdir()
    for part in release.PARTS:
        (place / part).symlink_to(released / part)
    with pytest.raises(UserError, match="tokenizer.json: missing; --tokenizer names"):
        runs.load(str(place))
    found = runs.load(str(place), tokenizer=str(released / "tokenizer.json"), eos_id=1, pad_id=2)
    assert (found.tokenizer.eos_id, found.tokenizer.pad_id) == (1, 2)
    big = json.loads(tokenizer_json())
    big["model"]["vocab"]["z!"] = 67
    (place / "tokenizer.json").write_text(json.dumps(big))
    with pytest.raises(UserError, match="has 68 ids, the model 67"):
        runs.load(str(place))
    with pytest.raises(UserError, match="its hash differs"):
        runs.load(str(run), eos_id=1)


def with_meta(run, place, change):
    """A copy of a run with something else in the description of its checkpoint."""
    shutil.copytree(run, place)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        meta = checkpointer.restore(place / "stage2/0/meta")
        change(meta["body"])
        meta["checksum"] = verified.checksum(meta["body"])
        shutil.rmtree(place / "stage2/0/meta")
        checkpointer.save(place / "stage2/0/meta", args=ocp.args.JsonSave(meta))
    return place


def test_only_the_tokenizer_of_the_run_is_published(released, run, tmp_path):
    """The config of a run from somewhere else may name any file of this machine."""
    secret, other = tmp_path / "secret", tmp_path / "other.json"
    secret.write_text("password")
    changed = json.loads(tokenizer_json())
    changed["model"]["vocab"]["!"] = 61
    other.write_text(json.dumps(changed))
    for number, (file, known, words) in enumerate(
        [
            (secret, True, "secret: not a tokenizer.json"),
            (other, True, r"other.json: not the tokenizer of this run \(its hash differs\) and not published"),
            (other, False, "other.json: not the tokenizer of this run"),
        ]
    ):

        def change(body, file=file, known=known):
            body["config"]["data"]["tokenizer_path"] = str(file)
            if not known:
                body["fingerprint"]["tokenizer"] = ""

        place = with_meta(run, tmp_path / f"run{number}", change)
        (place / "tokenizer.json").unlink()
        with pytest.raises(UserError, match=words):
            conversion.to_released(str(place), str(tmp_path / "back"))
        assert not (tmp_path / "back").exists()
    # One that is elsewhere and the run's own, by its hash; and the directory's own before all others.
    place = with_meta(
        run,
        tmp_path / "moved",
        lambda body: body["config"]["data"].update(tokenizer_path=str(released / "tokenizer.json")),
    )
    conversion.to_released(str(place), str(tmp_path / "one"))
    (place / "tokenizer.json").unlink()
    conversion.to_released(str(place), str(tmp_path / "two"))
    for name in ("one", "two"):
        assert (tmp_path / name / "tokenizer.json").read_text() == tokenizer_json()


def test_damaged_origin(run, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(run, place)
    (place / conversion.ORIGIN).write_text('{"cola_vae": 3}')
    with pytest.raises(UserError, match="released.json: cola_vae config: not what the conversion wrote"):
        conversion.to_released(str(place), str(tmp_path / "back"))
