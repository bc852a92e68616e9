"""Bottleneck adapters after Houlsby and Pfeiffer, and BitFit, for lrkit. See README.md for what is known and what is not."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import lrkit
from lrkit.study.shipped import files_in
from lrkit_adapters.bitfit import BitFit
from lrkit_adapters.bottleneck import Bottleneck, BottleneckAfterNorm, Houlsby, Pfeiffer


def houlsby(
    *,
    width: int = 64,
    activation: str | None = None,
    layer_norms: bool = False,
    variant: Literal["paper", "released"] = "paper",
) -> lrkit.Method:
    """Houlsby adapters (arXiv 1902.00751): a bottleneck after attention's and after FFN's output, before the residual sum.

    Args:
        width: m, neurons of the bottleneck.
        activation: ``"gelu"``, ``"relu"``, ``"silu"`` or ``"tanh"``; None for the variant's.
        layer_norms: train the model's layer norms too, as the paper does.
        variant: ``"paper"``: directly after the linear map, with GELU. ``"released"``: AdaLoRA's repository: after the
            dropout that follows the map, with SiLU (swish).

    Raises:
        lrkit.LrkitError: no such variant or activation.
    """
    if variant not in ("paper", "released"):
        raise lrkit.LrkitError(f'houlsby variant must be "paper" or "released", not {variant!r}')
    released = variant == "released"
    return lrkit.Method(
        parameterization=Houlsby(
            width=width,
            activation=activation or ("silu" if released else "gelu"),
            layer_norms=layer_norms,
            after="dropout" if released else "linear",
        )
    )


def pfeiffer(
    *,
    width: int = 64,
    activation: str = "relu",
    layer_norms: bool = False,
    after: Literal["norm", "linear"] = "norm",
) -> lrkit.Method:
    """Pfeiffer adapters (arXiv 2005.00247): a bottleneck after FFN's layer norm, LN(A(LN(h + x)) + h + x).

    Args:
        width: m, neurons of the bottleneck.
        activation: ``"gelu"``, ``"relu"``, ``"silu"`` or ``"tanh"``.
        layer_norms: train the model's layer norms too.
        after: ``"norm"``, or where a block normalizes first (GPT-2, Llama) after the linear map; ``"linear"``: directly
            after FFN's last map in every model, LN(A(h) + h + x).
    """
    return lrkit.Method(
        parameterization=Pfeiffer(width=width, activation=activation, layer_norms=layer_norms, after=after)
    )


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


@lrkit.hookimpl
def lrkit_studies() -> Mapping[str, Any]:
    """Tables of papers that need these methods."""
    return files_in(__name__)


__all__ = ["BitFit", "Bottleneck", "BottleneckAfterNorm", "Houlsby", "Pfeiffer", "bitfit", "houlsby", "pfeiffer"]
