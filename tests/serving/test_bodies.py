"""What a request may say."""

import json

import pytest

from cola_jax.serving.bodies import ChatBody, CompletionBody, parse
from cola_jax.serving.errors import ApiError

TURN = {"role": "user", "content": "hello"}


def refused(kind, body) -> ApiError:
    raw = body if isinstance(body, bytes) else json.dumps({"model": "m"} | body).encode()
    with pytest.raises(ApiError) as error:
        parsed = parse(kind, raw)
        _ = parsed.prompts if kind is CompletionBody else None
    assert error.value.status == 400 and "\n" not in str(error.value) and len(str(error.value)) < 500
    return error.value


@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        ("one", ["one"]),
        (["one", "two"], ["one", "two"]),
        ([1, 2], [[1, 2]]),
        ([[1], [], "three"], [[1], [], "three"]),
    ],
)
def test_prompts_are_texts_or_ids(value, prompts):
    assert parse(CompletionBody, json.dumps({"model": "m", "prompt": value}).encode()).prompts == prompts


def test_a_completion_without_a_prompt_begins_from_nothing():
    assert parse(CompletionBody, b'{"model": "m"}').prompts == [""]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": {"a": 1}}, "prompt", "must be a text, a list of texts, token ids"),
        ({"prompt": []}, "prompt", "must be a text"),
        ({"prompt": [True]}, "prompt", "must be a text"),
        ({"prompt": [1, "a"]}, "prompt", "must be a text"),
        ({"max_tokens": "5"}, "max_tokens", "must be a valid integer"),
        ({"max_tokens": 0}, "max_tokens", "must be greater than or equal to 1"),
        ({"n": True}, "n", "must be a valid integer"),
        ({"temperature": "hot"}, "temperature", "must be a valid number"),
        ({"stop": ["a"] * 5}, "stop", "up to four"),
        ({"stop": ""}, "stop", "none empty"),
        ({"seed": 2**70}, "seed", "less than"),
        ({"steps": 3}, "steps", "no such field; the fields are model, temperature"),
        ({"stream_options": {"x": 1}}, "stream_options", "stream_options.x"),
        ({"presence_penalty": 0.5}, "presence_penalty", "must be null or 0"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not offered here"),
        ({"best_of": 4}, "best_of", "must be null or 1"),
        ({"cola_jax": [1]}, "cola_jax", "must be an object"),
    ],
)
def test_a_field_that_is_wrong_is_named(body, param, words):
    error = refused(CompletionBody, body)
    assert error.param == param and words in str(error)
    assert error.body["error"] == {
        "message": str(error),
        "type": "invalid_request_error",
        "param": param,
        "code": error.code,
    }


def test_fields_that_ask_for_nothing_are_accepted():
    body = {"model": "m", "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 1, "user": "u"}
    assert parse(CompletionBody, json.dumps(body).encode()).user == "u"
    body = {"model": "m", "messages": [TURN], "tools": [], "response_format": {"type": "text"}, "store": False}
    assert parse(ChatBody, json.dumps(body).encode()).messages[0].text == "hello"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b'{"model": NaN}',
        b'{"model": "m", "temperature": NaN}',
        b'{"model": "m", "temperature": 1e999}',
        b'{"model": "m", "prompt": "\xff\xfe"}',
        b'{"model": "m", "prompt": "\\ud800"}',
        b'{"model": "m", "prompt": ' + b"[" * 5000,
        b'{"model": "m", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": 7}',
        b"{}",
    ],
    ids=lambda raw: str(raw[:28]),
)
def test_what_is_no_body_is_refused(raw):
    refused(CompletionBody, raw)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least 1 item"),
        ("hello", "must be a valid array"),
        ([{"role": "robot", "content": "x"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages.0.content"),
    ],
)
def test_messages_are_texts(messages, words):
    error = refused(ChatBody, {"messages": messages})
    assert error.param == "messages" and words in str(error)


def test_the_parts_of_a_message_are_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = parse(ChatBody, json.dumps({"model": "m", "messages": [{"role": "user", "content": parts}]}).encode())
    assert body.messages[0].text == "ab"


def test_an_error_does_not_repeat_what_was_said():
    assert "secret" not in str(refused(CompletionBody, {"max_tokens": "secret"}))
    assert "secret" not in str(refused(ChatBody, {"messages": [{"role": "user", "content": {"secret": "secret"}}]}))
