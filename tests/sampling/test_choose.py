import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_models import normal

from cola_jax import rng
from cola_jax.sampling import choose

KEYS = rng.key(0, "sample", 0, jnp.arange(2))


def test_repetition_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    logits = normal(2, 3, 5)
    seen = jnp.array([[True, False, True, False, False], [False] * 5])
    expected = np.array(logits)
    for token in (0, 2):
        column = expected[0, :, token]
        expected[0, :, token] = np.where(column > 0, column / 1.7, column * 1.7)
    np.testing.assert_allclose(choose.penalize_repetition(logits, seen, 1.7), expected, rtol=1e-6)
    assert np.any(expected != logits)


def test_no_penalty_changes_nothing():
    logits = normal(2, 3, 5)
    np.testing.assert_array_equal(choose.penalize_repetition(logits, jnp.ones((2, 5), bool), 1.0), logits)


def test_temperature_zero_takes_the_most_likely_token():
    logits = normal(2, 3, 5)
    np.testing.assert_array_equal(choose.choose(logits, KEYS, 0.0), np.argmax(logits, axis=-1))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_draws_follow_the_softmax_of_scaled_logits(temperature):
    logits = np.array([[1.0, 0.0, -1.0, 0.5], [0.0, 2.0, 0.0, -2.0]])
    count = 20_000
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[:, None], (2, count, 4))
    drawn = np.asarray(choose.choose(rows, KEYS, temperature))
    assert drawn.dtype == np.int32
    shares = np.exp(logits / temperature)
    shares /= shares.sum(-1, keepdims=True)
    for row in range(2):
        counts = np.bincount(drawn[row], minlength=4)
        assert np.all(np.abs(counts - count * shares[row]) < 4.5 * np.sqrt(count * shares[row] * (1 - shares[row])))


def test_a_draw_depends_on_its_own_key_alone():
    logits = normal(2, 50, 5)
    together = choose.choose(logits, KEYS, 1.0)
    np.testing.assert_array_equal(choose.choose(logits[1:], KEYS[1:], 1.0)[0], together[1])
    same_logits = choose.choose(jnp.tile(logits[:1], (2, 1, 1)), KEYS, 1.0)
    assert np.any(same_logits[0] != same_logits[1])
    assert not np.array_equal(jax.random.key_data(KEYS[0]), jax.random.key_data(KEYS[1]))


LOGITS = jnp.log(jnp.array([[[0.4, 0.05, 0.3, 0.25]]]))


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, [0, 1, 2, 3]),
        (1, 1.0, [0]),
        (3, 1.0, [0, 2, 3]),
        (9, 1.0, [0, 1, 2, 3]),
        (0, 0.3, [0]),
        (0, 0.41, [0, 2]),
        (0, 0.94, [0, 2, 3]),
        (2, 0.6, [0, 2]),  # of the two that are left, the first has 0.57
        (2, 0.5, [0]),
    ],
)
def test_truncation_keeps_the_most_likely(top_k, top_p, kept):
    left = np.flatnonzero(np.isfinite(choose.truncate(LOGITS, top_k, top_p)[0, 0]))
    np.testing.assert_array_equal(left, kept)


def test_draws_follow_what_is_left():
    keys = jax.random.split(jax.random.key(0), 400)
    drawn = choose.choose(jnp.tile(LOGITS, (400, 1, 1)), keys, 1.0, top_k=2)
    counts = np.bincount(np.asarray(drawn)[:, 0], minlength=4)
    assert counts[1] == counts[3] == 0
    assert abs(counts[0] / 400 - 0.4 / 0.7) < 0.1


@pytest.mark.parametrize("end", [None, 3])
def test_a_choice_for_each_sequence_is_that_of_a_batch_in_which_all_have_it(end):
    """Also beside sequences that want what others do not."""
    logits, seen = normal(5, 7, 9, seed=4), normal(5, 9, seed=5) > 0
    keys = rng.key(0, "sample", 0, jnp.arange(5))
    rows = [(0.0, 0, 1.0, 1.0), (0.0, 3, 0.5, 1.7), (1.0, 0, 1.0, 1.0), (0.6, 3, 1.0, 0.4), (1.5, 0, 0.7, 1.0)]
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    kinds = (jnp.float32, jnp.int32, jnp.float32, jnp.float32)
    each = choose.Choice(*(jnp.asarray(c, k) for c, k in zip(columns, kinds, strict=True)), jnp.full(5, end or -1))
    found = choose.next_tokens(logits, seen, keys, each)
    for index, row in enumerate(rows):
        choice = choose.Choice(*row, end)
        np.testing.assert_array_equal(found[index], choose.next_tokens(logits, seen, keys, choice)[index])
        np.testing.assert_array_equal(choose.is_end(found, each)[index], choose.is_end(found, choice)[index])
    assert jnp.any(choose.is_end(found, each)) == (end is not None)
