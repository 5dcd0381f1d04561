"""Generation with caches against a loop without any, and what a sample may depend on."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import BLOCK, CHANNELS, VOCAB, apply, assert_close, create, normal, tokens

from cola_jax import sampling
from cola_jax.models import cola
from cola_jax.sampling import Settings, blocks
from cola_jax.types import UserError
from tests.flow.gaussian import CURVES

STEPS, LATENTS = 3, 24
MODELS = {
    "patch1": ({}, {}),
    "patch2": (
        {"patch_size": 2, "attention": "block_causal", "shift": 0.3, "scale": 0.8},
        {"no_history_vector": True, "block_position": True},
    ),
    "fed back": (
        {},
        {"no_history_vector": True, "prediction": "mean", "prediction_variance": 0.1, "self_conditioning": True},
    ),
}
# Nothing, less than a block, a block, one position more, more than two blocks; with patches of two, odd ones too.
LENGTHS = {"patch1": (0, 3, 4, 5, 9), "patch2": (0, 5, 8, 9, 18), "fed back": (0, 3, 4, 5, 9)}
SETTINGS = {
    # A penalty below 1 favours what was generated: then which tokens count as such decides what comes next.
    "patch1": Settings(steps=STEPS, guidance_scale=3.0, max_new_tokens=7, repetition_penalty=0.2),
    "patch2": Settings(steps=STEPS, guidance_scale=3.0, max_new_tokens=16),
    "fed back": Settings(steps=STEPS, guidance_scale=3.0, max_new_tokens=7),
}
NOISE = normal(5, 4, BLOCK, CHANNELS, seed=3)
REPAINT = {"conditioning": "repaint", "repaint_cycles": 2, "repaint_fraction": 0.7}
WAYS = {
    "guidance 1": {"guidance_scale": 1.0},
    "guidance 3": {},
    "early guidance": {"guidance_interval": (0.5, 1.0)},
    "late guidance": {"guidance_interval": (0.0, 0.7)},
    "heun": {"solver": "heun"},
    "midpoint": {"solver": "midpoint"},
    "exponential": {"solver": "exponential"},
    "ancestral": {"solver": "exponential", "churn": 1.0},
    "churn": {"solver": "exponential", "churn": 0.5},
    "shifted": {"time_shift": 3.0},
    "left_pad": {"conditioning": "left_pad"},
    "right_pad": {"conditioning": "right_pad"},
    "repaint": REPAINT | {"guidance_interval": (0.5, 1.0)},
    "repaint, m = 1": REPAINT | {"repaint_fraction": 1.0},
    "repaint, m = 0": REPAINT | {"repaint_fraction": 0.0},
    "repaint, trigonometric": REPAINT | {"path": "trigonometric"},
    "repaint, quadratic": REPAINT | {"path": "quadratic"},
}


def prompts_of(name):
    return [[int(token) for token in tokens(length, seed=length)] for length in LENGTHS[name]]


def settings_of(name, **changes):
    return Settings(**(vars(SETTINGS[name]) | changes))


@functools.cache
def generated(name, settings, seed=None):
    model, params = create(*MODELS[name])
    key = None if seed is None else jax.random.key(seed)
    return sampling.generate(model, params, prompts_of(name), settings, key, noise=NOISE)


def reference(name, prompt, noise, settings, keys=None):
    """(new tokens, latents) of one prompt: whole sequences, no cache, one pass for each branch, NumPy where it can be.

    ``keys``: of each block, for what repainting and churn draw.
    """
    model, params = create(*MODELS[name])
    patch, per_block = model.vae_config.patch_size, model.vae_config.patch_size * BLOCK
    left = -len(prompt) % (per_block if settings.conditioning == "left_pad" else patch)
    stop = left + len(prompt)
    ids = np.full((1, LATENTS * patch), VOCAB)
    ids[0, left:stop] = prompt
    begin = -(-stop // per_block) * per_block if settings.conditioning == "right_pad" else stop
    known = (np.arange(LATENTS) >= left // patch) & (np.arange(LATENTS) < stop // patch)
    mean = apply(model, params, jnp.asarray(ids), jnp.asarray(known[None], jnp.int32), method="encode").mean
    sequence = np.where(known[:, None], model.normalize(mean)[0], 0.0)
    start = begin // per_block * BLOCK
    # What nobody sees: padding. Generated positions are seen, and what is not generated yet is later anyway.
    segments = jnp.asarray((known | (np.arange(LATENTS) >= start))[None], jnp.int32)
    first, penalty, new, latents = start, settings.repetition_penalty, [], []
    times = np.linspace(1.0, 0.0, settings.steps + 1)
    times = settings.time_shift * times / (1 + (settings.time_shift - 1) * times)
    scale, (low, high) = settings.guidance_scale, settings.guidance_interval

    feeds_back = model.dit_config.self_conditioning

    def one_pass(values, here, pinned, time, estimate):
        """The values of the block's positions at this time, those of others as they are; the same for its estimate."""
        whole = sequence.copy()
        whole[here] = values
        at = np.where(here & ~pinned, time, 0.0).astype(np.float32)[None]
        guess = {}
        if feeds_back:
            guess["estimate"] = np.zeros_like(whole)[None]
            guess["estimate"][0, here & ~pinned] = estimate[~pinned[here]]
        v = apply(model, params, whole[None], at, segment_ids=segments, **guess, method="velocity")[0, here]
        if scale != 1.0 and np.any(np.asarray(segments)[0, :start]) and low <= time <= high:
            if model.dit_config.no_history_vector:
                dropped = jnp.ones((1, LATENTS // BLOCK), bool)
                args = {"history": whole[None], "drop_history": dropped, "segment_ids": segments} | guess
                free = apply(model, params, whole[None], at, **args, method="velocity")[0, here]
            else:  # the block alone, as the first of a sequence
                alone, at_alone = np.roll(whole, -start, axis=0), np.roll(at, -start, axis=1)
                free = apply(model, params, alone[None], at_alone, method="velocity")[0, :BLOCK]
            v = free + scale * (v - free)
        return np.where(pinned[here][:, None], 0.0, v)

    def predicted_mean(v, values, time):
        """On the linear path, of the velocity ``skip z + gate mean``."""
        spread = (1 - time) ** 2 * model.dit_config.prediction_variance + time**2
        skip = (time - (1 - time) * model.dit_config.prediction_variance) / spread
        return (v - skip * values) / (-time / spread)

    def velocity(values, here, pinned, time, estimate=None):
        if feeds_back and estimate is None:
            v = one_pass(values, here, pinned, time, np.zeros_like(values))
            estimate = predicted_mean(v, values, time)
        return one_pass(values, here, pinned, time, estimate)

    def step(z, here, pinned, now, later, estimate=None, key=None):
        """(z after the step, the estimate that the next one reads)."""
        v, found = velocity(z, here, pinned, now, estimate), None
        if feeds_back and settings.solver != "midpoint":
            found = predicted_mean(v, z, now)
        if settings.solver == "midpoint":
            v = velocity(z + (later - now) / 2 * v, here, pinned, (now + later) / 2)
        if settings.solver == "heun":
            v = (v + velocity(z + (later - now) * v, here, pinned, later, found)) / 2
        if settings.solver == "exponential":
            predicts_mean = model.dit_config.prediction == "mean"
            mean, variance = (found, model.dit_config.prediction_variance) if predicts_mean else (z - now * v, 0.0)
            at, then = ((1 - t) ** 2 * variance + t**2 for t in (now, later))
            score = (z - (1 - now) * mean) / np.sqrt(at)
            if settings.churn:
                kept = (((1 - now) ** 2 / at) / ((1 - later) ** 2 / then) if then else 0.0) ** settings.churn
                fresh = np.asarray(jax.random.normal(key, z.shape))
                score = np.sqrt(kept) * score + np.sqrt(1 - kept) * fresh
            moved = (1 - later) * mean + np.sqrt(then) * score
            return np.where(pinned[here][:, None], z, moved), found
        return z + (later - now) * v, found

    def repaint(z, here, key):
        data, count = sequence[here], 0
        curves = CURVES[settings.path]
        mine, early = known[here][:, None], round(settings.repaint_fraction * settings.steps)

        def draw(turn, which):
            return np.asarray(jax.random.normal(jax.random.split(jax.random.fold_in(key, turn))[which], z.shape))

        for index in range(settings.steps):
            now, later = times[index], times[index + 1]
            cycles = settings.repaint_cycles if index < early else 1
            for cycle in range(cycles):
                if index < early:
                    signal, _, noise, _ = curves(now)
                    z = np.where(mine, signal * data + noise * draw(count, 0), z)
                z, _ = step(z, here, np.zeros(LATENTS, bool), now, later)
                if cycle < cycles - 1:
                    (signal, _, noise, _), (signal_later, _, noise_later, _) = curves(now), curves(later)
                    keep = signal / signal_later
                    z = keep * z + np.sqrt(noise**2 - (keep * noise_later) ** 2) * draw(count, 1)
                count += 1
        return np.where(mine, data, z) if early == settings.steps else z

    while begin + len(new) < begin + settings.max_new_tokens:
        here = (np.arange(LATENTS) >= start) & (np.arange(LATENTS) < start + BLOCK)
        z = noise[len(latents)]
        if settings.conditioning == "repaint" and start == first:
            z = repaint(z, here, keys[0])
        else:
            z = np.where(known[here][:, None], sequence[here], z)
            estimate = np.zeros_like(z) if feeds_back and settings.solver != "midpoint" else None
            for index, (now, later) in enumerate(itertools.pairwise(times)):
                draw = None
                if settings.churn:
                    draw = jax.random.fold_in(jax.random.fold_in(keys[len(latents)], 2), index)
                z, estimate = step(z, here, known, now, later, estimate, draw)
        sequence[here] = z
        logits = apply(model, params, sequence[None], segments, method="decode")
        logits = np.array(logits[0, start * patch : (start + BLOCK) * patch])
        for token in set(new):
            column = logits[:, token]
            logits[:, token] = np.where(column > 0, column / penalty, column * penalty)
        latents.append(sequence[here].copy())
        new += [int(token) for token in logits.argmax(-1)][max(0, begin - start * patch) :]
        start += BLOCK
    return new[: settings.max_new_tokens], np.stack(latents)


IN_SHORT = ("guidance 3", "early guidance", "left_pad", "repaint", "repaint, m = 0", "repaint, trigonometric")


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(
            name,
            way,
            marks=()
            if (name, way)
            in (
                ("patch1", "guidance 3"),
                ("fed back", "churn"),
                ("patch2", "ancestral"),
                *(("patch2", w) for w in IN_SHORT),
            )
            else pytest.mark.slow,
        )
        for name in MODELS
        for way in WAYS
    ],
)
def test_generation_equals_a_loop_without_caches(name, way):
    settings = settings_of(name, **WAYS[way])
    key = jax.random.key(0)
    out = generated(name, settings, 0) if "repaint" in way or settings.churn else generated(name, settings)
    assert out.tokens.shape == (5, settings.max_new_tokens)
    for row, prompt in enumerate(prompts_of(name)):
        keys = [jax.random.fold_in(jax.random.fold_in(key, row), block) for block in range(4)]
        tokens, latents = reference(name, prompt, NOISE[row], settings, keys)
        np.testing.assert_array_equal(out.tokens[row], tokens)
        assert int(out.lengths[row]) == settings.max_new_tokens
        # The reference divides to get its estimates back out of velocities.
        assert_close(out.latents[row, : len(latents)], latents, 1e-4 if name == "fed back" else 1e-5)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_batches_of_other_sizes_give_the_same(size):
    prompts, settings = prompts_of("patch2"), SETTINGS["patch2"]
    rows = [3, 0, 1, 2, 4, 4, 1, 3][:size]
    model, params = create(*MODELS["patch2"])
    out = sampling.generate(model, params, [prompts[i] for i in rows], settings, noise=NOISE[jnp.array(rows)])
    together = generated("patch2", settings)
    np.testing.assert_array_equal(out.tokens, together.tokens[np.array(rows)])
    assert_close(out.latents, together.latents[np.array(rows)], 1e-5)


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
    before = blocks.run._cache_size()
    others = [[1, 2], [], [3] * 16, [4], [5] * 7]  # up to 4 blocks, as before up to 3
    out = sampling.generate(model, params, others, SETTINGS["patch1"], noise=NOISE)
    assert blocks.run._cache_size() == before
    assert np.any(out.tokens != generated("patch1", SETTINGS["patch1"]).tokens)


def keyed(prompts, seed=0, sample_ids=None, **changes):
    model, params = create(*MODELS["patch1"])
    settings = settings_of("patch1", **{"temperature": 0.8, **changes})
    return sampling.generate(model, params, prompts, settings, key=jax.random.key(seed), sample_ids=sample_ids)


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
    from_noise = sampling.generate(model, params, prompts, SETTINGS["patch1"], noise=noise)
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


@pytest.mark.parametrize(
    ("batch_size", "conditioning"),
    [
        pytest.param(3, "clean", marks=pytest.mark.slow),
        pytest.param(4, "repaint", marks=pytest.mark.slow),
        pytest.param(1, "clean", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_prompts(batch_size, conditioning):
    """More prompts than places, sequences that end at different times: as all at once, in order."""
    model, params = create(*MODELS["patch1"])
    prompts = [[int(token) for token in tokens(n, seed=n)] for n in (3, 0, 9, 1, 4, 5, 2)]
    settings = settings_of("patch1", temperature=0.8, conditioning=conditioning)
    whole = np.asarray(sampling.generate(model, params, prompts, settings, jax.random.key(0)).tokens)
    settings = settings_of("patch1", temperature=0.8, conditioning=conditioning, eos_id=int(whole[2, 5]))
    together = sampling.generate(model, params, prompts, settings, jax.random.key(0))
    assert len(set(np.asarray(together.lengths).tolist())) > 1
    run = functools.partial(sampling.generate_batches, model, params, prompts, settings, jax.random.key(0))
    out = list(run(batch_size))
    expected = [row[:length].tolist() for row, length in zip(*map(np.asarray, together[:2]), strict=True)]
    assert out == list(enumerate(expected))


def test_all_prompts_are_checked_before_the_first_is_generated():
    model, params = create(*MODELS["patch1"])
    with pytest.raises(UserError, match="prompt 3 has a token outside"):
        sampling.generate_batches(model, params, [[1], [1], [1], [99]], Settings(), jax.random.key(0), 2)
    with pytest.raises(UserError, match="batch_size = 0"):
        sampling.generate_batches(model, params, [[1]], Settings(), jax.random.key(0), 0)


def test_a_stream_is_the_generation_in_pieces():
    model, params = create(*MODELS["patch1"])
    prompts, settings = prompts_of("patch1"), settings_of("patch1", temperature=0.8)
    whole = keyed(prompts)
    pieces = list(sampling.stream(model, params, prompts, settings, jax.random.key(0), estimates=True))
    assert len(pieces) > 1 and len(pieces[0].tokens[0]) == BLOCK
    together = [sum((piece.tokens[row] for piece in pieces), []) for row in range(len(prompts))]
    assert together == whole.tokens.tolist()
    assert np.shape(pieces[0].estimates) == (STEPS, 5, BLOCK)


def test_the_last_estimate_of_a_stream_is_near_the_end():
    """The last Euler step goes to where the velocity points: the estimate is the result."""
    model, params = create(*MODELS["patch1"])
    settings = settings_of("patch1", repetition_penalty=1.0, max_new_tokens=BLOCK)
    piece = next(sampling.stream(model, params, [[], []], settings, jax.random.key(0), estimates=True))
    assert piece.estimates[-1] == piece.tokens
    assert piece.estimates[0] != piece.tokens


BAD_SETTINGS = [
    ({"steps": 0}, "sampling steps = 0: must be at least 1"),
    ({"guidance_scale": -1.0}, "sampling guidance_scale = -1.0: must be at least 0"),
    ({"max_new_tokens": 0}, "sampling max_new_tokens = 0: must be at least 1"),
    ({"temperature": -0.5}, "sampling temperature = -0.5: must be from 0 to 100"),
    ({"temperature": 1e9}, "sampling temperature = 1000000000.0: must be from 0 to 100"),
    ({"temperature": float("nan")}, "sampling temperature = nan: must be a finite number"),
    ({"repetition_penalty": 0.0}, "sampling repetition_penalty = 0.0: must be above 0"),
    ({"prior": "ar"}, "sampling prior = 'ar': must be one of 'flow', 'normal'"),
    ({"top_k": -1}, "sampling top_k = -1: must be at least 0"),
    ({"top_p": 0.0}, "sampling top_p = 0.0: must be above 0 and at most 1"),
    ({"time_shift": 0.0}, "sampling time_shift = 0.0: must be above 0"),
    ({"start_time": 1.5}, "sampling start_time = 1.5: must be above 0 and at most 1"),
    (
        {"guidance_interval": (0.5, 0.2)},
        "sampling guidance_interval = (0.5, 0.2): must be two numbers from 0 to 1, the lower first",
    ),
    ({"repaint_cycles": 0}, "sampling repaint_cycles = 0: must be at least 1"),
    ({"repaint_fraction": 2.0}, "sampling repaint_fraction = 2.0: must be from 0 to 1"),
    (
        {"conditioning": "none"},
        "sampling conditioning = 'none': must be one of 'clean', 'repaint', 'left_pad', 'right_pad'",
    ),
    ({"path": "cubic"}, "sampling path = 'cubic': must be one of 'linear', 'trigonometric', 'quadratic'"),
    ({"rotary_period": 0}, "sampling rotary_period = 0: must be None or at least 1"),
    (
        {"conditioning": "repaint", "solver": "tsit5"},
        "sampling solver = 'tsit5': must be one of 'euler', 'heun' with conditioning 'repaint'",
    ),
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
        ("patch1", [[1], [VOCAB]], {}, f"prompt 1 has a token outside the vocabulary of {VOCAB}"),
        ("patch1", [[-1]], {}, f"prompt 0 has a token outside the vocabulary of {VOCAB}"),
        (
            "patch1",
            [[1] * 10],
            {"context": 16, "max_new_tokens": 7},
            "prompt 0 has 10 tokens: must be at most 16 (context) minus 7 (max_new_tokens)",
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
    with pytest.raises(UserError, match=r"noise has shape \(1, 2, 3, 4\): must be \(1, blocks,"):
        sampling.generate(model, params, [[1]], Settings(), noise=jnp.zeros((1, 2, 3, 4)))
    with pytest.raises(UserError, match="sample_ids: 2 given"):
        sampling.generate(model, params, [[1]], Settings(), key=jax.random.key(0), sample_ids=[1, 2])
