"""Ask how a parameterization bears decisions: masked, cut, and in runs with lrkit's metrics and actions."""

import functools
from typing import Any

import torch
from torch.nn import functional as F

from lrkit import actions, metrics
from lrkit.errors import LrkitError
from lrkit.method import Method
from lrkit.testing.base import clause
from lrkit.testing.comparisons import gap, near
from lrkit.testing.findings import calling, expect, expect_one_line
from lrkit.testing.neighbours import builtin_actions, builtin_metrics, method_with, or_refused, taken
from lrkit.testing.parameterization.clauses import ParameterizationClauses
from lrkit.testing.parameterization.subjects import stirred
from lrkit.testing.runs import POINTS, Run, decides, resumes
from lrkit.testing.tiny import batch


class Decisions(ParameterizationClauses):
    """The clauses about units that lose, and about runs in which decisions are taken."""

    @clause
    def test_masked_components_contribute_nothing(self, component: Any) -> None:
        """If a core value is zero its component adds nothing, whatever its other entries; its gradient can bring it back."""
        parts = [part for part in component.parts if part.axis is not None]
        core = next((part for part in parts if part.core and part.trains), None)
        if core is None:
            return
        model, adapted = stirred(component)
        x, labels = batch()
        ranked = [adapter for adapter in adapted.adapters.values() if len(core.of(adapter))]
        with torch.no_grad():
            for adapter in ranked:
                core.of(adapter)[0] = 0.0
            before = model(x)
            for part in parts:
                for adapter in ranked:
                    if not part.core and part.axis is not None:
                        part.of(adapter).select(part.axis, 0).add_(0.5)
            moved = gap(model(x), before)
        expect(
            moved <= 1e-5,
            f"component 0 has a core value of zero in every layer, and moving it changes outputs by {moved:.2g}",
        )
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()  # type: ignore[no-untyped-call]
        grads = [core.of(adapter).grad for adapter in ranked]
        expect(
            any(grad is not None and bool(grad[0] != 0) for grad in grads),
            "at a core value of zero the gradient is zero in every layer: a pruned component could never come back",
        )

    @clause
    def test_can_be_cut(self, component: Any) -> None:
        """`compact`, which cuts pruned components out of every part, leaves outputs as they are, and training goes on."""
        for action in (actions.Prune(), actions.Zero()):
            metric = metrics.SensitivityUncertainty()
            build = functools.partial(method_with, component, action=action, metric=metric)
            method = or_refused(build, component, action, metric)
            if method is not None:
                self._cut(method)

    def _cut(self, method: Method) -> None:
        run = Run(method, 10)
        run.to(9)
        model, (x, _) = run.model.eval(), batch()
        before = model(x).detach()
        try:
            run.adapted.compact()
        except LrkitError as error:
            expect_one_line(error, "compact is refused")
            return
        with calling("forward after compact"):
            after = model(x)
        expect(near(after, before), f"compact changes outputs by {gap(after, before):.2g}")
        with calling("a step after compact"):
            run.to(10)

    @clause
    def test_trains_or_is_refused_everywhere(self, component: Any) -> None:
        """With each of lrkit's metrics and actions it is refused with both sides named, or trains and decides."""
        for name, method in taken(component, metric=builtin_metrics(), action=builtin_actions()):
            with calling(name):
                run = Run(method, 10)
                run.to(10)
                decides(run)

    @clause
    def test_resumes_exactly(self, component: Any) -> None:
        """A run that is saved and resumed is bitwise the run, alone and with every action that it takes."""
        resumes(Method(parameterization=component), 6, (2,))
        for action in builtin_actions():
            metric = metrics.GradientUncertainty()
            build = functools.partial(method_with, component, metric=metric, action=action)
            method = or_refused(build, component, metric, action)
            if method is not None:
                resumes(method, 10, POINTS)
