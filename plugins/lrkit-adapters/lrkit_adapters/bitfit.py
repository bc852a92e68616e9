"""BitFit: the biases alone train (Ben Zaken et al., arXiv 2106.10199)."""

from collections.abc import Iterable, Sequence
from typing import ClassVar

import attrs
from torch import nn

import lrkit
from lrkit.parameterizations import Target


@attrs.frozen(kw_only=True)
class BitFit(lrkit.Parameterization):
    """Every parameter called ``bias`` trains, those of layer norms and of the head too. Source: arXiv 2106.10199, section 3.

    A bias by another name stays frozen: ``q_bias`` of DeBERTa, ``in_proj_bias`` of
    ``nn.MultiheadAttention``. Nothing is put into the model. Each adapted layer's bias is a unit that freezing acts on.
    """

    learning_rate: ClassVar[float] = 1e-3

    @property
    def parts(self) -> tuple[lrkit.Part, ...]:
        """Declare the layer's own bias."""
        return (lrkit.Part("bias", matrix=True),)

    def choose(self, targets: Sequence[Target]) -> Sequence[Target]:
        """Choose the layers that have a bias."""
        return [target for target in targets if target.maps == 1 and getattr(target.layer, "bias", None) is not None]

    def build(self, target: Target) -> nn.Module:
        """Return the layer itself."""
        if getattr(target.layer, "bias", None) is None:  # an embedding has none by any name
            raise lrkit.LrkitError(f"BitFit trains biases, and {target.name} has none: leave it out of targets")
        return target.layer

    def own_parameters(self, model: nn.Module) -> Iterable[str]:
        """Name every parameter called bias; those of the head are the head's."""
        return [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"]
