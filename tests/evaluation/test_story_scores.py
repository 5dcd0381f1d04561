import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from cola_jax import sampling
from cola_jax.config import DataConfig, StoriesConfig
from cola_jax.data import corpora
from cola_jax.data.stories import Stories
from cola_jax.data.tokenizers import ByteTokenizer
from cola_jax.evaluation import stories as evaluation
from cola_jax.evaluation.statistics import Proportion
from cola_jax.families.cola import FAMILY, ColaConfig
from cola_jax.models import cola
from cola_jax.models.dit_config import DiTConfig
from cola_jax.models.text_vae import VAEConfig
from cola_jax.runs import Run
from cola_jax.sampling import Settings


def test_wilson_interval():
    # Wilson's formula by hand for 8 of 10.
    low, high = Proportion(8, 10).interval
    assert low == pytest.approx(0.49016, abs=1e-4) and high == pytest.approx(0.94332, abs=1e-4)
    assert Proportion(0, 10).interval[0] == 0.0
    assert Proportion(10, 10).interval[1] == pytest.approx(1.0)
    assert math.isnan(Proportion(0, 0).mean) and Proportion(0, 0).interval == (0.0, 1.0)


def test_true_stories_score_full_marks_and_broken_ones_do_not():
    config = StoriesConfig(values=4, aligned=True)
    stories = Stories(config)
    texts = [stories.story(0, index) for index in range(40)]
    scores = evaluation.score(stories, texts)
    assert scores.valid.mean == scores.coherent.mean == 1.0 and scores.factors > 20
    # The last sentence of another story: every sentence valid, few stories coherent.
    swapped = [a.rsplit(". ", 1)[0] + ". " + b.rsplit(". ", 1)[1] for a, b in zip(texts, texts[1:], strict=False)]
    scores = evaluation.score(stories, swapped)
    assert scores.valid.mean == 1.0 and scores.coherent.mean < 0.5
    scores = evaluation.score(stories, ["no story at all", ""])
    assert scores.valid == (0, 1) and scores.coherent == (0, 2) and scores.factors == 0


WORDS = {}
DATA = DataConfig(stories=StoriesConfig(values=4, aligned=True), num_stories=1000)
STORIES = Stories(DATA.stories)


@pytest.fixture(scope="module")
def small():
    tokenizer = ByteTokenizer()
    model = cola.create(
        VAEConfig(vocab_size=tokenizer.vocab_size, dim=16, ffn_dim=16, num_heads=2, latent_dim=4),
        DiTConfig(latent_dim=4, dim=16, num_heads=2, head_dim=8, num_layers=1, time_dim=8, rope_dim=4, block_size=4),
    )
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8), np.int32))
    return Run(FAMILY, model, params, tokenizer, ColaConfig(data=DATA), 0)


def test_written_texts_begin_with_their_prompts_and_do_not_depend_on_the_batch(small):
    settings = sampling.Settings(steps=1, guidance_scale=1.0, max_new_tokens=8)
    prompts = ["Mia", "", "a longer prompt"]
    texts = evaluation.write(small, prompts, settings, seed=3, batch_size=2)
    assert texts == evaluation.write(small, prompts, settings, seed=3, batch_size=3)
    assert texts != evaluation.write(small, prompts, settings, seed=4, batch_size=3)
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))


def test_reconstruction_counts_real_tokens_only(small):
    tokens = np.arange(16, dtype=np.int32).reshape(2, 8)
    segments = np.array([[1] * 8, [1] * 4 + [0] * 4], np.int32)
    keys = jax.random.split(jax.random.key(0), 2)
    right, total = FAMILY.reconstruct(small.model, small.params, {"tokens": tokens, "segment_ids": segments}, keys)
    assert int(total) == 12 and 0 <= int(right) <= 12


class _Words:
    """A word a token."""

    def encode(self, text):
        return [WORDS.setdefault(word, len(WORDS)) for word in text.split(" ")]

    def decode(self, ids):
        names = list(WORDS)
        return " ".join(names[int(i)] for i in ids)


def run_of(model=None, params=None):
    """A run of which only some is needed."""
    return Run(FAMILY, model, params, _Words(), ColaConfig(data=DATA), 0)


def test_held_out_prompts_are_first_sentences():
    prompts = evaluation.held_out_prompts(run_of(), 0, 5)
    assert len(prompts) == 5
    for prompt in prompts:
        (sentence,) = STORIES.parse(prompt).sentences
        assert sentence.valid and sentence.type == "introduction"


def test_prompts_of_so_many_tokens():
    texts = corpora.documents(DATA, "holdout", 0)
    prompts = evaluation.held_out_prompts(run_of(), 0, 3, tokens=4)
    assert prompts == [" ".join(text.split(" ")[:4]) for text in (texts[0], texts[1], texts[2])]


def test_filled_gaps_keep_what_surrounds_them(monkeypatch):
    """With the words themselves as fills, the stories come back."""

    def infill(model, params, texts, settings, key, sample_ids):
        assert list(sample_ids) == list(range(3))
        whole = [words.encode(text) for text in originals]
        new = [ids[len(b) : len(b) + n] for ids, (b, n, _) in zip(whole, texts, strict=True)]
        assert all(ids[: len(b)] == b and ids[len(b) + n :] == a for ids, (b, n, a) in zip(whole, texts, strict=True))
        return SimpleNamespace(tokens=np.array(new))

    words = _Words()
    texts = corpora.documents(DATA, "holdout", 0)
    originals = [texts[i] for i in range(3)]
    monkeypatch.setattr(evaluation.sampling, "infill", infill)
    assert evaluation.fill_gaps(run_of(), 4, Settings(), 0, 3) == (originals, originals)
    assert evaluation.excess_log_prob(STORIES, originals, originals, paired=True) == (0.0, 0.0)


def test_excess_leaves_out_what_is_not_coherent():
    texts = [corpora.documents(DATA, "holdout", 0)[i] for i in range(4)]
    values = [STORIES.log_prob(text) for text in texts]
    mean, error = evaluation.excess_log_prob(STORIES, texts[:3], [texts[1], "No story.", texts[3]], paired=True)
    expected = np.array([values[1] - values[0], values[3] - values[2]])
    assert mean == pytest.approx(expected.mean())
    assert error == pytest.approx(expected.std(ddof=1) / np.sqrt(2))


def test_excess_of_texts_without_partners_is_a_difference_of_means():
    texts = [corpora.documents(DATA, "holdout", 0)[i] for i in range(5)]
    values = np.array([STORIES.log_prob(text) for text in texts])
    mean, error = evaluation.excess_log_prob(STORIES, texts[:3], [texts[3], "No story.", texts[4]], paired=False)
    assert mean == pytest.approx(values[3:].mean() - values[:3].mean())
    assert error == pytest.approx(np.sqrt(values[3:].var(ddof=1) / 2 + values[:3].var(ddof=1) / 3))


@pytest.mark.parametrize("paired", [False, True])
def test_one_coherent_text_has_no_excess(paired):
    texts = [corpora.documents(DATA, "holdout", 0)[i] for i in range(3)]
    assert evaluation.excess_log_prob(STORIES, texts, [texts[0], "No story.", "None."], paired) is None
