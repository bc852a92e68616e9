"""Scores of tagged words: F1 of whole entities, as conlleval and seqeval's default mode compute it.

For example:

    >>> entities(["B-PER", "I-PER", "O", "I-LOC"])
    [('PER', 0, 1), ('LOC', 3, 3)]
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lrkit.errors import LrkitError
from lrkit.tasks.answers import check_rows

_TAG = re.compile(r"O|([BIES])(?:-(.*))?", re.DOTALL)


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Read the entities of one row: type, first word, last word.

    Tags are O or B, I, E, S with a type, such as "B-PER"; so IOB2, IOB1 and IOBES are read, by the lenient rules of
    conlleval (Tjong Kim Sang and De Meulder 2003). An entity starts at B, at S, at a type that differs from the word's
    before, and after O, E and S; it goes on up to the next start or O. So an I that no B precedes starts one.

    Raises:
        LrkitError: if a tag is none of these.
    """
    found: list[tuple[str, int, int]] = []
    last, kind = "O", ""  # prefix and type of the word before
    for place, tag in enumerate(tags):
        parts = _TAG.fullmatch(tag)
        if parts is None:
            raise LrkitError(f'"{tag}" (word {place}) is no tag of an entity; tags are O, or B-, I-, E-, S- and a type')
        prefix, of = parts[1] or "O", parts[2] or ""
        if prefix != "O":
            if prefix in "BS" or last in "OES" or of != kind:
                found.append((of, place, place))
            else:
                found[-1] = (of, found[-1][1], place)
        last, kind = prefix, of
    return found


def is_entity_tag(label: str) -> bool:
    """Say whether a label is a tag of an entity, or of none: O, B-PER, I-PER."""
    return label == "O" or _TAG.fullmatch(label) is not None


def are_entities(labels: Sequence[str]) -> bool:
    """Say whether labels are tags of entities, as `entities` reads them, and not, for example, parts of speech."""
    return "O" in labels and len(labels) > 1 and all(_TAG.fullmatch(label) for label in labels)


def entity_f1(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """Compute F1, precision and recall of entities over all rows together, and accuracy of the tags; in [0, 1].

    An entity is right if type, first and last word are. A score whose denominator is 0 is 0.

    Args:
        predicted: Tags of the words of each row, [n][words].
        true: The true ones, as many.

    Raises:
        LrkitError: if there is not one prediction per row and word, no row, or a tag is none.
    """
    check_rows(predicted, true)
    hits = called = wanted = 0
    for row, (said, tags) in enumerate(zip(predicted, true, strict=True)):
        _check_words(row, said, tags)
        ours, theirs = set(entities(said)), set(entities(tags))
        hits, called, wanted = hits + len(ours & theirs), called + len(ours), wanted + len(theirs)
    return {
        "f1": _share(2 * hits, called + wanted),
        "precision": _share(hits, called),
        "recall": _share(hits, wanted),
        **tag_accuracy(predicted, true),
    }


def tag_accuracy(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """Compute the share of words whose tag is right, in [0, 1]; of tags of any kind, such as parts of speech.

    Args:
        predicted: Tags of the words of each row, [n][words].
        true: The true ones, as many.

    Raises:
        LrkitError: if there is not one prediction per row and word, or no row.
    """
    check_rows(predicted, true)
    same = words = 0
    for row, (said, tags) in enumerate(zip(predicted, true, strict=True)):
        _check_words(row, said, tags)
        same, words = same + sum(map(str.__eq__, said, tags)), words + len(tags)
    return {"accuracy": _share(same, words)}


def _check_words(row: int, said: Sequence[str], tags: Sequence[str]) -> None:
    if len(said) != len(tags):
        raise LrkitError(f"row {row}: {len(said)} predicted tags for {len(tags)} words")


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
