"""Plain text that a causal language model goes on learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.settings import flag
from lrkit.tasks import likelihood, turns
from lrkit.tasks.answers import check_rows
from lrkit.tasks.causal import Causal
from lrkit.tasks.generating import IGNORED
from lrkit.tasks.learnt import Sample

if TYPE_CHECKING:
    import datasets
    from torch import Tensor, nn


@attrs.frozen(kw_only=True, eq=False)
class LanguageModelling(Causal):
    """Texts, split in two, of which a causal language model learns every token: scored by perplexity.

    The tokens of all texts are joined, and cut into blocks as long as the longest input, in training as in validation. A
    text that begins within a block is read after the text before it. The last block of each thousand texts is shorter.

    Attributes:
        train, validation: the rows, each with the column `text`.
        end: put the end token after each text; if not, texts that are lines of one document go on in each other.
        max_new_tokens, num_beams: how a model goes on from the first half of a text in a sample.

    Raises:
        LrkitError: a setting out of its range, or no column `text`.
    """

    end: bool = attrs.field(default=True, validator=flag())

    @property
    def columns(self) -> tuple[str, ...]:
        """Name the column that both splits must have."""
        return ("text",)

    @property
    def higher_is_better(self) -> bool:
        """Say that a smaller perplexity is better."""
        return False

    def texts(self, rows: datasets.Dataset) -> list[str]:
        """List the texts of some rows."""
        return list(rows["text"])

    def encode(
        self, batch: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int, *, training: bool
    ) -> dict[str, Any]:
        """Encode some texts as blocks, in which all tokens but the first are labelled.

        Raises:
            LrkitError: the tokenizer cannot encode them.
        """
        ids = [token for tokens in self._tokens(batch["text"], tokenizer) for token in tokens]
        blocks = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
        if training:
            blocks = [block for block in blocks if len(block) > 1]
        return {
            "input_ids": blocks,
            "attention_mask": [[1] * len(block) for block in blocks],
            "labels": [[IGNORED, *block[1:]] for block in blocks],
        }

    def _tokens(self, texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
        after = [turns.end_of(tokenizer)] if self.end else []
        return [[*ids, *after] for ids in turns.ids_of(texts, tokenizer, special=True)]

    def predict(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Compute the negative log-likelihood of each token [blocks, tokens], 0 for those without a label."""
        found = likelihood.losses(model, batch)
        return found.sum() / (batch["labels"] != IGNORED).sum().clamp(min=1), found

    def answers(self, outputs: Any, examples: datasets.Dataset, tokenizer: Any) -> Any:
        """Return negative log-likelihood and tokens of each row [rows, 2]: blocks have the tokens of all rows in turn."""
        import numpy as np

        labels = [np.asarray(block) for block in examples["labels"]]
        found = np.concatenate([block[: len(here)] for block, here in zip(outputs, labels, strict=True)])
        counted = np.concatenate(labels) != IGNORED
        lengths = [len(ids) for ids in self._tokens(self.validation["text"], tokenizer)]
        rows = np.repeat(np.arange(len(lengths)), lengths)
        return np.stack([np.bincount(rows, each, len(lengths)) for each in (found, counted)], axis=1)

    def references(self) -> list[str]:
        """Return the texts."""
        return self.texts(self.validation)

    def perfect(self) -> Any:
        """Return that each text is certain."""
        import numpy as np

        return np.array([[0.0, 1.0]] * len(self.validation))

    def score(self, predictions: Any, references: Sequence[str]) -> dict[str, float]:
        """Compute the perplexity of what `answers` returns. Raises LrkitError unless there is one row per text."""
        check_rows(predictions, references)
        return likelihood.perplexity(predictions)

    def samples(self, model: nn.Module, tokenizer: Any, max_length: int, count: int) -> Sequence[Sample]:
        """Let a model go on from the first half of the first so many validation texts."""
        texts = [ids for ids in turns.ids_of(self.validation["text"][:count], tokenizer, special=True) if len(ids) > 1]
        halves = [(ids[: len(ids) // 2], ids[len(ids) // 2 :]) for ids in texts]
        if not halves:
            return ()
        written = self.written(model, tokenizer, [begin[-max_length:] for begin, _ in halves])
        begins, ends = (
            [text.strip() for text in tokenizer.batch_decode(part, skip_special_tokens=True)]
            for part in zip(*halves, strict=True)
        )
        return [Sample(*each) for each in zip(begins, ends, written, strict=True)]
