"""Gap, ranking and the reference of the solvers' errors: by hand, with scores that are given."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from cola_jax import likelihood
from cola_jax.config import DataConfig, StoriesConfig
from cola_jax.data import corpora
from cola_jax.data.stories import Stories
from cola_jax.evaluation import likelihood as measures
from cola_jax.evaluation import prior, texts
from cola_jax.evaluation.statistics import Mean, per_token
from cola_jax.families.cola import FAMILY, ColaConfig
from cola_jax.likelihood import Settings, estimators
from cola_jax.runs import Run
from cola_jax.types import UserError
from tests.models import tiny_models

DATA = DataConfig(stories=StoriesConfig(values=4, aligned=True), num_stories=1000, align=8)
STORIES = Stories(DATA.stories)
EXACT = Settings(samples=2, divergence="exact")


def test_per_token_is_a_ratio_of_sums_with_its_error():
    """(3 + 5 + 1) / (2 + 2 + 1); residuals -0.6, 1.4, -0.8, mean length 5/3."""
    found = per_token(np.array([3.0, 5.0, 1.0]), np.array([2, 2, 1]))
    assert found.mean == pytest.approx(1.8)
    assert found.error == pytest.approx(np.sqrt((0.36 + 1.96 + 0.64) / 2 / 3) / (5 / 3))
    assert per_token(np.array([4.0]), np.array([2])) == Mean(2.0, 0.0)
    # Documents of one length: the standard error of the mean of rates.
    rates = np.array([1.0, 2.0, 6.0])
    assert per_token(4 * rates, np.full(3, 4)).error == pytest.approx(rates.std(ddof=1) / np.sqrt(3))


def test_the_entropy_of_a_text_s_tokens():
    """Two of two kinds, and three of one; what fills the row does not count."""
    ids = np.array([[5, 5, 2, 2, 9, 9], [4, 4, 4, 0, 0, 0]])
    found = texts.unigram_entropy(texts.Cut(ids, np.array([4, 3]), None, False))
    assert found.mean == pytest.approx(np.log(2) / 2) and found.error == pytest.approx(np.log(2) / 2)


class Words:
    """A token for each word and for each full stop: 8 for each sentence."""

    name, fingerprint = "words", ""
    eos_id, pad_id, vocab_size = 0, 1, 400

    def __init__(self):
        self.names = ["<eos>", "<pad>"]

    def encode(self, text):
        words = re.findall(r"[\w']+|\.", text)
        self.names += [word for word in dict.fromkeys(words) if word not in self.names]
        return [self.names.index(word) for word in words]

    def decode(self, ids):
        return " ".join(self.names[int(i)] for i in ids if i > 1).replace(" .", ".")


def run_of(dit=None, data=DATA):
    model, params = tiny_models.create(vae={"vocab_size": Words.vocab_size}, dit=dit)
    config = ColaConfig(data=data, vae=model.vae_config, dit=model.dit_config)
    return Run(FAMILY, model, params, Words(), config, 0)


def likelihood_of(elbo, blocks=None, log_weights=None, settings=EXACT):
    """A `Likelihood` whose ELBO is reconstruction (-1) + prior (elbo + 3) - posterior (2) for each row."""
    elbo = np.asarray(elbo, float)
    log_w = np.repeat(elbo[:, None], 2, axis=1) if log_weights is None else log_weights
    parts = [np.full_like(elbo, -1), elbo + 3, np.full_like(elbo, 2)]
    blocks = [part[:, None] for part in parts] if blocks is None else blocks
    ok = np.ones(log_w.shape, bool)
    return estimators._likelihood(log_w, ok, ok, estimators.BlockTerms(*blocks), np.ones(len(elbo)), settings)


def test_gap_by_hand(monkeypatch):
    run = run_of()
    texts = measures.held_out(run, 2, 0)
    tokens, total = texts.tokens, texts.tokens.sum()
    np.testing.assert_array_equal(tokens, [8 * text.count(".") + 1 for text in texts.texts])
    width = max(map(len, texts.ids)) // 4
    parts = np.zeros((3, 2, width))
    parts[0], parts[1], parts[2] = -1, -2, 0.5  # in each block: reconstruction, prior, posterior
    log_w = np.array([[-40.0, -42.0], [-30.0, -30.0]]) - 3.5 * width
    given = likelihood_of(np.zeros(2), blocks=list(parts), log_weights=log_w)
    seen = []

    def estimate(model, params, rows, settings, key, segments, report=None):
        seen.append((rows, segments))
        return given

    monkeypatch.setattr(likelihood, "log_likelihood", estimate)
    found = measures.gap(run, EXACT, 2, 1, (1, 2))
    assert [list(row[: len(ids)]) for row, ids in zip(seen[0][0], texts.ids, strict=True)] == texts.ids
    elbo, entropy = log_w.mean(axis=1), -sum(STORIES.log_prob(text) for text in texts.texts)
    expected = {
        "entropy": entropy / total,
        "-ELBO": -elbo.sum() / total,
        "-IWAE 1": -elbo.sum() / total,
        "-IWAE 2": -(np.log(np.exp(log_w - elbo[:, None]).mean(axis=1)) + elbo).sum() / total,
        "reconstruction": 2 * width / total,
        "rate": entropy / total,
        "mismatch": (-elbo.sum() - 2 * width - entropy) / total,
        # A story of s sentences has 2 s blocks of 4 tokens, and behind them ends of text only.
        "filling": 3.5 * sum(width - 2 * text.count(".") for text in texts.texts) / total,
        "-prior": 4 * width / total,
        "posterior": width / total,
        "Monte-Carlo error of -ELBO": 1 / total,  # deviations sqrt(2) and 0, of two samples
        "effective sample size": (estimators.effective_sample_size(log_w)[0] + 2) / 2,
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].mean == pytest.approx(value), name
    without = measures.gap(run, Settings(samples=2), 2, 1, (1, 2))
    assert set(without) == {name for name in expected if "IWAE" not in name}


def rank(monkeypatch, run, score, settings=EXACT):
    """Ranking where text (prefix and response together) has the score that a function gives it."""

    def conditional(model, params, prefixes, responses, settings, key, ids):
        texts = [run.tokenizer.decode([*p, *r]) for p, r in zip(prefixes, responses, strict=True)]
        assert all(len(p) == 8 for p in prefixes) and list(ids) == [i // 2 for i in range(len(ids))]
        joint = likelihood_of([score(text) for text in texts], settings=settings)
        return estimators.plug_in(joint, likelihood_of(np.full(len(texts), -5.0), settings=settings))

    def estimate(model, params, tokens, settings, key, segments, prefix, ids):
        assert set(prefix) == {8}
        texts = [run.tokenizer.decode(row[: s.sum()]) for row, s in zip(tokens, segments, strict=True)]
        return likelihood_of([-score(text) for text in texts], settings=settings)  # the other way round

    monkeypatch.setattr(likelihood, "conditional", conditional)
    monkeypatch.setattr(likelihood, "log_likelihood", estimate)
    return measures.ranking(run, settings, 12, 1)


def coherent(text):
    return 0.0 if np.isfinite(STORIES.log_prob(text)) else -3.0


def test_ranking_counts_true_continuations_that_score_higher(monkeypatch):
    """By the corpus's own density the plug-in score is always right, and its negative never; ties are no success."""
    found = rank(monkeypatch, run_of(), coherent)
    (total,) = {share.total for share in found.values()}
    assert total > 3
    assert {name: share.mean for name, share in found.items()} == {
        "plug-in ELBO": 1.0,
        "plug-in IWAE": 1.0,
        "response": 0.0,
        "response IWAE": 0.0,
        "response, prior term": 0.0,
    }
    assert {share.successes for share in rank(monkeypatch, run_of(), lambda text: -1.0).values()} == {0}
    without = rank(monkeypatch, run_of(), coherent, Settings(samples=2))
    assert set(without) == {"plug-in ELBO", "response", "response, prior term"}


def test_ranking_refuses_what_is_not_a_number(monkeypatch):
    def broken(text):
        return np.nan if coherent(text) else -1.0

    with pytest.raises(UserError, match=r"scores of the ranking are not finite.*max_steps"):
        rank(monkeypatch, run_of(), broken)


def test_ranking_has_no_plug_in_score_where_first_sentences_end_inside_a_block(monkeypatch):
    run = run_of(dit={"block_size": 16})
    assert set(rank(monkeypatch, run, coherent)) == {"response", "response IWAE", "response, prior term"}


@pytest.mark.slow
def test_a_reference_that_ran_out_of_steps_is_not_the_truth():
    run = run_of()
    sample = prior.draw(run, 2, 0)
    settings = Settings(solver="heun", rtol=1e-7, atol=1e-7, max_steps=3)
    with pytest.raises(UserError, match="2 of 2 sequences.* likelihood max_steps = 3: must be larger"):
        measures.truth(run, sample, settings)
    steps = Settings(solver="heun", steps=2)
    assert np.all(np.isfinite(measures.truth(run, sample, steps)))


def test_stories_are_those_that_the_run_did_not_train_on():
    """By the seed of the data, where it is not the run's."""
    run = run_of(data=dataclasses.replace(DATA, seed=5))
    expected = [corpora.documents(DATA, "holdout", 5)[i] for i in range(2)]
    assert measures.held_out(run, 2, run.config.data_seed).texts == expected
    sample = prior.draw(run, 2, 0)
    np.testing.assert_array_equal(sample.tokens, [len(run.tokenizer.encode(text)) + 1 for text in expected])


def test_first_sentences_are_whole_blocks_of_the_quickstart():
    from configs import quickstart

    config = quickstart.get_config()
    stories = Stories(StoriesConfig(**config.data.stories))
    documents = corpora.documents(DATA, "holdout", 0)
    first = stories.first_sentence(documents[0])
    assert len(Words().encode(first)) == config.data.align == 8
    assert config.data.align % (config.dit.block_size * config.vae.patch_size) == 0


def test_draws_do_not_depend_on_their_number():
    run = run_of()
    few, many = (prior.draw(run, count, 3) for count in (1, 2))
    np.testing.assert_allclose(few.z[0], many.z[0, : few.z.shape[1]], atol=1e-5)
    assert jax.random.key_data(few.probes[0, 0]).tolist() == jax.random.key_data(many.probes[0, 0]).tolist()
