"""The server over HTTP, with the official client of OpenAI's interface."""

import concurrent.futures
import json
import threading
import time

import httpx
import openai
import pytest
from serving import served

from cola_jax import rng, sampling
from cola_jax.serving import server
from cola_jax.types import UserError
from tests.serving.fuzz import malformed

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    file = tmp_path_factory.mktemp("chat") / "template.jinja"
    file.write_text(TEMPLATE)
    return str(file)


@pytest.fixture(scope="module")
def cola(template):
    with served.serving("cola", chat_template=template, offers=["steps=1"]) as found:
        yield found


@pytest.fixture(scope="module")
def ar(template):
    with served.serving("autoregressive", chat_template=template) as found:
        yield found


def client_of(serving, key="none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{serving.url}/v1", api_key=key, max_retries=0, timeout=60)


def complete(serving, prompt, **fields):
    fields = {"max_tokens": 9, "seed": 3} | fields
    return client_of(serving).completions.create(model=serving.name, prompt=prompt, **fields)


def expected(name, prompts, count=9, seed=3, samples=None, **changes) -> list[str]:
    """The same texts from the library."""
    run = served.run(name)
    settings = served.settings(run, max_new_tokens=count, **changes)
    ids = [run.tokenizer.encode(prompt) for prompt in prompts]
    out = run.family.generate(run.model, run.params, ids, settings, rng.key(seed, "sample"), sample_ids=samples)
    return [run.tokenizer.decode(row[:n]) for row, n in zip(out.tokens.tolist(), out.lengths.tolist(), strict=True)]


def test_a_completion_is_what_the_library_generates(cola, ar):
    for serving, name in ((cola, "cola"), (ar, "autoregressive")):
        found = complete(serving, "mia was", n=3, extra_body={"cola_jax": {"top_k": 0}})
        texts = expected(name, ["mia was"] * 3, samples=range(3))
        assert [choice.text for choice in found.choices] == texts and len("".join(texts)) > 9
        assert found.usage.prompt_tokens == 7 and found.usage.total_tokens == 7 + found.usage.completion_tokens
        assert found.object == "text_completion"
        for choice in found.choices:
            assert choice.finish_reason == "length" or len(choice.text) < 9


def test_several_prompts_with_several_samples(ar):
    found = complete(ar, ["mia", "tom"], n=2, echo=True)
    texts = expected("autoregressive", ["mia", "mia", "tom", "tom"], samples=range(4))
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    echoed = [p + t for p, t in zip(["mia", "mia", "tom", "tom"], texts, strict=True)]
    assert [choice.text for choice in found.choices] == echoed and len(set(echoed)) == 4
    ids = complete(ar, [served.Letters().encode("mia"), served.Letters().encode("tom")], n=2)
    assert [choice.text for choice in ids.choices] == texts


def test_a_stream_is_the_completion_in_pieces(cola, ar):
    for serving in (cola, ar):
        fields = {"n": 3, "stop": ["zq"], "temperature": 0.9}
        whole = complete(serving, "tom", **fields)
        texts, reasons, usage = {}, {}, None
        chunks = complete(serving, "tom", stream=True, stream_options={"include_usage": True}, **fields)
        for chunk in chunks:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                assert reasons.get(choice.index) is None
                texts[choice.index] = texts.get(choice.index, "") + choice.text
                reasons[choice.index] = choice.finish_reason
        assert [texts[i] for i in range(3)] == [choice.text for choice in whole.choices]
        assert [reasons[i] for i in range(3)] == [choice.finish_reason for choice in whole.choices]
        assert usage == whole.usage


def test_a_stop_text_ends_the_text_before_it(ar):
    whole = complete(ar, "tom", temperature=1.0, max_tokens=20).choices[0].text
    stop = whole[5:7]
    found = complete(ar, "tom", temperature=1.0, max_tokens=20, stop=[stop, "never there"]).choices[0]
    assert found.text == whole[: whole.index(stop)] and found.finish_reason == "stop"


def test_a_conversation(cola):
    client, messages = client_of(cola), [{"role": "user", "content": "mia was"}]
    fields = {"model": cola.name, "messages": messages, "seed": 3, "max_tokens": 9}
    found = client.chat.completions.create(**fields)
    assert found.choices[0].message.content == expected("cola", ["mia was"])[0]
    assert found.choices[0].message.role == "assistant" and found.object == "chat.completion"
    chunks = list(client.chat.completions.create(**fields, stream=True, n=2))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices if choice.index == 0]
    assert "".join(pieces) == found.choices[0].message.content


def test_a_gap_is_filled_with_as_many_tokens(cola):
    found = complete(cola, "mia ", suffix=" tom", max_tokens=6)
    assert found.usage.completion_tokens == 6 and found.choices[0].finish_reason == "length"
    run = served.run("cola")
    gap = [(run.tokenizer.encode("mia "), 6, run.tokenizer.encode(" tom"))]
    out = sampling.infill(run.model, run.params, gap, served.settings(run), rng.key(3, "sample"))
    assert found.choices[0].text == run.tokenizer.decode(out.tokens[0].tolist())


def test_what_is_offered_can_be_asked_for_and_nothing_else(cola):
    found = complete(cola, "mia was", extra_body={"cola_jax": {"steps": 1}}).choices[0].text
    assert found != complete(cola, "mia was").choices[0].text
    with pytest.raises(openai.BadRequestError, match="steps = 5: not offered; the offers are steps = 2; steps = 1"):
        complete(cola, "mia was", extra_body={"cola_jax": {"steps": 5}})
    with pytest.raises(openai.BadRequestError, match="no such setting"):
        complete(cola, "mia was", extra_body={"cola_jax": {"stepz": 5}})
    with pytest.raises(openai.BadRequestError, match="guidance_scale = -1: must be at least 0"):
        complete(cola, "mia was", extra_body={"cola_jax": {"guidance_scale": -1}})


def test_provisional_frames_settle_on_the_text(cola):
    options = {"temperature": 0.0, "extra_body": {"cola_jax": {"provisional": True}}}
    text = complete(cola, "mia", **options).choices[0].text
    frames, shown = 0, ""
    for chunk in complete(cola, "mia", stream=True, **options):
        told = chunk.model_extra["cola_jax"]
        shown += "".join(choice.text for choice in chunk.choices)
        if "provisional" in told:
            frames += 1
            assert len(told["provisional"]) == 2 and all(isinstance(guess, str) for guess in told["provisional"])
    assert shown == text and frames > 1


def test_log_probabilities(ar):
    found = complete(ar, "tom", logprobs=2, temperature=1.0).choices[0]
    told = found.logprobs
    assert "".join(told.tokens) == found.text and told.text_offset == list(range(len(found.text)))
    assert all(value <= 0 for value in told.token_logprobs) and {len(top) for top in told.top_logprobs} <= {1, 2}
    messages = [{"role": "user", "content": "tom"}]
    fields = {"model": ar.name, "messages": messages, "logprobs": True, "top_logprobs": 3, "max_tokens": 4, "seed": 1}
    chat = client_of(ar).chat.completions.create(**fields).choices[0]
    assert "".join(place.token for place in chat.logprobs.content) == chat.message.content
    assert {len(place.top_logprobs) for place in chat.logprobs.content} == {3}


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model = 'gpt-4': not served here; must be 'tiny-cola'"),
        ({"prompt": "a" * 40}, openai.BadRequestError, "prompt 0 has 40 tokens: must be at most 27"),
        ({"max_tokens": 28}, openai.BadRequestError, "max_tokens = 28: must be at most 25 behind a prompt of 3 tokens"),
        ({"prompt": [1, 99]}, openai.BadRequestError, "prompt 0: has a token outside the vocabulary, must be 0 to 30"),
        ({"n": 7}, openai.BadRequestError, "must be at most 6 sequences"),
        ({"temperature": -1}, openai.BadRequestError, "temperature = -1.0: must be from 0 to 100"),
        ({"top_p": 0}, openai.BadRequestError, "top_p = 0.0: must be above 0 and at most 1"),
        ({"logprobs": 1}, openai.BadRequestError, "logprobs: the model has no probabilities of single tokens"),
        ({"suffix": "b", "max_tokens": None}, openai.BadRequestError, "max_tokens: must be given with suffix"),
        ({"suffix": "b", "echo": True}, openai.BadRequestError, "echo: cannot be given together with"),
        ({"stream_options": {}}, openai.BadRequestError, "stream_options: must be given together with stream"),
    ],
)
def test_what_cannot_be_had_is_told(cola, fields, error, words):
    with pytest.raises(error) as found:
        client_of(cola).completions.create(**{"model": cola.name, "prompt": "mia", "max_tokens": 9} | fields)
    assert words in found.value.body["message"] and found.value.body["type"]


def test_a_family_that_only_continues_refuses_gaps(ar):
    with pytest.raises(openai.BadRequestError, match="suffix: this model only continues texts"):
        complete(ar, "mia", suffix="tom")
    with pytest.raises(openai.BadRequestError, match="logprobs = 9: must be at most 5"):
        complete(ar, "mia", logprobs=9)


def test_models_and_health(cola):
    client = client_of(cola)
    (model,) = client.models.list().data
    assert model.id == cola.name and client.models.retrieve(cola.name).id == cola.name
    assert model.cola_jax["infills"] and model.cola_jax["batching"] == "continuous" and model.cola_jax["unit"] == 8
    assert httpx.get(f"{cola.url}/health").json() == {"status": "ok"}
    assert "<textarea" in httpx.get(cola.url).text
    for method, path in (("GET", "/v1/nothing"), ("GET", "/v1/completions"), ("DELETE", "/")):
        error = httpx.request(method, f"{cola.url}{path}")
        assert error.status_code in (404, 405) and "the paths are" in error.json()["error"]["message"]


def test_many_clients_at_once_get_what_each_gets_alone(cola):
    prompts = ["", "a", "mia", "tom was", "one day"] * 5
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: complete(cola, prompts[i], seed=i).choices[0].text, range(25)))
    apart = [expected("cola", [prompt], seed=seed)[0] for seed, prompt in enumerate(prompts)]
    assert together == apart
    compiled = cola.value("cola_compilations_total")
    complete(cola, "something ne", temperature=1.7, top_p=0.4)
    assert cola.value("cola_compilations_total") == compiled > 0 and cola.value("cola_generated_tokens_total") > 100


def test_a_client_that_goes_frees_its_place(cola):
    before = cola.value("cola_cancelled_sequences_total")
    body = {"model": cola.name, "prompt": "mia", "n": 6, "max_tokens": 25}
    slow = threading.Event()
    lane = cola.started.batcher._lanes[0][0]
    step = lane.step
    lane.step = lambda: (slow.wait(0.1), step())[1]  # a model that takes its time
    try:
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{cola.url}/v1/completions", json=body, timeout=0.25)
        with httpx.stream("POST", f"{cola.url}/v1/completions", json=body | {"stream": True}) as response:
            next(response.iter_lines())
        deadline = time.time() + 20
        while cola.started.batcher.busy and time.time() < deadline:
            time.sleep(0.01)
    finally:
        del lane.step
    assert not cola.started.batcher.busy and cola.value("cola_cancelled_sequences_total") > before + 2


def test_malformed_requests_are_errors_of_the_client(cola):
    with httpx.Client(base_url=cola.url, timeout=20) as client:
        for index in range(150):
            path, headers, body = malformed(index, cola.name)
            response = client.post(path, headers=headers, content=body)
            assert 400 <= response.status_code < 500, (index, response.text[:300])
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert complete(cola, "mia").choices


def test_too_many_and_too_late_and_the_key(template):
    limits = {"queue": 1, "batch_sizes": (1,), "request_seconds": 2.0, "max_sequences": 4, "prefixes": 0}
    with served.serving("bigram", api_key="sesame", limits=limits) as found:
        open_client = client_of(found, "sesame")
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            client_of(found, "sesam").models.list()
        assert httpx.get(f"{found.url}/health").status_code == 200
        lane = found.started.batcher._lanes[0][0]
        fields = {"model": found.name, "prompt": "mia", "max_tokens": 5}
        assert open_client.completions.create(**fields).choices[0].finish_reason
        assert open_client.models.list().data[0].cola_jax["batching"] == "whole batches"
        with pytest.raises(openai.RateLimitError, match="the server is busy: 0 sequences wait") as error:
            open_client.completions.create(**fields, n=3)
        assert error.value.response.headers["retry-after"] == "1"
        step, gate = lane.step, threading.Event()
        lane.step = lambda: (gate.wait(30), step())[1]
        with pytest.raises(openai.APIStatusError, match="the time for a request is over") as error:
            open_client.completions.create(**fields)
        assert error.value.status_code == 408
        lane.step = lambda: 1 / 0
        gate.set()
        while found.started.batcher.busy:
            time.sleep(0.01)
        with pytest.raises(openai.InternalServerError, match="generation failed"):
            open_client.completions.create(**fields)
        del lane.step
        assert open_client.completions.create(**fields).choices  # the server goes on
        with pytest.raises(openai.BadRequestError, match="temperature = 0.5: not offered; the offers are the defaults"):
            open_client.completions.create(**fields, temperature=0.5)
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            open_client.chat.completions.create(model=found.name, messages=[{"role": "user", "content": "x"}])


def test_a_server_that_ends_finishes_what_has_begun():
    with served.serving("bigram") as found:
        lane = found.started.batcher._lanes[0][0]
        step = lane.step
        gate = threading.Event()
        lane.step = lambda: (gate.wait(30), step())[1]
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            begun = pool.submit(complete, found, "mia")
            while not found.started.batcher.busy:
                time.sleep(0.01)
            found.server.handle_exit(15, None)
            with pytest.raises(openai.InternalServerError, match="shutting down") as error:
                complete(found, "tom")
            assert error.value.status_code == 503
            assert httpx.get(f"{found.url}/health").json() == {"status": "draining"}
            assert not begun.done()
            gate.set()
            assert begun.result().choices[0].finish_reason
        found._thread.join(20)
        assert not found._thread.is_alive()


def test_a_port_that_is_taken_is_told(cola):
    port = int(cola.url.rsplit(":", 1)[1])
    with pytest.raises(UserError, match=f"--port = {port}: cannot be had on 127.0.0.1 .*in use"):
        server.bind("127.0.0.1", port)
    with pytest.raises(UserError, match="--host = nowhere.invalid: must be a name or an address"):
        server.bind("nowhere.invalid", 0)
    assert server.is_loopback("::1") and server.is_loopback("127.0.0.9") and not server.is_loopback("0.0.0.0")


def test_events_end_with_done(cola):
    body = {"model": cola.name, "prompt": "mia", "max_tokens": 5, "stream": True}
    lines = httpx.post(f"{cola.url}/v1/completions", json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(line.removeprefix("data: "))["id"].startswith("cmpl-") for line in lines[:-2])
