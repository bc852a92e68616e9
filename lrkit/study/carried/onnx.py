"""Read the weights of a quantised ONNX graph, under the names that they had in torch.

The format is protobuf: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto. Only the fields that hold weights are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lrkit.errors import LrkitError

Array = npt.NDArray[Any]

_TYPES = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8"}
_QUANTISED = "_quantized"
# A product's name in the graph, such as "/m/decoder/block.0/layer.0/SelfAttention/q/MatMul_quant"
_PRODUCT = re.compile(r"/(.+)/MatMul(_quant)?")
# A weight is an input of its product as it is, or dequantised.
_SUFFIX = re.compile("(_quantized|_DequantizeLinear_Output)$")


def read_weights(path: Path) -> dict[str, Array]:
    """Read the float32 weights of a graph with tensors that were quantised each by one scale and zero point.

    w = (q - zero point) * scale. A weight of a product has no name of its own: it gets that of its product's module, and is
    turned to [d_out, d_in], as torch has it.

    Raises:
        LrkitError: a quantised tensor is in no product.
    """
    tensors, nodes = _graph(path.read_bytes())
    products: dict[str, str] = {}
    for name, inputs in nodes:
        if match := _PRODUCT.fullmatch(name):
            products |= {_SUFFIX.sub("", each): match[1].replace("/", ".") for each in inputs}
    found: dict[str, Array] = {}
    for name, tensor in tensors.items():
        if not name.endswith(_QUANTISED):
            if tensor.dtype == np.float32 and tensor.ndim and name.endswith((".weight", ".bias")):
                found[name] = tensor
            continue
        stem = name.removesuffix(_QUANTISED)
        zero = tensors[f"{stem}_zero_point"].astype(np.int32)
        weight = (tensor.astype(np.int32) - zero).astype(np.float32) * tensors[f"{stem}_scale"]
        if not stem.startswith("onnx::"):
            found[stem] = weight
        elif stem in products:
            found[f"{products[stem]}.weight"] = np.ascontiguousarray(weight.T)
        else:
            raise LrkitError(f"{path}: {name} is in no product")
    return found


def _graph(content: bytes) -> tuple[dict[str, Array], list[tuple[str, list[str]]]]:
    """Return the initialisers by name, and each node's name and inputs."""
    tensors: dict[str, Array] = {}
    nodes = []
    [graph] = [value for field, value in _fields(memoryview(content)) if field == 7]
    for field, value in _fields(graph):
        if field == 1:
            parts = list(_fields(value))
            name = "".join(str(part, "utf-8") for number, part in parts if number == 3)
            nodes.append((name, [str(part, "utf-8") for number, part in parts if number == 1]))
        elif field == 5:
            name, tensor = _tensor(value)
            tensors[name] = tensor
    return tensors, nodes


def _tensor(message: memoryview) -> tuple[str, Array]:
    """Return the name and numbers of a TensorProto, whose numbers may stand in one of three fields."""
    shape: list[int] = []
    name, kind = "", 1
    numbers: list[Array] = []
    for field, value in _fields(message):
        if field == 1:
            shape += [value] if isinstance(value, int) else _varints(value)
        elif field == 2:
            kind = value
        elif field == 8:
            name = str(value, "utf-8")
        elif field in (4, 9) and not isinstance(value, int):  # float_data, raw_data
            numbers.append(np.frombuffer(value, _TYPES.get(kind, "u1")))
        elif field in (5, 7):  # int32_data, which holds the smaller types too, and int64_data
            numbers.append(np.array([value] if isinstance(value, int) else _varints(value)).astype(_TYPES[kind]))
    return name, np.concatenate(numbers).reshape(shape) if kind in _TYPES and numbers else np.zeros(0, "u1")


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield each field's number and value: a whole number, or bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(key & 7)
        if size is None:
            size, at = _varint(message, at)
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the number that stands at a place, in groups of seven bits, and the place after it."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value - (1 << 64) if value >> 63 else value, at


def _varints(message: memoryview) -> list[int]:
    found, at = [], 0
    while at < len(message):
        value, at = _varint(message, at)
        found.append(value)
    return found
