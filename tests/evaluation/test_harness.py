"""The model of lm-evaluation-harness: its three requests, the same at every batch size and after a restart."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import environment
import pytest

pytest.importorskip("lm_eval")

from cola_jax import likelihood, rng, runs  # noqa: E402
from cola_jax.evaluation import harness  # noqa: E402
from cola_jax.types import UserError  # noqa: E402
from tests.evaluation import tiny_runs  # noqa: E402
from tests.system.test_binaries import call  # noqa: E402

ROOT = Path(__file__).parents[2]
FAMILIES = ("autoregressive", pytest.param("cola", marks=pytest.mark.slow))
QUICK = {"sample_steps": 1, "sample_guidance_scale": 1.0, "score_solver": "euler", "score_steps": 1}
LONG = "".join(chr(97 + i % 26) for i in range(70))
PAIRS = [("ab", " cd"), ("", "abcd"), ("ab ", "cd"), (LONG[:40], "yz"), ("ab", "zz")]


class Kept(dict):
    """Answers as lm_eval keeps them."""

    def add_partial(self, kind, arguments, answer):
        self[kind, json.dumps(arguments)] = answer


@pytest.fixture
def make(monkeypatch):
    def create(family, **options):
        monkeypatch.setattr(runs, "load", lambda *arguments: tiny_runs.create(family))
        return harness.ColaJax("run", **(QUICK if family == "cola" else {}), **options)

    return create


def asked(*arguments):
    return [SimpleNamespace(args=one if isinstance(one, tuple) else (one,)) for one in arguments]


def values(answers):
    return [value for value, _ in answers]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_every_batch_and_restart(family, make):
    requests = asked(*PAIRS[:3])
    texts = asked(("abcd", {"until": ["\n"], "max_gen_toks": 4}), ("ef", {"until": [], "max_gen_toks": 4}))
    one, other = make(family, batch_size=1), make(family, batch_size=3)
    kept = Kept()
    other.set_cache_hook(kept)
    found = one.loglikelihood(requests, disable_tqdm=True), other.loglikelihood(requests, disable_tqdm=True)
    assert values(found[0]) == pytest.approx(values(found[1]), rel=1e-5) and max(values(found[0])) < 0
    assert [same for _, same in found[0]] == [same for _, same in found[1]]
    # Of a run that goes on, lm_eval asks what is left.
    assert one.loglikelihood(requests[1:], disable_tqdm=True)[0][0] == pytest.approx(found[0][1][0], rel=1e-5)
    written = one.generate_until(texts, disable_tqdm=True)
    assert written == other.generate_until(texts, disable_tqdm=True) and all(written)
    assert one.generate_until(texts[1:], disable_tqdm=True) == written[1:]
    assert len(kept) == 5 and kept["generate_until", json.dumps(texts[0].args)] == written[0]
    assert found[0][0] == found[0][2]  # a space moves to the continuation
    (ids,) = one._write([[97, 98]], one._generation({"max_gen_toks": 4}))
    other_ids = [*ids[:2], (ids[2] + 1) % 256]
    assert one._writes([([97, 98], ids), ([97, 98], ids[:3]), ([97, 98], other_ids)]) == [True, True, False]
    numbers = [one._given(*pair).identity for pair in (([1], [2]), ([1], [3]), ([], [1, 2]), ([1], [2]))]
    assert len(set(numbers)) == 3 and numbers[0] == numbers[3]  # draws follow the request
    info = one.get_model_info()
    assert info["family"] == family and info["step"] == 3 and info["seed"] == 0 and len(info["commit"]) == 40
    assert info["bound"] == {"cola": "lower", "autoregressive": "exact"}[family] and info["samples"] == 1
    assert info["jax_device"] and info["dtype"] and info["end_of_text"] == (family == "cola")
    json.dumps(info)


def test_exact_values_are_those_of_the_model(make):
    model = make("autoregressive")
    run = tiny_runs.create("autoregressive")

    def exact(text, given):
        rows, segments = likelihood.stack([list(text.encode())])
        key = rng.key(0, "likelihood")
        return run.family.score(run.model, run.params, rows, segments, None, key, [given]).log_prob[0]

    found = values(model.loglikelihood(asked(*PAIRS), disable_tqdm=True))
    expected = [exact("ab cd", 2), exact("abcd", 0), exact("ab cd", 2), exact(LONG[10:40] + "yz", 30), exact("abzz", 2)]
    assert found == pytest.approx(expected, rel=1e-5)
    assert model.get_model_info()["truncated_requests"] == 1
    windows = [exact(LONG[:32], 0), exact(LONG[31:63], 1), exact(LONG[38:70], 25)]
    texts = asked("ab cd", LONG)
    assert model.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(
        [exact("ab cd", 0), sum(windows)], rel=1e-5
    )


def test_windows_score_every_token_once():
    model = SimpleNamespace(max_length=8, _run=tiny_runs.create("cola", patch=2))
    for length in (3, 8, 9, 14, 15, 40):
        ids = list(range(length))
        windows = list(harness.ColaJax._windows(model, ids))
        assert sum((scored for _, scored in windows), []) == ids
        assert all(len(before) + len(scored) <= 8 for before, scored in windows)
        assert all(before == ids[scored[0] - len(before) : scored[0]] for before, scored in windows)
        assert all(before for before, _ in windows[1:])
    assert [len(before) for before, _ in windows] == [0, 2, 2, 2, 2, 2, 6]


def test_a_text_ends_before_the_first_stop_string():
    assert harness._until("abc\nd.e", ["\n", "."]) == "abc" and harness._until("abcdbc", "bc") == "a"
    assert harness._until("abc", None) == harness._until("abc", ["", "x"]) == "abc"


def test_generation_follows_the_task_and_is_greedy_unless_samples_are_asked_for(make):
    model = make("autoregressive", max_new_tokens=5)
    ask = model._generation
    assert (ask({}).max_new_tokens, ask({}).temperature) == (5, 0.0)
    assert ask({"until": ["x"], "max_tokens": 7}).max_new_tokens == 7
    assert ask({"max_gen_toks": 256}).max_new_tokens == 16  # half of the context is for the prompt
    assert ask({"do_sample": True}).temperature == 1.0 and ask({"temperature": 0.3}).temperature == pytest.approx(0.3)
    assert ask({"do_sample": False, "temperature": 0.3}).temperature == 0.0
    assert ask({"do_sample": True, "top_k": 3}).top_k == 3
    with pytest.raises(UserError, match="generation_kwargs num_beams: family 'autoregressive' has no such setting"):
        ask({"num_beams": 2})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sample_stepz": 3}, "--model_args sample_stepz: no such setting; must be one of"),
        ({"sample_max_new_tokens": 0}, "--model_args sample_max_new_tokens = 0: must be at least 1"),
        ({"pretrained": "x"}, "--model_args pretrained: must be arguments of the model"),
    ],
)
def test_bad_arguments_are_told(options, words, make):
    with pytest.raises(UserError, match=words):
        make("autoregressive", **options)


def test_lm_eval_finds_the_model_by_the_entry_point():
    """Which releases after 0.4.13 read; `launch/harness.py` registers it for the others."""
    from importlib.metadata import entry_points

    found = [point for point in entry_points(group="lm_eval.models") if point.name == "cola_jax"]
    assert found and found[0].load() is harness.ColaJax


@pytest.mark.slow
@pytest.mark.parametrize("config", ["tiny_ar"])  # "tiny" passes, too, and compiles for three minutes
def test_three_tasks_by_the_command_line(config, tmp_path):
    """Of lm_eval's own form, on local data, whole and with the answers of a run before."""
    run, names = tmp_path / "run", ("cola_jax_choice", "cola_jax_rolling", "cola_jax_write")
    call(tmp_path / "cache", "train.py", f"--config=tests/system/{config}.py", f"--workdir={run}")
    quick = ",greedy=False,sample_steps=1,sample_guidance_scale=1.0,score_solver=euler,score_steps=1"
    options = quick if config == "tiny" else ""  # Cola's programs take long to compile
    tasks = ["--include_path", "tests/evaluation/harness_tasks", "--tasks", *names]
    found = []
    for name, size in (("a", "1"), ("b", "32"), ("a", "32")):
        command = [sys.executable, ROOT / "launch" / "harness.py", "--model", "cola_jax", *tasks, "--batch_size", size]
        command += ["--model_args", f"checkpoint={run}{options}", "--use_cache", tmp_path / name]
        command += ["--output_path", tmp_path / f"{len(found)}.json"]
        places = {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=environment.process(1, tmp_path / "cache", **places),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (file,) = tmp_path.glob(f"{len(found)}*.json")
        results = json.loads(file.read_text())
        assert results["config"]["family"] == {"tiny": "cola", "tiny_ar": "autoregressive"}[config]
        found.append([results["results"][name] for name in names])
    assert os.path.getsize(tmp_path / "a_rank0.db")
    for other in found[1:]:
        assert other[0]["acc,none"] == found[0][0]["acc,none"] and other[2] == found[0][2]
        bits = [one[1]["bits_per_byte,none"] for one in (found[0], other)]
        assert bits[0] == pytest.approx(bits[1], rel=1e-5) and bits[0] > 0


@pytest.mark.slow
def test_a_missing_checkpoint_is_one_line(tmp_path):
    command = [sys.executable, ROOT / "launch" / "harness.py", "--model", "cola_jax", "--tasks", "cola_jax_choice"]
    command += ["--include_path", "tests/evaluation/harness_tasks", "--model_args", f"checkpoint={tmp_path / 'none'}"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment.process(1), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'none'}: no checkpoint here; it must be")
