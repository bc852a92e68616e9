"""Full fine-tuning: every parameter of the model trains, and ΔW is not factored at all."""

from collections.abc import Iterable, Sequence
from typing import ClassVar

import attrs
from torch import nn

from lrkit.parameterizations.base import Parameterization, Target
from lrkit.units import Part


@attrs.frozen(kw_only=True)
class Full(Parameterization):
    """All parameters of the model train. No layer is replaced, and each adapted layer's weight is a matrix unit.

    Source: the baseline of every table, such as arXiv 2106.09685, Table 2. The targets say which weights an action may
    act on, so that freezing whole layers adaptively is
    ``attrs.evolve(lrkit.methods.full(), metric=..., scheduler=..., action=lrkit.actions.Freeze())``.
    """

    learning_rate: ClassVar[float] = 5e-5

    @property
    def parts(self) -> tuple[Part, ...]:
        """Declare the layer's own weight."""
        return (Part("weight", matrix=True),)

    def choose(self, targets: Sequence[Target]) -> Sequence[Target]:
        """Choose all but stacks of experts, whose weights are no matrices. They train with the rest."""
        return [target for target in targets if target.maps == 1]

    def build(self, target: Target) -> nn.Module:
        """Return the layer itself."""
        return target.layer

    def own_parameters(self, model: nn.Module) -> Iterable[str]:
        """Name all of them."""
        return (name for name, _ in model.named_parameters())
