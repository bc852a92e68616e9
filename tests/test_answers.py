"""Scores of answers, generated texts and entities, against cases worked out by the published rules."""

from __future__ import annotations

import string
import sys
from collections.abc import Sequence
from decimal import Decimal
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lrkit
from lrkit.tasks.answers import best_threshold, normalized, squad, squad_v2
from lrkit.tasks.entities import entities, entity_f1
from lrkit.tasks.generated import final_number, last_number_match, rouge

WORDS = st.lists(st.sampled_from(["a", "The", "an", "U.S.", "theatre", "x-ray", "1,000", "É", "“cat”", "cat", "-"]))
TEXTS = st.one_of(WORDS.map(" ".join), st.text(max_size=12))

# prediction, references, (exact match, F1) by v1.1, the same by v2.0
ANSWERS: list[tuple[str, list[str], tuple[float, float], tuple[float, float]]] = [
    ("Denver Broncos", ["Denver Broncos"], (1, 1), (1, 1)),
    ("the denver  broncos!", ["Denver Broncos"], (1, 1), (1, 1)),
    ("Broncos", ["Denver Broncos", "The Broncos"], (1, 1), (1, 1)),  # the best reference
    ("Broncos of Denver", ["Denver Broncos"], (0, 0.8), (0, 0.8)),  # 2 of 3, 2 of 2
    ("cat cat dog", ["cat dog dog"], (0, 2 / 3), (0, 2 / 3)),  # cat once, dog once
    ("1,000", ["1000"], (1, 1), (1, 1)),  # a comma is punctuation
    ("1.5", ["15"], (1, 1), (1, 1)),  # and so is a period
    ("1 000", ["1,000"], (0, 0), (0, 0)),
    ("Île-de-France", ["île de France"], (0, 0), (0, 0)),  # îledefrance against île, de, france
    ("CAFÉ", ["café"], (1, 1), (1, 1)),
    ("cafe", ["café"], (0, 0), (0, 0)),  # accents stay
    ("“yes”", ["yes"], (0, 0), (0, 0)),  # so do marks that are not ASCII
    ("theatre", ["the atre"], (0, 0), (0, 0)),  # an article is a whole word
    ("a-b", ["ab"], (1, 1), (1, 1)),  # punctuation goes before articles, and leaves no gap
    ("x a y", ["x y"], (1, 1), (1, 1)),
    ("“a”", ["“”"], (0, 0), (0, 0)),  # an article leaves a gap
    ("x\u00a0y", ["x y"], (1, 1), (1, 1)),  # a no-break space is white space
    ("", ["cat"], (0, 0), (0, 0)),
    ("The", ["a"], (1, 0), (1, 1)),  # only articles: v1.1 finds no common word; by v2.0 both are the empty answer
    ("the", ["the", "cat"], (1, 0), (0, 0)),  # by v2.0 a reference without a word does not count
]
ANSWERS_V2_ALONE: list[tuple[str, list[str], tuple[float, float]]] = [
    ("", [], (1, 1)),
    ("the", [], (1, 1)),
    ("cat", [], (0, 0)),
    ("", ["..."], (1, 1)),  # an answer without a word is none
]


def oracle_words(text: str) -> list[str]:
    """SQuAD's words, letter by letter."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    # An article goes if no letter, digit or underscore touches it.
    pieces, word = [], ""
    for letter in kept + "\n":
        if letter.isalnum() or letter == "_":
            word += letter
        else:
            pieces += ["" if word in ("a", "an", "the") and word else word, letter]
            if word in ("a", "an", "the"):
                pieces[-2] = " "
            word = ""
    return "".join(pieces).split()


def oracle_f1(predicted: str, true: str, of_empty: float) -> float:
    """F1 of words by crossing out."""
    said, wanted = oracle_words(predicted), oracle_words(true)
    if not said and not wanted:
        return of_empty
    total, common = len(said) + len(wanted), 0
    for word in said:
        if word in wanted:
            wanted.remove(word)
            common += 1
    return 2 * common / total


@pytest.mark.parametrize(("predicted", "true", "first", "second"), ANSWERS)
def test_hand_made_answers(
    predicted: str, true: list[str], first: tuple[float, float], second: tuple[float, float]
) -> None:
    """Each score is what the rules give on paper, by both versions."""
    one = squad([predicted], [true])
    assert (one["em"], one["f1"]) == pytest.approx(first)
    two = squad_v2([predicted], [true])
    assert (two["em"], two["f1"]) == pytest.approx(second)


@pytest.mark.parametrize(("predicted", "true", "wanted"), ANSWERS_V2_ALONE)
def test_questions_without_answers(predicted: str, true: list[str], wanted: tuple[float, float]) -> None:
    """The empty answer is the right one, and nothing else is."""
    found = squad_v2([predicted], [true])
    assert (found["em"], found["f1"]) == wanted


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_any_text_agrees(rows: list[tuple[str, list[str]]]) -> None:
    """Random texts have the scores of a second reading of the rules."""
    ascii_rows = [(p, t) for p, t in rows if all(x.isascii() or x in "É“”" for x in p + "".join(t))]
    for said, texts in ascii_rows:
        assert normalized(said).split() == oracle_words(said)
        found = squad([said], [texts])
        assert found["f1"] == pytest.approx(max(oracle_f1(said, text, 0.0) for text in texts))
        assert found["em"] == float(any(oracle_words(said) == oracle_words(text) for text in texts))
        kept = [text for text in texts if oracle_words(text)] or [""]
        assert squad_v2([said], [texts])["f1"] == pytest.approx(max(oracle_f1(said, text, 1.0) for text in kept))
    found = squad([p for p, _ in rows], [t for _, t in rows])
    assert found["f1"] == pytest.approx(sum(squad([p], [t])["f1"] for p, t in rows) / len(rows))
    assert list(found) == ["f1", "em"]


def test_threshold_takes_doubt() -> None:
    """A question whose doubt is above the threshold is answered by nothing; at it, by its prediction."""
    predicted, true = ["cat", "dog", "cow", "pig"], [["cat"], ["dog"], [], []]
    doubts = [0.2, 0.6, 0.5, 0.9]
    found = squad_v2(predicted, true, doubts, threshold=0.5)
    # cat is right; dog is taken back, though right; cow is given, and wrong; pig is taken back, and that is right
    assert found == {
        "f1": 0.5,
        "em": 0.5,
        "has_answer_f1": 0.5,
        "has_answer_em": 0.5,
        "no_answer_f1": 0.5,
        "no_answer_em": 0.5,
        "best_f1": 0.75,  # nothing but cat is given (threshold 0.2): cat, cow, pig
        "best_em": 0.75,
    }
    assert best_threshold([1, 1, 0, 0], predicted, [True, True, False, False], doubts) == (0.75, 0.2)
    assert best_threshold([0, 0], ["x", "y"], [True, False], [3.0, -1.0]) == (0.5, 0.0)  # nothing raises it
    assert "no_answer_f1" not in squad_v2(["cat"], [["cat"]])
    assert "best_f1" not in squad_v2(["cat"], [["cat"]])


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.tuples(st.sampled_from(["", "cat", "a dog", "cow"]), st.lists(st.sampled_from(["cat", "dog"]), max_size=2)),
        min_size=1,
        max_size=7,
    ),
    st.randoms(use_true_random=False),
)
def test_best_threshold_is_best(rows: list[tuple[str, list[str]]], random: object) -> None:
    """No threshold scores higher, and the one found scores so; doubts do not repeat."""
    predicted, true = [said for said, _ in rows], [texts for _, texts in rows]
    doubts = [0.5 + place for place in range(len(rows))]
    random.shuffle(doubts)  # type: ignore[attr-defined]
    found = squad_v2(predicted, true, doubts)
    for name in ("f1", "em"):
        tried = [squad_v2(predicted, true, doubts, threshold=at)[name] for at in [0.0, *doubts]]
        assert found[f"best_{name}"] == pytest.approx(max(tried))
        singles = [squad_v2([said], [texts])[name] for said, texts in rows]
        best, threshold = best_threshold(singles, predicted, [bool(texts) for texts in true], doubts)
        assert squad_v2(predicted, true, doubts, threshold=threshold)[name] == pytest.approx(best)


# the end of a solution, and its number
NUMBERS: list[tuple[str, str | None]] = [
    ("48 / 2 = 24\n#### 72", "72"),
    ("#### 1,072", "1072"),
    ("#### -3", "-3"),
    ("#### $18.50", "18.50"),
    ("####5", "5"),
    ("#### 72\n\nQuestion: 5 more? #### 9", "72"),  # a model that goes on
    ("#### Step 1\nSo it is 40.", "40"),  # a heading
    ("#### none, but 7 before", "7"),
    ("The answer is 42.", "42"),
    ("so 3 x 4 = 12, which is right", "12"),
    ("He pays $1,234,567.89!", "1234567.89"),
    ("that is -$5", "-5"),
    ("that is $-5", "-5"),
    ("that is \u2212 5, or \u22127", "-7"),
    ("10-3", "3"),  # a difference
    ("(10)-3", "3"),
    ("from 10 - 3", "3"),
    ("x=-3", "-3"),
    (".5 of it", "0.5"),
    ("£ 20 a week", "20"),
    ("30%", "30"),
    ("3/4", "4"),  # fractions are not read
    ("the 2nd", "2"),
    ("nothing here.", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "wanted"), NUMBERS)
def test_final_number_read(text: str, wanted: str | None) -> None:
    """The number of each solution is the one that the rules give."""
    assert final_number(text) == (None if wanted is None else Decimal(wanted))


def test_last_numbers_match() -> None:
    """Numbers are compared as numbers, and a solution without one is wrong."""
    true = ["9 * 8 = 72\n#### 72", "#### 1,000", "#### 5", "#### 0"]
    assert last_number_match(["It is $72.00.", "1000", "no idea", "-0"], true) == {"em": 0.75}
    with pytest.raises(lrkit.LrkitError, match=r"row 1: the reference has no number: 'none'"):
        last_number_match(["1", "2"], ["1", "none"])


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**9), max_value=10**9))
def test_written_number_returns(value: Decimal) -> None:
    """A number with commas, a currency sign and a period after it is read as it was."""
    sign, digits = ("-" if value < 0 else ""), f"{abs(value):,}"
    for text in (f"#### {sign}{digits}", f"1 + 1 is {sign}${digits}.", f"(${sign}{digits})"):
        assert final_number(text) == value


# tags of one row, and its entities by conlleval's rules
TAGGED: list[tuple[str, list[tuple[str, int, int]]]] = [
    ("B-PER I-PER O B-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
    ("I-PER I-PER B-PER I-PER", [("PER", 0, 1), ("PER", 2, 3)]),  # IOB1
    ("O I-LOC O", [("LOC", 1, 1)]),
    ("B-PER I-LOC", [("PER", 0, 0), ("LOC", 1, 1)]),
    ("B-PER B-PER", [("PER", 0, 0), ("PER", 1, 1)]),
    ("B-X I-X E-X S-X E-X I-X", [("X", 0, 2), ("X", 3, 3), ("X", 4, 4), ("X", 5, 5)]),  # IOBES, and what breaks it
    ("B-X S-X", [("X", 0, 0), ("X", 1, 1)]),
    ("B I O I", [("", 0, 1), ("", 3, 3)]),
    ("B-a-b I-a-b I-a", [("a-b", 0, 1), ("a", 2, 2)]),
    ("O O", []),
    ("", []),
]


@pytest.mark.parametrize(("tags", "wanted"), TAGGED)
def test_entities_of_tags(tags: str, wanted: list[tuple[str, int, int]]) -> None:
    """Tags of each scheme are read as seqeval's default mode reads them."""
    assert entities(tags.split()) == wanted


def test_entities_are_scored() -> None:
    """Counts go over all rows: an entity is right if type and both ends are."""
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "O"], ["I-ORG"]]
    predicted = [["B-PER", "I-PER", "O", "B-ORG"], ["O", "B-LOC"], ["B-ORG"]]
    # of three entities PER and ORG are found, with LOC wrong in type and one too many; four of seven tags are right
    found = entity_f1(predicted, true)
    assert found == pytest.approx({"f1": 4 / 7, "precision": 2 / 4, "recall": 2 / 3, "accuracy": 4 / 7})
    assert next(iter(found)) == "f1"
    assert entity_f1([["O"]], [["O"]]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 1.0}
    assert entity_f1([[]], [[]])["accuracy"] == 0.0


class Scorer:
    """Stands in for rouge-score's scorer: the share of common letters, the same for all."""

    def __init__(self, names: Sequence[str], use_stemmer: bool = False) -> None:
        assert use_stemmer
        self.names = names

    def score_multi(self, targets: Sequence[str], prediction: str) -> dict[str, SimpleNamespace]:
        best = max(len(set(target) & set(prediction)) / 4 for target in targets)
        return {name: SimpleNamespace(fmeasure=best) for name in self.names}


def test_rouge_takes_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each score is the mean of F1 over rows, ROUGE-L first, by the stemmer, with one or several references."""
    package, inside = ModuleType("rouge_score"), ModuleType("rouge_score.rouge_scorer")
    inside.RougeScorer = Scorer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rouge_score", package)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", inside)
    found = rouge(["ab", "cd"], ["abcd", ["x", "cx"]])
    assert list(found) == ["rougeL", "rouge1", "rouge2", "rougeLsum"]
    assert set(found.values()) == {0.375}
    with pytest.raises(lrkit.LrkitError, match="row 1: no reference text"):
        rouge(["ab", "cd"], ["abcd", []])


def test_rouge_names_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package one line says how to install it."""
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(lrkit.LrkitError, match=r'rouge-score: pip install "lrkit\[text\]"'):
        rouge(["a"], ["a"])


def test_rows_must_fit() -> None:
    """Too few predictions, no row, no reference and tags that are none are said."""
    with pytest.raises(lrkit.LrkitError, match="1 predictions for 2 rows"):
        squad(["a"], [["a"], ["b"]])
    with pytest.raises(lrkit.LrkitError, match="there is no row to score"):
        squad_v2([], [])
    with pytest.raises(lrkit.LrkitError, match="1 predictions for 2 rows"):
        squad_v2(["a", "b"], [["a"], ["b"]], doubts=[0.5])
    with pytest.raises(lrkit.LrkitError, match="row 1: no reference answer"):
        squad(["a", "b"], [["a"], []])
    with pytest.raises(lrkit.LrkitError, match="row 0: 1 predicted tags for 2 words"):
        entity_f1([["O"]], [["O", "O"]])
    for tag in ("PER", "X-PER", "O-PER", "BPER", ""):
        with pytest.raises(lrkit.LrkitError, match=f'"{tag}" \\(word 1\\) is no tag'):
            entities(["O", tag])
