"""The head of a task's model: which of transformers' Auto classes, and what its config must say of it."""

from __future__ import annotations

from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class Head:
    """The head that a task needs.

    For example a classification of two labels: ``Head(num_labels=2, problem_type="single_label_classification")``; a causal
    language model, whose head is pretrained: ``Head(auto_class="AutoModelForCausalLM")``.

    Args:
        auto_class: name of transformers' Auto class; ``"AutoModel"`` for a model without a head, and without a pooler.
        num_labels: outputs of a new head; None if the head is the model's own.
        problem_type: ``"single_label_classification"`` or ``"regression"``: picks the model's loss; None for its own.
        labels: names of the classes by number, for the model's config.
        dropout: leave the model's own dropout on; if not, every dropout probability in its config is 0.
    """

    auto_class: str = "AutoModelForSequenceClassification"
    num_labels: int | None = None
    problem_type: str | None = None
    labels: tuple[str, ...] = ()
    dropout: bool = True

    def settings(self) -> dict[str, Any]:
        """Return what is set in the model's config."""
        found: dict[str, Any] = {"num_labels": self.num_labels, "problem_type": self.problem_type}
        found = {key: value for key, value in found.items() if value is not None}
        if self.labels:
            names = dict(enumerate(self.labels))
            found |= {"id2label": names, "label2id": {name: n for n, name in names.items()}}
        return found
