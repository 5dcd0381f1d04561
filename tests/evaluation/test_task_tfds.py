"""Tasks from TFDS: records in the form of the real data sets become examples."""

import importlib.util

import pytest
from data import corpus_files

from cola_jax.evaluation.tasks import evaluate, tfds_examples
from cola_jax.evaluation.tasks.evaluate import Selection
from cola_jax.evaluation.tasks.task import TASKS, get
from cola_jax.types import UserError

# By task: one record of its data set, and what becomes of it.
RECORDS = {
    "lambada": ({"passage": "He saw a dog"}, [({"context": "He saw a"}, (), "dog")]),
    "squad": (
        {
            "id": "1",
            "title": "t",
            "context": "C.",
            "question": "Q?",
            "answers": {"text": ["a b", "c"], "answer_start": [0, 1]},
        },
        [({"context": "C.", "question": "Q?"}, (), "a b")],
    ),
    "obqa": (
        {
            "question": {"stem": "Why?", "choice_A": "1", "choice_B": "2", "choice_C": "3", "choice_D": "4"},
            "answerKey": 2,
            "fact1": "f",
            "clarity": 1.0,
            "humanScore": 1.0,
            "turkIdAnonymized": "x",
        },
        [({"question": "Why?"}, ("1", "2", "3", "4"), "3")],
    ),
    "race": (
        {
            "article": "Long.",
            "questions": ["One?", "Two?"],
            "options": [["a", "b", "c", "d"], ["e", "f", "g", "h"]],
            "answers": ["B", "D"],
            "example_id": "i",
        },
        [
            ({"context": "Long.", "question": "One?"}, ("a", "b", "c", "d"), "b"),
            ({"context": "Long.", "question": "Two?"}, ("e", "f", "g", "h"), "h"),
        ],
    ),
    "story_cloze": (
        {"context": "Once.", "endings": ["x", "y"], "label": 1},
        [({"context": "Once."}, ("x", "y"), "y")],
    ),
}


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Data sets with the features of TFDS's own and one record each, prepared here."""
    import tensorflow_datasets as tfds

    real = tfds.builder

    def builder(name: str, data_dir=None):
        task = next(task for task, source in tfds_examples.SOURCES.items() if source.name == name)
        features = real(name, data_dir=tmp_path).info.features
        return corpus_files.tfds_builder(tmp_path, features, tfds_examples.SOURCES[task].split, [RECORDS[task][0]])

    monkeypatch.setattr(tfds, "builder", builder)


def test_every_task_of_a_record_is_read():
    assert set(RECORDS) == set(tfds_examples.SOURCES)
    for name, (record, expected) in RECORDS.items():
        rows = list(tfds_examples.SOURCES[name].rows(record))
        assert [row["answer"] for row in rows] == [answer for _, _, answer in expected]


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is here")
def test_what_needs_tensorflow_is_told(prepared):
    """TFDS reads ragged features, those of RACE, with TensorFlow only."""
    with pytest.raises(UserError, match=r"race/high\): needs the package tensorflow; pip install 'tensorflow'"):
        tfds_examples.read("race", TASKS["race"])


@pytest.mark.parametrize("name", [name for name in RECORDS if name != "race"])
def test_records_become_examples(name, prepared):
    found, place = tfds_examples.read(name, TASKS[name])
    assert [(one.fields, one.choices, one.answer) for one in found] == RECORDS[name][1]
    assert [one.id for one in found] == [f"0.{part}" for part in range(len(found))]
    assert place == f"mine/1.0.0 {tfds_examples.SOURCES[name].split}"


def test_a_task_is_asked_from_tfds(prepared):
    (asked,) = evaluate.ask(get(["lambada"]), Selection("tfds"))
    assert asked.prompts[0].text == "He saw a" and asked.facts["data"] == "mine/1.0.0 test"
    with pytest.raises(UserError, match="--data = tfds: has no task 'mmlu'; must be one of lambada, squad"):
        evaluate.ask(get(["mmlu"]), Selection("tfds", shots=0))
