"""Find the files of a folder of data: `FOLDER`, or `FOLDER:train=NAME,validation=NAME`.

For example, ``my/gsm8k:validation=test`` is the folder ``my/gsm8k``, whose ``test.jsonl.gz`` is to be scored on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from lrkit.errors import LrkitError, cut, nearest
from lrkit.reading import is_folder

SPLITS: Mapping[str, tuple[str, ...]] = {"train": ("train",), "validation": ("validation", "valid", "dev")}
"""The two splits of a task, and the names that files have for each, the first of which goes first."""
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".csv")

_MOST = 8
"""Splits that an error names."""


@attrs.frozen
class Place:
    """A folder of data, and the names of its splits.

    Attributes:
        folder: the folder.
        names: split to the name that was asked for, of those that were.
    """

    folder: Path
    names: Mapping[str, str]

    @property
    def name(self) -> str:
        """Return the folder's name, which its task has as well."""
        return self.folder.resolve().name

    def file(self, split: str) -> Path:
        """Return the file of "train" or of "validation".

        Raises:
            LrkitError: there is no such folder or file, or there are two.
        """
        if not is_folder(self.folder):
            name, equals, folder = str(self.folder).partition("=")
            hint = (
                f": give {folder} alone, or TASK=FOLDER to `lrkit ablate --data`"
                if equals and is_folder(Path(folder))
                else ""
            )
            raise LrkitError(f"{self.folder}: no such folder{hint}")
        asked = self.names.get(split)
        for name in SPLITS[split] if asked is None else (asked,):
            there = [name + suffix for suffix in SUFFIXES if os.path.lexists(self.folder / (name + suffix))]
            if len(there) > 1:
                raise LrkitError(
                    f"{self.folder}: {there[0]} and {there[1]} are two forms of one split: keep one of them"
                )
            if there:
                return self.folder / there[0]
        raise LrkitError(self._none(split, asked))

    def _none(self, split: str, asked: str | None) -> str:
        """Say that a split has no file, and which files there are."""
        first, *others = (asked,) if asked is not None else SPLITS[split]
        said = f"{self.folder}: there is no {first}.jsonl or {first}.jsonl.gz in it"
        said += f", nor .parquet or .csv{''.join(f', nor {name}' for name in others)}"
        there = [name for name in self._splits() if name not in (self.names.get(s, s) for s in SPLITS)]
        hint = f"{split}={there[0] if there else 'NAME'}"
        return (
            f"{said}; it has {', '.join(there[:_MOST]) or 'no other split'}: write {cut(str(self.folder), 200)}:{hint}"
        )

    def _splits(self) -> Sequence[str]:
        files = (name for name in os.listdir(self.folder) if name.endswith(SUFFIXES))
        return sorted({name.removesuffix(".gz").rpartition(".")[0] for name in files})

    def files(self) -> dict[str, Path]:
        """Return both files by split.

        Raises:
            LrkitError: a file is not there, is there twice, or is both splits.
        """
        found = {split: self.file(split) for split in SPLITS}
        if len(set(found.values())) < len(found):
            raise LrkitError(
                f"{found['train']}: train and validation are the same file, which would score what it learnt"
            )
        return found

    def named(self) -> dict[str, Path]:
        """Return both files by names that tell which split each is, as a digest needs them. Raises as `files`.

        A file that has none of the split's usual names has the split before it: ``validation=test.csv``.
        """
        return {
            path.name if path.name.partition(".")[0] in SPLITS[split] else f"{split}={path.name}": path
            for split, path in self.files().items()
        }


def place_of(data: str | os.PathLike[str]) -> Place:
    """Read what names a folder of data.

    Raises:
        LrkitError: a split is none, has no name, or is given twice.
    """
    text = os.fspath(data)
    folder, names = divided(text)
    known: dict[str, str] = {}
    for part in names.split(",") if names else ():
        split, equals, name = part.partition("=")
        if split not in SPLITS:
            raise LrkitError(
                f'data "{text}": there is no split "{split}"{nearest(split, SPLITS)}; write train or validation'
            )
        if not equals or not name or os.path.basename(name) != name or split in known:
            raise LrkitError(f'data "{text}": write one name of a file, without its ending, after {split}=')
        known[split] = name
    return Place(Path(folder), known)


def divided(text: str) -> tuple[str, str]:
    """Divide ``FOLDER:train=NAME`` into the folder and what follows the colon; a folder of that whole name goes first."""
    head, colon, tail = text.rpartition(":")
    return (
        (head, tail)
        if colon and "=" in tail and "/" not in tail.partition("=")[0] and not is_folder(text)
        else (text, "")
    )
