import math

import jax
import numpy as np
import pytest

from cola_jax import sampling
from cola_jax.config import DataConfig, DiTConfig, StoriesConfig, VAEConfig
from cola_jax.data.stories import Stories
from cola_jax.data.tokenizers import ByteTokenizer
from cola_jax.evaluation import stories as evaluation
from cola_jax.models import cola


def test_wilson_interval():
    # Wilson's formula by hand for 8 of 10.
    low, high = evaluation.Proportion(8, 10).interval
    assert low == pytest.approx(0.49016, abs=1e-4) and high == pytest.approx(0.94332, abs=1e-4)
    assert evaluation.Proportion(0, 10).interval[0] == 0.0
    assert evaluation.Proportion(10, 10).interval[1] == pytest.approx(1.0)
    assert math.isnan(evaluation.Proportion(0, 0).mean) and evaluation.Proportion(0, 0).interval == (0.0, 1.0)


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


@pytest.fixture(scope="module")
def small():
    tokenizer = ByteTokenizer()
    model = cola.create(
        VAEConfig(vocab_size=tokenizer.vocab_size, dim=16, ffn_dim=16, num_heads=2, latent_dim=4),
        DiTConfig(latent_dim=4, dim=16, num_heads=2, head_dim=8, num_layers=1, time_dim=8, rope_dim=4, block_size=4),
    )
    return model, jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8), np.int32)), tokenizer


def test_written_texts_begin_with_their_prompts_and_do_not_depend_on_the_batch(small):
    settings = sampling.Settings(steps=1, guidance_scale=1.0, max_new_tokens=8)
    prompts = ["Mia", "", "a longer prompt"]
    texts = evaluation.write(*small, prompts, settings, seed=3, batch_size=2)
    assert texts == evaluation.write(*small, prompts, settings, seed=3, batch_size=3)
    assert texts != evaluation.write(*small, prompts, settings, seed=4, batch_size=3)
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))


def test_reconstruction_counts_real_tokens_only(small):
    model, params, _ = small
    tokens = np.arange(16, dtype=np.int32).reshape(2, 8)
    segments = np.array([[1] * 8, [1] * 4 + [0] * 4], np.int32)
    accuracy = evaluation.reconstruction(model, params, [{"tokens": tokens, "segment_ids": segments}])
    assert accuracy.total == 12 and 0 <= accuracy.successes <= 12


def test_held_out_prompts_are_first_sentences():
    config = DataConfig(stories=StoriesConfig(values=4, aligned=True), num_stories=100)
    prompts = evaluation.held_out_prompts(config, 0, 5)
    stories = Stories(config.stories)
    assert len(prompts) == 5
    for prompt in prompts:
        (sentence,) = stories.parse(prompt).sentences
        assert sentence.valid and sentence.type == "introduction"
