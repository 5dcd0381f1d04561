"""Pictures in requests and answers: data URLs in, PNG files in base64 out."""

import base64
import binascii
import re
import time

import numpy as np

from cola_jax.data import captioned_images
from cola_jax.serving.answers import Piece
from cola_jax.serving.errors import ApiError
from cola_jax.types import UserError

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
_MOST_PIXELS = 1 << 24  # a small file can hold a picture that takes all memory


def read(url: str, size: int) -> np.ndarray:
    """The picture of a data URL, as data pipelines read it: uint8 [size, size, 3].

    Raises:
      ApiError: 400, another kind of URL, or no image.
    """
    head = _DATA_URL.match(url)
    if head is None:
        message = f"image_url.url = {url[:32]!r}: must be a data URL, data:image/png;base64,...; nothing is fetched"
        raise ApiError(400, message, "messages", "bad_image")
    try:
        content = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            400, f"image_url.url: must be base64 behind the comma ({error})", "messages", "bad_image"
        ) from None
    try:
        return captioned_images.decode(content, size, _MOST_PIXELS)
    except UserError as error:
        raise ApiError(400, f"image_url.url: {error}", "messages", "bad_image") from None


class ImageForm:
    """Writes the answer to a request for images."""

    def __init__(self, count: int, size: int, seed: int):
        """Args:
        count: images of the answer.
        size: pixels on a side.
        seed: of the draws, told under "cola_jax".
        """
        self._pictures: list[np.ndarray | None] = [None] * count
        self._size, self._seed, self._created = size, seed, int(time.time())

    def take(self, piece: Piece) -> None:
        """Notes a piece."""
        self._pictures[piece.index] = piece.picture

    def whole(self) -> dict:
        """The answer, when all pieces were taken."""
        files = [captioned_images.encode(picture) for picture in self._pictures]
        return {
            "created": self._created,
            "data": [{"b64_json": base64.b64encode(file).decode("ascii")} for file in files],
            "output_format": "png",
            "size": f"{self._size}x{self._size}",
            "cola_jax": {"seed": self._seed},
        }
