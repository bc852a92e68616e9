"""Several rows in one block of tokens, which do not see each other: no step is spent on padding.

Positions begin at 0 in each row of a block. From that, and from a batch without an attention mask, transformers' models
find out which tokens are of one row, and let each attend to its own row alone (``transformers.masking_utils``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.errors import LrkitError
from lrkit.foreign import line_of
from lrkit.tasks.generating import IGNORED

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def blocks(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Say which rows come into one block: the longest first, each into the first block that has room for it.

    For example: rows of 6, 3, 5 and 4 tokens in blocks of 10 are ``[[0, 3], [2, 1]]``.

    Args:
        lengths: tokens of each row, none of them more than `most`.
        most: tokens of a block.
    """
    found: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        place = next((n for n, left in enumerate(room) if left >= lengths[row]), len(found))
        if place == len(found):
            found.append([])
            room.append(most)
        found[place].append(row)
        room[place] -= lengths[row]
    return found


def joined(rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, list[int]]:
    """Join the rows of a block.

    Args:
        rows: token ids and labels of each. The first label of a row must be -100: the token before is another row's.
    """
    return {
        "input_ids": [token for ids, _ in rows for token in ids],
        "labels": [label for _, labels in rows for label in labels],
        "position_ids": [position for ids, _ in rows for position in range(len(ids))],
    }


@attrs.frozen
class Blocks:
    """Make a batch of blocks: each of the tokens that fill up a block to the longest is a row of its own, not learnt.

    Attributes:
        pad: the token that they are filled up with.
    """

    pad: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids`, `labels` and `position_ids` [blocks, tokens]."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        filling = {"input_ids": self.pad, "labels": IGNORED, "position_ids": 0}
        return {
            name: pad_sequence([torch.tensor(each[name]) for each in examples], batch_first=True, padding_value=value)
            for name, value in filling.items()
        }


def check_packing(model: Any) -> None:
    """Check that rows of one block do not see each other in a model, and are what they are alone.

    Raises:
        LrkitError: they do, so that the model cannot learn from packed rows.
    """
    import torch

    device, size = next(model.parameters()).device, model.get_input_embeddings().weight.shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one, two, other = (torch.randint(size, (1, length), device=device) for length in (5, 4, 5))
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = _outputs(model, two)
            packed = [_outputs(model, first, two)[:, first.shape[1] :] for first in (one, other)]
    except Exception as error:  # whatever a model makes of positions that it does not know
        raise _refused(model, line_of(error)) from error
    finally:
        model.train(was)
    # Whatever a model's own precision, its norms and positions are computed in float32.
    rounding = max(torch.finfo(alone.dtype).eps, torch.finfo(torch.float32).eps)
    scale = float(alone.abs().max())
    if not torch.allclose(packed[0], packed[1], rtol=0.0, atol=8 * rounding * scale):
        raise _refused(model, "its attention does not tell them apart")
    if not torch.allclose(packed[0], alone, rtol=0.0, atol=rounding**0.5 * scale):
        raise _refused(model, "its positions do not begin anew")


def _outputs(model: Any, *rows: torch.Tensor) -> torch.Tensor:
    import torch

    positions = torch.cat([torch.arange(row.shape[1], device=row.device) for row in rows])[None]
    # Two blocks alike, since some attention tells the rows of a single block apart, and no more.
    ids, positions = (each.repeat(2, 1) for each in (torch.cat(rows, 1), positions))
    logits: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return logits


def _refused(model: Any, why: str) -> LrkitError:
    return LrkitError(
        f"packing = true: in a {type(model).__name__} the rows of a block "
        f"would see each other ({why}): leave packing out"
    )
