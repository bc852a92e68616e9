"""What lrkit itself offers, through the same hooks as any plug-in."""

from collections.abc import Callable, Mapping
from typing import Any

from lrkit import actions, methods, metrics, parameterizations, schedulers
from lrkit.hookspecs import hookimpl
from lrkit.method import Method
from lrkit.study import executors
from lrkit.study.shipped import files_in
from lrkit.tasks import TASKS


@hookimpl
def lrkit_parameterizations() -> Mapping[str, type[parameterizations.Parameterization]]:
    """The built-in parameterizations."""
    return {
        "full": parameterizations.Full,
        "lora": parameterizations.LoRA,
        "svd": parameterizations.SVD,
        "vector-scaled": parameterizations.VectorScaled,
    }


@hookimpl
def lrkit_metrics() -> Mapping[str, type[metrics.Metric]]:
    """The built-in metrics."""
    return {
        "magnitude": metrics.Magnitude,
        "sensitivity": metrics.Sensitivity,
        "sensitivity-uncertainty": metrics.SensitivityUncertainty,
        "gradient-uncertainty": metrics.GradientUncertainty,
        "ratio-uncertainty": metrics.RatioUncertainty,
    }


@hookimpl
def lrkit_schedulers() -> Mapping[str, type[schedulers.Scheduler]]:
    """The built-in schedulers."""
    return {"constant": schedulers.Constant, "linear": schedulers.Linear, "cubic": schedulers.Cubic}


@hookimpl
def lrkit_actions() -> Mapping[str, type[actions.Action]]:
    """The built-in actions."""
    return {"prune": actions.Prune, "freeze": actions.Freeze, "zero": actions.Zero}


@hookimpl
def lrkit_methods() -> Mapping[str, Callable[..., Method]]:
    """The built-in methods."""
    return {
        "full": methods.full,
        "lora": methods.lora,
        "svd-lora": methods.svd_lora,
        "elora": methods.elora,
        "adalora": methods.adalora,
        "aflora": methods.aflora,
    }


@hookimpl
def lrkit_tasks() -> Mapping[str, Any]:
    """The built-in tasks."""
    return TASKS


@hookimpl
def lrkit_studies() -> Mapping[str, Any]:
    """The studies that need lrkit's own methods alone."""
    return files_in("lrkit")


@hookimpl
def lrkit_executors() -> Mapping[str, Any]:
    """The built-in executors."""
    return {"local": executors.local, "ray": executors.ray}
