"""Generation by LLaDA: what it draws from, against the plain loop, and what must not change it."""

import jax
import numpy as np
import pytest
from models import tiny_llada as tiny
from models.tiny_models import VOCAB

from cola_jax import sharding
from cola_jax.config import TrainConfig
from cola_jax.sampling import llada
from cola_jax.sampling.llada import Settings
from cola_jax.types import UserError

KEY = jax.random.key(7)
PROMPTS = [[1, 2, 3], [], [4] * 9, [5, 6]]
DRAWN = Settings(max_new_tokens=6, temperature=1.0, remasking="random", context=16)
GREEDY = Settings(max_new_tokens=6, context=16)


def generate(prompts, settings, key=KEY, **options):
    return llada.generate(*tiny.create(), prompts, settings, key, **options)


def lists(out):
    return [row[:length].tolist() for row, length in zip(np.asarray(out.tokens), out.lengths, strict=True)]


def plain(before, settings, after=()) -> list[int]:
    """The most likely tokens, those of which the NumPy network is surest first."""
    model, params = tiny.create()
    new: list = [None] * settings.max_new_tokens
    for block in range(0, len(new), settings.block):
        for count in settings.kept:
            text = [*before, *(token or 0 for token in new), *after]
            masked = [False] * len(before) + [token is None for token in new] + [False] * len(after)
            logits = tiny.logits(model.config, params, text, masked)
            if settings.guidance_scale != 1:
                alone = tiny.logits(model.config, params, text, [True] * len(before) + masked[len(before) :])
                logits = alone + settings.guidance_scale * (logits - alone)
            logits = logits[len(before) : len(before) + len(new)]
            for token in {token for token in new if token is not None}:
                penalty, column = settings.repetition_penalty, logits[:, token]
                logits[:, token] = np.where(column > 0, column / penalty, column * penalty)
            sure = (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))).max(axis=-1)
            open_ = [i for i in range(block, min(block + settings.block, len(new))) if new[i] is None]
            for i in sorted(open_, key=lambda i: -sure[i])[:count]:
                new[i] = int(logits[i].argmax())
    return new


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"steps": 4, "block_length": 3},
        {"steps": 2, "block_length": 4},
        {"guidance_scale": 2.5, "steps": 3},
        {"repetition_penalty": 3.0},
    ],
    ids=str,
)
def test_the_most_likely_tokens_are_those_of_the_plain_loop(changes):
    settings, prompts = Settings(max_new_tokens=6, context=16, **changes), PROMPTS[::2] + PROMPTS[3:]
    # Not of the empty prompt: masks alone look alike at all positions.
    found = lists(generate(prompts, settings, key=None))
    assert found == [plain(prompt, settings) for prompt in prompts]
    assert not changes or found != lists(generate(prompts, GREEDY, key=None))


def test_predictions_of_a_pass_are_shared_out_as_by_the_release():
    assert Settings(max_new_tokens=32, steps=32).kept == (1,) * 32
    assert Settings(max_new_tokens=32).kept == (1,) * 32
    assert Settings(max_new_tokens=10, steps=4).kept == (3, 3, 2, 2)
    settings = Settings(max_new_tokens=10, steps=7, block_length=4)
    assert (settings.block, settings.blocks, settings.kept) == (4, 3, (2, 2))
    assert Settings(max_new_tokens=4, steps=99).kept == (1,) * 4


def test_one_token_a_pass_draws_from_the_enumerated_distribution():
    """All texts of three tokens: a chi-squared test."""
    model, params = tiny.create(vocab_size=3)
    known, count = tiny.Enumerated(model.config, params, 3), 20_000
    settings = Settings(max_new_tokens=3, temperature=1.0, remasking="random", context=4)
    out = llada.generate(model, params, [[]] * count, settings, KEY)
    number = np.asarray(out.tokens) @ [9, 3, 1]
    expected = count * np.exp([known.log_prob(text) for text in known.texts])
    often = expected > 5
    observed = np.bincount(number, minlength=27)
    squares = np.sum((observed[often] - expected[often]) ** 2 / expected[often])
    freedom = often.sum() - 1
    assert freedom > 10 and squares < freedom + 4 * np.sqrt(2 * freedom)
    # Not what tokens drawn all at once would be.
    alone = np.exp(tiny.Enumerated(model.config, params, 3)._log_probs((-1,) * 3))
    together = count * np.array([np.prod([alone[i, token] for i, token in enumerate(text)]) for text in known.texts])
    assert np.sum((observed - together) ** 2 / together) > 20 * freedom


def test_a_sample_depends_on_its_key_and_its_id_alone():
    together, order = lists(generate(PROMPTS, DRAWN)), [2, 0, 3]
    others = generate([PROMPTS[i] for i in order], DRAWN, sample_ids=order)
    assert lists(others) == [together[i] for i in order]
    assert lists(generate(PROMPTS, DRAWN, key=jax.random.key(8))) != together
    assert len({tuple(row) for row in lists(generate([[1]] * 4, DRAWN))}) == 4
    prompts = [*PROMPTS, [7], [8, 9, 10]]
    batches = llada.generate_batches(*tiny.create(), prompts, DRAWN, KEY, batch_size=4)
    assert list(batches) == list(enumerate(lists(generate(prompts, DRAWN))))


def test_an_end_of_text_ends_a_text_and_a_stream_is_the_generation_block_by_block():
    settings = Settings(max_new_tokens=6, temperature=1.0, block_length=2, context=16)
    whole = lists(generate(PROMPTS, settings))
    eos = whole[0][3]
    ended = Settings(max_new_tokens=6, temperature=1.0, block_length=2, context=16, eos_id=eos, pad_id=30)
    out = generate(PROMPTS, ended)
    expected = [row[: row.index(eos)] if eos in row else row for row in whole]
    assert lists(out) == expected and len(expected[0]) <= 3
    for row, length in zip(np.asarray(out.tokens), out.lengths, strict=True):
        assert np.all(row[length:] == 30)
    pieces = list(llada.stream(*tiny.create(), PROMPTS, ended, KEY))
    assert [sum((piece.tokens[row] for piece in pieces), []) for row in range(4)] == expected
    assert all(len(row) <= 2 for piece in pieces for row in piece.tokens)
    alone = list(llada.stream(*tiny.create(), PROMPTS[:1], ended, KEY))
    assert len(alone) == 2  # nothing is computed behind the block with the end of text


def test_gaps_are_filled_given_both_sides():
    texts = [([1, 2], 3, [5, 6, 7]), ([], 2, [8]), ([9], 1, [])]
    found = lists(llada.infill(*tiny.create(), texts, GREEDY))
    assert [len(row) for row in found] == [3, 2, 1]
    for (before, length, after), row in zip(texts, found, strict=True):
        assert row == plain(before, Settings(max_new_tokens=length), after)
    other = lists(llada.infill(*tiny.create(), [([1, 2], 3, [20, 21, 22]), *texts[1:]], GREEDY))
    assert other[0] != found[0] and other[1:] == found[1:]


@pytest.mark.slow
def test_eight_devices_give_what_one_gives():
    model, params = tiny.create(num_heads=2, vocab_size=32)
    alone = llada.generate(model, params, PROMPTS, DRAWN, KEY)
    mesh = sharding.make_mesh(TrainConfig(mesh_data=2, mesh_fsdp=2, mesh_tensor=2))
    boxed = jax.eval_shape(model.init, KEY, np.zeros((1, 4), np.int32))
    placed = jax.device_put(params, sharding.shardings(boxed, mesh))
    together = llada.generate(model, placed, PROMPTS, DRAWN, KEY, mesh=mesh)
    assert len(together.tokens.sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, together, alone)


@pytest.mark.parametrize(
    ("changes", "prompts", "words"),
    [
        ({"remasking": "none"}, [[1]], "sampling remasking = 'none': must be one of 'low_confidence', 'random'"),
        ({"steps": -1}, [[1]], "sampling steps = -1: must be at least 0"),
        ({"block_length": -1}, [[1]], "sampling block_length = -1: must be at least 0"),
        ({"guidance_scale": -1.0}, [[1]], "sampling guidance_scale = -1.0: must be at least 0"),
        ({"context": 40}, [[], [1] * 9], "prompt 1 has 9 tokens: must be at most 40 .context. minus 32"),
        ({}, [], "prompts: none given"),
        ({}, [[1, VOCAB]], "prompt 0 has a token outside the vocabulary, must be 0 to 30"),
        ({"temperature": 1.0}, [[1]], "sampling key = None: must be a key where temperature = 1.0"),
        ({"remasking": "random"}, [[1]], "sampling key = None: must be a key where remasking = 'random'"),
    ],
)
def test_what_cannot_be_generated_is_named(changes, prompts, words):
    for function in (llada.generate, llada.stream):
        with pytest.raises(UserError, match=words):
            function(*tiny.create(), prompts, Settings(**changes))


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], "texts: none given"),
        ([([1], 0, [])], "text 0 has a gap of length 0: must be at least 1"),
        ([([1] * 9, 4, [1] * 9)], "text 0 has 22 tokens: must be at most 16 .context"),
        ([([1], 2, [99])], "text 0 has a token outside the vocabulary"),
    ],
)
def test_what_cannot_be_filled_is_named(texts, words):
    with pytest.raises(UserError, match=words):
        llada.infill(*tiny.create(), texts, GREEDY)
