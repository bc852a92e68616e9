"""Controls: rows that ask if *where* another row's rank went matters, by training at ranks that are given from step 1.

Each control of a row trains that row's parameterization, with its penalty and scale and without its policy, at

- ``found``: the ranks that the row ended with, with the same seed;
- ``transplanted``: those that it ended with at the next seed (the first one's after the last), or on another task;
- ``shuffled``: the found ranks, permuted among layers of equal size;
- ``random``, ``uniform``: as many parameters as found, within one component, drawn or spread evenly;
- ``oracle``: as many parameters on the layers that are known to be the best ones (`lrkit.tasks.teacher`), evenly;
- ``cut-at-end``: the row itself, at full rank until its one decision after the last step.

All but the last need the row's own cell: see `lrkit.study.needs`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import attrs

from lrkit.compose import from_plain, with_setting
from lrkit.errors import LrkitError, nearest
from lrkit.ranks import divisor
from lrkit.study.composing import without
from lrkit.study.needs import Need, Source

if TYPE_CHECKING:
    from torch import nn

    from lrkit.adapt.allocation import Allocation
    from lrkit.study.cell import Cell
    from lrkit.study.task_spec import TaskSpec
    from lrkit.tasks import Task

Kind = Literal["found", "transplanted", "shuffled", "random", "uniform", "oracle", "cut-at-end"]
KINDS: tuple[str, ...] = get_args(Kind)


@attrs.frozen(kw_only=True)
class Control:
    """The control that a row is.

    Args:
        kind: which one.
        row: index of the row that it controls.
        task: the task whose ranks are transplanted; None for another seed's.
    """

    kind: Kind
    row: int
    task: str | None = None

    def reads(
        self, tasks: "Sequence[TaskSpec]", seeds: Sequence[int], spec: "TaskSpec", seed: int
    ) -> "tuple[TaskSpec, int] | None":
        """Return the task and the seed of the cell whose ranks it takes; None if it takes none."""
        if self.kind == "cut-at-end":
            return None
        if self.kind != "transplanted":
            return spec, seed
        if self.task is None:
            return spec, seeds[(list(seeds).index(seed) + 1) % len(seeds)]
        return next(each for each in tasks if each.name == self.task), seed

    def check_task(self, task: "Task", model: "nn.Module") -> None:
        """Raise LrkitError if the control cannot be had on a task: only a teacher knows the layers of an oracle."""
        if self.kind == "oracle" and not task.truth(model, 0):
            raise LrkitError(f'control "oracle": the task "{task.name}" knows no layers that the rank belongs in')

    def needs(self, key: str | None) -> tuple[Need, ...]:
        """Return the needs of its cell, given the key of the cell that `reads` names."""
        return () if key is None else (Need(rule="allocation", cells=[key], settings={"control": self.kind}),)


def check_control(control: Control, tasks: Sequence[str], seeds: Mapping[str, int]) -> None:
    """Raise LrkitError if a control cannot be had in a study of some tasks and so many seeds, and tuning seeds."""
    if control.kind != "transplanted":
        if control.task is not None:
            raise LrkitError(f'from_task is for control = "transplanted", not "{control.kind}"')
    elif control.task is None and (one := [kind for kind, count in seeds.items() if count < 2]):
        raise LrkitError(f"transplanted ranks are the next seed's, and there is one {one[0]}: give more, or from_task")
    elif control.task is not None and control.task not in tasks:
        hint = f"{nearest(control.task, tasks)}; there are {', '.join(tasks)}"
        raise LrkitError(f'from_task: there is no task "{control.task}" in the study{hint}')


def check_kind(kind: str) -> Kind:
    """Return the name of a control. Raise LrkitError for an unknown one."""
    if kind not in KINDS:
        raise LrkitError(f'there is no control "{kind}"{nearest(kind, KINDS)}; there are {", ".join(KINDS)}')
    return kind  # type: ignore[return-value]


def controlled(plain: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """Make the method that a control trains of the method that it controls, as plain data.

    The ranks are the method's own until `allocated` fills them in.

    Raises:
        LrkitError: the method has no policy, or no ranks; or its adapters begin with others than it is given.
    """
    if plain["metric"] is None:
        raise LrkitError(f'control "{kind}" asks where the rank went, and the row has no policy that moves any')
    if "rank" not in plain["parameterization"]:
        name = plain["parameterization"]["name"]
        raise LrkitError(f'control "{kind}" gives ranks, and parameterization "{name}" has none')
    if kind != "cut-at-end":
        alone = without({**plain, "also": []}, "policy")
        part = from_plain(alone).parameterization
        if part.components != getattr(part, "rank", None):
            given = f"{plain['parameterization']['name']} of rank {plain['parameterization']['rank']}"
            raise LrkitError(
                f'control "{kind}" trains at ranks that are given, and parameterization {given} begins with '
                f"{part.components}: in the control, set what makes it more than it is given"
            )
        return alone
    copy = dict(plain)
    for path, value in (("warmup", 1.0), ("final", 0.0)):
        copy = with_setting(copy, f"scheduler.{path}", value)
    return copy


def allocated(cell: "Cell", sources: Sequence[Source], settings: Mapping[str, Any]) -> "Cell":
    """Fill in the ranks that a control trains at: the rule "allocation" of `lrkit.study.settling`.

    Args:
        cell: the control's cell.
        sources: the cell whose ranks it takes.
        settings: ``control``, the kind.

    Raises:
        LrkitError: that cell has no ranks.
    """
    from lrkit.adapt.allocation import Allocation

    (source,) = sources
    found = Allocation.from_layers(source.result.layers)
    made = _made(settings["control"], found, cell)
    method = with_setting(cell.method, "parameterization.rank", dict(made))
    return attrs.evolve(cell, method=_same_scale(method, source, made))


def _made(kind: Kind, found: "Allocation", cell: "Cell") -> "Allocation":
    """Make a control's ranks of those that were found."""
    if kind == "found" or kind == "transplanted":
        return found
    if kind == "oracle":
        return _oracle(found, cell)
    assert kind != "cut-at-end"
    return found.like(kind, seed=cell.seed)


def _oracle(found: "Allocation", cell: "Cell") -> "Allocation":
    """Spread as many parameters as were found over the layers that are known to be the best ones.

    Raises:
        LrkitError: the task does not know any.
    """
    from lrkit.adapt.allocation import Allocation
    from lrkit.adapt.sharing import uniform
    from lrkit.study.loading import loading_from
    from lrkit.study.models import empty_model
    from lrkit.study.task_spec import TaskSpec, load_task_of

    task = load_task_of(TaskSpec(**cell.task))
    best = task.truth(empty_model(cell.model, task.head, loading_from(cell.loading)), cell.seed)
    sizes = found.sizes
    assert sizes is not None
    if not set(best) <= sizes.keys():
        raise LrkitError(
            f"the layers that the rank belongs in ({', '.join(best)}) are not among those that are adapted"
        )
    ranks = uniform({name: sizes[name] for name in best}, cost=found.parameters)
    return Allocation({name: ranks.get(name, 0) for name in sizes}, sizes)


_OWN_SCALES = (
    "it began with ranks that differ, each scaled by α over its own: a control would have other scales; give it "
    'scale_by = "mean-rank"'
)


def _same_scale(method: dict[str, Any], source: Source, made: "Allocation") -> dict[str, Any]:
    """Set α so that the increment is scaled as in the source, in every layer.

    With one scale α/r in all layers there, it is α'/(mean rank) here, α' = α · (mean rank)/r; with α/√r it is
    α' = α · √(mean rank)/√r. If each layer there is scaled by its own rank in the end (FIM-LoRA, GoRA), so it is here. The
    method has the source's α, or its own if that is tuned.

    Raises:
        LrkitError: the source's layers have scales of their own.
    """
    part = source.config["method"]["parameterization"]
    alpha = method["parameterization"].get("alpha")
    if alpha is None:
        return method
    by = part.get("scale", "rank")
    scaled = [layer for layer in source.result.layers if layer.initial_rank and layer.scale is not None]
    if scaled and not _equal([layer.scale or 0.0 for layer in scaled]):
        kept = [layer for layer in scaled if layer.rank]
        own = [(layer.scale or 0.0) * divisor((layer.rank or 1) / layer.maps, by) for layer in kept]
        if not _equal([part["alpha"], *own]):
            raise LrkitError(_OWN_SCALES)
        # Each layer there is scaled by the rank that it was given, and so it is here.
        return with_setting(method, "parameterization.scale_by", "own-rank")
    if scaled:
        there = part["alpha"] / scaled[0].scale
    else:  # a cell from before scales were written down
        first = [layer.initial_rank or 0 for layer in source.result.layers]
        if part.get("scale_by") != "mean-rank" and len({*first}) > 1:
            raise LrkitError(_OWN_SCALES)
        there = divisor(sum(first) / len(first), by)
    mean = made.total / len(made.layers())
    method = with_setting(method, "parameterization.scale_by", "mean-rank")
    return with_setting(method, "parameterization.alpha", alpha * divisor(mean, by) / there)


def _equal(numbers: Sequence[float]) -> bool:
    """Return whether all of these, at least one, are equal but for rounding."""
    return max(numbers) - min(numbers) <= 1e-6 * max(map(abs, numbers))
