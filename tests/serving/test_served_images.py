"""Images in requests and answers, over HTTP."""

import base64
import io

import httpx
import numpy as np
import openai
import PIL.Image
import pytest
from models import tiny_unified
from serving import served

from cola_jax import rng, sampling
from cola_jax.data import captioned_images
from cola_jax.evaluation import scenes
from cola_jax.sampling import images

SIDE, BUDGET = tiny_unified.SIDE, 15
BLACK = np.zeros((SIDE, SIDE, 3), np.uint8)


@pytest.fixture(scope="module")
def unified():
    with served.serving("unified", limits={"body_bytes": 200_000}) as found:
        yield found


@pytest.fixture(scope="module")
def bigram():
    with served.serving("bigram") as found:
        yield found


def client_of(serving) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0, timeout=60)


def picture(seed: int = 0, side: int = 40) -> np.ndarray:
    """A square that is larger than the run's."""
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def url_of(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def file_of(pixels, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def turn(url: str, *words: str) -> dict:
    parts = [{"type": "text", "text": text} for text in words]
    return {"role": "user", "content": [*parts, {"type": "image_url", "image_url": {"url": url}}]}


def describe(serving, messages, **fields):
    fields = {"max_tokens": BUDGET, "seed": 3} | fields
    return client_of(serving).chat.completions.create(model=serving.name, messages=messages, **fields)


def draw(serving, prompt, **fields):
    ours = {"seed": 3} | fields.pop("extra_body", {})
    return client_of(serving).images.generate(model=serving.name, prompt=prompt, extra_body=ours, **fields)


def pixels_of(answer) -> np.ndarray:
    return np.stack([np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(d.b64_json)))) for d in answer.data])


def expected_text(content: bytes | None, said: str, samples=(0,)) -> list[str]:
    """The same texts from the library."""
    run = served.run("unified")
    settings, key = served.settings(run, max_new_tokens=BUDGET), rng.key(3, "sample")
    params = run.params
    if content is not None:
        shown = np.stack([captioned_images.decode(content, SIDE)] * len(samples))
        known = run.family.pictures(run.config, run.tokenizer)
        rows = images.rows([known.words(said)] * len(samples), known.instruction_length)
        params = images.conditioned(run.model, run.params, shown, rows)
    out = sampling.generate(run.model, params, [[]] * len(samples), settings, key, sample_ids=samples)
    return [run.tokenizer.decode(row[:n]) for row, n in zip(out.tokens.tolist(), out.lengths.tolist(), strict=True)]


def test_a_text_follows_the_image_of_a_message(unified):
    content = file_of(picture())
    found = describe(unified, [turn(url_of(content))], n=2)
    told = expected_text(content, "what is it", (0, 1))
    assert [choice.message.content for choice in found.choices] == told and found.usage.prompt_tokens == 11
    run = served.run("unified")
    shown = np.stack([captioned_images.decode(content, SIDE)] * 2)
    settings = served.settings(run, max_new_tokens=BUDGET)
    assert scenes.describe(run, shown, settings, 3, lambda line: None) == told
    for other in (expected_text(file_of(BLACK), "what is it", (0, 1)), expected_text(None, "", (0, 1))):
        assert other != told


def test_the_words_of_the_message_are_what_is_said_before_the_image(unified):
    content = file_of(picture())
    said = describe(unified, [turn(url_of(content, "image/x"), "tell", " me")], n=2).choices
    told = expected_text(content, "tell me", (0, 1))
    assert [choice.message.content for choice in said] == told != expected_text(content, "what is it", (0, 1))


def test_texts_with_and_without_images_stand_in_one_batch(unified):
    """The second request joins while the first is on its way, and both are streamed."""
    content = file_of(picture(), "JPEG")
    first = describe(unified, [turn(url_of(content, "image/jpeg"))], stream=True)
    texts = [next(first).choices[0].delta.content]
    fields = {"model": unified.name, "prompt": "", "max_tokens": BUDGET, "seed": 3, "stream": True}
    alone = "".join(chunk.choices[0].text for chunk in client_of(unified).completions.create(**fields))
    texts += [chunk.choices[0].delta.content or "" for chunk in first]
    assert "".join(texts) == expected_text(content, "what is it")[0] and alone == expected_text(None, "")[0]


def test_images_are_those_of_the_library(unified):
    run = served.run("unified")
    drawn = unified.value("cola_generated_images_total")
    found = draw(unified, "a cat", n=2, response_format="b64_json", size=f"{SIDE}x{SIDE}")
    assert unified.value("cola_generated_images_total") == drawn + 2 and found.size == f"{SIDE}x{SIDE}"
    told = scenes.draw(run, ["a cat"] * 2, run.config.image_sample, 3, lambda line: None)
    assert pixels_of(found).shape == (2, SIDE, SIDE, 3) and told.std() > 5
    assert np.abs(pixels_of(found).astype(int) - told).max() <= 1
    compiled = unified.value("cola_compilations_total")
    other = pixels_of(draw(unified, "", extra_body={"steps": 5, "guidance_scale": 7}))
    assert unified.value("cola_compilations_total") == compiled
    wanted = images.ImageSettings(steps=5, guidance_scale=7.0)
    assert np.abs(other.astype(int) - scenes.draw(run, [""], wanted, 3, lambda line: None)).max() <= 1
    wanted = scenes.draw(run, ["tom"], wanted, 3, lambda line: None)
    other = pixels_of(draw(unified, "tom", extra_body={"steps": 5, "guidance_scale": 7}))
    assert np.abs(other.astype(int) - wanted).max() <= 1 and np.abs(wanted.astype(int) - told[:1]).max() > 5


def test_the_model_tells_of_its_images(unified, bigram):
    (model,) = client_of(unified).models.list().data
    assert model.cola_jax["images"]["size"] == SIDE and model.cola_jax["images"]["steps"] == 3
    assert client_of(bigram).models.list().data[0].cola_jax["images"] is None
    metrics = httpx.get(f"{unified.url}/metrics").text
    assert 'cola_requests_total{path="/v1/images/generations",status="200"}' in metrics


PNG = url_of(file_of(picture()))
CUT = url_of(file_of(picture())[:500])
LARGE = url_of(file_of(np.zeros((1, 1 << 24, 3), np.uint8).repeat(2, axis=0)))


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([turn("https://example.org/cat.png")], "image_url.url = 'https://example.org/cat.png': must be a data URL"),
        ([turn("data:text/plain;base64,aGk=")], "must be a data URL"),
        ([turn("data:image/png;base64,a-b")], "image_url.url: must be base64 behind the comma"),
        ([turn(url_of(b"no image"))], "image_url.url: the image is broken or of no known format"),
        ([turn(CUT)], "image_url.url: the image is broken"),
        ([turn(LARGE)], "image_url.url: the image has 16777216 x 2 pixels: must be at most 16777216 in all"),
        ([turn(PNG), turn(PNG)], "messages: 2 images in 2 messages; must be one image in the only message"),
        ([turn(PNG, "a" * 20)], "the words beside the image are 21 tokens: must be at most 12 with their end"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url.url: Field required"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_images_that_cannot_be_had_are_told(unified, messages, words):
    with pytest.raises(openai.BadRequestError) as error:
        describe(unified, messages)
    message = error.value.body["message"]
    assert words in message and "\n" not in message and len(message) < 300 and error.value.body["param"] == "messages"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 7}, "n = 7: with 1 prompts must be at most 6 sequences"),
        ({"size": "512x512"}, "size = '512x512': must be '16x16', the run's"),
        ({"response_format": "url"}, "response_format: must be 'b64_json'"),
        ({"quality": "high"}, "quality: not offered here; must be null or 'auto'"),
        ({"prompt": "a" * 28}, "prompt has 29 tokens with its end: must be at most 28"),
        ({"extra_body": {"steps": 0}}, "steps: must be greater than or equal to 1"),
        ({"extra_body": {"steps": 10**12}}, "steps: must be less than or equal to 1000"),
        ({"extra_body": {"guidance_scale": "x"}}, "guidance_scale: must be a valid number"),
        ({"extra_body": {"stepz": 1}}, "stepz: no such field; the fields are model, prompt, n"),
    ],
)
def test_drawings_that_cannot_be_had_are_told(unified, fields, words):
    with pytest.raises(openai.BadRequestError) as error:
        draw(unified, **{"prompt": "a cat"} | fields)
    assert words in error.value.body["message"]


def test_a_body_that_is_too_long(unified):
    with pytest.raises(openai.APIStatusError, match="the body is too long: must be at most 200000 bytes") as error:
        describe(unified, [turn(url_of(file_of(picture(side=300))))])
    assert error.value.status_code == 413


def test_other_families_say_which_one_is_needed(bigram):
    family = "needs a model of family 'unified'; the model is of family 'bigram'"
    with pytest.raises(openai.BadRequestError, match=f"messages: an image {family}"):
        describe(bigram, [turn(PNG)])
    with pytest.raises(openai.BadRequestError, match=f"/v1/images/generations {family}"):
        draw(bigram, "a cat")
