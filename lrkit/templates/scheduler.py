"""A plug-in of lrkit: the scheduler ``example-name``."""

import math
from collections.abc import Mapping

import attrs

import lrkit


@attrs.frozen(kw_only=True)
class ExampleName(lrkit.Scheduler):
    """Half a cosine from `start` to `target`. Source: the shape of arXiv 1608.03983, Eq. 5."""

    def decay(self, progress: float) -> float:
        """Return (1 + cos(π u)) / 2: 1 at u = 0, 0 at u = 1, never increasing."""
        return (1 + math.cos(math.pi * progress)) / 2


@lrkit.hookimpl
def lrkit_schedulers() -> Mapping[str, type[lrkit.Scheduler]]:
    """Offer the scheduler of this package."""
    return {"example-name": ExampleName}
