"""Name PEFT's files and the parts of one layer, for both directions."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from lrkit.errors import LrkitError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class Factors(NamedTuple):
    """ΔW = s · B diag(c) A of one layer, in the order of ``export_factors`` and ``import_factors``.

    Args:
        a: A, [rank, inputs].
        b: B, [outputs, rank].
        core: c, [rank]; None for ones.
        scaling: s.
        magnitude: m of DoRA, [outputs]; None if there is none.
    """

    a: Tensor
    b: Tensor
    core: Tensor | None
    scaling: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """The number of components."""
        return len(self.a)


def commonest(values: Mapping[str, Any]) -> Any:
    """Return the value that most layers have, so that the pattern of exceptions is short."""
    every = list(values.values())
    return max(dict.fromkeys(every), key=every.count)


def named(
    layer: nn.Module, name: str, to: str, a: Tensor, b: Tensor, magnitude: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the two factors of a layer, and its magnitude, under PEFT's names, in PEFT's shapes.

    Raises:
        LrkitError: PEFT has no such form for this layer.
    """
    beside = {} if magnitude is None else {f"{name}.lora_magnitude_vector": magnitude}
    if isinstance(layer, nn.Embedding):
        if to == "vllm-lora":
            raise LrkitError(
                f'vllm-lora holds linear layers, and {name} is an embedding: export to "peft-lora" or "merged"'
            )
        return {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b, **beside}
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        plain = layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
        if to == "vllm-lora" or not plain:
            raise LrkitError(
                f"{to} has no LoRA of this {type(layer).__name__}, {name} (groups, dilation and padding modes are not "
                'kept by PEFT): export to "merged"'
            )
        ones = [1] * (layer.weight.ndim - 2)
        a, b = a.view(len(a), *layer.weight.shape[1:]), b.view(*b.shape, *ones)
        beside = {key: m.view(1, -1, *ones) for key, m in beside.items()}
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, **beside}
