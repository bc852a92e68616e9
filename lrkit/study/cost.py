"""Measure the cost of a row against the base: whole steps interleaved in one process, and that process's peak memory.

Each row is measured in a process of its own, after the cells, while nothing else of the study runs. A whole step is
forward, penalty, backward, clipping, the optimizer and the method's own work. For example, a ratio of 1.2 says that a
step of the row takes a fifth longer than a step of the base on the same batch.
"""

import copy
import itertools
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.compose import from_plain
from lrkit.errors import LrkitError, LrkitWarning
from lrkit.study.cell import Cell
from lrkit.study.cell_folder import is_packed
from lrkit.study.jobs import cell_of
from lrkit.study.plan import Plan, Row
from lrkit.study.run_settings import attach_settings, settings_from, total_steps
from lrkit.study.store import digest_of, lock, read_json, write_json
from lrkit.study.study_file import CostEntry, StudyFile, read_study_file, write_study_file
from lrkit.study.task_spec import TaskSpec, load_task_of

if TYPE_CHECKING:
    from lrkit.adapt.adapted import Adapted
    from lrkit.tasks import Objective

WARM, PAIRS = 2, 7


def measure(plan: Plan, folder: Path, *, threads: int, told: Callable[[str], None] | None = None) -> None:
    """Measure every row that was not measured yet, and note it in ``study.json``. A row that cannot be measured says why.

    Args:
        plan: the study.
        folder: its folder; the trained adapters of the first seed give the state at the end of training.
        threads: CPU threads.
        told: called with a row's label before it is measured.
    """
    (folder / "costs").mkdir(exist_ok=True)
    with lock(folder / "costs" / "lock") as mine:
        if mine:
            _measure_all(plan, folder, threads, told)
        else:  # two at once would measure each other
            warnings.warn(f"another process measures the costs of {folder}: go on later", LrkitWarning, stacklevel=3)


def _measure_all(plan: Plan, folder: Path, threads: int, told: Callable[[str], None] | None) -> None:
    study = _study_in(folder)
    labels = [row.label for row in study.rows]
    known = {(cost.row, cost.task): cost.key for cost in study.costs}
    tuned = study.tune is not None
    trained = {(c.row, c.task): c.key for c in reversed(study.cells) if c.tuned == tuned}
    mine: dict[tuple[str, str], str] = {}
    for number, (spec, row) in enumerate(itertools.product(plan.tasks, plan.rows), start=1):
        index = 0 if row is plan.rows[0] else labels.index(row.label)
        there = known.get((index, spec.name))
        # A row whose cells were taken in from a pack keeps the cost that was measured where they were computed.
        if (
            there
            and is_packed(folder / "cells" / trained.get((index, spec.name), ""))
            and _is_measured(folder / "costs" / f"{there}.json")
        ):
            mine[row.label, spec.name] = there
            continue
        base_cell, own_cell = (
            _settled(plan, each, spec, trained.get((place, spec.name)), folder)
            for each, place in ((plan.rows[0], 0), (row, index))
        )
        key = digest_of([base_cell.key, own_cell.key, threads])
        mine[row.label, spec.name] = known[index, spec.name] = key
        path = folder / "costs" / f"{key}.json"
        if not _is_measured(path):
            if told is not None:
                told(f"{row.label}, {spec.name} ({number} of {len(plan.tasks) * len(plan.rows)})")
            states = [trained.get((i, spec.name)) for i in (0, index)]
            sides = {"base": base_cell.to_plain(), "row": own_cell.to_plain()}
            asked = {**sides, "threads": threads, "trained": states}
            _in_own_process(asked, folder, path, key)
    _add_base_memory(folder / "costs", known)
    with lock(folder / "study.lock", wait=True):
        # It may have grown meanwhile: only the costs are ours to write.
        study = _study_in(folder)
        labels = [row.label for row in study.rows]
        costs = {(cost.row, cost.task): cost for cost in study.costs}
        for (label, task), key in mine.items():
            place = 0 if label == plan.rows[0].label else labels.index(label)
            costs[place, task] = CostEntry(key=key, row=place, task=task)
        write_study_file(folder, attrs.evolve(study, costs=tuple(costs.values())))


def _settled(plan: Plan, row: Row, spec: TaskSpec, trained: str | None, folder: Path) -> Cell:
    """Return a row's cell: as it was trained if it needs other cells and was, and else as it is planned."""
    needs = plan.study.tune is not None or row.control is not None
    config = read_json(folder / "cells" / trained / "config.json") if needs and trained else None
    return Cell.from_config(config) if config else cell_of(plan, row, spec, plan.seeds[0])


def _study_in(folder: Path) -> StudyFile:
    study = read_study_file(folder)
    if study is None:
        raise LrkitError(f"{folder} holds no study.json any more")
    return study


def _is_measured(path: Path) -> bool:
    return "error" not in (read_json(path) or {"error": "no such file"})


def _add_base_memory(costs: Path, known: Mapping[tuple[int, str], str]) -> None:
    """Add the base row's peak memory to the files of all rows that were measured."""
    paths = {place: costs / f"{key}.json" for place, key in known.items()}
    for (_, task), path in paths.items():
        base = paths.get((0, task))
        if base is not None and _is_measured(path) and _is_measured(base):
            write_json(path, {**read_json(path), "base_peak_memory": read_json(base)["peak_memory"]})


def _in_own_process(asked: Mapping[str, Any], folder: Path, path: Path, key: str) -> None:
    """Measure a row in a process that has done nothing else, and write its file."""
    request = path.with_suffix(".request.json")
    write_json(request, asked)
    command = [sys.executable, "-m", "lrkit.study.cost", str(request), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    request.unlink(missing_ok=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        error = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        write_json(path, {"key": key, "error": error})
        return
    write_json(path, {"key": key, **json.loads(lines[-1])})


class _Side:
    """One of the two that are compared: a model, its adapters, an optimizer, and the steps it takes."""

    def __init__(
        self,
        net: Any,
        cell: Mapping[str, Any],
        steps: int,
        state: Path | None,
        device: Any,
        objective: "Objective | None",
        batches: Iterator[dict[str, Any]],
    ) -> None:
        import torch

        from lrkit.adapt import checkpoint
        from lrkit.adapt.adapted import attach
        from lrkit.loop import beginning

        torch.manual_seed(0)
        self.net, self.objective = net.to(device), objective
        where = {"targets": cell["targets"], "train_also": cell["train_also"], **attach_settings(cell["run"])}
        self.adapted: Adapted = attach(net, from_plain(cell["method"]), **where)
        if state is not None:
            self.adapted.load_state_dict(checkpoint.read(state))
        self.optimizer = torch.optim.AdamW(self.adapted.parameters(), lr=1e-5)
        self.clip, self.device = cell["run"]["grad_clip"], device
        self.bf16 = cell["run"]["bf16"]
        if beginning.batches(self.adapted.controller):
            self.adapted.calibrate(beginning.taken(self.adapted.controller, batches), self._loss)
        self.adapted.bind(self.optimizer, total_steps=steps)

    def _loss(self, batch: Mapping[str, Any]) -> Any:
        import torch

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.net(**batch).loss if self.objective is None else self.objective.loss(self.net, batch)[0]

    def step(self, batch: Mapping[str, Any]) -> float:
        """Take one whole step, and return its seconds."""
        import torch

        self._settle()
        begin = time.perf_counter()
        (self._loss(batch) + self.adapted.penalty()).backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_([p for p in self.adapted.parameters() if p.grad is not None], self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._settle()
        return time.perf_counter() - begin

    def _settle(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _measure(asked: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    import torch

    from lrkit.study.loading import loading_from
    from lrkit.study.pretrained import load_model
    from lrkit.tasks.asking import taken_by

    torch.set_num_threads(asked["threads"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base, row = asked["base"], asked["row"]
    settings, task = settings_from(row["run"]), load_task_of(TaskSpec(**row["task"]))
    net, tokenizer = load_model(row["model"], task.head, loading_from(row["loading"]))
    net.train()
    used = task.subset(settings.train_rows, 1, settings.seed)
    known = task.by_row or settings.steps is not None
    length = len(used.train if known else used.examples(tokenizer, settings.max_length, training=True))
    steps = total_steps(settings, length)
    few = task.subset((WARM + PAIRS) * settings.batch_size, 1)
    rows = few.examples(tokenizer, settings.max_length, training=True)
    rows = rows.select_columns(taken_by(net, rows.column_names))
    collate = few.collator(tokenizer, training=True)
    objective = task.objective(net, lambda n: collate([rows[i] for i in range(min(n, len(rows)))]), settings.seed)

    def batches() -> Iterator[dict[str, Any]]:
        while True:
            for start in range(0, len(rows), settings.batch_size):
                chosen = rows.select(range(start, min(start + settings.batch_size, len(rows))))
                yield {key: value.to(device) for key, value in collate(list(chosen)).items()}

    alone = _Side(copy.deepcopy(net), row, steps, None, device, objective, batches())
    ahead = batches()
    seconds = [alone.step(next(ahead)) for _ in range(WARM + 1)]
    answer: dict[str, Any] = {
        "step_ms": seconds[-1] * 1000,
        "peak_memory": _peak(device),
        "threads": asked["threads"],
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "row_step_ratio": 1.0,
        "row_step_ratio_end": None,
        "base_step_ms": seconds[-1] * 1000,
    }
    same = _stepped(base) == _stepped(row)
    if not same:
        sides = [_Side(copy.deepcopy(net), base, steps, None, device, objective, batches()), alone]
        answer |= dict(zip(("row_step_ratio", "base_step_ms", "step_ms"), _pairs(sides, batches()), strict=True))
    states = [None if key is None else folder / "cells" / key / "lrkit.safetensors" for key in asked["trained"]]
    if all(state is not None and state.is_file() for state in states):
        ends = [
            _Side(copy.deepcopy(net), cell, steps, state, device, objective, batches())
            for cell, state in zip((base, row), states, strict=True)
        ]
        if any(side.adapted.summary().now != side.adapted.summary().start for side in ends):
            answer["row_step_ratio_end"] = 1.0 if same else _pairs(ends, batches())[0]
    return answer


def _stepped(cell: Mapping[str, Any]) -> list[Any]:
    """Return all of a cell that a step's time can depend on."""
    run = {**cell["run"], "seed": None, "lr": None, "head_lr": None}
    return [cell["method"], cell["targets"], cell["train_also"], run]


def _pairs(sides: list[_Side], batches: Iterator[dict[str, Any]]) -> tuple[float, float, float]:
    """Return the median ratio of paired steps (second to first), and each one's median in ms. They take turns to begin."""
    times: list[tuple[float, float]] = []
    for index in range(WARM + PAIRS):
        batch = next(batches)
        order = (0, 1) if index % 2 else (1, 0)
        took = {side: sides[side].step(batch) for side in order}
        times.append((took[0], took[1]))
    first, second = zip(*times[WARM:], strict=True)
    ratio = statistics.median(b / a for a, b in times[WARM:])
    return ratio, statistics.median(first) * 1000, statistics.median(second) * 1000


def _peak(device: Any) -> int:
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes, except on a Mac


def _main(request: str, folder: str) -> None:
    warnings.simplefilter("ignore")
    try:
        answer = _measure(read_json(Path(request)), Path(folder))
    except LrkitError as error:
        sys.exit(str(error))
    print(json.dumps(answer))  # noqa: T201 (the answer to the process that asked)


if __name__ == "__main__":
    _main(*sys.argv[1:])
