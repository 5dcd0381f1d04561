"""Every file of configs/: it validates, and its shapes fit together at full size, without computing anything."""

import importlib
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cola_jax import families, rng
from cola_jax.models import cola
from cola_jax.objectives import stage1, stage2

NAMES = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.py") if path.stem != "__init__")


def load(name: str) -> families.cola.ColaConfig:
    return families.parse(importlib.import_module(f"configs.{name}").get_config())


@pytest.mark.parametrize("name", NAMES)
def test_config_passes_eval_shape(name):
    config = load(name)
    vae = cola.with_vocabulary(config.vae, config.data.vocab_size)
    model = cola.create(vae, config.dit, config.train.compute_dtype)
    length = config.data.sequence_length
    row = jax.ShapeDtypeStruct((2, length), jnp.int32)
    batch = {"tokens": row, "segment_ids": row, "positions": row}
    key = jax.random.key(0)
    params = jax.eval_shape(model.init, key, row)
    keys = jax.eval_shape(lambda: rng.key(0, "train", 0, jnp.arange(2)))
    first = jax.eval_shape(lambda p, b, k: stage1.terms(model, config.stage1, p, b, k), params, batch, keys)
    second = jax.eval_shape(lambda p, b, k: stage2.terms(model, config.stage2, p, b, k, p), params, batch, keys)
    for terms in (first, second):
        for term in terms.values():
            assert term.value.shape == term.weight.shape == (2,) and term.value.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_the_paper_s_config_has_the_paper_s_size():
    config = load("paper_2b")
    model = cola.create(config.vae, config.dit, config.train.compute_dtype)
    tokens = jax.ShapeDtypeStruct((1, config.data.sequence_length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    sizes = {part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params[part])) for part in ("vae", "dit")}
    assert sizes == {"vae": 501_871_574, "dit": 1_829_875_728}
