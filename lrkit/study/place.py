"""Folders for results: tried before anything is spent, and another one where they fail at the end."""

import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from lrkit.errors import LrkitError
from lrkit.foreign import line_of


def missing(folder: Path) -> list[Path]:
    """What must be made for a folder to be there, the deepest first: the folder and its parents that do not exist."""
    return list(itertools.takewhile(lambda each: not os.path.lexists(each), (folder, *folder.absolute().parents)))


def try_folder(folder: Path) -> None:
    """Make a folder, write a file into it, and take away again what was not there before.

    Raises:
        LrkitError: it cannot be made or written to.
    """
    made = missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".lrkit-")
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
    """Write what was trained into a folder; if that fails, into a new one elsewhere.

    Args:
        folder: where it belongs.
        write: writes all of it into a folder, which exists.

    Returns:
        Where it is now, and why it is not in `folder` (empty if it is).

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
    for parent in (folder.absolute().parent, Path(tempfile.gettempdir()), Path.cwd(), Path.home()):
        try:
            other = Path(tempfile.mkdtemp(prefix=f"{folder.name or 'lrkit'}-", dir=parent))
            write(other)
            return other, why
        except Exception as error:
            last = error
    raise OSError(f"what was trained cannot be written anywhere: {why}; {last}")
