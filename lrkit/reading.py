"""Read files and texts of others with bounds, so that nothing hangs, fills the memory or ends in a traceback.

Every file that lrkit reads goes through `opened`: it must be a regular file (a FIFO would wait for ever, a device has no
end), and is read up to a bound. Plain data goes through `check_plain`: nested at most `DEPTH` deep, whole numbers of 64
bits. Whatever is wrong is one `LrkitError` that names the file.
"""

import json
import os
import stat
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from typing import Any, BinaryIO

from lrkit.errors import LrkitError, cut, shown

DEPTH = 64
"""How deep plain data may be nested."""

MIB = 2**20
JSON_BYTES = 128 * MIB
TOML_BYTES = 4 * MIB
LINES_BYTES = 4096 * MIB
LINE_BYTES = 64 * MIB

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

AnyPath = str | os.PathLike[str]


def is_folder(path: AnyPath) -> bool:
    """Say whether there is a folder; False if the path cannot be one (too long, linked to itself)."""
    return os.path.isdir(path)


@contextmanager
def opened(path: AnyPath, name: object = None) -> Iterator[BufferedReader]:
    """Open a regular file for reading. An error while it is read becomes one line, too.

    Args:
        path: the file.
        name: its name in errors; None for the path.

    Raises:
        FileNotFoundError: there is none.
        LrkitError: it is no regular file, or cannot be read.
    """
    told = cut(str(path if name is None else name), 300)
    try:
        # Without O_NONBLOCK the opening of a FIFO waits for somebody who writes.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{told}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise LrkitError(f"{told} cannot be read: {_reason(error)}") from None
    if kind := irregular(os.fstat(handle).st_mode):
        os.close(handle)
        raise LrkitError(f"{told} cannot be read: it is {kind}")
    with os.fdopen(handle, "rb") as file:
        try:
            yield file
        except OSError as error:
            raise LrkitError(f"{told} cannot be read: {_reason(error)}") from None


def irregular(mode: int) -> str | None:
    """Say what a file is by its mode, such as "a FIFO"; None if it is a regular one."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no regular file")


def _reason(error: OSError | ValueError) -> str:
    return str(getattr(error, "strerror", None) or error)


def read_bytes(path: AnyPath, most: int = JSON_BYTES) -> bytes:
    """Read a whole file.

    Raises:
        FileNotFoundError: there is none.
        LrkitError: it cannot be read, or holds more than `most` bytes.
    """
    with opened(path) as file:
        data = file.read(most + 1) or b""  # None: nothing there yet, in a file of /proc
    if len(data) > most:
        raise LrkitError(f"{path} holds more than {most:,} bytes, which no such file does")
    return data


def read_text(path: AnyPath, most: int = JSON_BYTES) -> str:
    """Read the UTF-8 text in a file. Raises as `read_bytes`, and LrkitError if it is no UTF-8."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise LrkitError(f"{path} cannot be read: no UTF-8, {error.reason} at byte {error.start}") from None


def parse_json(text: str | bytes, name: object) -> Any:
    """Read a JSON text. Raises LrkitError, with `name`, if it is none or breaks the bounds of `check_plain`."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise LrkitError(f"{name} holds no JSON: it is nested too deeply") from None
    except ValueError as error:  # no JSON, no UTF-8, a number with thousands of digits
        raise LrkitError(f"{name} holds no JSON: {error}") from None
    check_plain(value, name)
    return value


def read_json(path: AnyPath, most: int = JSON_BYTES) -> Any:
    """Read a JSON file. Raises as `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, most), f"{path} cannot be read: it")


def parse_toml(text: str, name: object) -> dict[str, Any]:
    """Read a TOML text. Raises LrkitError, with `name`, if it is none or breaks the bounds of `check_plain`."""
    try:
        value = tomllib.loads(text)
    except RecursionError:
        raise LrkitError(f"{name}: no TOML: nested too deeply") from None
    except (ValueError, OverflowError) as error:  # no TOML, a number with thousands of digits, an impossible date
        raise LrkitError(f"{name}: no TOML: {error}") from None
    check_plain(value, name)
    return value


def check_plain(value: Any, name: object) -> None:
    """Raise LrkitError, with `name`, if data is nested more than `DEPTH` deep, or has whole numbers beyond 64 bits."""
    level, deep = [value], 0
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list | tuple):
                below += item
            elif isinstance(item, int) and not -(2**63) <= item < 2**64:
                raise LrkitError(f"{name} holds {shown(item)}, which does not fit into 64 bits")
        level, deep = below, deep + 1
        if deep > DEPTH + 1:
            raise LrkitError(f"{name} is nested more than {DEPTH} deep, which no such file is")


def lines(path: AnyPath, most: int = LINES_BYTES) -> Iterator[bytes]:
    """Yield the lines of a file.

    Raises:
        FileNotFoundError: there is none.
        LrkitError: it cannot be read, or a line or the whole is too long.
    """
    with opened(path) as file:
        yield from bounded_lines(file, path, most)


def bounded_lines(file: BinaryIO, name: object, most: int = LINES_BYTES) -> Iterator[bytes]:
    """Yield the lines of an open file. Raises LrkitError if one is longer than `LINE_BYTES`, or all are than `most`."""
    total = 0
    while line := file.readline(LINE_BYTES + 1):
        total += len(line)
        if len(line) > LINE_BYTES or total > most:
            what = f"a line of more than {LINE_BYTES:,}" if len(line) > LINE_BYTES else f"more than {most:,}"
            raise LrkitError(f"{name} holds {what} bytes, which no such file does")
        yield line


__all__ = [
    "check_plain",
    "irregular",
    "is_folder",
    "lines",
    "opened",
    "parse_json",
    "parse_toml",
    "read_bytes",
    "read_json",
    "read_text",
]
