"""Files of a study: written in one move or by whole lines, so that a process killed at any moment leaves nothing wrong."""

import contextlib
import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lrkit import reading

LIST = "files.json"
"""In a cell that is done, and in a checkpoint: the check sum of every other file that is read later."""


def finite(value: Any) -> Any:
    """Plain data with None for numbers that JSON does not have (nan, inf)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def canonical(value: Any) -> str:
    """Plain data as one JSON text, the same for equal data: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one move: a reader sees the old one or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files for their owner alone
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def json_bytes(value: Any) -> bytes:
    """Plain data as the content of a JSON file."""
    return (json.dumps(finite(value), indent=1, allow_nan=False) + "\n").encode()


def check_sum(path: Path) -> int:
    """CRC-32 of a file. Raises LrkitError where it is no regular file."""
    total = 0
    with reading.opened(path) as file:
        while piece := file.read(reading.MIB):
            total = zlib.crc32(piece, total)
    return total


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one move."""
    write_bytes(path, json_bytes(value))


def read_json(path: Path) -> Any:
    """The data in a JSON file; None where there is no such file.

    Raises:
        LrkitError: it is no regular file, or no JSON.
    """
    try:
        return reading.read_json(path)
    except FileNotFoundError:
        return None


class Lines:
    """A JSON-lines file that only grows.

    A line is one ``write``. What a killed process left torn at the end is closed off with a line break, so that the
    next line stands by itself; readers pass over what is no JSON.
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


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a file's lock: True while held, False where another living process holds it and we do not wait.

    The lock dies with its process, however that ends. On a file system without locks everybody gets True.
    """
    import fcntl

    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:  # no locks there
            pass
        yield True
