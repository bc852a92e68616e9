"""Write and read a study's files so that a process killed at any moment leaves nothing wrong. No torch here.

A file is replaced in one move, or it only grows, by whole lines. A file that is missing is no error here: a study may be
read while it runs. JSON has no NaN: it is written as null, and null is read as NaN if a number is needed.
"""

import contextlib
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lrkit import reading
from lrkit.errors import LrkitError, shown
from lrkit.moves import lock as lock
from lrkit.moves import replacing
from lrkit.strict import Misfit, strict_converter, structured

if TYPE_CHECKING:
    import cattrs

T = TypeVar("T")

FORMAT = 1
"""The newest format of these files that this lrkit understands, and the one that it writes."""

LIST = "files.json"
"""In a cell that is done and in a checkpoint: the check sum of every other file that is read later."""


def finite(value: Any) -> Any:
    """Replace numbers that JSON does not have (nan, inf) by None, in plain data."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def canonical(value: Any) -> str:
    """Write plain data as one JSON text that is the same for equal data: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest_of(value: Any) -> str:
    """Return the first 16 hexadecimal digits of a SHA-256 over plain data's canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def json_bytes(value: Any) -> bytes:
    """Write plain data as the content of a JSON file."""
    return (json.dumps(finite(value), indent=1, allow_nan=False) + "\n").encode()


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one move."""
    with replacing(path) as draft:
        draft.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one move."""
    write_bytes(path, json_bytes(value))


def read_json(path: Path) -> Any:
    """Read a JSON file; None if there is no such file.

    Raises:
        LrkitError: it is not a regular file, or not JSON.
    """
    try:
        return reading.read_json(path)
    except FileNotFoundError:
        return None


def read_object(path: Path, what: str) -> dict[str, Any] | None:
    """Read the object in a JSON file; None if there is no such file.

    Args:
        path: the file.
        what: what it should be, for errors: ``"a result"``.

    Raises:
        LrkitError: it is not a regular file, or does not hold a JSON object.
    """
    try:
        text = reading.read_bytes(path)
    except FileNotFoundError:
        return None
    data = reading.parse_json(text, f"{path} is not {what}: it")
    if not isinstance(data, dict):
        raise LrkitError(f"{path} is not {what}: it holds a JSON {type(data).__name__}, not an object")
    return data


def read_whole(path: Path, cls: type[T], what: str) -> T | None:
    """Read a JSON file with a format into an attrs class, strictly; None if there is no such file.

    Args:
        path: the file.
        cls: the class.
        what: what it should be, for errors: ``"a result"``.

    Raises:
        LrkitError: it is something else, or of a newer format.
    """
    data = read_object(path, what)
    return None if data is None else whole_in(data, cls, what, path)


def whole_in(data: Mapping[str, Any], cls: type[T], what: str, path: Path) -> T:
    """Structure data with a format. Arguments and errors as `read_whole` has them."""
    version = data.get("format")
    if type(version) is not int:
        raise LrkitError(f'{path} is no file of a study: it has no "format" number')
    if version > FORMAT:
        raise LrkitError(f"{path} is of format {version}, and this lrkit reads up to {FORMAT}: a newer lrkit wrote it")
    return structured_as(data, cls, what, path)


def structured_as(data: Mapping[str, Any], cls: type[T], what: str, path: Path) -> T:
    """Structure the data of a file. Raise LrkitError, with the file's path, if they are not `what` they should be."""
    try:
        return structured(data, cls, _converter(), root=what.split()[-1])
    except LrkitError as error:
        raise LrkitError(f"{path} is not {what} of lrkit: {error}") from None


def structured_line(line: Mapping[str, Any], cls: type[T]) -> T | None:
    """Structure one line of a file of lines; None if it is something else."""
    try:
        return structured(line, cls, _converter())
    except LrkitError:
        return None


def number(value: Any) -> float:
    """Read a number from JSON; NaN for null, and for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _number_or_null(value: Any, _: Any) -> float:
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise Misfit(f"must be a number, not {shown(value)}")
    return number(value)


@cache
def _converter() -> "cattrs.Converter":
    converter = strict_converter()
    converter.register_structure_hook(float, _number_or_null)
    return converter


def read_text(path: Path) -> str:
    """Read a text; empty if there is no such file."""
    try:
        return reading.read_bytes(path).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read the JSON objects of a file of lines; pass over a torn line, and one that holds something else."""
    with contextlib.suppress(FileNotFoundError):
        for line in reading.lines(path):
            with contextlib.suppress(LrkitError):
                data = reading.parse_json(line.decode("utf-8", errors="replace"), path)
                if isinstance(data, dict):
                    yield data


def check_sum(path: Path) -> int:
    """Compute the CRC-32 of a file. Raise LrkitError if it is not a regular file."""
    total = 0
    with reading.opened(path) as file:
        while piece := file.read(reading.MIB):
            total = zlib.crc32(piece, total)
    return total


class Lines:
    """A JSON-lines file that only grows.

    Each line is one ``write``. If a killed process left a torn line at the end, it is closed off with a line break, so
    that the next line stands by itself.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        if self._file.tell():
            with path.open("rb") as last:
                last.seek(-1, os.SEEK_END)
                if last.read(1) != b"\n":
                    self._file.write(b"\n")

    def write(self, value: Mapping[str, Any]) -> None:
        """Append one line."""
        self._file.write((json.dumps(finite(value), allow_nan=False) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
