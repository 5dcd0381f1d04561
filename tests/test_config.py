import dataclasses
import json

import ml_collections
import pytest

from cola_jax import config as configs
from cola_jax import families
from cola_jax.types import UserError
from configs import quickstart


def nested(field: str, value) -> dict:
    for name in reversed(field.split(".")):
        value = {name: value}
    return value


def merged(*parts: dict) -> dict:
    out: dict = {}
    for part in parts:
        for name, value in part.items():
            out[name] = merged(out.get(name, {}), value) if isinstance(value, dict) else value
    return out


def test_defaults_survive_a_round_trip():
    assert families.parse(configs.to_dict(families.cola.ColaConfig())) == families.cola.ColaConfig()


def test_a_config_dict_and_a_plain_dict_give_the_same():
    values = {"seed": 3, "vae": {"logsnr": 1.5}, "data": {"stories": {"min_sentences": 2}}}
    parsed = families.parse(values)
    assert parsed == families.parse(ml_collections.ConfigDict(values))
    assert (parsed.seed, parsed.vae.logsnr, parsed.data.stories.min_sentences) == (3, 1.5, 2)
    assert families.parse(configs.to_dict(parsed)) == parsed


def test_default_lists_every_field():
    def names(cls):
        return {
            field.name: names(field.type) if dataclasses.is_dataclass(field.type) else None
            for field in dataclasses.fields(cls)
        }

    def names_of(values):
        return {name: names_of(value) if isinstance(value, dict) else None for name, value in values.items()}

    assert names_of(families.default()) == names(families.cola.ColaConfig)


def test_an_integer_is_a_float_but_not_the_other_way_round():
    assert isinstance(families.parse(nested("optimizer1.learning_rate", 1)).optimizer1.learning_rate, float)
    with pytest.raises(UserError, match="type int"):
        families.parse(nested("stage1.steps", 10.0))


def test_a_list_is_a_tuple_and_becomes_a_list_in_json():
    config = families.parse({"train": {"milestone_steps": [5, 10], "milestone_exaflops": [1, 2.5]}})
    assert config.train.milestone_steps == (5, 10)
    assert config.train.milestone_exaflops == (1.0, 2.5) and isinstance(config.train.milestone_exaflops[0], float)
    saved = json.loads(json.dumps(configs.to_dict(config)))
    assert saved == configs.to_dict(config) and families.parse(saved) == config


@pytest.mark.parametrize("source", ["runs/x", {"vae": "runs/x"}, {"vae": "runs/x", "dit": "released"}])
def test_a_run_begins_from_all_or_some_groups(source):
    assert families.parse({"train": {"init_from": source}, "stage1": {"steps": 0}}).train.init_from == source


def test_a_prior_alone_is_no_stage_1():
    with pytest.raises(UserError, match="config.stage1.steps = 0: must be at least 1"):
        families.parse({"train": {"init_from": {"dit": "runs/x"}}, "stage1": {"steps": 0}})


def test_the_data_have_the_run_s_seed_unless_they_have_their_own():
    assert families.parse({"seed": 3}).data_seed == 3
    assert families.parse({"seed": 3, "data": {"seed": 0}}).data_seed == 0


def test_a_config_that_was_saved_before_there_were_these_fields_parses():
    saved = json.loads(json.dumps(configs.to_dict(families.cola.ColaConfig(seed=7))))
    del saved["family"], saved["data"]["seed"], saved["evaluation"]
    del saved["train"]["milestone_steps"], saved["train"]["milestone_exaflops"]
    assert families.parse(saved) == families.cola.ColaConfig(seed=7)


def test_a_config_dict_takes_every_type_of_a_field():
    config = families.default_config()
    assert families.parse(config) == families.cola.ColaConfig()
    config.vae.logsnr, config.data.seed, config.train.milestone_steps = 2, 3, [1, 2]
    for source in ("runs/x", {"vae": "runs/x"}):
        config.train.init_from = source
        parsed = families.parse(config)
        assert (parsed.vae.logsnr, parsed.data.seed, parsed.train.milestone_steps) == (2.0, 3, (1, 2))
        assert parsed.train.init_from == source
    with pytest.raises(TypeError):
        config.data.seed = "many"


# field, value, part of what is allowed, and other fields that the value is at odds with.
INVALID = [
    ("seed", -1, "at least 0", {}),
    ("data.corpus", "books", "'stories', 'text'", {}),
    ("data.files", "", "a file or a glob", {"data": {"corpus": "text"}}),
    ("data.tokenizer", "words", "'sentencepiece', 'bytes'", {}),
    ("data.packing", "first_fit", "'concat', 'pad'", {}),
    ("data.sequence_length", 0, "at least 1", {}),
    ("data.batch_size", 0, "at least 1", {}),
    ("data.num_stories", 0, "at least 1", {}),
    ("data.num_workers", -1, "at least 0", {}),
    ("data.vocab_size", 299, "at least 300", {}),
    ("data.holdout", 0.0, "above 0 and below 1", {}),
    ("data.holdout", 1.0, "above 0 and below 1", {}),
    ("data.align", 5, "a divisor of data.sequence_length = 64", {}),
    ("data.stories.values", -1, "at least 0", {}),
    ("data.stories.min_sentences", 1, "from 2 to 6", {}),
    ("data.stories.max_sentences", 3, "min_sentences = 4 to 6", {}),
    ("vae.attention", "full", "'causal', 'block_causal'", {}),
    ("vae.vocab_size", -1, "at least 0", {}),
    ("vae.dim", 0, "at least 1", {}),
    ("vae.latent_dim", 0, "at least 1", {}),
    ("vae.block_size", 0, "at least 1", {}),
    ("vae.num_heads", 3, "a divisor of dim = 64", {}),
    ("vae.num_heads", 64, "even", {}),
    ("vae.ffn_dim", 9, "an even number", {}),
    ("vae.scale", 0.0, "a number that is not 0", {}),
    ("vae.normalize_mean", False, "True where logsnr is fixed", {"vae": {"logsnr": 1.0}}),
    ("vae.variational", False, "True where logsnr is fixed", {"vae": {"logsnr": 1.0}}),
    ("vae.block_size", 3, "a divisor of dit.block_size = 8", {"vae": {"attention": "block_causal"}}),
    ("dit.latent_dim", 8, "vae.latent_dim = 16", {}),
    ("dit.num_layers", 0, "at least 1", {}),
    ("dit.time_dim", 0, "at least 1", {}),
    ("dit.unroll", 0, "at least 1", {}),
    ("dit.remat", "some", "'none', 'full', 'attention', 'dots'", {}),
    ("dit.attention_kernel", "flash", "'auto', 'xla', 'splash'", {}),
    ("vae.attention_kernel", "flash", "'auto', 'xla', 'splash'", {}),
    ("vae.logit_chunk", -1, "at least 0", {}),
    ("vae.logit_rows", -1, "at least 0", {}),
    ("dit.rope_dim", 34, "at most head_dim = 32", {}),
    ("dit.rope_dim", 3, "an even number", {}),
    ("dit.rope_dim", -2, "an even number", {}),
    ("dit.no_history_vector", False, "stage2.history_dropout > 0", {"stage2": {"history_dropout": 0.1}}),
    ("data.sequence_length", 60, "a multiple of dit.block_size * vae.patch_size = 8", {}),
    ("data.align", 1, "a multiple of vae.patch_size = 2", {"vae": {"patch_size": 2}}),
    ("stage1.steps", -1, "at least 0", {}),
    ("stage1.kl_weight", -0.1, "at least 0", {}),
    ("stage1.mask_ratio", 1.5, "from 0 to 1", {}),
    ("stage1.noisy_decoding_max_time", -0.1, "from 0 to 1", {}),
    ("stage1.steps", 0, "starts from stage 1", {}),
    ("stage1.steps", 300, "0 (stage2.strategy = 'scratch')", {"stage2": {"strategy": "scratch"}}),
    ("stage2.strategy", "both", "'joint', 'fix_vae', 'scratch', 'interval'", {}),
    ("stage2.interval", 0, "at least 1", {"stage2": {"strategy": "interval"}}),
    (
        "stage2.reference_weight",
        0.01,
        "0 where there is no stage 1",
        {"stage2": {"strategy": "scratch"}, "stage1": {"steps": 0}},
    ),
    ("stage2.time_distribution", "normal", "'logit_normal', 'uniform'", {}),
    ("stage2.time_per", "token", "'block', 'sequence'", {}),
    ("stage2.time_scale", 0.0, "above 0", {}),
    ("stage2.noise_copies", 0, "at least 1", {}),
    ("stage2.prompt_blocks", 1.1, "from 0 to 1", {}),
    ("stage2.entropy_weight", -1.0, "at least 0", {}),
    ("optimizer1.learning_rate", 0.0, "above 0", {}),
    ("optimizer2.learning_rate", float("nan"), "a finite number", {}),
    ("optimizer2.clip_norm", 0.0, "above 0", {}),
    ("optimizer2.beta2", 1.0, "at least 0 and below 1", {}),
    ("optimizer1.warmup_steps", -1, "at least 0", {}),
    ("optimizer1.accumulation", 5, "a divisor of data.batch_size = 32", {}),
    ("optimizer2.accumulation", 0, "at least 1", {}),
    ("train.log_every", 0, "at least 1", {}),
    ("train.keep_checkpoints", 0, "at least 1", {}),
    ("train.init_from", "x", "''", {"stage1": {"steps": 0}, "stage2": {"strategy": "scratch", "reference_weight": 0}}),
    ("train.compute_dtype", "float16", "'float32', 'bfloat16'", {}),
    ("vae.logsnr", float("nan"), "None or a finite number", {}),
    ("vae.shift", float("-inf"), "a finite number", {}),
    ("vae.norm_eps", 0.0, "above 0", {}),
    ("vae.clip_qkv", 0.0, "None or above 0", {}),
    ("dit.norm_eps", 0.0, "above 0", {}),
    ("optimizer1.eps", 0.0, "above 0", {}),
    ("optimizer1.initial_learning_rate", 0.01, "at most learning_rate = 0.003", {}),
    ("optimizer2.final_learning_rate", 0.01, "at most learning_rate = 0.003", {}),
    ("optimizer1.clip_norm", float("inf"), "a finite number", {}),
    ("optimizer1.spike_factor", 0.5, "0 or a number above 1", {}),
    ("data.seed", -1, "None or at least 0", {}),
    ("train.init_from", {"vae": 3}, "a path, or a path for each of some groups", {}),
    ("train.init_from", {"dit": "x"}, "''", {"stage1": {"steps": 0}, "stage2": {"strategy": "scratch"}}),
    ("train.milestone_steps", (5, 0), "each at least 1", {}),
    ("train.milestone_exaflops", (0.0,), "each above 0", {}),
    ("train.milestone_exaflops", (1.0, float("nan")), "a finite number", {}),
    ("evaluation.count", -1, "at least 0", {}),
    ("sample.temperature", 1e9, "from 0 to 100", {}),
    ("sample.steps", 0, "at least 1", {}),
    ("sample.guidance_scale", -1.0, "at least 0", {}),
    ("sample.repetition_penalty", 0.0, "above 0", {}),
]


@pytest.mark.parametrize(("field", "value", "allowed", "others"), INVALID, ids=lambda x: str(x) if x else "-")
def test_an_invalid_value_is_told_in_one_line(field, value, allowed, others):
    with pytest.raises(UserError) as error:
        families.parse(merged(others, nested(field, value)))
    message = str(error.value)
    assert message.startswith(f"config.{field} = {value!r}")
    assert allowed in message.partition(": must be ")[2]
    assert "\n" not in message


def test_only_one_mesh_axis_takes_what_is_left():
    with pytest.raises(UserError, match=r"train\.mesh_\* = \(0, 0, 1\): must be at most one axis of 0"):
        families.parse({"train": {"mesh_data": 0, "mesh_fsdp": 0}})


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("seed", "1", "int"),
        ("seed", True, "int"),
        ("seed", None, "int"),
        ("vae.logsnr", "high", "float"),
        ("vae.post_norm", 1, "bool"),
        ("data.files", 3, "str"),
        ("stage2.time_loc", "1.0", "float"),
        ("data.stories.aligned", "yes", "bool"),
        ("data.seed", 1.5, "int"),
        ("train.init_from", 3, "str or dict"),
        ("train.init_from", None, "str or dict"),
        ("train.milestone_steps", 3, "tuple[int, ...]"),
        ("train.milestone_steps", (1, 2.5), "tuple[int, ...]"),
        ("evaluation.evaluators", "stories", "tuple[str, ...]"),
    ],
)
def test_a_value_of_the_wrong_type_is_told(field, value, kind):
    with pytest.raises(UserError) as error:
        families.parse(nested(field, value))
    assert str(error.value) == f"config.{field} = {value!r}: must be a value of type {kind}"


@pytest.mark.parametrize("field", ["sede", "vae.vocabulary", "data.stories.length"])
def test_an_unknown_field_is_told_with_those_that_exist(field):
    with pytest.raises(UserError) as error:
        families.parse(nested(field, 1))
    message = str(error.value)
    assert message.startswith(f"config.{field}: no such field; the fields are ")
    siblings = {"sede": "seed", "vae.vocabulary": "vocab_size", "data.stories.length": "max_sentences"}
    assert siblings[field] in message


def test_a_group_needs_fields():
    with pytest.raises(UserError, match="config.vae = 3: must be a group of fields"):
        families.parse({"vae": 3})


@pytest.mark.parametrize(
    "values",
    [
        {"stage2": {"strategy": "scratch", "reference_weight": 0}, "stage1": {"steps": 0}},
        {"stage2": {"strategy": "interval", "interval": 10}},
        {"stage2": {"strategy": "interval", "interval": 10, "reference_weight": 0.0}, "stage1": {"steps": 0}},
        {"stage2": {"strategy": "joint", "history_dropout": 0.1}, "dit": {"no_history_vector": True}},
        {"stage2": {"steps": 0}, "stage1": {"steps": 0}},
        {"vae": {"patch_size": 2, "logsnr": 2.0}, "data": {"align": 2}},
        {"vae": {"attention": "block_causal", "block_size": 4}},
        {"dit": {"rope_dim": 0}},
    ],
)
def test_a_valid_combination_passes(values):
    assert families.parse(values).family == "cola"


def test_churn_needs_the_solver_that_has_it():
    config = quickstart.get_config()
    config.sample.solver = "euler"
    with pytest.raises(UserError) as error:
        families.parse(config)
    assert str(error.value) == "config.sample.churn = 6.0: must be 0 with solver 'euler'; only 'exponential' has it"
