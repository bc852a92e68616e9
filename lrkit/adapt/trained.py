"""The trained tensors of an adapted model: in the model's order, head apart, and in groups for an optimizer."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lrkit.adapt.graft import Graft
from lrkit.adapt.weights import Weights
from lrkit.errors import LrkitError, nearest, shown
from lrkit.method import Method


class Trained:
    """What a handle on an adapted model says of the tensors that train.

    Attributes:
        method: the method.
        adapters: layer name to the module in its place.
    """

    model: nn.Module
    method: Method
    adapters: Mapping[str, nn.Module]
    _graft: Graft
    _weights: Weights

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names and tensors of all that trains or was frozen on the way, head included, in the model's order."""
        self._graft.check()
        yield from self._weights.named()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all that trains or was frozen on the way, head included, for the optimizer (the same groups on resume)."""
        return (p for _, p in self.named_parameters())

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Return all that trains without the head."""
        self._graft.check()
        return self._weights.adapter()

    def head_parameters(self) -> list[nn.Parameter]:
        """Return the head's parameters."""
        self._graft.check()
        return self._weights.head()

    def added_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that were put into the model, whether they train or not."""
        self._graft.check()
        return [p for p in self.model.parameters() if id(p) in self._weights.added]

    def copies(self) -> list[Tensor]:
        """Return the old values that `detach` puts back: of a head that trains, or of all in `full`."""
        return [kept.copy for kept in self._graft.masters.kept]

    def parameter_groups(
        self,
        lr: float,
        ratios: Mapping[str, float] | None = None,
        *,
        head_lr: float | None = None,
        weight_decay: float | None = None,
    ) -> list[dict[str, Any]]:
        """Return `parameters` as groups for an optimizer, each part of the adapters with a learning rate of its own.

        For example ``AdamW(adapted.parameter_groups(2e-4, {"B": 16}))`` is LoRA+ (arXiv 2402.12354), which trains B with
        λ times A's rate. Tensors that are frozen, and layers of rank 0, are in their groups too, so that a resumed run has
        the same groups.

        Args:
            lr: the learning rate of parts that `ratios` does not name, and of the model's own parameters that train.
            ratios: part of the parameterization (``"A"``, ``"B"``, ``"core"``, ...) to the multiple of `lr` that it gets.
            head_lr: the head's learning rate; None for `lr`.
            weight_decay: of matrices; vectors (biases, norms, core values) then get 0. None for the optimizer's own for all.

        Returns:
            Groups with ``name`` (the part's, ``"head"`` or ``"other"``), ``params``, ``lr`` and, if given,
            ``weight_decay``: in a fixed order, and none without parameters.

        Raises:
            LrkitError: a rate or ratio that is no number from 0, or a part that has no tensor that trains.
        """
        self._graft.check()
        ratios = {} if ratios is None else dict(ratios)
        rates = {"lr": lr, "head_lr": head_lr, "weight_decay": weight_decay}
        rates |= {f"ratios: {name}": ratio for name, ratio in ratios.items()}
        for what, value in rates.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
            if not number and (value is not None or what not in ("head_lr", "weight_decay")):
                raise LrkitError(f"{what} must be a number from 0, not {shown(value)}")
        parts = [part.name for part in self.method.parameterization.parts]
        owner = {
            id(part.of(adapter)): part.name
            for part in self.method.parameterization.parts
            for adapter in self.adapters.values()
        } | {id(p): "head" for p in self._weights.head()}
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {
            (name, matrix): [] for name in (*parts, "other", "head") for matrix in (True, False)
        }
        for p in self._weights.parameters():
            groups[owner.get(id(p), "other"), weight_decay is None or p.ndim > 1].append(p)
        if head_lr is not None and not self._weights.head():
            raise LrkitError("head_lr: no head trains beside the adapters; leave it out, or name one with train_also")
        there = {name for (name, _), params in groups.items() if params and name in parts}
        if odd := [name for name in ratios if name not in there]:
            raise LrkitError(
                f"ratios: {shown(odd[0])} is no part that trains{nearest(str(odd[0]), there)}; "
                f"{type(self.method.parameterization).__name__} has {', '.join(n for n in parts if n in there) or 'none'}"
            )
        decays = {True: weight_decay, False: 0.0}
        return [
            {
                "name": name,
                "params": params,
                "lr": head_lr if name == "head" and head_lr is not None else lr * ratios.get(name, 1.0),
                **({} if weight_decay is None else {"weight_decay": decays[matrix]}),
            }
            for (name, matrix), params in groups.items()
            if params
        ]
