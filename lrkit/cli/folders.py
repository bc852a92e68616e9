"""Folders that commands write into: nothing is overwritten, and nothing that was trained is lost."""

import os
from collections.abc import Callable
from pathlib import Path

from lrkit.cli.screen import complain
from lrkit.errors import LrkitError
from lrkit.study import place


def new_folder(wanted: Path | None, default: str = "") -> Path:
    """Choose a fresh folder, and try whether it can be written to.

    Args:
        wanted: the folder that was asked for, which must be empty or not there.
        default: the name to use if none was asked for; if it is taken, with the next free number.

    Raises:
        LrkitError: the folder holds something, or cannot be written to.
    """
    if wanted is not None:
        if wanted.exists() and (not wanted.is_dir() or place.holds(wanted)):
            raise LrkitError(f"{wanted} exists and is not empty: nothing is overwritten, choose another --out")
        folder = wanted
    else:
        number, folder = 1, Path(default)
        while os.path.lexists(folder):
            number += 1
            folder = Path(f"{default}-{number}")
    place.try_folder(folder)
    return folder


def write_into(folder: Path, write: Callable[[Path], None]) -> Path:
    """Write results into a folder; if that cannot be written to any more, into another one, and say so.

    Args:
        folder: where they belong.
        write: writes all of them into the folder that it is given.

    Returns:
        The folder that they are in.
    """
    there, why = place.written(folder, write)
    if why:
        complain(f"{folder} could not be written to ({why}): what was trained is in {there}")
    return there


def write_text(path: Path, text: str) -> None:
    """Write a file, and make its folder if it is not there.

    Raises:
        LrkitError: the folder cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LrkitError(f"cannot make the folder {path.parent}: {error.strerror}") from None
    path.write_text(text, encoding="utf-8")
