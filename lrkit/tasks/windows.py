"""Cut questions and their contexts into windows that a model has room for, and find answers in them.

The rules are those of transformers' question-answering example (``run_qa.py``), with three differences. The question comes
first whatever side a tokenizer pads on, since a decoder reads from left to right. An answer begins and ends with the tokens
that hold its first and its last character, also if a character is several tokens. If an answer begins with a window's last
token, it begins there: the example's search runs on to the end of the padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lrkit.errors import LrkitError, cut
from lrkit.tasks.tokens import tokenized

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

OUTSIDE = (-1, -1)
"""The offsets of a token that is not of the context."""


def windows_of(
    questions: Sequence[str], contexts: Sequence[str], tokenizer: Any, max_length: int, stride: int
) -> tuple[dict[str, Any], list[int], list[list[tuple[int, int]]]]:
    """Cut each context into windows that overlap by a stride, each behind the whole question.

    Args:
        questions: [n]; white space around them is cut off.
        contexts: [n].
        tokenizer: a fast one: the others do not know where in a text a token is.
        max_length: tokens of a window, the question and special tokens included.
        stride: tokens of a context that a window has in common with the one before.

    Returns:
        Model inputs by column, not padded, [windows]; the number of each window's question, from 0, [windows]; and
        where each token is in its context, as (first character, the one after its last), [windows][tokens][2]: `OUTSIDE`
        for tokens that are not of the context.

    Raises:
        LrkitError: the tokenizer cannot do it, or a question leaves no room for more of its context than the stride.
    """
    asked = [question.strip() for question in questions]
    _check_room(asked, tokenizer, max_length, stride)
    encoded = tokenized(
        tokenizer,
        asked,
        list(contexts),
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=False,
    )
    columns = dict(encoded)
    rows, places = columns.pop("overflow_to_sample_mapping"), columns.pop("offset_mapping")
    offsets = [
        [place if side == 1 else OUTSIDE for place, side in zip(of_window, encoded.sequence_ids(i), strict=True)]
        for i, of_window in enumerate(places)
    ]
    return columns, list(rows), offsets


def _check_room(questions: Sequence[str], tokenizer: Any, max_length: int, stride: int) -> None:
    """Raise LrkitError unless every question leaves room for more of its context than the stride."""
    lengths = [len(ids) for ids in tokenized(tokenizer, list(questions), add_special_tokens=False)["input_ids"]]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True) - lengths[longest]
    if room <= stride:
        raise LrkitError(
            f'the question "{cut(questions[longest], 60)}" has {lengths[longest]} tokens, so that a window of {max_length} '
            f"has room for {max(room, 0)} of its context, and windows overlap by {stride}: raise run.max_length, or lower "
            "task.stride"
        )


def null_of(ids: Sequence[int], tokenizer: Any) -> int:
    """Return the token of a window that stands for "no answer": [CLS], or the first one if there is none."""
    mark = tokenizer.cls_token_id
    return list(ids).index(mark) if mark in ids else 0


def placed(answers: Mapping[str, Sequence[Any]], context: str) -> tuple[int, int] | None:
    """Find the first of some answers that stands in the context where it is said to.

    Args:
        answers: ``text`` and ``answer_start``, as long as each other.
        context: the text.

    Returns:
        Its first character and the one after its last, without white space around it; None if none stands there.
    """
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        if start >= 0 and text.strip() and context.startswith(text, start):
            first = start + len(text) - len(text.lstrip())
            return first, first + len(text.strip())
    return None


def position_of(span: tuple[int, int], offsets: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Find the tokens of a window that hold a span of the context.

    Args:
        span: its first character and the one after its last.
        offsets: as `windows_of` returns them, of one window.

    Returns:
        The first and the last token; None if the window does not hold the whole span.
    """
    import numpy as np

    array: NDArray[np.int64] = np.asarray(offsets, dtype=np.int64)
    inside = np.flatnonzero(array[:, 0] >= 0)
    if not len(inside):
        return None
    begins, ends = array[inside].T
    if begins.min() > span[0] or ends.max() < span[1]:
        return None
    within = inside[(ends > span[0]) & (begins < span[1])]
    return (int(within[0]), int(within[-1])) if len(within) else None
