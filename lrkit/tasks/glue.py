"""GLUE: the tasks' text fields, labels and metrics, and their data from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from lrkit.errors import LrkitError, nearest
from lrkit.tasks.classification import Classification
from lrkit.tasks.hub import load_hub

REPOSITORY = "nyu-mll/glue"


@attrs.frozen
class Glue:
    """One row of GLUE's table. A task without labels is a regression."""

    fields: tuple[str, ...]
    labels: tuple[str, ...] = ()
    metric: str = "accuracy"
    validation: str = "validation"  # the split's name on the hub
    second: str | None = None  # a further validation split, scored by itself under names that end in its suffix
    suffix: str = ""


_ENTAILMENT = ("entailment", "not_entailment")
_SENTENCES = ("sentence1", "sentence2")
_SAME = ("not_equivalent", "equivalent")

# Wang et al. 2019, Table 1; MRPC and QQP have two metrics, of which the papers print accuracy (first).
GLUE: Mapping[str, Glue] = {
    "cola": Glue(("sentence",), ("unacceptable", "acceptable"), "matthews"),
    "sst2": Glue(("sentence",), ("negative", "positive")),
    "mrpc": Glue(_SENTENCES, _SAME, "accuracy_f1"),
    "qqp": Glue(("question1", "question2"), ("not_duplicate", "duplicate"), "accuracy_f1"),
    "stsb": Glue(_SENTENCES, (), "pearson"),
    "mnli": Glue(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        validation="validation_matched",
        second="validation_mismatched",
        suffix="_mm",
    ),
    "qnli": Glue(("question", "sentence"), _ENTAILMENT),
    "rte": Glue(_SENTENCES, _ENTAILMENT),
    "wnli": Glue(_SENTENCES, ("not_entailment", "entailment")),
}


def load_glue(name: str) -> Classification:
    """Load a GLUE task from the hub (or from the hub's cache on this machine, if the hub is out of reach).

    Raises:
        LrkitError: for an unknown name, or if the data cannot be had.
    """
    row = GLUE.get(name)
    if row is None:
        raise LrkitError(f'unknown GLUE task "{name}"{nearest(name, GLUE)}; there are: {", ".join(GLUE)}')
    splits = load_hub(f"glue/{name}", REPOSITORY, name)
    validation, second = splits[row.validation], None
    if row.second is not None:
        import datasets

        second = row.suffix, len(validation)
        validation = datasets.concatenate_datasets([validation, splits[row.second]])
    return Classification(
        name=f"glue/{name}",
        train=splits["train"],
        validation=validation,
        second=second,
        fields=row.fields,
        kind="classification" if row.labels else "regression",
        labels=row.labels,
        metric=row.metric,
    )
