"""What a joint model of text and images makes of a corpus of captioned images, whatever they show.

`reconstructed`, `draw`, `describe`, `write` make; `reconstruction` and `probe` measure. What the pictures of `scenes`
show is judged in `cola_jax.evaluation.scenes`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cola_jax import rng
from cola_jax.data import corpora
from cola_jax.data.hashing import Split
from cola_jax.evaluation.statistics import Mean, Proportion
from cola_jax.models.image_vae import to_uint8
from cola_jax.objectives.unified import image_latents
from cola_jax.runs import Run
from cola_jax.sampling import images as sampling
from cola_jax.sampling.images import ImageSettings
from cola_jax.types import UserError

Log = Callable[[str], None]
_ROWS = 64  # pictures or texts made at a time
_RIDGE = 0.1  # of a probe, a share of the number of pictures: latents are about of unit variance


class Pairs(NamedTuple):
    """Captions and their pictures, uint8 [n, S, S, 3]."""

    captions: list[str]
    pictures: np.ndarray


def held_out(run: Run, count: int, split: Split = "holdout") -> Pairs:
    """The first held-out pairs of a run's corpus, at most ``count``; or those of the other split."""
    config, seed = run.config.data, run.config.data_seed
    captions, pictures = (make(config, split, seed) for make in (corpora.documents, corpora.pictures))
    chosen = range(min(count, len(captions)))
    return Pairs([captions[i] for i in chosen], np.stack([pictures[i] for i in chosen]))


def _chunks(count: int, log: Log, what: str):
    for start in range(0, count, _ROWS):
        yield slice(start, min(start + _ROWS, count))
        log(f"{what}: {min(start + _ROWS, count)} of {count}")


def reconstructed(run: Run, pictures: np.ndarray, log: Log) -> np.ndarray:
    """What the decoder makes of the pictures' latents (their posterior means)."""
    grid = run.model.image_vae_config.grid(*pictures.shape[1:3])

    @jax.jit
    def through(params, pixels):
        z = image_latents(run.model, params, pixels)
        return to_uint8(run.model.apply(params, z, grid, method="decode_image"))

    chunks = _chunks(len(pictures), log, "pictures reconstructed")
    return np.concatenate([np.asarray(through(run.params, pictures[chunk])) for chunk in chunks])


def draw(run: Run, captions: Sequence[str], settings: ImageSettings, seed: int, log: Log) -> np.ndarray:
    """A picture for each caption; for an empty one, from nothing."""
    known, key, found = run.family.pictures(run.config, run.tokenizer), rng.key(seed, "sample"), []
    prompts = [known.words(text) if text else [] for text in captions]
    for chunk in _chunks(len(captions), log, "pictures drawn"):
        ids = range(len(captions))[chunk]
        drawn = sampling.images(run.model, run.params, prompts[chunk], settings, key, known.size, known.length, ids)
        found.append(np.asarray(drawn.images))
    return np.concatenate(found)


def instructions(run: Run, count: int) -> dict[str, np.ndarray] | None:
    """The first of the run's instructions, ``count`` times; None for a run without instructions."""
    known = run.family.pictures(run.config, run.tokenizer)
    if not known.instruction_length:
        return None
    return sampling.rows([known.instruction] * count, known.instruction_length, "instruction")


def describe(run: Run, pictures: np.ndarray, settings: Any, seed: int, log: Log) -> list[str]:
    """A caption for each picture."""
    key, found = rng.key(seed, "sample"), []
    for chunk in _chunks(len(pictures), log, "pictures described"):
        part = pictures[chunk]
        ids = range(len(pictures))[chunk]
        said = instructions(run, len(part))
        out = sampling.captions(run.model, run.params, part, settings, key, said, sample_ids=ids)
        rows = zip(out.tokens.tolist(), out.lengths.tolist(), strict=True)
        found += [run.tokenizer.decode(tokens[:length]) for tokens, length in rows]
    return found


def write(run: Run, count: int, settings: Any, seed: int, log: Log) -> list[str]:
    """Captions from nothing."""
    key, found = rng.key(seed, "sample"), []
    for index, tokens in run.family.generate_batches(run.model, run.params, [[]] * count, settings, key, _ROWS):
        found.append(run.tokenizer.decode(tokens))
        if (index + 1) % _ROWS == 0:
            log(f"captions written from nothing: {index + 1} of {count}")
    return found


def reconstruction(pictures: np.ndarray, decoded: np.ndarray) -> dict[str, Mean]:
    """Errors of decoded pictures, means over pictures with their standard errors.

    Args:
      pictures, decoded: uint8 [n, S, S, 3].

    Returns:
      "absolute", the mean absolute error as a share of the pixels' range, and "psnr" in dB.
    """
    off = (pictures.astype(np.float64) - decoded) / 255
    squared = np.maximum(np.mean(off**2, axis=(1, 2, 3)), 1 / 255**2 / off[0].size)  # a perfect copy has no PSNR
    values = {"absolute": np.mean(np.abs(off), axis=(1, 2, 3)), "psnr": -10 * np.log10(squared)}
    return {name: Mean(float(x.mean()), float(x.std(ddof=1) / len(x) ** 0.5)) for name, x in values.items()}


def word_of(captions: Sequence[str], words: Sequence[str]) -> np.ndarray:
    """Index of the one of some words that each caption holds, int [n]; -1 where it holds none or several.

    Words are those of letters and digits, whatever their case.
    """
    held_by = [set(re.findall(r"\w+", caption.lower())) for caption in captions]
    found = [[k for k, word in enumerate(words) if word.lower() in held] for held in held_by]
    return np.array([held[0] if len(held) == 1 else -1 for held in found])


class Probe(NamedTuple):
    """A linear probe that tells words of captions by the latents of pictures.

    Attributes:
      weights: [features + 1, words].
    """

    weights: np.ndarray

    def __call__(self, run: Run, pictures: np.ndarray) -> np.ndarray:
        """Index of the word of each picture, int [n]."""
        return np.argmax(_features(run, pictures) @ self.weights, axis=1)


def probe(run: Run, words: Sequence[str], count: int) -> Probe:
    """Ridge regression on those of the first ``count`` training pictures whose captions hold one of the words.

    Raises:
      UserError: a word is in none of these captions, alone.
    """
    pairs = held_out(run, count, "train")
    held = word_of(pairs.captions, words)
    for index, word in enumerate(words):
        if not np.any(held == index):
            others = ", ".join(words)
            raise UserError(f"word {word!r}: must be in a caption of {len(held)} that has no other one of {others}")
    x, y = _features(run, pairs.pictures[held >= 0]), np.eye(len(words))[held[held >= 0]]
    return Probe(np.linalg.solve(x.T @ x + len(x) * _RIDGE * np.eye(x.shape[1]), x.T @ y))


def _features(run: Run, pictures: np.ndarray) -> np.ndarray:
    """Normalised latents, the posterior's means, and a one: [n, features + 1]."""
    encode = jax.jit(lambda params, pixels: image_latents(run.model, params, pixels))
    chunks = [encode(run.params, pictures[chunk]) for chunk in _chunks(len(pictures), lambda line: None, "")]
    flat = np.concatenate(chunks).reshape(len(pictures), -1).astype(np.float64)
    return np.concatenate([flat, np.ones((len(flat), 1))], axis=1)


def told_apart(found: np.ndarray, wanted: np.ndarray) -> Proportion:
    """Share of the pictures, of those whose captions hold one of the words, of which the probe finds it."""
    return Proportion(int(np.sum((found == wanted) & (wanted >= 0))), int(np.sum(wanted >= 0)))
