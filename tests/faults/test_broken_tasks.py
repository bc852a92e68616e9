"""Faulty loaders of tasks, each found by the clause that is meant."""

from __future__ import annotations

import itertools

import attrs
import numpy as np
import pytest
from faulty import rows, sums

import lrkit
from lrkit.testing import check


@pytest.mark.parametrize(
    ("table", "clause"),
    [
        ([{"text": "a", "label": 0}, {"text": None, "label": 1}], "rows have texts and labels"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": 2}], "rows have texts and labels"),
        ([{"text": "a", "label": 0.0}, {"text": "b", "label": 1.0}], "rows have texts and labels"),
    ],
    ids=["no text", "label out of range", "label a float"],
)
def test_odd_rows(table, clause):
    """A row without text, or with a label that does not exist, is found."""

    def loader(rest: str | None) -> lrkit.tasks.Task:
        """Odd rows. Source: this test."""
        return rows(table)

    assert clause in {finding.clause for finding in check(loader, kind="task")}


def test_random_rows():
    """A loader that draws and raises breaks three clauses."""

    def loader(rest: str | None) -> lrkit.tasks.Task:
        """Rows in a random order. Source: this test."""
        if rest:
            {}[rest]
        order = np.random.permutation(25)
        return rows([{"text": f"{i}", "label": int(i) % 2} for i in order])

    wanted = {"is the same each time", "leaves global state alone", "unknown part is refused"}
    assert {finding.clause for finding in check(loader, kind="task")} == wanted


def kind(**methods):
    """A kind of classification with other methods, which take the task first; `super` is `Plain`."""
    made = attrs.frozen(kw_only=True, eq=False)(type("Broken", (Plain,), methods))

    def loader(rest: str | None) -> lrkit.tasks.Task:
        """Broken on purpose. Source: this test."""
        plain = sums(rest)
        return made(**{each.name: getattr(plain, each.name) for each in attrs.fields(type(plain))})

    return loader


Plain = lrkit.tasks.Classification
counter = itertools.count()


def twice(self, batch, tokenizer, max_length, *, training=True):
    once = Plain.encode(self, batch, tokenizer, max_length, training=training)
    return {name: [*column, *column] for name, column in once.items()}


def drawn(self, batch, tokenizer, max_length, *, training=True):
    once = Plain.encode(self, batch, tokenizer, max_length, training=training)
    return once | {"number": [next(counter) for _ in once["labels"]]}


def renamed(self, batch, tokenizer, max_length, *, training=True):
    once = Plain.encode(self, batch, tokenizer, max_length, training=training)
    return {name.removeprefix("input_"): column for name, column in once.items()}


def ragged(self, tokenizer, *, training=True):
    plain = Plain.collator(self, tokenizer, training=training)
    return lambda examples: {name: each[len(name) % 2 :] for name, each in plain(examples).items()}


FAULTS = {
    "cut nowhere": ({"encode": lambda self, b, t, n, *, training=True: Plain.encode(self, b, t, 2)
                     | {"input_ids": [[5] * (n + 1)] * len(b["label"])}}, "an example of train has 129 tokens, 128 being"),
    "unknown tokens": ({"encode": lambda self, b, t, n, *, training=True: Plain.encode(self, b, t, 2)
                        | {"input_ids": [[5, len(t)]] * len(b["label"])}}, "tokens are not the tokenizer's"),
    "twice": ({"encode": twice}, "8 training rows became 16 examples: if that may be, by_row must be False"),
    "drawn": ({"encode": drawn}, "asked a second time, train has other examples"),
    "renamed": ({"encode": renamed}, "no column input_ids"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_examples(fault):
    """Examples that a run could not take are found."""
    methods, says = FAULTS[fault]
    found = {finding.clause: finding.message for finding in check(kind(**methods), kind="task")}
    assert says in found["rows become examples"]


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ({"collator": ragged}, "a batch's tensors must have a row per example, not"),
        (
            {"predict": lambda self, model, batch: (None, model(**batch)["logits"][:1])},
            "1 answers for 4 validation rows",
        ),
        ({"answers": lambda self, outputs, examples, tokenizer: outputs[1:]}, "3 answers for 4 validation rows"),
        ({"head": property(lambda self: lrkit.tasks.Head(auto_class="AutoModel"))}, "the model's forward"),
        ({"objective": lambda self, model, batch, seed: 3}, "the model's forward raised AttributeError"),
        ({"objective": lambda self, model, batch, seed: Fixed()}, "the loss of a training batch is"),
    ],
)
def test_broken_learning(methods, says):
    """A batch, loss, answer or score that a run could not take is found, and nothing else."""
    (finding,) = check(kind(**methods), kind="task")
    assert finding.clause == "model learns and answers" and says in finding.message


class Fixed:
    def loss(self, model, batch):
        import torch

        return torch.zeros(()), {}


def test_other_scores():
    """Scores of a model that have other names than those of perfect answers are found."""

    def score(self, predictions, labels):
        plain = Plain.score(self, predictions, labels)
        return plain | ({"more": 1.0} if np.asarray(predictions).ndim == 2 else {})

    (finding,) = check(kind(score=score), kind="task")
    assert "a model's scores are ['accuracy', 'more'], and those of perfect answers ['accuracy']" in finding.message


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ({"majority": property(lambda self: 1.5)}, "the best trivial answers (majority) 1.5"),
        ({"majority": property(lambda self: {}[3])}, "majority raised KeyError"),
        ({"score": lambda self, one, other: {"accuracy": float(next(counter))}}, "the same answers score"),
        ({"higher_is_better": False}, "the true answers score 1.0, the best trivial answers (majority) 0.52"),
        (
            {"perfect": lambda self: 1 - self.references(), "majority": None},
            "the true answers score 0.0, those shifted by",
        ),
    ],
)
def test_broken_scores(methods, says):
    """Perfect answers that something is better than, and scores that change, are found."""
    found = {finding.clause: finding.message for finding in check(kind(**methods), kind="task")}
    assert says in found["truth scores best"]
