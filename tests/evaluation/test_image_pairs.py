"""Which text is an image's own, by a joint model's likelihood in both directions."""

import json

import numpy as np
import pytest
from models import tiny_unified
from PIL import Image

from cola_jax import likelihood, rng
from cola_jax.config import DataConfig
from cola_jax.data.tokenizers import ByteTokenizer
from cola_jax.evaluation import pairs
from cola_jax.evaluation.pictures import Pairs
from cola_jax.families import unified
from cola_jax.likelihood import images
from cola_jax.likelihood.pixels import Pixels
from cola_jax.runs import Run
from cola_jax.sampling import images as sampling
from cola_jax.types import UserError

DATA = DataConfig(sequence_length=8, align=2, image_size=16, instruction_length=0, text_field="caption")
SETTINGS = likelihood.Settings(divergence="exact", solver="euler", steps=1, rows=4)
OBSERVED, QUIET = Pixels(20.0), lambda line: None


class Letters(ByteTokenizer):
    """A token a letter."""

    vocab_size, eos_id, pad_id = 20, 19, 0

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]


def run() -> Run:
    model, params = tiny_unified.make()
    return Run(unified.FAMILY, model, params, Letters(), unified.UnifiedConfig(data=DATA), 1)


def test_candidates_are_an_own_text_and_other_ones():
    texts = ["a", "b", "a", "c", "d"]
    found = pairs.candidates(texts, 3, 0)
    assert found.shape == (5, 3) and found[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert all(len({texts[i] for i in row}) == 3 for row in found)
    np.testing.assert_array_equal(found, pairs.candidates(texts, 3, 0))
    assert any((pairs.candidates(texts, 3, seed) != found).any() for seed in range(1, 5))
    for count in (1, 5):
        with pytest.raises(UserError, match=f"candidates = {count}: must be from 2 to the 4 different texts"):
            pairs.candidates(texts, count, 0)


def test_the_own_text_is_found_where_it_is_the_likeliest():
    scores = np.array([[3.0, 1, 2, 0], [1, 2, 0, 0], [1, 1, 0, 0], [0, 3, 2, 1], [np.nan, 0, 0, 0], [9, 0, np.nan, 0]])
    found = pairs.top(scores, (1, 2, 3, 4))
    assert {name: share.successes for name, share in found.items()} == {"top_1": 1, "top_2": 3, "top_3": 3}
    assert all(share.total == 4 for share in found.values())


def test_a_report_is_of_the_scores_of_each_pair():
    one, key = run(), rng.key(3, "likelihood")
    pictures = np.asarray(tiny_unified.batch()["image"])
    known = Pairs(["abc", "gfedcb", "q"], pictures)
    lines = []
    found = pairs.report(one, known, OBSERVED, SETTINGS, 3, 3, lines.append)
    chosen = pairs.candidates(known.captions, 3, 3)
    ids = {text: [*Letters().encode(text), *[19] * (2 - len(text) % 2)] for text in (*known.captions,)}
    read = lambda texts: sampling.text_before(one.model, one.params, sampling.rows(texts, 8))  # noqa: E731
    given = {}
    for j, text in enumerate([*known.captions, None]):
        before = None if text is None else read([ids[text]] * 3)
        given[j] = images.log_likelihood(one.model, one.params, pictures, OBSERVED, SETTINGS, key, before).elbo
    bits = {name: value.mean * 768 * np.log(2) for name, value in found["bits_per_dimension"].items()}
    own = np.array([given[i][i] for i in range(3)])
    other = np.array([given[chosen[i, 1]][i] for i in range(3)])
    np.testing.assert_allclose(-bits["own_text"], own.mean(), rtol=1e-5)
    np.testing.assert_allclose(-bits["no_text"], given[3].mean(), rtol=1e-5)
    np.testing.assert_allclose(-bits["other_text"], other.mean(), rtol=1e-5)
    nats = {name: value.mean for name, value in found["nats_per_image"].items()}
    np.testing.assert_allclose(nats["saved_over_no_text"], (own - given[3]).mean(), rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(nats["saved_over_other_text"], (own - other).mean(), rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(nats["rate"], bits["rate"], rtol=1e-5)
    np.testing.assert_allclose(bits["reconstruction"] + bits["rate"], bits["own_text"], rtol=1e-5)
    scores = np.array([[given[j][i] for j in chosen[i]] for i in range(3)])
    assert found["image_given_text"] == pairs.top(scores)
    told = sampling.rows([ids[text] for text in known.captions], 8)

    def score(params):
        rows = told["tokens"], SETTINGS, key, told["segment_ids"]
        return likelihood.log_likelihood(one.model, params, *rows).elbo

    by_image = [score(sampling.conditioned(one.model, one.params, pictures[[i] * 3])) for i in range(3)]
    texts = np.array([[by_image[i][j] for j in chosen[i]] for i in range(3)])
    assert found["text_given_image"] == pairs.top(texts)
    assert found["text_given_image_over_text"] == pairs.top(texts - score(one.params)[chosen])
    assert "images scored: 12 of 12" in lines and "texts scored alone: 3 of 3" in lines
    saved = json.loads(json.dumps(pairs.as_dict(found)))
    low, high = saved["bits_per_dimension"]["own_text"]["interval"]
    assert low < saved["bits_per_dimension"]["own_text"]["mean"] < high
    assert saved["image_given_text"]["top_1"]["interval"] == list(found["image_given_text"]["top_1"].interval)


def test_pairs_of_a_file(tmp_path):
    for name, level in (("one", 10), ("two", 200)):
        Image.fromarray(np.full((20, 30, 3), level, np.uint8)).save(tmp_path / f"{name}.png")
    lines = [{"image": "one.png", "caption": "dark"}, {"image": "two.png", "caption": "light"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = pairs.of_file(run(), str(tmp_path / "pairs.jsonl"))
    assert found.captions == ["dark", "light"] and found.pictures.shape == (2, 16, 16, 3)
    assert found.pictures[0, 0, 0, 0] == 10 and found.pictures[1, 0, 0, 0] == 200
    with pytest.raises(UserError, match="nothing.jsonl"):
        pairs.of_file(run(), str(tmp_path / "nothing.jsonl"))
