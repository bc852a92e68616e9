"""Host an action for its clauses."""

import functools
from typing import Any, ClassVar

from lrkit.actions import Action
from lrkit.loop.fates import fate_of
from lrkit.method import Method
from lrkit.parameterizations import Parameterization
from lrkit.process import as_it_was
from lrkit.testing.action.stage import Stage, ballot_of, on
from lrkit.testing.base import PartContract
from lrkit.testing.findings import expect
from lrkit.testing.neighbours import builtin_parameterizations, or_refused


class ActionClauses(PartContract):
    """The clauses of every component, with an action on a parameterization that it fits."""

    parameterizations: ClassVar[tuple[Parameterization, ...]] = ()
    """Parameterizations beside lrkit's own that it is to be tried on."""
    exact: ClassVar[bool] = True
    """False for a rule of `decide` that keeps another number than the budget, as its source has it. An action's class may
    say so itself, by an attribute `exact`, for a check that does not know this class."""

    def _is_exact(self, component: Action) -> bool:
        return self.exact and bool(getattr(component, "exact", True))

    def _fitting(self, component: Action) -> list[Parameterization]:
        fitting = []
        for parameterization in (*self.parameterizations, *builtin_parameterizations()):
            build = functools.partial(on, component, parameterization)
            if or_refused(build, component, parameterization) is not None:
                fitting.append(parameterization)
        expect(fitting, "it refuses every parameterization: name one that it fits in `parameterizations`")
        return fitting

    def _host(self, component: Any) -> Method:
        return on(component, self._fitting(component)[0])

    def _exercise(self, component: Any) -> None:
        with as_it_was():
            stage = Stage(component, self._fitting(component)[0])
        component.proximal(stage.blocks, 0.5, stage.optimizer)
        for which in ("all", "half", "none"):
            component.decide(ballot_of(20, 8))
            fate = fate_of(component)
            for call in (fate.hold, fate.restore):
                call(stage.blocks, stage.kept(which))
            component.apply(stage.blocks, stage.kept(which), stage.optimizer)
