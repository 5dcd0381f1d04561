"""How well a joint model of text and images has learnt the corpus `scenes`, judged by a program that reads pictures.

A picture is right if it shows what its caption says; a caption, if it is true of its picture and names all of its
shapes (`cola_jax.data.scenes`).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cola_jax.data.scenes import Scenes
from cola_jax.evaluation.pictures import Log, describe, draw, held_out, reconstructed, write
from cola_jax.evaluation.statistics import Proportion
from cola_jax.runs import Run
from cola_jax.sampling.images import ImageSettings

SCALES, STEPS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0), (1, 2, 4, 8, 16, 32)


def judge_pictures(known: Scenes, pictures: np.ndarray, captions: Sequence[str]) -> dict[str, Proportion]:
    """Shares of the pictures that show what their captions say, in all and by what is right."""
    verdicts = [known.shows(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
    return {
        name: Proportion(sum(bool(getattr(v, name)) for v in verdicts), len(verdicts)) for name in verdicts[0]._fields
    }


def judge_captions(known: Scenes, captions: Sequence[str], pictures: np.ndarray) -> dict[str, Proportion]:
    """Shares of the captions that are true of their pictures, complete, and both."""
    pairs = list(zip(captions, pictures, strict=True))
    true, complete = ([judge(*pair) for pair in pairs] for judge in (known.is_true, known.is_complete))
    both = [a and b for a, b in zip(true, complete, strict=True)]
    return {
        name: Proportion(sum(values), len(values))
        for name, values in (("true", true), ("complete", complete), ("true_and_complete", both))
    }


def judge_reconstructions(known: Scenes, pictures: np.ndarray, decoded: np.ndarray) -> dict[str, Proportion]:
    """Share of decoded pictures in which the checker sees the same shapes, places included."""
    same = [
        found.valid and sorted(found.shapes) == sorted(known.see(picture).shapes)
        for picture, found in zip(pictures, map(known.see, decoded), strict=True)
    ]
    return {"same": Proportion(sum(same), len(same))}


def as_dict(shares: dict[str, Proportion]) -> dict:
    """JSON-able: means and intervals."""
    return {
        name: {"mean": share.mean, "interval": share.interval, "count": share.total} for name, share in shares.items()
    }


def curves(
    run: Run,
    settings: ImageSettings,
    count: int,
    seed: int,
    log: Log,
    scales: Sequence[float] = SCALES,
    steps: Sequence[int] = STEPS,
) -> dict[str, dict[float, dict[str, Proportion]]]:
    """Scores of images for texts (`judge_pictures`) by guidance and by steps, the other as in ``settings``."""
    pairs, known = held_out(run, count), Scenes(run.config.data.scenes)
    found: dict[str, dict[float, dict[str, Proportion]]] = {"guidance_scale": {}, "steps": {}}
    for field, values in (("guidance_scale", scales), ("steps", steps)):
        for value in values:
            now = dataclasses.replace(settings, **{field: value})
            shares = judge_pictures(known, draw(run, pairs.captions, now, seed, lambda line: None), pairs.captions)
            log(f"{field} {value:g}: " + ", ".join(f"{name} {share}" for name, share in shares.items()))
            found[field][value] = shares
    return found


def report(run: Run, count: int, seed: int, log: Log) -> dict[str, dict[str, Proportion]]:
    """All scores of a run, by task: reconstruction, text_to_image, image_to_text, text, image."""
    known, pairs = Scenes(run.config.data.scenes), held_out(run, count)
    count, drawing = len(pairs.captions), run.config.image_sample
    found = {}

    def note(name: str, shares: dict[str, Proportion]) -> None:
        found[name] = shares
        log(f"{name}: " + ", ".join(f"{key} {value}" for key, value in shares.items()))

    note("reconstruction", judge_reconstructions(known, pairs.pictures, reconstructed(run, pairs.pictures, log)))
    note("text_to_image", judge_pictures(known, draw(run, pairs.captions, drawing, seed, log), pairs.captions))
    told = describe(run, pairs.pictures, run.settings, seed, log)
    note("image_to_text", judge_captions(known, told, pairs.pictures))
    written = [known.parse(text) is not None for text in write(run, count, run.settings, seed, log)]
    note("text", {"coherent": Proportion(sum(written), count)})
    seen = [known.see(picture).valid for picture in draw(run, [""] * count, drawing, seed + 1, log)]
    note("image", {"valid": Proportion(sum(seen), count)})
    return found
