"""Read the rows of a file of data, one at a time: JSON lines, CSV or Parquet.

Whatever is wrong with a row is told with the file and the line, or in Parquet the row, both from 1.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, cast

import attrs

from lrkit.errors import LrkitError
from lrkit.reading import LINE_BYTES, LINES_BYTES, MIB, bounded_lines, opened

# A gzip file of text is three to ten times as long when unpacked; one that goes on for ever is a thousand times.
_EXPANDS = 200
_BLANK = 100_000
_BATCH = 256
"""Rows of Parquet that are unpacked at a time."""


@attrs.frozen
class Row:
    """A row as it was read.

    Attributes:
        line: where it begins; in Parquet the number of the row. Both from 1.
        values: by field.
        typed: whether values have types; in CSV all are texts.
    """

    line: int
    values: dict[str, Any]
    typed: bool = True


def where(file: Path, line: int) -> str:
    """Return the place of a row, as errors begin: file and line, in Parquet file and row."""
    return f"{file}, row {line}" if file.suffix == ".parquet" else f"{file}:{line}"


def rows_of(file: Path) -> Generator[Row]:
    """Yield the rows of a file; pass over blank lines.

    Raises:
        LrkitError: a row cannot be read, or there is none.
    """
    row = None
    try:
        with opened(file) as raw:
            for row in _READERS[file.suffix](file, raw):
                yield row
    except FileNotFoundError:
        raise LrkitError(f"{file}: a link to a file that is not there") from None
    if row is None:
        raise LrkitError(f"{file}: has no rows")


def names_of(file: Path) -> Mapping[str, tuple[str, ...]]:
    """Read the names of labels that `datasets` writes into Parquet, by column; none in other files, or if none are there."""
    if file.suffix != ".parquet":
        return {}
    import datasets
    from pyarrow import parquet

    with opened(file) as raw:
        try:
            features = datasets.Features.from_arrow_schema(parquet.ParquetFile(raw).schema_arrow)
        except Exception:  # another program's note under the same key: pyarrow, JSON and datasets have their own errors
            return {}
    inner = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
    return {name: tuple(each.names) for name, each in inner.items() if isinstance(each, datasets.ClassLabel)}


# ---- JSON lines ------------------------------------------------------------------------------------------------------


def _json_lines(file: Path, raw: BinaryIO) -> Iterator[Row]:
    number = rows = 0
    most = min(LINES_BYTES, 64 * MIB + _EXPANDS * os.fstat(raw.fileno()).st_size)
    try:
        with gzip.open(raw) if file.suffix == ".gz" else nullcontext(raw) as opened_lines:
            for line in bounded_lines(cast(BinaryIO, opened_lines), "it", most):
                number += 1
                if line.strip():
                    rows += 1
                    values = _parse(line)
                elif number - rows > _BLANK:
                    raise LrkitError(f"more than {_BLANK:,} blank lines")
                else:
                    continue
                yield Row(number, values)
    except LrkitError as error:
        raise LrkitError(f"{where(file, max(1, number))}: {error}") from None
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise LrkitError(f"{where(file, number + 1)}: cannot be read: {error}") from error


def _parse(line: bytes) -> dict[str, Any]:
    text = _text(line)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise LrkitError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError):
        raise LrkitError("not a row: it is nested too deeply, or has a number of thousands of digits") from None
    if not isinstance(values, dict):
        raise LrkitError('not a JSON object, such as {"sentence": "...", "label": 1}')
    return values


def _text(line: bytes, encoding: str = "utf-8") -> str:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        raise LrkitError(f"not UTF-8: {error.reason} at byte {error.start + 1} of the line") from None


# ---- CSV -------------------------------------------------------------------------------------------------------------


def _csv(file: Path, raw: BinaryIO) -> Iterator[Row]:
    """Read CSV with a header, commas, and cells in double quotes where they need it; a cell may go over several lines."""
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        for line in bounded_lines(raw, "it"):
            read += 1
            yield _text(line, "utf-8-sig" if read == 1 else "utf-8")

    csv.field_size_limit(max(csv.field_size_limit(), LINE_BYTES))  # of the whole process, so it is only ever raised
    cells, header, line = csv.reader(texts(), strict=True), None, 1
    try:
        while True:
            line = read + 1
            record = next(cells, None)
            if record is None:
                return
            if not record:
                continue
            if header is None:
                header = record
                if len(set(header)) < len(header):
                    raise LrkitError("the header names a column twice")
                continue
            if len(record) != len(header):
                raise LrkitError(f"the row has {len(record)} cells, and the header {len(header)}")
            yield Row(line, dict(zip(header, record, strict=True)), typed=False)
    except csv.Error as error:
        raise LrkitError(f"{where(file, line)}: not CSV: {error}") from None
    except LrkitError as error:
        raise LrkitError(f"{where(file, line)}: {error}") from None


# ---- Parquet ---------------------------------------------------------------------------------------------------------


def _parquet(file: Path, raw: BinaryIO) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = size = 0
    try:
        for batch in parquet.ParquetFile(raw).iter_batches(_BATCH):
            size += batch.nbytes
            if size > LINES_BYTES:
                raise LrkitError(f"{file}: holds more than {LINES_BYTES:,} bytes, which no such file does")
            for place in range(len(batch)):
                number += 1
                (values,) = batch.slice(place, 1).to_pylist()
                yield Row(number, values)
    except LrkitError:
        raise
    except UnicodeDecodeError as error:
        raise LrkitError(f"{where(file, number)}: not UTF-8: {error.reason}") from None
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise LrkitError(f"{where(file, number + 1)}: cannot be read: {why}") from None


_READERS: Mapping[str, Callable[[Path, BinaryIO], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".gz": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}
