"""Read safetensors files that somebody else may have written: the header first, and the tensors only if it is sound.

The header says which tensors there are, of which shape and where. It is checked against the file's length before anything
is allocated, so reading takes as much memory as the file is long, and a tensor more. The file is read and not mapped: if it
is cut meanwhile, the result is an error, and not the process's death. Bytes become tensors by the safetensors package.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import load
from torch import Tensor

from lrkit.errors import LrkitError, cut, shown
from lrkit.reading import MIB, opened, parse_json

_HEADER_BYTES = 100 * MIB


@attrs.frozen(eq=False)
class TensorFile:
    """An open safetensors file.

    Args:
        metadata: the texts in its header.
    """

    metadata: Mapping[str, str]
    _header: Mapping[str, Mapping[str, Any]]
    _file: BufferedReader
    _start: int
    _path: Path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by name."""
        return {name: tuple(told["shape"]) for name, told in self._header.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Read all tensors, by name.

        Raises:
            LrkitError: the file has become shorter, or a tensor is not what the header says.
        """
        return {name: self._tensor(name, told) for name, told in self._header.items()}

    def _tensor(self, name: str, told: Mapping[str, Any]) -> Tensor:
        begin, end = told["data_offsets"]
        self._file.seek(self._start + begin)
        data = self._file.read(end - begin) or b""
        # One tensor at a time, as a file of its own: of all of them at once there would be two copies.
        alone = json.dumps({"": {**told, "data_offsets": [0, end - begin]}}).encode()
        try:
            tensor = load(struct.pack("<Q", len(alone)) + alone + data)[""]
        except Exception as error:  # safetensors' own, or torch's of a dtype or shape that it does not have
            raise refusal(self._path, f"{shown(name)}: {type(error).__name__}: {error}") from None
        if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            raise refusal(self._path, f"{shown(name)} holds truth values that are neither true nor false")
        return tensor


def refusal(path: Path, why: str) -> LrkitError:
    """Make the error for a file that is not what it should be."""
    return LrkitError(f"{path} is truncated, or no safetensors file ({cut(why, 300)})")


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file, and check its header.

    Raises:
        FileNotFoundError: there is none.
        LrkitError: it cannot be read, is truncated, or is no safetensors file.
    """
    with opened(path) as file:
        length = os.fstat(file.fileno()).st_size
        size = int.from_bytes(file.read(8) or b"", "little")
        if size > min(_HEADER_BYTES, length - 8):
            raise refusal(path, "its header is longer than the file, or than 100 MiB")
        try:
            header = parse_json(file.read(size) or b"", "its header")
        except LrkitError as error:
            raise refusal(path, str(error)) from None
        metadata = (header.pop("__metadata__", None) or {}) if isinstance(header, dict) else None
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise refusal(path, "its header is no table of tensors and texts")
        if not _fills(header, length - 8 - size):
            raise refusal(path, "the places of its tensors overlap, leave gaps, or are not those in the file")
        yield TensorFile(metadata, header, file, 8 + size, path)


def _fills(header: Mapping[str, Any], room: int) -> bool:
    """Say whether each tensor has a shape and a place, and the places fill the room without gaps or overlaps."""
    try:
        places = sorted((begin, end) for begin, end in (told["data_offsets"] for told in header.values()))
        numbers = [n for told in header.values() for n in (*told["shape"], *told["data_offsets"])]
    except (KeyError, TypeError, ValueError):
        return False
    sound = all(type(n) is int and n >= 0 for n in numbers)
    return sound and [0, *(end for _, end in places)] == [*(begin for begin, _ in places), room]
