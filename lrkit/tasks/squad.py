"""SQuAD, questions about paragraphs of Wikipedia, from the Hugging Face hub."""

from __future__ import annotations

from lrkit.errors import LrkitError
from lrkit.tasks.hub import load_hub
from lrkit.tasks.question_answering import QuestionAnswering


def load_squad(rest: str | None) -> QuestionAnswering:
    """Load SQuAD v1.1, from the hub. Source: arXiv 1606.05250.

    Raises:
        LrkitError: for a part, since it has none, or if the data cannot be had.
    """
    return _load("squad", rest, unanswerable=False)


def load_squad_v2(rest: str | None) -> QuestionAnswering:
    """Load SQuAD v2.0, with questions that have no answer, from the hub. Source: arXiv 1806.03822.

    Raises:
        LrkitError: as `load_squad`.
    """
    return _load("squad_v2", rest, unanswerable=True)


def _load(name: str, rest: str | None, *, unanswerable: bool) -> QuestionAnswering:
    if rest is not None:
        raise LrkitError(f'task "{name}" has no parts: write "{name}", not "{name}/{rest}"')
    splits = load_hub(name, f"rajpurkar/{name}")
    return QuestionAnswering(
        name=name, train=splits["train"], validation=splits["validation"], unanswerable=unanswerable
    )
