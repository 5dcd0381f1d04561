"""Families by name, configs of all of them, and the stages of Cola's latent-space strategies."""

import importlib
import json
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_models

from cola_jax import families
from cola_jax.config import EvaluationConfig, to_dict
from cola_jax.families import autoregressive, cola, token_models
from cola_jax.families.interface import Group, first_steps
from cola_jax.train import state as states
from cola_jax.types import UserError

CONFIGS = Path(__file__).parents[2] / "configs"


def refused(values) -> str:
    with pytest.raises(UserError) as caught:
        families.parse(values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_family():
    expected = "config.family = 'gaussian': must be one of 'cola', 'autoregressive', 'llada', 'plaid', 'unified'"
    assert refused({"family": "gaussian", "vae": {}}) == expected
    with pytest.raises(UserError, match="must be one of"):
        families.default_config("gaussian")


def test_groups_of_another_family():
    assert (
        refused({"family": "autoregressive", "vae": {"dim": 3}})
        == "config.vae: belongs to family 'cola'; config.family is 'autoregressive'"
    )
    for values in ({"family": "cola", "transformer": {}}, {"transformer": {}}):
        assert refused(values) == "config.transformer: belongs to family 'autoregressive'; config.family is 'cola'"
    assert refused({"vea": {}}).startswith("config.vea: no such field; the fields are family, ")
    assert "config.sample.guidance_scale: no such field" in refused(
        {"family": "autoregressive", "sample": {"guidance_scale": 2.0}}
    )


@pytest.mark.parametrize("name", families.FAMILIES)
def test_defaults_of_every_family_are_valid_and_come_back(name):
    family = families.get(name)
    assert families.of(family.config()) is family and family.config().family == name
    assert families.parse(families.default_config(name)) == family.config()
    assert families.parse(json.loads(json.dumps(families.default(name)))) == family.config()


def test_absent_fields_of_a_group_keep_the_family_s_defaults():
    parsed = families.parse({"family": "autoregressive", "sample": {"max_new_tokens": 5}})
    assert parsed.sample.temperature == 1.0 and parsed.sample.max_new_tokens == 5
    assert families.parse({"sample": {"max_new_tokens": 5}}).sample.guidance_scale == 2.0


def test_configs_from_before_there_were_families():
    today = families.parse({"sample": {"steps": 4}, "evaluation": {"count": 77}, "vae": {"dim": 64}})
    old = to_dict(today)
    del old["family"], old["evaluation"], old["train"]["milestone_steps"], old["train"]["milestone_exaflops"]
    old["sample"]["report_stories"] = 77
    before = json.dumps(old)
    assert families.parse(old) == today and families.upgraded(old)["evaluation"] == {"count": 77}
    assert json.dumps(old) == before  # what is upgraded is a copy
    assert families.parse({"vae": {"dim": 64}}).evaluation == EvaluationConfig()
    new = to_dict(today)
    assert families.upgraded(new) == new


def test_a_group_that_is_no_group_is_told():
    with pytest.raises(UserError, match=r"config\.sample = 3: must be a group of fields"):
        families.parse({"sample": 3})


def strategy(name: str, **changes) -> cola.ColaConfig:
    scratch = name == "scratch" or changes.pop("alone", False)
    values = {"strategy": name, "steps": 7, "reference_weight": 0.0 if scratch else 0.5}
    values["interval"] = 2 if name == "interval" else 0
    given = {"stage1": {"steps": 0 if scratch else 5}, "stage2": values | changes, "vae": {"vocab_size": 300}}
    return families.parse(given | {"optimizer1": {"ema": 0.5}, "optimizer2": {"ema": 0.25}})


def test_stages_of_cola():
    first, second = cola.make_stages(None, strategy("joint"))
    assert [first.name, second.name] == ["stage1", "stage2"] and first_steps([first, second]) == [0, 5]
    assert (first.steps, first.groups, first.trained, first.frozen) == (5, ("vae",), {"vae": Group()}, {})
    assert (second.steps, second.groups) == (7, ("vae", "dit"))
    assert (first.optimizer.ema, second.optimizer.ema) == (0.5, 0.25)
    assert (first.optimizer_field, second.optimizer_field) == ("optimizer1", "optimizer2")


@pytest.mark.parametrize("name", ["scratch", "joint", "interval", "fix_vae"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_what_a_strategy_trains_and_freezes(name, weight):
    if name == "scratch" and weight:
        assert "stage2.reference_weight" in refused({"stage1": {"steps": 0}, "stage2": {"strategy": name}})
        return
    stage = cola.make_stages(None, strategy(name, reference_weight=weight, vae_learning_rate_ratio=0.125))[1]
    assert stage.trained["dit"] == Group()
    if name == "fix_vae":  # nothing moves that could be held near a reference
        assert set(stage.trained) == {"dit"} and stage.frozen == {}
        return
    assert set(stage.trained) == {"dit", "vae"} and stage.trained["vae"].ratio == 0.125
    assert (stage.trained["vae"].active is None) == (name != "interval")
    assert stage.frozen == ({"reference": ("vae", "encoder")} if weight else {})


def test_the_interval_alternates_from_a_joint_step():
    active = cola.make_stages(None, strategy("interval", interval=3))[1].trained["vae"].active
    found = [bool(active(jnp.asarray(step))) for step in range(12)]
    assert found == [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3
    one = cola.make_stages(None, strategy("interval", interval=1))[1].trained["vae"].active
    assert [bool(one(jnp.asarray(step))) for step in range(4)] == [True, False, True, False]


SMALL = {
    "vae": vars(tiny_models.vae_config(scale=0.5, shift=0.2)),
    "dit": vars(tiny_models.dit_config(prediction="mixture", prediction_variance=0.1)),
    "stage1": {"steps": 1},
    "optimizer2": {"ema": 0.5},
    "data": {"align": 2},
}


@pytest.mark.parametrize(("given", "patch"), [(["vae"], 1), (["vae", "dit"], 1), (["vae"], 2)])
def test_a_mixture_begins_with_a_code_for_each_token(given, patch):
    """The encoder's normalised means of single tokens; not where the prior is given, or a latent has two tokens."""
    config = cola.resolve(families.parse(SMALL | {"vae": SMALL["vae"] | {"patch_size": patch}}), tiny_models.VOCAB)
    assert config.dit.num_codes == tiny_models.VOCAB
    model = cola.FAMILY.model(config)
    given = {name: tiny_models.parameters(model)["params"][name] for name in given}
    stage = cola.FAMILY.stages(model, config)[1]
    init = cola.FAMILY.init(model, config)
    state, plain = (
        nn.unbox(states.make_init(init, each)(jax.random.key(1), given)) for each in (stage, stage._replace(begin=None))
    )
    codes, before = (x.params["params"]["dit"]["codes"] for x in (state, plain))
    if "dit" in given or patch > 1:
        np.testing.assert_array_equal(codes, before)
        return
    for token in (0, 7, tiny_models.VOCAB - 1):
        mean = tiny_models.apply(model, state.params, jnp.array([[token]]), method="encode").mean[0, 0]
        np.testing.assert_allclose(codes[token], (mean - 0.2) * 0.5, atol=1e-5)
    np.testing.assert_array_equal(state.ema["dit"]["codes"], codes)
    others = [{k: v for k, v in x.params["params"]["dit"].items() if k != "codes"} for x in (state, plain)]
    jax.tree.map(np.testing.assert_array_equal, *others)


def test_tokens_of_codes_that_there_are_not():
    for changes in ({"dit": {"prediction": "mean"}}, {"vae": {"patch_size": 2}}, {"dit": {"num_codes": 30}}):
        values = {name: SMALL[name] | changes.get(name, {}) for name in SMALL} | {
            "stage2": {"code_weight": 0.5},
            "data": {"align": 2},
        }
        assert refused(values) == (
            "config.stage2.code_weight = 0.5: must be 0 unless dit.prediction = 'mixture' has a code for each token "
            "(vae.patch_size = 1, dit.num_codes = 0)"
        )
    assert families.parse(SMALL | {"stage2": {"code_weight": 0.5}}).stage2.code_weight == 0.5


def test_the_autoregressive_family_has_one_stage():
    config = families.parse({"family": "autoregressive", "transformer": {"vocab_size": 300}, "stage1": {"steps": 3}})
    (stage,) = autoregressive.make_stages(None, config)
    assert (stage.steps, stage.groups, stage.trained, stage.frozen) == (
        3,
        ("transformer",),
        {"transformer": Group()},
        {},
    )


def count(config) -> int:
    family = families.of(config)
    shapes = jax.eval_shape(family.init(family.model(config), config), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def transformer_size(c) -> int:
    """Weights of the decoder, counted by hand: vectors before the first token, embeddings, layers, norms, head."""
    width = c.num_heads * c.head_dim
    layer = 4 * c.dim * width + 3 * c.dim * c.ffn_dim + 2 * c.dim
    return c.dim + 2 * c.vocab_size * c.dim + c.num_layers * layer + c.dim


def test_the_presets_of_the_baseline_have_the_sizes_that_they_say():
    found = {}
    for path in sorted(CONFIGS.glob("*_ar.py")):
        config = families.parse(importlib.import_module(f"configs.{path.stem}").get_config())
        assert config.family == "autoregressive"
        found[path.stem] = config = token_models.resolve(config, config.data.vocab_size)
        if not config.transformer.qk_norm and config.transformer.norm == "rmsnorm":
            assert count(config) == transformer_size(config.transformer)
    pair = families.parse(importlib.import_module("configs.quickstart").get_config())
    pair = cola.resolve(pair, pair.data.vocab_size)
    assert count(found["quickstart_ar"]) == pytest.approx(count(pair), rel=0.1)  # as the preset's header says
