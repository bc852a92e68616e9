"""Words with tags: named entities, parts of speech."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import attrs

from lrkit.errors import LrkitError, cut
from lrkit.tasks.asking import ask
from lrkit.tasks.base import Task
from lrkit.tasks.entities import are_entities, entity_f1, tag_accuracy
from lrkit.tasks.generating import IGNORED, padding_on
from lrkit.tasks.head import Head
from lrkit.tasks.learnt import Sample

if TYPE_CHECKING:
    import datasets
    from torch import Tensor, nn

Tags = Sequence[Sequence[str | None]]
_DIVERGED = -1


def _strings(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(values)


@attrs.frozen(kw_only=True, eq=False)
class TokenClassification(Task):
    """Words with tags, split in two: a model says each word's tag at its first word piece.

    If all labels are tags of entities (O, and B-, I-, E-, S- with a type), F1 of entities is the primary score, with
    precision, recall and accuracy beside it, as seqeval computes them. If not, as with parts of speech, it is accuracy.

    A training row that is longer than the longest input is cut: the words behind are not learnt from. A validation row is
    not cut: it goes on in a further example, so that each of its words is scored. A word that comes to no token is
    answered by O, or, if there is no O, by "", which is wrong.

    Attributes:
        train, validation: the rows, each with the columns `tokens`, a list of words, and `tags`, a list of as many ints
            from 0 to ``len(labels) - 1``.
        labels: the tags' names by number.

    Raises:
        LrkitError: fewer than two labels, or one twice, or columns that are not there.
    """

    labels: tuple[str, ...] = attrs.field(converter=_strings)

    @property
    def columns(self) -> tuple[str, ...]:
        """Name the columns that both splits must have."""
        return ("tokens", "tags")

    def check(self, where: str) -> None:
        """Check that there are labels, and none twice."""
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise LrkitError(f"{where}: two labels or more are needed, and none twice, not {', '.join(self.labels)}")

    @property
    def head(self) -> Head:
        """Describe the head of the task's model, with an output per label for each token."""
        return Head(auto_class="AutoModelForTokenClassification", num_labels=len(self.labels), labels=self.labels)

    def texts(self, rows: datasets.Dataset) -> list[str]:
        """List the texts of some rows: their words, joined by blanks."""
        return [" ".join(words) for words in rows["tokens"]]

    def encode(
        self, batch: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int, *, training: bool
    ) -> dict[str, Any]:
        """Encode some rows: the first piece of each word is labelled, all other tokens are not (-100).

        For a score there are two further columns: ``words``, the number of the word that begins at each token, -100 where
        none does; and ``first``, whether the example is its row's first.

        Raises:
            LrkitError: the tokenizer cannot tell which token is of which word, or words and tags do not fit.
        """
        from lrkit.tasks.tokens import tokenized

        if not tokenizer.is_fast:
            raise LrkitError(
                f'task "{self.name}" needs a fast tokenizer, which knows the word of each token; '
                f"{type(tokenizer).__name__} is none"
            )
        before = _before(tokenizer)
        rows = [[before + word for word in words] for words in batch["tokens"]]
        for words, tags in zip(rows, batch["tags"], strict=True):
            self._check_row(words, tags, training)
        how = {"truncation": True, "max_length": max_length, "return_overflowing_tokens": not training}
        found = tokenized(tokenizer, rows, is_split_into_words=True, **how)
        examples = dict(found)
        sources = list(examples.pop("overflow_to_sample_mapping", range(len(rows))))
        begins = list(_begins(sources, found.word_ids))
        tagged = [(batch["tags"][source], each) for source, each in zip(sources, begins, strict=True)]
        examples["labels"] = [[IGNORED if n == IGNORED else tags[n] for n in each] for tags, each in tagged]
        if not training:
            examples["words"] = begins
            examples["first"] = [n == 0 or sources[n - 1] != source for n, source in enumerate(sources)]
        return examples

    def _check_row(self, words: Sequence[str], tags: Sequence[int], training: bool) -> None:
        where = f'task "{self.name}": the row "{cut(" ".join(words).strip(), 60)}"'
        if len(words) != len(tags):
            raise LrkitError(f"{where} has {len(words)} words and {len(tags)} tags")
        wrong = [tag for tag in tags if not 0 <= tag < len(self.labels)]
        if wrong:
            raise LrkitError(f"{where} has tag {wrong[0]}; tags are 0 to {len(self.labels) - 1}")
        if training and not words:
            raise LrkitError(f"{where} for training has no words: leave it out")

    def collator(self, tokenizer: Any, *, training: bool = True) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a function from examples to a batch, in which labels are filled up with -100."""
        from transformers import DataCollatorForTokenClassification

        return DataCollatorForTokenClassification(padding_on("right", tokenizer))  # places are counted from the left

    def predict(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor | None, Tensor]:
        """Compute the number of each token's likeliest label [rows, tokens]; -1 if its logits are not finite."""
        outputs = model(**batch)
        logits = outputs["logits"]
        return outputs.get("loss"), logits.argmax(-1).masked_fill(~logits.isfinite().all(-1), _DIVERGED)

    def answers(self, outputs: Any, examples: datasets.Dataset, tokenizer: Any) -> list[list[str | None]]:
        """Return the tags' names of each validation row's words; None for a word if the run has diverged."""
        found: list[list[str | None]] = []
        unread = "O" if "O" in self.labels else ""
        for row, words, first in zip(outputs, examples["words"], examples["first"], strict=True):
            if first:
                found.append([unread] * len(self.validation[len(found)]["tokens"]))
            for tag, word in zip(row[: len(words)], words, strict=True):
                if word != IGNORED:
                    found[-1][word] = None if tag == _DIVERGED else self.labels[tag]
        return found

    def references(self) -> list[list[str]]:
        """Return the tags' names of each validation row's words."""
        return [[self.labels[tag] for tag in tags] for tags in self.validation["tags"]]

    def score(self, predictions: Tags, references: Sequence[Sequence[str]]) -> dict[str, float]:
        """Score tags; the first key is the primary score: F1 of entities, or accuracy of tags that are not of entities.

        Args:
            predictions: tags' names of each row's words, [rows][words].
            references: likewise.

        Raises:
            LrkitError: if there is not one prediction per row and word, or no row.
        """
        diverged = any(tag is None for row in predictions for tag in row)
        known = references if diverged else cast(Sequence[Sequence[str]], predictions)
        scores = (entity_f1 if are_entities(self.labels) else tag_accuracy)(known, references)
        return dict.fromkeys(scores, math.nan) if diverged else scores

    @property
    def majority(self) -> float:
        """Compute the primary score of the best of the answers that give all words one tag.

        For parts of speech this is the share of the most frequent one. For entities it is near 0: O finds none.
        """
        truth = self.references()
        return max(
            next(iter(self.score([[label] * len(row) for row in truth], truth).values())) for label in self.labels
        )

    def samples(self, model: nn.Module, tokenizer: Any, max_length: int, count: int) -> Sequence[Sample]:
        """Show the tags of the first so many validation rows: "Ada/B-PER wrote to London/B-LOC"."""
        part = attrs.evolve(self, validation=self.validation.select(range(min(count, len(self.validation)))))
        rows, said = part.validation["tokens"], ask(part, model, tokenizer, max_length)
        return [
            Sample(" ".join(words), marked(words, true), marked(words, tags))
            for words, true, tags in zip(rows, part.references(), said, strict=True)
        ]


def marked(words: Sequence[str], tags: Sequence[str | None]) -> str:
    """Write words with their tags, each after a slash; O is left out."""
    return " ".join(word if tag == "O" else f"{word}/{tag}" for word, tag in zip(words, tags, strict=True))


def _begins(sources: Sequence[int], words_of: Callable[[int], Sequence[int | None]]) -> Iterator[list[int]]:
    """Say which word of its row begins at each token of an example, -100 where none does.

    Args:
        sources: the row of each example.
        words_of: the word that each token of an example is a piece of.
    """
    seen: set[tuple[int, int]] = set()  # a word that a cut divides begins once
    for example, source in enumerate(sources):
        begins = []
        for word in words_of(example):
            new = word is not None and (source, word) not in seen
            begins.append(word if word is not None and new else IGNORED)
            seen |= {(source, word)} if word is not None and new else set()
        yield begins


def _before(tokenizer: Any) -> str:
    """Return what stands before each word, so that it becomes the same pieces as within a text.

    RoBERTa's and GPT-2's tokenizers take the blank before a word for a part of it, and a word that is given by itself has
    none. All others put it there themselves, or drop it.
    """
    from lrkit.tasks.tokens import tokenized

    def pieces(text: Any, **how: Any) -> list[int]:
        return list(tokenized(tokenizer, text, add_special_tokens=False, **how)["input_ids"])

    within = pieces("a a")[len(pieces("a")) :]
    return "" if pieces(["a"], is_split_into_words=True) == within else " "
