"""Where the prior's density is lost, on held-out texts: the error of its field, and what its flow costs by time."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cola_jax import likelihood, rng
from cola_jax.data import corpora
from cola_jax.data.stories import Stories
from cola_jax.evaluation import texts
from cola_jax.evaluation.statistics import Mean, per_token
from cola_jax.flow import prediction
from cola_jax.flow.path import PATHS, Path, interpolate, likelihood_weight
from cola_jax.likelihood import Settings, density, estimators, rows, weights
from cola_jax.objectives import common
from cola_jax.types import Key, Params, UserError

# Flow times at which the field is compared, and below which the model's flow is replaced.
TIMES = (0.0, 0.02, 0.1, 0.3, 0.7)
STARTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)
_NEAREST = 1e-4  # flow times of the bound keep this distance from data and noise
_ROWS = 64  # sequences whose field is computed at a time


class Sample(NamedTuple):
    """One posterior sample of held-out texts, all latents normalised.

    Attributes:
      z: the sample.
      mean, deviation: of the posterior.
      noise: z_1 of the points z_t, the same at all times.
      probes: keys of Hutchinson's probes, one for each of the G blocks.
      segments: 0 for padding.
      tokens: of each text and one end of text, within the context.
      bytes: of UTF-8 of each text, within the context.
      reconstruction: -log p(x|z) of each text, nats.
      entropy: -log p*(x) of each text, nats; None where it is not known: another corpus, or texts that were cut.
    """

    z: Float[Array, "B N D"]
    mean: Float[Array, "B N D"]
    deviation: Float[Array, "B N D"]
    noise: Float[Array, "B N D"]
    probes: Key
    segments: Int[Array, "B N"]
    tokens: np.ndarray
    bytes: np.ndarray
    reconstruction: np.ndarray
    entropy: np.ndarray | None


def draw(run, count: int, seed: int) -> Sample:
    """A posterior sample of the first held-out texts of a run's corpus, cut to its context.

    Args:
      run: from `runs.load`, of family "cola".
      count: texts.
      seed: of the draws; the texts are those of the run.

    Raises:
      UserError: fewer texts are held out, or the model has no density.
    """
    model, data = run.model, run.config.data
    estimators.check_model(model, run.params)
    documents = corpora.documents(data, "holdout", run.config.data_seed)
    if count > len(documents):
        raise UserError(f"count = {count}: must be at most the {len(documents)} held-out texts")
    found = [documents[i] for i in range(count)]
    cut = texts.cut(found, run.tokenizer, data)
    made = rows.make_rows(model, *likelihood.stack(cut.ids))
    entropy = None
    if data.corpus == "stories" and cut.whole:
        known = Stories(data.stories)
        entropy = -np.array([known.log_prob(text) for text in found])
    posterior = weights.encode(model, run.params, made)
    deviation = jnp.exp(0.5 * posterior.logvar) * abs(model.vae_config.scale)
    mean, shape = model.normalize(posterior.mean), posterior.mean.shape
    sample, noise, probe = (rng.key(seed, "likelihood", step, np.arange(count)) for step in range(3))
    z = mean + deviation * rng.normal(sample, shape[1:])
    segments = jnp.asarray(made.real[:, :: model.vae_config.patch_size])
    cross_entropy = common.token_scores(model, run.params, z, jnp.asarray(made.tokens), segments).cross_entropy
    return Sample(
        z=z,
        mean=mean,
        deviation=deviation,
        noise=rng.normal(noise, shape[1:]),
        probes=jnp.stack(rng.split(probe, shape[1] // model.dit_config.block_size), axis=1),
        segments=segments,
        tokens=cut.tokens,
        bytes=cut.bytes,
        reconstruction=np.asarray(jnp.where(made.real > 0, cross_entropy, 0.0).sum(axis=1), np.float64),
        entropy=entropy,
    )


class FieldError(NamedTuple):
    """The prior's field at one time, means over the elements of real latents, with errors over texts.

    Attributes:
      time: flow time t.
      error: ``|v(z_t, t) - u|^2``. At t = 0 u is its mean given z, which the exact field equals; later it holds what
        z_t does not tell of u, too, which no field can avoid.
      power: ``u^2``, the error of a field of zeros.
    """

    time: float
    error: Mean
    power: Mean

    def __str__(self) -> str:
        return f"field at t = {self.time:g}: squared error {self.error}, of a field of zeros {self.power}, per element"


@functools.partial(jax.jit, static_argnums=(0, 2))
def _squares(model, params: Params, path: str, z, noise, segments, t) -> tuple[Array, Array]:
    """``|v - u|^2`` and ``u^2`` of each row [B], sums over the elements of real latents."""
    noisy, target = interpolate(PATHS[path], z, noise, jnp.reshape(t, (1, 1, 1)))
    times = jnp.full(z.shape[0], t)
    velocity = model.apply(params, noisy, times, history=z, segment_ids=segments, method="velocity")
    real = (segments > 0)[..., None]
    return tuple(jnp.sum(jnp.where(real, jnp.square(x), 0.0), axis=(1, 2)) for x in (velocity - target, target))


def field_error(run, sample: Sample, times: Sequence[float]) -> list[FieldError]:
    """Error of the prior's velocity at flow times, on the run's path, with the clean latents as history.

    At t = 0, where z_t = z, the noise is not part of the target: the exact field there is ``signal'(0) z``, on the
    linear path -z.

    Args:
      run: its model, parameters and path.
      sample: of `draw`.
      times: in [0, 1].
    """
    model, params = density.precise(run.model, run.params, Settings())
    count = np.asarray((sample.segments > 0).sum(axis=1)) * sample.z.shape[-1]
    found = []
    for time in times:
        noise = sample.noise if time else jnp.zeros_like(sample.noise)
        parts = []
        for start in range(0, len(count), _ROWS):
            z, z1, segments = (x[start : start + _ROWS] for x in (sample.z, noise, sample.segments))
            parts.append(_squares(model, params, run.settings.path, z, z1, segments, jnp.float32(time)))
        error, power = (np.concatenate(part).astype(np.float64) for part in zip(*parts, strict=True))
        found.append(FieldError(float(time), per_token(error, count), per_token(power, count)))
    return found


class Split(NamedTuple):
    """What is lost above a time, nats per token, with errors over texts.

    Attributes:
      start: t_0, below which the flow is that of the text's own posterior.
      excess: ``log q(z|x) - log p(z)``; its mean is rate and mismatch together.
      mismatch: that less H(X), as in `evaluation.likelihood.gap`; None where H(X) is not known. It counts the whole
        rate, of which noise at t_0 hides a part, so that late t_0 make it too small.
    """

    start: float
    excess: Mean
    mismatch: Mean | None

    def __str__(self) -> str:
        known = "" if self.mismatch is None else f", mismatch {self.mismatch}"
        return f"exact flow below t = {self.start:g}: log q - log p {self.excess}{known} nats per token"


def exact_flow(
    path: Path, z: Float[Array, "*S"], mean: Float[Array, "*S"], deviation: Float[Array, "*S"], t: float
) -> tuple[Float[Array, "*S"], Float[Array, "*S"]]:
    """Where the flow of N(mean, deviation^2) carries data by time t, and the log of its slope, elementwise.

    Args:
      path: between data and noise.
      z: data.
      mean, deviation: of the data.
      t: flow time.
    """
    start, then, variance = jnp.float32(0), jnp.float32(t), jnp.square(deviation)
    slope = 0.5 * jnp.log(prediction.spread(path, then, variance) / prediction.spread(path, start, variance))
    return prediction.follow_mean(path, z, mean, start, then, variance), slope


def split(run, sample: Sample, starts: Sequence[float], settings: Settings) -> list[Split]:
    """The mismatch of prior and posterior by flow time: what remains when the flow is exact below ``t_0``.

    Below t_0 the model's flow is replaced by that of the text's own posterior (an oracle: no prior knows the text);
    from there to 1 it is the model's.

    Args:
      run: its model, parameters and path.
      sample: of `draw`.
      starts: values of t_0, in [0, 1); 0 is the model alone.
      settings: of the solves, see `Settings`; the probes are the same for every t_0.

    Raises:
      UserError: a solve ran out of steps.
    """
    settings.validate()
    path, real = PATHS[run.settings.path], (sample.segments > 0)[..., None]
    score = (sample.z - sample.mean) / sample.deviation
    log_q = -0.5 * (jnp.square(score) + math.log(2 * math.pi)) - jnp.log(sample.deviation)
    found = []
    for start in starts:
        states, slope = exact_flow(path, sample.z, sample.mean, sample.deviation, start)
        own = np.asarray(jnp.where(real, log_q - slope, 0.0).sum(axis=(1, 2)), np.float64)
        excess = own - _log_prob(run, sample, states, float(start), settings)
        mismatch = None if sample.entropy is None else per_token(excess - sample.entropy, sample.tokens)
        found.append(Split(float(start), per_token(excess, sample.tokens), mismatch))
    return found


def _log_prob(run, sample: Sample, states: Array, start: float, settings: Settings) -> np.ndarray:
    """Log-density of the states at time ``start`` under the model's flow from there to 1, [B], nats."""
    values = []
    for first in range(0, len(states), settings.rows):
        part = slice(first, first + settings.rows)
        keys = None if settings.divergence == "exact" else sample.probes[part]
        z, segments = sample.z[part], sample.segments[part]
        solved = density.log_prob(run.model, run.params, z, settings, keys, segments, states=states[part], start=start)
        if bad := int((~np.asarray(solved.ok).all(axis=1)).sum()):
            what = f"{bad} of {len(z)} sequences were not solved from t = {start:g}"
            raise UserError(f"{what}; likelihood max_steps = {settings.max_steps}: must be larger")
        values.append(np.asarray(solved.log_prob, np.float64).sum(axis=1))
    return np.concatenate(values)


class Bound(NamedTuple):
    """The prior's share of -ELBO by the error of its field, nats per token, without a solve.

    Attributes:
      total: the diffusion's bound on ``log q(z|x) - log p(z)``: rate and mismatch together, and what the diffusion
        with the flow's marginals loses against the flow.
      parts: of it, what arises between two flow times each: (from, to, mean).
      excess: total less H(X); None where that is not known.
      reconstruction: -log p(x|z); with the total it bounds -log p(x).
      bits_per_byte: of that bound.
      best_times: of ten equal parts of [0, 1], the shares of drawn times that would vary the bound least; for
        ``stage2.time_table``.
    """

    total: Mean
    parts: list[tuple[float, float, Mean]]
    excess: Mean | None
    reconstruction: Mean
    bits_per_byte: Mean
    best_times: tuple[float, ...]

    def __str__(self) -> str:
        known = "" if self.excess is None else f", above the entropy {self.excess}"
        parts = ", ".join(f"{low:g} to {high:g}: {part.mean:.3f}" for low, high, part in self.parts)
        return (
            f"single-time bound on log q - log p: {self.total}{known} nats per token; by flow time {parts}; "
            f"reconstruction {self.reconstruction}; together {self.bits_per_byte} bits per byte; it varies least with "
            f"stage2.time_table = ({', '.join(f'{share:.2g}' for share in self.best_times)})"
        )


@functools.partial(jax.jit, static_argnums=(0, 2))
def _weighted_errors(model, params: Params, path: str, sample: Sample, key: Key, offset) -> tuple[Array, Array]:
    """Nats of each latent at its time [B, N], and the times; those of a block are stratified over calls."""
    along, size = PATHS[path], model.dit_config.block_size
    batch, length, _ = sample.z.shape
    times, noise = jax.random.split(key)
    t = (offset + jax.random.uniform(times, (batch, length // size))) % 1.0
    t = jnp.clip(t, _NEAREST, 1 - _NEAREST)
    each = jnp.repeat(t, size, axis=1)[..., None]
    noisy, _ = interpolate(along, sample.z, jax.random.normal(noise, sample.z.shape), each)
    target = prediction.posterior_velocity(along, noisy, each, sample.mean, jnp.square(sample.deviation))
    velocity = model.apply(params, noisy, t, history=sample.z, segment_ids=sample.segments, method="velocity")
    error = jnp.sum(jnp.square(velocity - target), axis=-1)
    each = each[..., 0]
    return jnp.where(sample.segments > 0, error * likelihood_weight(along, each), 0.0), each


def bound(
    run, sample: Sample, draws: int, seed: int, edges: Sequence[float] = (0, 0.1, 0.3, 0.5, 0.7, 0.9, 1)
) -> Bound:
    """``E_t[weight(t) |v(z_t, t) - E[u | z_t, x]|^2]``: an unbiased estimate of a bound, one pass a draw.

    The weight is `flow.path.likelihood_weight`. It costs no ODE and no divergence, so that it suits every evaluation.
    The flow's own likelihood (`evaluation.likelihood.gap`) is another number. The weight has a pole at t = 0: a field
    that is not exact there (`DiTConfig.prediction` "velocity") has no finite bound, and what is returned is what times
    from 1e-4 to 1 - 1e-4 give.

    Args:
      run: its model, parameters and path.
      sample: of `draw`; its posterior sample is used, with new noise and times in every draw.
      draws: times for each block.
      seed: of times and noise.
      edges: flow times between which the parts are reported, from 0 to 1.
    """
    model, params = density.precise(run.model, run.params, Settings())
    parts = np.zeros((len(edges) - 1, len(sample.z)))
    squares = np.full(10, np.finfo(float).tiny)  # of what arises in each tenth of [0, 1]; not 0 where nothing does
    for index in range(draws):
        for first in range(0, len(sample.z), _ROWS):
            batch = slice(first, first + _ROWS)
            some = jax.tree.map(lambda x, batch=batch: x[batch], sample)
            key = jax.random.fold_in(rng.key(seed, "likelihood", 3), index * len(sample.z) + first)
            found, times = _weighted_errors(model, params, run.settings.path, some, key, jnp.float32(index / draws))
            bins = np.clip(np.searchsorted(edges, times, side="right") - 1, 0, len(edges) - 2)
            for part in range(len(parts)):
                parts[part, batch] += np.where(bins == part, found, 0.0).sum(axis=1) / draws
            tenths = np.minimum((np.asarray(times) * 10).astype(int), 9)
            squares += np.bincount(tenths.ravel(), np.square(np.asarray(found, np.float64)).ravel(), 10)
    total = parts.sum(axis=0)
    means = [
        (float(low), float(high), per_token(part, sample.tokens))
        for low, high, part in zip(edges[:-1], edges[1:], parts, strict=True)
    ]
    excess = None if sample.entropy is None else per_token(total - sample.entropy, sample.tokens)
    bits = (total + sample.reconstruction) / math.log(2)
    return Bound(
        per_token(total, sample.tokens),
        means,
        excess,
        per_token(sample.reconstruction, sample.tokens),
        per_token(bits, sample.bytes),
        # Uniform times: a part has as many draws as another. The best proposal goes with the root of the mean square.
        tuple((np.sqrt(squares) / np.sqrt(squares).sum()).tolist()),
    )
