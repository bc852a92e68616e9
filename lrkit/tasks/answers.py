"""Scores of short answers: SQuAD's exact match and F1, with and without questions that have no answer.

The rules are those of the published evaluation scripts, of v1.1 (Rajpurkar et al. 2016, arXiv 1606.05250) and of v2.0
(Rajpurkar et al. 2018, arXiv 1806.03822). The scripts print percent; scores here are shares, in [0, 1]. For example:

    >>> squad(["the Eiffel Tower"], [["Eiffel tower", "tower"]])
    {'f1': 1.0, 'em': 1.0}
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from lrkit.errors import LrkitError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_FIRST_WORDS = (1, 2, 4, 8, 16, 32)
_PUNCTUATION = str.maketrans("", "", string.punctuation)

Comparison = Callable[[str, str], float]


def check_rows(predicted: Sequence[object], true: Sequence[object]) -> None:
    """Raise LrkitError unless there is one prediction per row, and a row."""
    if len(predicted) != len(true):
        raise LrkitError(f"{len(predicted)} predictions for {len(true)} rows; there must be one per row")
    if not true:
        raise LrkitError("there is no row to score")


def normalized(text: str) -> str:
    """Write a text as SQuAD compares it.

    In this order: lower case; ASCII punctuation goes (other marks, such as “, stay); the words a, an and the become a
    space; white space shrinks to single spaces. For example, "The  U.S.-led 1,000" becomes "usled 1000".
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(predicted: str, true: str) -> float:
    """Compute exact match of one answer: 1 if both are the same, `normalized`, else 0."""
    return float(normalized(predicted) == normalized(true))


def overlap(predicted: str, true: str) -> float:
    """Compute F1 of one answer's words, `normalized`, each as often as it occurs; 0 if no word is common (v1.1)."""
    of_predicted, of_true = normalized(predicted).split(), normalized(true).split()
    common = (Counter(of_predicted) & Counter(of_true)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(of_predicted), common / len(of_true)
    return 2 * precision * recall / (precision + recall)


def overlap_or_empty(predicted: str, true: str) -> float:
    """Compute `overlap`, and 1 if neither answer has a word left (v2.0)."""
    if not normalized(predicted) and not normalized(true):
        return 1.0
    return overlap(predicted, true)


def squad(predicted: Sequence[str], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """Compute SQuAD v1.1's F1 and exact match, the means over questions.

    Args:
        predicted: One answer per question, [n].
        true: The reference answers of each question, one at least; the best of them counts, for each score apart.

    Raises:
        LrkitError: if there is not one prediction per question, no question, or a question without a reference.
    """
    check_rows(predicted, true)
    for row, references in enumerate(true):
        if not references:
            raise LrkitError(f"row {row}: no reference answer; questions without one are scored by squad_v2")
    return {
        "f1": _mean(_best(overlap, predicted, true)),
        "em": _mean(_best(exact, predicted, true)),
    }


def squad_v2(
    predicted: Sequence[str],
    true: Sequence[Sequence[str]],
    doubts: Sequence[float] | None = None,
    threshold: float = 0.0,
) -> dict[str, float]:
    """Compute SQuAD v2.0's scores, in which a question may have no answer.

    A question without references has the empty answer, which a prediction must be, `normalized`. F1 and exact match are
    means over all questions (`f1`, `em`), over those with an answer (`has_answer_f1`, ...) and over those
    without (`no_answer_f1`, ...; a group that is empty is left out). With `doubts` there are `best_f1` and
    `best_em` too: the scores at the thresholds that `best_threshold` finds for each.

    Args:
        predicted: One answer per question, [n]; "" says that there is none.
        true: The reference answers of each question, [n]; none if it has no answer.
        doubts: Per question a number that grows with the belief that it has no answer, [n]. For example, the null
            score less the best span's (`spans.Answer.doubt`), or a probability.
        threshold: A question whose doubt is above it is taken to be answered by "". Only with `doubts`.

    Raises:
        LrkitError: if there is not one prediction and one doubt per question, or no question.
    """
    check_rows(predicted, true)
    if doubts is not None:
        check_rows(doubts, true)
    answerable = [bool(references) for references in true]
    accepted = [[text for text in references if normalized(text)] or [""] for references in true]
    scores: dict[str, float] = {}
    raw = {
        "f1": _best(overlap_or_empty, predicted, accepted),
        "em": _best(exact, predicted, accepted),
    }
    final = {
        name: values
        if doubts is None
        else [
            float(not has) if doubt > threshold else value
            for value, doubt, has in zip(values, doubts, answerable, strict=True)
        ]
        for name, values in raw.items()
    }
    for group, members in (("", None), ("has_answer_", True), ("no_answer_", False)):
        for name, values in final.items():
            chosen = [value for value, has in zip(values, answerable, strict=True) if members in (None, has)]
            if chosen:
                scores[group + name] = _mean(chosen)
    if doubts is not None:
        for name, values in raw.items():
            scores[f"best_{name}"] = best_threshold(values, predicted, answerable, doubts)[0]
    return scores


def best_threshold(
    values: Sequence[float], predicted: Sequence[str], answerable: Sequence[bool], doubts: Sequence[float]
) -> tuple[float, float]:
    """Find the threshold of doubt with the best mean score, as `find_best_thresh` of v2.0's script does.

    Questions are taken from the least doubt up. Before the first, all are answered by ""; each one taken is answered by
    its prediction. The threshold is the doubt of the question after which the mean is highest, the first if several
    are; 0 if no question raises it. As in the script, questions of equal doubt are taken one by one, in their order, so
    that the mean need not be reached if doubts repeat; and a prediction for a question without an answer costs a point
    unless it is the empty string.

    Args:
        values: Each question's score by its prediction, [n].
        predicted: The predictions, [n].
        answerable: Says of each question if it has an answer, [n].
        doubts: As in `squad_v2`, [n].

    Returns:
        The mean score, in [0, 1], and the threshold.
    """
    current = best = float(sum(not has for has in answerable))
    threshold = 0.0
    for row in sorted(range(len(doubts)), key=lambda row: doubts[row]):
        if answerable[row]:
            current += values[row]
        elif predicted[row]:
            current -= 1
        if current > best:
            best, threshold = current, float(doubts[row])
    return best / len(values), threshold


def trivial(questions: Iterable[str], contexts: Iterable[str]) -> list[list[str]]:
    """Answer questions in some ways that need no learning: the floor of any model.

    They are: the whole context; its first sentence; the sentence that has the most words in common with the question, the
    first of several; its first 1, 2, 4, ... 32 words.

    Args:
        questions: [n].
        contexts: The context of each question, [n].

    Returns:
        For each way the answers to all questions, [ways][n].
    """
    texts = list(contexts)
    sentences, words = [_SENTENCE.split(text) for text in texts], [set(normalized(each).split()) for each in questions]
    nearest = [
        max(of_text, key=lambda sentence: len(asked.intersection(normalized(sentence).split())))
        for of_text, asked in zip(sentences, words, strict=True)
    ]
    beginnings = [[" ".join(text.split()[:count]) for text in texts] for count in _FIRST_WORDS]
    return [texts, [of_text[0] for of_text in sentences], nearest, *beginnings]


def _best(compare: Comparison, predicted: Sequence[str], true: Sequence[Sequence[str]]) -> list[float]:
    """Compare each prediction with all of its references; the best counts."""
    return [max(compare(said, text) for text in texts) for said, texts in zip(predicted, true, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
