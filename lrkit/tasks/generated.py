"""Scores of generated text: ROUGE of summaries, BLEU of translations, exact match of the number that ends a solution.

For example:

    >>> final_number("She sold 48 / 2 = 24 clips. #### 1,072")
    Decimal('1072')
    >>> last_number_match(["So he pays $72.00."], ["9 * 8 = 72 #### 72"])
    {'em': 1.0}
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from lrkit.errors import LrkitError
from lrkit.tasks.answers import check_rows

ROUGE = ("rougeL", "rouge1", "rouge2", "rougeLsum")

# A sign counts if no word, number or bracket ends right before it: "= -3", "$-3" and "-$3" are -3; "10-3" ends with 3.
_PATTERN = r"(?:(?<![\w)\]])([-−]))?(?:[$€£¥₹] ?([-−])?)?([0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
_SENTENCE = re.compile(r"(?<=[.!?])[ \t]+|\s*\n\s*")
_NUMBER, _MARKED = re.compile(_PATTERN), re.compile("####[ \t]*" + _PATTERN)


def sentences(text: str) -> list[str]:
    """List the sentences of a text: each ends with its line, or with a full stop, "!" or "?" before a blank.

    So "e.g. this" is two. The papers on summaries split by a trained model of nltk's, which does not come with a package.
    """
    return [sentence for sentence in _SENTENCE.split(text.strip()) if sentence]


def first_sentences(text: str, count: int) -> str:
    """Return the first so many sentences of a text, its lead; 0 for the whole of it."""
    return " ".join(sentences(text)[: count or None])


def rouge_scorer() -> Any:
    """Make rouge-score's scorer, or raise LrkitError if the package is not installed: ask before a model is trained."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise LrkitError('ROUGE needs the package rouge-score: pip install "lrkit[text]"') from None
    return RougeScorer(list(ROUGE), use_stemmer=True)


def rouge(predicted: Sequence[str], true: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """Compute ROUGE-L, -1, -2 and -Lsum: F1, in [0, 1], the mean over rows.

    The package rouge-score computes them as published (Lin 2004), with Porter's stemmer. For Lsum each
    sentence is put on a line of its own: see `sentences`. If a row has several references, the best counts, for each score
    apart.

    Args:
        predicted: One text per row, [n].
        true: The reference of each row, or its references, [n].

    Raises:
        LrkitError: if rouge-score is not installed, there is not one prediction per row, no row, or a row without a
            reference.
    """
    scorer = rouge_scorer()
    check_rows(predicted, true)
    sums = dict.fromkeys(ROUGE, 0.0)
    for row, (said, references) in enumerate(zip(predicted, true, strict=True)):
        for name, score in scorer.score_multi(
            [_in_lines(text) for text in several(references, row)], _in_lines(said)
        ).items():
            sums[name] += float(score.fmeasure)
    return {name: total / len(true) for name, total in sums.items()}


def _in_lines(text: str) -> str:
    return "\n".join(sentences(text))


def exact_match(predicted: Sequence[str], true: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """Compute the share of rows in which the text is a reference of its row, but for white space.

    Args:
        predicted: One text per row, [n].
        true: The reference of each row, or its references, [n].

    Raises:
        LrkitError: if there is not one prediction per row, no row, or a row without a reference.
    """
    check_rows(predicted, true)
    hits = 0
    for row, (said, references) in enumerate(zip(predicted, true, strict=True)):
        hits += said.split() in [text.split() for text in several(references, row)]
    return {"em": hits / len(true)}


def translation_scorers() -> dict[str, Any]:
    """Make sacrebleu's scorers, or raise LrkitError if the package is not installed: ask before a model is trained."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise LrkitError('BLEU needs the package sacrebleu: pip install "lrkit[text]"') from None
    return {"bleu": BLEU(), "chrf": CHRF()}


def bleu(predicted: Sequence[str], true: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """Compute BLEU and chrF of all rows together, in [0, 1].

    The package sacrebleu computes them with its own defaults (Post 2018), by which papers can be compared: BLEU on words
    as "13a" splits them, and chrF2 on characters, which suits texts without blanks too. A row may have several
    references.

    Args:
        predicted: One text per row, [n].
        true: The reference of each row, or its references, [n].

    Raises:
        LrkitError: if sacrebleu is not installed, there is not one prediction per row, no row, or a row without a
            reference.
    """
    scorers = translation_scorers()
    check_rows(predicted, true)
    rows = [several(references, row) for row, references in enumerate(true)]
    most = max(len(texts) for texts in rows)
    streams = [[texts[n] if n < len(texts) else None for texts in rows] for n in range(most)]
    return {name: scorer.corpus_score(list(predicted), streams).score / 100 for name, scorer in scorers.items()}


def several(references: str | Sequence[str], row: int) -> list[str]:
    """List a row's references, of which there may be one alone; raise LrkitError if there is none."""
    texts = [references] if isinstance(references, str) else list(references)
    if not texts:
        raise LrkitError(f"row {row}: no reference text")
    return texts


def final_number(text: str) -> Decimal | None:
    """Read the number that a solution ends with; None if it has none.

    This is the first number that stands right after "####", as the authors of GSM8K read it (Cobbe et al. 2021, arXiv
    2110.14168), also if a model goes on with another question. Without one it is the last number of the text. Commas
    between digits go, so do a currency sign before a number and a period after it. A minus is a sign unless a word, a
    number or a bracket ends right before it: "10-3" ends with 3.
    Fractions and powers of ten are not read: "3/4" ends with 4.
    """
    found = _MARKED.search(text)
    if found is None:
        for found in _NUMBER.finditer(text):  # noqa: B007  the last one stays
            pass
    if found is None:
        return None
    before, after, digits = found.groups()
    value = Decimal(digits.replace(",", ""))
    return value.copy_negate() if before or after else value


def last_number_match(predicted: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    """Compute the share of solutions that end with the right number, as numbers: 72.00 is 72.

    GSM8K's own script compares the digits as text and reads no number without "####"; on references of the data set,
    and on solutions in their form, both say the same.

    Args:
        predicted: One solution per row, [n].
        true: The reference solutions, or their numbers, [n].

    Raises:
        LrkitError: if a reference has no number, there is not one prediction per row, or no row.
    """
    check_rows(predicted, true)
    hits = 0
    for row, (said, reference) in enumerate(zip(predicted, true, strict=True)):
        right = final_number(reference)
        if right is None:
            raise LrkitError(f"row {row}: the reference has no number: {reference[-60:]!r}")
        hits += final_number(said) == right
    return {"em": hits / len(true)}
