"""Sequences that share batches, join and leave: each is what it is alone."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from models import tiny_autoregressive
from serving import served

from cola_jax import rng, sampling
from cola_jax.sampling import jobs as batches
from cola_jax.sampling import token_engine
from cola_jax.sampling.choose import Choice, choice_of
from cola_jax.sampling.jobs import Job
from cola_jax.serving import whole
from cola_jax.serving.lane import Lane, Ticket

SIZES = (1, 4)
NAMES = ("cola", "autoregressive", "bigram")
PROMPTS = [[], [3], [4, 5, 6, 7, 8], [1] * 8, [2, 9] * 6]


def settings_of(name, **changes):
    run = served.run(name)
    fixed = {"max_new_tokens": 12, "context": served.CONTEXT, "eos_id": 29} | changes
    known = {field.name for field in dataclasses.fields(run.settings)}
    return dataclasses.replace(run.settings, **{key: value for key, value in fixed.items() if key in known})


@functools.cache
def lane_of(name, prefixes: int = 8, **changes):
    """A warm lane; tests leave it empty."""
    run, settings = served.run(name), settings_of(name, **changes)
    engine = whole.engine(run.family)
    lane = Lane(engine, engine.prepare(run.model, run.params, settings), SIZES, prefixes)
    lane.warm()
    return lane


class Reader:
    """Collects what a sequence gets."""

    def __init__(self, job: Job, **options):
        self.tokens, self.updates, self.ticket = [], [], Ticket(job, self.take, **options)

    def take(self, update):
        assert not self.done
        self.updates.append(update)
        self.tokens += update.tokens

    @property
    def done(self) -> bool:
        return bool(self.updates) and self.updates[-1].done


def step(lane):
    for ticket, update in lane.step():
        ticket.sink(update)


def finish(lane):
    while lane.active:
        step(lane)


def job(name, prompt, seed=5, sample=0, budget=12, **own):
    return Job(prompt, budget, choice_of(settings_of(name))._replace(**own), seed, sample)


@functools.cache
def alone(name, prompt: tuple, seed, sample, budget, **own) -> list[int]:
    """The same from the library, one prompt in one batch."""
    run, key = served.run(name), rng.key(seed, "sample")
    out = run.family.generate(
        run.model, run.params, [list(prompt)], settings_of(name, **own), key, sample_ids=[sample]
    )  # fmt: skip
    return out.tokens[0, : min(int(out.lengths[0]), budget)].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_sequences_that_come_and_go_are_what_they_are_alone(name):
    lane, waiting = lane_of(name), []
    budgets = [12, 3, 8, 1, 12]
    for index, prompt in enumerate(PROMPTS * 3):
        waiting.append((job(name, prompt, 5 + index % 2, index, budgets[index % 5]), prompt, budgets[index % 5]))
    readers, sizes = [], set()
    while waiting or lane.active:
        count = min(lane.free, 1 + len(readers) % 3, len(waiting))
        new = [Reader(waiting[i][0]) for i in range(count)]
        del waiting[:count]
        readers += new
        lane.admit([reader.ticket for reader in new])
        sizes.add(lane.size)
        step(lane)
    assert sizes == set(SIZES) or name == "bigram"  # whose sequences leave at once
    for reader in readers:
        asked = reader.ticket.job
        expected = alone(name, tuple(asked.prompt), asked.seed, asked.sample, asked.max_new_tokens)
        assert reader.done and reader.tokens == expected, asked
        assert reader.updates[-1].ended == (len(expected) < asked.max_new_tokens)
    assert len({tuple(reader.tokens) for reader in readers}) > 10


@pytest.mark.parametrize("name", NAMES)
def test_service_compiles_nothing(name):
    lane, compiled = lane_of(name), []
    listener = lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    draw = np.random.default_rng(0)
    for index in range(24):
        prompt = draw.integers(0, 28, draw.integers(0, 13)).tolist() if index % 2 else PROMPTS[index % 5]
        own = {"temperature": float(draw.choice([0.0, 0.7])), "top_p": float(draw.uniform(0.3, 1))}
        own = {} if name == "bigram" else own
        count = min(lane.free, int(draw.integers(0, 4)))
        asked = [job(name, prompt, index, i, int(draw.integers(1, 13)), **own) for i in range(count)]
        lane.admit([Ticket(each, lambda update: None, bool(draw.integers(2))) for each in asked])
        if lane.active:
            lane.step()
    finish(lane)
    assert not compiled
    jax.jit(lambda x: x * 3.25)(1.0)
    assert compiled  # what the listener counts


@pytest.mark.parametrize("name", [pytest.param("cola", marks=pytest.mark.slow), "autoregressive"])
@pytest.mark.parametrize(
    "own", [{"temperature": 0.0, "repetition_penalty": 0.5}, {"temperature": 1.3, "top_k": 4, "top_p": 0.6}]
)
def test_each_sequence_has_its_own_choice_of_tokens(name, own):
    lane = lane_of(name)
    other = Reader(job(name, [1, 2], temperature=2.0, repetition_penalty=3.0))
    reader = Reader(job(name, [1, 2], **own))
    lane.admit([other.ticket, reader.ticket])
    finish(lane)
    assert reader.tokens == alone(name, (1, 2), 5, 0, 12, **own) != other.tokens


def test_a_gap_is_filled_beside_continuations_and_does_not_end_early():
    lane, run = lane_of("cola"), served.run("cola")
    gap = ([1, 2, 3], 7, [4, 5])
    asked = job("cola", gap[0], budget=7)._replace(suffix=gap[2])
    filled, other = (Reader(each) for each in (asked._replace(choice=asked.choice._replace(eos_id=None)), asked))
    more = Reader(job("cola", [1, 2, 3]))
    lane.admit([filled.ticket, more.ticket])
    finish(lane)
    out = sampling.infill(
        run.model, run.params, [gap], settings_of("cola"), rng.key(5, "sample"), sample_ids=[0]
    )  # fmt: skip
    assert filled.tokens == out.tokens[0].tolist() and len(filled.tokens) == 7
    assert more.tokens == alone("cola", (1, 2, 3), 5, 0, 12) and other.ticket.job.suffix


@pytest.mark.slow
def test_repainting_joins_in_the_middle_too():
    lane, changes = lane_of("cola", conditioning="repaint"), {"conditioning": "repaint"}
    first, second = (Reader(job("cola", prompt)) for prompt in ([1, 2, 3], [4, 5, 6, 7, 8]))
    lane.admit([first.ticket])
    step(lane)
    lane.admit([second.ticket])
    finish(lane)
    for reader in (first, second):
        assert reader.tokens == alone("cola", tuple(reader.ticket.job.prompt), 5, 0, 12, **changes)


def test_who_is_cancelled_leaves_at_the_next_boundary_and_the_others_do_not_notice():
    lane = lane_of("cola")
    readers = [Reader(job("cola", [1, 2, 3], sample=index)) for index in range(4)]
    lane.admit([reader.ticket for reader in readers])
    step(lane)
    assert lane.free == 0
    readers[0].ticket.cancelled = readers[2].ticket.cancelled = True
    lane.release()
    assert lane.free == 2
    last = Reader(job("cola", [7], sample=9))
    lane.admit([last.ticket])
    finish(lane)
    for reader in (readers[1], readers[3], last):
        asked = reader.ticket.job
        assert reader.tokens == alone("cola", tuple(asked.prompt), 5, asked.sample, 12)
    assert len(readers[0].updates) == 1


@pytest.mark.parametrize("name", ["cola", "autoregressive"])
def test_the_beginning_of_a_prompt_is_computed_once(name, monkeypatch):
    lane = lane_of(name)
    started = []
    start = lane._engine.start
    counting = lane._engine._replace(start=lambda p, j, *more: started.append(len(j)) or start(p, j, *more))
    monkeypatch.setattr(lane, "_engine", counting)
    prompt = [8, 8, 3]
    together = [Reader(job(name, prompt, sample=index)) for index in range(3)]
    lane.admit([reader.ticket for reader in together])
    assert started == [1]
    finish(lane)
    later = Reader(job(name, prompt, 11, 4, 9))
    lane.admit([later.ticket])
    finish(lane)
    assert started == [1]
    for reader in together:
        assert reader.tokens == alone(name, tuple(prompt), 5, reader.ticket.job.sample, 12)
    assert later.tokens == alone(name, tuple(prompt), 11, 4, 9)


def test_a_prompt_is_read_from_the_first_chunk_on_that_no_earlier_one_had(monkeypatch):
    lane, fresh = (lane_of("autoregressive", count, context=64) for count in (8, 0))
    read = []
    chunks = token_engine._read
    monkeypatch.setattr(token_engine, "_read", lambda *arguments: read.append(arguments[4]) or chunks(*arguments))
    head = [6, 7] * 8  # one chunk
    prompts = [head + [1, 2, 3], head + [4, 5], head, head[:-1] + [9, 1, 2], head + [1, 2, 3, 4]]
    prompts += [[1] * 16 + head + [5], [1] * 16 + head + [7]]  # the same chunk elsewhere is another
    expected = [[0, 16], [16], [], [0, 16], [16], [0, 16, 32], [32]]
    for prompt, begins in zip(prompts, expected, strict=True):
        found = {}
        for name, each in (("shared", lane), ("fresh", fresh)):
            read.clear()
            reader = Reader(job("autoregressive", prompt, budget=6), more=True)
            each.admit([reader.ticket])
            begun = list(read)
            finish(each)
            found[name] = (begun, reader.tokens, [update.log_probs.chosen.tolist() for update in reader.updates])
        assert found["shared"][0] == begins and len(found["fresh"][0]) == -(-len(prompt) // 16)
        assert found["shared"][1:] == found["fresh"][1:]  # to the last bit
    heads = ([3] * 16, [4] * 16)  # of one batch: the second of them is in its second row
    lane.admit([Reader(job("autoregressive", [*begin, 1], budget=6)).ticket for begin in heads])
    finish(lane)
    together = [Reader(job("autoregressive", heads[1] + [n], sample=n, budget=6)) for n in (2, 2, 8)]
    read.clear()
    lane.admit([reader.ticket for reader in together])
    assert read == [16]
    finish(lane)
    for reader in together:
        other = Reader(reader.ticket.job)
        fresh.admit([other.ticket])
        finish(fresh)
        assert reader.tokens == other.tokens


def test_estimates_settle_on_the_block():
    lane = lane_of("cola")
    reader = Reader(job("cola", [1, 2, 3], temperature=0.0), more=True)
    other = Reader(job("cola", [1, 2, 3], temperature=0.0))
    lane.admit([reader.ticket, other.ticket])
    finish(lane)
    assert reader.tokens == other.tokens and all(update.estimates is None for update in other.updates)
    for update in reader.updates:
        if update.tokens:
            assert update.estimates.shape == (2, len(update.tokens))
            assert update.estimates[-1].tolist() == update.tokens  # the last step goes where the velocity points
    assert any(update.estimates[0].tolist() != update.tokens for update in reader.updates if update.tokens)


def test_log_probabilities_are_those_of_the_model():
    lane, prompt = lane_of("autoregressive"), [1, 2, 3]
    reader = Reader(job("autoregressive", prompt, temperature=1.5, repetition_penalty=2.0), more=True)
    lane.admit([reader.ticket])
    finish(lane)
    run = served.run("autoregressive")
    expected = tiny_autoregressive.log_probs(run.model.config, run.params, prompt + reader.tokens)[len(prompt) :]
    chosen = np.concatenate([update.log_probs.chosen for update in reader.updates])
    np.testing.assert_allclose(chosen, expected, rtol=1e-4)
    for update in reader.updates:
        assert np.all(np.diff(update.log_probs.values, axis=1) <= 0) and update.log_probs.ids.shape[1] == 5


def test_choices_of_many_kinds_are_drawn_in_one_batch_as_alone():
    choice = Choice(0.0, 0, 1.0, 1.0, None)
    jobs = [Job([], 4, choice), Job([], 4, choice._replace(temperature=0.5, top_k=3, eos_id=2))]
    found = batches.choices(jobs)
    assert found.eos_id.tolist() == [-1, 2] and found.temperature.dtype == np.float32
    keys = batches.keys([jobs[0]._replace(seed=2**40 + 3, sample=6)])
    assert (jax.random.key_data(keys)[0] == jax.random.key_data(rng.key(3, "sample", 0, 6))).all()
