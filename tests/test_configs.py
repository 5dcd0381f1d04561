"""Every file of configs/: it validates, and its shapes fit together at full size, without computing anything."""

import dataclasses
import importlib
import itertools
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cola_jax import families, rng
from cola_jax.config import Config
from cola_jax.data import pipeline
from cola_jax.data.tokenizers import ByteTokenizer
from cola_jax.models import cola, transformer
from cola_jax.train.experiment import check_samples, data_seed
from cola_jax.types import UserError

KEY = jax.random.key(0)
BASELINES = ("_ar", "_llada", "_plaid")
NAMES = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.py") if path.stem != "__init__")


def load(name: str) -> Config:
    return families.parse(importlib.import_module(f"configs.{name}").get_config())


def test_samples_that_are_longer_than_the_context_are_refused():
    config = load("quickstart")
    check_samples(config)
    long = dataclasses.replace(config, sample=dataclasses.replace(config.sample, max_new_tokens=57))
    with pytest.raises(UserError, match="config.sample.max_new_tokens = 57: must be at most data.sequence_length = 56"):
        check_samples(long)
    check_samples(dataclasses.replace(long, train=dataclasses.replace(config.train, num_samples=0)))


@pytest.mark.parametrize("name", NAMES)
def test_config_passes_eval_shape(name):
    config = load(name)
    check_samples(config)
    family = families.of(config)
    config = family.resolve(config, config.data.vocab_size)
    model = family.model(config)
    batch = {name: jax.ShapeDtypeStruct(*each) for name, each in pipeline.shapes(config.data, 2).items()}
    params = nn.unbox(jax.eval_shape(family.init(model, config), jax.random.key(0)))
    keys = jax.eval_shape(lambda: rng.key(0, "train", 0, jnp.arange(2)))
    stages = family.stages(model, config)
    assert {group for stage in stages for group in stage.groups} == set(params["params"])
    for stage in stages:
        frozen = dict.fromkeys(stage.frozen, params)
        for term in jax.eval_shape(stage.terms, params, batch, keys, frozen).values():
            assert term.value.shape == term.weight.shape == (2,) and term.value.dtype == jnp.float32
        assert stage.flops_per_token > 0
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_the_paper_s_config_has_the_paper_s_size():
    config = load("paper_2b")
    model = cola.create(config.vae, config.dit, config.train.compute_dtype)
    tokens = jax.ShapeDtypeStruct((1, config.data.sequence_length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    sizes = {part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params[part])) for part in ("vae", "dit")}
    assert sizes == {"vae": 501_871_574, "dit": 1_829_875_728}


@pytest.mark.parametrize("name", ["paper_2b_ar", "paper_2b_llada"])
def test_the_paper_s_baselines_have_the_paper_s_size(name):
    """Table 9: 1.8B in the layers and 410,738,688 in the embeddings."""
    config = load(name)
    family = families.of(config)
    params = jax.eval_shape(family.init(family.model(config), config), KEY)
    found = transformer.count_parameters(params)
    assert (found.core, found.embeddings) == (1_811_939_328, 410_738_688)


def count(name: str) -> int:
    config = load(name)
    family = families.of(config)
    config = family.resolve(config, config.data.vocab_size)
    shapes = nn.unbox(jax.eval_shape(family.init(family.model(config), config), KEY))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", ["quickstart", "paper_100m", "paper_500m", "paper_2b"])
def test_baselines_have_as_many_parameters_as_cola(name):
    assert count(f"{name}_ar") == pytest.approx(count(name), rel=0.05)
    assert count(f"{name}_llada") == count(f"{name}_ar")


@pytest.mark.parametrize("name", ["quickstart", "text", "paper_100m", "paper_500m", "paper_2b"])
def test_families_share_data_seeds_and_schedule(name):
    """Table 10: all that is not the model is the same, but for how the end of a text is filled up."""
    cola, *others = (load(f"{name}{suffix}") for suffix in ("", *BASELINES) if f"{name}{suffix}" in NAMES)
    assert len(others) >= 2
    for other in others:
        assert other.seed == cola.seed
        assert dataclasses.replace(other.data, align=cola.data.align, batch_size=cola.data.batch_size) == cola.data
        if name.startswith("paper"):
            assert other.data.batch_size == cola.data.batch_size and other.data_seed == 6198
            assert other.optimizer1 == cola.optimizer2 and other.stage1.steps == cola.stage2.steps


def test_families_read_the_same_texts_in_the_same_order():
    """Of the quickstart's stories, batch by batch, up to each text's end; another seed reads others."""

    def read(name: str, seed: int) -> list[list[str]]:
        config = load(name)
        align = 400 if config.data.align == config.data.sequence_length else 8
        data = dataclasses.replace(config.data, sequence_length=400, align=align, batch_size=4)
        tokenizer = ByteTokenizer()
        batches = pipeline.create(data, tokenizer, "train", data_seed(config.data_seed + seed, 1))
        found = []
        for batch in itertools.islice(batches, 3):
            found.append([tokenizer.decode(row.tolist()) for row in cut(batch, tokenizer.eos_id)])
        return found

    def cut(batch, eos: int):
        tokens = np.asarray(batch["tokens"])
        return [row[: np.argmax(row == eos)] for row in tokens]

    cola, *others = (read(f"quickstart{suffix}", 0) for suffix in ("", *BASELINES))
    assert all(other == cola for other in others)
    assert len({text for batch in cola for text in batch}) == 12 and all(map(all, cola))
    assert read("quickstart", 1) != cola
