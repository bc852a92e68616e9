"""Quantized bases in training: the Trainer lets only PEFT's models through, and evaluation may pack weights anew."""

import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from lrkit.adapt.adapted import Adapted


def let_train(adapted: "Adapted") -> None:
    """Let transformers' Trainer take an adapted model whose base is quantized, as long as the adapters are in it.

    The Trainer refuses a quantized model unless it is PEFT's or its quantizer says that it is "QAT trainable", which
    nothing else in transformers reads. So the quantizer says so while the adapters are attached. It still says if it can
    train at all (``is_trainable``): a method of quantization that cannot is refused as before.
    """
    quantizer = getattr(adapted.model, "hf_quantizer", None)
    if quantizer is None:
        return
    try:
        quantizer.is_qat_trainable = True
    except AttributeError:  # a property of its class: give this one object a class of its own
        kind, handle, before = type(quantizer), weakref.ref(adapted), bool(quantizer.is_qat_trainable)

        def is_qat_trainable(_: Any) -> bool:
            there = handle()
            return before or (there is not None and there.attached)

        quantizer.__class__ = type(kind.__name__, (kind,), {"is_qat_trainable": property(is_qat_trainable)})


_PACKS = "support_avx512bf16_for_cpu"


class Layout:
    """Keeps the layers of a model from packing their weights for inference, until `remove`.

    On some CPUs a 4-bit layer of bitsandbytes packs its weight at the first call in evaluation, rounds its scales to
    bfloat16, and passes no gradient from then on: a run that is evaluated on the way would train on without one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._packing = [module for module in model.modules() if module.__dict__.get(_PACKS)]
        for module in self._packing:
            setattr(module, _PACKS, False)

    def remove(self) -> None:
        """Let them pack again."""
        for module in self._packing:
            setattr(module, _PACKS, True)
