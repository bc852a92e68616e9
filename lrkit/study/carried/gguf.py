"""Read llama.cpp's GGUF files, version 3: metadata, and tensors dequantised to float32.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Four types of
tensors are read: F32, F16, Q4_1 and Q8_0.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from lrkit.errors import LrkitError

Array = npt.NDArray[Any]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_TYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("<f4"),
    1: np.dtype("<f2"),
    3: np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]),  # Q4_1
    8: np.dtype([("d", "<f2"), ("q", "i1", 32)]),  # Q8_0
}
_BLOCK = 32  # weights in a block of a quantised type


def read(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read a file.

    Returns:
        The metadata, and the tensors by name, in float32, with the last axis the one that lies together in memory.

    Raises:
        LrkitError: this is no GGUF file of version 3, or a tensor has another type.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF" or _scalar(file, "I") != 3:
            raise LrkitError(f"{path}: no GGUF file of version 3")
        tensors, entries = _scalar(file, "Q"), _scalar(file, "Q")
        metadata = {_string(file): _value(file, _scalar(file, "I")) for _ in range(entries)}
        infos = []
        for _ in range(tensors):
            name = _string(file)
            shape = [_scalar(file, "Q") for _ in range(_scalar(file, "I"))]
            infos.append((name, shape[::-1], _scalar(file, "I"), _scalar(file, "Q")))
        alignment = metadata.get("general.alignment", 32)
        start = math.ceil(file.tell() / alignment) * alignment
        found = {}
        for name, shape, kind, offset in infos:
            if kind not in _TYPES:
                raise LrkitError(f"{path}: {name} has type {kind} of GGML; F32, F16, Q4_1 and Q8_0 can be read")
            count = math.prod(shape) if _TYPES[kind].names is None else math.prod(shape) // _BLOCK
            file.seek(start + offset)
            raw = np.frombuffer(file.read(count * _TYPES[kind].itemsize), _TYPES[kind])
            found[name] = dequantised(raw).reshape(shape)
    return metadata, found


def dequantised(raw: Array) -> Array:
    """Return the weights of an array of blocks (or of numbers) in float32, shape [weights].

    Q4_1: w = q d + m, where the low halves of a block's 16 bytes are weights 0 to 15, and the high halves 16 to 31. Q8_0:
    w = q d.
    """
    names = raw.dtype.names
    if names is None:
        return raw.astype(np.float32)
    scale = raw["d"].astype(np.float32)[:, None]
    if "m" not in names:
        return (raw["q"] * scale).reshape(-1)
    halves = np.concatenate([raw["q"] & 15, raw["q"] >> 4], axis=1)
    return (halves * scale + raw["m"].astype(np.float32)[:, None]).reshape(-1)


def _scalar(file: BinaryIO, kind: str) -> Any:
    kind = f"<{kind}"
    return struct.unpack(kind, file.read(struct.calcsize(kind)))[0]


def _string(file: BinaryIO) -> str:
    return str(file.read(_scalar(file, "Q")), "utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        inner = _scalar(file, "I")
        return [_value(file, inner) for _ in range(_scalar(file, "Q"))]
    return _scalar(file, _SCALARS[kind])
