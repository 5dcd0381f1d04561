"""Who is right: the rules of released code, on its own verdicts and one by one, and those of the paper."""

import json
from pathlib import Path

import pytest

from cola_jax.evaluation.tasks import matching
from cola_jax.evaluation.tasks.task import TASKS, Example

VERDICTS = [
    json.loads(line) for line in (Path(__file__).parent / "released_verdicts.jsonl").read_text("utf-8").splitlines()
]
FRUIT = ("a red apple", "a yellow lemon", "a plum")


def correct(task, answer, generated, choices=(), matcher="released"):
    example = Example("0", {"question": "?"}, tuple(choices), answer, "here")
    return matching.correct(matcher, TASKS[task], example, generated)


@pytest.mark.parametrize("task", ["lambada", "squad", "mmlu", "siqa"])
def test_the_verdicts_of_released_code_are_reached(task):
    rows = [row for row in VERDICTS if row["task"] == task]
    found = [correct(task, row["answer"], row["generated"], row.get("choices", ())) for row in rows]
    assert found == [row["correct"] for row in rows] and 4 < sum(found) < len(found)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" a b\nc", " a b"),
        ("\n\n a\nb", "\n\n a"),
        (" -- \n.\nword\nmore", " -- \n.\nword"),
        ("one line", "one line"),
        ("\n \n", "\n \n"),
    ],
)
def test_a_text_ends_at_the_first_line_end_behind_a_word_character(text, kept):
    assert matching.cut(text) == kept


def test_normalising_drops_case_punctuation_and_double_spaces():
    assert matching.normalise("  The  “Plum”,\n(sweet) snake_case! ") == "the plum sweet snake_case"


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("B", 1),
        ("(c)", 2),
        ("[B].", 1),
        ("a.", 0),
        ("D", None),  # beyond the options
        ("I say the answer is A, no: option (B) for sure, as everyone here knows", 1),
        ("the answer is D", None),
        ("perhaps (A), perhaps (C)", 2),
        ("perhaps (A), perhaps (C), but this text is longer than that", None),
        ("A PLUM!", 2),
        ("The correct final answer is: a plum", 2),
        ("surely it was a plum that fell", 2),
        ("a red apple and a plum", None),  # two of them
        ("a yelow lemon", 1),  # ratio 0.96
        ("yellow", None),
        ("", None),
    ],
)
def test_an_option_is_found_by_letter_then_text_then_likeness(text, index):
    assert matching.option(text, FRUIT) == index


def test_what_stands_behind_answer_in_the_last_line_goes_first():
    assert matching.written_option("A plum?\nFinal answer = a red apple", FRUIT) == 0
    assert matching.written_option("a yellow lemon, no, answer: a plum", FRUIT) == 2
    assert matching.option("answer: a plum", FRUIT) == 0  # the whole text has a letter behind "answer"
    assert matching.written_option("a plum\nanswer:", FRUIT) == 2  # nothing stands there
    assert matching.written_option("the answer is blowing in the wind, a plum", FRUIT) == 2
    assert matching.written_option("no answer: nothing", FRUIT) is None
    assert matching.written_option("", FRUIT) is None


def test_what_leads_to_the_answer_is_left_out():
    choices = ("red apple", "yellow lemon", "plum")
    assert matching.option("The correct option is yelow lemon.", choices) == 1
    assert matching.option("I think that it is yelow lemon.", choices) is None


def test_a_word_or_a_whole_answer_or_an_option_must_match():
    assert correct("lambada", "Signs", ' "signs", he said') and not correct("lambada", "signs", "")
    assert not correct("lambada", "signs", "sign s") and not correct("lambada", "signs", "\n")
    assert correct("squad", "the Broncos", " The broncos.\nQuestion") and not correct("squad", "the Broncos", "Broncos")
    for task in ("hellaswag", "story_cloze"):  # no letters and no likeness
        assert correct(task, "a plum", "A plum.", FRUIT) and not correct(task, "a plum", "(C)", FRUIT)
    for task in ("mmlu", "obqa", "race", "siqa"):
        assert correct(task, "a plum", "C", FRUIT) and not correct(task, "a plum", "B", FRUIT)
    # Equal after normalising though the map finds no option: two of them contain it.
    assert correct("mmlu", "plum", "plum", ("plum", "plums", "a plum"))


def test_the_paper_takes_the_most_similar_option():
    assert correct("mmlu", "a yellow lemon", "yellow", FRUIT, "paper")
    assert not correct("mmlu", "a yellow lemon", "red", FRUIT, "paper")
    assert correct("hellaswag", "a plum", "plums!", FRUIT, "paper")
    assert not correct("mmlu", "a red apple", " \n", FRUIT, "paper")  # nothing was written
    assert not correct("mmlu", "a plum", "C", FRUIT, "paper")  # letters mean nothing: "c" is not like "a plum"
    assert correct("squad", "a plum", "A plum", matcher="paper") and not correct("squad", "a plum", "plum", (), "paper")
    assert correct("lambada", "plum", "plum tree", matcher="paper")
    # Two equal options: either is right.
    assert correct("siqa", "yes", "yes", ("yes", "yes", "no"), "paper")
