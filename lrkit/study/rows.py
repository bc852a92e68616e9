"""Encode the rows of a run as model inputs: all at once, or each when a batch asks for it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lrkit.tasks.asking import taken_by
from lrkit.tasks.tokens import check_texts

if TYPE_CHECKING:
    from lrkit.study.pretrained import Pretrained
    from lrkit.tasks import Task

_SAMPLE = 1000


class Lazily(torch.utils.data.Dataset[dict[str, Any]]):
    """Training rows that are encoded when they are asked for: in a run shorter than an epoch most never are.

    Args:
        task: with the rows.
        tokenizer: the model's.
        max_length: tokens per row; a longer row is cut.
    """

    def __init__(self, task: "Task", tokenizer: Any, max_length: int) -> None:
        self._task, self._tokenizer, self._length = task, tokenizer, max_length

    def __len__(self) -> int:
        """Count the rows."""
        return len(self._task.train)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Encode one row."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Encode the rows of a batch."""
        encoded = self._task.encode(self._task.train[list(indices)], self._tokenizer, self._length, training=True)
        return [{key: column[i] for key, column in encoded.items()} for i in range(len(indices))]


def encoded(
    task: "Task", pretrained: "Pretrained", max_length: int, wanted: int
) -> tuple[Any, Any, dict[str, Any], list[int]]:
    """Encode the rows of a run.

    Args:
        task: with the rows.
        pretrained: model and tokenizer.
        max_length: tokens per row; a longer row is cut.
        wanted: training rows that the run takes, repeated ones included.

    Returns:
        Training rows and validation rows; the training row of median length as a batch of one; and the lengths of the
        training rows. If fewer rows are wanted than there are, the median is that of up to 1,000 rows spread evenly, and the
        lengths are not known: none are returned.

    Raises:
        LrkitError: the tokenizer does not know the text, or cannot encode it, or the model cannot learn the task.
    """
    tokenizer = pretrained.tokenizer
    collate = task.collator(tokenizer, training=True)
    check_texts(task, tokenizer, pretrained.model)
    task.check_model(pretrained.model)
    positions = getattr(pretrained.model.config, "max_position_embeddings", None) or max_length
    # A longer row than the model has positions for must be found before the first step: then all are looked at.
    if not task.by_row or wanted >= len(task.train) or max_length > min(positions, tokenizer.model_max_length):
        train, validation = task.tokenize(tokenizer, max_length)
        lengths = _lengths(train, pretrained)
        return train, validation, _batch(collate, pretrained, train[_middle(lengths)]), lengths
    rows = Lazily(task, tokenizer, max_length)
    some = list(range(0, len(rows), max(1, len(rows) // _SAMPLE)))
    looked_at = rows.__getitems__(some)
    middle = _middle(_lengths({key: [row[key] for row in looked_at] for key in looked_at[0]}, pretrained))
    return (
        rows,
        task.examples(tokenizer, max_length, training=False),
        _batch(collate, pretrained, looked_at[middle]),
        [],
    )


def _batch(collate: Any, pretrained: "Pretrained", example: dict[str, Any]) -> dict[str, Any]:
    """Make a batch of one example, of the columns that the model takes."""
    return dict(collate([{key: example[key] for key in taken_by(pretrained.model, example)}]))


def _lengths(columns: Any, pretrained: "Pretrained") -> list[int]:
    """Return the tokens of each example; of an encoder-decoder its target's, too."""
    lengths = [len(ids) for ids in columns["input_ids"]]
    if pretrained.model.config.is_encoder_decoder:
        lengths = [a + len(b) for a, b in zip(lengths, columns["labels"], strict=True)]
    return lengths


def _middle(lengths: list[int]) -> int:
    return sorted(range(len(lengths)), key=lengths.__getitem__)[len(lengths) // 2]
