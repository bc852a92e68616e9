"""Effect sizes, and equivalence within the margin: how large a difference is, beside whether there is one."""

import attrs

from lrkit.study.columns import EFFECTS, columns_of
from lrkit.study.report.results import Heading, Line, tabled
from lrkit.study.report.view import View

_EFFECT = (
    "Effect size: Δ over the standard deviation of the differences, less its small-sample bias (Hedges' g), so that 1 means "
    "that rows differ by as much as a difference varies from seed to seed. Its interval is by the noncentral t "
    "distribution, and assumes normal differences."
)
_EQUIVALENCE = (
    "Within the margin: two one-sided sign-flip tests against it, corrected over the rows (Holm). Before the correction "
    "both reject at 0.05 exactly if the 90 % interval lies inside the margin, which is the band in the plot."
)


@attrs.frozen
class Effects:
    """The tables by task, and the sentences below them."""

    tables: list[tuple[str, list[Heading], list[Line]]]
    caption: list[str]

    def __bool__(self) -> bool:
        return any(headings for _, headings, _ in self.tables)

    @classmethod
    def of(cls, view: View) -> "Effects":
        """Collect them; empty if no row has three pairs, and there is no margin."""
        tables = view.by_task(lambda view, task: tabled(view, task, EFFECTS, "interval_90"))
        shown = {column.key for column in columns_of(view.table, EFFECTS)}
        caption = [
            *([_EFFECT] if "effect_corrected" in shown else []),
            *([_EQUIVALENCE] if "p_equivalent_holm" in shown else []),
        ]
        return cls([(name, *found) for name, found in tables if found[0]], caption)
