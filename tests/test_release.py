"""Released directories: read, written, and refused when damaged."""

import contextlib
import errno
import filecmp
import json
import math
import os
import pathlib
import pickle
import shutil
import types

import jax
import ml_dtypes
import numpy as np
import pytest
from models.tiny_models import apply, assert_close, create, normal
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cola_jax import release, sharding
from cola_jax.config import TrainConfig
from cola_jax.models import cola
from cola_jax.released import files, options
from cola_jax.types import UserError

GOLDEN = pathlib.Path(__file__).parent / "golden"
PARTS = ("cola_vae", "cola_dit")
FILES = [f"{part}/{name}" for part in PARTS for name in ("config.json", "model.safetensors")]


@pytest.fixture(scope="module")
def tiny():
    return release.load(GOLDEN / "tiny")


@pytest.fixture
def copy(tmp_path):
    """A copy of the golden checkpoint that a test may damage."""
    for name in FILES:
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(GOLDEN / "tiny" / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


def rewrite(folder, change):
    """Applies ``change`` to the tensors of a part."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_same_files(one, other, names=FILES):
    for name in names:
        assert filecmp.cmp(one / name, other / name, shallow=False), name


def assert_same_params(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("name", ["tiny", "patch2"])
def test_saved_files_are_the_released_ones(name, tmp_path):
    model, params = release.load(GOLDEN / name)
    release.save(tmp_path / "out", model, params)
    assert_same_files(GOLDEN / name, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out"]
    again, same = release.load(tmp_path / "out")
    assert again == model
    assert_same_params(same, params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_come_back_bit_for_bit(dtype, copy, tmp_path):
    code = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    for part in PARTS:
        rewrite(copy / part, lambda t: t.update({n: x.astype(dtype) for n, x in t.items()}))
        edit(copy / part / "config.json", dtype=dtype)
    model, params = release.load(copy)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    release.save(tmp_path / "out", model, params, dtype=dtype)
    with safe_open(tmp_path / "out" / "cola_vae" / "model.safetensors", "numpy") as file:
        assert {file.get_slice(n).get_dtype() for n in file.keys()} == {code}
    assert_same_files(copy, tmp_path / "out", FILES[1::2])
    _, narrow = release.load(copy, param_dtype=dtype)
    assert {x.dtype.name for x in jax.tree.leaves(narrow)} == {dtype}
    release.save(tmp_path / "from_narrow", model, narrow, dtype=dtype)
    assert_same_files(copy, tmp_path / "from_narrow", FILES[1::2])
    assert json.loads((tmp_path / "out/cola_vae/config.json").read_text())["dtype"] == dtype


def test_what_the_files_hold_besides_is_kept(copy, tmp_path):
    """Metadata, tensors of another type, frequencies in another rounding, and no frequencies at all."""

    def change(tensors):
        name = "blocks.1.msa.rope.rope.freqs"
        tensors[name] = np.nextafter(tensors[name], np.float32(2))
        del tensors["blocks.2.msa.rope.rope.freqs"]
        tensors["txt_in.proj.weight"] = tensors["txt_in.proj.weight"].astype(ml_dtypes.bfloat16)

    rewrite(copy / "cola_dit", change)
    config = copy / "cola_vae" / "config.json"
    edit(config, causal=True, rope_theta=500000.0, transformers_version="4.40.1", return_dict=True, id2label={"0": "A"})
    model, params = release.load(copy)
    release.save(tmp_path / "out", model, params, kept=json.loads(json.dumps(release.origin(copy))))
    assert_same_files(copy, tmp_path / "out", FILES[1::2])
    for part in PARTS:
        configs = [json.loads((place / part / "config.json").read_text()) for place in (copy, tmp_path / "out")]
        assert configs[0] == configs[1]


def test_several_files(tiny, tmp_path):
    model, params = tiny
    release.save(tmp_path / "out", model, params, max_shard_size=100_000)
    folder = tmp_path / "out" / "cola_vae"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    whole = load_file(GOLDEN / "tiny/cola_vae/model.safetensors")
    assert index["metadata"] == {"total_size": sum(x.nbytes for x in whole.values())}
    for name in names:
        part = load_file(folder / name)
        assert sum(x.nbytes for x in part.values()) <= 100_000
        assert set(part) == {tensor for tensor, place in index["weight_map"].items() if place == name}
        for tensor, value in part.items():
            np.testing.assert_array_equal(value, whole.pop(tensor))
    assert not whole
    assert_same_params(release.load(tmp_path / "out")[1], params)


def test_sharded_over_eight_devices(tiny):
    """Each parameter lies where the rules say, no device holds it all, and the velocities are those of one device."""
    model, params = tiny
    mesh = sharding.make_mesh(TrainConfig(mesh_data=2, mesh_fsdp=2, mesh_tensor=2))
    same, spread = release.load(GOLDEN / "tiny", mesh=mesh)
    assert same == model
    expected = sharding.shardings(release.abstract(model), mesh)
    jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(f"{x.sharding} is not {s}"), spread["params"], expected)
    kernel = spread["params"]["dit"]["layers"]["mlp_in"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    assert_same_params(spread, params)
    latents, times = normal(2, 8, 8), np.asarray([0.3, 0.8], np.float32)
    one = apply(model, params, latents, times, method="velocity")
    assert_close(apply(model, spread, latents, times, method="velocity"), one, 1e-6)


def test_sharded_parameters_are_saved(tmp_path):
    mesh = sharding.make_mesh(TrainConfig(mesh_data=2, mesh_fsdp=2, mesh_tensor=2))
    release.save(tmp_path / "out", *release.load(GOLDEN / "tiny", mesh=mesh))
    assert_same_files(GOLDEN / "tiny", tmp_path / "out")


def test_compute_type_does_not_touch_the_parameters(tiny):
    model, params = release.load(GOLDEN / "tiny", dtype="bfloat16")
    assert model.dtype == np.dtype(ml_dtypes.bfloat16)
    assert_same_params(params, tiny[1])


@pytest.mark.parametrize("part", PARTS)
def test_every_tensor_of_the_real_size(part):
    """Names and shapes of the real checkpoint are those that are written, and those that reading asks for."""
    manifest = json.loads((GOLDEN / "full_size_manifest.json").read_text())
    vae, dit = (manifest[name]["config"] for name in PARTS)
    model = cola.create(options.vae_config(vae), options.dit_config(dit))
    written = {name: list(spec.shape) for name, spec in release.specs(model)[part].items()}
    assert written == manifest[part]["tensors"]
    count = sum(
        math.prod(x.shape) for x in jax.tree.leaves(release.abstract(model)["vae" if part == PARTS[0] else "dit"])
    )
    frequencies = sum(math.prod(shape) for name, shape in written.items() if name.endswith("freqs"))
    assert count + frequencies == sum(math.prod(shape) for shape in manifest[part]["tensors"].values())
    kept = manifest[part]["config"]
    config = model.vae_config if part == PARTS[0] else model.dit_config
    assert options.released_config(part, config, "float32", kept=kept) == kept


def test_the_real_size_is_accepted_when_read(tmp_path, monkeypatch):
    """Files whose tensors are holes of the real sizes: everything is checked but the values are not read."""
    manifest = json.loads((GOLDEN / "full_size_manifest.json").read_text())
    for part in PARTS:
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(manifest[part]["config"]))
        specs = {name: files.Spec(np.dtype(np.float32), tuple(s)) for name, s in manifest[part]["tensors"].items()}
        monkeypatch.setattr(files, "_ordered", sorted)
        header = files._header(specs)
        with open(tmp_path / part / "model.safetensors", "wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(spec.nbytes for spec in specs.values()))
    monkeypatch.setattr(release, "_check_frequencies", lambda *_: None)  # zeros here
    _, lazy = release.open_lazily(tmp_path)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(lazy)) == 501_871_574 + 1_829_876_880 - 24 * 48
    edit(tmp_path / "cola_dit" / "config.json", num_layers=23)
    with pytest.raises(UserError, match=r"cola_dit/model.safetensors: tensor blocks\.23\..* has no place"):
        release.open_lazily(tmp_path)


# --- refusals when reading: (what is done to the copy, words of the error)


def damage(function, *words):
    return pytest.param(function, words, id=function.__name__)


def missing_tensor(copy):
    rewrite(copy / "cola_dit", lambda t: t.pop("blocks.1.mlp.proj_in.bias"))


def extra_tensor(copy):
    rewrite(copy / "cola_vae", lambda t: t.update(surplus=np.zeros(3, np.float32)))


def transposed_tensor(copy):  # as many elements as it should have
    rewrite(copy / "cola_dit", lambda t: t.update({"txt_in.proj.weight": t["txt_in.proj.weight"].T.copy()}))


def integer_tensor(copy):
    rewrite(copy / "cola_vae", lambda t: t.update({"decoder.in_layer.bias": np.zeros(32, np.int32)}))


def double_tensor(copy):
    rewrite(copy / "cola_vae", lambda t: t.update({"decoder.in_layer.bias": np.zeros(32, np.float64)}))


def other_frequencies(copy):
    rewrite(copy / "cola_dit", lambda t: t["blocks.0.msa.rope.rope.freqs"].__imul__(1.01))


def config_of_fewer_layers(copy):
    edit(copy / "cola_dit" / "config.json", num_layers=2)


def config_of_another_width(copy):
    edit(copy / "cola_vae" / "config.json", dim=64)


def config_without_qk_norm(copy):
    edit(copy / "cola_vae" / "config.json", qk_norm=False)


def config_of_another_rope(copy):
    edit(copy / "cola_dit" / "config.json", rope_dim=4)


def truncated_file(copy):
    file = copy / "cola_vae" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def cut_header(copy):
    file = copy / "cola_vae" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def empty_file(copy):
    (copy / "cola_dit" / "model.safetensors").write_bytes(b"")


def text_file(copy):
    (copy / "cola_dit" / "model.safetensors").write_text("these are no tensors " * 20)


def pickled_file(copy):  # under the name of a safetensors file
    (copy / "cola_dit" / "model.safetensors").write_bytes(pickle.dumps({"x": Trap(copy)}))


def only_a_pickle(copy):
    (copy / "cola_dit" / "model.safetensors").unlink()
    (copy / "cola_dit" / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Trap(copy)}))


def no_weights(copy):
    (copy / "cola_dit" / "model.safetensors").unlink()


def no_config(copy):
    (copy / "cola_dit" / "config.json").unlink()


def config_is_a_list(copy):
    (copy / "cola_dit" / "config.json").write_text("[1, 2]")


def config_is_no_json(copy):
    (copy / "cola_dit" / "config.json").write_text('{"dim": 3,\n')


def config_is_binary(copy):
    (copy / "cola_dit" / "config.json").write_bytes(b"\xff\xfe\x00")


def config_is_a_directory(copy):
    no_config(copy)
    (copy / "cola_dit" / "config.json").mkdir()


def only_the_vae(copy):
    shutil.rmtree(copy / "cola_dit")


def only_the_dit(copy):
    shutil.rmtree(copy / "cola_vae")


def parts_exchanged(copy):
    (copy / "cola_vae").rename(copy / "other")
    (copy / "cola_dit").rename(copy / "cola_vae")
    (copy / "other").rename(copy / "cola_dit")


class Trap:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place / "loaded"),)


@pytest.mark.parametrize(
    "change, words",
    [
        damage(missing_tensor, "cola_dit/model.safetensors", "blocks.1.mlp.proj_in.bias is missing"),
        damage(extra_tensor, "cola_vae/model.safetensors", "surplus has no place"),
        damage(transposed_tensor, "cola_dit/model.safetensors", "txt_in.proj.weight has shape [8, 48]", "[48, 8]"),
        damage(integer_tensor, "cola_vae/model.safetensors", "decoder.in_layer.bias has type I32"),
        damage(double_tensor, "cola_vae/model.safetensors", "decoder.in_layer.bias has type F64"),
        damage(other_frequencies, "cola_dit/model.safetensors", "blocks.0.msa.rope.rope.freqs does not hold"),
        damage(config_of_fewer_layers, "cola_dit/model.safetensors", "tensor blocks.2.", "has no place"),
        damage(config_of_another_width, "cola_vae/model.safetensors", "has shape [", "the config needs ["),
        damage(config_without_qk_norm, "cola_vae/model.safetensors", "k_norm.bias has no place"),
        damage(config_of_another_rope, "cola_dit/model.safetensors", "freqs has shape [4]", "[2]"),
        damage(truncated_file, "cola_vae/model.safetensors", "not a readable safetensors file"),
        damage(cut_header, "cola_vae/model.safetensors", "not a readable safetensors file"),
        damage(empty_file, "cola_dit/model.safetensors", "not a readable safetensors file"),
        damage(text_file, "cola_dit/model.safetensors", "not a readable safetensors file"),
        damage(pickled_file, "cola_dit/model.safetensors", "not a readable safetensors file"),
        damage(only_a_pickle, "cola_dit/model.safetensors", "pytorch_model.bin is a pickle, which is never loaded"),
        damage(no_weights, "cola_dit/model.safetensors: missing"),
        damage(no_config, "cola_dit/config.json: missing"),
        damage(config_is_a_list, "cola_dit/config.json", "holds a JSON list"),
        damage(config_is_no_json, "cola_dit/config.json", "not a readable JSON file"),
        damage(config_is_binary, "cola_dit/config.json", "not a readable JSON file"),
        damage(config_is_a_directory, "cola_dit/config.json", "not a readable JSON file"),
        damage(only_the_vae, "cola_dit: missing"),
        damage(only_the_dit, "cola_vae: missing"),
        damage(parts_exchanged, "cola_vae/config.json"),
    ],
)
def test_damage_is_told_in_one_line(copy, change, words):
    change(copy)
    with pytest.raises(UserError) as caught:
        release.load(copy)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text
    assert not (copy / "loaded").exists()


def test_no_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(UserError, match=f"{place.name}: not a directory"):
            release.load(place)


@pytest.fixture
def sharded(tiny, tmp_path):
    release.save(tmp_path / "sharded", *tiny, max_shard_size=100_000)
    return tmp_path / "sharded" / "cola_vae"


def shard_is_missing(folder, index):
    (folder / "model-00002-of-00002.safetensors").unlink()


def shard_has_other_tensors(folder, index):
    shutil.copyfile(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")


def tensor_not_in_the_index(folder, index):
    index["weight_map"].pop("encoder.wte.weight")


def tensor_in_no_file(folder, index):
    index["weight_map"]["surplus"] = "model-00001-of-00002.safetensors"


def path_out_of_the_folder(folder, index):
    index["weight_map"]["encoder.wte.weight"] = "../cola_dit/model.safetensors"


def absolute_path(folder, index):
    index["weight_map"]["encoder.wte.weight"] = str(folder / "model-00001-of-00002.safetensors")


def pickle_in_the_index(folder, index):
    index["weight_map"]["encoder.wte.weight"] = "pytorch_model.bin"


def number_in_the_index(folder, index):
    index["weight_map"]["encoder.wte.weight"] = 1


def no_map(folder, index):
    index["weight_map"] = []


@pytest.mark.parametrize(
    "change, words",
    [
        damage(shard_is_missing, "model-00002-of-00002.safetensors", "no such file"),
        damage(shard_has_other_tensors, "model-00002-of-00002.safetensors: tensor ", "is missing"),
        damage(tensor_not_in_the_index, "tensor encoder.wte.weight is not where"),
        damage(tensor_in_no_file, "model-00001-of-00002.safetensors: tensor surplus is missing"),
        damage(path_out_of_the_folder, "tensor encoder.wte.weight is in '../cola_dit/model.safetensors'"),
        damage(absolute_path, "tensor encoder.wte.weight is in '/"),
        damage(pickle_in_the_index, "is in 'pytorch_model.bin'"),
        damage(number_in_the_index, "encoder.wte.weight is in 1"),
        damage(no_map, "model.safetensors.index.json: weight_map = '[]'"),
    ],
)
def test_damaged_index(sharded, change, words):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(sharded, index)
    file.write_text(json.dumps(index))
    with pytest.raises(UserError) as caught:
        release.load(sharded.parent)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


# --- refusals when writing


@contextlib.contextmanager
def refused(tmp_path, words):
    """Something is refused in one line, and nothing is left behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        yield
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_save_replaces_nothing_unasked(tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    release.save(out, *tiny)  # empty
    with refused(tmp_path, "out: not empty"):
        release.save(out, *tiny)
    (out / "tokenizer.json").write_text("{}")
    (out / "cola_vae" / "config.json").write_text("{}")
    release.save(out, *tiny, overwrite=True)
    assert_same_files(GOLDEN / "tiny", out)
    assert not (out / "tokenizer.json").exists() and sorted(os.listdir(tmp_path)) == ["out"]
    (out / "thesis.tex").write_text("mine")
    with refused(tmp_path, "holds thesis.tex: only a released checkpoint is overwritten"):
        release.save(out, *tiny, overwrite=True)
    (tmp_path / "file").write_text("x")
    with refused(tmp_path, "file: is a file"):
        release.save(tmp_path / "file", *tiny)


def test_too_little_disk_is_told_before_anything_is_written(tiny, tmp_path, monkeypatch):
    usage = types.SimpleNamespace(free=500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with refused(tmp_path, "GB of disk, 0.001 GB are free"):
        release.save(tmp_path / "out", *tiny)
    usage.free = 2_000_000
    release.save(tmp_path / "out", *tiny)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_that_fills_leaves_nothing(tiny, tmp_path, monkeypatch, overwrite):
    if overwrite:
        release.save(tmp_path / "out", *tiny)
    write, calls = files.write, []

    def full(folder, *args):
        calls.append(folder)
        if len(calls) == 2:
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder, *args)

    monkeypatch.setattr(files, "write", full)
    with refused(tmp_path, "out: not written: No space left on device"):
        release.save(tmp_path / "out", *tiny, overwrite=overwrite)
    assert len(calls) == 2
    if overwrite:
        assert_same_files(GOLDEN / "tiny", tmp_path / "out")


def test_parameters_that_are_not_the_models(tiny, tmp_path):
    model, params = tiny
    inner = params["params"]
    wrong = {"params": {**inner, "more": {"x": np.zeros(1)}}}
    with refused(tmp_path, "parameter more/x: not one of this model"):
        release.save(tmp_path / "out", model, wrong)
    with refused(tmp_path, "parameter dit/in_layer/bias: missing"):
        release.save(tmp_path / "out", model, {"params": {"vae": inner["vae"]}})
    encoder = {**inner["vae"]["encoder"], "wte": inner["vae"]["encoder"]["wte"].T}
    with refused(tmp_path, "parameter vae/encoder/wte has shape (32, 68)"):
        release.save(tmp_path / "out", model, {"params": {**inner, "vae": {**inner["vae"], "encoder": encoder}}})
    with refused(tmp_path, "dtype = 'int32': must be one of bfloat16, float16, float32"):
        release.save(tmp_path / "out", model, params, dtype="int32")
    encoder = {**inner["vae"]["encoder"], "wte": inner["vae"]["encoder"]["wte"] * 1e7}
    with refused(tmp_path, "tensor encoder.wte.weight: "):
        big = {"params": {**inner, "vae": {**inner["vae"], "encoder": encoder}}}
        release.save(tmp_path / "out", model, big, dtype="float16")


def test_options_of_ours_are_refused(tmp_path):
    model, params = create(dit={"block_position": True})
    with refused(tmp_path, "cola_dit: block_position = True"):
        release.save(tmp_path / "out", model, params)
