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
    "beneath",
    "is_conv1d",
    "kind_of",
    "lrkit_layers",
]

_BY_NAME: Mapping[str, type[LayerKind]] = {
    "linear": Linear,
    "embedding": Embedding,
    "convolution": Convolution,
    "slice": Slices,
    "experts": Experts,
    "quantized": Quantized,
}
BUILT_IN: tuple[LayerKind, ...] = tuple(kind() for kind in _BY_NAME.values())


@hookimpl
def lrkit_layers() -> Mapping[str, type[LayerKind]]:
    """Offer the built-in kinds of layers."""
    return _BY_NAME


def kind_of(layer: nn.Module, kinds: Iterable[LayerKind] = BUILT_IN) -> LayerKind | None:
    """Return the first kind that knows a layer; None if none does."""
    return next((kind for kind in kinds if kind.sizes(layer) is not None), None)


def beneath(module: nn.Module) -> tuple[nn.Module, LayerKind | None]:
    """Return the layer whose place a module takes, and its kind: the module itself if it is one, as in full fine-tuning."""
    kind, base = getattr(module, "kind", None), getattr(module, "base", None)
    if isinstance(kind, LayerKind) and isinstance(base, nn.Module):
        return base, kind
    return module, kind_of(module)
