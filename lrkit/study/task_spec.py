"""A task as a study asks for it: by name, or a folder of data; and with its options."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from lrkit.tasks import Task


@attrs.frozen(kw_only=True)
class TaskSpec:
    """A task of a study: by name, or a folder of data.

    Args:
        task: a task's name.
        data: a folder, or ``FOLDER:train=NAME,validation=NAME`` (`lrkit.tasks.load_folder`); beside a task's name it
            stands in for that task's data (`lrkit.study.asked.standing_in`).
        metric: the metric that scores a folder's task; None for that of the task it stands in for.
        options: the task's own options (`lrkit.tasks.Task.options`); on the command line ``--set task.NAME=VALUE``.
        run: settings of the run on this task alone.
        set: settings of every row's method on this task alone, such as the schedule. A setting that a row changes itself
            stays, and a row whose parts have no such setting is left as it is.
    """

    task: str | None = None
    data: str | None = None
    metric: str | None = None
    options: dict[str, Any] = attrs.field(factory=dict)
    run: dict[str, Any] = attrs.field(factory=dict)
    set: dict[str, Any] = attrs.field(factory=dict)

    @cached_property
    def name(self) -> str:
        """Return the name that the study calls it by."""
        from lrkit.tasks.splits import place_of

        return self.task or (place_of(self.data).name if self.data else "movies")


def load_task_of(spec: TaskSpec) -> "Task":
    """Load the task that a spec names, from the registry or a folder. Raise LrkitError if it cannot be had."""
    from lrkit.registry import registered_tasks
    from lrkit.tasks import load_folder, load_task
    from lrkit.tasks.named import OPTIONS

    if spec.task is None or spec.data is None:
        task = load_task(spec.task, data=spec.data, metric=spec.metric, tasks=registered_tasks())
        return task.with_options(spec.options)
    own = dict(OPTIONS.get(spec.task, {}))
    metric = own.pop("metric", None)
    task = attrs.evolve(load_folder(spec.data, spec.metric or metric), name=spec.task)
    return task.with_options(own | spec.options)
