"""Extractive question answering: the answer to a question is a part of a text."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.errors import LrkitError, LrkitWarning, cut
from lrkit.settings import flag, real, whole
from lrkit.tasks.answers import squad, squad_v2, trivial
from lrkit.tasks.base import Task
from lrkit.tasks.generating import padding_on
from lrkit.tasks.head import Head
from lrkit.tasks.learnt import Sample
from lrkit.tasks.spans import Answer, Window, choose
from lrkit.tasks.windows import null_of, placed, position_of, windows_of

if TYPE_CHECKING:
    import datasets
    from torch import Tensor, nn

_END = 200
_FARTHEST = 1e30
"""The largest doubt that is kept: JSON has no infinity."""


@attrs.frozen(kw_only=True, eq=False)
class QuestionAnswering(Task):
    """Questions about contexts, each with the context's own words for an answer.

    A context that is longer than the model has room for is read in windows that overlap (`lrkit.tasks.windows`). A step
    learns, of each window, the first and the last token of the answer, or [CLS] twice if the answer is not in it. The answer
    to a question is the best span over its windows (`lrkit.tasks.spans`), and is scored as SQuAD's scripts do
    (`lrkit.tasks.answers`).

    Attributes:
        train, validation: the rows, each with ``question`` (str), ``context`` (str) and ``answers``, a table of ``text``
            [str] and ``answer_start`` [int], the character of the context that each text begins at. A step learns the first
            one, a score takes the best of them. Rows whose answer does not stand where it should, and those whose answer is
            too long for any window, are left out of training, with a warning that counts them.
        stride: tokens that a window has in common with the one before; None for a third of a window. An answer that is
            longer than the stride may be in no window as a whole.
        max_answer_length: the most tokens of an answer that is given; a step learns longer ones too.
        unanswerable: questions may have no answer (no text in ``answers``), as in SQuAD 2.0.
        threshold: how much the score of "no answer" must be above the best span's to be given; only if `unanswerable`.

    Raises:
        LrkitError: rows whose answers are not of that form, or a row without an answer if `unanswerable` is not set.
    """

    stride: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole(0)))
    max_answer_length: int = attrs.field(default=30, validator=whole(1))
    unanswerable: bool = attrs.field(default=False, validator=flag())
    threshold: float = attrs.field(default=0.0, validator=real(-_FARTHEST, _FARTHEST))

    @property
    def columns(self) -> tuple[str, ...]:
        """Name the columns that both splits must have."""
        return ("question", "context", "answers")

    def check(self, where: str) -> None:
        """Check that answers have their form, and that no row lacks one that must have one."""
        if self.threshold and not self.unanswerable:
            raise LrkitError(f"{where}: threshold is for questions that may have no answer: set task.unanswerable=true")
        for split, rows in (("train", self.train), ("validation", self.validation)):
            if "answers" in rows.column_names and len(rows):
                self._check_answers(f"{where}: {split}", rows)

    def _check_answers(self, where: str, rows: datasets.Dataset) -> None:
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        column = rows.with_format("arrow")["answers"]
        try:
            texts, starts = (
                pc.list_value_length(pc.struct_field(column, name)).fill_null(0).to_numpy()
                for name in ("text", "answer_start")
            )
        except (pa.ArrowException, TypeError, ValueError):
            raise LrkitError(
                f'{where}: answers must be {{"text": [...], "answer_start": [...]}} in each row, not {column.type}'
            ) from None
        for wrong, what in (
            (texts != starts, "has not as many texts as answer_start in its answers"),
            (
                (texts == 0) & (not self.unanswerable),
                "has no answer; if questions may have none, set task.unanswerable=true",
            ),
        ):
            if wrong.any():
                row = int(np.flatnonzero(wrong)[0])
                raise LrkitError(f'{where} row {row + 1} ("{cut(str(rows[row].get("question")), 60)}") {what}')

    @property
    def auto_class(self) -> str:
        """Name the Auto class of models with two logits per token."""
        return "AutoModelForQuestionAnswering"

    @property
    def head(self) -> Head:
        """Describe the head: two outputs per token, of an answer's start and of its end."""
        return attrs.evolve(super().head, num_labels=2)

    @property
    def by_row(self) -> bool:
        """Say that a row becomes one window or more."""
        return False

    def texts(self, rows: datasets.Dataset) -> list[str]:
        """List the questions and contexts of some rows."""
        return [*rows["question"], *rows["context"]]

    def encode(
        self, batch: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int, *, training: bool
    ) -> dict[str, Any]:
        """Encode some rows as windows.

        For training there are ``start_positions`` and ``end_positions``; for a score ``offsets``, as `windows_of` returns
        them. In both, ``first`` says which windows are the first of their row.

        Raises:
            LrkitError: the tokenizer cannot do it, or there is no room for a context.
        """
        stride = max_length // 3 if self.stride is None else self.stride
        columns, rows, offsets = windows_of(batch["question"], batch["context"], tokenizer, max_length, stride)
        if training:
            positions = self._positions(batch, rows, offsets)
            kept = [i for i, row in enumerate(rows) if row in positions]
            nulls = {i: null_of(columns["input_ids"][i], tokenizer) for i in kept}
            ends = [positions[rows[i]].get(i, (nulls[i], nulls[i])) for i in kept]
            columns = {key: [column[i] for i in kept] for key, column in columns.items()}
            columns |= {"start_positions": [start for start, _ in ends], "end_positions": [end for _, end in ends]}
            rows = [rows[i] for i in kept]
        else:
            columns["offsets"] = offsets
        return columns | {"first": [i == 0 or row != rows[i - 1] for i, row in enumerate(rows)]}

    def _positions(
        self, batch: Mapping[str, Sequence[Any]], rows: Sequence[int], offsets: Sequence[Any]
    ) -> dict[int, dict[int, tuple[int, int]]]:
        """Find the answers of some rows in their windows.

        Returns:
            For each row that can be learnt the windows that hold its answer, with the first and last token of it. A row
            that has an answer, which is in no window, is not there.
        """
        spans = [placed(answers, text) for answers, text in zip(batch["answers"], batch["context"], strict=True)]
        found: dict[int, dict[int, tuple[int, int]]] = {
            row: {} for row, answers in enumerate(batch["answers"]) if not len(answers["text"])
        }
        for window, row in enumerate(rows):
            span = spans[row]
            position = None if span is None else position_of(span, offsets[window])
            if position is not None:
                found.setdefault(row, {})[window] = position
        return found

    def examples(self, tokenizer: Any, max_length: int, *, training: bool) -> datasets.Dataset:
        """Encode all rows of a split as windows; warn of training rows that cannot be learnt, and count them."""
        done = super().examples(tokenizer, max_length, training=training)
        left_out = len(self.train) - sum(done["first"]) if training else 0
        if left_out:
            pairs = zip(self.train["answers"], self.train["context"], strict=True)
            astray = sum(len(answers["text"]) > 0 and placed(answers, text) is None for answers, text in pairs)
            warnings.warn(
                f'task "{self.name}": {left_out:,} of {len(self.train):,} training rows are left out: of {astray:,} the '
                f"answer is not in the context at its answer_start, of {left_out - astray:,} no window of {max_length} "
                "tokens holds it (raise run.max_length or task.stride)",
                LrkitWarning,
                stacklevel=2,
            )
        return done

    def collator(self, tokenizer: Any, *, training: bool = True) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a function that pads windows to the longest, on the right, so that positions stay as they are."""
        return super().collator(padding_on("right", tokenizer), training=training)

    def predict(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Compute the logits of each token to be an answer's first and its last, [windows, tokens] each."""
        outputs = model(**batch)
        return outputs.get("loss"), (outputs["start_logits"], outputs["end_logits"])

    def answers(self, outputs: Any, examples: datasets.Dataset, tokenizer: Any) -> list[Any]:
        """Choose the answer to each validation row from its windows.

        Returns:
            A text per row; if `unanswerable` the best text that is not empty and the ``doubt`` that there is an answer:
            ``{"text": ..., "doubt": ...}``. None if a logit of the row is not finite.
        """
        lost: set[int] = set()
        found = choose(
            self._windows(outputs, examples, tokenizer, lost),
            list(self.validation["context"]),
            max_answer_length=self.max_answer_length,
        )
        return [None if row in lost else self._said(answer) for row, answer in enumerate(found)]

    def _windows(self, outputs: Any, examples: datasets.Dataset, tokenizer: Any, lost: set[int]) -> Iterator[Window]:
        """Yield the windows with their logits; put the rows whose logits are not finite into `lost`."""
        import numpy as np

        row = -1
        for example, start, end in zip(examples, *outputs, strict=True):
            row += example["first"]
            tokens = len(example["input_ids"])
            window = Window(
                question=row,
                start=start[:tokens],  # the rest fills up
                end=end[:tokens],
                offsets=example["offsets"],
                null=null_of(example["input_ids"], tokenizer),
            )
            if not (np.isfinite(window.start).all() and np.isfinite(window.end).all()):
                lost.add(row)
            yield window

    def _said(self, answer: Answer) -> Any:
        text = answer.text.strip()
        return {"text": text, "doubt": min(answer.doubt, _FARTHEST)} if self.unanswerable else text

    def references(self) -> list[list[str]]:
        """Return the texts that are right, for each validation row; none if it has no answer."""
        return [list(answers["text"]) for answers in self.validation["answers"]]

    def score(self, predictions: Sequence[Any], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """Compute SQuAD's F1 and exact match; if `unanswerable` those of SQuAD 2.0, see `lrkit.tasks.answers.squad_v2`.

        Args:
            predictions: as `answers` returns them.
            references: as `references` returns them.

        Raises:
            LrkitError: there is not one prediction per row, or no row.
        """
        lost = any(said is None for said in predictions)
        if self.unanswerable:
            texts = ["" if said is None else said["text"] for said in predictions]
            doubts = [0.0 if said is None else said["doubt"] for said in predictions]
            scores = squad_v2(texts, references, doubts, self.threshold)
        else:
            scores = squad([said or "" for said in predictions], references)
        return dict.fromkeys(scores, math.nan) if lost else scores

    def perfect(self) -> list[Any]:
        """Return the first right text of each validation row."""
        return self._all([texts[0] if texts else "" for texts in self.references()])

    def _all(self, texts: Sequence[str]) -> list[Any]:
        """Put texts into the form of `answers`; an empty one says that there is no answer."""
        if not self.unanswerable:
            return list(texts)
        return [{"text": text, "doubt": self.threshold + (-1.0 if text else 1.0)} for text in texts]

    @property
    def majority(self) -> float:
        """Compute the F1 of the best way to answer all validation rows without learning anything.

        Those of `lrkit.tasks.answers.trivial` are tried, and, if `unanswerable`, no answer to any question.
        """
        references = self.references()
        tried = trivial(self.validation["question"], self.validation["context"])
        tried += [[""] * len(references)] if self.unanswerable else []
        return max(self.score(self._all(texts), references)["f1"] for texts in tried)

    def samples(self, model: nn.Module, tokenizer: Any, max_length: int, count: int) -> Sequence[Sample]:
        """Ask a model the first so many questions of the validation rows; each with the end of its context."""
        import torch

        few = attrs.evolve(self, validation=self.validation.select(range(min(count, len(self.validation)))))
        examples = few.examples(tokenizer, max_length, training=False)
        inputs = examples.remove_columns(["first", "offsets"])
        device = next(model.parameters()).device
        logits: tuple[list[Any], list[Any]] = ([], [])
        with torch.no_grad():
            for row in inputs:
                _, found = few.predict(model, {name: torch.tensor([ids], device=device) for name, ids in row.items()})
                for kept, each in zip(logits, found, strict=True):
                    kept.append(each[0].float().cpu().numpy())
        said = few.answers(logits, examples, tokenizer)
        return [
            Sample(
                input=f"{row['question']} (... {row['context'][-_END:]})",
                reference=(row["answers"]["text"] or [""])[0],
                output=self._shown(text),
            )
            for row, text in zip(few.validation, said, strict=True)
        ]

    def _shown(self, said: Any) -> str:
        """Return an answer as a reader sees it: empty if there is none."""
        if said is None or not self.unanswerable:
            return said or ""
        return "" if said["doubt"] > self.threshold else said["text"]
