"""Pack a study's finished cells into one small file, ``cells.jsonl.gz``, so that they travel: `write_pack`.

The first line holds the format, the study (``study.json``) and its measured costs; each further line a cell that is done:
its key, configuration, result, decisions, machine, and a loss curve of at most `CURVE` points. Weights, predictions,
paths and the machine's name stay. The same study gives the same bytes. `lrkit.study.packed`
reads it. No torch here.
"""

import gzip
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from lrkit.errors import LrkitError
from lrkit.study.cell_folder import is_done
from lrkit.study.files import decision_in
from lrkit.study.packed import FORMAT, PACK, Pack, PackedCell, places, read_pack
from lrkit.study.place import try_folder
from lrkit.study.records import frame, read_study
from lrkit.study.sheet import safe_csv
from lrkit.study.store import finite, read_lines, read_object, write_bytes
from lrkit.study.study_file import StudyFile, differing, read_study_file

CURVE = 100
"""The most training losses of a cell that are packed."""


def write_pack(folder: str | Path, dest: str | Path) -> tuple[list[Path], int]:
    """Pack the cells of a study that are done.

    Args:
        folder: the study's.
        dest: the folder of the pack, such as ``docs/replication/NAME``; a pack that is there already is replaced.

    Returns:
        ``cells.jsonl.gz`` and ``cells.csv`` (one line per finished cell of the rows, for people), and the number of cells
        packed.

    Raises:
        LrkitError: no study, no cell that is done, or a pack is there that holds cells which this study does not have.
    """
    folder, dest = Path(folder), Path(dest)
    record = read_study(folder)
    study = read_study_file(folder)
    if study is None:
        raise LrkitError(f"{folder} holds no study.json any more")
    entries = {entry.key: entry for entry in (*study.cells, *study.trials)}
    done = [key for key in sorted(entries) if is_done(folder / "cells" / key)]
    if not done:
        raise LrkitError(f"no cell of {folder} is done: there is nothing to pack")
    path = dest / PACK
    if path.exists():
        _check_none_lost(read_pack(path), study, set(done), folder)
    costs = {each.key: read_object(folder / "costs" / f"{each.key}.json", "a cost") for each in study.costs}
    packed = [_packed(folder / "cells" / key) for key in done]
    if any("model" in cell.versions for cell in packed):
        study = attrs.evolve(study, model=Path(study.model).name)
    header = {
        "format": FORMAT,
        "cells": len(done),
        "study": study.to_plain(),
        "costs": {key: costs[key] for key in sorted(costs) if costs[key] is not None},
    }
    lines = [header, *map(attrs.asdict, packed)]
    content = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=content, compresslevel=9, mtime=0) as file:
        for line in lines:
            text = json.dumps(finite(line), separators=(",", ":"), allow_nan=False)
            file.write(text.encode() + b"\n")
    try_folder(dest)
    dest.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content.getvalue())
    table, lines_of = dest / "cells.csv", frame(record)
    people = lines_of[lines_of["status"] == "done"].to_csv(index=False, lineterminator="\n")
    write_bytes(table, safe_csv(people).encode("utf-8", "replace"))
    return [path, table], len(done)


def _check_none_lost(old: Pack, study: StudyFile, done: set[str], folder: Path) -> None:
    """Raise LrkitError if a pack that would be replaced is of another study, or holds a cell whose place has none done."""
    there, mine = (attrs.evolve(each, model=Path(each.model).name) for each in (old.study, study))
    if found := differing(there, mine, ("model", "targets", "run")):
        what, was, asked = found
        raise LrkitError(
            f"{old.path} is of another study, whose {what} is {was} and not {asked}: nothing is replaced; choose another "
            "folder, or delete the pack"
        )
    now = places(study)
    lost = [
        place
        for place, entry in places(old.study).items()
        if entry.key in old.cells and (place not in now or now[place].key not in done)
    ]
    if lost:
        label, task, seed = lost[0][1:4]
        name = label or old.study.rows[old.study.base].label
        raise LrkitError(
            f"{old.path} holds {len(lost)} cells that are not done in {folder}, such as {name}, {task}, seed {seed}: "
            f"nothing is replaced; take them in first (--packed {old.path}), or delete the pack"
        )


def _packed(folder: Path) -> PackedCell:
    """Read a cell that is done."""
    history: dict[tuple[int, int], dict[str, Any]] = {}
    for line in read_lines(folder / "history.jsonl"):
        if (decision := decision_in(line)) is not None:
            history[decision.step, decision.policy] = line
    attempts = read_lines(folder / "attempts.jsonl")
    return PackedCell(
        key=folder.name,
        config=_placeless(read_object(folder / "config.json", "a cell's configuration") or {}),
        result=read_object(folder / "result.json", "a result") or {},
        history=[history[place] for place in sorted(history)],
        metrics=_thinned(read_lines(folder / "metrics.jsonl")),
        attempts=[_unnamed(line) for line in attempts],
        env=_unnamed(read_object(folder / "env.json", "a description of a machine") or {}),
    )


def _unnamed(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out which machine and process it was."""
    return {key: value for key, value in plain.items() if key not in ("host", "pid")}


def _placeless(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without the paths of folders on this machine: these count by their content alone."""
    versions, task, model = (config.get(name) for name in ("versions", "task", "model"))
    if isinstance(task, dict) and isinstance(task.get("data"), str):
        config = {**config, "task": {**task, "data": Path(task["data"]).name}}
    if isinstance(versions, dict) and "model" in versions and isinstance(model, str):
        config = {**config, "model": Path(model).name}
    return config


def _thinned(lines: Iterator[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Keep every evaluation, and at most `CURVE` losses, evenly spread, with the last one; of a repeated step its last."""
    losses: dict[int, dict[str, Any]] = {}
    scores: dict[int, dict[str, Any]] = {}
    for line in lines:
        if type(step := line.get("step")) is int:
            if "loss" in line:
                losses[step] = {key: line[key] for key in ("step", "loss", "penalty", "lr") if key in line}
            if isinstance(line.get("scores"), dict):
                scores[step] = {"step": step, "scores": line["scores"]}
    steps = sorted(losses)
    if len(steps) > CURVE:
        steps = [steps[-1 - round(i * (len(steps) - 1) / (CURVE - 1))] for i in reversed(range(CURVE))]
    return [*(losses[step] for step in steps), *(scores[step] for step in sorted(scores))]
