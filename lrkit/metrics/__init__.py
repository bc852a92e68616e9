"""Importance metrics: how much each entry matters, from weights and gradients."""

from lrkit.metrics.base import Metric
from lrkit.metrics.gradient import GradientUncertainty, RatioUncertainty
from lrkit.metrics.magnitude import Magnitude
from lrkit.metrics.sensitivity import Sensitivity, SensitivityUncertainty, UncertaintyMetric

__all__ = [
    "GradientUncertainty",
    "Magnitude",
    "Metric",
    "RatioUncertainty",
    "Sensitivity",
    "SensitivityUncertainty",
    "UncertaintyMetric",
]
