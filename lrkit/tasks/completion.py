"""Prompts that a causal language model goes on from, and conversations: what most models are fine-tuned on."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.errors import LrkitError, LrkitWarning
from lrkit.settings import flag, one_of
from lrkit.tasks import generating, likelihood, packing, text_to_text, turns
from lrkit.tasks.answers import check_rows
from lrkit.tasks.causal import Causal
from lrkit.tasks.generated import final_number, last_number_match
from lrkit.tasks.generating import IGNORED
from lrkit.tasks.learnt import Sample
from lrkit.tasks.text_to_text import Metric

if TYPE_CHECKING:
    import datasets
    from torch import Tensor, nn

PERPLEXITY = "perplexity"

METRICS: Mapping[str, Metric] = {
    "final_number": Metric(last_number_match, "em"),
    **text_to_text.METRICS,
}
"""Scores of texts that a model writes, by name."""


@attrs.frozen(kw_only=True, eq=False)
class Completion(Causal):
    """Prompts with completions, or conversations, split in two: a causal language model learns what it should write.

    The loss is of the completion alone, the end token included, or of all turns of the assistant's. A score is either of
    the completions that are there, their perplexity, or of texts that the model writes by itself.

    A row of more than the longest input is cut at its end. If nothing is left of it to be learnt, a training row is left
    out; rows that are scored never are. A prompt that a model is to go on from is cut at its beginning.

    Attributes:
        train, validation: the rows, each with the columns `prompt` and `completion`, texts or lists of messages, or with
            the column `messages`. A message is ``{"role": "user", "content": "..."}``.
        packing: in training put several rows into one block as long as the longest input. They do not see each other.
        metric: ``"perplexity"``; or, of what the model writes, ``"final_number"`` (as in GSM8K), ``"exact_match"``,
            ``"rouge"`` or ``"bleu"`` (both need ``lrkit[text]``).
        max_new_tokens: the most that it writes for a row.
        num_beams: beams of the search; 1 for greedy.

    Raises:
        LrkitError: a setting out of its range, columns that are not there, or a reference without a number.
    """

    packing: bool = attrs.field(default=False, validator=flag())
    metric: str = attrs.field(default=PERPLEXITY, validator=one_of((PERPLEXITY, *METRICS)))

    @property
    def columns(self) -> tuple[str, ...]:
        """Name the columns that both splits must have."""
        has = self.train.column_names
        return ("messages",) if "messages" in has and "prompt" not in has else ("prompt", "completion")

    @property
    def higher_is_better(self) -> bool:
        """Say whether the metric is not the perplexity."""
        return self.metric != PERPLEXITY

    @property
    def writes(self) -> int:
        """Return the most tokens that are written behind a prompt: none for a perplexity."""
        return 0 if self.metric == PERPLEXITY else self.max_new_tokens

    def check(self, where: str) -> None:
        """Check that references have a number, if it is scored."""
        if self.metric == "final_number" and {*self.columns} <= {*self.validation.column_names}:
            for row, text in enumerate(self.references()):
                if final_number(text) is None:
                    raise LrkitError(f"{where}: validation row {row} has no number in its completion: {text[-60:]!r}")

    def check_model(self, model: nn.Module) -> None:
        """Check that packed rows do not see each other in the model."""
        if self.packing:
            packing.check_packing(model)

    def _halves(self, rows: Mapping[str, Sequence[Any]]) -> tuple[list[Any], list[str]]:
        """Split rows into what a model goes on from, and what it should write."""
        if "messages" in self.columns:
            halves = [turns.prompt_of(row) for row in rows["messages"]]
            return [prompt for prompt, _ in halves], [said for _, said in halves]
        return list(rows["prompt"]), [turns.as_text(completion) for completion in rows["completion"]]

    def texts(self, rows: datasets.Dataset) -> list[str]:
        """List prompts and completions of some rows, or what is said in their messages."""
        return [turns.as_text(each) for column in self.columns for each in rows[column]]

    def encode(
        self, batch: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int, *, training: bool
    ) -> dict[str, Any]:
        """Encode some rows: with `labels`, -100 where nothing is learnt; or the prompts alone, if the model is to write.

        Two further columns count the rows of an example: ``cut``, those that were too long, and ``crossed``, those in which
        a token spans the end of the prompt.

        Raises:
            LrkitError: the tokenizer or its chat template cannot write them.
        """
        if not training and self.metric != PERPLEXITY:
            return self._prompts(batch, tokenizer, max_length)
        if "messages" in self.columns:
            rows = turns.conversations(batch["messages"], tokenizer)
        else:
            rows = turns.completions(batch["prompt"], batch["completion"], tokenizer)
        if not training:
            return _examples([[row] for row in rows], max_length)
        rows = [row for row in rows if any(row.learnt[1:max_length])]
        if not self.packing:
            return _examples([[row] for row in rows], max_length)
        together = packing.blocks([min(len(row.ids), max_length) for row in rows], max_length)
        return _examples([[rows[n] for n in block] for block in together], max_length, packed=True)

    def _prompts(self, batch: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int) -> dict[str, Any]:
        prompts = turns.prompts_of(self._halves(batch)[0], tokenizer)
        ids = [prompt[-max_length:] for prompt in prompts]
        return {
            "input_ids": ids,
            "attention_mask": [[1] * len(row) for row in ids],
            "cut": [int(len(prompt) > max_length) for prompt in prompts],
            "crossed": [0] * len(ids),
        }

    def examples(self, tokenizer: Any, max_length: int, *, training: bool) -> datasets.Dataset:
        """Encode all rows of a split, and say how many were cut or left out.

        Raises:
            LrkitError: the tokenizer cannot encode them, nothing is left to learn or to score, or the metric's package is
                not installed.
        """
        if self.metric != PERPLEXITY:
            METRICS[self.metric].needs()  # now, not after hours
        found = super().examples(tokenizer, max_length, training=training)
        split, rows = ("training", len(self.train)) if training else ("validation", len(self.validation))
        out, cut, crossed = rows - sum(found["rows"]) if training else 0, sum(found["cut"]), sum(found["crossed"])
        where = f'task "{self.name}": '
        if "labels" in found.column_names and not any(label != IGNORED for row in found["labels"] for label in row):
            raise LrkitError(f"{where}run.max_length = {max_length} leaves no token of a completion to be scored")
        if cut:
            _warn(
                f"{where}{cut:,} of {rows:,} {split} rows have more than run.max_length = {max_length} tokens: they are cut"
            )
        if out:
            nothing = f"have nothing to learn in run.max_length = {max_length} tokens"
            _warn(f"{where}{out:,} of {rows:,} {split} rows {nothing}: they are left out")
        if crossed:
            _warn(
                f"{where}in {crossed:,} of {rows:,} {split} rows a token spans the end of the prompt and the begin of the "
                "completion, and is learnt; when the model writes, it goes on from other tokens: end prompts without a "
                "blank, and begin completions with one"
            )
        return found

    def collator(self, tokenizer: Any, *, training: bool = True) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a function that pads examples on the right; prompts that a model goes on from on the left."""
        from transformers import DataCollatorWithPadding

        if training and self.packing:
            return packing.Blocks(tokenizer.pad_token_id)
        if not training and self.metric != PERPLEXITY:
            return DataCollatorWithPadding(generating.padding_on("left", tokenizer))
        return super().collator(tokenizer, training=training)

    def predict(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor | None, Tensor]:
        """Compute each row's negative log-likelihood and tokens [rows, 2], or write a text for it [rows, tokens]."""
        if self.metric == PERPLEXITY:
            found = likelihood.sums(likelihood.losses(model, batch), batch["labels"])
            return found[:, 0].sum() / found[:, 1].sum().clamp(min=1), found
        return None, self.write(model, batch)

    def answers(self, outputs: Any, examples: datasets.Dataset, tokenizer: Any) -> Any:
        """Return negative log-likelihood and tokens of each row's completion [rows, 2], or the texts that were written."""
        return outputs if self.metric == PERPLEXITY else generating.read(outputs, tokenizer)

    def references(self) -> list[str]:
        """Return the validation rows' completions, or the last turns of their assistants."""
        return [text.strip() for text in self._halves(self.validation)[1]]

    def perfect(self) -> Any:
        """Return the references, or, for the perplexity, that each completion is certain."""
        import numpy as np

        return np.array([[0.0, 1.0]] * len(self.validation)) if self.metric == PERPLEXITY else self.references()

    def score(self, predictions: Any, references: Sequence[str]) -> dict[str, float]:
        """Score what `answers` returns; the first key is the primary score.

        Raises:
            LrkitError: there is not one answer per row.
        """
        if self.metric == PERPLEXITY:
            check_rows(predictions, references)
            return likelihood.perplexity(predictions)
        return METRICS[self.metric].score(predictions, references)

    @property
    def primary(self) -> str:
        """Return the name of the primary score, without scoring all rows for it."""
        return PERPLEXITY if self.metric == PERPLEXITY else METRICS[self.metric].primary

    @property
    def majority(self) -> float | None:
        """Compute the primary score of the answer that most rows have, or number; None for perplexity, ROUGE and BLEU."""
        if self.metric not in ("final_number", "exact_match"):
            return None
        right = self.references()
        kinds = Counter(
            final_number(text) if self.metric == "final_number" else " ".join(text.split()) for text in right
        )
        return kinds.most_common(1)[0][1] / len(right)

    def samples(self, model: nn.Module, tokenizer: Any, max_length: int, count: int) -> Sequence[Sample]:
        """Let a model write what follows the prompts of the first so many validation rows."""
        prompts, right = self._halves(self.validation[:count])
        ids = self._prompts(self.validation[:count], tokenizer, max_length)["input_ids"]
        written = self.written(model, tokenizer, ids)
        shown = [turns.as_text(prompt) for prompt in prompts]
        return [Sample(*each) for each in zip(shown, [text.strip() for text in right], written, strict=True)]


def _examples(together: Sequence[Sequence[turns.Row]], most: int, *, packed: bool = False) -> dict[str, Any]:
    """Make the columns of examples, of one row each or of several, in which each row is cut at `most` tokens."""
    columns = [packing.joined([(row.ids[:most], _labels(row, most)) for row in rows]) for rows in together]
    examples: dict[str, Any] = {name: [each[name] for each in columns] for name in ("input_ids", "labels")}
    if packed:
        examples["position_ids"] = [each["position_ids"] for each in columns]
    else:
        examples["attention_mask"] = [[1] * len(ids) for ids in examples["input_ids"]]
    return examples | {
        "rows": [len(rows) for rows in together],
        "cut": [sum(len(row.ids) > most for row in rows) for rows in together],
        "crossed": [sum(row.crossed for row in rows) for rows in together],
    }


def _labels(row: turns.Row, most: int) -> list[int]:
    """Return labels: a row's first token has none, since it follows nothing, and in a block it would follow another row."""
    pairs = zip(row.ids[1:most], row.learnt[1:most], strict=True)
    return [IGNORED, *(token if learnt else IGNORED for token, learnt in pairs)][: len(row.ids)]


def _warn(text: str) -> None:
    warnings.warn(text, LrkitWarning, stacklevel=3)
