"""Ask what every task's loader must keep: sound rows, examples that a model learns from, a score that knows the truth."""

import math
import typing
from contextlib import suppress
from typing import Any

import numpy as np

from lrkit.errors import LrkitError
from lrkit.tasks import Classification, Task
from lrkit.tasks.asking import ask, taken_by
from lrkit.testing import reader
from lrkit.testing.base import Contract, clause
from lrkit.testing.findings import Broken, calling, expect, expect_one_line, raised

_LENGTH = 128
"""The longest example, in bytes."""


def _shifted(answers: Any) -> Any:
    """Give each row the answer of the row before it."""
    return np.roll(answers, 1, axis=0) if isinstance(answers, np.ndarray) else [*answers[-1:], *answers[:-1]]


class TaskContract(Contract):
    """The contract of a task's loader: `component` is the function of what follows the task's name and a slash."""

    rest: str | None = None
    """The argument it is called with; ``--task mine/part`` gives ``"part"``, and ``--task mine`` None."""

    def _task(self, component: Any) -> Task:
        with calling(f"called with {self.rest!r} it"):
            task = component(self.rest)
        expect(isinstance(task, Task), f"it must return a lrkit.tasks.Task, not {type(task).__name__}")
        return typing.cast(Task, task)

    def _few(self, component: Any) -> Task:
        """Return the task with a few rows, for what takes time."""
        return self._task(component).subset(8, 4)

    def _settings(self, component: Any) -> list[str]:
        return []

    def _exercise(self, component: Any) -> None:
        self._task(component)

    @clause
    def test_rows_have_texts_and_labels(self, component: Any) -> None:
        """Every row has texts that are strings; a classification's has a label, a class number or a finite float."""
        task = self._task(component)
        for split_name, rows in (("train", task.train), ("validation", task.validation)):
            with calling(f"texts({split_name})"):
                texts = task.texts(rows)
            odd = [i for i, text in enumerate(texts) if not isinstance(text, str)]
            expect(not odd, f"{split_name}: text {odd[:1]} of texts() is not a string")
            expect(texts, f"{split_name}: texts() lists no text")
            if isinstance(task, Classification):
                self._check_labels(task, split_name, np.asarray(rows["label"]))

    def _check_labels(self, task: Classification, split: str, labels: Any) -> None:
        if task.kind == "classification":
            good = labels.dtype.kind == "i" and labels.min() >= 0 and labels.max() < task.num_labels
            expect(good, f"{split}: labels must be ints from 0 to {task.num_labels - 1}")
        else:
            expect(np.isfinite(labels.astype(float)).all(), f"{split}: labels must be finite numbers")

    @clause
    def test_is_the_same_each_time(self, component: Any) -> None:
        """Called twice, it gives the same rows in the same order: seeds are compared on one set of data."""
        one, two = self._task(component), self._task(component)
        for name in ("train", "validation"):
            same = list(getattr(one, name)) == list(getattr(two, name))
            expect(same, f"asked a second time, {name} has other rows, or another order")

    @clause
    def test_truth_scores_best(self, component: Any) -> None:
        """Perfect answers (the references, in most tasks) have the best score of all: a finite one, the same each time."""
        task = self._task(component)
        with calling("perfect(), references() or score()"):
            truth, right = task.references(), task.perfect()
            scores, again = task.score(right, truth), task.score(task.perfect(), task.references())
        expect(scores == again, f"the same answers score {scores}, and then {again}")
        best, others = next(iter(scores.values())), {}
        with calling("majority"):
            if task.majority is not None:
                others["the best trivial answers (majority)"] = task.majority
        with suppress(LrkitError):  # another row's answer may not fit: there is a tag for each word, for example
            others["those shifted by a row"] = next(iter(task.score(_shifted(right), truth).values()))
        for name, other in others.items():
            sound = best >= other if task.higher_is_better else best <= other
            expect(math.isfinite(best) and sound, f"the true answers score {best}, {name} {other}")

    @clause
    def test_rows_become_examples(self, component: Any) -> None:
        """Rows become examples: `input_ids` are tokens that there are, as many as asked for at most, the same each time."""
        task, words = self._few(component), reader.tokenizer()
        for training in (True, False):
            split = "train" if training else "validation"
            with calling(f"encode({split}) or examples()"):
                one, two = (task.examples(words, _LENGTH, training=training) for _ in range(2))
            expect(one.to_list() == two.to_list(), f"asked a second time, {split} has other examples")
            expect("input_ids" in one.column_names, f"examples of {split} have no column input_ids: {one.column_names}")
            found = [np.asarray(ids, dtype=int) for ids in one["input_ids"]]
            longest = max(map(len, found))
            expect(longest <= _LENGTH, f"an example of {split} has {longest} tokens, {_LENGTH} being asked for at most")
            expect(
                all(((ids >= 0) & (ids < len(words))).all() for ids in found),
                f"{split}: tokens are not the tokenizer's",
            )
            expect(
                not (training and task.by_row) or len(one) == len(task.train),
                f"{len(task.train)} training rows became {len(one)} examples: if that may be, by_row must be False",
            )

    @clause
    def test_model_learns_and_answers(self, component: Any) -> None:
        """A tiny model takes a training batch to a finite loss, and answers every validation row in the form of a score."""
        task, words = self._few(component), reader.tokenizer()
        with calling("head"):
            model = reader.model(task.head, words)
        if model is None:  # an image's, for example
            return
        with calling("collator() or objective()"):
            examples = task.examples(words, _LENGTH, training=True)

            def batch(count: int) -> Any:
                rows = examples.select(range(min(count, len(examples))))
                rows = rows.select_columns(taken_by(model, rows.column_names))
                return task.collator(words, training=True)(rows.to_list())

            objective = task.objective(model, batch, 0)
            rows = {key: len(value) for key, value in batch(3).items()}
        expect(len({*rows.values()}) == 1, f"a batch's tensors must have a row per example, not {rows}")
        with calling("the model's forward"):
            loss = model(**batch(3))["loss"] if objective is None else objective.loss(model, batch(3))[0]
        expect(loss.isfinite().all() and loss.requires_grad, f"the loss of a training batch is {loss}")
        if objective is not None:  # what is scored is the objective's to say
            return
        model.train(False)
        with calling("predict() or answers()"):
            said = ask(task, model, words, _LENGTH)
        expect(len(said) == len(task.validation), f"{len(said)} answers for {len(task.validation)} validation rows")
        with calling("score() of a model's answers"):
            truth = task.references()
            scores = task.score(said, truth)
        wanted = [*task.score(task.perfect(), truth)]
        expect([*scores] == wanted, f"a model's scores are {[*scores]}, and those of perfect answers {wanted}")

    @clause
    def test_unknown_part_is_refused(self, component: Any) -> None:
        """Asked for a part that does not exist, it raises a `LrkitError` in one line."""
        try:
            component("no-such-part")
        except LrkitError as error:
            expect_one_line(error)
        except Exception as error:
            raise Broken(f'called with "no-such-part" it {raised(error)}; expected a LrkitError in one line') from error
