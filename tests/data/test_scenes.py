"""Scenes: pictures that a program reads back, captions with exact probabilities, and verdicts on both."""

import hashlib
import itertools
import math
from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from cola_jax import fields
from cola_jax.config import ScenesConfig
from cola_jax.data import scenes_captions as captions
from cola_jax.data import scenes_pictures as pictures
from cola_jax.data.scenes import Scene, Scenes
from cola_jax.data.scenes_captions import Clause, Facts, Named
from cola_jax.data.scenes_pictures import Shape, render
from cola_jax.data.scenes_reading import see
from cola_jax.types import UserError

SCENES = Scenes()


def drawn(count: int, seed: int = 0, scenes: Scenes = SCENES) -> list[Scene]:
    return [scenes.scene(seed, number) for number in range(count)]


def in_order(shapes) -> tuple[Shape, ...]:
    return tuple(sorted(shapes, key=lambda shape: (shape.row, shape.column)))


# ---- pictures ----------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(32, 600), (48, 200), (64, 1000), (100, 100), (128, 300), (256, 60)])
def test_a_picture_is_read_back_exactly(size, count):
    for scene in drawn(count, seed=size):
        seen = see(render(scene.shapes, size))
        assert seen.valid and seen.shapes == in_order(scene.shapes), scene


@pytest.mark.parametrize("size", [64, 128])
def test_a_picture_that_is_noisy_and_blurred_is_read_like_a_sharp_one(size):
    generator = np.random.default_rng(0)
    for scene in drawn(250, seed=1):
        blurred = ndimage.gaussian_filter(render(scene.shapes, size).astype(float), (1, 1, 0))
        noisy = np.clip(np.rint(blurred + generator.normal(0, 8, blurred.shape)), 0, 255).astype(np.uint8)
        seen = see(noisy)
        assert seen.valid and seen.shapes == in_order(scene.shapes), scene


def test_every_shape_is_told_from_every_other():
    every = itertools.product(pictures.KINDS, pictures.COLOURS, pictures.SIZES)
    for index, (kind, colour, size) in enumerate(every):
        shape = Shape(kind, colour, size, index % 3, index // 3 % 3)
        assert see(render([shape], 64)) == ((shape,), True)


def test_shapes_never_touch():
    for size in (32, 64):
        full = [Shape("square", "black", "large", column, row) for column in range(3) for row in range(3)]
        dark = (render(full, size) < 255).any(-1)
        assert ndimage.label(dark, np.ones((3, 3)))[1] == 9


def picture(*shapes: Shape, size: int = 64) -> np.ndarray:
    return render(shapes or [Shape("square", "red", "large", 1, 1)], size)


def painted(rows: slice, columns: slice, colour: tuple[int, int, int]) -> np.ndarray:
    image = picture()
    image[rows, columns] = colour
    return image


def hazy(shade: int) -> np.ndarray:
    return np.minimum(picture(), shade)


INVALID = {
    "nothing": np.full((64, 64, 3), 255, np.uint8),
    "black": np.zeros((64, 64, 3), np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8),
    "five shapes": picture(*(Shape("circle", "blue", "small", k % 3, k // 3) for k in range(5))),
    "half of it in another colour": painted(slice(0, 32), slice(24, 40), pictures.COLOURS["blue"]),
    "a hole": painted(slice(26, 38), slice(26, 38), (255, 255, 255)),
    "a corner that is missing": painted(slice(20, 32), slice(20, 32), (255, 255, 255)),
    "a colour without a name": painted(slice(20, 45), slice(20, 45), (250, 150, 190)),
    "a bar beside it": painted(slice(2, 5), slice(2, 60), (40, 80, 220)),
    "specks": painted(slice(2, 62, 10), slice(2, 62, 10), (30, 30, 30)),
    "a grey ground": hazy(230),
    "a shape between small and large": painted(slice(18, 47), slice(18, 47), (255, 255, 255)) // 255 * 255,
}
INVALID["a shape between small and large"][26:39, 26:39] = pictures.COLOURS["red"]
INVALID["a shape that is far too large"] = painted(slice(5, 59), slice(5, 59), pictures.COLOURS["red"])


@pytest.mark.parametrize("name", INVALID)
def test_what_is_no_legal_picture(name):
    assert not see(INVALID[name]).valid


def test_two_shapes_in_a_cell_are_no_legal_picture():
    image = picture(Shape("square", "red", "small", 0, 0))
    image[20:40] = image[:20]  # lower, where cell (0, 0) has ended
    assert see(image).valid and {shape.row for shape in see(image).shapes} == {0, 1}
    near = np.full((64, 64, 3), 255, np.uint8)
    shape = picture(Shape("square", "red", "small", 1, 1))[26:38, 26:38]
    near[0:12, 0:12] = near[0:12, 14:26] = shape[:12, :12]
    assert not see(near).valid


def test_a_shape_off_the_grid_is_in_the_cell_of_its_middle():
    image = np.roll(picture(Shape("triangle", "green", "small", 1, 1)), (5, -4), (0, 1))
    assert see(image) == ((Shape("triangle", "green", "small", 1, 1),), True)
    moved = np.roll(image, (0, -12), (0, 1))
    assert see(moved) == ((Shape("triangle", "green", "small", 0, 1),), True)


@pytest.mark.parametrize("call", [lambda: render([], 31), lambda: see(np.zeros((31, 31, 3), np.uint8))])
def test_a_picture_that_is_too_small_is_refused(call):
    with pytest.raises(UserError, match="size.* = 31: must be at least 32 for pictures of shapes"):
        call()


@pytest.mark.parametrize(("shape", "kind"), [((64, 64, 3), float), ((64, 32, 3), np.uint8), ((64, 64), np.uint8)])
def test_what_is_no_image_is_refused(shape, kind):
    image = np.zeros(shape, kind)
    with pytest.raises(ValueError, match="must be uint8"):
        see(image)


# ---- the distribution -----------------------------------------------------------


def test_scenes_are_a_function_of_seed_and_number():
    found = [(scene, SCENES.caption(scene)) for scene in drawn(50)]
    assert found[::-1] == [(SCENES.scene(0, k), SCENES.caption(SCENES.scene(0, k))) for k in reversed(range(50))]
    assert found != [(scene, SCENES.caption(scene)) for scene in drawn(50, seed=1)]
    digest = hashlib.sha256("".join(text for _, text in found).encode() + render(found[0][0].shapes, 64).tobytes())
    assert digest.hexdigest()[:16] == "e04060e2453f161f"
    with pytest.raises(ValueError, match="number=-1: must be"):
        SCENES.scene(0, -1)


def chi2(found: Counter, options) -> float:
    """How far counts are from uniform: its mean is the number of options less 1."""
    expected = found.total() / len(options)
    return sum((found[option] - expected) ** 2 / expected for option in options)


def test_all_that_is_drawn_is_uniform():
    scenes = drawn(8000, seed=3)
    shapes = [shape for scene in scenes for shape in scene.shapes]
    counts = {
        "number": (Counter(len(scene.shapes) for scene in scenes), range(1, 5)),
        "opening": (Counter(scene.opening for scene in scenes), range(len(captions.OPENINGS))),
        "kind": (Counter(shape.kind for shape in shapes), pictures.KINDS),
        "colour": (Counter(shape.colour for shape in shapes), list(pictures.COLOURS)),
        "size": (Counter(shape.size for shape in shapes), list(pictures.SIZES)),
        "cell": (Counter(shape[3:] for shape in shapes), list(itertools.product(range(3), range(3)))),
        "first": (Counter(scene.shapes[0].kind for scene in scenes if len(scene.shapes) == 4), pictures.KINDS),
        "said": (Counter(each.size is None for scene in scenes for each in scene.facts.shapes), [True, False]),
        "clauses": (Counter(scene.facts.clauses[1].first for scene in scenes if len(scene.shapes) == 3), [1, 2]),
        "relation": (Counter(s.facts.clauses[0].says for s in scenes if len(s.shapes) == 2), captions.RELATIONS),
    }
    for name, (found, options) in counts.items():
        assert set(found) <= set(options), name
        freedom = len(options) - 1
        assert chi2(found, options) < freedom + 4 * math.sqrt(2 * freedom), name
    assert all(len({shape[:2] for shape in scene.shapes}) == len(scene.shapes) for scene in scenes)


@pytest.mark.parametrize(
    ("config", "most", "words"),
    [
        (ScenesConfig(), 24, 40),
        (ScenesConfig(max_shapes=2, sizes=False), 15, 40),
        (ScenesConfig(relations=False), 24, 40),
        (ScenesConfig(max_shapes=3, colours=1, kinds=3), 22, 40),
    ],
)
def test_captions_say_what_is_there_and_are_read_back(config, most, words):
    scenes = Scenes(config)
    assert len(scenes.vocabulary()) <= words
    known = set(scenes.vocabulary())
    for scene in drawn(1000, scenes=scenes):
        caption = scenes.caption(scene)
        facts = scenes.parse(caption)
        assert facts == scene.facts and captions.word(facts, scene.opening) == caption
        assert [each[1:] for each in facts.shapes] == [(shape.colour, shape.kind) for shape in scene.shapes]
        assert captions.judge(facts, scene.shapes).all
        assert not config.relations or any(clause.says for clause in facts.clauses)
        assert len(caption.split()) <= most and set(caption.lower().replace(".", " .").split()) <= known
        assert -math.inf < scenes.log_prob(caption) < scenes.log_prob_given(caption, scene) < 0


# As small as they can be enumerated.
SMALL = [
    ScenesConfig(max_shapes=3, colours=2, kinds=2, sizes=False),
    ScenesConfig(max_shapes=2, colours=2, kinds=1),
    ScenesConfig(max_shapes=2, colours=2, kinds=2, relations=False),
]


def every_caption(scenes: Scenes) -> set[str]:
    """All captions that could be, and more: `log_prob` must know which are."""
    sizes = (None, *pictures.SIZES) if scenes.config.sizes else (None,)
    names = [Named(*each) for each in itertools.product(sizes, scenes.colours, scenes.kinds)]
    related = scenes.config.relations
    says = ("", *itertools.chain(*captions.PLACES), *captions.RELATIONS)
    found = set()
    for widths in [(1,), (2,), (1, 1), (2, 1), (1, 2)]:
        if sum(widths) > scenes.config.max_shapes:
            continue
        firsts = [sum(widths[:k]) for k in range(len(widths))]
        options = [
            [said for said in says if (said in captions.RELATIONS) == (width == 2) and bool(said) == related]
            for width in widths
        ]
        for shapes in itertools.product(names, repeat=sum(widths)):
            for said in itertools.product(*options):
                facts = Facts(shapes, tuple(map(Clause, firsts, said)))
                found |= {captions.word(facts, opening) for opening in range(len(captions.OPENINGS))}
    return found


@pytest.mark.parametrize("config", SMALL, ids=str)
def test_probabilities_add_up_and_give_the_entropy(config):
    scenes = Scenes(config)
    logs = [value for text in every_caption(scenes) if (value := scenes.log_prob(text)) > -math.inf]
    assert math.fsum(map(math.exp, logs)) == pytest.approx(1, abs=1e-9)
    assert -math.fsum(math.exp(value) * value for value in logs) == pytest.approx(scenes.entropy(), rel=1e-9)


def every_picture(scenes: Scenes) -> list[tuple[float, tuple[Shape, ...]]]:
    """All pictures with their probabilities."""
    config, found = scenes.config, []
    looks = list(itertools.product(scenes.colours, scenes.kinds))
    sizes = tuple(pictures.SIZES) if config.sizes else ("large",)
    cells = list(itertools.product(range(3), range(3)))
    for count in range(1, config.max_shapes + 1):
        own = [
            tuple(Shape(kind, colour, size, *cell) for (colour, kind), size, cell in zip(*parts, strict=True))
            for parts in itertools.product(
                itertools.combinations(looks, count),
                itertools.product(sizes, repeat=count),
                itertools.permutations(cells, count),
            )
        ]
        found += [(1 / (config.max_shapes * len(own)), shapes) for shapes in own]
    return found


@pytest.mark.parametrize("config", SMALL, ids=str)
def test_probability_of_a_caption_is_its_mean_over_pictures(config):
    scenes = Scenes(config)
    every = every_picture(scenes)
    for scene in drawn(3, seed=5, scenes=scenes):
        text = scenes.caption(scene)
        total = math.fsum(p * math.exp(scenes.log_prob_given(text, Scene(s, scene.facts, 0))) for p, s in every)
        assert math.log(total) == pytest.approx(scenes.log_prob(text), rel=1e-9)


def test_probabilities_given_a_picture_add_up():
    scenes = Scenes(SMALL[1])
    texts = [text for text in every_caption(scenes) if scenes.parse(text) is not None]
    for scene in drawn(6, scenes=scenes):
        logs = [value for text in texts if (value := scenes.log_prob_given(text, scene)) > -math.inf]
        assert math.fsum(map(math.exp, logs)) == pytest.approx(1)


def test_entropies_of_the_full_grammar():
    found = [(SCENES.caption(scene), scene) for scene in drawn(3000, seed=7)]
    for expected, values in (
        (SCENES.entropy(), [-SCENES.log_prob(text) for text, _ in found]),
        (SCENES.conditional_entropy(), [-SCENES.log_prob_given(text, scene) for text, scene in found]),
    ):
        assert abs(np.mean(values) - expected) < 4 * np.std(values) / math.sqrt(len(values))


OUTSIDE = [
    "",
    ".",
    "A red circle",
    "A red circle in the middle",
    "a red circle in the middle.",
    "A red circle in the middle. ",
    "A red circle in the middle..",
    "A red circle in the  middle.",
    "A red circle.",
    "A circle in the middle.",
    "A pink circle in the middle.",
    "A red small circle in the middle.",
    "An red circle in the middle.",
    "There is A red circle in the middle.",
    "There are a red circle in the middle.",
    "A red circle left of a red circle.",
    "A red circle left of a blue square left of a green cross.",
    "A red circle in the middle and a blue square on the left.",
    "A red circle left of a blue square and a black cross.",
    "A red circle left of a blue square and a red circle above a black cross.",
    "A red circle in the middle of a blue square.",
    "Here is a red circle above a blue square in the middle.",
]


@pytest.mark.parametrize("text", OUTSIDE)
def test_what_is_no_caption(text):
    assert SCENES.parse(text) is None and SCENES.log_prob(text) == -math.inf
    assert SCENES.shows(picture(), text) == (False,) * 6
    assert not SCENES.is_true(text, picture()) and not SCENES.is_complete(text, picture())


def test_a_smaller_grammar_says_less():
    text = "A small red circle left of a blue square."
    assert SCENES.parse(text) is not None
    for config in (
        ScenesConfig(sizes=False),
        ScenesConfig(max_shapes=1),
        ScenesConfig(relations=False),
        ScenesConfig(colours=2),
        ScenesConfig(kinds=1),
    ):
        assert Scenes(config).parse(text) is None
    assert Scenes(ScenesConfig(relations=False)).parse("A small red circle and a blue square.") is not None
    assert SCENES.parse("A small red circle and a blue square.") is None


def test_the_config_names_what_there_is():
    assert (len(pictures.COLOURS), len(pictures.KINDS)) == (ScenesConfig().colours, ScenesConfig().kinds)
    with pytest.raises(UserError, match="max_shapes = 4: must be at most colours . kinds = 2"):
        fields.check(ScenesConfig(colours=2, kinds=1), "")


# ---- verdicts -------------------------------------------------------------------

CAPTION = "A small red circle left of a blue square and a large black cross at the top."
SHAPES = (
    Shape("circle", "red", "small", 0, 2),
    Shape("square", "blue", "large", 2, 1),
    Shape("cross", "black", "large", 1, 0),
)


def changed(index: int, **fields) -> list[Shape]:
    return [shape._replace(**fields) if k == index else shape for k, shape in enumerate(SHAPES)]


@pytest.mark.parametrize(
    ("shapes", "wrong"),
    [
        (SHAPES, set()),
        (changed(0, row=0), set()),  # still left of the square
        (changed(1, size="small"), set()),  # nothing was said of it
        (changed(0, colour="green"), {"colours", "sizes", "relations"}),
        (changed(1, kind="diamond"), {"shapes", "relations"}),
        (changed(0, size="large"), {"sizes"}),
        (changed(0, column=2), {"relations"}),  # below it now, and no more left of it
        (changed(2, column=0), {"relations"}),
        (SHAPES[:2], {"shapes", "colours", "sizes", "relations"}),
        ((*SHAPES, Shape("circle", "green", "small", 1, 2)), {"shapes", "colours"}),
        # The same kinds and colours, but together otherwise.
        ([SHAPES[2], SHAPES[0]._replace(colour="blue"), SHAPES[1]._replace(colour="red")], {"sizes", "relations"}),
    ],
)
def test_a_planted_change_is_seen(shapes, wrong):
    for size in (32, 64, 128):
        verdict = SCENES.shows(render(shapes, size), CAPTION)
        assert verdict.valid and verdict.all == (not wrong)
        assert {name for name in ("shapes", "colours", "sizes", "relations") if not getattr(verdict, name)} == wrong


def test_a_picture_that_is_not_legal_shows_nothing():
    image = render(SHAPES, 64)
    image[::8, ::8] = 0
    verdict = SCENES.shows(image, CAPTION)
    assert not verdict.valid and not verdict.all
    assert not SCENES.is_true(CAPTION, image) and not SCENES.is_complete(CAPTION, image)


@pytest.mark.parametrize(
    ("text", "is_true", "is_complete"),
    [
        (CAPTION, True, True),
        ("Here is a red circle below a black cross and a blue square on the right.", True, True),
        ("A red circle below a black cross.", True, False),
        ("A red circle above a black cross and a blue square on the right.", False, True),
        ("A large red circle below a black cross and a blue square on the right.", False, True),
        ("A red circle below a black cross and a blue square on the left.", False, True),
        ("A red circle below a black cross and a green square on the right.", False, False),
        ("A red circle below a black cross and a blue square left of a green diamond.", False, True),
    ],
)
def test_whether_a_caption_is_true_and_complete(text, is_true, is_complete):
    image = render(SHAPES, 64)
    assert (SCENES.is_true(text, image), SCENES.is_complete(text, image)) == (is_true, is_complete)


def test_right_pairs_are_right_and_others_are_not():
    scenes = drawn(150, seed=9)
    texts = [SCENES.caption(scene) for scene in scenes]
    images = [SCENES.render(scene, 64) for scene in scenes]
    for text, image in zip(texts, images, strict=True):
        assert SCENES.shows(image, text).all and SCENES.is_true(text, image) and SCENES.is_complete(text, image)
    assert not any(SCENES.shows(image, text).all for text, image in zip(texts, images[1:] + images[:1], strict=True))
