"""Texts with labels, read by a causal language model: the likeliest of a few words after a prompt is the label."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs

from lrkit.errors import LrkitError
from lrkit.settings import one_of
from lrkit.tasks import likelihood
from lrkit.tasks.asking import ask
from lrkit.tasks.base import Task
from lrkit.tasks.generating import IGNORED, padding_on
from lrkit.tasks.head import Head
from lrkit.tasks.labelled import Labelled
from lrkit.tasks.learnt import Sample

if TYPE_CHECKING:
    import datasets
    from torch import Tensor, nn


@attrs.frozen(kw_only=True, eq=False)
class Verbalized(Labelled):
    """Texts with labels, read by a causal language model without a new head.

    A row becomes a prompt, and each label a word after it. For example, with ``words=("negative", "positive")``:

        sentence: a gorgeous film
        label: positive

    Training is language modelling on the word's tokens alone. In a score, every row is one example per label; the answer
    is the word whose tokens are the likeliest after the prompt, by the sum of their log-probabilities, or by their mean.

    A prompt that is too long loses its beginning, and all words have the same prompt.

    Attributes:
        words: a word per label, in the labels' order, also as one text with commas; "labels" for the labels' names.
        template: the prompt, with the names of the rows' fields in braces; "" for each field in a line, "sentence: ...",
            and "label:" in the last. A blank stands between prompt and word, unless the template ends in white space.
        likelihood: "sum" of the log-probabilities of a word's tokens, or their "mean", which does not favour short words.

    Raises:
        LrkitError: a regression, a number of words that is not that of the labels, or a template that does not name the
            fields.
    """

    words: tuple[str, ...] | str = "labels"
    template: str = ""
    likelihood: Literal["sum", "mean"] = attrs.field(default="sum", validator=one_of(["sum", "mean"]))

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Name what a user may set."""
        return ("metric", "words", "template", "likelihood")

    def check(self, where: str) -> None:
        """Check that there is a word per label, and that the template names the fields."""
        super().check(where)
        if self.kind != "classification":
            raise LrkitError(f"{where}: words are for labels, and this is a regression")
        words = self.chosen
        if len(words) != len(self.labels) or not all(word.strip() for word in words):
            raise LrkitError(
                f"{where}: {len(self.labels)} words are needed, one for each of the labels {', '.join(self.labels)}, "
                f"not {', '.join(words) or 'none'}"
            )
        named = _fields_of(self.template, where) if self.template else [*self.fields]
        absent = [name for name in named if name not in self.fields]
        if absent or not named:
            raise LrkitError(
                f"{where}: the template must have fields of the rows in braces ({', '.join(self.fields)}), "
                f"not {', '.join(absent) or 'none'}"
            )

    @property
    def chosen(self) -> tuple[str, ...]:
        """Return the word of each label."""
        if self.words == "labels":
            return self.labels
        return tuple(word.strip() for word in self.words.split(",")) if isinstance(self.words, str) else self.words

    @property
    def prompt(self) -> str:
        """Return the template that is used."""
        return self.template or "".join(f"{field}: {{{field}}}\n" for field in self.fields) + "label:"

    @property
    def head(self) -> Head:
        """Describe the head of the task's model: the pretrained one of a causal language model."""
        return Head(auto_class="AutoModelForCausalLM")

    def encode(
        self, batch: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int, *, training: bool
    ) -> dict[str, Any]:
        """Encode some rows as prompts with a word: the right one for training, each one by turns for a score.

        The column ``labels`` has the word's tokens, and -100 at the prompt's.

        Raises:
            LrkitError: two words cannot be told apart by their tokens, or the longest input has no room for a prompt.
        """
        from lrkit.tasks.tokens import encoding

        words = self._tokens(tokenizer)
        filled = [
            self.prompt.format(**dict(zip(self.fields, texts, strict=True)))
            for texts in zip(*(batch[field] for field in self.fields), strict=True)
        ]
        start = _start(tokenizer)
        room = max_length - len(start) - max(map(len, words))
        if room < 1:
            raise LrkitError(f'task "{self.name}": {max_length} tokens have no room for a prompt and the longest word')
        examples: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        prompts = encoding(tokenizer, filled, add_special_tokens=False)["input_ids"]
        for tokens, label in zip(prompts, batch["label"], strict=True):
            begin = [*start, *tokens[-room:]]
            for word in [words[label]] if training else words:
                examples["input_ids"].append([*begin, *word])
                examples["attention_mask"].append([1] * (len(begin) + len(word)))
                examples["labels"].append([IGNORED] * len(begin) + word)
        return examples

    def _tokens(self, tokenizer: Any) -> list[list[int]]:
        """Encode each word as it stands after the prompt."""
        from lrkit.tasks.tokens import encoding

        tail = _tail(self.prompt)
        blank = "" if self.prompt[-1:].isspace() else " "
        before, *after = encoding(
            tokenizer, [tail, *(f"{tail}{blank}{word}" for word in self.chosen)], add_special_tokens=False
        )["input_ids"]
        found = [list(tokens[len(before) :]) for tokens in after]
        for word, tokens, whole in zip(self.chosen, found, after, strict=True):
            if not tokens or list(whole[: len(before)]) != list(before):
                raise LrkitError(
                    f'task "{self.name}": the word "{word}" has no tokens of its own after the template: end the '
                    "template in another character"
                )
        for n, one in enumerate(found):
            for m, other in enumerate(found):
                if n != m and other[: len(one)] == one:
                    raise LrkitError(
                        f'task "{self.name}": the tokens of the word "{self.chosen[m]}" begin with those of '
                        f'"{self.chosen[n]}", so that the model cannot tell them apart: choose other words'
                    )
        return found

    def examples(self, tokenizer: Any, max_length: int, *, training: bool) -> datasets.Dataset:
        """Encode all rows of a split as examples."""
        return Task.examples(self, tokenizer, max_length, training=training)

    def collator(self, tokenizer: Any, *, training: bool = True) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a function from examples to a batch, padded on the right."""
        from transformers import DataCollatorForTokenClassification

        return DataCollatorForTokenClassification(padding_on("right", tokenizer))

    def predict(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[None, Tensor]:
        """Compute the log-likelihood of each example's word [rows], in float32."""
        total, tokens = likelihood.sums(likelihood.losses(model, batch), batch["labels"]).unbind(1)
        return None, -total if self.likelihood == "sum" else -total / tokens

    def answers(self, outputs: Any, examples: datasets.Dataset, tokenizer: Any) -> Any:
        """Return the log-likelihoods of all labels' words for each validation row [rows, labels]."""
        return outputs.reshape(-1, len(self.labels))

    def samples(self, model: nn.Module, tokenizer: Any, max_length: int, count: int) -> Sequence[Sample]:
        """Show the prompts of the first so many validation rows, with the right word and the likeliest."""
        part = attrs.evolve(
            self, second=None, validation=self.validation.select(range(min(count, len(self.validation))))
        )
        said = ask(part, model, tokenizer, max_length).argmax(1)
        return [
            Sample(
                self.prompt.format(**{name: row[name] for name in self.fields}),
                self.chosen[row["label"]],
                self.chosen[n],
            )
            for row, n in zip(part.validation, said, strict=True)
        ]


def _fields_of(template: str, where: str) -> list[str]:
    """Name what stands in a template's braces, a conversion (!r) or a format (:>9) included."""
    try:
        return ["".join(filter(None, rest)) for _, *rest in string.Formatter().parse(template) if rest[0] is not None]
    except ValueError as error:  # a brace that is alone
        raise LrkitError(f'{where}: the template "{template}" cannot be read: {error}') from error


def _tail(template: str) -> str:
    """Return what stands in a template after its last field."""
    before, name, _, _ = list(string.Formatter().parse(template))[-1]
    return before if name is None else ""


def _start(tokenizer: Any) -> list[int]:
    """Return the token that begins every text, in a list; an empty one if a tokenizer has none."""
    from lrkit.tasks.tokens import encoding

    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and encoding(tokenizer, "")["input_ids"][:1] == [begin] else []
