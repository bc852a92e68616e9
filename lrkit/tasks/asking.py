"""Ask a model about a few validation rows of a task, beside a Trainer."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from lrkit.tasks.base import Task
from lrkit.tasks.generating import IGNORED

if TYPE_CHECKING:
    from torch import nn

_AT_ONCE = 8


def ask(task: Task, model: nn.Module, tokenizer: Any, max_length: int) -> Any:
    """Return a model's answers to all validation rows of a task: its forward passes, in small batches.

    Args:
        task: with few rows.
        model: the adapted model, in evaluation.
        tokenizer: its tokenizer.
        max_length: as `lrkit.tasks.Task.encode` takes it.

    Returns:
        The answers, as `lrkit.tasks.Task.answers` has them.
    """
    import torch

    examples = task.examples(tokenizer, max_length, training=False)
    collate, taken = (
        task.collator(tokenizer, training=False),
        {*inspect.signature(type(model).forward).parameters, "labels"},
    )
    device, found = next(model.parameters()).device, []
    for start in range(0, len(examples), _AT_ONCE):
        rows = examples.select(range(start, min(start + _AT_ONCE, len(examples)))).to_list()
        batch = collate([{key: value for key, value in row.items() if key in taken} for row in rows])
        with torch.no_grad():
            kept = task.predict(model, {key: value.to(device) for key, value in batch.items()})[1]
        found.append([each.cpu().numpy() for each in (kept if isinstance(kept, tuple) else (kept,))])
    outputs = [_below(list(parts)) for parts in zip(*found, strict=True)]
    return task.answers(outputs[0] if len(outputs) == 1 else tuple(outputs), examples, tokenizer)


def _below(parts: list[Any]) -> Any:
    """Put arrays one below the other, filled up with -100 where they are of unlike lengths."""
    import numpy as np

    sizes = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    return np.concatenate(
        [
            np.pad(
                part,
                [(0, 0), *((0, to - has) for to, has in zip(sizes, part.shape[1:], strict=True))],
                constant_values=IGNORED,
            )
            for part in parts
        ]
    )
