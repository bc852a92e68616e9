"""The rows that were found in a folder of data, column by column, with the line of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.errors import LrkitError
from lrkit.tasks.fields import Field
from lrkit.tasks.rows import Row, names_of, where

if TYPE_CHECKING:
    import datasets


@attrs.frozen
class Table:
    """The rows of a split.

    Attributes:
        file: where they were read.
        columns: values by column, checked.
        lines: the line of each row.
    """

    file: Path
    columns: dict[str, list[Any]]
    lines: list[int]

    def where(self, row: int) -> str:
        """Return file and line of a row, as errors begin."""
        return where(self.file, self.lines[row])

    def names(self, column: str) -> tuple[str, ...]:
        """Return the names of labels that the file itself has for a column; empty if it has none."""
        return names_of(self.file).get(column, ())

    def with_columns(self, columns: dict[str, list[Any]]) -> Table:
        """Return the same rows with other columns."""
        return attrs.evolve(self, columns=columns)

    def dataset(self, features: Mapping[str, Any] | None = None) -> datasets.Dataset:
        """Return the rows as a task takes them.

        Args:
            features: the columns' types for `datasets`; None to find them in the values.
        """
        import datasets

        types = None if features is None else datasets.Features(features)
        return datasets.Dataset.from_dict(self.columns, features=types)


@attrs.frozen
class Found:
    """What a folder holds.

    Attributes:
        name: the task's.
        train, validation: the rows.
        metric: the one that was asked for.
    """

    name: str
    train: Table
    validation: Table
    metric: str | None = None

    @property
    def splits(self) -> tuple[Table, Table]:
        """Return both splits."""
        return self.train, self.validation

    def alike(self, column: str) -> Found:
        """Number the labels of a column, or of the lists in it, in validation as in training, if the files name them.

        `datasets` sorts the names of each split by themselves, so that one number may stand for two names.

        Raises:
            LrkitError: a label's name does not occur in training.
        """
        ours, theirs = self.train.names(column), self.validation.names(column)
        if not ours or not theirs or ours == theirs:
            return self
        number = {name: at for at, name in enumerate(ours)}

        def renumbered(value: Any, row: int) -> Any:
            if isinstance(value, list):
                return [renumbered(each, row) for each in value]
            if not isinstance(value, int) or not 0 <= value < len(theirs):
                return value  # a text; or -1, the mark of a row without a label
            if theirs[value] not in number:
                raise LrkitError(
                    f'{self.validation.where(row)}: {column} is "{theirs[value]}", which {self.train.file.name} does not '
                    f"name: it has {', '.join(ours)}"
                )
            return number[theirs[value]]

        values = [renumbered(value, row) for row, value in enumerate(self.validation.columns[column])]
        return attrs.evolve(self, validation=self.validation.with_columns(self.validation.columns | {column: values}))

    def task(self, features: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return name and rows as a kind of task takes them."""
        train, validation = (split.dataset(features) for split in self.splits)
        return {"name": self.name, "train": train, "validation": validation}

    def with_columns(self, change: Callable[[Table], dict[str, list[Any]]]) -> Found:
        """Return the same rows with other columns, which are made of each split."""
        train, validation = (split.with_columns(change(split)) for split in self.splits)
        return attrs.evolve(self, train=train, validation=validation)


def collected(
    file: Path, rows: Iterable[Row], fields: Mapping[str, Field], check: Callable[[dict[str, Any]], None]
) -> Table:
    """Check the rows of a split, and keep what a task takes of them.

    Args:
        file: where they are read.
        rows: all of them, one at a time.
        fields: the fields that each must have; others are left out.
        check: checks that the fields of a row fit together.

    Raises:
        LrkitError: a field is missing or wrong, with file and line.
    """
    table = Table(file, {name: [] for name in fields}, [])
    for row in rows:
        try:
            values = {name: _value(row, name, field) for name, field in fields.items()}
            check(values)
        except LrkitError as error:
            raise LrkitError(f"{where(file, row.line)}: {error}") from None
        table.lines.append(row.line)
        for name, value in values.items():
            table.columns[name].append(value)
    return table


def _value(row: Row, name: str, field: Field) -> Any:
    if name not in row.values and not field.optional:
        raise LrkitError(f'field "{name}" is missing')
    value = row.values.get(name, "")
    return field.read(value if row.typed or field.text else _of_cell(value), name)


def _of_cell(text: str) -> Any:
    """Read a cell of CSV that is no text as JSON; it stays a text if it is none, and is refused as such."""
    try:
        return json.loads(text)
    except (RecursionError, ValueError):
        return text
