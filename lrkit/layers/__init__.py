"""The kinds of layers that can be adapted."""

from collections.abc import Iterable, Mapping

from torch import nn

from lrkit.hookspecs import hookimpl
from lrkit.layers.around import Around
from lrkit.layers.base import LayerKind, Sizes
from lrkit.layers.convolution import Convolution
from lrkit.layers.embedding import Embedding
from lrkit.layers.experts import Experts
from lrkit.layers.linear import Linear, is_conv1d
from lrkit.layers.quantized import Quantized
from lrkit.layers.slices import Slice, Slices

__all__ = [
    "Around",
    "Convolution",
    "Embedding",
    "Experts",
    "LayerKind",
    "Linear",
    "Quantized",
    "Sizes",
    "Slice",
    "Slices",
    "is_conv1d",
    "kind_of",
    "lrkit_layers",
]

BUILT_IN: tuple[LayerKind, ...] = (Linear(), Embedding(), Convolution(), Slices(), Experts(), Quantized())


@hookimpl
def lrkit_layers() -> Mapping[str, type[LayerKind]]:
    """Offer the built-in kinds of layers."""
    own: dict[str, type[LayerKind]] = {"linear": Linear, "embedding": Embedding, "convolution": Convolution}
    return {**own, "slice": Slices, "experts": Experts, "quantized": Quantized}


def kind_of(layer: nn.Module, kinds: Iterable[LayerKind] = BUILT_IN) -> LayerKind | None:
    """Return the first kind that knows a layer; None if none does."""
    return next((kind for kind in kinds if kind.sizes(layer) is not None), None)
