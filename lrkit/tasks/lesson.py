"""The lesson of the task `teacher`: a frozen copy of the model with a known ΔW, and the student's distance from it."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lrkit.errors import LrkitError, listing
from lrkit.tasks.objective import Objective

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lrkit.adapt.summary import LayerSummary


def digest(of: str, seed: int, place: int) -> int:
    """Return 64 bits that depend on the purpose, the seed and the place alone."""
    return int.from_bytes(hashlib.sha256(f"teacher {of} {seed} {place}".encode()).digest()[:8], "big")


def delta(weight: Tensor, seed: int, place: int, rank: int, size: float) -> Tensor:
    """Draw the ΔW of a weight: of a rank, and of ``size`` times the weight's Frobenius norm.

    Args:
        weight: a matrix.
        seed: the run's.
        place: number of the layer among all linear layers of the blocks.
        rank: rank of ΔW.
        size: its norm over the weight's.

    Returns:
        A matrix in float64, of the weight's shape and on its device. It is drawn on the CPU by a generator of its own.
    """
    import numpy as np
    import torch

    draw = np.random.default_rng(digest("weight", seed, place))
    rows, columns = weight.shape
    product = draw.standard_normal((rows, rank)) @ draw.standard_normal((rank, columns))
    drawn = torch.from_numpy(product).to(weight.device)
    scaled: Tensor = drawn * (size * torch.linalg.norm(weight.double()) / torch.linalg.norm(drawn))
    return scaled


class Lesson(Objective):
    """The loss of one run: the student's distance from its teacher, relative to the base's.

    A row's error is the mean over its tokens, padding left out, and over the hidden size, of (student - teacher)². The loss
    is the mean error of the batch's rows over a constant, the base's mean error on up to 32 training rows, so that an
    untouched student begins near 1. Base and teacher are one frozen copy of the model, run batch by batch; nothing but
    the present batch's outputs is held.

    Args:
        model: the plain model, which is copied.
        deltas: layer name to the arguments of `delta` after the weight.
        batch: training rows that the constant is taken from.

    Raises:
        LrkitError: a layer is smaller than the rank, or ΔW changes nothing.
    """

    def __init__(
        self, model: nn.Module, deltas: Mapping[str, tuple[int, int, int, float]], batch: Mapping[str, Any]
    ) -> None:
        import torch

        self.truth = tuple(deltas)
        self._model = copy.deepcopy(model).to("cpu").eval().requires_grad_(False)
        self._pairs: list[tuple[nn.Module, tuple[nn.Parameter, nn.Parameter]]] = []
        for name, (seed, place, rank, size) in deltas.items():
            layer = self._model.get_submodule(name)
            plain: Any = layer.weight
            if rank > min(plain.shape):
                raise LrkitError(f"a ΔW of rank {rank} is more than {name} of {tuple(plain.shape)} can have")
            with torch.no_grad():
                changed = (plain.double() + delta(plain, seed, place, rank, size)).to(plain.dtype)
            self._pairs.append((layer, (plain, torch.nn.Parameter(changed, requires_grad=False))))
        with torch.no_grad():
            self._scale = float(self._errors(self._states(batch, taught=False), batch).mean())
        if not 0 < self._scale < math.inf:
            raise LrkitError(
                f"a ΔW in {listing(self.truth)} changes the hidden states by {self._scale}: nothing can be learnt"
            )

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch, and each row's error [rows, 2]: the student's and, without gradients, the base's."""
        import torch

        own = self._errors(model(**self.inputs(batch)).last_hidden_state, batch)
        loss = own.mean() / self._scale
        # Training asks for no predictions: the base is run for a score alone.
        base = own if torch.is_grad_enabled() else self._errors(self._states(batch, taught=False), batch)
        return loss, {"loss": loss, "errors": torch.stack([own, base], dim=1).detach()}

    def judge(self, layers: Sequence[LayerSummary]) -> dict[str, float]:
        """Compute ``recall`` if the run has chosen its ranks: see `recall_of`."""
        found = recall_of([(layer.name, layer.rank, layer.initial_rank) for layer in layers], self.truth)
        return {} if found is None else {"recall": found}

    def _states(self, batch: Mapping[str, Any], *, taught: bool) -> Tensor:
        """Compute the last hidden states [rows, tokens, size] of the teacher, or of the base."""
        device = next(iter(batch.values())).device
        if self._device != device:
            self._move(device)
        for layer, weights in self._pairs:
            layer.weight = weights[taught]
        states: Tensor = self._model(**self.inputs(batch)).last_hidden_state
        return states

    @property
    def _device(self) -> torch.device:
        return self._pairs[0][1][0].device

    def _move(self, device: torch.device) -> None:
        import torch

        self._model.to(device)
        self._pairs = [
            (layer, (_moved(torch, plain, device), _moved(torch, changed, device)))
            for layer, (plain, changed) in self._pairs
        ]

    def _errors(self, states: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Compute each row's error [rows] of some hidden states [rows, tokens, size], in float32."""
        import torch

        with torch.no_grad():
            wanted = self._states(batch, taught=True)
        mask = batch["attention_mask"].to(torch.float32)
        squares = (states.float() - wanted.float()).square().mean(dim=2)
        means: Tensor = (squares * mask).sum(dim=1) / mask.sum(dim=1)
        return means


def _moved(torch: Any, weight: Tensor, device: Any) -> Any:
    return torch.nn.Parameter(weight.detach().to(device), requires_grad=False)


Ranks = Sequence[tuple[str, int | None, int | None]]
"""Name, final rank and first rank of each adapted layer; None for an adapter without components."""


def could_give(layers: Ranks, truth: Sequence[str]) -> int:
    """Count the components that an allocation could have given to the right layers: see `recall_of`."""
    first = sum(first or 0 for name, _, first in layers if name in truth)
    return min(first, sum(last or 0 for _, last, _ in layers))


def recall_of(layers: Ranks, truth: Sequence[str]) -> float | None:
    """Compute the share of the rank that an allocation gives to the right layers, of what it could have given them.

    recall = Σ final rank of the right layers / min(Σ first rank of the right layers, Σ final rank of all layers). For
    example: AdaLoRA that goes from rank 8 to an average of 1 in 36 layers ends with 36 components; two right layers could
    have kept 16 of them, and recall is what they kept, over 16. An allocation that is blind to the layers keeps 2 on
    average, a recall of 0.125.

    Args:
        layers: name, final rank and first rank of each adapted layer.
        truth: names of the right layers.

    Returns:
        A share from 0 to 1, or None if nothing was chosen. That is so if there are no ranks, and if every layer ended with
        the rank that it had at first.
    """
    if all(last is None or last == first for _, last, first in layers):
        return None
    could = could_give(layers, truth)
    kept = sum(last or 0 for name, last, _ in layers if name in truth)
    return min(1.0, kept / could) if could else 0.0
