"""Run a study: `check` all of it, write its plan, run the cells that are missing, and measure costs: `execute`."""

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path

import attrs

from lrkit.compose import to_plain
from lrkit.errors import LrkitError, LrkitWarning, nearest, shown
from lrkit.study.cell import components_of
from lrkit.study.cell_folder import forget, has_result, tidy_done
from lrkit.study.executors import gpus
from lrkit.study.graph import jobs_of
from lrkit.study.jobs import Job, Told, row_devices
from lrkit.study.ledger import write_plan
from lrkit.study.loading import loading_from
from lrkit.study.missing import made_anew, missing_of
from lrkit.study.old import check_old, tell_damaged, with_old
from lrkit.study.plan import Plan
from lrkit.study.pool import chosen, run_jobs
from lrkit.study.precision import slow_bf16
from lrkit.study.run_settings import steps_of
from lrkit.study.scores import check_share
from lrkit.study.study_file import TaskRecord
from lrkit.study.taken import Source, take_in
from lrkit.study.task_spec import load_task_of
from lrkit.study.tuning import check_schedules
from lrkit.study.worker import Conditions


@attrs.frozen(kw_only=True)
class Outcome:
    """The outcome of a study.

    Args:
        folder: the study's.
        done: cells with a result.
        ran: of these, those that were finished now.
        failed: label and one line for each cell that failed.
        busy: cells that another process is running.
    """

    folder: Path
    done: int
    ran: int
    failed: tuple[tuple[str, str], ...]
    busy: int


def check(plan: Plan, steps: dict[tuple[str, str], int] | None = None) -> dict[str, TaskRecord]:
    """Check every cell before a step is spent: load the tasks, and attach each method to the model without its weights.

    Args:
        plan: the study.
        steps: filled with the optimizer steps of (row's label, task's name).

    Returns:
        The tasks by name.

    Raises:
        LrkitError: a row that cannot run on a task, with both named.
    """
    from lrkit.adapt.adapted import attach
    from lrkit.study.models import empty_model

    tasks = {}
    for spec in plan.tasks:
        task = load_task_of(spec)
        check_share(plan.study.margin, f"task {spec.name}: margin", task.primary)
        for claim in plan.study.claims:
            check_share(claim.margin, f"task {spec.name}: the margin of claim {claim.name}", task.primary)
        tasks[spec.name] = TaskRecord(
            name=spec.name,
            metric=task.primary,
            majority=task.majority,
            higher_is_better=task.higher_is_better,
            options=spec.options,
            run=spec.run,
            set=spec.set,
        )
        net = empty_model(plan.study.model, task.head, loading_from(plan.study.loading))
        for row in plan.rows:
            settings = plan.settings(row, spec, 0)
            length = steps_of(settings, len(task.train))
            # If it takes the tokenizer to count the steps of an epoch, a run alone finds a schedule that does not fit.
            known = task.by_row or settings.steps is not None
            if steps is not None:
                steps[row.label, spec.name] = length
            try:
                if row.control is not None:
                    row.control.check_task(task, net)
                adapted = attach(net, plan.method(row, spec), **row.attach, **settings.attach)
                try:
                    if known:
                        adapted.check_schedule(length)
                finally:
                    adapted.detach()
                if plan.study.tune is not None and known:
                    check_schedules(plan.study.tune, row.tuned, to_plain(plan.method(row, spec)), length)
            except LrkitError as error:
                raise LrkitError(f"row {row.label} on {spec.name}: {error}") from None
    return tasks


def execute(
    plan: Plan,
    folder: Path,
    *,
    executor: str | Executor = "local",
    workers: int | None = None,
    threads: int | None = None,
    address: str | None = None,
    costs: bool = True,
    checkpoint_seconds: float = 60.0,
    report_to: Sequence[str] = (),
    keep_old: bool = False,
    recompute: bool = False,
    packed: Source | None = None,
    told: Told | None = None,
    started: Callable[[Sequence[Job], int, int], None] | None = None,
    cost_told: Callable[[str], None] | None = None,
) -> Outcome:
    """Run the cells of a plan that are missing, then measure its costs.

    Args:
        plan: the study.
        folder: its folder.
        executor: an executor's name, or any `concurrent.futures.Executor`.
        workers: cells at a time; None: one per GPU, or one per CPU core up to four. 0: in this process.
        threads: CPU threads of each cell; None for an equal share of the cores.
        address: of a cluster, for executors that have one.
        costs: measure time and memory of each row against the base.
        checkpoint_seconds: time between checkpoints.
        report_to: trackers of transformers' Trainer.
        keep_old: keep cells that are done and of other code, instead of computing them again.
        recompute: compute cells of other code again, and those that were taken in from a pack.
        packed: a pack whose finished cells are taken in first.
        told: called when a cell has ended.
        started: called with the cells to run, how many there are in all, and how many run at a time.
        cost_told: called with a row's label before its cost is measured.

    Raises:
        LrkitError: something in the plan cannot run, the folder holds something else, or the executor is unknown or cannot
            be begun. No step is spent then.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers is not None and (not isinstance(workers, int) or isinstance(workers, bool) or not 0 <= workers <= 4096):
        raise LrkitError(f"workers must be a number from 0 (in this process) to 4096, not {shown(workers)}")
    at_once = (gpus() or min(cores, 4)) if workers is None else workers
    each = threads or threads_asked() or max(1, cores // max(1, at_once))
    devices = max(row_devices(plan))
    if devices > 1 and gpus():
        at_once = max(1, gpus() // devices) if workers is None else at_once
    make = chosen(executor, at_once, each, address)
    if not isinstance(executor, Executor) and at_once:
        _check_workers_know(plan)
    check_trackers(report_to)
    conditions = Conditions(
        # A cell in several processes shares its threads among them.
        threads=max(1, each // devices) if not isinstance(executor, Executor) or threads else None,
        checkpoint_seconds=checkpoint_seconds,
        report_to=report_to,
    )

    def begun(missing: Sequence[Job], total: int) -> None:
        # Cells of other executors run elsewhere, and this machine says nothing about them.
        if executor == "local" and (line := slow_bf16(job.cell.run["bf16"] for job in missing)) is not None:
            warnings.warn(line, LrkitWarning, stacklevel=5)
        if started is not None:
            started(missing, total, max(1, at_once))

    outcome = run_missing(
        plan,
        folder,
        executor=make,
        conditions=conditions,
        told=told,
        started=begun,
        keep_old=keep_old,
        recompute=recompute,
        packed=packed,
    )
    if costs:
        from lrkit.study.cost import measure

        measure(plan, outcome.folder, threads=threads or threads_asked() or cores, told=cost_told)
    return outcome


def run_missing(
    plan: Plan,
    folder: Path,
    *,
    executor: Callable[[], Executor],
    conditions: Conditions,
    told: Told | None,
    started: Callable[[Sequence[Job], int], None],
    keep_old: bool,
    recompute: bool = False,
    packed: Source | None = None,
) -> Outcome:
    """Run the cells of a plan that are missing.

    Args:
        plan: the study.
        folder: its folder.
        executor: makes one; called again if workers die and take the pool with them.
        conditions: how cells run.
        told: called when a cell has ended.
        started: called with the cells to run, and how many there are in all.
        keep_old: keep cells that are done and of other code, instead of computing them again.
        recompute: compute cells of other code again, and those that were taken in from a pack.
        packed: a pack whose finished cells are taken in first.

    Raises:
        LrkitError: something in the plan cannot run, or the folder holds something else. No step is spent then.
    """
    check_old(keep_old, recompute)
    folder = Path(os.path.abspath(folder))
    cells = folder / "cells"
    steps: dict[tuple[str, str], int] = {}
    tasks = check(plan, steps)
    jobs = [attrs.evolve(job, steps=job.cell.stop or steps[job.label, job.task]) for job in jobs_of(plan)]
    if packed is not None and not recompute:
        take_in(packed, plan, jobs, tasks, folder)
    jobs = with_old(jobs, folder, keep_old, recompute)
    again = made_anew(jobs, cells, recompute)
    waiting = missing_of(jobs, cells, again)
    done = {job.key for job in jobs} - waiting.keys()
    total = len(done) + len(waiting)
    first = executor() if waiting else None  # an executor that cannot be had is told before anything is written
    try:
        write_plan(plan, jobs, tasks, folder)
    except BaseException:
        if first is not None:
            first.shutdown(wait=False, cancel_futures=True)
        raise
    for key in again:
        forget(cells / key)
    tell_damaged(folder, list(waiting))
    for key in done:
        tidy_done(cells / key)
    started(list(waiting.values()), total)
    answers = {} if first is None else run_jobs(waiting, cells, first, executor, conditions, told, total)
    names = {job.key: str(job) for job in jobs}
    return Outcome(
        folder=folder,
        done=sum(has_result(cells / job.key) for job in jobs),
        ran=sum(answer["status"] == "done" for answer in answers.values()),
        failed=tuple((names[k], str(a["error"])) for k, a in answers.items() if a["status"] == "failed"),
        busy=sum(answer["status"] == "busy" for answer in answers.values()),
    )


def threads_asked() -> int | None:
    """Read the CPU threads that ``OMP_NUM_THREADS`` asks for; None if it asks for none."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isascii() and first.isdigit() and 0 < int(first) <= 1024 else None


def _check_workers_know(plan: Plan) -> None:
    """Raise LrkitError for a part that worker processes would not know: they have only the plug-ins that are installed."""
    from lrkit.registry import current

    used = [pair for row in plan.rows for pair in components_of(to_plain(row.method))]
    used += [("task", task.name.partition("/")[0]) for task in plan.tasks if task.data is None]
    for kind, name in used:
        if not current().is_installed(kind, name):
            raise LrkitError(
                f'{kind} "{name}" is registered in this process alone, and worker processes would not know it: give '
                "workers=0, or install it as a plug-in (lrkit plugins new)"
            )


def check_trackers(names: Sequence[str]) -> None:
    """Raise LrkitError for a tracker that transformers does not know."""
    if names:
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        known = sorted(INTEGRATION_TO_CALLBACK)
        for name in names:
            if name not in known:
                raise LrkitError(f'there is no tracker "{name}"{nearest(name, known)}; there are {", ".join(known)}')
