"""The tags of words against the evaluation of transformers' own script for named entities, with seqeval."""

import datasets
import numpy as np
import pytest
import tiny_words
from hypothesis import given, settings
from hypothesis import strategies as st

from lrkit.tasks import TokenClassification

seqeval = pytest.importorskip("seqeval.metrics")

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
PIECES = tiny_words.word_pieces("a", "##b", "b")
ROW = st.lists(st.tuples(st.sampled_from(["a", "ab", "abb", "q"]), st.integers(0, 4)), min_size=1, max_size=8)


@settings(max_examples=100)
@given(st.lists(ROW, min_size=1, max_size=4), st.integers(0, 2**31))
@pytest.mark.filterwarnings("ignore")
def test_scores_are_run_ners(rows, seed):
    """Labels are aligned and scored as run_ner.py does: the first piece of each word, and seqeval's four scores."""
    data = datasets.Dataset.from_list([{"tokens": [w for w, _ in row], "tags": [t for _, t in row]} for row in rows])
    task = TokenClassification(name="t", train=data, validation=data, labels=LABELS)
    ours = task.examples(PIECES, 32, training=False)
    # run_ner.py, tokenize_and_align_labels: the script's own loop
    inputs = PIECES(data["tokens"][:], is_split_into_words=True, truncation=True, max_length=32)
    labels = []
    for i, tags in enumerate(data["tags"]):
        previous, ids = None, []
        for word in inputs.word_ids(batch_index=i):
            ids.append(-100 if word is None or word == previous else tags[word])
            previous = word
        labels.append(ids)
    assert ours["labels"] == labels and ours["input_ids"] == inputs["input_ids"]
    # run_ner.py, compute_metrics
    said = np.random.default_rng(seed).integers(0, len(LABELS), (len(labels), max(map(len, labels))))
    kept = [
        [(LABELS[p], LABELS[t]) for p, t in zip(line, row, strict=False) if t != -100]
        for line, row in zip(said, labels, strict=True)
    ]
    theirs = [[[pair[side] for pair in row] for row in kept] for side in (1, 0)]
    scores = task.score(task.answers(said, ours, PIECES), task.references())
    for name in ("f1", "precision", "recall", "accuracy"):
        assert scores[name] == pytest.approx(getattr(seqeval, f"{name}_score")(*theirs))
