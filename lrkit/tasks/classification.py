"""Texts with labels, learnt by a new head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.tasks.base import Task
from lrkit.tasks.head import Head
from lrkit.tasks.labelled import Kind as Kind
from lrkit.tasks.labelled import Labelled
from lrkit.tasks.verbalized import Verbalized

if TYPE_CHECKING:
    import datasets


@attrs.frozen(kw_only=True, eq=False)
class Classification(Labelled):
    """Texts with labels, learnt by a new head with an output per class, or one in regression.

    If it is given `words`, it becomes a `lrkit.tasks.Verbalized`: without a head, by the words' likelihood. For example
    ``--set task.words=negative,positive``.
    """

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Name what a user may set: the metric, and all of `Verbalized`. The rest is what the rows are."""
        return Verbalized.options()

    def with_options(self, given: Mapping[str, Any]) -> Task:
        """Return the task with other options: one that is read by words, if any but the metric is given."""
        others = {*given} - {"metric"}
        if not others or not others <= {*self.options()}:
            return super().with_options(given)
        own = {field.name: getattr(self, field.name) for field in attrs.fields(Labelled)}
        return Verbalized(**own).with_options(given)

    @property
    def problem_type(self) -> str:
        """Return transformers' name for `kind`: it picks the model's loss."""
        return "single_label_classification" if self.kind == "classification" else "regression"

    @property
    def head(self) -> Head:
        """Describe the head of the task's model, with an output per class, or one in regression."""
        own: dict[str, Any] = {"num_labels": self.num_labels, "problem_type": self.problem_type, "labels": self.labels}
        return attrs.evolve(super().head, **own)

    def encode(
        self, batch: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int, *, training: bool = True
    ) -> dict[str, Any]:
        """Encode some rows as model inputs with the column `labels`, cut at `max_length` tokens and not padded.

        Of a pair the longer text is cut first.

        Raises:
            LrkitError: the tokenizer cannot encode them.
        """
        from lrkit.tasks.tokens import encoding

        texts = [list(batch[field]) for field in self.fields]
        encoded = encoding(tokenizer, *texts, truncation=True, max_length=max_length, padding=False)
        return encoded | {"labels": list(batch["label"])}

    def examples(self, tokenizer: Any, max_length: int, *, training: bool) -> datasets.Dataset:
        """Encode all rows of a split as examples, with labels of the type that the loss needs."""
        import datasets

        from lrkit.tasks.hub import quiet_datasets

        label = datasets.Value("float32" if self.kind == "regression" else "int64")
        with quiet_datasets():
            return super().examples(tokenizer, max_length, training=training).cast_column("labels", label)
