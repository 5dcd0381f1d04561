"""Scenes of one split by index: neither a caption nor a picture is in both splits."""

import collections.abc
import math

from cola_jax.config import DataConfig
from cola_jax.data.hashing import Split, position
from cola_jax.data.scenes import Scene, Scenes
from cola_jax.types import UserError

# A scene's number: its index, above it the attempt to draw one that belongs to the split, above that the split.
_INDEX_BITS = 40
_ATTEMPTS = 1 << 16
_HOLDOUT_BIT = 1 << 63


class ScenePairs(collections.abc.Sequence):
    """Scenes; scene i is drawn again until its caption and its picture are both on the right side.

    Each is held out with a probability of the root of the share, by its hash. Of all that is drawn, the share is held
    out, and what has only one of the two held out belongs to neither split.

    Attributes:
      scenes: their distribution.
    """

    def __init__(self, config: DataConfig, split: Split, seed: int):
        self._arguments = (config, split, seed)
        self.scenes = Scenes(config.scenes)
        self._seed, self._share = seed % 2**64, config.holdout
        self._limit = math.sqrt(config.holdout)
        self._held_out = split == "holdout"
        self._length = max(1, round(config.num_scenes * (config.holdout if self._held_out else 1.0)))
        self._found: dict[int, Scene] = {}  # held-out scenes take 1 / holdout draws each: keep them

    def __reduce__(self):
        return ScenePairs, self._arguments  # data workers build their own copy

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self._length:
            raise IndexError(f"scene {index} of {self._length}")
        if index in self._found:
            return self._found[index]
        number = index | (_HOLDOUT_BIT if self._held_out else 0)
        for attempt in range(_ATTEMPTS):
            scene = self.scenes.scene(self._seed, number | attempt << _INDEX_BITS)
            if self._belongs(scene):
                if self._held_out:
                    self._found[index] = scene
                return scene
        raise UserError(
            f"config.data.holdout = {self._share}: must be a share that leaves scenes in both splits"
            " (data.scenes allows too few different ones)"
        )

    def _belongs(self, scene: Scene) -> bool:
        caption, picture = self.scenes.caption(scene), repr(sorted(map(tuple, scene.shapes)))
        return all((position(text.encode()) < self._limit) == self._held_out for text in (caption, picture))
