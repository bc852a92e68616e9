"""Values that others published, as a study file states them: shown beside a study's own, and compared by no test."""

from collections.abc import Sequence
from typing import Any

import attrs

from lrkit.errors import LrkitError, nearest, shown


@attrs.frozen(kw_only=True)
class Published:
    """``[published]`` in a study file.

    >>> Published(source="arXiv 2303.10512, Table 1", values={"adalora": {"glue/sst2": "95.80"}})

    Args:
        source: whoever published them, and where.
        values: label of a row to task to the value as it is printed: a text, or a number.
    """

    source: str
    values: dict[str, dict[str, Any]]

    def of(self, row: str, task: str) -> str:
        """Return the value of a row on a task as it is printed; empty if there is none."""
        value = self.values.get(row, {}).get(task, "")
        return value if isinstance(value, str) else f"{value:g}"


def check_published(published: Published | None, rows: Sequence[str]) -> None:
    """Raise LrkitError if a value is neither a text nor a number, or is of no row.

    A file may state values of rows that a profile leaves out. So a label that no row has is refused only if it is like that
    of a row without values, or if none of the labels is that of a row.
    """
    if published is None:
        return
    without = [label for label in rows if label not in published.values]
    for row, values in published.values.items():
        for task, value in values.items():
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise LrkitError(f'published: "{row}" on {task} must be as it is printed, "95.80", not {shown(value)}')
    unknown = [label for label in published.values if label not in rows]
    for label in unknown:
        if nearest(label, without) or len(unknown) == len(published.values):
            raise LrkitError(
                f'published: there is no row "{label}"{nearest(label, without)}; there are {", ".join(rows)}'
            )
