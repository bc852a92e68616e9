"""Scores of text against the packages whose rules they follow: torchmetrics, rouge-score, sacrebleu and seqeval."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrkit.tasks.answers import normalized, squad
from lrkit.tasks.entities import entities, entity_f1
from lrkit.tasks.generated import bleu, rouge, sentences

torchmetrics_squad = pytest.importorskip("torchmetrics.functional.text").squad
rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
sacrebleu = pytest.importorskip("sacrebleu")
seqeval = pytest.importorskip("seqeval.metrics")
get_entities = pytest.importorskip("seqeval.metrics.sequence_labeling").get_entities

WORDS = ["a", "The", "an", "U.S.", "theatre", "x-ray", "1,000", "É", "“cat”", "cat", "dogs", "dog", "-", "\u00a0"]
TEXTS = st.one_of(st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join), st.text(max_size=8))
TAGS = st.sampled_from(["O", "B", "I", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("X", "Y", "X-Z"))])


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=5))
def test_squad_is_torchmetrics(rows: list[tuple[str, list[str]]]) -> None:
    """Exact match and F1 of v1.1 are those of a port of the published script, which takes v2.0's F1 of empty answers."""
    rows = [(said if normalized(said) else "cat", texts) for said, texts in rows]
    theirs = torchmetrics_squad(
        [{"id": str(row), "prediction_text": said} for row, (said, _) in enumerate(rows)],
        [
            {"id": str(row), "answers": {"text": texts, "answer_start": [0] * len(texts)}}
            for row, (_, texts) in enumerate(rows)
        ],
    )
    ours = squad([said for said, _ in rows], [texts for _, texts in rows])
    for name, value in ours.items():
        theirs_name = {"em": "exact_match"}.get(name, name)
        assert 100 * value == pytest.approx(float(theirs[theirs_name]), abs=1e-4)  # float32


@settings(deadline=None, max_examples=300)
@given(st.lists(st.lists(st.tuples(TAGS, TAGS, st.booleans()), min_size=1, max_size=7), min_size=1, max_size=3))
@pytest.mark.filterwarnings("ignore")
def test_entities_are_seqevals(rows: list[list[tuple[str, str, bool]]]) -> None:
    """Entities, F1, precision, recall and accuracy are those of seqeval's default mode."""
    true = [[tag for tag, _, _ in row] for row in rows]
    said = [[tag if same else other for tag, other, same in row] for row in rows]
    for tags in true:
        assert [(kind or "_", *ends) for kind, *ends in entities(tags)] == get_entities(tags)
    ours = entity_f1(said, true)
    for name in ("f1", "precision", "recall", "accuracy"):
        assert ours[name] == pytest.approx(getattr(seqeval, f"{name}_score")(true, said))


def test_rouge_of_lin() -> None:
    """The example of Lin (2004, section 3.1): two sentences tie by bigrams, and word order tells them apart by L."""
    true = "police killed the gunman"
    second, third = rouge(["police ended the gunman"], [true]), rouge(["the gunman kill police"], [true])
    assert second == pytest.approx({"rougeL": 3 / 4, "rouge1": 3 / 4, "rouge2": 1 / 3, "rougeLsum": 3 / 4})
    assert third == pytest.approx({"rougeL": 2 / 4, "rouge1": 4 / 4, "rouge2": 1 / 3, "rougeLsum": 2 / 4})  # stemmed
    assert rouge(["a b"], [["x", "a b", "a"]])["rougeL"] == 1.0  # the best reference
    lines = rouge(["c d\na b"], ["a b\nc d"])
    assert (lines["rougeLsum"], lines["rougeL"]) == (1.0, 0.5)  # each line is a sentence


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))
def test_rouge_is_mean(rows: list[tuple[str, str]]) -> None:
    """Each score is the mean over rows of the package's F1."""
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    each = [scorer.score(*("\n".join(sentences(text)) for text in (true, said))) for said, true in rows]
    for name, value in rouge([said for said, _ in rows], [true for _, true in rows]).items():
        assert value == pytest.approx(sum(scores[name].fmeasure for scores in each) / len(each))


def test_bleu_of_papineni() -> None:
    """BLEU by hand: the precisions of words and of two, three and four in a row, and the penalty for a short text."""
    said, true = "the cat sat on the red mat", "the cat sat on the mat by it"
    precisions = [6 / 7, 4 / 6, 3 / 5, 2 / 4]
    expected = math.exp(1 - 8 / 7) * math.prod(precisions) ** (1 / 4)
    assert bleu([said], [true])["bleu"] == pytest.approx(expected)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=2, max_size=2)), min_size=1, max_size=4))
def test_bleu_is_sacrebleus(rows: list[tuple[str, list[str]]]) -> None:
    """BLEU and chrF are the package's of all rows together."""
    said, streams = (
        [said for said, _ in rows],
        [list(texts) for texts in zip(*(texts for _, texts in rows), strict=True)],
    )
    ours = bleu(said, [texts for _, texts in rows])
    assert 100 * ours["bleu"] == pytest.approx(sacrebleu.corpus_bleu(said, streams).score)
    assert 100 * ours["chrf"] == pytest.approx(sacrebleu.corpus_chrf(said, streams).score)
