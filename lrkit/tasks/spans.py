"""From start and end logits to answers: the best span of a context that is read in overlapping windows.

A question's context is cut into windows that overlap by a stride, so that each fits the model, and a question-answering
head gives each token of a window two logits. The answer is the span with the highest sum over all windows (Devlin et
al. 2018, arXiv 1810.04805, section 4.2; unanswerable questions: 4.3). For example:

    >>> window = Window(question=0, start=[0, 1, 5], end=[0, 4, 2], offsets=[(-1, -1), (0, 3), (4, 8)])
    >>> choose([window], ["new york"])[0].text
    'york'
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import attrs

from lrkit.errors import LrkitError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


def _logits(values: ArrayLike) -> NDArray[np.float64]:
    import numpy as np

    return np.asarray(values, dtype=np.float64)


def _offsets(values: ArrayLike) -> NDArray[np.int64]:
    import numpy as np

    return np.asarray(values, dtype=np.int64)


@attrs.frozen(eq=False)
class Window:
    """One window of one question, with what the model says of it; T tokens.

    Attributes:
        question: Number of the question, from 0.
        start: Logit of each token to be the answer's first, [T].
        end: Logit of each token to be the answer's last, [T].
        offsets: First character of each token in the context, and the one after its last, [T, 2]; negative for tokens
            that are not of the context (question, special tokens, padding).
        null: The token whose logits say that there is no answer: the first one, [CLS].

    Raises:
        LrkitError: if shapes do not fit.
    """

    question: int
    start: NDArray[np.float64] = attrs.field(converter=_logits)
    end: NDArray[np.float64] = attrs.field(converter=_logits)
    offsets: NDArray[np.int64] = attrs.field(converter=_offsets)
    null: int = 0

    def __attrs_post_init__(self) -> None:
        tokens = self.start.size
        if not (self.start.shape == self.end.shape == (tokens,) and self.offsets.shape == (tokens, 2)):
            raise LrkitError(
                f"question {self.question}: start, end and offsets of a window must be [T], [T] and [T, 2], not "
                f"{list(self.start.shape)}, {list(self.end.shape)} and {list(self.offsets.shape)}"
            )
        if not 0 <= self.null < tokens:
            raise LrkitError(f"question {self.question}: the null token is {self.null}, of {tokens} tokens")


@attrs.frozen
class Span:
    """A span of the context: first character, the one after the last, and its score (the sum of its two logits)."""

    first: int
    after: int
    score: float


@attrs.frozen
class Answer:
    """The answer to a question.

    Attributes:
        text: Text of the best span; "" if no span could be chosen.
        score: Its score; minus infinity if no span could be chosen.
        null: The lowest null score over the question's windows: a question has no answer only if no window has one.
            Infinity if none is a number.
        spans: The best spans, the best first.
    """

    text: str
    score: float
    null: float
    spans: tuple[Span, ...]

    @property
    def doubt(self) -> float:
        """The null score less the best span's; above a threshold, the question is taken to have no answer."""
        return self.null - self.score if self.spans else math.inf


def best_spans(window: Window, *, n_best: int = 20, max_answer_length: int = 30) -> list[Span]:
    """Find the spans of one window with the highest scores, the best first.

    A span begins and ends in the context, has at most `max_answer_length` tokens and at least one character, and its
    score is finite. Of equal scores the earlier first token comes first, then the earlier last one.

    Args:
        window: T tokens.
        n_best: How many to find, at most.
        max_answer_length: The most tokens of an answer. Memory grows with T times this number.

    Raises:
        LrkitError: if either number is below 1.
    """
    import numpy as np

    _check(n_best, max_answer_length)
    tokens = len(window.start)
    width = min(max_answer_length, tokens)
    padded = np.concatenate([window.end, np.zeros(width - 1)])
    after = np.concatenate([window.offsets[:, 1], np.full(width - 1, -1)])  # beyond the window nothing ends
    with np.errstate(invalid="ignore"):  # inf - inf
        scores = window.start[:, None] + np.lib.stride_tricks.sliding_window_view(padded, width)  # [first, more tokens]
    ends = np.lib.stride_tricks.sliding_window_view(after, width)
    begins = window.offsets[:, :1]
    possible = np.isfinite(scores) & (begins >= 0) & (ends > begins)
    places = np.flatnonzero(possible)  # by first token, then by last
    values = scores.ravel()[places]
    if len(places) > n_best:
        least = np.partition(values, -n_best)[-n_best]
        places, values = places[values >= least], values[values >= least]
    order = np.argsort(-values, kind="stable")[:n_best]
    flat_ends = ends.ravel()
    return [
        Span(int(begins[place // width, 0]), int(flat_ends[place]), float(value))
        for place, value in zip(places[order], values[order], strict=True)
    ]


def choose(
    windows: Iterable[Window], contexts: Sequence[str], *, n_best: int = 20, max_answer_length: int = 30
) -> list[Answer]:
    """Choose the answer to each question from its windows.

    A span that several windows see counts once, with its highest score. Of equal scores the one of the earlier window
    comes first, within a window as in `best_spans`. Of each window no more than `n_best` spans are kept, so `windows`
    may be a generator over a data set of any length.

    Args:
        windows: The windows of all questions, in any order.
        contexts: The context of each question, [n].
        n_best: How many spans to keep per question, at most.
        max_answer_length: The most tokens of an answer.

    Returns:
        One answer per question, [n].

    Raises:
        LrkitError: if a question has no window or a window no question, or a number is below 1.
    """
    _check(n_best, max_answer_length)
    kept: list[list[Span]] = [[] for _ in contexts]
    nulls = [math.inf] * len(contexts)
    seen = [False] * len(contexts)
    for window in windows:
        row = window.question
        if not 0 <= row < len(contexts):
            raise LrkitError(f"a window is of question {row}, and there are {len(contexts)} questions")
        found = best_spans(window, n_best=n_best, max_answer_length=max_answer_length)
        kept[row] = _merged(kept[row] + found, n_best)
        null = float(window.start[window.null]) + float(window.end[window.null])
        nulls[row] = min(nulls[row], null)  # in this order: what is no number is passed over
        seen[row] = True
    if not all(seen):
        raise LrkitError(f"question {seen.index(False)} has no window")
    return [_answer(*of) for of in zip(contexts, kept, nulls, strict=True)]


def _merged(spans: list[Span], n_best: int) -> list[Span]:
    """Sort spans by their scores, each place once."""
    best: dict[tuple[int, int], Span] = {}
    for span in sorted(spans, key=lambda span: -span.score):  # stable: of equal ones the earlier window's stays first
        best.setdefault((span.first, span.after), span)
    return list(best.values())[:n_best]


def _answer(context: str, spans: list[Span], null: float) -> Answer:
    if not spans:
        return Answer("", -math.inf, null, ())
    return Answer(context[spans[0].first : spans[0].after], spans[0].score, null, tuple(spans))


def _check(n_best: int, max_answer_length: int) -> None:
    for name, value in (("n_best", n_best), ("max_answer_length", max_answer_length)):
        if value < 1:
            raise LrkitError(f"{name} must be 1 or more, not {value}")
