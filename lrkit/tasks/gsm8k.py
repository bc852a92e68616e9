"""GSM8K: grade-school mathematics in words, of which the number at the end of a solution counts.

Source: Cobbe et al. 2021, arXiv 2110.14168; 7,473 rows for training, and 1,319 of the split "test" for validation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lrkit.errors import LrkitError
from lrkit.tasks.completion import Completion
from lrkit.tasks.hub import load_hub

if TYPE_CHECKING:
    import datasets

REPOSITORY = "openai/gsm8k"
MAX_NEW_TOKENS = 256
"""Enough for nearly all of the data set's own solutions."""


def load_gsm8k(rest: str | None) -> Completion:
    """Load GSM8K from the hub (or from the hub's cache on this machine, if it is out of reach). Source: arXiv 2110.14168.

    Raises:
        LrkitError: for a part, or if the data cannot be had.
    """
    if rest is not None:
        raise LrkitError(f'task "gsm8k" has no parts: write "gsm8k", not "gsm8k/{rest}"')
    splits = load_hub("gsm8k", REPOSITORY, "main")
    return from_rows("gsm8k", splits["train"], splits["test"])


def from_rows(name: str, train: datasets.Dataset, validation: datasets.Dataset) -> Completion:
    r"""Make the task of questions with solutions.

    A prompt is ``"Question: ...\nAnswer:"``, and its completion a blank and the solution, in which the marks of a
    calculator (``<<48/2=24>>``) stay: that is how the data are. The model is a plain one: no chat template is used.

    Args:
        name: the task's name.
        train: the rows, with the columns `question` and `answer`, which ends with ``#### 72``.
        validation: likewise.

    Raises:
        LrkitError: a column is not there, or an answer has no number.
    """
    for split in (train, validation):
        absent = [column for column in ("question", "answer") if column not in split.column_names]
        if absent:
            raise LrkitError(f'task "{name}": there is no column "{absent[0]}", only {", ".join(split.column_names)}')
    parts = {"train": written(train), "validation": written(validation)}
    return Completion(name=name, **parts, metric="final_number", max_new_tokens=MAX_NEW_TOKENS)


def written(rows: datasets.Dataset) -> datasets.Dataset:
    """Return rows with `prompt` and `completion` in place of `question` and `answer`."""
    import datasets

    columns: Mapping[str, Sequence[Any]] = {
        "prompt": [f"Question: {question}\nAnswer:" for question in rows["question"]],
        "completion": [f" {answer}" for answer in rows["answer"]],
    }
    return datasets.Dataset.from_dict(dict(columns))
