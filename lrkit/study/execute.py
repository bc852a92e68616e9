"""Carry out a study: check all of it, write its plan, run what is missing, go on where something was killed."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from pathlib import Path
from typing import Any

import attrs

from lrkit.compose import to_plain
from lrkit.errors import LrkitError
from lrkit.foreign import line_of
from lrkit.study.cell import (
    Cell,
    Conditions,
    code_of,
    has_result,
    is_done,
    make_cell,
    note_failure,
    run_cell,
    tidy_done,
)
from lrkit.study.old import tell_damaged, with_old
from lrkit.study.place import try_folder
from lrkit.study.plan import Plan, Row, TaskSpec, changes, load_task_of
from lrkit.study.rates import implied, rates_of
from lrkit.study.store import canonical, lock, read_json, write_json

FORMAT = 1
_TRIES = 4


@attrs.frozen(kw_only=True)
class Job:
    """A cell and its place in the study.

    Args:
        cell: the cell.
        row: its row's index.
        label: its row's label.
        task: its task's name.
        seed: its seed.
        steps: optimizer steps, where known.
        kept: key and code of the cell of other code that stands for it; None for its own.
    """

    cell: Cell
    row: int
    label: str
    task: str
    seed: int
    steps: int | None = None
    kept: tuple[str, str] | None = None

    @property
    def key(self) -> str:
        """The name of its folder."""
        return self.cell.key if self.kept is None else self.kept[0]

    @property
    def code(self) -> str:
        """The digest of the code that its result is of."""
        return self.cell.versions["code"] if self.kept is None else self.kept[1]


@attrs.frozen(kw_only=True)
class Outcome:
    """What carrying out a study came to.

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


Told = Callable[[Job, Mapping[str, Any], int, int], None]
"""Called when a cell has ended: the job, what `run_cell` gave, cells ended and cells in all."""


def check(plan: Plan, steps: dict[tuple[str, str], int] | None = None) -> dict[str, dict[str, Any]]:
    """Check every cell before a step is spent: tasks loaded, each method attached to the model without its weights.

    Args:
        plan: the study.
        steps: filled with the optimizer steps of (row's label, task's name).

    Returns:
        Task name to ``{"name", "metric", "majority"}``.

    Raises:
        LrkitError: what cannot run, with its row and task.
    """
    from lrkit.adapt.adapted import attach
    from lrkit.study.models import empty_model
    from lrkit.study.run import total_steps

    tasks = {}
    for spec in plan.tasks:
        task = load_task_of(spec)
        tasks[spec.name] = {
            "name": spec.name,
            "metric": next(iter(task.score(*_perfect(task)))),
            "majority": task.majority,
        }
        net = empty_model(plan.study.model, task.num_labels)
        for row in plan.rows:
            settings = plan.settings(row, spec, 0)
            length = total_steps(settings, min(len(task.train), settings.train_rows or len(task.train)))
            if steps is not None:
                steps[row.label, spec.name] = length
            try:
                adapted = attach(net, plan.method(row, spec), **row.attach)
                try:
                    adapted.check_schedule(length)
                finally:
                    adapted.detach()
            except LrkitError as error:
                raise LrkitError(f"row {row.label} on {spec.name}: {error}") from None
    return tasks


def _perfect(task: Any) -> tuple[Any, Any]:
    import numpy as np

    labels = np.asarray(task.validation["label"])
    return labels, labels


def jobs_of(plan: Plan) -> list[Job]:
    """All cells: seed by seed, so that a study that is stopped early has every row."""
    jobs = []
    for seed in plan.seeds:
        for spec in plan.tasks:
            for index, row in enumerate(plan.rows):
                cell = _cell(plan, row, spec, seed)
                jobs.append(Job(cell=cell, row=index, label=row.label, task=spec.name, seed=seed))
    return jobs


def _cell(plan: Plan, row: Row, spec: TaskSpec, seed: int) -> Cell:
    run = attrs.asdict(plan.settings(row, spec, seed))
    return make_cell(to_plain(plan.method(row, spec)), spec, plan.study.model, run=run, **row.attach)


def write_plan(plan: Plan, jobs: Sequence[Job], tasks: Mapping[str, Any], folder: Path) -> None:
    """Write ``study.json``, keeping rows, tasks, seeds and cells that are there already.

    Raises:
        LrkitError: the folder holds another study, or something else.
    """
    mine = {
        "format": FORMAT,
        "name": folder.resolve().name,
        "title": plan.study.title,
        "note": plan.study.note,
        "base": 0,
        "rows": [
            {
                "label": row.label,
                "changes": [*changes(plan.rows[0], row), *implied(plan, row)],
                "method": to_plain(row.method),
                "run": row.run,
                "rates": {spec.name: rates_of(plan, row, spec) for spec in plan.tasks},
                **row.attach,
            }
            for row in plan.rows
        ],
        "tasks": [tasks[spec.name] for spec in plan.tasks],
        "model": plan.study.model,
        "targets": plan.study.targets,
        "train_also": plan.study.train_also,
        "seeds": list(plan.seeds),
        "run": dict(plan.study.run),
        "cells": [
            {
                "key": j.key,
                "row": j.row,
                "task": j.task,
                "seed": j.seed,
                "setup": j.cell.setup,
                "code": j.code,
                "old": j.kept is not None,
            }
            for j in jobs
        ],
        "costs": [],
    }
    if folder.exists() and not folder.is_dir():
        raise LrkitError(f"{folder} is a file: choose another --out")
    # A process that was killed while it wrote the first study.json left a draft, and nothing else.
    held = (
        [p for p in folder.iterdir() if not p.name.startswith((".study.json.", "study.lock"))]
        if folder.exists()
        else []
    )
    if held and not (folder / "study.json").exists():
        raise LrkitError(f"{folder} exists and holds no study: nothing is overwritten, choose another --out")
    try_folder(folder / "cells")
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / "study.lock", wait=True):
        for draft in folder.glob(".study.json.*"):
            draft.unlink(missing_ok=True)
        there = read_json(folder / "study.json")
        write_json(folder / "study.json", mine if there is None else _joined(there, mine, folder))


def _what(row: Mapping[str, Any], study: Mapping[str, Any]) -> list[Any]:
    """All that decides what a row of a study.json trains."""
    own = [row.get(key, study.get(key, "auto")) for key in ("targets", "train_also")]
    return [row["method"], row.get("run", {}), *own]


def _joined(there: Mapping[str, Any], mine: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The plan that is there and this one: the same base, rows and cells of both."""

    def refuse(what: str) -> LrkitError:
        return LrkitError(f"{folder} holds another study: {what}; choose another --out")

    if not isinstance(there, Mapping) or there.get("format") != FORMAT:
        raise refuse(f"its study.json is not of format {FORMAT}")
    there = {"train_also": "auto", **there}  # it always was, in a study of an earlier lrkit
    for key in ("model", "targets", "train_also", "run"):
        if canonical(there[key]) != canonical(mine[key]):
            raise refuse(f"{key} is {canonical(there[key])} there and {canonical(mine[key])} here")
    cells = {(c["row"], c["task"], c["seed"]): c for c in there["cells"]}
    codes = {c["row"]: c["code"] for c in mine["cells"]}

    def gives_way(index: int, now: int) -> bool:
        """Whether a row that is there is all of other code than its namesake here: then a default may have changed."""
        return all(c.get("code") != codes.get(now) for c in cells.values() if c["row"] == index)

    if canonical(there["rows"][0]["method"]) != canonical(mine["rows"][0]["method"]) and not gives_way(0, 0):
        raise refuse(f'its base is "{there["rows"][0]["label"]}" with other settings')
    rows = list(there["rows"])
    place = {}
    for index, row in enumerate(mine["rows"]):
        # The base is the base, whatever it is called.
        same = [i for i, r in enumerate(rows) if r["label"] == row["label"]] if index else [0]
        if same and canonical(_what(rows[same[0]], there)) != canonical(_what(row, mine)):
            if not gives_way(same[0], index):
                raise refuse(f'row "{row["label"]}" is another method there')
            cells = {at: c for at, c in cells.items() if c["row"] != same[0]}
        if same:
            rows[same[0]] = row | {"label": rows[same[0]]["label"]}
        else:
            rows.append(row)
        place[index] = same[0] if same else len(rows) - 1
    asked = set()
    for c in mine["cells"]:
        moved = {**c, "row": place[c["row"]]}
        asked.add((moved["row"], moved["task"], moved["seed"]))
        cells[moved["row"], moved["task"], moved["seed"]] = moved
    for at, c in cells.items():
        if at not in asked:
            cells[at] = c | {"old": c.get("code") != code_of(rows[c["row"]]["method"], _task_of(c))}
    setups = {c["task"]: c["setup"] for c in mine["cells"]}
    stale = [c for c in cells.values() if c["setup"] != setups.get(c["task"], c["setup"])]
    if stale:
        label, task = rows[stale[0]["row"]]["label"], stale[0]["task"]
        raise refuse(
            f'{len(stale)} of its cells, such as row "{label}" on {task}, are of other data, another model or '
            "other versions of lrkit, torch or transformers, and cannot be compared with these"
        )
    tasks = {task["name"]: task for task in [*there["tasks"], *mine["tasks"]]}
    return mine | {
        "title": mine["title"] or there.get("title", ""),
        "note": mine["note"] or there.get("note", ""),
        "rows": rows,
        "tasks": list(tasks.values()),
        "seeds": sorted({*there["seeds"], *mine["seeds"]}),
        "cells": list(cells.values()),
        "costs": there.get("costs", []),
    }


def _task_of(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A task as `code_of` wants it. A folder's name may be a registered task's, but then its plug-in is not used."""
    from lrkit.registry import current

    known = cell["task"].partition("/")[0] in current().names("task")
    return {"task": cell["task"] if known else None}


def carry_out(
    plan: Plan,
    folder: Path,
    *,
    executor: Callable[[], Executor],
    conditions: Conditions,
    told: Told | None = None,
    started: Callable[[Sequence[Job], int], None] | None = None,
    keep_old: bool = False,
) -> Outcome:
    """Run what is missing of a study.

    Args:
        plan: the study.
        folder: its folder.
        executor: makes one; called again where workers died and took the pool with them.
        conditions: how cells run.
        told: called when a cell has ended.
        started: called with the cells to run, and how many there are in all.
        keep_old: keep cells that are done and of other code, instead of computing them again.

    Raises:
        LrkitError: something in the plan cannot run, or the folder holds something else. No step is spent then.
    """
    folder = Path(os.path.abspath(folder))
    steps: dict[tuple[str, str], int] = {}
    tasks = check(plan, steps)
    jobs = [attrs.evolve(job, steps=steps[job.label, job.task]) for job in jobs_of(plan)]
    jobs = with_old(jobs, folder, keep_old)
    done = {job.key for job in jobs if is_done(folder / "cells" / job.key)}
    waiting = {job.key: job for job in jobs if job.key not in done}
    total = len({job.key for job in jobs})
    first = executor() if waiting else None  # an executor that cannot be had is told before anything is written
    try:
        write_plan(plan, jobs, tasks, folder)
    except BaseException:
        if first is not None:
            first.shutdown(wait=False, cancel_futures=True)
        raise
    tell_damaged(folder, list(waiting))
    for key in done:
        tidy_done(folder / "cells" / key)
    if started is not None:
        started(list(waiting.values()), total)
    answers = {} if first is None else _run_all(waiting, folder, first, executor, conditions, told, total)
    names = {job.key: f"{job.label}, {job.task}, seed {job.seed}" for job in jobs}
    return Outcome(
        folder=folder,
        done=sum(has_result(folder / "cells" / job.key) for job in jobs),
        ran=sum(answer["status"] == "done" for answer in answers.values()),
        failed=tuple((names[k], str(a["error"])) for k, a in answers.items() if a["status"] == "failed"),
        busy=sum(answer["status"] == "busy" for answer in answers.values()),
    )


def _run_all(
    waiting: dict[str, Job],
    folder: Path,
    first: Executor,
    make: Callable[[], Executor],
    conditions: Conditions,
    told: Told | None,
    total: int,
) -> dict[str, Mapping[str, Any]]:
    """Every cell on the executor; a cell whose worker dies is tried again, from its checkpoint."""
    answers: dict[str, Mapping[str, Any]] = {}
    tries = dict.fromkeys(waiting, 0)
    plain = attrs.asdict(conditions)
    left = dict(waiting)
    pool, idle = first, 0
    while left:
        futures: dict[Future[Any], Job] = {}
        clean = False
        begun = {key: _begun(folder / "cells" / key) for key in left}
        cause: BaseException | None = None
        try:
            for key, job in left.items():
                futures[pool.submit(run_cell, job.cell.to_plain(), str(folder / "cells" / key), plain)] = job
            open_ = set(futures)
            while open_:
                ended, open_ = wait(open_, return_when=FIRST_COMPLETED)
                for future in ended:
                    job = futures[future]
                    key = job.key
                    error = future.exception()
                    if error is not None:
                        cause = error
                        # A pool whose worker died fails all that it held; what had not begun is not to blame.
                        innocent = isinstance(error, BrokenExecutor) and _begun(folder / "cells" / key) == begun[key]
                        tries[key] += not innocent
                        if tries[key] < _TRIES:
                            continue
                        line = f"its worker died {tries[key]} times ({line_of(error)})"
                        note_failure(folder / "cells" / key, line, line)
                        answer: Mapping[str, Any] = {"key": key, "status": "failed", "score": None, "error": line}
                    else:
                        answer = future.result()
                    answers[key] = answer
                    del left[key]
                    if told is not None:
                        told(job, answer, total - len(left), total)
            clean = True
        except BrokenExecutor as error:
            cause = error  # it broke while cells were handed in: what came back was told, the rest is tried again
        finally:
            pool.shutdown(wait=clean, cancel_futures=True)
        if left:
            # Cells that never begin cost no try, so rounds in which none does are counted.
            idle = 0 if any(_begun(folder / "cells" / key) > at for key, at in begun.items()) else idle + 1
            if idle == _TRIES:
                text = "" if cause is None else line_of(cause)
                raise LrkitError(f"the executor does not run cells: {text}")
            time.sleep(0.5)
            pool = make()
    return answers


def _begun(place: Path) -> int:
    try:
        return (place / "attempts.jsonl").stat().st_size
    except FileNotFoundError:
        return 0
