"""Schedulers: how much may be kept at a step."""

from lrkit.schedulers.base import Scheduler
from lrkit.schedulers.shapes import Constant, Cubic, Linear
from lrkit.schedulers.timetable import Timetable

__all__ = ["Constant", "Cubic", "Linear", "Scheduler", "Timetable"]
