"""lrkit: adaptive parameter-efficient fine-tuning, composed from four independent choices.

A method is a *parameterization* (how is ΔW written?), an importance *metric* (how much does each unit matter?), a
*scheduler* (how much may be kept at step t?) and an *action* (what happens to the units that lose?). For example,
AdaLoRA is `SVD` + `SensitivityUncertainty` + `Cubic` + `Prune`, and AFLoRA is `VectorScaled` + `GradientUncertainty` +
`Cubic` + `Freeze`. An ablation swaps one of them.

Names are imported when they are first used, so that ``import lrkit`` costs nothing beside ``import torch``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lrkit.version import __version__

if TYPE_CHECKING:
    from lrkit import actions, methods, metrics, parameterizations, peft, schedulers, tasks, testing, trainer
    from lrkit.actions import Action
    from lrkit.adapt.adapted import Adapted, attach, load
    from lrkit.adapt.allocation import Allocation
    from lrkit.compose import from_plain, to_plain, with_component, with_setting
    from lrkit.errors import LrkitError, LrkitWarning
    from lrkit.hookspecs import hookimpl
    from lrkit.loop.history import Decision
    from lrkit.method import Method, Policy
    from lrkit.metrics import LayerMetric, Metric
    from lrkit.parameterizations import Parameterization
    from lrkit.peft import export, from_peft, push_to_hub
    from lrkit.registry import Registry, current
    from lrkit.schedulers import Scheduler
    from lrkit.study.ablate import ablate
    from lrkit.study.tune import tune
    from lrkit.units import Block, Part

_HOMES = {
    "Action": "actions",
    "Adapted": "adapt.adapted",
    "Allocation": "adapt.allocation",
    "Block": "units",
    "Decision": "loop.history",
    "LayerMetric": "metrics",
    "LrkitError": "errors",
    "LrkitWarning": "errors",
    "Method": "method",
    "Metric": "metrics",
    "Parameterization": "parameterizations",
    "Part": "units",
    "Policy": "method",
    "Registry": "registry",
    "Scheduler": "schedulers",
    "ablate": "study.ablate",
    "attach": "adapt.adapted",
    "current": "registry",
    "export": "peft",
    "from_peft": "peft",
    "from_plain": "compose",
    "hookimpl": "hookspecs",
    "load": "adapt.adapted",
    "push_to_hub": "peft",
    "to_plain": "compose",
    "tune": "study.tune",
    "with_component": "compose",
    "with_setting": "compose",
}
_MODULES = (
    "accounting",
    "actions",
    "methods",
    "metrics",
    "parameterizations",
    "peft",
    "schedulers",
    "tasks",
    "testing",
    "trainer",
)

__all__ = [
    "Action",
    "Adapted",
    "Allocation",
    "Block",
    "Decision",
    "LayerMetric",
    "LrkitError",
    "LrkitWarning",
    "Method",
    "Metric",
    "Parameterization",
    "Part",
    "Policy",
    "Registry",
    "Scheduler",
    "__version__",
    "ablate",
    "accounting",
    "actions",
    "attach",
    "current",
    "export",
    "from_peft",
    "from_plain",
    "hookimpl",
    "load",
    "methods",
    "metrics",
    "parameterizations",
    "peft",
    "push_to_hub",
    "schedulers",
    "tasks",
    "testing",
    "to_plain",
    "trainer",
    "tune",
    "with_component",
    "with_setting",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"lrkit.{_HOMES[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"lrkit.{name}")
    else:
        raise AttributeError(f"module 'lrkit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
