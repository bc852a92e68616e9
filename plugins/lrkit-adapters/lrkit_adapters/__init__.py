"""Bottleneck adapters after Houlsby and Pfeiffer, and BitFit, for lrkit. See README.md for what is known and what is not."""

from collections.abc import Callable, Mapping

import lrkit
from lrkit_adapters.bitfit import BitFit
from lrkit_adapters.bottleneck import Bottleneck, Houlsby, Pfeiffer


def houlsby(*, width: int = 64, activation: str = "gelu", layer_norms: bool = False) -> lrkit.Method:
    """Houlsby adapters (arXiv 1902.00751): a bottleneck after attention's and after FFN's output, before the residual sum.

    Args:
        width: m, neurons of the bottleneck.
        activation: ``"gelu"``, ``"relu"``, ``"silu"`` or ``"tanh"``.
        layer_norms: train the model's layer norms too, as the paper does.
    """
    return lrkit.Method(parameterization=Houlsby(width=width, activation=activation, layer_norms=layer_norms))


def pfeiffer(*, width: int = 64, activation: str = "relu", layer_norms: bool = False) -> lrkit.Method:
    """Pfeiffer adapters (arXiv 2005.00247): a bottleneck after FFN's output alone, before the residual sum.

    Args:
        width: m, neurons of the bottleneck.
        activation: ``"gelu"``, ``"relu"``, ``"silu"`` or ``"tanh"``.
        layer_norms: train the model's layer norms too.
    """
    return lrkit.Method(parameterization=Pfeiffer(width=width, activation=activation, layer_norms=layer_norms))


def bitfit() -> lrkit.Method:
    """BitFit (Ben Zaken et al., arXiv 2106.10199): every bias of the model trains, and nothing else but the head."""
    return lrkit.Method(parameterization=BitFit())


@lrkit.hookimpl
def lrkit_parameterizations() -> Mapping[str, type[lrkit.Parameterization]]:
    """Houlsby's and Pfeiffer's bottlenecks, and BitFit."""
    return {"houlsby": Houlsby, "pfeiffer": Pfeiffer, "bitfit": BitFit}


@lrkit.hookimpl
def lrkit_methods() -> Mapping[str, Callable[..., lrkit.Method]]:
    """The same, as methods."""
    return {"houlsby": houlsby, "pfeiffer": pfeiffer, "bitfit": bitfit}


__all__ = ["BitFit", "Bottleneck", "Houlsby", "Pfeiffer", "bitfit", "houlsby", "pfeiffer"]
