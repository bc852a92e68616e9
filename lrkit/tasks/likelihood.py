"""How likely a causal language model finds texts: the loss of each token, and the perplexity of all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lrkit.tasks.generating import IGNORED

if TYPE_CHECKING:
    from torch import Tensor, nn

AT_ONCE = 2**27
"""Logits that are held at a time, if a row does not have more: half a GiB in float32."""


def losses(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Compute the negative log-likelihood of each token that has a label, in float32 and in nats.

    A few rows go through the model at a time, so that their logits need no more memory than `AT_ONCE` numbers.

    Args:
        model: a causal language model, or what a Trainer has wrapped it in. No gradient is kept.
        batch: `input_ids`, `attention_mask` and `labels` [rows, tokens], padded on the right.

    Returns:
        [rows, tokens], 0 where a token has no label. The first token of a row has none, since it follows nothing.
    """
    import torch

    labels = batch["labels"]
    plain: Any = getattr(model, "module", model)
    size = plain.config.get_text_config().vocab_size
    rows = max(1, AT_ONCE // max(1, size * labels.shape[1]))
    found = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    with torch.no_grad():
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            logits = model(
                input_ids=batch["input_ids"][part], attention_mask=batch["attention_mask"][part], use_cache=False
            )["logits"]
            here = labels[part, 1:] != IGNORED
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1][here].float(), labels[part, 1:][here], reduction="none"
            )
            found[part, 1:][here] = loss
    return found


def sums(losses: Tensor, labels: Tensor) -> Tensor:
    """Add up the losses of each row, and count its tokens [rows, 2]."""
    import torch

    counts = (labels[:, 1:] != IGNORED).sum(1)
    return torch.stack([losses.sum(1), counts.to(losses.dtype)], 1)


def perplexity(predictions: Any) -> dict[str, float]:
    """Compute exp of the mean negative log-likelihood per token, over all tokens of all rows: smaller is better.

    Args:
        predictions: summed negative log-likelihood and tokens of each row [rows, 2].

    Returns:
        nan if a number is not finite, and inf if the perplexity is beyond every float.
    """
    import numpy as np

    total, tokens = np.asarray(predictions, np.float64).sum(0).tolist()
    if not (math.isfinite(total) and tokens):
        return {"perplexity": math.nan}
    mean = total / tokens
    return {"perplexity": math.exp(mean) if mean < math.log(1.7e308) else math.inf}
