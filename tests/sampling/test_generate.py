"""Generation with caches against a loop without any, and what a sample may depend on."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import BLOCK, CHANNELS, VOCAB, apply, assert_close, create, normal, quickly, tokens

from cola_jax import sampling
from cola_jax.models import cola
from cola_jax.sampling import Settings
from cola_jax.types import UserError

MODULE = importlib.import_module("cola_jax.sampling.generate")
STEPS, LATENTS = 3, 24
MODELS = {
    "patch1": ({}, {}),
    "patch2": (
        {"patch_size": 2, "attention": "block_causal", "shift": 0.3, "scale": 0.8},
        {"no_history_vector": True, "block_position": True},
    ),
}
# Nothing, less than a block, a block, one position more, more than two blocks.
LENGTHS = {"patch1": (0, 3, 4, 5, 9), "patch2": (0, 6, 8, 10, 18)}
SETTINGS = {
    # A penalty below 1 favours what was generated: then which tokens count as such decides what comes next.
    "patch1": Settings(steps=STEPS, guidance_scale=3.0, max_new_tokens=7, repetition_penalty=0.2),
    "patch2": Settings(steps=STEPS, guidance_scale=3.0, max_new_tokens=16),
}
NOISE = normal(5, 4, BLOCK, CHANNELS, seed=3)


def prompts_of(name):
    return [[int(token) for token in tokens(length, seed=length)] for length in LENGTHS[name]]


def settings_of(name, **changes):
    return Settings(**(vars(SETTINGS[name]) | changes))


@functools.cache
def generated(name, settings):
    model, params = create(*MODELS[name])
    return quickly(sampling.generate, model, params, prompts_of(name), settings, noise=NOISE)


def reference(name, prompt, noise, settings):
    """(new tokens, latents) of one prompt: whole sequences, no cache, NumPy where it can be."""
    model, params = create(*MODELS[name])
    patch = model.vae_config.patch_size
    padded = jnp.zeros((1, LATENTS * patch), jnp.int32).at[0, : len(prompt)].set(jnp.array(prompt, jnp.int32))
    known = jnp.arange(LATENTS) < len(prompt) // patch
    mean = apply(model, params, padded, known[None].astype(jnp.int32), method="encode").mean
    sequence = np.where(known[:, None], model.normalize(mean)[0], 0.0)
    penalty = settings.repetition_penalty
    known, start, new, latents = np.asarray(known), len(prompt) // patch // BLOCK * BLOCK, [], []

    def velocity(here, time):
        times = np.where(here & ~known, time, 0.0).astype(np.float32)[None]
        v = apply(model, params, sequence[None], times, method="velocity")
        if settings.guidance_scale == 1.0 or start == 0:
            return np.asarray(v[0, here])
        if model.dit_config.no_history_vector:
            dropped = jnp.ones((1, LATENTS // BLOCK), bool)
            free = apply(
                model, params, sequence[None], times, history=sequence[None], drop_history=dropped, method="velocity"
            )[0, here]
        else:  # the block alone, as the first of a sequence
            alone, times_alone = np.roll(sequence, -start, axis=0), np.roll(times, -start, axis=1)
            free = apply(model, params, alone[None], times_alone, method="velocity")[0, :BLOCK]
        return np.asarray(free + settings.guidance_scale * (v[0, here] - free))

    while len(new) < settings.max_new_tokens:
        here = (np.arange(LATENTS) >= start) & (np.arange(LATENTS) < start + BLOCK)
        sequence[here & ~known] = np.asarray(noise[len(latents)])[~known[here]]
        for step in range(settings.steps):
            change = velocity(here, 1 - step / settings.steps) / settings.steps
            sequence[here] -= np.where(known[here][:, None], 0.0, change)
        logits = apply(model, params, sequence[None], method="decode")
        logits = np.array(logits[0, start * patch : (start + BLOCK) * patch])
        for token in set(new):
            column = logits[:, token]
            logits[:, token] = np.where(column > 0, column / penalty, column * penalty)
        latents.append(sequence[here].copy())
        new += [int(token) for token in logits.argmax(-1)][max(0, len(prompt) - start * patch) :]
        start += BLOCK
    return new[: settings.max_new_tokens], np.stack(latents)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("name", MODELS)
def test_generation_equals_a_loop_without_caches(name, guidance_scale):
    settings = settings_of(name, guidance_scale=guidance_scale)
    out = generated(name, settings)
    assert out.tokens.shape == (5, settings.max_new_tokens)
    np.testing.assert_array_equal(out.lengths, settings.max_new_tokens)
    for row, prompt in enumerate(prompts_of(name)):
        expected, latents = reference(name, prompt, NOISE[row], settings)
        assert_close(out.latents[row, : len(latents)], latents, 1e-5)
        np.testing.assert_array_equal(out.tokens[row], expected)


def test_guidance_changes_blocks_with_a_history_only():
    guided, free = (generated("patch1", settings_of("patch1", guidance_scale=s)).latents for s in (3.0, 1.0))
    no_history = np.array(LENGTHS["patch1"]) < BLOCK
    np.testing.assert_allclose(guided[no_history, 0], free[no_history, 0], atol=1e-5)
    assert np.all(np.max(np.abs(guided[:, 1] - free[:, 1]), axis=(1, 2)) > 0.01)
    assert np.all(np.max(np.abs(guided[~no_history, 0] - free[~no_history, 0]), axis=(1, 2)) > 0.01)


def test_what_the_prompt_fills_stays_in_the_first_block():
    model, params = create(*MODELS["patch1"])
    latents = generated("patch1", SETTINGS["patch1"]).latents
    for row, prompt in ((1, 3), (3, 1), (4, 1)):
        length = LENGTHS["patch1"][row]
        ids = jnp.zeros((1, LATENTS), jnp.int32).at[0, :length].set(jnp.array(prompts_of("patch1")[row]))
        mean = apply(model, params, ids, jnp.ones((1, LATENTS), jnp.int32), method="encode").mean[0]
        first = length // BLOCK * BLOCK
        assert_close(latents[row, 0, :prompt], mean[first : first + prompt], 1e-5)


def test_a_second_batch_of_the_same_size_compiles_nothing():
    model, params = create(*MODELS["patch1"])
    generated("patch1", SETTINGS["patch1"])
    before = MODULE._generate._cache_size()
    others = [[1, 2], [], [3] * 16, [4], [5] * 7]  # up to 4 blocks, as before up to 3
    out = quickly(sampling.generate, model, params, others, SETTINGS["patch1"], noise=NOISE)
    assert MODULE._generate._cache_size() == before
    assert np.any(out.tokens != generated("patch1", SETTINGS["patch1"]).tokens)


def keyed(prompts, seed=0, sample_ids=None, **changes):
    model, params = create(*MODELS["patch1"])
    settings = settings_of("patch1", **{"temperature": 0.8, **changes})
    return quickly(sampling.generate, model, params, prompts, settings, key=jax.random.key(seed), sample_ids=sample_ids)


def test_a_sample_depends_on_its_key_and_id_alone():
    """Not on its batch, its place in it, or the length of the longest prompt there."""
    prompts = prompts_of("patch1")
    together = keyed(prompts)
    order = [3, 0, 4, 2, 1]
    moved = keyed([prompts[i] for i in order], sample_ids=order)
    np.testing.assert_array_equal(moved.tokens, together.tokens[np.array(order)])
    assert_close(moved.latents, together.latents[np.array(order)], 1e-5)
    alone = keyed([prompts[1]], sample_ids=[1])  # padded to 1 block, not to 4
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[1])
    assert_close(alone.latents[0], together.latents[1], 1e-5)


def test_the_seed_decides():
    prompts = [[1, 2, 3]] * 4 + [[1] * 9]
    first, again, other = keyed(prompts), keyed(prompts), keyed(prompts, seed=1)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert np.any(first.tokens != other.tokens)
    assert len(np.unique(first.latents[:4, 0, 3, 0])) == 4  # samples of one prompt differ


def test_the_noise_of_a_key_given_as_noise_is_the_same():
    """With prior "normal" the latents are the noise; the flow carries that noise to what it makes of the key."""
    model, params = create(*MODELS["patch1"])
    prompts = prompts_of("patch1")
    noise = keyed(prompts, prior="normal").latents[:, :3]
    assert 0.7 < np.std(noise[0]) < 1.3
    noise = jnp.concatenate([noise, NOISE[:, :1]], axis=1)
    from_noise = quickly(sampling.generate, model, params, prompts, SETTINGS["patch1"], noise=noise)
    from_key = keyed(prompts)
    for row, length in enumerate(LENGTHS["patch1"]):
        blocks = -(-(length % BLOCK + 7) // BLOCK)
        assert_close(from_noise.latents[row, :blocks], from_key.latents[row, :blocks], 1e-5)


def test_a_sequence_ends_before_its_first_end_of_text():
    whole = np.asarray(generated("patch1", SETTINGS["patch1"]).tokens)
    eos = int(whole[0, 4])
    out = generated("patch1", settings_of("patch1", eos_id=eos))
    lengths = [row.index(eos) if eos in row else len(row) for row in whole.tolist()]
    assert 0 < lengths[0] <= 4
    np.testing.assert_array_equal(out.lengths, lengths)
    for tokens_out, expected, length in zip(out.tokens, whole, lengths, strict=True):
        np.testing.assert_array_equal(tokens_out[:length], expected[:length])
        np.testing.assert_array_equal(tokens_out[length:], 0)


def test_bfloat16_models_generate():
    """Caches and state keep one type through the loop; nothing is computed."""
    model, params = create(*MODELS["patch2"])
    half = cola.create(model.vae_config, model.dit_config, "bfloat16")
    settings = settings_of("patch2", temperature=0.5)
    out = jax.eval_shape(
        lambda params, key: sampling.generate(half, params, [[1, 2]], settings, key=key), params, jax.random.key(0)
    )
    assert out.tokens.shape == (1, 16) and out.latents.dtype == jnp.float32


def test_output_ends_with_the_noise():
    model, params = create(*MODELS["patch1"])
    out = jax.eval_shape(
        lambda params, noise: sampling.generate(model, params, [[], [1]], SETTINGS["patch1"], noise=noise),
        params,
        NOISE[:2, :1],
    )
    assert out.tokens.shape == (2, BLOCK) and out.latents.shape == (2, 1, BLOCK, CHANNELS)


class TestBatches:
    def fake(self, monkeypatch):
        """`generate` that answers with each prompt's first token, as often as the token says."""
        calls = []

        def generate(model, params, prompts, settings, key, sample_ids):
            calls.append((prompts, list(sample_ids)))
            lengths = np.array([prompt[0] for prompt in prompts])
            rows = np.where(np.arange(9)[None] < lengths[:, None], lengths[:, None], 0)
            return sampling.Generation(rows, lengths, None)

        monkeypatch.setattr(MODULE, "generate", generate)
        return calls

    @pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
    def test_every_prompt_is_answered_once_in_order(self, monkeypatch, batch_size):
        calls = self.fake(monkeypatch)
        model, params = create(*MODELS["patch1"])
        prompts = [[3], [1], [0], [4], [2]]
        out = list(sampling.generate_batches(model, params, prompts, Settings(), jax.random.key(0), batch_size))
        assert out == [(i, prompt * prompt[0]) for i, prompt in enumerate(prompts)]
        assert {len(filled) for filled, _ in calls} == {min(batch_size, 5)}  # one program
        for filled, ids in calls:
            assert filled == [prompts[min(i, 4)] for i in ids]

    def test_all_prompts_are_checked_before_the_first_is_generated(self, monkeypatch):
        calls = self.fake(monkeypatch)
        model, params = create(*MODELS["patch1"])
        with pytest.raises(UserError, match="prompt 3 has a token outside"):
            list(sampling.generate_batches(model, params, [[1], [1], [1], [99]], Settings(), jax.random.key(0), 2))
        assert not calls


BAD_SETTINGS = [
    ({"steps": 0}, "sampling steps = 0: allowed is at least 1"),
    ({"guidance_scale": -1.0}, "sampling guidance_scale = -1.0: allowed is at least 0"),
    ({"max_new_tokens": 0}, "sampling max_new_tokens = 0: allowed is at least 1"),
    ({"temperature": -0.5}, "sampling temperature = -0.5: allowed is at least 0"),
    ({"repetition_penalty": 0.0}, "sampling repetition_penalty = 0.0: allowed is a positive number"),
    ({"prior": "ar"}, "sampling prior = 'ar': allowed is 'flow' or 'normal'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SETTINGS, ids=lambda x: str(x)[:20])
def test_a_bad_setting_is_told(changes, message):
    model, params = create(*MODELS["patch1"])
    with pytest.raises(UserError) as error:
        sampling.generate(model, params, [[1]], Settings(**changes), key=jax.random.key(0))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "prompts", "changes", "message"),
    [
        ("patch1", [], {}, "prompts: none given; at least one is needed"),
        ("patch2", [[1, 2], [1]], {}, "prompt 1 has 1 tokens: allowed is a multiple of the patch size 2"),
        ("patch1", [[1], [VOCAB]], {}, f"prompt 1 has a token outside the vocabulary of {VOCAB}"),
        ("patch1", [[-1]], {}, f"prompt 0 has a token outside the vocabulary of {VOCAB}"),
        (
            "patch1",
            [[1] * 10],
            {"context": 16, "max_new_tokens": 7},
            "prompt 0 has 10 tokens: allowed are at most 16 (context) minus 7 (max_new_tokens)",
        ),
    ],
)
def test_a_bad_prompt_is_told(name, prompts, changes, message):
    model, params = create(*MODELS[name])
    with pytest.raises(UserError) as error:
        sampling.generate(model, params, prompts, Settings(**changes), key=jax.random.key(0))
    assert str(error.value) == message


@pytest.mark.parametrize(("temperature", "noise"), [(0.0, None), (0.7, NOISE[:1])])
def test_randomness_needs_a_key(temperature, noise):
    model, params = create(*MODELS["patch1"])
    with pytest.raises(UserError, match="sampling key = None"):
        sampling.generate(model, params, [[1]], Settings(temperature=temperature), noise=noise)


def test_noise_and_ids_must_fit_the_prompts():
    model, params = create()
    with pytest.raises(UserError, match=r"noise has shape \(1, 2, 3, 4\): allowed is \(1, blocks,"):
        sampling.generate(model, params, [[1]], Settings(), noise=jnp.zeros((1, 2, 3, 4)))
    with pytest.raises(UserError, match="sample_ids: 2 given"):
        sampling.generate(model, params, [[1]], Settings(), key=jax.random.key(0), sample_ids=[1, 2])
