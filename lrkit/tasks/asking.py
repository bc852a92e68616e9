"""Ask a model about a few validation rows of a task, beside a Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
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
    collate, columns = task.collator(tokenizer, training=False), taken_by(model, examples.column_names)
    device, found = next(model.parameters()).device, []
    for start in range(0, len(examples), _AT_ONCE):
        rows = examples.select(range(start, min(start + _AT_ONCE, len(examples)))).select_columns(columns)
        batch = collate(rows.to_list())
        with torch.no_grad():
            kept = task.predict(model, {key: value.to(device) for key, value in batch.items()})[1]
        found.append([each.cpu().numpy() for each in (kept if isinstance(kept, tuple) else (kept,))])
    outputs = [_below(list(parts)) for parts in zip(*found, strict=True)]
    return task.answers(outputs[0] if len(outputs) == 1 else tuple(outputs), examples, tokenizer)


def taken_by(model: nn.Module, columns: Iterable[str]) -> list[str]:
    """List those of some columns that a model takes, as a Trainer does: the others are for answers."""
    taken = {*inspect.signature(type(model).forward).parameters, "labels"}
    return [column for column in columns if column in taken]


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
