"""Generation token by token: against the plain loop, and what must not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_autoregressive as tiny
from models.tiny_models import VOCAB

from cola_jax import sharding
from cola_jax.config import TrainConfig
from cola_jax.sampling import autoregressive
from cola_jax.sampling.autoregressive import Settings
from cola_jax.types import UserError

KEY = jax.random.key(7)
PROMPTS = [[1, 2, 3], [], [4] * 9, [5, 6]]
DRAWN = Settings(max_new_tokens=8, temperature=1.0, context=20)


def generate(prompts, settings, key=KEY, seed=1, **options):
    return autoregressive.generate(*tiny.create(seed=seed), prompts, settings, key, **options)


def lists(out):
    return [row[:length].tolist() for row, length in zip(np.asarray(out.tokens), out.lengths, strict=True)]


def plain(prompt, settings, seed=1) -> list[int]:
    """The most likely continuation: the whole text through the NumPy network again for every token."""
    model, params = tiny.create(seed=seed)
    new = []
    while len(new) < settings.max_new_tokens:
        logits = tiny.reference(model.config, params, [*prompt, *new, 0])[-1]
        for token in set(new):
            penalty = settings.repetition_penalty
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        new.append(int(logits.argmax()))
        if new[-1] == settings.eos_id:
            return new[:-1]
    return new


@pytest.mark.parametrize("penalty", [1.0, 3.0])
def test_the_most_likely_tokens_are_those_of_the_plain_loop(penalty):
    settings = Settings(max_new_tokens=8, repetition_penalty=penalty, context=20)
    expected = [plain(prompt, settings) for prompt in PROMPTS]
    assert lists(generate(PROMPTS, settings, key=None)) == expected
    # A penalty is worth its name where there are repetitions without it.
    assert any(len(set(row)) < len(row) for row in expected) == (penalty == 1.0)


def test_a_text_ends_before_its_end_of_text():
    whole = lists(generate(PROMPTS, Settings(max_new_tokens=8, context=20)))
    settings = Settings(max_new_tokens=8, eos_id=whole[0][2], pad_id=30, context=20)
    out, expected = generate(PROMPTS, settings), [plain(prompt, settings) for prompt in PROMPTS]
    assert lists(out) == expected
    assert len(expected[0]) <= 2 and max(map(len, expected)) == 8
    for row, length in zip(np.asarray(out.tokens), out.lengths, strict=True):
        assert np.all(row[length:] == 30)


def test_an_end_of_text_in_a_prompt_ends_nothing():
    settings = Settings(max_new_tokens=8, eos_id=1, context=20)
    assert lists(generate(PROMPTS, settings))[0] == plain(PROMPTS[0], settings) != []


@pytest.mark.parametrize("context", [None, 64])
def test_a_sample_depends_on_its_key_and_its_id_alone(context):
    """Not on its batch, its place there, or how far rows are padded."""
    together = lists(generate(PROMPTS, DRAWN))
    order = [2, 0, 3]
    settings = Settings(max_new_tokens=8, temperature=1.0, context=context)
    others = generate([PROMPTS[i] for i in order], settings, sample_ids=order)
    assert lists(others) == [together[i] for i in order]


def test_keys_and_ids_draw_differently():
    same = [[1, 2, 3]] * 4
    first, again = lists(generate(same, DRAWN)), lists(generate(same, DRAWN))
    assert first == again and len({tuple(row) for row in first}) == 4
    assert lists(generate(same, DRAWN, key=jax.random.key(8))) != first
    assert len({tuple(row) for row in lists(generate(same, DRAWN, sample_ids=[3] * 4))}) == 1


def test_every_position_draws_anew():
    """At a temperature at which all tokens are as likely as each other."""
    settings = Settings(max_new_tokens=8, temperature=100.0, context=20)
    assert min(len(set(row)) for row in lists(generate(PROMPTS, settings))) > 4


def test_a_text_goes_on_as_if_its_beginning_had_been_the_prompt():
    whole = lists(generate(PROMPTS, DRAWN))
    later = lists(generate([prompt + new[:3] for prompt, new in zip(PROMPTS, whole, strict=True)], DRAWN))
    assert [row[:5] for row in later] == [row[3:] for row in whole]


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"temperature": 1.5, "top_k": 4, "top_p": 0.8}])
def test_draws_follow_the_probabilities_of_the_network(options):
    """The first token after a prompt, many times: each frequency within 4.5 standard errors."""
    count, settings = 4000, Settings(max_new_tokens=1, context=3, **options)
    model, params = tiny.create()
    logits = tiny.reference(model.config, params, [1, 2, 0])[-1] / settings.temperature
    kept = np.sort(logits)[::-1][: settings.top_k or VOCAB]
    share = np.exp(kept) / np.exp(kept).sum()
    kept = kept[np.cumsum(share) - share < settings.top_p]
    expected = np.where(logits >= kept[-1], np.exp(logits), 0.0)
    expected /= expected.sum()
    assert (expected > 0).sum() == (VOCAB if "top_k" not in options else len(kept)) and len(kept) > 1
    drawn = np.bincount(np.asarray(generate([[1, 2]] * count, settings).tokens)[:, 0], minlength=VOCAB) / count
    assert np.all(drawn[expected == 0] == 0)
    assert np.all(np.abs(drawn - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / count) + 1e-12)


def test_a_stream_is_the_generation_token_by_token():
    eos = lists(generate(PROMPTS, DRAWN))[0][4]
    settings = Settings(max_new_tokens=8, temperature=1.0, repetition_penalty=1.3, eos_id=eos, context=20)
    expected = lists(generate(PROMPTS, settings))
    pieces = list(autoregressive.stream(*tiny.create(), PROMPTS, settings, KEY))
    assert all(len(row) <= 1 for piece in pieces for row in piece.tokens)
    assert [sum((piece.tokens[row] for piece in pieces), []) for row in range(4)] == expected
    assert len({len(row) for row in expected}) > 1


def test_a_stream_ends_with_its_last_sequence():
    settings = Settings(max_new_tokens=8, context=20, eos_id=plain([1, 2, 3], Settings(max_new_tokens=1))[0])
    pieces = list(autoregressive.stream(*tiny.create(), [[1, 2, 3]], settings))
    assert [piece.tokens for piece in pieces] == [[[]]]


def test_batches_give_every_prompt_its_own_continuation():
    prompts = [*PROMPTS, [7], [8, 9, 10], [11]]
    expected = list(enumerate(lists(generate(prompts, DRAWN))))
    for size in (3, 100):
        batches = autoregressive.generate_batches(*tiny.create(), prompts, DRAWN, KEY, batch_size=size)
        assert list(batches) == expected


def test_fifty_prompt_lengths_need_one_program():
    settings = Settings(max_new_tokens=4, context=64)
    before = autoregressive.run._cache_size()
    for length in range(11, 61):
        out = generate([[length % VOCAB] * length], settings)
        assert out.tokens.shape == (1, 4)
    assert autoregressive.run._cache_size() == before + 1


def test_without_a_context_programs_are_as_few_as_powers_of_two():
    before = autoregressive.run._cache_size()
    for length in (0, 16, 17, 31):
        generate([[1] * length], Settings(max_new_tokens=2))
    assert autoregressive.run._cache_size() == before + 2


@pytest.mark.slow
def test_eight_devices_give_what_one_gives():
    """Sequences over data and fsdp, heads over tensor, parameters sharded as in training."""
    model, params = tiny.create(num_heads=2, vocab_size=32)
    alone = autoregressive.generate(model, params, PROMPTS, DRAWN, KEY)
    mesh = sharding.make_mesh(TrainConfig(mesh_data=2, mesh_fsdp=2, mesh_tensor=2))
    placed = jax.device_put(params, sharding.shardings(tiny.boxed(model), mesh))
    together = autoregressive.generate(model, placed, PROMPTS, DRAWN, KEY, mesh=mesh)
    assert len(together.tokens.sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, together, alone)
    with pytest.raises(UserError, match=r"prompts: 3 given, must be a multiple of 4"):
        autoregressive.generate(model, placed, PROMPTS[:3], DRAWN, KEY, mesh=mesh)


@pytest.mark.parametrize(
    ("changes", "prompts", "words"),
    [
        ({"max_new_tokens": 0}, [[1]], "sampling max_new_tokens = 0: must be at least 1"),
        ({"temperature": -1.0}, [[1]], "sampling temperature = -1.0: must be from 0 to 100"),
        ({"top_k": -1}, [[1]], "sampling top_k = -1: must be at least 0"),
        ({"top_p": 0.0}, [[1]], "sampling top_p = 0.0: must be above 0 and at most 1"),
        ({"repetition_penalty": 0.0}, [[1]], "sampling repetition_penalty = 0.0: must be above 0"),
        ({"context": 0}, [[1]], "sampling context = 0: must be None or at least 1"),
        ({"context": 40}, [[], [1] * 9], "prompt 1 has 9 tokens: must be at most 40 .context. minus 32"),
        ({}, [], "prompts: none given"),
        ({}, [[1, VOCAB]], "prompt 0 has a token outside the vocabulary, must be 0 to 30"),
        ({"temperature": 1.0}, [[1]], "sampling key = None: must be a key where temperature = 1.0"),
    ],
)
def test_what_cannot_be_generated_is_named(changes, prompts, words):
    for function in (autoregressive.generate, autoregressive.stream):
        with pytest.raises(UserError, match=words):
            function(*tiny.create(), prompts, Settings(**changes))


def test_other_errors_are_named():
    with pytest.raises(UserError, match="sampling sample_ids: 3 given, must be one for each of 1 prompts"):
        generate([[1]], DRAWN, sample_ids=[1, 2, 3])
    with pytest.raises(UserError, match="sampling batch_size = 0: must be at least 1"):
        autoregressive.generate_batches(*tiny.create(), [[1]], DRAWN, KEY, batch_size=0)


def test_padding_of_a_row_is_not_a_token():
    """The first token of an empty prompt is drawn from "begin", whatever fills the row."""
    model, params = tiny.create()
    rows = autoregressive.Prompts(jnp.full((1, 12), 9, jnp.int32), jnp.zeros(1, jnp.int32))
    plan = autoregressive.Plan(model, Settings(max_new_tokens=8, context=20))
    out = autoregressive.run(plan, params, rows, jax.random.split(KEY, 1))
    assert lists(out) == [plain([], plan.settings)]
