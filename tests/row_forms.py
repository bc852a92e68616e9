"""A good row of every form that a folder of data may have."""

from __future__ import annotations

from copy import deepcopy
from itertools import cycle
from typing import Any

Row = dict[str, Any]

GOOD: dict[str, Row] = {
    "questions": {
        "question": "Who sang?",
        "context": "A bird sang. Bob slept.",
        "answers": {"text": ["bird", "A bird"], "answer_start": [2, 0]},
    },
    "summaries": {"document": "A long story of a bird.", "summary": "A bird."},
    "news": {"article": "A long story of a bird.", "highlights": "A bird."},
    "translations": {"source": "ein Vogel", "target": "a bird"},
    "completions": {"prompt": "A bird", "completion": " sang."},
    "chats": {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A bird."}]},
    "instructions": {"instruction": "Name a bird.", "input": "", "output": "A wren."},
    "solutions": {"question": "1 + 1?", "answer": "It is 2.\n#### 2"},
    "entities": {"tokens": ["Bob", "slept"], "ner_tags": ["B-PER", "O"]},
    "words": {"tokens": ["Bob", "slept"], "pos_tags": ["N", "V"]},
    "plain texts": {"text": "A bird sang."},
    "sentences": {"sentence": "A bird sang.", "label": 1},
    "pairs": {"premise": "A bird sang.", "hypothesis": "Bob slept.", "label": 0},
}
"""A row of each form."""

ROWS = 4


def rows_of(form: str) -> list[Row]:
    """Rows of a form, all alike but for the label, if there is one."""
    rows = [deepcopy(GOOD[form]) for _ in range(ROWS)]
    for label, row in zip(cycle((1, 0)), rows, strict=False):
        row |= {"label": label} if "label" in row else {}
    return rows
