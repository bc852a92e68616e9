"""A cell's folder: is it done and whole, what failed, and what can be tidied away. No torch here.

A cell is *done* if its folder holds a result, and every file that its list names is as it was written.
"""

import contextlib
import datetime
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lrkit.errors import LrkitError, cut
from lrkit.study.store import LIST, Lines, check_sum, digest_of, finite, lock, read_json, write_bytes

PACKED = "packed.json"
"""The mark in the folder of a cell that was taken in from a pack: `lrkit.study.taken`."""


def is_packed(folder: Path) -> bool:
    """Tell if a cell was taken in from a pack, and not made again since."""
    return (folder / PACKED).is_file()


def forget(folder: Path) -> None:
    """Take back that a cell is done or begun, so that it is run again from its first step."""
    for name in ("result.json", PACKED, "history.jsonl", "metrics.jsonl"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def digest_of_result(folder: Path) -> str:
    """Compute a digest of a cell's result, whatever machine wrote it; empty if there is none."""
    try:
        result = read_json(folder / "result.json")
    except LrkitError:
        return ""
    return "" if result is None else digest_of(finite(result))


def follows(folder: Path, digest: Callable[[Path], str] = digest_of_result) -> bool:
    """Tell if a cell was settled from the results that the cells it needs have now; of one not begun, that it may be.

    They may have been made anew since, or come from another machine, where the last bits of a run are others.

    Args:
        folder: the cell's.
        digest: gives the digest of a result by its folder; for many cells at a time one that remembers.
    """
    try:
        config = read_json(folder / "config.json")
    except LrkitError:
        return False
    if not isinstance(config, dict) or not config.get("planned", {}).get("needs"):
        return True
    found = config.get("sources")
    return isinstance(found, dict) and all(digest(folder.parent / key) == each for key, each in found.items())


def is_done(folder: Path) -> bool:
    """Tell if a cell's folder holds a result and every file beside it is whole; a damaged one counts as none."""
    return has_result(folder) and damaged(folder) is None


def has_result(folder: Path) -> bool:
    """Tell if a cell's folder holds a result, whatever its other files are like."""
    try:
        result = read_json(folder / "result.json")
    except LrkitError:
        return False
    return isinstance(result, dict) and result.get("key") == folder.name and bool(result.get("scores"))


def damaged(folder: Path) -> str | None:
    """Find the first file of a cell with a result that is not as it was written, or gone; None if all are whole."""
    try:
        listed = read_json(folder / LIST)
    except LrkitError:
        return LIST
    if not isinstance(listed, dict):  # of a cell from before there was a list: whole if it can be read
        return None if listed is None and _can_be_read(folder / "config.json") else "config.json"
    for name, expected in listed.items():
        try:
            if check_sum(folder / name) != expected:
                return str(name)
        except (LrkitError, OSError):
            return str(name)
    return None


def _can_be_read(path: Path) -> bool:
    try:
        return isinstance(read_json(path), dict)
    except LrkitError:
        return False


def note_attempt(folder: Path, event: Mapping[str, Any]) -> None:
    """Append one line to ``attempts.jsonl``.

    Args:
        folder: the cell's.
        event: ``event`` is ``begin``, ``end`` or ``failed``, beside whatever is to be known of it.
    """
    with contextlib.closing(Lines(folder / "attempts.jsonl")) as lines:
        lines.write({**event, "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")})


def note_failure(folder: Path, line: str, detail: str) -> None:
    """Write down why a cell failed, as far as the disk lets us.

    Args:
        folder: the cell's.
        line: the error in one line.
        detail: the traceback.
    """
    with contextlib.suppress(OSError):
        write_bytes(folder / "error.txt", cut(detail, 100_000).encode(errors="replace"))
        note_attempt(folder, {"event": "failed", "error": cut(line)})


def attempts_size(folder: Path) -> int:
    """Return the bytes of ``attempts.jsonl``: they grow if the cell has begun since."""
    try:
        return (folder / "attempts.jsonl").stat().st_size
    except OSError:
        return 0


def tidy(folder: Path) -> None:
    """Delete what a cell that is done does not need any more, and drafts that a killed process left."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for leftover in _leftovers(folder):
        leftover.unlink(missing_ok=True)


def tidy_done(folder: Path) -> None:
    """`tidy` a cell that is done, if there is anything to tidy and no other process is at it."""
    if (folder / "checkpoints").exists() or _leftovers(folder):
        with lock(folder / "lock") as mine:
            if mine:
                tidy(folder)


def _leftovers(folder: Path) -> list[Path]:
    return [p for p in (folder / "error.txt", folder / "conditions.json", *folder.glob(".*.*")) if p.is_file()]
