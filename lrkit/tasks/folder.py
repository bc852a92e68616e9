"""Load a task from local files: `{train,validation}.jsonl[.gz]`, one JSON object per line, in GLUE's fields."""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, cast

import attrs

from lrkit.errors import LrkitError
from lrkit.reading import LINES_BYTES, MIB, bounded_lines, is_folder, opened
from lrkit.tasks.base import Task
from lrkit.tasks.classification import Classification, Kind
from lrkit.tasks.glue import GLUE
from lrkit.tasks.scoring import METRICS, REGRESSION_METRICS, check_metric

# Pairs before single texts: a row with `question` and `sentence` is a pair.
FIELDS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("sentence",),
    ("text",),
)


# A gzip file of text is three to ten times as long when unpacked; one that goes on for ever is a thousand times.
_EXPANDS = 200
_BLANK = 100_000


@attrs.frozen
class _Row:
    line: int  # from 1
    values: dict[str, Any]


def load_folder(path: str | os.PathLike[str], metric: str | None = None) -> Task:
    """Load the task in a folder.

    The text fields are the first of `FIELDS` that the first training row has. Whole-number labels make it a
    classification, whose classes are 0, 1, ... as they occur in training; any label with a decimal point in
    training makes it a regression, in which whole numbers are fine too. Other fields are left out.

    Args:
        path: the folder. One that is named as a GLUE task has that task's metric and label names.
        metric: a name in `lrkit.tasks.METRICS`; None: GLUE's, or accuracy or Pearson by the labels.

    Raises:
        LrkitError: a row or a file is not as it should be, with file and line.
    """
    import datasets

    folder = Path(path)
    if not is_folder(folder):
        raise LrkitError(f"{folder}: no such folder")
    glue = GLUE.get(folder.resolve().name)
    train_file, validation_file = _find(folder, "train"), _find(folder, "validation")
    train, validation = _read(train_file), _read(validation_file)

    fields = next((f for f in FIELDS if all(name in train[0].values for name in f)), None)
    if fields is None:
        wanted = " or ".join(" + ".join(f) for f in FIELDS)
        raise LrkitError(f"{train_file}:{train[0].line}: no text field: it needs {wanted}")
    for file, rows in ((train_file, train), (validation_file, validation)):
        for row in rows:
            _check(file, row, fields)

    if metric is None and glue is not None and fields == glue.fields:
        metric = glue.metric
    if metric is not None:
        check_metric(metric)
    kind: Kind = "classification"
    if metric in REGRESSION_METRICS or any(isinstance(row.values["label"], float) for row in train):
        kind = "regression"
    if metric is None:
        metric = "accuracy" if kind == "classification" else "pearson"
    if kind == "regression" and metric not in REGRESSION_METRICS:
        decimal = next(row for row in train if isinstance(row.values["label"], float))
        raise LrkitError(
            f"{train_file}:{decimal.line}: label {decimal.values['label']} makes this a regression, "
            f'for which metric "{metric}" is not; there is: {", ".join(sorted(REGRESSION_METRICS))}'
        )
    labels = _classes(train_file, train, validation_file, validation) if kind == "classification" else ()
    if glue is not None and fields == glue.fields and len(labels) == len(glue.labels):
        labels = glue.labels

    def dataset(rows: list[_Row]) -> datasets.Dataset:
        number = float if kind == "regression" else int
        columns: dict[str, list[Any]] = {name: [row.values[name] for row in rows] for name in fields}
        return datasets.Dataset.from_dict(columns | {"label": [number(row.values["label"]) for row in rows]})

    return Classification(
        name=folder.resolve().name,
        train=dataset(train),
        validation=dataset(validation),
        fields=fields,
        kind=kind,
        labels=labels,
        metric=metric,
    )


def _find(folder: Path, split: str) -> Path:
    for name in (f"{split}.jsonl", f"{split}.jsonl.gz"):
        if os.path.lexists(folder / name):
            return folder / name
    raise LrkitError(f"{folder}: there is no {split}.jsonl or {split}.jsonl.gz in it")


def _read(file: Path) -> list[_Row]:
    """Read the rows of a file; pass over blank lines."""
    rows: list[_Row] = []
    try:
        with opened(file) as raw:
            _read_into(rows, file, raw)
    except FileNotFoundError:
        raise LrkitError(f"{file}: a link to a file that is not there") from None
    if not rows:
        raise LrkitError(f"{file}: has no rows")
    return rows


def _read_into(rows: list[_Row], file: Path, raw: BinaryIO) -> None:
    number = 0
    most = min(LINES_BYTES, 64 * MIB + _EXPANDS * os.fstat(raw.fileno()).st_size)
    try:
        with gzip.open(raw) if file.suffix == ".gz" else nullcontext(raw) as opened_lines:
            for line in bounded_lines(cast(BinaryIO, opened_lines), "it", most):
                number += 1
                if line.strip():
                    rows.append(_Row(number, _parse(line)))
                elif number - len(rows) > _BLANK:
                    raise LrkitError(f"more than {_BLANK:,} blank lines")
    except LrkitError as error:
        raise LrkitError(f"{file}:{max(1, number)}: {error}") from None
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise LrkitError(f"{file}:{number + 1}: cannot be read: {error}") from error


def _parse(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise LrkitError(f"not UTF-8: {error.reason} at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise LrkitError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError):  # nested too deeply, or a number with thousands of digits
        raise LrkitError("not a row of texts and a label") from None
    if not isinstance(values, dict):
        raise LrkitError('not a JSON object, such as {"sentence": "...", "label": 1}')
    return values


def _check(file: Path, row: _Row, fields: tuple[str, ...]) -> None:
    """Raise LrkitError unless the fields are there, the texts are strings, and the label is a number."""
    where = f"{file}:{row.line}"
    for name in fields:
        if name not in row.values:
            raise LrkitError(f'{where}: field "{name}" is missing')
        if not isinstance(row.values[name], str):
            raise LrkitError(f'{where}: field "{name}" is {_show(row.values[name])}, not a string')
        try:
            row.values[name].encode()
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair
            raise LrkitError(f'{where}: field "{name}" is not valid Unicode: a lone surrogate') from None
    label = row.values.get("label")
    if label is None:
        raise LrkitError(f'{where}: field "label" is missing: every row needs one')
    # A bool is a kind of int in Python, but true is not a label.
    if isinstance(label, bool) or not isinstance(label, int | float):
        raise LrkitError(f"{where}: label is {_show(label)}, not a number")
    try:
        finite = math.isfinite(label)
    except OverflowError:  # a whole number beyond every float
        finite = False
    if not finite:
        raise LrkitError(f"{where}: label is {_show(label)}, not a finite number")


def _classes(train_file: Path, train: list[_Row], validation_file: Path, validation: list[_Row]) -> tuple[str, ...]:
    """Return the classes' names: "0", "1", ... up to the largest label in training."""
    first: dict[int, int] = {}  # label -> the line it is first seen at
    for row in train:
        label = row.values["label"]
        if isinstance(label, float):
            raise LrkitError(f"{train_file}:{row.line}: label {label} is no class number")
        if label < 0:
            raise LrkitError(f"{train_file}:{row.line}: label is {label}: GLUE's mark for a row without one")
        first.setdefault(label, row.line)
    classes = len(first)
    for label, line in first.items():
        if label >= classes:
            absent = next(n for n in range(label) if n not in first)
            raise LrkitError(
                f"{train_file}:{line}: label is {label}, but no row has label {absent}: number them from 0"
            )
    if classes < 2:
        raise LrkitError(f"{train_file}: every row has label 0: there is nothing to tell apart")
    for row in validation:
        label = row.values["label"]
        if label == -1:
            raise LrkitError(f"{validation_file}:{row.line}: label is -1: GLUE's mark for a row without one")
        if isinstance(label, float) or label not in first:
            raise LrkitError(
                f"{validation_file}:{row.line}: label {label} does not occur in {train_file.name}, which has "
                f"0 to {classes - 1}"
            )
    return tuple(str(n) for n in range(classes))


def _show(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


__all__ = ["FIELDS", "METRICS", "load_folder"]
