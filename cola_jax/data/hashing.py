"""Where a document belongs: a number that depends on its text alone."""

import hashlib
from typing import Literal

Split = Literal["train", "holdout"]


def position(text: bytes) -> float:
    """A number from 0 to below 1, uniform over texts (UTF-8); a document is held out if it is below the share."""
    digest = hashlib.blake2b(text, digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48
