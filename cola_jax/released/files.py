"""Safetensors files of one part: read tensor by tensor, written tensor by tensor. Nothing is ever unpickled.

The library writes a file from tensors that are all in memory at once, which for a model of real size is a second
copy of it. The format is simple (length of the header, header as JSON, bytes), so `write` streams it.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from cola_jax.types import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
_CODES = {dtype.name: code for code, dtype in DTYPES.items()}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Spec(NamedTuple):
    """Type and shape of a tensor in a file."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def dtype_of(name: str, what: str) -> np.dtype:
    """The type of this name; raises UserError that names ``what`` if no released file can hold it."""
    for dtype in DTYPES.values():
        if dtype.name == str(name):
            return dtype
    raise UserError(f"{what} = {str(name)!r}: must be one of {', '.join(sorted(_CODES))}")


def read_json(path: Path) -> dict:
    """The JSON object in a file; raises UserError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; a released part has config.json and {SINGLE}") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable JSON file ({reason})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__}: must be an object")
    return value


def _opened(file: Path):
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise UserError(f"{file}: not a readable safetensors file ({reason})") from None


class Weights:
    """The tensors of one part's folder, in one file or in several with an index."""

    def __init__(self, folder: Path):
        """Reads names, types and shapes only.

        Raises:
          UserError: no safetensors, a damaged file, an index that does not fit its files.
        """
        self._file: dict[str, Path] = {}
        self.specs: dict[str, Spec] = {}
        single, index = folder / SINGLE, folder / INDEX
        if single.exists():
            self.label = single
            self._add(single, None)
        elif index.exists():
            self.label = index
            self._add_indexed(folder, index)
        else:
            pickles = sorted(f.name for f in folder.glob("*") if f.suffix in _PICKLES)
            hint = f"; {pickles[0]} is a pickle, which is never loaded" if pickles else ""
            raise UserError(f"{single}: missing{hint}; there must be {SINGLE} or {INDEX}")

    def _add_indexed(self, folder: Path, index: Path) -> None:
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            shown = str(places)[:80]
            raise UserError(f"{index}: weight_map = {shown!r}: must be an object of tensor names and files")
        for name, place in places.items():
            plain = isinstance(place, str) and place == os.path.basename(place) and not set(place) & set("\\\0")
            if not plain or not place.endswith(".safetensors"):
                allowed = "a .safetensors file beside the index"
                raise UserError(f"{index}: tensor {name} is in {place!r}: must be {allowed}")
        for place in sorted(set(places.values())):
            self._add(folder / place, {name for name, other in places.items() if other == place})

    def _add(self, file: Path, expected: set[str] | None) -> None:
        with _opened(file) as tensors:
            names = set(tensors.keys())
            if expected is not None and names != expected:
                missing, extra = sorted(expected - names), sorted(names - expected)
                what = f"{missing[0]} is missing" if missing else f"{extra[0]} is not where {INDEX} says"
                raise UserError(f"{file}: tensor {what}")
            for name in names:
                view = tensors.get_slice(name)
                code = view.get_dtype()
                if code not in DTYPES:
                    raise UserError(f"{file}: tensor {name} has type {code}: must be one of {', '.join(DTYPES)}")
                self._file[name], self.specs[name] = file, Spec(DTYPES[code], tuple(view.get_shape()))

    def file(self, name: str) -> Path:
        """Where a tensor is, for errors."""
        return self._file.get(name, self.label)

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises UserError unless there is such a tensor of this shape."""
        if name not in self.specs:
            raise UserError(f"{self.label}: tensor {name} is missing")
        if self.specs[name].shape != tuple(shape):
            found = list(self.specs[name].shape)
            raise UserError(f"{self._file[name]}: tensor {name} has shape {found}: the config needs {list(shape)}")

    def read(self, name: str) -> np.ndarray:
        """One tensor, copied. The file is mapped for this call only, so that its pages do not stay in memory."""
        file = self._file[name]
        with _opened(file) as tensors:
            try:
                return tensors.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: tensor {name} cannot be read ({' '.join(str(error).split())})") from None


def _ordered(specs: dict[str, Spec]) -> list[str]:
    """The library's order: wide types first, so that all are aligned; then names."""
    return sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))


def _header(specs: dict[str, Spec]) -> bytes:
    entries: dict = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in _ordered(specs):
        spec = specs[name]
        end = start + spec.nbytes
        entries[name] = {"dtype": _CODES[spec.dtype.name], "shape": list(spec.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _shards(specs: dict[str, Spec], limit: int) -> list[dict[str, Spec]]:
    shards: list[dict[str, Spec]] = [{}]
    size = 0
    for name in _ordered(specs):
        if shards[-1] and size + specs[name].nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = specs[name]
        size += specs[name].nbytes
    return shards


def write(folder: Path, specs: dict[str, Spec], tensors: Iterable[tuple[str, np.ndarray]], limit: int) -> None:
    """Writes the tensors of one part.

    Args:
      folder: an existing directory.
      specs: types and shapes of all tensors.
      tensors: names and values, each once, in any order; one is in memory at a time.
      limit: bytes of tensors in a file; above it there are several files and an index.

    Raises:
      OSError: the disk is full, for example.
    """
    shards = _shards(specs, limit)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [SINGLE]
    places: dict[str, tuple] = {}
    with contextlib.ExitStack() as opened:
        for name, shard in zip(names, shards, strict=True):
            file = opened.enter_context(open(folder / name, "wb"))
            header = _header(shard)
            file.write(header)
            start = len(header)
            for tensor in _ordered(shard):
                places[tensor] = (file, start)
                start += shard[tensor].nbytes
            file.truncate(start)
        for name, value in tensors:
            file, start = places.pop(name)
            value = np.ascontiguousarray(value)
            if value.shape != specs[name].shape or value.dtype != specs[name].dtype:
                raise ValueError(f"{name}: {value.dtype} {value.shape} is not {specs[name]}")
            file.seek(start)
            file.write(value.reshape(-1).view(np.uint8).data)
        if places:
            raise ValueError(f"{next(iter(places))}: not given")
    for name in names:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
    if len(shards) > 1:
        total = sum(spec.nbytes for spec in specs.values())
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON object to the disk."""
    with open(path, "wb") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def total_bytes(specs: Iterable[dict[str, Spec]]) -> int:
    """Bytes that files of these tensors need, headers and configs included (a little more)."""
    return sum(spec.nbytes + 256 for part in specs for spec in part.values()) + 65_536
