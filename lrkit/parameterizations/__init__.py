"""Parameterizations: how ΔW is written in trainable tensors."""

from collections.abc import Mapping

from lrkit.hookspecs import hookimpl
from lrkit.parameterizations.adapter import Adapter
from lrkit.parameterizations.base import Parameterization, Role, Target
from lrkit.parameterizations.dora import DoRA
from lrkit.parameterizations.full import Full
from lrkit.parameterizations.lora import LoRA
from lrkit.parameterizations.lowrank import LowRank, low_rank_linear
from lrkit.parameterizations.svd import SVD
from lrkit.parameterizations.vector_scaled import VectorScaled


@hookimpl
def lrkit_parameterizations() -> Mapping[str, type[Parameterization]]:
    """Offer the built-in parameterizations."""
    return {"full": Full, "lora": LoRA, "svd": SVD, "vector-scaled": VectorScaled, "dora": DoRA}


__all__ = [
    "SVD",
    "Adapter",
    "DoRA",
    "Full",
    "LoRA",
    "LowRank",
    "Parameterization",
    "Role",
    "Target",
    "VectorScaled",
    "low_rank_linear",
]
