"""Parameterizations: how ΔW is written in trainable tensors."""

from lrkit.parameterizations.adapter import Adapter
from lrkit.parameterizations.base import Parameterization, Role, Target
from lrkit.parameterizations.full import Full
from lrkit.parameterizations.lora import LoRA
from lrkit.parameterizations.lowrank import LowRank, low_rank_linear
from lrkit.parameterizations.svd import SVD
from lrkit.parameterizations.vector_scaled import VectorScaled

__all__ = [
    "SVD",
    "Adapter",
    "Full",
    "LoRA",
    "LowRank",
    "Parameterization",
    "Role",
    "Target",
    "VectorScaled",
    "low_rank_linear",
]
