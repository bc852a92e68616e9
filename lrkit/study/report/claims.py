"""The claims of a study file, judged."""

from lrkit.study.claims import Judged, judge
from lrkit.study.report.view import View


def claims(view: View) -> tuple[Judged, ...]:
    """Return the study's claims with their verdicts; empty if it states none."""
    return judge(view.record)
