"""The contracts of a named method and of a task."""

import functools
import inspect
import json
import math
import tempfile
import typing
from collections.abc import Sequence
from itertools import chain
from typing import Any

import attrs
import numpy as np
import torch

from lrkit import schedulers
from lrkit.adapt.adapted import load
from lrkit.compose import from_plain, to_plain
from lrkit.errors import LrkitError
from lrkit.method import FIELDS, Method
from lrkit.tasks import Task
from lrkit.testing.base import (
    Broken,
    Contract,
    Run,
    batch,
    builtin_actions,
    builtin_metrics,
    builtin_parameterizations,
    calling,
    clause,
    expect,
    near,
    or_refused,
    raised,
    resumes,
    tiny,
)


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
        """What was trained can be saved and loaded, merged or refused in one line, and taken out again."""
        run = Run(self._method(component), 10)
        run.to(10)
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
            expect("\n" not in str(error), f"merge is refused in more than one line: {error}")
        with calling("detach"):
            back = run.adapted.detach()
        expect(torch.equal(back(x), tiny().eval()(x)), "after detach outputs are not what they were")

    @clause
    def test_resumes_exactly(self, component: Any) -> None:
        """A run that is saved and resumed at several points is bitwise the run."""
        resumes(self._method(component), 20, (1, 5, 10, 19))


class TaskContract(Contract):
    """The contract of a task's loader: `component` is the function of what follows the task's name and a slash."""

    rest: str | None = None
    """The argument it is called with; ``--task mine/part`` gives ``"part"``, and ``--task mine`` None."""

    def _task(self, component: Any) -> Task:
        with calling(f"called with {self.rest!r} it"):
            task = component(self.rest)
        expect(isinstance(task, Task), f"it must return a lrkit.tasks.Task, not {type(task).__name__}")
        return typing.cast(Task, task)

    def _settings(self, component: Any) -> list[str]:
        return []

    def _exercise(self, component: Any) -> None:
        self._task(component)

    @clause
    def test_rows_have_texts_and_labels(self, component: Any) -> None:
        """Every row has strings in its fields, and a label that there is: a class's number, or a finite float."""
        task = self._task(component)
        for split_name, rows in (("train", task.train), ("validation", task.validation)):
            for field in task.fields:
                odd = [i for i, text in enumerate(rows[field]) if not isinstance(text, str)]
                expect(not odd, f"{split_name} row {odd[:1]}: {field} is not a string")
            labels = np.asarray(rows["label"])
            if task.kind == "classification":
                good = labels.dtype.kind == "i" and labels.min() >= 0 and labels.max() < task.num_labels
                expect(good, f"{split_name}: labels must be ints from 0 to {task.num_labels - 1}")
            else:
                expect(np.isfinite(labels.astype(float)).all(), f"{split_name}: labels must be finite numbers")

    @clause
    def test_is_the_same_each_time(self, component: Any) -> None:
        """Asked twice, it gives the same rows in the same order: seeds are compared on one set of data."""
        one, two = self._task(component), self._task(component)
        for name in ("train", "validation"):
            columns = (*one.fields, "label")
            same = all(list(getattr(one, name)[c]) == list(getattr(two, name)[c]) for c in columns)
            expect(same, f"asked a second time, {name} has other rows, or another order")

    @clause
    def test_truth_scores_best(self, component: Any) -> None:
        """Predicting the labels themselves gives the highest score, and a finite one; larger is better."""
        task = self._task(component)
        truth = np.asarray(task.validation["label"])
        best = next(iter(task.score(truth, truth).values()))
        other = next(iter(task.score(np.roll(truth, 1), truth).values()))
        expect(math.isfinite(best) and best >= other, f"the true labels score {best}, shifted ones {other}")

    @clause
    def test_unknown_part_is_refused(self, component: Any) -> None:
        """A part that there is not is a `LrkitError` in one line."""
        try:
            component("no-such-part")
        except LrkitError as error:
            expect("\n" not in str(error), f"refused in more than one line: {error}")
        except Exception as error:
            raise Broken(f'called with "no-such-part" it {raised(error)}; expected a LrkitError in one line') from error
