"""Safetensors files that somebody else may have written, read with care: first the header, and only then the tensors.

The header has the tensors' names, shapes and places. It is checked against the file's length before anything is allocated,
so that the tensors take no more memory than the file is long. The file is read, not mapped: if it is cut meanwhile, that is
an error and does not kill the process.
"""

import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from lrkit.errors import LrkitError, cut, shown
from lrkit.reading import MIB, opened, parse_json

_HEADER_BYTES = 100 * MIB
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@attrs.frozen
class Entry:
    """A tensor in a file. `begin` is its first byte after the header."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int


@attrs.frozen(eq=False)
class TensorFile:
    """An open safetensors file.

    Args:
        entries: tensors by name, as the header describes them.
        metadata: the texts in its header.
    """

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    _file: BufferedReader
    _start: int
    _path: Path

    def tensors(self) -> dict[str, Tensor]:
        """Read all tensors, by name. Raise LrkitError if the file has become shorter, or a truth value is not one."""
        return {name: self._tensor(name, entry) for name, entry in self.entries.items()}

    def _tensor(self, name: str, entry: Entry) -> Tensor:
        size = math.prod(entry.shape) * entry.dtype.itemsize
        flat = torch.empty(size, dtype=torch.uint8)
        view = memoryview(flat.numpy())  # type: ignore[arg-type]
        self._file.seek(self._start + entry.begin)
        done = 0
        while done < size:
            count = self._file.readinto(view[done:])
            if not count:
                raise LrkitError(f"{self._path} is truncated, or no safetensors file (it ends within {shown(name)})")
            done += count
        if entry.dtype == torch.bool and bool((flat > 1).any()):
            raise LrkitError(f"{self._path} is no safetensors file: {shown(name)} holds truth values that are none")
        return flat.view(entry.dtype).view(entry.shape)


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file, and check its header.

    Raises:
        FileNotFoundError: there is none.
        LrkitError: it cannot be read, is truncated, or is no safetensors file.
    """
    with opened(path) as file:

        def refuse(why: str) -> LrkitError:
            return LrkitError(f"{path} is truncated, or no safetensors file ({cut(why, 300)})")

        length = os.fstat(file.fileno()).st_size
        first = file.read(8) or b""
        if len(first) < 8:
            raise refuse("it has no header")
        (size,) = struct.unpack("<Q", first)
        if size > min(_HEADER_BYTES, length - 8):
            raise refuse("its header is longer than the file, or than 100 MiB")
        text = file.read(size)
        if len(text) < size:
            raise refuse("it ends within its header")
        try:
            header = parse_json(text, "its header")
            metadata = header.pop("__metadata__", None) or {} if isinstance(header, dict) else None
            if metadata is None or not all(isinstance(part, str) for part in metadata.values()):
                raise LrkitError("its header is no table of tensors and texts")
            entries = _entries(header, length - 8 - size)
        except LrkitError as error:
            raise refuse(str(error)) from None
        except AttributeError:
            raise refuse("its metadata is no table") from None
        yield TensorFile(entries, metadata, file, 8 + size, path)


def _entries(header: dict[str, Any], room: int) -> dict[str, Entry]:
    entries, ends = {}, []
    for name, told in header.items():
        known = isinstance(told, dict) and set(told) == {"dtype", "shape", "data_offsets"}
        if not known or not _numbers(told["shape"]) or not _numbers(told["data_offsets"]):
            raise LrkitError(f"{shown(name)} has no shape and place")
        if len(told["data_offsets"]) != 2 or len(told["shape"]) > 16:
            raise LrkitError(f"{shown(name)} has no shape and place")
        dtype = _DTYPES.get(told["dtype"]) if isinstance(told["dtype"], str) else None
        if dtype is None:
            raise LrkitError(f"{shown(name)} is of type {shown(told['dtype'])}, which is not read here")
        begin, end = told["data_offsets"]
        if end - begin != math.prod(told["shape"]) * dtype.itemsize:
            raise LrkitError(f"{shown(name)} takes {end - begin} bytes, which is not what its shape takes")
        entries[name] = Entry(tuple(told["shape"]), dtype, begin)
        ends.append((begin, end))
    at = 0
    for begin, end in sorted(ends):
        if begin != at:
            raise LrkitError("its tensors overlap, or leave gaps")
        at = end
    if at != room:
        raise LrkitError(f"its tensors take {at} bytes, and it has {room}")
    return entries


def _numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
