"""The rank that each row gave to the layers in which it belongs, on a task that knows them."""

import attrs

from lrkit.study.recall import Recall, recalls_of
from lrkit.study.report.view import View


@attrs.frozen
class Truth:
    """The rows' recalls, and the draws in which a right layer was missed."""

    rows: list[tuple[int, tuple[str, ...]]]
    misses: list[tuple[int, list[str]]]

    @classmethod
    def of(cls, recalls: tuple[Recall, ...]) -> "Truth":
        """Collect them."""
        return cls(
            rows=[(each.row, tuple("–" if text == "-" else text for text in each.texts())) for each in recalls],
            misses=[(each.row, [str(draw) for draw in each.misses]) for each in recalls if each.misses],
        )


def truth(view: View, task: str) -> Truth | None:
    """Return the section of one task; None if it does not know its right layers."""
    recalls = recalls_of(view.record, task)
    return Truth.of(recalls) if recalls else None
