"""Quantized bases in transformers' Trainer, which lets only PEFT's models through."""

import weakref
from typing import TYPE_CHECKING, Any

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
