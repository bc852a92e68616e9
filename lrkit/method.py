"""A method is a parameterization and its policy: a metric, a scheduler and an action.

AdaLoRA is `SVD` + `SensitivityUncertainty` + `Cubic` + `Prune`. AFLoRA is `VectorScaled` + `GradientUncertainty` +
`Cubic` + `Freeze`. An ablation swaps one field (``attrs.evolve``), and `also` carries further policies: prune and
freeze in one run is AFLoRA's method with one more `Policy`.

A method is frozen configuration. If its parts do not fit together, it is refused when it is built, with both sides named
(`lrkit.fit`). It has no name: after a swap a name would lie.
"""

from collections.abc import Iterable
from typing import Any

import attrs

from lrkit import fit
from lrkit.actions import Action
from lrkit.errors import LrkitError, shown
from lrkit.hookspecs import Kind
from lrkit.metrics import Importance
from lrkit.parameterizations import Parameterization
from lrkit.retired import outdated
from lrkit.schedulers import Scheduler

FIELDS: tuple[Kind, ...] = ("parameterization", "metric", "scheduler", "action")
"""The four parts of a method."""
POLICY: tuple[Kind, ...] = FIELDS[1:]
"""The three parts of a policy."""


def _is_a(base: type, *, optional: bool = False) -> Any:
    def check(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not isinstance(value, base) and not (optional and value is None):
            hint = f" (an instance: write {value.__name__}())" if isinstance(value, type) else ""
            field = f"{type(instance).__name__}.{attribute.name}"
            article = "an" if base.__name__[0] in "AEIOU" else "a"
            raise LrkitError(f"{field} must be {article} {base.__name__}, not {shown(value)}{hint}")
        if reason := outdated(attribute.name, type(value)):
            raise LrkitError(f"{attribute.name} {type(value).__name__} {reason}")

    return check


@attrs.frozen(kw_only=True)
class Policy:
    """A metric, a scheduler and an action that work together."""

    metric: Importance = attrs.field(validator=_is_a(Importance))
    scheduler: Scheduler = attrs.field(validator=_is_a(Scheduler))
    action: Action = attrs.field(validator=_is_a(Action))


def _as_tuple(policies: Iterable[Policy]) -> tuple[Policy, ...]:
    if isinstance(policies, Policy):
        return (policies,)
    if not isinstance(policies, Iterable) or isinstance(policies, type):
        raise LrkitError(f"Method.also must hold lrkit.Policy(metric=..., ...), not {shown(policies)}")
    return tuple(policies)


@attrs.frozen(kw_only=True)
class Method:
    """A parameterization and its policies.

    Args:
        parameterization: how ΔW is written in trainable tensors.
        metric: how much each unit matters. Metric, scheduler and action come together, or not at all.
        scheduler: how much may be kept at step t.
        action: what happens to the units that lose.
        also: further policies, which act after the first, in order.

    Raises:
        LrkitError: a field of the wrong type, only some of metric, scheduler and action, or parts that do not fit
            together, with both sides named.
    """

    parameterization: Parameterization = attrs.field(validator=_is_a(Parameterization))
    metric: Importance | None = attrs.field(default=None, validator=_is_a(Importance, optional=True))
    scheduler: Scheduler | None = attrs.field(default=None, validator=_is_a(Scheduler, optional=True))
    action: Action | None = attrs.field(default=None, validator=_is_a(Action, optional=True))
    also: tuple[Policy, ...] = attrs.field(default=(), converter=_as_tuple)

    def __attrs_post_init__(self) -> None:
        """Refuse parts that do not fit together."""
        missing = [name for name in POLICY if getattr(self, name) is None]
        if missing and len(missing) < len(POLICY):
            given = [name for name in POLICY if name not in missing]
            raise LrkitError(
                f"a policy is a metric, a scheduler and an action: {' and '.join(given)} given, "
                f"{' and '.join(missing)} missing; give all three, or none"
            )
        for policy in self.also:
            if not isinstance(policy, Policy):
                raise LrkitError(f"Method.also must hold lrkit.Policy(metric=..., ...), not {shown(policy)}")
        for policy in self.policies:
            reason = fit.refusal(self.parameterization, policy.metric, policy.scheduler, policy.action)
            if reason is not None:
                raise LrkitError(reason)

    @property
    def policies(self) -> tuple[Policy, ...]:
        """Return all policies in the order in which they act; none if the method is not adaptive."""
        if self.metric is None or self.scheduler is None or self.action is None:
            return self.also
        return (Policy(metric=self.metric, scheduler=self.scheduler, action=self.action), *self.also)
