"""A plug-in of lrkit: the task ``example-name``."""

from collections.abc import Callable, Mapping

import datasets

import lrkit

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def load(rest: str | None) -> lrkit.tasks.Task:
    """Ask which of two numbers, written as words, is larger. Source: this package.

    Args:
        rest: the part after ``example-name/``; this task has no parts, so it must be None.
    """
    if rest is not None:
        raise lrkit.LrkitError(f'task "example-name" has no parts: write "example-name", not "example-name/{rest}"')
    pairs = [(i, j) for i in range(len(WORDS)) for j in range(len(WORDS)) if i != j]
    rows = [{"first": WORDS[i], "second": WORDS[j], "label": int(i < j)} for i, j in pairs]
    # Every third pair is for validation: no row is in both splits.
    return lrkit.tasks.Classification(
        name="example-name",
        train=datasets.Dataset.from_list([row for n, row in enumerate(rows) if n % 3]),
        validation=datasets.Dataset.from_list(rows[::3]),
        fields=("first", "second"),
        labels=("first", "second"),
    )


@lrkit.hookimpl
def lrkit_tasks() -> Mapping[str, Callable[[str | None], lrkit.tasks.Task]]:
    """Offer the task of this package."""
    return {"example-name": load}
