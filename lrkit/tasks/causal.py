"""What all tasks of causal language models have: a decoder, examples that are no rows, and texts that it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.errors import LrkitError
from lrkit.settings import whole
from lrkit.tasks import generating
from lrkit.tasks.base import Task
from lrkit.tasks.generating import IGNORED

if TYPE_CHECKING:
    from torch import Tensor, nn


@attrs.frozen(kw_only=True, eq=False)
class Causal(Task):
    """A task of a causal language model.

    Attributes:
        max_new_tokens: the most that a model writes for a row.
        num_beams: beams of the search; 1 for greedy.
    """

    max_new_tokens: int = attrs.field(default=128, validator=whole(1))
    num_beams: int = attrs.field(default=1, validator=whole(1))

    @property
    def auto_class(self) -> str:
        """Name the Auto class of a decoder."""
        return "AutoModelForCausalLM"

    @property
    def by_row(self) -> bool:
        """Say that it takes the tokenizer to count examples: rows may be left out, and blocks are of several."""
        return False

    def collator(self, tokenizer: Any, *, training: bool = True) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a function that pads examples on the right, and their labels with -100."""
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(generating.padding_on("right", tokenizer), label_pad_token_id=IGNORED)

    def write(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Let a model go on from prompts, which are padded on the left, as far as it has positions.

        Returns:
            The new tokens alone [rows, tokens].

        Raises:
            LrkitError: the prompts leave no position to write at.
        """
        plain: Any = getattr(model, "module", model)
        positions = getattr(plain.config.get_text_config(), "max_position_embeddings", None)
        room = self.max_new_tokens if positions is None else positions - batch["input_ids"].shape[1]
        if room < 1:
            raise LrkitError(f"a prompt fills all {positions} positions of the model: lower run.max_length")
        most = min(room, self.max_new_tokens)
        return generating.generate(model, batch, max_new_tokens=most, num_beams=self.num_beams)

    def written(self, model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Let a model go on from prompts, and read what it writes; for a few of them."""
        import torch
        from transformers import DataCollatorWithPadding

        collate = DataCollatorWithPadding(generating.padding_on("left", tokenizer))
        batch = collate([{"input_ids": list(ids), "attention_mask": [1] * len(ids)} for ids in prompts])
        device = next(model.parameters()).device
        with torch.no_grad():
            new = self.write(model, {key: value.to(device) for key, value in batch.items()})
        return generating.read(new.cpu(), tokenizer)
