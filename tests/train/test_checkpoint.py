import dataclasses
import errno
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model
from test_step import OPTIMIZER, build, same_bits

from cola_jax.config import TrainConfig
from cola_jax.train import checkpoint as checkpoints
from cola_jax.train import saved, verified
from cola_jax.train.state import evaluation_params
from cola_jax.types import TemporaryError, UserError

WITH_EMA = dataclasses.replace(OPTIMIZER, ema=0.9)


@pytest.fixture(scope="module")
def toy():
    return build(2, optimizer=WITH_EMA)


def at(state, step):
    """Another state of the same shapes for each step."""
    moved = jax.tree.map(lambda x: x + step if x.dtype == jnp.float32 else jnp.copy(x), state)
    return moved.replace(step=jnp.asarray(step, jnp.int32))


def save(manager, state, *steps):
    for step in steps:
        data = f'{{"position": {step}}}'
        manager.save(step, at(state, step), config=toy_model.config(), fingerprint={"files": ["a"]}, data=data)
    manager.wait()


def files(directory, item):
    return sorted(path for path in (directory / item).rglob("*") if path.is_file())


def test_round_trip_and_keep(toy, tmp_path):
    state, _, _, target = toy
    manager = checkpoints.Checkpoints(tmp_path, keep=2)
    assert manager.restore(target) is None
    save(manager, state, 1, 2, 3)
    manager.close()
    assert verified.step_directories(tmp_path) == [3, 2]
    manager = checkpoints.Checkpoints(tmp_path, keep=2)
    step, restored, body = manager.restore(target)
    assert step == 3 and int(restored.step) == 3
    assert same_bits(restored, at(state, 3))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert body["data"] == '{"position": 3}' and body["fingerprint"] == {"files": ["a"]}
    manager.close()


def test_nothing_runs_before_the_first_save(toy, tmp_path, monkeypatch):
    """Orbax cleans up in a thread, which printed a traceback behind the one line of a run that failed at its start."""
    monkeypatch.setattr(checkpoints.ocp, "CheckpointManager", None)
    manager = checkpoints.Checkpoints(tmp_path, keep=2)
    assert manager.restore(toy[3]) is None
    manager.wait()
    manager.close()
    with pytest.raises(TypeError):
        save(manager, toy[0], 1)


def test_the_state_may_be_donated_after_save(toy, tmp_path):
    state, _, _, target = toy
    manager = checkpoints.Checkpoints(tmp_path, keep=2)
    change = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    copy = at(state, 1)
    expected = jax.tree.map(np.array, copy)
    manager.save(1, copy, config=toy_model.config(), fingerprint={}, data="{}")
    change(copy)
    manager.close()
    _, restored, _ = checkpoints.Checkpoints(tmp_path, keep=2).restore(target)
    assert same_bits(restored, expected)


def damage(directory, item, way):
    # The largest file of those that hold array data (Orbax's own descriptions hold parts that nobody reads).
    found = [path for path in files(directory, item) if item == "meta" or path.parent.name == "d"]
    victim = max(found, key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    if way == "flip":
        content[len(content) // 2] ^= 4
        victim.write_bytes(bytes(content))
    elif way == "truncate":
        victim.write_bytes(bytes(content[: len(content) // 2]))
    else:
        victim.unlink()


@pytest.mark.parametrize("item", ["params", "training", "ema", "meta"])
def test_damaged_newest_steps_are_passed_over(toy, tmp_path, item):
    state, _, _, target = toy
    manager = checkpoints.Checkpoints(tmp_path, keep=4)
    save(manager, state, 1, 2, 3, 4)
    manager.close()
    for step, way in ((4, "flip"), (3, "truncate"), (2, "delete")):
        damage(tmp_path / str(step), item, way)
    said = []
    manager = checkpoints.Checkpoints(tmp_path, keep=4, report=said.append)
    step, restored, _ = manager.restore(target)
    assert step == 1 and same_bits(restored, at(state, 1))
    assert len(said) == 3 and not any("\n" in line for line in said)
    for number, line in zip((4, 3, 2), said, strict=True):
        assert (
            str(tmp_path / str(number)) in line
            and (tmp_path.parent / "rejected" / f"{tmp_path.name}-{number}-1").is_dir()
        )
    save(manager, state, 2)  # the run comes by here again
    assert manager.restore(target)[0] == 2
    manager.close()


@pytest.mark.parametrize("number, restored", [(errno.ESTALE, None), (errno.ETIMEDOUT, None), (errno.EIO, 1)])
def test_a_step_that_cannot_be_read_now_is_not_set_aside(toy, tmp_path, monkeypatch, number, restored):
    """A file server that was away would else cost the newest step; a bad sector stays bad."""
    state, _, _, target = toy
    manager = checkpoints.Checkpoints(tmp_path, keep=3, report=lambda line: None)
    save(manager, state, 1, 2)
    read = verified.read_meta

    def fail(path):
        if path.name == "2":
            raise OSError(number, os.strerror(number))
        return read(path)

    monkeypatch.setattr(verified, "read_meta", fail)
    if restored is None:
        with pytest.raises(TemporaryError, match=f"2: cannot be read now: .*{os.strerror(number)}"):
            manager.restore(target)
    else:
        assert manager.restore(target)[0] == restored
    assert any(tmp_path.parent.glob(f"rejected/{tmp_path.name}-*")) == (restored is not None)
    manager.close()


@pytest.mark.parametrize(
    "largest, damaged, said",
    [
        (2**26, lambda content: content[:-1] + bytes([content[-1] ^ 1]), "does not match its checksum"),
        (0, lambda content: content + b"x", "bytes instead of"),  # of large ones only the size is known
        (0, lambda content: None, "is missing"),
    ],
)
def test_each_process_checks_its_share_of_the_files(toy, tmp_path, monkeypatch, largest, damaged, said):
    """Together all of them, and none twice."""
    monkeypatch.setattr(verified, "_LARGEST_SUMMED", largest)
    manager = checkpoints.Checkpoints(tmp_path, keep=3)
    save(manager, toy[0], 1)
    manager.close()
    step, victims = tmp_path / "1", []
    names = [path for path in sorted(step.glob("*/**/*")) if path.is_file() and path.parent.name != "files"]
    names = [path for path in names if path.stat().st_size]
    assert len(names) > 6
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for path in names:
        content = path.read_bytes()
        if (changed := damaged(content)) is None:
            path.unlink()
        else:
            path.write_bytes(changed)
        failed = []
        for index in range(3):
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            try:
                verified.check_files(step)
            except ValueError as error:
                assert path.name in str(error) and said in str(error)
                failed.append(index)
        assert len(failed) == 1
        victims += failed
        path.write_bytes(content)
    shares = [victims.count(index) for index in range(3)]
    assert sum(shares) == len(names) and max(shares) - min(shares) <= 1


def test_arrays_are_hashed_one_after_another(monkeypatch):
    """What is needed besides is that of the largest, not of all."""
    sizes, hash_ = [], verified._hash
    monkeypatch.setattr(verified, "_hash", lambda x: sizes.append(x.size) or hash_(x))
    arrays = {name: jnp.arange(size, dtype=jnp.float32) for name, size in (("a", 3), ("b", 5))}
    found = verified.hashes({"x": arrays})
    assert sizes == [3, 5] and found == {"x": {n: int(hash_(x)) for n, x in arrays.items()}}


def test_every_flipped_bit_is_seen():
    arrays = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)}
    (before,) = verified.hashes({"x": arrays})["x"].values()
    raw = np.array(arrays["a"])
    for bit in range(0, raw.size * 32, 7):
        changed = raw.copy()
        changed.view(np.uint32).reshape(-1)[bit // 32] ^= np.uint32(1 << (bit % 32))
        assert verified.hashes({"x": {"a": jnp.asarray(changed)}})["x"]["a"] != before
    swapped = raw[::-1].copy()
    assert verified.hashes({"x": {"a": jnp.asarray(swapped)}})["x"]["a"] != before


def test_nothing_readable(toy, tmp_path):
    state, _, _, target = toy
    manager = checkpoints.Checkpoints(tmp_path, keep=3, report=lambda line: None)
    save(manager, state, 1)
    shutil.rmtree(tmp_path / "1" / "params")
    with pytest.raises(UserError, match="none of the steps"):
        manager.restore(target)
    assert (tmp_path / "1").is_dir()
    manager.close()


def test_half_written_step_is_ignored(toy, tmp_path):
    state, _, _, target = toy
    manager = checkpoints.Checkpoints(tmp_path, keep=3)
    save(manager, state, 1)
    manager.close()
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    manager = checkpoints.Checkpoints(tmp_path, keep=3)
    assert manager.restore(target)[0] == 1
    save(manager, state, 2)
    assert manager.restore(target)[0] == 2
    manager.close()


def test_other_shape_or_type_is_an_error(toy, tmp_path):
    state, _, _, target = toy
    manager = checkpoints.Checkpoints(tmp_path, keep=3)
    save(manager, state, 1)
    wide = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*x.shape[:-1], 99), x.dtype, sharding=x.sharding) if x.ndim == 3 else x, target
    )
    with pytest.raises(UserError, match=r"layers/kernel.* is \[\[2, 16, 32\], 'float32'\], .* 99"):
        manager.restore(wide)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), target)
    with pytest.raises(UserError, match="bfloat16"):
        manager.restore(half)
    with pytest.raises(UserError, match="ema"):
        manager.restore(target.replace(ema=None))
    manager.close()


def test_restore_on_another_mesh(toy, tmp_path):
    state, _, _, _ = toy
    manager = checkpoints.Checkpoints(tmp_path, keep=3)
    save(manager, state, 1)
    train = TrainConfig(mesh_data=2, mesh_fsdp=2, mesh_tensor=2)
    target = build(2, optimizer=WITH_EMA, train=train)[3]
    _, restored, _ = manager.restore(target)
    assert same_bits(restored, at(state, 1))
    kernel = restored.params["params"]["dit"]["layers"]["kernel"]
    assert kernel.sharding == target.params["params"]["dit"]["layers"]["kernel"].sharding
    manager.close()


def test_what_is_saved_is_loaded(toy, tmp_path):
    state = toy[0]
    manager = checkpoints.Checkpoints(tmp_path / "stage2", keep=3)
    with pytest.raises(UserError, match="no checkpoint"):
        saved.load(tmp_path)
    save(manager, state, 1, 2)
    manager.close()
    for path in (tmp_path, tmp_path / "stage2"):
        loaded = saved.load(path)
        assert loaded.step == 2 and loaded.config == toy_model.config()
        assert loaded.tokenizer_path == tmp_path / "tokenizer.model"
        expected = evaluation_params(at(state, 2))
        assert same_bits(loaded.variables, expected)
        assert jax.tree.structure(loaded.variables) == jax.tree.structure(expected)
    data = [path for path in files(tmp_path / "stage2" / "2", "ema") if path.parent.name == "d"]
    victim = max(data, key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    said = []
    assert saved.load(tmp_path, report=said.append).step == 1 and len(said) == 1
