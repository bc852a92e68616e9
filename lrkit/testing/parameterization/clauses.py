"""Host a parameterization for its clauses."""

from typing import Any

import torch
from torch.nn import functional as F

from lrkit.adapt.adapted import attach
from lrkit.method import Method
from lrkit.process import as_it_was
from lrkit.testing.base import PartContract
from lrkit.testing.tiny import batch, tiny


class ParameterizationClauses(PartContract):
    """The clauses of every component, with a parameterization alone as its method."""

    def _host(self, component: Any) -> Method:
        return Method(parameterization=component)

    def _exercise(self, component: Any) -> None:
        # Its own start may be drawn from torch's generator, and from nothing else.
        with as_it_was():
            model = tiny().eval()
        rng = torch.get_rng_state()
        adapted = attach(model, Method(parameterization=component))
        torch.set_rng_state(rng)
        x, labels = batch()
        loss = F.cross_entropy(model(x), labels) + adapted.penalty()
        loss.backward()  # type: ignore[no-untyped-call]
