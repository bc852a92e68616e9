"""Ask what every task's loader must keep: sound rows, the same each time, and a score that knows the truth."""

import math
import typing
from typing import Any

import numpy as np

from lrkit.errors import LrkitError
from lrkit.tasks import Task
from lrkit.testing.base import Contract, clause
from lrkit.testing.findings import Broken, calling, expect, expect_one_line, raised


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
        """Every row has strings in its fields, and a label: the number of a class, or a finite float."""
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
        """Called twice, it gives the same rows in the same order: seeds are compared on one set of data."""
        one, two = self._task(component), self._task(component)
        for name in ("train", "validation"):
            columns = (*one.fields, "label")
            same = all(list(getattr(one, name)[c]) == list(getattr(two, name)[c]) for c in columns)
            expect(same, f"asked a second time, {name} has other rows, or another order")

    @clause
    def test_truth_scores_best(self, component: Any) -> None:
        """Perfect predictions (the labels, in most tasks) give the highest score, and a finite one; larger is better."""
        task = self._task(component)
        truth, right = np.asarray(task.validation["label"]), np.asarray(task.perfect())
        best = next(iter(task.score(right, truth).values()))
        other = next(iter(task.score(np.roll(right, 1, axis=0), truth).values()))
        expect(math.isfinite(best) and best >= other, f"the true labels score {best}, shifted ones {other}")

    @clause
    def test_unknown_part_is_refused(self, component: Any) -> None:
        """Asked for a part that does not exist, it raises a `LrkitError` in one line."""
        try:
            component("no-such-part")
        except LrkitError as error:
            expect_one_line(error)
        except Exception as error:
            raise Broken(f'called with "no-such-part" it {raised(error)}; expected a LrkitError in one line') from error
