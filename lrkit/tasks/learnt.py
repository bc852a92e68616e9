"""How a task is learnt: which model, which batches and which loss. `Learnt` has the answers of most tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.tasks.head import Head

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lrkit.tasks.objective import Objective


@attrs.frozen
class Sample:
    """A validation row and what a model says to it, to be read.

    Attributes:
        input: what the model is asked.
        reference: the right answer.
        output: the model's.
    """

    input: str
    reference: str
    output: str


class Learnt:
    """What a run asks a task about learning it: the answers here are those of classification and regression.

    A task of another kind overrides them. For example, `lrkit.tasks.teacher.Teacher` has a model without a head and a
    loss of its own.
    """

    __slots__ = ()

    @property
    def auto_class(self) -> str:
        """Name the Auto class of transformers whose head fits the task."""
        return "AutoModelForSequenceClassification"

    @property
    def dropout(self) -> bool:
        """Say whether the model's own dropout is on while it trains."""
        return True

    @property
    def head(self) -> Head:
        """Describe the head of the task's model."""
        return Head(auto_class=self.auto_class, dropout=self.dropout)

    @property
    def by_row(self) -> bool:
        """Say whether each row becomes one example.

        If so, a run that is shorter than an epoch encodes only what it takes.
        """
        return True

    @property
    def higher_is_better(self) -> bool:
        """Say whether a larger primary score is a better one, as it is in most tasks; not so for a perplexity."""
        return True

    def check_model(self, model: nn.Module) -> None:
        """Check by what a model does that it can learn the task, before it is trained.

        For example: `lrkit.tasks.Completion` asks whether it keeps packed rows apart.

        Args:
            model: the pretrained model, with its head.

        Raises:
            LrkitError: it cannot.
        """

    @property
    def writes(self) -> int:
        """Return the most tokens that a decoder writes behind an example while it is scored; 0 if it writes none."""
        return 0

    def predict(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | tuple[Tensor, ...]]:
        """Compute what is kept of a batch while validation rows are scored: by one forward pass, the model's logits.

        A task of another kind keeps something else, as small as it can be: the tokens that it generates, for example, or
        two numbers of a row.

        Args:
            model: the adapted model, in evaluation, or what a Trainer has wrapped it in. No gradient is kept.
            batch: as `collator` makes it.

        Returns:
            The loss, None if there is none; and the predictions [rows, ...], one tensor or several, with -100 where rows
            are of unlike lengths.
        """
        outputs = model(**batch)
        return outputs.get("loss"), outputs["logits"]

    def collator(self, tokenizer: Any, *, training: bool = True) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a function from examples to a batch: this one pads them to the longest.

        Args:
            tokenizer: a transformers tokenizer, with a pad token.
            training: for a step, or for a score. For example, what a decoder goes on from is padded on the left.
        """
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    def samples(self, model: nn.Module, tokenizer: Any, max_length: int, count: int) -> Sequence[Sample]:
        """Ask a model about the first so many validation rows, and return what it says in words; empty if it says none.

        Args:
            model: the adapted model, in evaluation.
            tokenizer: its tokenizer.
            max_length: as `lrkit.tasks.Task.encode` takes it.
            count: how many rows.
        """
        return ()

    def objective(self, model: nn.Module, batch: Callable[[int], Mapping[str, Any]], seed: int) -> Objective | None:
        """Make the loss of a run, if it is not the model's own; None if it is.

        For example: `lrkit.tasks.teacher.Teacher`, whose loss needs a second model.

        Args:
            model: the run's model, before adapters are attached to it.
            batch: makes a batch of the first so many training examples of the run.
            seed: the run's.
        """
        return None

    def truth(self, model: nn.Module, seed: int) -> tuple[str, ...]:
        """Name the layers that the best allocation of a run lies in; empty if that is not known, as it is of most tasks.

        Args:
            model: the plain model, of `auto_class`; it needs no weights.
            seed: the run's.
        """
        return ()
