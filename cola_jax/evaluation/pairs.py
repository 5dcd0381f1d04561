"""What a joint model knows of pairs of images and texts: bounds in bits, and which text is an image's own.

Texts are whole documents, as they were trained on. An image is scored given a text with the same draws for every text,
so that differences are those of the prior alone; a text is scored with the same draws given every image.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from cola_jax import likelihood, rng
from cola_jax.data import captioned_images, corpora, packing
from cola_jax.evaluation.pictures import Pairs, instructions
from cola_jax.evaluation.statistics import Mean, Proportion, per_token
from cola_jax.fields import require
from cola_jax.likelihood import estimators
from cola_jax.likelihood import images as image_likelihood
from cola_jax.likelihood.estimators import Likelihood
from cola_jax.likelihood.images import bits_per_dimension
from cola_jax.likelihood.pixels import Pixels
from cola_jax.likelihood.settings import Settings
from cola_jax.runs import Run
from cola_jax.sampling import images as sampling

Log = Callable[[str], None]
TOPS = (1, 3)  # first places that are counted
_FITTED = 64  # training images that the scale of pixels is fitted on


def of_file(run: Run, path: str) -> Pairs:
    """All pairs of a file of JSON lines, whose fields are those of the run's config (`config.data.text_field`).

    Raises:
      UserError: something in it cannot be read.
    """
    data = run.config.data
    fields = captioned_images.Fields(data.text_field, data.image_field)
    found = captioned_images.scan(path, fields, "fail")
    chosen = range(len(found.positions))
    pictures = np.stack([found.picture(i, data.image_size) for i in chosen])
    return Pairs([found.caption(i) for i in chosen], pictures)


def fitted(run: Run, seed: int, count: int = _FITTED) -> Pixels:
    """The observation model under which the run's first training images are most likely."""
    found = corpora.pictures(run.config.data, "train", run.config.data_seed)
    images = np.stack([found[i] for i in range(min(count, len(found)))])
    return image_likelihood.fit(run.model, run.params, images, rng.key(seed, "likelihood", 1))


def candidates(captions: Sequence[str], count: int, seed: int) -> np.ndarray:
    """For each pair the indices of ``count`` different texts [n, count], its own first, the others drawn at random.

    Raises:
      UserError: there are not so many different texts.
    """
    different = {text: index for index, text in reversed(list(enumerate(captions)))}
    require(1 < count <= len(different), "candidates", count, f"from 2 to the {len(different)} different texts")
    draw, found = np.random.default_rng(seed), []
    for index, text in enumerate(captions):
        others = [place for other, place in different.items() if other != text]
        found.append([index, *draw.choice(others, count - 1, replace=False)])
    return np.array(found)


class Row(NamedTuple):
    """Something to score: the index of an image (-1: none) and of a text (-1: none)."""

    image: int
    text: int


def image_scores(
    run: Run, pairs: Pairs, rows: Sequence[Row], observed: Pixels, settings: Settings, seed: int, log: Log
) -> Likelihood:
    """``log p(image)`` of each row given its text (`likelihood.images.log_likelihood`)."""
    data, key = run.config.data, rng.key(seed, "likelihood")
    texts = _tokens(run, pairs.captions)

    def score(part: Sequence[Row]) -> Likelihood:
        told = sampling.rows([texts[row.text] if row.text >= 0 else [] for row in part], data.sequence_length)
        before = sampling.text_before(run.model, run.params, told)
        ids = [row.image for row in part]
        return image_likelihood.log_likelihood(
            run.model, run.params, pairs.pictures[ids], observed, settings, key, before, ids
        )

    return _scored(score, rows, settings, log, "images scored")


def text_scores(run: Run, pairs: Pairs, rows: Sequence[Row], settings: Settings, seed: int, log: Log) -> Likelihood:
    """``log p(text)`` of each row given its image, or of all given nothing (`likelihood.log_likelihood`)."""
    data, key = run.config.data, rng.key(seed, "likelihood")
    texts, given = _tokens(run, pairs.captions), rows[0].image >= 0

    def score(part: Sequence[Row]) -> Likelihood:
        told = sampling.rows([texts[row.text] for row in part], data.sequence_length)
        params = run.params
        if given:
            pictures = pairs.pictures[[row.image for row in part]]
            params = sampling.conditioned(run.model, params, pictures, instructions(run, len(part)))
        ids = [row.text for row in part]
        return likelihood.log_likelihood(run.model, params, told["tokens"], settings, key, told["segment_ids"], ids=ids)

    return _scored(score, rows, settings, log, "texts scored given images" if given else "texts scored alone")


def _tokens(run: Run, texts: Sequence[str]) -> list[list[int]]:
    return [packing.document_tokens(text, run.tokenizer, run.config.data.align).tolist() for text in texts]


def _scored(score: Callable, rows: Sequence[Row], settings: Settings, log: Log, what: str) -> Likelihood:
    """The rows' scores, some at a time: as many as the settings let be solved, the last ones filled up."""
    size, found = min(max(1, settings.rows // settings.samples), len(rows)), []
    for start in range(0, len(rows), size):
        part = list(rows[start : start + size])
        scores = score(part + part[-1:] * (size - len(part)))
        found.append(estimators.take(scores, range(len(part))))
        log(f"{what}: {start + len(part)} of {len(rows)}")
    return estimators.join(found)


def best(scores: Likelihood) -> np.ndarray:
    """The highest bound that there is of each row: the IWAE with the exact divergence, else the ELBO."""
    return np.where(np.isnan(scores.iwae), scores.elbo, scores.iwae)


def top(scores: np.ndarray, places: Sequence[int] = TOPS) -> dict[str, Proportion]:
    """How often the first candidate is among the likeliest.

    Args:
      scores: [n, c]; the true candidate is the first. It comes behind those that are as likely. Rows with nan (a solve
        that failed) do not count.
      places: numbers k; those of c or more are left out.
    """
    scores = scores[np.isfinite(scores).all(axis=1)]
    place = (scores[:, 1:] >= scores[:, :1]).sum(axis=1)
    return {f"top_{k}": Proportion(int((place < k).sum()), len(place)) for k in places if k < scores.shape[1]}


def report(
    run: Run, pairs: Pairs, observed: Pixels, settings: Settings, count: int, seed: int, log: Log
) -> dict[str, dict[str, Mean | Proportion]]:
    """Bounds of the images, and how often their own texts fit best among ``count`` candidates.

    Returns:
      "bits_per_dimension": bounds on an image given its own text, none, and another pair's, and the two parts of the
      first: reconstruction and rate, ``log q - log p`` of the latents. "nats_per_image": the rate, and what the own
      text saves over no text and over another's (below 0: it costs). Means over images with their errors.
      "image_given_text", "text_given_image", "text_given_image_over_text": `top` by log p(image | text), by
      log p(text | image), and by the latter less log p(text).

    Raises:
      UserError: see `candidates`.
    """
    chosen = candidates(pairs.captions, count, seed)
    rows = [Row(i, j) for i, texts in enumerate(chosen) for j in (*texts, -1)]
    scores = image_scores(run, pairs, rows, observed, settings, seed, log)
    by_image = best(scores).reshape(len(chosen), count + 1)
    own = estimators.take(scores, range(0, len(rows), count + 1))
    found = {"bits_per_dimension": _bits(by_image, own), "nats_per_image": _nats(by_image, own)}
    note = lambda name: log(f"{name}: " + ", ".join(f"{key} {value}" for key, value in found[name].items()))  # noqa: E731
    note("bits_per_dimension")
    note("nats_per_image")
    rows = [Row(i, j) for i, texts in enumerate(chosen) for j in texts]
    given = best(text_scores(run, pairs, rows, settings, seed, log)).reshape(chosen.shape)
    used = np.unique(chosen)
    alone = np.full(len(pairs.captions), np.nan)
    alone[used] = best(text_scores(run, pairs, [Row(-1, j) for j in used], settings, seed, log))
    ranked = {
        "image_given_text": by_image[:, :-1],
        "text_given_image": given,
        "text_given_image_over_text": given - alone[chosen],
    }
    for name, values in ranked.items():
        found[name] = top(values)
        note(name)
    return found


def _bits(by_image: np.ndarray, own: Likelihood) -> dict[str, Mean]:
    """Means over images in bits per dimension, of those whose solves did not fail."""
    ok = np.isfinite(by_image).all(axis=1)
    columns = {"own_text": by_image[:, 0], "no_text": by_image[:, -1], "other_text": by_image[:, 1]}
    columns |= {"reconstruction": own.reconstruction, "rate": own.prior - own.posterior}
    return {name: per_token(bits_per_dimension(x[ok], 1), own.tokens[ok]) for name, x in columns.items()}


def _nats(by_image: np.ndarray, own: Likelihood) -> dict[str, Mean]:
    """Means over the same images in nats."""
    ok = np.isfinite(by_image).all(axis=1)
    first, other, nothing = by_image[:, 0], by_image[:, 1], by_image[:, -1]
    columns = {"rate": own.posterior - own.prior}
    columns |= {"saved_over_no_text": first - nothing, "saved_over_other_text": first - other}
    return {name: per_token(x[ok], np.ones(ok.sum())) for name, x in columns.items()}


def as_dict(found: dict[str, dict[str, Mean | Proportion]]) -> dict:
    """JSON-able: means and 95 % intervals."""
    return {
        name: {key: {"mean": value.mean, "interval": _interval(value)} for key, value in values.items()}
        for name, values in found.items()
    }


def _interval(value: Mean | Proportion) -> tuple[float, float]:
    if isinstance(value, Proportion):
        return value.interval
    return value.mean - 1.959964 * value.error, value.mean + 1.959964 * value.error
