"""Load a task from a folder of ``{train,validation}.jsonl[.gz]``, ``.parquet`` or ``.csv``, by the names of its fields."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import chain

from lrkit.errors import LrkitError
from lrkit.tasks.base import Task
from lrkit.tasks.folder_labels import FIELDS
from lrkit.tasks.forms import form_of
from lrkit.tasks.found import Found, collected
from lrkit.tasks.rows import Row, rows_of, where
from lrkit.tasks.scoring import METRICS
from lrkit.tasks.splits import place_of


def load_folder(path: str | os.PathLike[str], metric: str | None = None) -> Task:
    """Load the task in a folder: its kind is that of the first training row, by `lrkit.tasks.forms.FORMS`.

    Other fields of rows are left out.

    Args:
        path: the folder, or ``FOLDER:train=NAME,validation=NAME`` for other splits than ``train`` and ``validation``,
            ``valid`` or ``dev``.
        metric: the task's option of that name; for texts with labels a name in `lrkit.tasks.METRICS`. None for the
            kind's own, for texts with labels GLUE's, or accuracy or Pearson by the labels.

    Raises:
        LrkitError: a row or a file is not as it should be, with file and line.
    """
    place = place_of(path)
    files = place.files()
    with ExitStack() as open_files:
        rows: dict[str, Iterator[Row]] = {
            split: open_files.enter_context(closing(rows_of(file))) for split, file in files.items()
        }
        first = next(rows["train"])
        try:
            form = form_of(first.values)
        except LrkitError as error:
            raise LrkitError(f"{where(files['train'], first.line)}: {error}") from None
        rows["train"] = chain([first], rows["train"])
        tables = {split: collected(file, rows[split], form.fields, form.check) for split, file in files.items()}
    task = form.make(Found(place.name, **tables, metric=metric))
    return task if metric is None else task.with_options({"metric": metric})


__all__ = ["FIELDS", "METRICS", "load_folder"]
