"""Which settings a request may have."""

import dataclasses

import jax
import pytest
from serving import served

from cola_jax.sampling.choose import Choice
from cola_jax.serving import start
from cola_jax.serving.lane import Lane
from cola_jax.serving.offers import Offers
from cola_jax.serving.settings import ServeSettings
from cola_jax.types import UserError


def offers(name="cola", *others, **limits):
    run = served.run(name)
    return Offers(run, run.settings, others, dataclasses.replace(served.LIMITS, **limits))


def test_a_request_that_asks_for_nothing_gets_the_first_offer():
    found = offers("cola", "steps=4,solver=heun", "guidance_interval=0.1:0.9")
    assert [settings.steps for settings in found.settings] == [2, 4, 2]
    assert found.settings[2].guidance_interval == (0.1, 0.9) and found.settings[0].context == served.CONTEXT
    assert found.choose({}, "") == (0, Choice(0.7, 0, 1.0, 1.0, 29))


def test_what_each_sequence_has_for_itself_is_free_and_the_rest_must_be_an_offer():
    found = offers("cola", "steps=4,solver=heun")
    assert found.choose({"temperature": 0.31, "top_k": 5}, "") == (0, Choice(0.31, 5, 1.0, 1.0, 29))
    assert found.choose({"steps": 4, "solver": "heun", "top_p": 0.5}, "").index == 1
    with pytest.raises(
        UserError, match="^steps = 4: not offered; the offers are steps = 2, solver = 'euler'; steps = 4"
    ):
        found.choose({"steps": 4, "top_p": 0.5}, "")


def test_one_offer_is_one_program():
    assert len(offers("cola", "steps=2", "steps=3", "steps=3").settings) == 2


def test_a_family_without_an_engine_has_one_temperature_for_all():
    found = offers("bigram")
    assert found.choose({"temperature": 1.0}, "").index == 0 and found.settings[0].max_new_tokens <= served.CONTEXT // 2
    with pytest.raises(UserError, match="temperature = 0.5: not offered; the offers are the defaults"):
        found.choose({"temperature": 0.5}, "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps", "--offer = 'steps': must be settings such as"),
        ("steps=many", "--offer: steps = 'many': must be a value of type int"),
        ("steps=0", "--offer: steps = 0: must be at least 1"),
        ("stepz=1", "--offer: stepz: family 'cola' has no such setting; it has steps, solver"),
        ("max_new_tokens=3", "no such setting"),
        ("context=3", "no such setting"),
        ("churn=1", "--offer: churn = 1.0: must be 0 with solver 'euler'"),
    ],
)
def test_an_offer_that_cannot_be_had_is_told(text, words):
    with pytest.raises(UserError) as error:
        offers("cola", text)
    assert words in str(error.value)


def test_limits_are_those_of_the_model_or_less():
    assert (offers().context, offers().max_tokens) == (28, 28)
    assert (offers(context=20).context, offers(context=20, max_tokens=50).max_tokens) == (20, 20)
    with pytest.raises(UserError, match="--context = 99: must be at most 28"):
        offers("bigram", context=99)


def test_too_large_a_batch_for_the_device_is_one_line():
    def warm():
        raise jax.errors.JaxRuntimeError(message)

    lane, limits = Lane.__new__(Lane), ServeSettings(batch_sizes=(1, 8))
    lane.warm = warm
    message = "INTERNAL: Out of memory allocating 1453177615616 bytes."
    with pytest.raises(UserError, match="^--batch_sizes = 1,8, --context = 99: too much for the memory of this device"):
        start._warm(lane, limits, 99)
    message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError):
        start._warm(lane, limits, 99)
