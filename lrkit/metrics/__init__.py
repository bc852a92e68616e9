"""Importance metrics: how much each entry matters, from weights and gradients."""

from collections.abc import Mapping

from lrkit.hookspecs import hookimpl
from lrkit.metrics.base import Importance, Metric, Parts
from lrkit.metrics.gradient import GradientUncertainty, RatioUncertainty
from lrkit.metrics.layerwise import Layer, LayerMetric, Seen
from lrkit.metrics.magnitude import Magnitude
from lrkit.metrics.random import Random
from lrkit.metrics.sensitivity import Sensitivity, SensitivityUncertainty, UncertaintyMetric


@hookimpl
def lrkit_metrics() -> Mapping[str, type[Importance]]:
    """Offer the built-in metrics."""
    return {
        "magnitude": Magnitude,
        "sensitivity": Sensitivity,
        "sensitivity-uncertainty": SensitivityUncertainty,
        "gradient-uncertainty": GradientUncertainty,
        "ratio-uncertainty": RatioUncertainty,
        "random": Random,
    }


__all__ = [
    "GradientUncertainty",
    "Importance",
    "Layer",
    "LayerMetric",
    "Magnitude",
    "Metric",
    "Parts",
    "Random",
    "RatioUncertainty",
    "Seen",
    "Sensitivity",
    "SensitivityUncertainty",
    "UncertaintyMetric",
]
