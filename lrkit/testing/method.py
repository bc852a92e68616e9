"""Ask what every named method must keep: it is plain data, its parts can be swapped, and it trains."""

import functools
import inspect
import json
import tempfile
import typing
from collections.abc import Sequence
from itertools import chain
from typing import Any

import attrs
import torch

from lrkit import schedulers
from lrkit.adapt.adapted import load
from lrkit.compose import from_plain, to_plain
from lrkit.errors import LrkitError
from lrkit.method import FIELDS, Method
from lrkit.testing.base import Contract, clause
from lrkit.testing.comparisons import near
from lrkit.testing.findings import calling, expect, expect_one_line
from lrkit.testing.neighbours import builtin_actions, builtin_metrics, builtin_parameterizations, or_refused
from lrkit.testing.runs import Run, resumes
from lrkit.testing.tiny import batch, tiny


class MethodContract(Contract):
    """The contract of a method's function: `component` is the function, or a `lrkit.Method`."""

    def _method(self, component: Any) -> Method:
        if isinstance(component, Method):
            return component
        with calling("called without arguments it"):
            method = component()
        expect(isinstance(method, Method), f"it must return a lrkit.Method, not {type(method).__name__}")
        return typing.cast(Method, method)

    def _settings(self, component: Any) -> list[str]:
        return [] if isinstance(component, Method) else super()._settings(component)

    def _documented(self, component: Any) -> tuple[str, str]:
        # A composition in place has no docstring to have a source in.
        return ("Source:", "") if isinstance(component, Method) else super()._documented(component)

    def _exercise(self, component: Any) -> None:
        self._method(component)

    @clause
    def test_arguments_are_keywords_with_defaults(self, component: Any) -> None:
        """It gives a `lrkit.Method` without arguments, the same each time; its arguments are keywords that have defaults."""
        method = self._method(component)
        if isinstance(component, Method):
            return
        expect(self._method(component) == method, "called a second time it gives another method")
        for name, argument in inspect.signature(component).parameters.items():
            expect(
                argument.kind is inspect.Parameter.KEYWORD_ONLY and argument.default is not argument.empty,
                f"the argument {name} must be a keyword with a default: def method(*, {name}=...)",
            )

    @clause
    def test_survives_plain_data(self, component: Any) -> None:
        """It goes to JSON and comes back equal, so each of its components must be registered."""
        method = self._method(component)
        with calling("to_plain"):
            text = json.dumps(to_plain(method))
        with calling("from_plain"):
            expect(from_plain(json.loads(text)) == method, "through plain data it becomes another method")

    @clause
    def test_parts_can_be_swapped(self, component: Any) -> None:
        """Each of lrkit's own parts in the place of its own either fits, or is refused in one line that names both sides."""
        method = self._method(component)
        swaps: dict[str, Sequence[Any]] = {
            "parameterization": builtin_parameterizations(),
            "metric": builtin_metrics(),
            "scheduler": [schedulers.Constant(), schedulers.Linear(), schedulers.Cubic()],
            "action": builtin_actions(),
        }
        for field in FIELDS if method.metric is not None else FIELDS[:1]:
            for part in swaps[field]:
                sides = [part, *(getattr(method, other) for other in FIELDS if other != field)]
                sides += chain.from_iterable((policy.metric, policy.scheduler, policy.action) for policy in method.also)
                with calling(f"a swap of {field} for {part!r}"):
                    or_refused(functools.partial(attrs.evolve, method, **{field: part}), *sides)

    @clause
    def test_loss_goes_down(self, component: Any) -> None:
        """On the tiny model the loss goes down, and every policy takes its last decision."""
        run = Run(self._method(component), 25)
        losses = run.to(25)
        expect(
            min(losses[-5:]) < losses[0], f"the loss is {losses[0]:.4f} at first and {min(losses[-5:]):.4f} at the end"
        )
        for state in run.adapted.controller.policies:
            taken = [d for d in run.adapted.history if d.policy == state.index]
            expect(taken, f"policy {state.index} has taken no decision")
            expect(state.ended, f"policy {state.index} has not taken its last decision")

    @clause
    def test_saved_and_taken_out(self, component: Any) -> None:
        """After training it can be saved and loaded, merged or refused in one line, and taken out again."""
        run = Run(self._method(component), 20)
        run.to(20)
        x, _ = batch()
        outputs = run.model.eval()(x)
        with tempfile.TemporaryDirectory() as folder, calling("save or load"):
            run.adapted.save(folder)
            fresh = tiny().eval()
            loaded = load(fresh, folder)
        expect(torch.equal(fresh(x), outputs), "a model loaded from what was saved has other outputs")
        try:
            expect(near(loaded.merge()(x), outputs), "after merge outputs differ")
        except LrkitError as error:
            expect_one_line(error, "merge is refused")
        with calling("detach"):
            back = run.adapted.detach()
        expect(torch.equal(back(x), tiny().eval()(x)), "after detach outputs are not what they were")

    @clause
    def test_resumes_exactly(self, component: Any) -> None:
        """A run that is saved and resumed at several points is bitwise the run."""
        resumes(self._method(component), 20, (1, 5, 10, 19))
