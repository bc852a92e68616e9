"""Try a folder for results before anything is spent, and find another one if writing to it fails at the end."""

import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from lrkit.errors import LrkitError
from lrkit.foreign import line_of


def missing(folder: Path) -> list[Path]:
    """List the folders that do not exist yet: a folder and its parents, the deepest first."""
    return list(itertools.takewhile(lambda each: not os.path.lexists(each), (folder, *folder.absolute().parents)))


_TRIED = ".lrkit-"


def holds(folder: Path) -> list[Path]:
    """List what a folder holds, without what a process that was killed while it tried the folder has left."""

    def left(path: Path) -> bool:
        return path.name.startswith(_TRIED) or (path.name == "cells" and path.is_dir() and not holds(path))

    return [path for path in folder.iterdir() if not left(path)]


def try_folder(folder: Path) -> None:
    """Make a folder, write a file into it, and delete again all that was not there before.

    Raises:
        LrkitError: it cannot be made or written to.
    """
    made = missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=_TRIED)
        try:
            os.write(handle, b"x" * 4096)
            os.fsync(handle)
        finally:
            os.close(handle)
            os.unlink(name)
    except (OSError, ValueError) as error:
        raise LrkitError(f"cannot write to the folder {folder}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()


def written(folder: Path, write: Callable[[Path], None]) -> tuple[Path, str]:
    """Write a result into a folder; if that fails, into a new one elsewhere.

    Args:
        folder: the folder that it belongs into.
        write: writes all of it into a folder, which exists.

    Returns:
        The folder that it is in now, and why that is not `folder` (empty if it is).

    Raises:
        OSError: it cannot be written anywhere.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder)
        return folder, ""
    except Exception as error:  # OSError, or what a library makes of a full disk
        why = line_of(error)
    last: Exception | None = None
    for parent in (folder.absolute().parent, Path(tempfile.gettempdir()), Path.cwd(), Path(os.path.expanduser("~"))):
        try:
            other = Path(tempfile.mkdtemp(prefix=f"{folder.name or 'lrkit'}-", dir=parent))
            write(other)
            return other, why
        except Exception as error:
            last = error
    raise OSError(f"what was trained cannot be written anywhere: {why}; {last}")
