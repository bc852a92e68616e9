"""Batches of a run: rows of like length in each, which pads less (``run.group_by_length``), and how many tokens one has."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from lrkit.tasks.generating import IGNORED

_POOL = 50
"""Batches whose rows are sorted together: as transformers' ``group_by_length`` has it."""


class ByLength(Sampler[int]):
    """The rows of an epoch in an order of which each batch holds rows of like length, and batches come in random order.

    All rows are drawn once per epoch. The order follows from seed and epoch alone, so that a resumed run has it again.

    Args:
        lengths: tokens of each row.
        batch_size: rows per batch.
        seed: the run's.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._size, self._seed, self._epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch, from 0; the Trainer calls it."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order, size, batches = torch.randperm(len(self), generator=generator).tolist(), self._size, []
        for begin in range(0, len(order), size * _POOL):
            pool = sorted(order[begin : begin + size * _POOL], key=self._lengths.__getitem__)
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        last = [batches.pop()] if len(order) % size else []  # the one that is not full stays last
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        for batch in [*(batches[i] for i in shuffled), *last]:
            yield from batch


def tokens_in(batch: Mapping[str, Any], model: Any) -> torch.Tensor | int:
    """Count the tokens of a training batch without padding; of an encoder-decoder those of the targets, too."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    found: torch.Tensor
    if mask is not None and mask.ndim == 2:
        found = mask.sum()
    elif positions is not None:  # packed: each text begins at 0, and what fills a block up is at 0
        found = (positions > 0).sum() + (positions == 1).sum()
    else:
        found = (batch.get("input_ids", torch.empty(0)) >= 0).sum()
    if model.config.is_encoder_decoder and "labels" in batch:
        found = found + (batch["labels"] != IGNORED).sum()
    return found
