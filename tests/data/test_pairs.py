"""Captions with pictures: how they are divided, read and refused, and the batches that come of them."""

import dataclasses
import hashlib
import io
import json
import logging
import pickle

import jax
import numpy as np
import pytest
from corpus_files import tfds_builder
from PIL import Image

from cola_jax import fields, sharding
from cola_jax.config import DataConfig, ScenesConfig, TrainConfig
from cola_jax.data import (
    captioned_images,
    corpora,
    inspection,
    pipeline,
    run_tokenizer,
    scene_pairs,
    tfds_records,
    tokenizers,
)
from cola_jax.data.scenes import Scenes
from cola_jax.train.trainer import Batches
from cola_jax.types import UserError

TOKENIZER = tokenizers.ByteTokenizer()
COMMON = {"packing": "pad", "tokenizer": "bytes", "batch_size": 4, "sequence_length": 128}


def scenes(**changes) -> DataConfig:
    return DataConfig(**{**COMMON, "corpus": "scenes", "image_size": 32, "num_scenes": 60, "holdout": 0.2, **changes})


def coloured(number: int, size=(8, 8)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size, 3)).astype(np.uint8))


def write(folder, lines, name="captions.jsonl"):
    """A JSONL file; images that are not there yet are made, one for each name."""
    for number, line in enumerate(lines):
        path = folder / line["image"] if isinstance(line, dict) and "image" in line else None
        if path is not None and not path.exists():
            path.parent.mkdir(exist_ok=True)
            coloured(number).save(path)
    content = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    (folder / name).write_text("\n".join(content), encoding="utf-8")
    return folder / name


def images(path, **changes) -> DataConfig:
    return DataConfig(**{**COMMON, "corpus": "images", "files": str(path), "image_size": 8, "holdout": 0.3, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 images, each of the captions 0 to 19 twice, in two styles."""
    place = tmp_path_factory.mktemp("images")
    lines = [
        {"image": f"{style}/{k}.png", "text": f"thing number {k}", "style": style}
        for style in ("flat", "round")
        for k in range(20)
    ]
    return write(place, lines)


def take(config: DataConfig, count: int, tokenizer=TOKENIZER, seed: int = 0, **options) -> list[dict]:
    iterator = iter(pipeline.create(config, tokenizer, "train", seed, **options))
    try:
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


def same(first: list[dict], second: list[dict]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True)
    )


# ---- scenes ---------------------------------------------------------------------


def test_captions_and_pictures_of_scenes_belong_together():
    config, grammar = scenes(image_size=64), Scenes()
    for split, count in (("train", 60), ("holdout", 12)):
        texts, pictures = (make(config, split, 3) for make in (corpora.documents, corpora.pictures))
        assert len(texts) == len(pictures) == len(corpora.scenes(config, split, 3)) == count
        assert all(grammar.shows(pictures[k], texts[k]).all for k in range(count))
        copy = pickle.loads(pickle.dumps(pictures))
        assert all(np.array_equal(copy[k], pictures[k]) for k in reversed(range(count)))
        with pytest.raises(IndexError):
            pictures[count]


def test_neither_a_caption_nor_a_picture_is_in_both_splits_of_scenes():
    # Few enough that most occur several times.
    config = scenes(scenes=ScenesConfig(max_shapes=1, colours=2, kinds=2, sizes=False), num_scenes=500)
    found = {}
    for split in ("train", "holdout"):
        pairs = list(corpora.scenes(config, split, 0))
        texts = list(corpora.documents(config, split, 0))
        assert len(set(texts)) < len(texts)
        found[split] = set(texts), {scene.shapes for scene in pairs}
    assert not found["train"][0] & found["holdout"][0] and not found["train"][1] & found["holdout"][1]
    other = {scene.shapes for scene in corpora.scenes(config, "train", 1)}  # whatever the seed
    assert not other & found["holdout"][1]


def test_scenes_that_cannot_be_divided_are_a_user_error(monkeypatch):
    monkeypatch.setattr(scene_pairs, "_ATTEMPTS", 50)
    config = scenes(scenes=ScenesConfig(max_shapes=1, colours=1, kinds=1, sizes=False), holdout=1e-6)
    with pytest.raises(UserError, match=r"config\.data\.holdout = 1e-06: must be a share"):
        corpora.documents(config, "holdout", 0)[0]


# ---- image files ------------------------------------------------------------------


def test_images_are_divided_by_caption_and_by_image(folder):
    config = images(folder)
    found = {split: list(corpora.documents(config, split, 0)) for split in ("train", "holdout")}
    assert sorted(found["train"] + found["holdout"]) == sorted(f"thing number {k}" for k in [*range(20)] * 2)
    assert not set(found["train"]) & set(found["holdout"]) and len(found["holdout"]) >= 4
    for split, texts in found.items():
        pictures = corpora.pictures(config, split, 0)
        for text, image in zip(texts, pictures, strict=True):
            assert image.dtype == np.uint8 and image.shape == (8, 8, 3)
            number = int(text.rpartition(" ")[2])
            assert any(np.array_equal(image, coloured(number + more)) for more in (0, 20))
        copy = pickle.loads(pickle.dumps(pictures))
        assert np.array_equal(copy[1], pictures[1])


def test_an_image_with_several_captions_is_in_one_split(tmp_path):
    lines = [{"image": f"{k}.png", "text": f"{word} {k}"} for k in range(30) for word in ("one", "two", "three")]
    coloured(0).save(tmp_path / "0.png")
    coloured(0).save(tmp_path / "1.png")  # the same image by another name
    found = {s: list(corpora.documents(images(write(tmp_path, lines)), s, 0)) for s in ("train", "holdout")}
    numbers = {split: {text.split()[1] for text in texts} for split, texts in found.items()}
    assert not numbers["train"] & numbers["holdout"] and len(numbers["holdout"]) > 3
    assert any({"0", "1"} <= each for each in numbers.values())


def test_a_group_is_in_one_split(tmp_path):
    """A name drawn in two styles, which the caption says."""
    styles = ("flat", "round")
    lines = [{"image": f"{k}{s}.png", "text": f"{s} {k}", "name": str(k)} for k in range(30) for s in styles]
    path = write(tmp_path, lines)
    parted, together = (
        {s: {text.split()[1] for text in corpora.documents(config, s, 0)} for s in ("train", "holdout")}
        for config in (images(path), images(path, group_field="name"))
    )
    assert parted["train"] & parted["holdout"]
    assert not together["train"] & together["holdout"] and len(together["holdout"]) > 3
    assert corpora.describe(images(path), 0) != corpora.describe(images(path, group_field="name"), 0)
    with pytest.raises(UserError, match=r"line 1: no field 'none'; it has 'image', 'text', 'name'"):
        corpora.documents(images(path, group_field="none"), "train", 0)


@pytest.mark.parametrize("number", range(200, 206))
def test_pairs_that_hang_together_have_one_position(number):
    """Against a closure by brute force."""
    generator = np.random.default_rng(number)
    pairs = [(f"c{a}", f"g{b}", b"%d" % c) for a, b, c in generator.integers(0, 18, (14, 3))]
    group = [{k} for k in range(len(pairs))]
    for _ in pairs:
        for i, one in enumerate(pairs):
            for j, two in enumerate(pairs):
                if any(a == b for a, b in zip(one, two, strict=True)):
                    group[i] = group[j] = group[i] | group[j]
    made = [captioned_images._Pair(None, caption, by, None) for caption, by, _ in pairs]
    positions = captioned_images._positions(made, [digest for *_, digest in pairs])
    for i in range(len(pairs)):
        for j in range(len(pairs)):
            assert (positions[i] == positions[j]) == (j in group[i])


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_what_is_transparent_is_white():
    image = np.zeros((4, 4, 4), np.uint8)
    image[:, :2] = (200, 0, 0, 255)
    image[:, 2] = (0, 0, 0, 128)
    found = captioned_images.decode(encoded(Image.fromarray(image, "RGBA")), 4)
    assert (found[:, :2] == (200, 0, 0)).all() and (found[:, 3] == 255).all()
    assert abs(found[:, 2].astype(int) - 127).max() <= 1
    grey = captioned_images.decode(encoded(Image.fromarray(np.full((4, 4), 7, np.uint8))), 4)
    assert (grey == 7).all()
    palette = Image.fromarray(np.eye(4, dtype=np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    found = captioned_images.decode(encoded(palette, transparency=0), 4)
    assert (found[0, 0] == (40, 50, 60)).all() and (found[0, 1] == 255).all()


def test_images_are_resized_by_their_shorter_side_and_cut_to_their_middle():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = (0, 250, 0)
    for size in (10, 5, 20):  # as it is, smaller, larger
        found = captioned_images.decode(encoded(Image.fromarray(wide)), size)
        middle = found[1:-1, size // 4 : -(size // 4)]
        assert found.shape == (size, size, 3) and (abs(middle.astype(int) - (0, 250, 0)) < 12).all()
    tall = captioned_images.decode(encoded(Image.fromarray(wide.transpose(1, 0, 2))), 10)
    assert (tall == (0, 250, 0)).all()
    checks = np.indices((16, 16)).sum(0) % 2 * 255  # too fine to be kept: grey, if it is averaged
    found = captioned_images.decode(encoded(Image.fromarray(checks.astype(np.uint8))), 4)
    assert abs(found.astype(int) - 127).max() < 8


def test_a_photograph_is_turned_upright():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    found = captioned_images.decode(encoded(Image.fromarray(image), exif=exif), 8)
    assert (found[:4] == 0).all() and (found[4:] == 255).all()


def gif() -> bytes:
    return encoded(coloured(0), "GIF", save_all=True, append_images=[coloured(1)])


BAD = {
    "missing": ({"image": "none.png", "text": "a"}, None, "none.png: No such file or directory; must be"),
    "a folder": ({"image": ".", "text": "a"}, None, "Is a directory; must be"),
    "cut": ({"image": "bad", "text": "a"}, encoded(coloured(0, (64, 64)))[:3000], "image is broken or of no known"),
    "no image": ({"image": "bad", "text": "a"}, b"hello", "image is broken or of no known format"),
    "nothing": ({"image": "bad", "text": "a"}, b"", "image is broken or of no known format"),
    "animated": ({"image": "bad", "text": "a"}, gif(), "image is animated (2 frames): must be"),
    "16 bits": (
        {"image": "bad", "text": "a"},
        encoded(Image.fromarray(np.zeros((4, 4), np.uint16))),
        "must have 8 bits a channel",
    ),
    "no caption": ({"image": "good.png"}, None, "no field 'text'; it has 'image'"),
    "empty caption": ({"image": "good.png", "text": " \n"}, None, "field 'text' is empty: must be text"),
    "caption of another type": ({"image": "good.png", "text": 3}, None, "field 'text' is int: must be a string"),
    "half of a character": ({"image": "good.png", "text": "\ud800"}, None, "surrogate"),
    "no image field": ({"text": "a"}, None, "no field 'image'; it has 'text'"),
    "empty path": ({"image": "", "text": "a"}, None, "field 'image' is empty: must be a path"),
    "NUL": ({"image": "a\0b", "text": "a"}, None, "NUL"),
    "no JSON": ('{"image": ', None, "not JSON"),
    "no object": ("[1]", None, "list: must be a JSON object"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_or_skipped_and_counted(name, tmp_path, caplog):
    line, content, message = BAD[name]
    if content is not None:
        (tmp_path / "bad").write_bytes(content)
    good = [{"image": f"{k}.png", "text": f"good {k}"} for k in range(8)]
    path = write(tmp_path, good)
    more = line if isinstance(line, str) else json.dumps(line)
    coloured(9).save(tmp_path / "good.png")
    path.write_text(path.read_text() + f"\n\n{more}\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        corpora.documents(images(path), "train", 0)
    assert str(error.value).startswith(f"{path} line 10: ") and message in str(error.value)
    assert "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        config = images(path, on_bad_image="skip")
        found = [text for split in ("train", "holdout") for text in corpora.documents(config, split, 0)]
    assert sorted(found) == [f"good {k}" for k in range(8)]
    assert "1 of 9 images with captions are skipped; the first:" in caplog.text and "line 10" in caplog.text
    assert "1 skipped" in corpora.describe(config, 0)["images"]


def test_files_that_are_missing_or_change_are_named(tmp_path, folder):
    with pytest.raises(UserError, match="no such file"):
        corpora.documents(images(tmp_path / "none.jsonl"), "train", 0)
    with pytest.raises(UserError, match="gs:// cannot be used here"):
        corpora.documents(images("gs://bucket/a.jsonl"), "train", 0)
    for name in ("a.jsonl", "b.jsonl"):
        path = write(tmp_path, [{"image": f"{k}.png", "text": f"{k}"} for k in range(9)], name)
    with pytest.raises(UserError, match="2 files; must be one file"):
        corpora.documents(images(tmp_path / "*.jsonl"), "train", 0)
    pictures = corpora.pictures(images(path), "train", 0)
    for k in range(9):
        coloured(k + 50).save(tmp_path / f"{k}.png")
    with pytest.raises(UserError, match=r"b\.jsonl line \d+: the image has changed while it was read"):
        pictures[0]
    with pytest.raises(UserError, match="config.data.corpus = 'stories': must be a corpus with pictures"):
        corpora.pictures(DataConfig(), "train", 0)


def test_pairs_of_tfds(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    features = tfds.features.FeaturesDict({"photo": tfds.features.Image(), "caption": tfds.features.Text()})
    found = [{"photo": io.BytesIO(encoded(coloured(k))), "caption": f"number {k}"} for k in range(12)]
    tfds_builder(tmp_path, features, "train", found).download_and_prepare(file_format="array_record")
    opened = tfds_records.open_source
    monkeypatch.setattr(tfds_records, "open_source", lambda *a, **k: opened(a[0], a[1], a[2], str(tmp_path), a[4], **k))
    captioned_images._scan_records.cache_clear()
    config = images("mine", corpus="tfds", text_field="caption", image_field="photo")
    fields.check(config, "")
    seen = {}
    for split in ("train", "holdout"):
        pictures = pickle.loads(pickle.dumps(corpora.pictures(config, split, 0)))
        seen |= dict(zip(corpora.documents(config, split, 0), pictures, strict=True))
    assert len(seen) == 12 and all(np.array_equal(seen[f"number {k}"], coloured(k)) for k in range(12))
    assert "12 records" in corpora.describe(config, 0)["images"]
    with pytest.raises(UserError, match="no feature 'image'; it has 'caption', 'photo'"):
        corpora.documents(dataclasses.replace(config, image_field="image"), "train", 0)
    captioned_images._scan_records.cache_clear()


# ---- batches ----------------------------------------------------------------------


@pytest.fixture(params=["scenes", "images"])
def config(request, folder):
    return scenes() if request.param == "scenes" else images(folder)


def test_batches_have_captions_and_their_pictures(config):
    texts, pictures = (make(config, "train", 5) for make in (corpora.documents, corpora.pictures))
    expected = {(text, hashlib.sha256(pictures[k].tobytes()).digest()) for k, text in enumerate(texts)}
    seen = set()
    epoch = -(-len(texts) // 4)
    for batch in take(config, epoch, seed=5):
        assert batch.keys() == {"tokens", "segment_ids", "image"}
        assert batch["image"].dtype == np.uint8
        assert batch["image"].shape == (4, config.image_size, config.image_size, 3)
        for row in range(4):
            text = TOKENIZER.decode(batch["tokens"][row][batch["segment_ids"][row] > 0].tolist())
            seen.add((text, hashlib.sha256(batch["image"][row].tobytes()).digest()))
    assert seen == expected


def test_the_last_held_out_batch_is_filled_up_with_zeros(config):
    count = len(corpora.documents(config, "holdout", 0))
    config = dataclasses.replace(config, batch_size=count - 1, instruction_length=64)
    batches = list(pipeline.create(config, TOKENIZER, "holdout", 0))
    assert len(batches) == 2
    last = batches[1]
    assert (last["segment_ids"][0] > 0).any() and last["image"][0].any()
    for name, filler in (("segment_ids", 0), ("image", 0), ("instruction_segment_ids", 0), ("tokens", 257)):
        assert (last[name][1:] == filler).all()
    if config.corpus == "images":  # in the order of the file under every seed
        others = list(pipeline.create(config, TOKENIZER, "holdout", 7))
        for name in ("tokens", "image"):
            assert all(np.array_equal(a[name], b[name]) for a, b in zip(batches, others, strict=True))


def test_batches_depend_on_seed_and_step_alone(config):
    config = dataclasses.replace(config, instruction_length=64, random_offset=3)
    batches = take(config, 6)
    assert same(batches, take(config, 6)) and not same(batches, take(config, 6, seed=1))
    shares = [take(config, 6, wanted=[row]) for row in range(4)]
    joined = [{name: np.concatenate([s[k][name] for s in shares]) for name in batches[0]} for k in range(6)]
    assert same(joined, batches)
    iterator = iter(pipeline.create(config, TOKENIZER, "train", 0))
    next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    assert state == {"step": 1}
    iterator = iter(pipeline.create(config, TOKENIZER, "train", 0))
    iterator.set_state(state)
    assert same([next(iterator) for _ in range(5)], batches[1:])
    iterator.close()
    assert inspection.digest(config, TOKENIZER, 0, 1, 4, 1) == inspection.digest(config, TOKENIZER, 0, 1, 4, 2)


def test_workers_read_the_same(folder):
    config = images(folder, instruction_length=64)
    assert same(take(dataclasses.replace(config, num_workers=1), 4), take(config, 4))


def test_the_rows_of_a_batch_have_one_task(config):
    config = dataclasses.replace(config, task_shares=(1.0, 1.0, 1.0))
    tasks = np.array([batch["task"] for batch in take(config, 30)])
    assert np.all(tasks == tasks[:, :1]) and set(tasks[:, 0]) == {0, 1, 2}
    part = np.array([batch["task"] for batch in take(config, 30, wanted=[1])])
    np.testing.assert_array_equal(part[:, 0], tasks[:, 0])  # whatever rows a process has
    held_out = [batch["task"][0] for batch in pipeline.create(config, TOKENIZER, "holdout", 0)]
    assert held_out == [number % 3 for number in range(len(held_out))]


def test_instructions_are_drawn_for_each_row(config):
    config = dataclasses.replace(config, instruction_length=48, align=8)
    found = []
    for batch in take(config, 40):
        assert batch["instruction"].dtype == batch["instruction_segment_ids"].dtype == np.int32
        assert batch["instruction"].shape == batch["instruction_segment_ids"].shape == (4, 48)
        for ids, segments in zip(batch["instruction"], batch["instruction_segment_ids"], strict=True):
            length = int(segments.sum())
            assert (segments[:length] == 1).all() and ids[length - 1] == 256 and length % 8 == 0
            assert (ids[length:] == TOKENIZER.pad_id).all()
            found.append(TOKENIZER.decode(ids.tolist()))
    counts = {text: found.count(text) for text in config.instructions}
    assert sum(counts.values()) == 160 and all(15 < count < 55 for count in counts.values())  # 32 expected, deviation 5
    with pytest.raises(UserError, match="instruction_length = 24: must be at least 32, the tokens of 'What does"):
        pipeline.create(dataclasses.replace(config, instruction_length=24), TOKENIZER, "train", 0)


def test_a_caption_that_does_not_fit_is_named_or_skipped(tmp_path, caplog):
    lines = [{"image": f"{k}.png", "text": f"{k}" + "x" * 20 * (k == 3)} for k in range(8)]
    path = write(tmp_path, lines)
    fits = images(path, sequence_length=22)
    assert len(take(fits, 1)) == 1
    for short in (dataclasses.replace(fits, sequence_length=21), dataclasses.replace(fits, random_offset=1)):
        with pytest.raises(UserError) as error:
            for split in ("train", "holdout"):
                pipeline.create(short, TOKENIZER, split, 0)
        assert str(error.value).startswith(f"{path} line 4: the caption has 22 tokens with its end; config.data.seq")
        with caplog.at_level(logging.WARNING):
            lenient = dataclasses.replace(short, on_bad_image="skip")
            rows = take(lenient, 9) + list(pipeline.create(lenient, TOKENIZER, "holdout", 0))
        texts = {TOKENIZER.decode(ids.tolist()) for batch in rows for ids in batch["tokens"]}
        assert texts - {""} == {"0", "1", "2", "4", "5", "6", "7"} and "1 of" in caplog.text
    with pytest.raises(UserError, match="scene .*: the caption has .* must be at least"):
        take(scenes(sequence_length=16), 1)


def test_the_fingerprint_tells_pictures_apart(folder, tmp_path):
    def of(config: DataConfig) -> str:
        return json.dumps(pipeline.fingerprint(config, TOKENIZER, 0))

    base = scenes()
    others = [
        scenes(image_size=64),
        scenes(scenes=ScenesConfig(kinds=2)),
        scenes(num_scenes=61),
        scenes(instruction_length=64),
        scenes(instruction_length=64, instructions=("What is it?",)),
        scenes(holdout=0.1),
        images(folder),
        images(folder, image_size=9),
    ]
    assert len({of(each) for each in [base, *others]}) == len(others) + 1
    assert of(scenes(instructions=("What is it?",))) == of(base)  # no row has one
    lines = [{"image": f"{k}.png", "text": f"{k}"} for k in range(9)]
    path = write(tmp_path, lines)
    before = of(images(path))
    coloured(77).save(tmp_path / "3.png")
    captioned_images._scan.cache_clear()
    assert of(images(path)) != before
    text = pipeline.fingerprint(DataConfig(), TOKENIZER, 0)
    assert not {"image_size", "instructions", "scenes"} & text.keys()


def test_a_tokenizer_is_trained_on_captions_and_instructions(config, tmp_path):
    config = dataclasses.replace(config, tokenizer="sentencepiece", vocab_size=600, instruction_length=32)
    tokenizer = run_tokenizer.create(config, tmp_path / "tokenizer.model")
    texts = corpora.documents(config, "train", 0)
    for text in (*config.instructions, texts[0], texts[1]):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer.encode(text)) < len(text) / 2
    assert take(config, 1, tokenizer)[0]["instruction_segment_ids"].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": "scenes", "image_size": 0}, "image_size = 0: must be at least 32 (corpus = 'scenes')"),
        ({"corpus": "scenes", "image_size": 31}, "image_size = 31: must be at least 32 (corpus = 'scenes')"),
        ({"corpus": "scenes", "packing": "concat"}, "packing = 'concat': must be 'pad' for pictures"),
        ({"corpus": "images", "files": ""}, "files = '': must be a JSONL file with images and captions"),
        ({"corpus": "images", "files": "a", "image_size": 0}, "image_size = 0: must be at least 1"),
        ({"corpus": "stories", "image_size": 8}, "image_size = 8: must be 0 with corpus = 'stories'"),
        ({"corpus": "stories", "image_size": 0, "instruction_length": 8}, "instruction_length = 8: must be 0 without"),
        ({"corpus": "scenes", "instruction_length": 8, "instructions": ()}, "instructions = (): must be one text or"),
        ({"corpus": "scenes", "instruction_length": 8, "instructions": ("a", " ")}, "none of them empty"),
        ({"corpus": "scenes", "scenes": ScenesConfig(colours=7)}, "scenes.colours = 7: must be from 1 to 6"),
        ({"corpus": "scenes", "on_bad_image": "stop"}, "on_bad_image = 'stop': must be one of 'fail', 'skip'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError) as error:
        fields.check(dataclasses.replace(scenes(), **changes), "config.data.")
    assert message in str(error.value)
    fields.check(scenes(), "config.data.")


def test_images_reach_the_devices_as_they_are():
    """Eight devices, rank 4 and one byte a value; tokens are counted in the captions alone."""
    config = scenes(batch_size=8, instruction_length=64)
    mesh = sharding.make_mesh(TrainConfig(mesh_data=4, mesh_fsdp=2))
    batches = Batches(pipeline.create(config, TOKENIZER, "train", 0), mesh, 8)
    expected = take(config, 2)
    for each in expected:
        placed = next(batches)
        assert placed["image"].dtype == np.uint8 and placed["image"].sharding == sharding.batch_sharding(mesh)
        assert {shard.data.shape for shard in placed["image"].addressable_shards} == {(1, 32, 32, 3)}
        assert same([jax.device_get(placed)], [each])
        assert batches.tokens == np.count_nonzero(each["segment_ids"])
    assert json.loads(batches.position) == {"step": 2}
    batches.close()
