"""A third family, `bigram`, is entered in the table of families and nothing else of the package knows of it."""

import bigram
import jax
import numpy as np
import pytest

from cola_jax import families, rng, runs
from cola_jax.config import EvaluationConfig, TrainConfig
from cola_jax.data import corpora
from cola_jax.evaluation import evaluators, stories
from cola_jax.train import experiment, initialise, loop, verified
from cola_jax.types import UserError

LENGTH = 96


@pytest.fixture(autouse=True)
def _entered(monkeypatch):
    monkeypatch.setitem(families.FAMILIES, bigram.NAME, bigram.FAMILY)


class Crash(BaseException):
    """Stands for a process that ends here and now."""


def config(**changes):
    values = {
        "family": "bigram",
        "data": {"tokenizer": "bytes", "sequence_length": LENGTH, "packing": "pad", "batch_size": 8, "num_stories": 64}
        | {"holdout": 0.2, "stories": {"aligned": True, "values": 2, "variants": 1, "choices": 1, "max_sentences": 4}},
        "table": {"steps": 30, "learning_rate": 0.3},
        "train": {"log_every": 5, "eval_every": 10, "eval_batches": 1, "checkpoint_every": 5, "mesh_data": 1},
        "sample": {"max_new_tokens": 24},
    }
    for group, fields in changes.items():
        values[group] = values.get(group, {}) | fields
    return families.parse(values)


def train(directory, log=lambda line: None, asked=None):
    asked = asked or config()
    return loop.train(asked, directory, experiment.build(asked, directory), None, log)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that nothing disturbs, and its last state."""
    directory = tmp_path_factory.mktemp("bigram")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.FAMILIES, bigram.NAME, bigram.FAMILY)
        return directory, jax.tree.map(np.array, train(directory))


def test_it_learns(trained):
    entries = (trained[0] / "metrics.jsonl").read_text().splitlines()
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in entries if '"train"' in line]
    assert losses[0] == pytest.approx(np.log(257), rel=0.02) and losses[-1] < 0.6 * losses[0]


def test_it_resumes_with_the_same_bits(trained, tmp_path):
    def log(line):
        if "step 15/" in line:
            raise Crash

    with pytest.raises(Crash):
        train(tmp_path, log)
    assert verified.step_directories(tmp_path / "stage1")[0] == 10
    lines = []
    state = train(tmp_path, lines.append)
    assert "stage 1: resumed at step 10 of 30" in lines
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, state), trained[1])
    name = "metrics.jsonl"
    assert (tmp_path / name).read_bytes() == (trained[0] / name).read_bytes()


def test_it_is_opened_by_its_directory(trained):
    run = runs.load(str(trained[0]))
    assert run.family is bigram.FAMILY and run.step == 30 and run.model == bigram.Bigram(run.tokenizer.vocab_size)
    assert run.settings == bigram.Settings(24, 1.0, run.tokenizer.eos_id)
    np.testing.assert_array_equal(
        run.params["params"]["table"]["logits"], trained[1].params["params"]["table"]["logits"]
    )


def test_evaluations(trained):
    lines, run = [], runs.load(str(trained[0]))
    asked = EvaluationConfig(("held_out", "likelihood", "stories"), 12)
    found = evaluators.report(run, asked, 3, lines.append)
    assert set(found) == {"held_out", "likelihood", "generation"}
    last = [line for line in (trained[0] / "metrics.jsonl").read_text().splitlines() if '"holdout"' in line][-1]
    assert 0 < found["held_out"]["loss"] < 5 and '"step": 30' in last

    # log p by the table, in plain NumPy
    table = np.asarray(run.params["params"]["table"]["logits"], np.float64)
    table = table - np.log(np.exp(table).sum(-1, keepdims=True))
    texts = [corpora.documents(run.config.data, "holdout", 0)[i] for i in range(12)]
    total = tokens = 0
    for text in texts:
        ids = [*run.tokenizer.encode(text), run.tokenizer.eos_id][:LENGTH]
        total -= sum(table[a, b] for a, b in zip([len(table) - 1, *ids[:-1]], ids, strict=True))
        tokens += len(ids)
    rate = found["likelihood"]
    assert rate["nats_per_token"] == pytest.approx(total / tokens, rel=1e-5)
    assert rate["bound"] == "exact" and rate["documents"] == 12
    size = sum(len(run.tokenizer.decode(run.tokenizer.encode(text)[:LENGTH]).encode()) for text in texts)
    assert rate["bits_per_byte"] == pytest.approx(total / size / np.log(2), rel=1e-5)

    assert [row["prompted"] for row in found["generation"]] == [False, True]
    assert all(row["stories"] == 12 and row["temperature"] == 1.0 for row in found["generation"])
    written = stories.write(run, [""] * 4, run.settings, 3, batch_size=3)
    assert written == found["generation"][0]["examples"] and len(set(written)) == 4  # whatever the batches are
    assert evaluators.names(EvaluationConfig(), run.config, run.family) == ("stories", "likelihood")
    with pytest.raises(UserError, match="'reconstruction' needs latents, which family 'bigram' does not have"):
        evaluators.report(run, EvaluationConfig(("reconstruction",), 4), 3, lines.append)


def test_the_stream_is_what_is_generated(trained):
    run = runs.load(str(trained[0]))
    prompts, key = [[65], [66, 67]], rng.key(0, "sample")
    out = run.family.generate(run.model, run.params, prompts, run.settings, key)
    streamed = [
        sum((piece.tokens[i] for piece in run.family.stream(*run[1:3], prompts, run.settings, key)), []) for i in (0, 1)
    ]
    assert streamed == [row[:n].tolist() for row, n in zip(out.tokens, out.lengths, strict=True)]


def test_it_begins_from_another_run(trained, tmp_path):
    asked = config(table={"steps": 1, "learning_rate": 1e-12}, train={"init_from": {"table": str(trained[0])}})
    state = train(tmp_path, asked=asked)
    logits = trained[1].params["params"]["table"]["logits"]
    np.testing.assert_allclose(state.params["params"]["table"]["logits"], logits, atol=1e-9)
    assert train(tmp_path, asked=asked).step == 1  # the same command resumes
    with pytest.raises(UserError, match="'vae' must be a parameter group, of table"):
        initialise.load({"vae": str(trained[0])}, {"table": {}})


@pytest.mark.parametrize("group, owner", [("vae", "cola"), ("transformer", "autoregressive")])
def test_groups_of_other_families_are_refused(group, owner):
    with pytest.raises(UserError) as caught:
        families.parse({"family": "bigram", group: {"dim": 8}})
    assert str(caught.value) == f"config.{group}: belongs to family {owner!r}; config.family is 'bigram'"
    with pytest.raises(UserError, match="^config.table: belongs to family 'bigram'; config.family is 'cola'$"):
        families.parse({"table": {"steps": 3}})


def test_its_config_is_one_like_the_others():
    default = families.default_config("bigram")
    assert default.table.steps == 10 and "vae" not in default and "transformer" not in default
    assert families.parse(default) == bigram.BigramConfig()
    with pytest.raises(UserError, match="config.table.steps = -1: must be at least 0"):
        families.parse({"family": "bigram", "table": {"steps": -1}})
    assert families.parse({"family": "bigram", "train": {"log_every": 3}}).train == TrainConfig(log_every=3)
