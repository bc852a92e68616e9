"""A study's folder as `lrkit ablate` writes it, with made-up numbers: deterministic, and free of torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MODULES = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
PRUNE = {"name": "prune"}
FREEZE = {"name": "freeze", "together": False}
Place = tuple[int, str, int]  # row, task, seed


def write_study(
    folder: Path,
    *,
    labels: Sequence[str] = ("adalora", "metric=magnitude", "scheduler=linear", "lora"),
    tasks: Sequence[str] = ("movies",),
    seeds: Sequence[int] = (0, 1, 2, 3, 4, 5),
    steps: int = 120,
    interval: int = 4,
    layers: int = 6,
    evaluate: int = 20,
    base: int = 0,
    score: Callable[[int, str, int], float] | None = None,
    missing: Collection[Place] = (),
    running: Collection[Place] = (),
    failed: Collection[Place] = (),
    diverged: Collection[Place] = (),
    costs: bool = True,
    title: str = "A made-up study",
    note: str = "Numbers from a random generator.",
    error: str = "RuntimeError: no memory left",
) -> Path:
    """Write a study. What a row does is in its label: "lora" adapts nothing, "aflora" and "freeze" freeze
    matrices (with "together" A and B of a layer at once), all others prune.

    Args:
        folder: made if it is not there.
        labels: the rows; the first is the base unless `base` says otherwise.
        interval: steps from one decision to the next.
        evaluate: steps from one evaluation to the next; 0 for none on the way.
        score: the final score of a cell; None for a made-up one.
        missing: cells that never began.
        running: cells that were begun: half the steps, a torn last line, no result.
        failed: cells that ended in an error.
        diverged: cells whose loss and score are NaN.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cells = [
        {"key": f"{row:02d}{t:02d}{seed:04d}cafe", "row": row, "task": task, "seed": seed, "code": "5ca1ab1e"}
        for row in range(len(labels))
        for t, task in enumerate(tasks)
        for seed in seeds
    ]
    _write(
        folder / "study.json",
        {
            "format": 1,
            "name": "made-up",
            "title": title,
            "note": note,
            "base": base,
            "rows": [_row(label, labels[base]) for label in labels],
            "tasks": [{"name": task, "metric": "accuracy", "majority": 0.52} for task in tasks],
            "model": "minilm",
            "targets": "all-linear",
            "seeds": list(seeds),
            "run": {"steps": steps, "batch_size": 32, "lr": None, "max_length": 128},
            "cells": cells,
            "costs": [
                {"key": f"{row:02d}{t:02d}c057", "row": row, "task": task}
                for row in range(len(labels))
                for t, task in enumerate(tasks)
            ],
        },
    )
    for cell in cells:
        place = (cell["row"], cell["task"], cell["seed"])
        if place in missing:
            continue
        state = next((s for s, places in (("running", running), ("failed", failed)) if place in places), "done")
        rng = np.random.default_rng([cell["row"], tasks.index(cell["task"]), cell["seed"]])
        value = score(*place) if score else _score(rng, cell["row"], tasks.index(cell["task"]), cell["seed"])
        _write_cell(
            folder / "cells" / cell["key"],
            cell,
            kind=_kind(labels[cell["row"]]),
            state=state,
            score=float("nan") if place in diverged else value,
            rng=rng,
            steps=steps,
            interval=interval,
            layers=layers,
            evaluate=evaluate,
            error=error,
        )
    if costs:
        (folder / "costs").mkdir(exist_ok=True)
        for r in range(len(labels)):
            for t, _ in enumerate(tasks):
                rng = np.random.default_rng([7, r, t])
                ratio, end, mem = (1.0, 1.0, 1.0) if r == base else rng.uniform((0.9, 0.8, 0.9), (1.25, 1.1, 1.2))
                cost = {
                    "key": f"{r:02d}{t:02d}c057",
                    "row_step_ratio": ratio,
                    "row_step_ratio_end": end,
                    "step_ms": 399.0 * ratio,
                    "base_step_ms": 399.0,
                    "peak_memory": int(1.4e9 * mem),
                    "base_peak_memory": int(1.4e9),
                    "threads": 2,
                    "device": "cpu",
                }
                _write(folder / "costs" / f"{cost['key']}.json", cost)
    return folder


def _kind(label: str) -> str:
    if label == "lora":
        return "lora"
    if "together" in label:
        return "together"
    return "freeze" if "freeze" in label or "aflora" in label else "prune"


def _row(label: str, base: str) -> dict[str, Any]:
    path, _, value = label.partition("=")
    changes = [{"path": path, "base": "sensitivity-uncertainty", "value": value}] if value else []
    if label != base and not changes:
        changes = [
            {"path": "parameterization", "base": "svd", "value": label},
            {"path": "parameterization.rank", "base": 12, "value": 8},
            {"path": "action", "base": PRUNE, "value": None},
        ]
    return {"label": label, "changes": [] if label == base else changes, "method": {"action": PRUNE, "also": []}}


def _score(rng: np.random.Generator, row: int, task: int, seed: int) -> float:
    of_seed = np.random.default_rng([99, task, seed]).normal(0.0, 0.006)
    return round(float(0.83 - 0.1 * task + of_seed - 0.006 * (row % 7) + rng.normal(0.0, 0.003)), 6)


def _write_cell(
    folder: Path,
    cell: dict[str, Any],
    *,
    kind: str,
    state: str,
    score: float,
    rng: np.random.Generator,
    steps: int,
    interval: int,
    layers: int,
    evaluate: int,
    error: str,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "config.json", {"format": 1, **cell, "run": {}, "versions": {"lrkit": "0.1.0", "torch": "2.13.0"}})
    _write(folder / "env.json", {"python": "3.11.7", "host": "desk", "device": "cpu", "threads": 1})
    reached = steps if state == "done" else steps // 2
    t = np.arange(1, reached + 1)
    losses = 0.25 + 0.45 * np.exp(-t / (0.35 * steps)) + 0.02 * (cell["row"] % 5) + rng.normal(0.0, 0.05, reached)
    if np.isnan(score):
        losses[reached // 3 :] = np.nan
    lines: list[dict[str, Any]] = []
    for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
        lines.append({"step": step, "loss": None if np.isnan(loss) else loss, "lr": 0.001, "seconds": 0.4})
        if evaluate and step % evaluate == 0:
            at = 0.5 + (0.33 if np.isnan(score) else score - 0.5) * (1 - np.exp(-4 * step / steps))
            lines.append({"step": step, "scores": {"accuracy": None if np.isnan(loss) else at + rng.normal(0, 0.004)}})
    _lines(folder / "metrics.jsonl", lines, torn=state == "running")
    names = [f"bert.encoder.layer.{i}.{module}" for i in range(layers) for module in MODULES]
    history: list[dict[str, Any]] = []
    ranks = dict.fromkeys(names, 8)
    froze: dict[str, int] = {}
    if kind == "prune":
        units = 8 * len(names)
        appeal = rng.uniform(0.2, 1.0, len(names)) * np.tile((0.6, 0.6, 1.1, 1.0, 0.9, 1.2), layers)
        for step in range(interval, reached + 1, interval):
            left = (1 - min(1.0, max(0.0, (step / steps - 0.1) / 0.7))) ** 3
            budget = int(units * (0.5 + 0.5 * left))
            share = np.minimum(8, np.round(appeal / appeal.sum() * budget)).astype(int)
            ranks = dict(zip(names, share.tolist(), strict=True))
            lost = [f"{names[0]}[{step % 8}]"]
            history.append(_decision(step, budget, budget, units, lost))
    elif kind in ("freeze", "together"):
        matrices = [f"{name}.{matrix}" for name in names for matrix in "AB"] if kind == "freeze" else names
        order = rng.permutation(len(matrices)).tolist()
        for step in range(interval, reached + 1, interval):
            budget = int(len(matrices) * (1 - min(1.0, max(0.0, (step / steps - 0.05) / 0.65))) ** 3)
            lost = [matrices[order.pop()] for _ in range(len(order) - budget)]
            froze |= dict.fromkeys(lost, step)
            history.append(_decision(step, budget, budget, len(matrices), lost))
    _lines(folder / "history.jsonl", history, torn=state == "running")
    attempts = [{"event": "begin", "time": "2026-11-22T08:00:00+00:00", "from_step": 0, "host": "desk", "pid": 4}]
    if state == "failed":
        last = error.strip().splitlines()[-1]
        attempts.append({"event": "failed", "time": "2026-11-22T08:10:00+00:00", "error": last})
        (folder / "error.txt").write_text(f'Traceback (most recent call last):\n  File "run.py", line 3\n{error}\n')
    if state == "done":
        attempts.append({"event": "end", "time": "2026-11-22T08:20:00+00:00", "step": steps})
    _lines(folder / "attempts.jsonl", attempts)
    if state != "done":
        return
    each = 2 * 384
    start = 8 * each if kind in ("prune", "lora") else 4 * each
    rows = []
    for name in names:
        frozen = [m for m in "AB" if f"{name}.{m}" in froze or name in froze]
        now = ranks[name] * each if kind == "prune" else start * (2 - len(frozen)) // 2
        rank = ranks[name] if kind == "prune" else start // each
        rows.append(
            {
                "name": name,
                "rank": rank,
                "initial_rank": start // each,
                "frozen": frozen,
                "start": start,
                "now": now,
                "average": (start + 2 * now) / 3,
            }
        )
    totals = {key: sum(row[key] for row in rows) for key in ("start", "now", "average")}
    work = 1e11 * (1 + 0.02 * cell["row"])
    _write(
        folder / "result.json",
        {
            "format": 1,
            "key": cell["key"],
            "scores": {"accuracy": None if np.isnan(score) else score, "f1": None if np.isnan(score) else score - 0.01},
            "majority": 0.52,
            "steps": steps,
            "parameters": {**totals, "beside": 0, "head": 1538, "step": steps, "coverage": None},
            "layers": rows,
            "flops": {"run": work * steps, "first_step": work, "last_step": work},
        },
    )


def _decision(step: int, budget: int, kept: int, units: int, lost: list[str]) -> dict[str, Any]:
    at = {"step": step, "policy": 0, "budget": budget, "kept": kept, "units": units}
    return {**at, "threshold": 1e-9, "lost": lost, "returned": []}


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data))


def _lines(path: Path, lines: Sequence[dict[str, Any]], torn: bool = False) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + ('{"step": 9' if torn else ""))
