"""The whole float weight of a quantized layer, by what the layer offers. No package of quantization is imported.

Each way belongs to packages, and knows a layer by attributes. A layer that no way knows answers the rows of the identity,
so that a package not named here works too.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lrkit.errors import LrkitError
from lrkit.layers.probe import answer, held, own, rows
from lrkit.precision import is_plain

_FAR = 0.1
_ROWS = 1024


def is_quantized(layer: nn.Module) -> bool:
    """Return whether a layer stores its weight in another form than a float tensor. A sharded weight counts as one."""
    weight = getattr(layer, "weight", None)
    if weight is None:
        return features(layer) is not None and held(layer) is not None
    return not is_plain(weight)


def is_packed(layer: nn.Module) -> bool:
    """Return whether a layer is a quantized linear map, of ``nn.Linear`` or not, and no part of another."""
    return features(layer) is not None and is_quantized(layer) and any(each is held(layer) for each in own(layer))


def features(layer: nn.Module) -> tuple[int, int] | None:
    """Return (d_in, d_out) as a layer names them; None if it does not, or has layers inside."""
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        d_in, d_out = (getattr(layer, name, None) for name in names)
        if isinstance(d_in, int) and isinstance(d_out, int) and not layer._modules:
            return d_in, d_out
    return None


@torch.no_grad()
def whole_weight(layer: nn.Module) -> Tensor:
    """Return the weight of a quantized layer as a float tensor [d_out, d_in], which the caller may change.

    Two rows then go through the layer: its answer must be that of the weight up to a tenth of its norm, far more than
    quantized inputs cost and far less than a weight that was unpacked in a wrong order.

    Raises:
        LrkitError: the weight cannot be found, or is not what the layer computes with.
    """
    weight = next((found for way in WAYS if (found := way(layer)) is not None), None)
    sizes = features(layer)
    kind = type(layer).__name__
    if weight is None or sizes is None or weight.shape != sizes[::-1]:
        raise LrkitError(f"the weight of a {kind} cannot be dequantized")
    got = None if weight.device.type == "meta" else answer(layer, rows(sizes[0]))
    if got is not None and isinstance(got[1], Tensor):
        y, wanted = got[1].float(), got[0].float() @ weight.float().t()
        bias = getattr(layer, "bias", None)
        wanted = wanted if bias is None else wanted + bias.float()
        if not float((y - wanted).norm()) <= _FAR * float(wanted.norm()):
            raise LrkitError(f"the weight of a {kind} cannot be dequantized: its output is not that of what it stores")
    return weight


def _four_bits(layer: nn.Module) -> Tensor | None:
    """Dequantize bitsandbytes' 4 bits (``Params4bit``), by its own function: blocks may be quantized twice."""
    state: Any = getattr(getattr(layer, "weight", None), "quant_state", None)
    package = sys.modules.get("bitsandbytes")
    if state is None or package is None:
        return None
    if getattr(state, "packing_format_for_cpu", False):
        return None  # evaluation on some CPUs has packed it anew, with bfloat16 scales: the layer's answers tell
    held_weight: Any = layer.weight
    whole: Tensor = package.functional.dequantize_4bit(held_weight.data, held_weight.quant_state)
    return whole


def _eight_bits(layer: nn.Module) -> Tensor | None:
    """Dequantize bitsandbytes' 8 bits (``Int8Params``): a row's absolute maximum (SCB) is 127.

    The scales are the weight's before the first call, and the layer's state's after it.
    """
    weight, state = getattr(layer, "weight", None), getattr(layer, "state", None)
    scales = next((s for each in (weight, state) if (s := getattr(each, "SCB", None)) is not None), None)
    if scales is None or not isinstance(weight, Tensor) or weight.dtype != torch.int8:
        return None
    whole: Tensor = weight.data.float() * scales.float().view(-1, 1) / 127
    return whole


def _by_weight(layer: nn.Module) -> Tensor | None:
    """Ask the weight, if its class has a ``dequantize`` of its own (torchao, quanto)."""
    weight: Any = getattr(layer, "weight", None)
    if weight is None or getattr(type(weight), "dequantize", None) in (None, Tensor.dequantize):
        return None
    whole: Tensor = weight.dequantize()
    return whole.clone()


def _by_layer(layer: nn.Module) -> Tensor | None:
    """Ask the layer: HQQ's ``dequantize`` returns [d_out, d_in], GPTQ's ``dequantize_weight`` [d_in, d_out]."""
    if callable(rowwise := getattr(layer, "dequantize", None)):
        whole: Tensor = rowwise()
        return whole.clone()  # HQQ's is made in inference mode
    if callable(columnwise := getattr(layer, "dequantize_weight", None)):
        transposed: Tensor = columnwise()
        return transposed.t().clone()
    return None


def _awq(layer: nn.Module) -> Tensor | None:
    """Unpack AWQ's 4 bits: (q - zero) · scale, eight columns per int32 in the order 0 2 4 6 1 3 5 7 (``WQLinear_GEMM``)."""
    packed, zeros, scales = (getattr(layer, name, None) for name in ("qweight", "qzeros", "scales"))
    sizes = features(layer)
    if sizes is None or not all(isinstance(each, Tensor) for each in (packed, zeros, scales)):
        return None
    assert isinstance(packed, Tensor) and isinstance(zeros, Tensor) and isinstance(scales, Tensor)
    d_in, d_out = sizes
    if packed.shape != (d_in, d_out // 8) or packed.dtype != torch.int32 or scales.shape != (len(zeros), d_out):
        return None  # another layout than the GEMM's
    shifts = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28], device=packed.device)
    q, zero = ((each[:, :, None] >> shifts & 15).flatten(1) for each in (packed, zeros))
    group = d_in // len(scales)
    return ((q - zero.repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)).t().contiguous()


def _by_answers(layer: nn.Module) -> Tensor | None:
    """Give the layer the rows of the identity: its answers, less the one to zero, are the weight's columns."""
    tensor, sizes = held(layer), features(layer)
    if tensor is None or sizes is None:
        return None
    columns = []
    for first in range(0, sizes[0], _ROWS):
        count = min(_ROWS, sizes[0] - first)
        x = torch.zeros(count + 1, sizes[0])
        x[range(count), range(first, first + count)] = 1
        got = answer(layer, x)
        if got is None or not isinstance(got[1], Tensor):
            return None
        y = got[1].float()
        columns.append(y[:-1] - y[-1:])
    return torch.cat(columns).t().contiguous()


WAYS: tuple[Callable[[nn.Module], Tensor | None], ...] = (
    _four_bits,
    _eight_bits,
    _by_weight,
    _by_layer,
    _awq,
    _by_answers,
)
"""How a weight is found, in order. Each returns it as [d_out, d_in], or None if the layer is of another package."""
