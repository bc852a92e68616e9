"""Say how many of a task's texts are longer than what a run takes of them: what is cut is neither learnt nor read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from lrkit.errors import LrkitWarning
from lrkit.tasks.tokens import encoding


def tell(
    task: str, what: str, tokenizer: Any, texts: Sequence[str], limit: int, setting: str, *, target: bool = False
) -> None:
    """Warn in one line if some texts are longer than a limit.

    For example: ``task "xsum": 131 of 500 source texts that were looked at are longer than run.max_length = 512 tokens, and
    are cut (the longest has 2,310)``.

    Args:
        task: the task's name.
        what: what the texts are.
        tokenizer: a transformers tokenizer.
        texts: the texts, in full. Those of `lrkit.tasks.tokens.some` rows are enough.
        limit: tokens that are kept of a text, special tokens included.
        setting: the setting that has the limit.
        target: encode them as targets, which some tokenizers have another vocabulary for.

    Raises:
        LrkitError: the tokenizer cannot encode them.
    """
    given = {"text_target": list(texts)} if target else {"text": list(texts)}
    # `verbose`: no word of transformers' own on texts that are longer than the model's positions
    tokens = [len(ids) for ids in encoding(tokenizer, **given, truncation=False, verbose=False)["input_ids"]]
    tell_lengths(task, what, tokens, limit, setting)


def tell_lengths(task: str, what: str, tokens: Sequence[int], limit: int, setting: str) -> None:
    """Warn in one line if some texts, of which the lengths in tokens are known, are longer than a limit: see `tell`."""
    longer = sum(length > limit for length in tokens)
    if longer:
        warnings.warn(
            f'task "{task}": {longer:,} of {len(tokens):,} {what} texts that were looked at are longer than {setting} = '
            f"{limit:,} tokens, and are cut (the longest has {max(tokens):,})",
            LrkitWarning,
            stacklevel=3,
        )
