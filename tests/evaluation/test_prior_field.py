"""Errors of the prior's field and their split by time: exact Gaussian models, and a tiny network."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cola_jax import rng
from cola_jax.config import DataConfig, StoriesConfig
from cola_jax.data import corpora
from cola_jax.data.stories import Stories
from cola_jax.data.tokenizers import ByteTokenizer
from cola_jax.evaluation import prior
from cola_jax.families.cola import FAMILY, ColaConfig
from cola_jax.flow.path import PATHS
from cola_jax.likelihood import Settings, density
from cola_jax.models.cola import ColaDLM
from cola_jax.models.dit_config import DiTConfig
from cola_jax.models.text_vae import VAEConfig
from cola_jax.runs import Run
from cola_jax.types import UserError
from tests.flow.gaussian import CURVES
from tests.models import tiny_models

MEAN, DEVIATION = np.array([0.4, -1.0]), np.array([0.3, 0.8])
BLOCK, LENGTH = 2, 6
FINE = Settings(solver="dopri5", steps=24, power=2.0, divergence="exact")
STARTS = (0.0, 0.02, 0.1, 0.3, 0.9)


class Gaussian(ColaDLM):
    """A prior whose latents are N(MEAN, DEVIATION^2) for each channel: its exact field, plus a constant."""

    path: str = "linear"
    offset: float = 0.0

    def setup(self):
        pass

    def _field(self, z, t):
        signal, signal_slope, noise, noise_slope = CURVES[self.path](t, jnp)
        mean, variance = (jnp.asarray(x, z.dtype)[None, None] for x in (MEAN, DEVIATION**2))
        gain = (signal * signal_slope * variance + noise * noise_slope) / (signal**2 * variance + noise**2)
        return signal_slope * mean + gain * (z - signal * mean) + self.offset

    def velocity(self, latents, times, history=None, pinned=None, segment_ids=None, drop_history=None, plan=None):
        assert history is not None and segment_ids is not None
        times = times[:, None] if times.ndim == 1 else times
        return self._field(latents, jnp.repeat(times, latents.shape[1] // times.shape[1], axis=1)[..., None])

    def history(self, latents, segment_ids, plan=None):
        return (latents[None, :, None], latents[None, :, None])

    def extend(self, z, time, positions, cache, cache_mask, own_mask=None, pinned=None, modulations=None, plan=None):
        return self._field(z, jnp.reshape(time, (-1, 1, 1))), None


def run_of(path="linear", offset=0.0):
    model = Gaussian(VAEConfig(latent_dim=2), DiTConfig(latent_dim=2, block_size=BLOCK), path=path, offset=offset)
    return SimpleNamespace(model=model, params={"params": {"dit": {}}}, settings=SimpleNamespace(path=path))


def sample_of(count, mean=MEAN, deviation=DEVIATION):
    """Latents of a posterior that is the same at every position; the last text ends inside its second block."""
    shape = (count, LENGTH, 2)
    mean, deviation = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), shape) for x in (mean, deviation))
    segments = np.ones(shape[:2], np.int32)
    segments[-1, 3:] = 0
    return prior.Sample(
        z=mean + deviation * tiny_models.normal(*shape, seed=1),
        mean=mean,
        deviation=deviation,
        noise=tiny_models.normal(*shape, seed=2),
        probes=jnp.stack(rng.split(rng.key(0, "likelihood", 0, np.arange(count)), LENGTH // BLOCK), axis=1),
        segments=jnp.asarray(segments),
        tokens=segments.sum(axis=1),
        bytes=3 * segments.sum(axis=1),
        reconstruction=0.1 * segments.sum(axis=1),
        entropy=None,
    )


@pytest.mark.parametrize("path", PATHS)
def test_the_bound_is_the_divergence_where_the_field_is_exact(path):
    """KL(q || p) of the posterior and the prior in closed form: a diffusion with exact scores loses nothing."""
    mean, deviation = np.array([0.1, -0.5]), np.array([0.2, 0.4])
    sample = sample_of(64, mean, deviation)._replace(entropy=np.full(64, 0.5))
    divergence = (np.log(DEVIATION / deviation) + (deviation**2 + (mean - MEAN) ** 2) / (2 * DEVIATION**2) - 0.5).sum()
    found = prior.bound(run_of(path), sample, 200, 0)
    assert found.total.mean == pytest.approx(divergence, rel=0.05)
    assert sum(part.mean for _, _, part in found.parts) == pytest.approx(found.total.mean, rel=1e-6)
    assert all(part.mean > 0 for _, _, part in found.parts) and found.parts[0][:2] == (0, 0.1)
    assert found.excess.mean == pytest.approx(found.total.mean - 32 / sample.tokens.sum(), rel=1e-6)
    assert found.reconstruction.mean == pytest.approx(0.1)
    assert found.bits_per_byte.mean == pytest.approx((found.total.mean + 0.1) / 3 / np.log(2), rel=1e-6)


def test_the_bound_is_zero_for_the_posterior_itself():
    assert abs(prior.bound(run_of(), sample_of(4), 20, 0).total.mean) < 1e-5


def test_the_best_times_go_with_the_root_of_the_mean_square():
    """Of a constant error, weighted by (1 - t) / t."""
    shares = np.array(prior.bound(run_of(offset=0.5), sample_of(64), 200, 0).best_times)
    ends = np.linspace(0.1, 1, 10)
    expected = np.sqrt(np.diff(-1 / ends - 2 * np.log(ends) + ends))
    assert shares.sum() == pytest.approx(1) and shares[0] > shares[1]
    np.testing.assert_allclose(shares[1:] / shares[1:].sum(), expected / expected.sum(), rtol=0.05, atol=0.002)


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_lost_by_the_exact_prior(path):
    """Its latents are those of the posterior: log q = log p whatever part of the flow is replaced."""
    for part in prior.split(run_of(path), sample_of(3), STARTS, FINE):
        assert abs(part.excess.mean) < 1e-3 and part.excess.error < 1e-3 and part.mismatch is None, part


def test_the_split_by_hand():
    """Another posterior: log p of the carried latents is that of the prior's marginal at t_0, in closed form."""
    mean, deviation = np.array([0.1, -0.5]), np.array([0.2, 0.4])
    sample = sample_of(3, mean, deviation)
    sample = sample._replace(entropy=np.array([1.0, 2.0, 0.5]))
    z, real = np.asarray(sample.z, np.float64), np.asarray(sample.segments)[..., None]

    def log_normal(x, mean, deviation):
        return -0.5 * (((x - mean) / deviation) ** 2 + np.log(2 * np.pi)) - np.log(deviation)

    found = prior.split(run_of(), sample, STARTS, FINE)
    for part, t in zip(found, STARTS, strict=True):
        own, marginal = (np.sqrt((1 - t) ** 2 * s**2 + t**2) for s in (deviation, DEVIATION))
        carried = (1 - t) * mean + own * (z - mean) / deviation
        log_p = log_normal(carried, (1 - t) * MEAN, marginal) + np.log(own / deviation)
        excess = (real * (log_normal(z, mean, deviation) - log_p)).sum()
        assert part.start == t and part.excess.mean == pytest.approx(excess / sample.tokens.sum(), abs=1e-3)
        assert part.mismatch.mean == pytest.approx((excess - 3.5) / sample.tokens.sum(), abs=1e-3)
    assert found[0].excess.mean > found[2].excess.mean > found[4].excess.mean  # less of the flow is the model's


def test_the_split_does_not_depend_on_how_many_are_solved_at_a_time():
    sample, run = sample_of(3), run_of(offset=0.3)
    once, *_ = prior.split(run, sample, (0.1,), FINE)
    often, *_ = prior.split(run, sample, (0.1,), dataclasses.replace(FINE, rows=2))
    assert once.excess == pytest.approx(often.excess, abs=1e-4) and once.excess.mean > 0.01


@pytest.mark.parametrize("path", PATHS)
def test_field_error_of_the_exact_field(path):
    """0 at t = 0; later Var(u | z_t) = (determinant deviation / spread)^2, what no field can know. An offset adds."""
    sample = sample_of(400)
    other = sample._replace(z=jnp.where(sample.segments[..., None] > 0, sample.z, 50.0))  # padding
    times = (0.0, 0.02, 0.3, 0.7)
    exact, same, wrong = (
        prior.field_error(*arguments, times)
        for arguments in ((run_of(path), sample), (run_of(path), other), (run_of(path, 0.5), sample))
    )
    assert exact == same
    for one, off, t in zip(exact, wrong, times, strict=True):
        signal, signal_slope, noise, noise_slope = CURVES[path](t)
        determinant, spread = signal * noise_slope - noise * signal_slope, signal**2 * DEVIATION**2 + noise**2
        expected = np.mean((determinant * DEVIATION) ** 2 / spread) if t else 0.0
        power = np.mean(signal_slope**2 * (MEAN**2 + DEVIATION**2) + (noise_slope**2 if t else 0.0))
        assert one.time == t and one.error.mean == pytest.approx(expected, rel=0.08, abs=1e-9)
        assert one.power.mean == pytest.approx(power, rel=0.08)
        assert off.error.mean - one.error.mean == pytest.approx(0.25, abs=0.08)
    assert wrong[0].error.mean == pytest.approx(0.25, rel=1e-4)


TINY = Settings(solver="heun", steps=3)


def tiny_run(**data):
    model, params = tiny_models.create(vae={"vocab_size": ByteTokenizer.vocab_size, "scale": 1.5, "shift": 0.2})
    config = ColaConfig(data=DataConfig(tokenizer="bytes", **data), vae=model.vae_config, dit=model.dit_config)
    return Run(FAMILY, model, params, ByteTokenizer(), config, 0)


@pytest.mark.slow
def test_a_network_on_any_corpus(tmp_path):
    """Documents are cut to the context; at t_0 = 0 the split is log q - log p of the model itself."""
    file = tmp_path / "texts.txt"
    file.write_text("\n\n".join(f"text {i} " + "ab" * (i % 9) for i in range(300)))
    run = tiny_run(corpus="text", files=str(file), sequence_length=16, holdout=0.2)
    sample = prior.draw(run, 6, 0)
    documents = corpora.documents(run.config.data, "holdout", 0)
    lengths = [len(documents[i].encode()) + 1 for i in range(6)]
    assert max(lengths) > 16 and sample.entropy is None
    np.testing.assert_array_equal(sample.tokens, np.minimum(lengths, 16))
    np.testing.assert_array_equal(sample.segments.sum(axis=1), sample.tokens)
    np.testing.assert_array_equal(sample.bytes, np.minimum(np.array(lengths) - 1, 16))  # a token is a byte
    ids = np.array([([*documents[i].encode()] + [run.tokenizer.eos_id] * 16)[:16] for i in range(6)])
    logits = tiny_models.apply(run.model, run.params, sample.z, sample.segments, method="decode")
    nats = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ids[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(sample.reconstruction, (nats * (np.asarray(sample.segments) > 0)).sum(axis=1), rtol=1e-5)
    found = density.log_prob(run.model, run.params, sample.z, TINY, sample.probes, sample.segments)
    log_q = jax.scipy.stats.norm.logpdf(sample.z, sample.mean, sample.deviation).sum(axis=-1)
    excess = (log_q * (sample.segments > 0)).sum() - found.log_prob.sum()
    part, late = prior.split(run, sample, (0.0, 0.5), TINY)
    assert part.excess.mean == pytest.approx(float(excess) / sample.tokens.sum(), rel=1e-4)
    assert part.mismatch is None and np.isfinite(late.excess.mean)
    errors = prior.field_error(run, sample, prior.TIMES)
    assert [one.time for one in errors] == list(prior.TIMES) and all(one.error.mean > 0 for one in errors)
    assert "squared error" in str(errors[0]) and "nats per token" in str(part) and "mismatch" not in str(part)
    with pytest.raises(UserError, match="count = 900: must be at most the"):
        prior.draw(run, 900, 0)
    with pytest.raises(UserError, match="were not solved from t = 0; likelihood max_steps = 2: must be larger"):
        hopeless = dataclasses.replace(TINY, steps=0, rtol=1e-6, atol=1e-6, max_steps=2)
        prior.split(run, sample, (0.0,), hopeless)


def test_the_entropy_is_known_on_whole_stories():
    stories = StoriesConfig(values=4, aligned=True)
    run = tiny_run(stories=stories, num_stories=1000, sequence_length=400)
    sample = prior.draw(run, 2, 0)
    documents = corpora.documents(run.config.data, "holdout", 0)
    np.testing.assert_allclose(sample.entropy, [-Stories(stories).log_prob(documents[i]) for i in range(2)])
    short = tiny_run(stories=stories, num_stories=1000, sequence_length=40)
    assert prior.draw(short, 2, 0).entropy is None
