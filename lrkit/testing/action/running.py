"""Ask how an action runs in a method: what it refuses, what it takes out, and whether it resumes."""

import functools
import warnings
from typing import Any

import torch

from lrkit import metrics
from lrkit.fit import no_entries
from lrkit.testing.action.clauses import ActionClauses
from lrkit.testing.action.stage import Nothing, on
from lrkit.testing.base import clause
from lrkit.testing.findings import calling, expect
from lrkit.testing.neighbours import builtin_metrics, builtin_parameterizations, or_refused, taken
from lrkit.testing.runs import POINTS, Run, decides, resumes
from lrkit.units import present, split

_EITHER = (metrics.Random(), metrics.GradientUncertainty())


class Running(ActionClauses):
    """The clauses about whole runs."""

    @clause
    def test_refusal_names_both_sides(self, component: Any) -> None:
        """Each parameterization is taken, or refused when the method is built, in one line that names both sides."""
        for parameterization in (*self.parameterizations, *builtin_parameterizations(), Nothing()):
            with calling(f"refusal({parameterization!r})"):
                reason = component.refusal(parameterization)
            expect(
                reason is None or (isinstance(reason, str) and reason.strip()),
                f"refusal must return None or the reason in words, not {reason!r}",
            )
            with calling(f"a method with {parameterization!r}"):
                or_refused(functools.partial(on, component, parameterization), component, parameterization)

    @clause
    def test_what_has_lost_is_out(self, component: Any) -> None:
        """After the last decision a masked or removed component adds nothing, whatever the optimizer does."""
        if component.unit != "component" or component.fate not in ("masked", "removed"):
            return
        for parameterization in self._fitting(component):
            with calling(f"a run with {parameterization!r}"):
                run = Run(on(component, parameterization), 10)
                run.to(10)  # the last decision was after step 8
            (state,) = run.adapted.controller.policies
            for block, keep in zip(state.blocks, split(state.kept, state.blocks), strict=True):
                there = present(block.module, block.parts)
                back = int((there & ~keep).sum())
                expect(
                    not back,
                    f"on {parameterization!r}: {back} components of {block.name} that lost are not zero two steps after the "
                    'last decision, and are counted as gone: `apply` must take them out, or fate be "dimmed"',
                )

    @clause
    def test_what_is_frozen_stays(self, component: Any) -> None:
        """If the fate is "frozen", every unit that is kept moves at the next step, one that came back too, and no other."""
        for parameterization in self._fitting(component) if component.fate == "frozen" else ():
            with calling(f"a run with {parameterization!r}"), warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                # Chance lets units come back; an action that goes by scores of entries does not take it.
                metric = next(m for m in _EITHER if no_entries(m, component) is None)
                run = Run(on(component, parameterization, metric=metric), 10)
                (state,) = run.adapted.controller.policies
                for _ in range(10):
                    kept = split(state.kept, state.blocks)
                    before = [[p.detach().clone() for p in block.tensors] for block in state.blocks]
                    run.step()
                    for block, keep, old in zip(state.blocks, kept, before, strict=True):
                        moved = not all(map(torch.equal, block.tensors, old))
                        expect(
                            moved == bool(keep.any()),
                            f"on {parameterization!r}: {block.name} is {'' if keep.any() else 'not '}kept, and step "
                            f"{run.adapted.step} {'moves' if moved else 'does not move'} it",
                        )
            lines = [line for each in said if "no gradient" in (line := str(each.message))]
            expect(not lines, f"on {parameterization!r}: {lines[0] if lines else ''}")

    @clause
    def test_trains_with_all_it_takes(self, component: Any) -> None:
        """With each parameterization and metric that is not refused it trains, decides, and can be cut if it prunes."""
        for name, method in taken(component, parameterization=self._fitting(component), metric=builtin_metrics()):
            with calling(name):
                run = Run(method, 10)
                run.to(8)
                if component.unit == "component":
                    run.adapted.compact()
                run.to(10)
                decides(run, self._is_exact(component))

    @clause
    def test_resumes_exactly(self, component: Any) -> None:
        """A run that is saved and resumed, before, between and after decisions, is bitwise the run."""
        for parameterization in self._fitting(component):
            resumes(on(component, parameterization), 10, POINTS)
