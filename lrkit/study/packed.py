"""Read a pack: a study's finished cells in one small file, as `lrkit.study.pack` writes it. No torch here."""

import gzip
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import attrs

from lrkit.errors import LrkitError, shown
from lrkit.reading import MIB, bounded_lines, opened, parse_json
from lrkit.study.files import CellResult
from lrkit.study.store import structured_as
from lrkit.study.study_file import CellEntry, StudyFile, TrialEntry, study_in

PACK = "cells.jsonl.gz"
"""The name of the file in its folder."""

FORMAT = 1
"""The newest format of a pack that this lrkit understands, and the one that it writes."""

_BYTES = 512 * MIB


@attrs.frozen(kw_only=True)
class PackedCell:
    """A cell that is done, as plain data: the content of its files.

    Args:
        key: its key.
        config: of ``config.json``.
        result: of ``result.json``.
        history: lines of ``history.jsonl``.
        metrics: lines of ``metrics.jsonl``: losses thinned out, and every evaluation.
        attempts: lines of ``attempts.jsonl``.
        env: of ``env.json``.
    """

    key: str
    config: dict[str, Any] = attrs.field(repr=False)
    result: dict[str, Any] = attrs.field(repr=False)
    history: list[dict[str, Any]] = attrs.field(factory=list, repr=False)
    metrics: list[dict[str, Any]] = attrs.field(factory=list, repr=False)
    attempts: list[dict[str, Any]] = attrs.field(factory=list, repr=False)
    env: dict[str, Any] = attrs.field(factory=dict, repr=False)

    @property
    def versions(self) -> dict[str, Any]:
        """Return the versions that it is of: ``model`` is among them if that is a folder, which counts by its content."""
        found = self.config.get("versions")
        return found if isinstance(found, dict) else {}


@attrs.frozen(kw_only=True)
class Pack:
    """A pack as it was read.

    Args:
        path: the file.
        study: the study; it may list cells that the pack does not hold.
        cells: the cells that it holds, by key.
        costs: the content of the files of measured rows, by key.
    """

    path: Path
    study: StudyFile
    cells: Mapping[str, PackedCell] = attrs.field(repr=False)
    costs: Mapping[str, dict[str, Any]] = attrs.field(repr=False)


Place = tuple[Any, ...]


def places(study: StudyFile) -> dict[Place, CellEntry]:
    """Map the place of each cell and trial, with the row's label for its index, to its entry; the base's label is ""."""

    def place(entry: CellEntry) -> Place:
        label = "" if entry.row == study.base else study.rows[entry.row].label
        return isinstance(entry, TrialEntry), label, *entry.place[1:]

    return {place(entry): entry for entry in (*study.cells, *study.trials)}


def read_pack(path: str | Path) -> Pack:
    """Read a pack whole, and check all of it.

    Args:
        path: the file, or the folder that holds a ``cells.jsonl.gz``.

    Raises:
        LrkitError: there is none, or it is damaged, of a newer format, or something else.
    """
    path = Path(path)
    path = path / PACK if path.is_dir() else path
    try:
        with opened(path) as raw, gzip.GzipFile(fileobj=raw) as file:
            lines = list(map(partial(_object, path), bounded_lines(cast(BinaryIO, file), path, _BYTES)))
    except FileNotFoundError:
        raise LrkitError(f"{path}: no such file; a pack is the {PACK} that `lrkit pack` writes") from None
    except (EOFError, zlib.error) as error:
        raise LrkitError(f"{path} is damaged: {error}") from None
    if not lines:
        raise LrkitError(f"{path} is no pack of a study: it is empty")
    header, *rest = lines
    version = header.get("format")
    if type(version) is not int or "study" not in header:
        raise LrkitError(f'{path} is no pack of a study: its first line has no "format" number and no study')
    if version > FORMAT:
        raise LrkitError(f"{path} is of format {version}, and this lrkit reads up to {FORMAT}: a newer lrkit wrote it")
    study = study_in(header["study"], path)
    if header.get("cells") != len(rest):
        raise LrkitError(f"{path} is damaged: it should hold {shown(header.get('cells'))} cells, and holds {len(rest)}")
    known = {entry.key for entry in (*study.cells, *study.trials)}
    cells: dict[str, PackedCell] = {}
    for line in rest:
        cell = _cell(line, path, known)
        if cell.key in cells:
            raise LrkitError(f"{path} holds the cell {cell.key} twice")
        cells[cell.key] = cell
    return Pack(path=path, study=study, cells=cells, costs=_costs(header.get("costs", {}), path, study))


def _object(path: Path, line: bytes) -> dict[str, Any]:
    data = parse_json(line, f"{path} is damaged: a line of it")
    if not isinstance(data, dict):
        raise LrkitError(f"{path} is no pack of a study: a line of it is a JSON {type(data).__name__}, not an object")
    return data


def _cell(line: Mapping[str, Any], path: Path, known: set[str]) -> PackedCell:
    """Structure one line; its key, which becomes a path, is one that the study lists."""
    cell = structured_as(line, PackedCell, "a packed cell", path)
    if cell.key not in known:
        raise LrkitError(f"{path} holds a cell {shown(cell.key)} that its study does not list")
    result = structured_as(cell.result, CellResult, "a result", path)
    if not result.scores or cell.result.get("key") != cell.key or cell.config.get("key", cell.key) != cell.key:
        raise LrkitError(f"{path}: the cell {cell.key} holds no score, or the files of another cell")
    return cell


def _costs(plain: Any, path: Path, study: StudyFile) -> dict[str, dict[str, Any]]:
    known = {cost.key for cost in study.costs}
    if not isinstance(plain, dict) or not all(key in known and isinstance(each, dict) for key, each in plain.items()):
        raise LrkitError(f"{path}: its costs are not those of the rows that its study lists")
    return plain
