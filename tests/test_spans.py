"""The best span of a context, against trying all of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lrkit
from lrkit.tasks.spans import Span, Window, best_spans, choose

LOGITS = st.sampled_from([-2.0, 0.0, 0.5, 0.5, 1.0, 3.0, math.inf, -math.inf, math.nan])  # many ties
CONTEXT = "one two three four five six"
PLACES = [(0, 3), (4, 7), (8, 13), (14, 18), (19, 23), (24, 27), (27, 27)]  # the last token has no character


@st.composite
def windows(draw: st.DrawFn, question: int = 0) -> Window:
    """A window of two tokens of the question, some of the context, and padding."""
    first = draw(st.integers(0, 5))
    last = draw(st.integers(first, 6))
    offsets = [(-1, -1)] * 2 + PLACES[first : last + 1] + [(-1, -1)] * draw(st.integers(0, 2))
    logits = st.lists(LOGITS, min_size=len(offsets), max_size=len(offsets))
    return Window(question, draw(logits), draw(logits), offsets)


def oracle(window: Window, longest: int) -> list[Span]:
    """All possible spans, the best first."""
    found = []
    tokens = len(window.start)
    for i in range(tokens):
        for j in range(i, tokens):
            score = float(window.start[i]) + float(window.end[j])
            first, after = int(window.offsets[i, 0]), int(window.offsets[j, 1])
            inside = window.offsets[i, 0] >= 0 and window.offsets[j, 0] >= 0
            if inside and j - i + 1 <= longest and first < after and math.isfinite(score):
                found.append((-score, i, j, Span(first, after, score)))
    return [span for *_, span in sorted(found, key=lambda item: item[:3])]


@settings(deadline=None, max_examples=300)
@given(windows(), st.integers(1, 30), st.integers(1, 9))
def test_spans_are_best(window: Window, n_best: int, longest: int) -> None:
    """The spans of one window are the first of all that there are, ties in the stated order."""
    assert best_spans(window, n_best=n_best, max_answer_length=longest) == oracle(window, longest)[:n_best]


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 5), st.integers(1, 9))
def test_windows_are_joined(data: st.DataObject, n_best: int, longest: int) -> None:
    """Each question has the best span of all its windows, in which order they come, and the lowest null score."""
    owners = [0, 1, *data.draw(st.lists(st.integers(0, 1), max_size=3))]
    drawn = [data.draw(windows(owner)) for owner in owners]
    answers = choose(iter(drawn), [CONTEXT, CONTEXT], n_best=n_best, max_answer_length=longest)
    for question, answer in enumerate(answers):
        mine = [window for window in drawn if window.question == question]
        spans = [span for window in mine for span in oracle(window, longest)]
        if not spans:
            assert (answer.text, answer.score, answer.spans) == ("", -math.inf, ())
            assert answer.doubt == math.inf
            continue
        best = max(spans, key=lambda span: span.score)  # the first of equal ones
        assert answer.spans[0] == best
        assert answer.text == CONTEXT[best.first : best.after] != ""
        assert answer.score == best.score
        places = [(span.first, span.after) for span in answer.spans]
        assert len(set(places)) == len(places) <= n_best
        nulls = [float(window.start[0]) + float(window.end[0]) for window in mine]
        assert answer.null == min([null for null in nulls if not math.isnan(null)], default=math.inf)
        assert answer.doubt == answer.null - answer.score


def test_one_answer_by_hand() -> None:
    """The longer span has the higher sum, unless it is too long; a later window wins by its score alone."""
    offsets = [(-1, -1), *PLACES[:4]]
    one = Window(0, [1.0, 5, 0, 0, 0], [2.0, 0, 1, 0, 4], offsets)
    assert choose([one], [CONTEXT])[0].text == "one two three four"  # 5 + 4
    short = choose([one], [CONTEXT], max_answer_length=2)[0]
    assert (short.text, short.score, short.null, short.doubt) == ("one two", 6.0, 3.0, -3.0)  # 5 + 1
    two = Window(0, [-1.0, 8, 0], [-1.0, 0, 2], [(-1, -1), *PLACES[4:6]])
    both = choose([one, two], [CONTEXT])[0]
    assert (both.text, both.score, both.null) == ("five six", 10.0, -2.0)
    same = Window(0, [0.0, 8, 0], [0.0, 0, 2], [(-1, -1), *PLACES[:2]])
    assert choose([same, two], [CONTEXT])[0].text == "one two"  # 10 both: the earlier window
    assert choose([two, same], [CONTEXT])[0].text == "five six"


def test_shared_span_counts_once() -> None:
    """A span that two windows see is kept with its higher score."""
    offsets = [(-1, -1), (0, 3)]
    found = choose([Window(0, [0, low], [0, 0], offsets) for low in (1, 3, 2)], [CONTEXT])[0]
    assert found.spans == (Span(0, 3, 3.0),)


def test_null_token_may_move() -> None:
    """The token that says that there is no answer may be the last one."""
    window = Window(0, [1.0, 2.0], [1.0, 5.0], [(0, 3), (-1, -1)], null=1)
    assert choose([window], [CONTEXT])[0].null == 7.0


def test_sums_are_exact() -> None:
    """Sums are formed in float64, of float32 logits too, so that near ones are told apart."""
    start, end = np.float32([0, 2.0**24, 2.0**24]), np.float32([0, 0.0, 1.0])
    window = Window(0, start, end, [(-1, -1), (0, 3), (4, 7)])
    assert best_spans(window, n_best=1)[0] == Span(0, 7, 2.0**24 + 1)
    near = Window(0, [1.0, 1 + 2.0**-40], [0.0, 0.0], [(0, 3), (4, 7)])
    assert best_spans(near, n_best=1) == [Span(4, 7, 1 + 2.0**-40)]


def test_long_windows_stay_small() -> None:
    """Memory grows with tokens times the longest answer, and a generator's windows are not kept."""
    import tracemalloc

    tokens = 4096
    offsets = np.stack([np.arange(tokens) * 2, np.arange(tokens) * 2 + 1], axis=1)
    logits = np.random.default_rng(0).normal(size=(2, tokens))

    def peak(count: int) -> int:
        tracemalloc.start()
        choose((Window(0, logits[0] + i, logits[1], offsets) for i in range(count)), ["x" * 2 * tokens])
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(12) < 1.2 * peak(2)
    assert peak(2) < 12 * 8 * tokens * 30


def test_wrong_windows_are_said() -> None:
    """Shapes that do not fit, questions without a window and numbers below 1 are said."""
    good = Window(0, [0.0], [0.0], [(0, 3)])
    with pytest.raises(lrkit.LrkitError, match=r"\[T\], \[T\] and \[T, 2\], not \[2\], \[1\] and \[2, 2\]"):
        Window(0, [0.0, 1.0], [0.0], [(0, 3), (4, 7)])
    with pytest.raises(lrkit.LrkitError, match="the null token is 3, of 1 tokens"):
        Window(0, [0.0], [0.0], [(0, 3)], null=3)
    with pytest.raises(lrkit.LrkitError, match="question 1 has no window"):
        choose([good], ["a", "b"])
    with pytest.raises(lrkit.LrkitError, match="a window is of question 0, and there are 0 questions"):
        choose([good], [])
    with pytest.raises(lrkit.LrkitError, match="n_best must be 1 or more, not 0"):
        best_spans(good, n_best=0)
    with pytest.raises(lrkit.LrkitError, match="max_answer_length must be 1 or more, not -1"):
        choose([good], ["a"], max_answer_length=-1)
