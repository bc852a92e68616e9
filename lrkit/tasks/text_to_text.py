"""Texts that become texts, by an encoder and a decoder: summaries, translations, answers in free words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.errors import LrkitError
from lrkit.settings import one_of, real, whole
from lrkit.tasks import cuts, generated, generating
from lrkit.tasks.base import Task
from lrkit.tasks.generated import first_sentences, several
from lrkit.tasks.learnt import Sample
from lrkit.tasks.tokens import check_known, encoding, some

if TYPE_CHECKING:
    import datasets
    from torch import Tensor, nn

Texts = Sequence[str | Sequence[str]]


@attrs.frozen
class Metric:
    """A score of texts: its function, the name of its primary score, and what fails if its package is not there."""

    score: Callable[[Sequence[str], Any], dict[str, float]]
    primary: str
    needs: Callable[[], object] = dict


METRICS: Mapping[str, Metric] = {
    "rouge": Metric(generated.rouge, generated.ROUGE[0], generated.rouge_scorer),
    "bleu": Metric(generated.bleu, "bleu", generated.translation_scorers),
    "exact_match": Metric(generated.exact_match, "em"),
}


@attrs.frozen(kw_only=True, eq=False)
class TextToText(Task):
    """Texts that an encoder-decoder (T5, BART, Marian) learns to turn into other texts.

    The loss is the model's own: of every target token, given those before it. A score is of texts that the model writes by
    itself, greedily or by beams. What its own generation config asks for beside the options here holds too. For example:
    the first token that an mBART is made to write.

    Attributes:
        train, validation: the rows, each with the columns `source` (str) and `target` (str, or a list of them: the model
            learns the first, and the best of them counts in a score).
        source, target: names of these columns.
        prefix: what stands before every source, such as T5's ``"summarize: "``.
        max_target_length: tokens of a target that are learnt, special tokens included.
        max_new_tokens: the most tokens that the model writes; None for `max_target_length`.
        num_beams: beams of the search; 1 for greedy.
        length_penalty: exponent of a beam's length, by which its score is divided; None for the model's own.
        no_repeat_ngram_size: no so many tokens in a row are written twice; None for the model's own.
        metric: ``"rouge"`` for summaries, ``"bleu"`` for translations (either needs ``lrkit[text]``) or ``"exact_match"``.
        lead: sentences of a source that are its trivial summary; 0 for all of it.

    Raises:
        LrkitError: a setting out of its range, or columns that are not there.
    """

    source: str = "source"
    target: str = "target"
    prefix: str = ""
    max_target_length: int = attrs.field(default=128, validator=whole(2))
    max_new_tokens: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole(1)))
    num_beams: int = attrs.field(default=1, validator=whole(1))
    length_penalty: float | None = attrs.field(default=None, validator=attrs.validators.optional(real(-100, 100)))
    no_repeat_ngram_size: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole(0)))
    metric: str = attrs.field(default="rouge", validator=one_of(tuple(METRICS)))
    lead: int = attrs.field(default=1, validator=whole(0))

    @property
    def auto_class(self) -> str:
        """Name the Auto class of an encoder with a decoder."""
        return "AutoModelForSeq2SeqLM"

    @property
    def columns(self) -> tuple[str, ...]:
        """Name the columns that both splits must have."""
        return (self.source, self.target)

    def check(self, where: str) -> None:
        """Check that beams are searched if they are to be weighed."""
        if self.length_penalty is not None and self.num_beams == 1:
            raise LrkitError(f"{where}: length_penalty weighs beams, and num_beams is 1")

    def texts(self, rows: datasets.Dataset) -> list[str]:
        """List the sources of some rows, as the model is given them."""
        return self._sources(rows)

    def _sources(self, rows: Any) -> list[str]:
        return [self.prefix + text for text in rows[self.source]]

    def _targets(self, rows: Any) -> list[str]:
        return [several(texts, row)[0] for row, texts in enumerate(rows[self.target])]

    def encode(
        self, batch: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int, *, training: bool = True
    ) -> dict[str, Any]:
        """Encode some rows: sources cut at `max_length` tokens, and in training `labels` cut at `max_target_length`.

        Raises:
            LrkitError: the tokenizer cannot encode them, or a row has no target.
        """
        encoded = encoding(tokenizer, self._sources(batch), truncation=True, max_length=max_length)
        if training:
            how = {"truncation": True, "max_length": self.max_target_length}
            encoded["labels"] = encoding(tokenizer, text_target=self._targets(batch), **how)["input_ids"]
        return encoded

    def examples(self, tokenizer: Any, max_length: int, *, training: bool) -> datasets.Dataset:
        """Encode all rows of a split; with those that are scored, say how many texts of both splits are cut.

        Raises:
            LrkitError: the tokenizer cannot encode them, or does not know most targets' words; or the metric's package is
                not there.
        """
        METRICS[self.metric].needs()  # now, not after hours
        if not training:
            rows = [some(self.train), some(self.validation)]
            sources = [text for part in rows for text in self._sources(part)]
            cuts.tell(self.name, "source", tokenizer, sources, max_length, "run.max_length")
            targets, limit = self._targets(rows[0]), self.max_target_length
            if any(text.strip() for text in targets):  # a source's own vocabulary need not know them
                known = encoding(tokenizer, text_target=targets, add_special_tokens=False)["input_ids"]
                check_known(known, tokenizer, "target")
            cuts.tell(self.name, "target", tokenizer, targets, limit, "task.max_target_length", target=True)
        return super().examples(tokenizer, max_length, training=training)

    def collator(self, tokenizer: Any, *, training: bool = True) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a function that pads on the right: sources, and in training labels, with -100. The model shifts these."""
        from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

        padding = generating.padding_on("right", tokenizer)
        return DataCollatorForSeq2Seq(padding) if training else DataCollatorWithPadding(padding)

    def predict(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor | None, Tensor]:
        """Write a text for each row of a batch: its tokens, the decoder's start token first."""
        asked = {"length_penalty": self.length_penalty, "no_repeat_ngram_size": self.no_repeat_ngram_size}
        return None, generating.generate(
            model,
            batch,
            max_new_tokens=self.max_new_tokens or self.max_target_length,
            num_beams=self.num_beams,
            **{name: value for name, value in asked.items() if value is not None},
        )

    def answers(self, outputs: Any, examples: datasets.Dataset, tokenizer: Any) -> list[str]:
        """Read what the model wrote as texts."""
        return generating.read(outputs, tokenizer)

    def references(self) -> list[list[str]]:
        """Return each validation row's references."""
        return [several(texts, row) for row, texts in enumerate(self.validation[self.target])]

    def perfect(self) -> list[str]:
        """Return each validation row's first reference."""
        return self._targets(self.validation)

    def score(self, predictions: Sequence[str], references: Texts) -> dict[str, float]:
        """Score texts by the metric. Raises LrkitError unless there is one per row."""
        return METRICS[self.metric].score(predictions, references)

    @property
    def primary(self) -> str:
        """Return the name of the primary score, without scoring all rows for it."""
        return METRICS[self.metric].primary

    @property
    def majority(self) -> float | None:
        """Compute the primary score of the best trivial texts.

        For ROUGE and BLEU these are the first sentences of each source, `lead` of them: a hard floor where news are
        summarized. For exact match it is the text that most rows have.
        """
        true = self.references()
        if self.metric == "exact_match":
            common = Counter(text for texts in true for text in set(texts)).most_common(1)[0][0]
            trivial = [common] * len(true)
        else:
            trivial = [first_sentences(text, self.lead) for text in self.validation[self.source]]
        return next(iter(self.score(trivial, true).values()))

    def samples(self, model: nn.Module, tokenizer: Any, max_length: int, count: int) -> Sequence[Sample]:
        """Let a model write the texts of the first so many validation rows."""
        import torch

        rows = self.validation[:count]
        encoded = self.encode(rows, tokenizer, max_length, training=False)
        keys = ("input_ids", "attention_mask")
        examples = [dict(zip(keys, row, strict=True)) for row in zip(*(encoded[key] for key in keys), strict=True)]
        device = next(model.parameters()).device
        batch = {key: value.to(device) for key, value in self.collator(tokenizer, training=False)(examples).items()}
        with torch.no_grad():
            written = generating.read(self.predict(model, batch)[1].cpu(), tokenizer)
        return [Sample(*each) for each in zip(self._sources(rows), self._targets(rows), written, strict=True)]
