"""Conversations as prompts."""

import json

import pytest

from cola_jax.serving import chat
from cola_jax.serving.bodies import Message
from cola_jax.serving.errors import ApiError
from cola_jax.types import UserError

SOURCE = """{% for message in messages %}
{% if message.role == 'developer' %}{{ raise_exception('no developers here') }}{% endif %}
<{{ message.role }}> {{ message.content }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}"""
TURNS = [Message(role="system", content="be brief"), Message(role="user", content="hello")]


def test_a_template_of_a_file(tmp_path):
    file = tmp_path / "template"
    file.write_text(SOURCE)
    found = chat.load(tmp_path, str(file)).render(TURNS)
    assert found == "<system> be brief\n<user> hello\n<assistant>"


def test_a_template_of_the_checkpoint_and_its_tokens(tmp_path):
    config = {"chat_template": SOURCE, "eos_token": {"content": "</s>"}, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert "<user> hello</s>\n" in chat.load(tmp_path, None).render(TURNS)
    (tmp_path / "chat_template.jinja").write_text("{{ messages | length }}")
    assert chat.load(tmp_path, None).render(TURNS) == "2"


def test_a_checkpoint_may_have_none(tmp_path):
    assert chat.load(tmp_path, None) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert chat.load(tmp_path, None) is None


def test_a_template_that_refuses_is_an_error_of_the_request():
    with pytest.raises(ApiError, match="no developers here"):
        chat.ChatTemplate(SOURCE).render([Message(role="developer", content="x")])


def test_a_template_cannot_reach_the_program():
    with pytest.raises(ApiError, match="unsafe"):
        chat.ChatTemplate("{{ messages.__class__.__mro__ }}").render(TURNS)
    with pytest.raises(ApiError, match="unsafe"):
        chat.ChatTemplate("{{ messages.append(1) }}").render(TURNS)


@pytest.mark.parametrize("content", [b"{% if %}", b"\xff\xfe"])
def test_what_is_no_template_is_told(tmp_path, content):
    file = tmp_path / "template"
    file.write_bytes(content)
    with pytest.raises(UserError, match="--chat_template = .*: must be a"):
        chat.load(tmp_path, str(file))
    with pytest.raises(UserError, match="must be a UTF-8 file"):
        chat.load(tmp_path, str(tmp_path / "none"))


def test_a_broken_config_of_a_tokenizer_is_told(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(UserError, match="must be a JSON object"):
        chat.load(tmp_path, None)
