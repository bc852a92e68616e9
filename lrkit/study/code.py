"""Compute a digest of the code that can change a cell's result: lrkit's own sources, and those of plug-ins in use.

Files are hashed as they are. A file in `OUTSIDE` shows, checks or times results and never makes one; every other file of
lrkit counts, a new one as well.
"""

import hashlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

OUTSIDE = (
    "__main__.py",
    "cli",
    "py.typed",
    "studies",  # the settings that they ask for are in the cells themselves
    "study/charts",
    "study/columns.py",
    "study/combined.py",
    "study/comebacks.py",
    "study/claim.py",
    "study/claims.py",
    "study/comparison.py",
    "study/cost.py",
    "study/effects.py",
    "study/equivalence.py",
    "study/latex.py",
    "study/pack.py",
    "study/packed.py",
    "study/paired.py",
    "study/pictures.py",
    "study/place.py",
    "study/power.py",
    "study/progress.py",
    "study/recall.py",
    "study/records.py",
    "study/published.py",
    "study/report",
    "study/results.py",
    "study/scores.py",
    "study/sheet.py",
    "study/sizes.py",
    "study/spreads.py",
    "study/statistics.py",
    "study/table.py",
    "study/table_row.py",
    "study/taken.py",
    "study/texts.py",
    "study/tuned.py",
    "templates",
    "testing",
    "version.py",
)
"""Files and folders of the package lrkit that no result depends on."""

_SKIPPED = ("__pycache__", ".pyc", ".dist-info", ".egg-info", ".pth")


def digest_of(components: Iterable[tuple[str, str]]) -> str:
    """Compute the digest of lrkit's sources and of the plug-ins that some components come from.

    Args:
        components: kind and name of each, registered or not.

    Returns:
        16 hexadecimal digits.
    """
    from lrkit.registry import current

    used = set(components)
    brought = {}
    for offer in current().offers():
        if (offer.kind, offer.name) in used:
            brought[offer.distribution.partition(" ")[0], offer.kind, offer.name] = offer.value
    digest = hashlib.sha256(lrkit_digest().encode())
    for (distribution, _, _), value in sorted(brought.items(), key=lambda pair: pair[0]):
        if distribution != "lrkit":
            digest.update(f"{distribution} {_distribution_digest(distribution)} {_object_digest(value)} ".encode())
    return digest.hexdigest()[:16]


@cache
def lrkit_digest() -> str:
    """Compute the digest of lrkit's sources that are not in `OUTSIDE`."""
    root = Path(__file__).resolve().parent.parent
    return _hash((path.relative_to(root).as_posix(), path) for path in inside(root))


def inside(root: Path) -> list[Path]:
    """List the files of the package that count."""
    files = (path for path in root.rglob("*") if path.is_file() and not _is_skipped(path.relative_to(root)))
    return sorted(path for path in files if not _is_outside(path.relative_to(root).as_posix()))


def _is_outside(name: str) -> bool:
    return any(name == out or name.startswith(f"{out}/") for out in OUTSIDE)


def _is_skipped(path: Path) -> bool:
    return any(part.endswith(_SKIPPED) or part.startswith(".") for part in path.parts)


@cache
def _distribution_digest(name: str) -> str:
    """Hash the files that a distribution installed."""
    try:
        listed = metadata.distribution(name).files or []
        found = [(file.as_posix(), Path(str(file.locate()))) for file in listed]
    except Exception:  # none of that name (added in this process), or metadata that cannot be read
        return ""
    return _hash((name, path) for name, path in found if path.is_file() and not _is_skipped(Path(name)))


@cache
def _object_digest(value: Any) -> str:
    """Hash the package or module that an object comes from: an editable install lists no sources."""
    module = sys.modules.get(getattr(value, "__module__", None) or type(value).__module__)
    package = sys.modules.get((module.__name__ if module else "").partition(".")[0])
    file = getattr(package, "__file__", None)
    if package is None or file is None or package.__name__ == "__main__":
        try:
            return hashlib.sha256(inspect.getsource(value).encode()).hexdigest()
        except (OSError, TypeError):  # typed at a prompt
            return ""
    if hasattr(package, "__path__"):
        root = Path(file).parent
        return _hash(
            (p.relative_to(root).as_posix(), p)
            for p in sorted(root.rglob("*.py"))
            if not _is_skipped(p.relative_to(root))
        )
    return _hash([(package.__name__, Path(file))])


def _hash(files: Iterable[tuple[str, Path]] | Iterator[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()} ".encode())
    return digest.hexdigest()
