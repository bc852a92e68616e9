"""Merging: the weights that can be added to, and quantized layers, whose places plain float layers take."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrkit.errors import LrkitError
from lrkit.layers import kind_of
from lrkit.layers.behaviour import is_exact
from lrkit.layers.dequantized import is_packed, whole_weight
from lrkit.precision import is_plain
from lrkit.shards import is_sharded


def merged(model: nn.Module, name: str, layer: nn.Module, adapter: Any = None) -> nn.Linear:
    """Return a plain layer with the dequantized weight and an adapter's ΔW. The layer and the adapter stay as they are.

    The sum is made in float32, and rounded once to the dtype in which the model computes.

    Args:
        model: the model.
        name: the layer's name.
        layer: the quantized layer.
        adapter: the adapter, which has a `merge`; None for the weight alone.

    Raises:
        LrkitError: the layer's weight cannot be dequantized.
    """
    try:
        weight = whole_weight(layer)
    except LrkitError as error:
        raise LrkitError(f"{name}: {error}") from None
    dtype = _dtype(model, layer, weight)
    bias = getattr(layer, "bias", None)
    with torch.device("meta"):
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    plain.weight = nn.Parameter(weight.to(torch.promote_types(weight.dtype, torch.float32)), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
    if adapter is not None:
        kind = adapter.kind
        adapter.base, adapter.kind = plain, kind_of(plain)
        try:
            adapter.merge()
        finally:
            adapter.base, adapter.kind = layer, kind
    return _with_hooks(plain.to(dtype), layer)


def dequantized(model: nn.Module) -> nn.Module:
    """Put plain float layers in the places of a model's quantized linear ones, and return the model."""
    plain = {m: merged(model, name, m) for name, m in model.named_modules() if is_packed(m)}
    for parent in list(model.modules()):
        parent._modules.update({n: plain[m] for n, m in parent._modules.items() if m in plain})
    if plain:
        forget(model)
    return model


def _dtype(model: nn.Module, layer: nn.Module, weight: Tensor) -> torch.dtype:
    """Return the dtype in which a model computes.

    It is the weight's own if that is a float (torchao, quanto). Otherwise most of the model's plain weights have it.
    """
    own: Any = getattr(layer, "weight", None)
    if own is not None and own.is_floating_point() and own.dtype.itemsize > 1:
        dtype: torch.dtype = own.dtype
        return dtype
    counts: dict[torch.dtype, int] = {}
    for module in model.modules():
        if not hasattr(module, "_lrkit_adapted"):
            for p in module._parameters.values():
                if p is not None and is_plain(p) and not p.requires_grad:
                    counts[p.dtype] = counts.get(p.dtype, 0) + p.numel()
    return max(counts, key=lambda each: counts[each]) if counts else weight.dtype


def _with_hooks(plain: nn.Linear, layer: nn.Module) -> nn.Linear:
    """Return a layer with the hooks of the one whose place it takes."""
    for name, hooks in vars(plain).items():
        if name.startswith(("_forward_", "_backward_")):
            hooks.update(getattr(layer, name))
    if hasattr(layer, "_hf_hook"):
        sys.modules["accelerate.hooks"].add_hook_to_module(plain, vars(layer)["_hf_hook"])
    return plain


def forget(model: nn.Module) -> list[str]:
    """Let transformers take a model as a float one if no layer is quantized any more.

    Returns:
        The names of layers that are still quantized, in which case the model's configuration stays as it is.
    """
    left = [name for name, module in model.named_modules() if is_packed(module)]
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not left:
        quantizer.remove_quantization_config(model)
        for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            model.__dict__.pop(name, None)
    return left


def check_weight(name: str, layer: nn.Module, owners: Mapping[int, int]) -> None:
    """Raise LrkitError if nothing can be added to a layer's weight.

    Args:
        name: the layer's name.
        layer: the layer. A slice's weight is its owner's.
        owners: how many modules have a parameter, by its ``id``.
    """
    part, layer = layer, getattr(layer, "owner", layer)
    weight = getattr(layer, "weight", None) if not layer._parameters else layer._parameters.get("weight")
    if weight is None and not (is_packed(layer) and getattr(layer, "weight", None) is None):
        raise LrkitError(
            f"{name}: the base weight is computed (a parametrization, weight norm): nothing can be added to it"
        )
    if weight is not None and is_sharded(weight):
        raise LrkitError(f"{name}: the base weight is sharded (DTensor): merge the unsharded model")
    if not is_plain(weight):
        floating = weight is not None and weight.is_floating_point() and weight.dtype.itemsize > 1
        kind: str | torch.dtype = type(layer).__name__ if weight is None else weight.dtype
        if not is_packed(layer):
            hint = f"{type(layer).__name__} is no linear layer, and only these are dequantized"
        elif part is not layer:
            hint = "load what was saved into original(dequantize=True), whose slices are float"
        else:
            hint = "merge(dequantize=True) puts a float nn.Linear in its place"
        raise LrkitError(
            f"{name}: the base weight is quantized ({type(weight).__name__ if floating else kind}), and nothing can be "
            f"added to it exactly: {hint}"
        )
    if isinstance(layer, nn.Linear) and not is_exact(layer, layer.in_features):
        raise LrkitError(
            f"{name}: {type(layer).__name__} does not compute with its weight as it is: what is added to the weight "
            "would not be what is added to the output"
        )
    if owners.get(id(weight), 1) > 1:
        raise LrkitError(f"{name}: the base weight is tied to another layer's, which must not change with it")
