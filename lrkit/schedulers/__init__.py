"""Schedulers: how much may be kept at a step."""

from collections.abc import Mapping

from lrkit.hookspecs import hookimpl
from lrkit.schedulers.base import Scheduler
from lrkit.schedulers.shapes import Constant, Cubic, Linear, Once, Quadratic
from lrkit.schedulers.timetable import Timetable


@hookimpl
def lrkit_schedulers() -> Mapping[str, type[Scheduler]]:
    """Offer the built-in schedulers."""
    return {"constant": Constant, "linear": Linear, "quadratic": Quadratic, "cubic": Cubic, "once": Once}


__all__ = ["Constant", "Cubic", "Linear", "Once", "Quadratic", "Scheduler", "Timetable"]
