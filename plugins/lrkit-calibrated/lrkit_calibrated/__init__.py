"""Methods that look at a few batches before they train, for lrkit: EVA, FIM-LoRA, GoRA. See README.md."""

from collections.abc import Callable, Mapping
from typing import Any

import lrkit
from lrkit.study.shipped import files_in
from lrkit_calibrated import drop as _drop
from lrkit_calibrated import eva as _eva
from lrkit_calibrated import fim as _fim
from lrkit_calibrated import gora as _gora
from lrkit_calibrated.allocation import Allocate, ShareOut
from lrkit_calibrated.drop import AdapterOutput, Drop, lora_drop
from lrkit_calibrated.eva import EvaLoRA, ExplainedVariance, eva
from lrkit_calibrated.fim import MeanSquaredGradient, fim_lora
from lrkit_calibrated.gora import GoraLoRA, WeightGradient, gora
from lrkit_calibrated.lora import AllocatedLoRA, Rescaled


@lrkit.hookimpl
def lrkit_parameterizations() -> Mapping[str, type[lrkit.Parameterization]]:
    """LoRA that is given its ranks, and its starts from what the batches have shown."""
    return {"allocated-lora": AllocatedLoRA, "eva-lora": EvaLoRA, "gora-lora": GoraLoRA}


@lrkit.hookimpl
def lrkit_metrics() -> Mapping[str, type[lrkit.metrics.Importance]]:
    """What the batches show."""
    return {
        "adapter-output": AdapterOutput,
        "explained-variance": ExplainedVariance,
        "mean-squared-gradient": MeanSquaredGradient,
        "weight-gradient": WeightGradient,
    }


@lrkit.hookimpl
def lrkit_actions() -> Mapping[str, type[lrkit.Action]]:
    """Two ways to give ranks."""
    return {"allocate": Allocate, "drop": Drop, "share-out": ShareOut}


@lrkit.hookimpl
def lrkit_methods() -> Mapping[str, Callable[..., lrkit.Method]]:
    """The named methods."""
    return {**_drop.METHODS, **_eva.METHODS, **_fim.METHODS, **_gora.METHODS}


@lrkit.hookimpl
def lrkit_studies() -> Mapping[str, Any]:
    """Claims on the newer allocators, beside lrkit-l1ra's."""
    return files_in(__name__)


__all__ = [
    "AdapterOutput",
    "Allocate",
    "AllocatedLoRA",
    "Drop",
    "EvaLoRA",
    "ExplainedVariance",
    "GoraLoRA",
    "MeanSquaredGradient",
    "Rescaled",
    "ShareOut",
    "WeightGradient",
    "eva",
    "fim_lora",
    "gora",
    "lora_drop",
]
