"""The kind of memory that the loop keeps for a metric, by the signal that the metric reads."""

from typing import Any

from lrkit.loop.statistics import Statistics
from lrkit.loop.streams import Streams
from lrkit.metrics import Importance

_KINDS: dict[str, Any] = {
    "all": Statistics,
    "core": Statistics,
    "component": Statistics,
    "nothing": Statistics,
    "inputs": Streams,
    "gradient": Streams,
}
"""A kind takes the metrics that read its signal, as its own annotations say; `Any` is for them alone."""

Remembered = Statistics | Streams
"""What is remembered for a metric: entry by entry, or layer by layer."""


def kind_of(metric: Importance) -> Any:
    """Return the class that remembers what a metric reads."""
    return _KINDS[metric.reads]
