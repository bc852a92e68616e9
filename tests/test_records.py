"""Reading a study's folder: whole, still running, and what is none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import attrs
import pytest
import studies

from lrkit import LrkitError
from lrkit.study.records import CellRecord, frame, read_study


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return studies.write_study(tmp_path / "study", seeds=(0, 1), steps=20, interval=5, evaluate=10, layers=2)


def cell(tmp_path: Path, **files: str) -> CellRecord:
    """A cell with files written out, `metrics` for metrics.jsonl and so on."""
    names = {"result": "result.json", "error": "error.txt"}
    for name, text in files.items():
        (tmp_path / names.get(name, f"{name}.jsonl")).write_text(text, encoding="utf-8")
    return CellRecord(key="k", row=0, task="movies", seed=0, folder=tmp_path)


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_finished_study_is_read(folder: Path) -> None:
    """Every cell, curve, decision and cost of a study that is done is there as its files say."""
    record = read_study(folder)
    assert [row.label for row in record.rows] == ["adalora", "metric=magnitude", "scheduler=linear", "lora"]
    assert record.rows[1].changes[0].path == "metric"
    assert record.counts == {"done": 8, "running": 0, "failed": 0, "missing": 0}
    (first, _) = record.cells_of(1)
    raw = json.loads((folder / "cells" / first.key / "result.json").read_text())
    assert first.result is not None
    assert attrs.asdict(first.result.parameters) == raw["parameters"]
    assert first.score == raw["scores"]["accuracy"]
    assert [layer.name for layer in first.result.layers] == [layer["name"] for layer in raw["layers"]]
    assert [step for step, _ in first.losses] == list(range(1, 21))
    assert [step for step, _ in first.evaluations] == [10, 20]
    assert [d.step for d in first.decisions] == [5, 10, 15, 20]
    assert record.costs[0, "movies"].step_ratio == 1.0


def test_running_study_is_read(tmp_path: Path) -> None:
    """Cells that are missing, running or failed are told apart, and a torn last line is no step."""
    folder = studies.write_study(
        tmp_path / "s",
        labels=["a", "b"],
        seeds=(0, 1),
        steps=20,
        missing=[(0, "movies", 1)],
        running=[(1, "movies", 0)],
        failed=[(1, "movies", 1)],
        costs=False,
        error="ValueError: no\nlrkit.errors.LrkitError: the last line counts",
    )
    done, missing, running, failed = read_study(folder).cells
    assert [c.status for c in (done, missing, running, failed)] == ["done", "missing", "running", "failed"]
    assert running.steps == 10  # the torn last line is no step
    assert running.result is None
    assert running.score is None
    assert failed.error_line == "lrkit.errors.LrkitError: the last line counts"
    assert failed.error.startswith("Traceback")
    assert read_study(folder).costs == {}


def test_last_line_counts(tmp_path: Path) -> None:
    """A resumed run repeats steps: of several lines for a step the last one counts."""
    metrics = lines(
        {"step": 2, "loss": 0.8},
        {"step": 1, "loss": 0.9},
        {"step": 2, "scores": {"accuracy": 0.5}},
        {"step": 3, "loss": 0.7},
    )
    resumed = lines({"step": 2, "loss": 0.81}, {"step": 2, "scores": {"accuracy": 0.6}}, {"step": 3, "loss": None})
    record = cell(
        tmp_path, metrics=metrics + '{"step": 4, "lo\n[1]\nnonsense\n{"loss": 1.0}\n' + resumed + '{"step": 4, '
    )
    assert record.losses[:2] == ((1, 0.9), (2, 0.81))
    assert record.losses[2][0] == 3
    assert math.isnan(record.losses[2][1])
    assert record.evaluations == ((2, {"accuracy": 0.6}),)
    assert record.status == "running"


def test_last_decision_counts(tmp_path: Path) -> None:
    """Of several decisions of a policy after one step the last one counts, and lines of something else are passed over."""

    def at(step: int, policy: int, kept: int) -> dict[str, Any]:
        return {"step": step, "policy": policy, "budget": 9, "kept": kept, "units": 10, "lost": ["x\u2028[0]"]}

    history = lines(at(2, 1, 7), at(1, 0, 9), at(2, 0, 8), at(2, 0, 6)) + '{"step": 3, "policy": 0}\n{"step": 3'
    found = cell(tmp_path, history=history).decisions
    assert [(d.step, d.policy, d.kept) for d in found] == [(1, 0, 9), (2, 0, 6), (2, 1, 7)]
    assert found[0].lost == ("x\u2028[0]",)


BEGIN = {"event": "begin", "time": "t", "from_step": 0}
FAILED = {"event": "failed", "time": "t", "error": "one line"}


@pytest.mark.parametrize(
    ("attempts", "error", "status"),
    [
        ([BEGIN], "", "running"),
        ([BEGIN, FAILED], "Traceback\nOSError: x", "failed"),
        ([BEGIN, FAILED, BEGIN], "Traceback\nOSError: x", "running"),  # tried again
        ([BEGIN, FAILED], "", "failed"),
        ([], "OSError: x", "failed"),
        ([], "", "missing"),
    ],
)
def test_status_of_attempts(tmp_path: Path, attempts: list[Any], error: str, status: str) -> None:
    """A cell's status is that of its last attempt, and its error that attempt's."""
    record = cell(tmp_path, attempts=lines(*attempts) + '{"event": "fa', error=error)
    assert record.status == status
    if status == "failed":
        assert record.error_line == ("OSError: x" if error else "one line")


def test_cells_read_lazily(folder: Path) -> None:
    """A damaged cell is told when it is asked for, and not when the study is opened."""
    key = read_study(folder).cells[0].key
    path = folder / "cells" / key / "result.json"
    path.write_text('{"format": 1, "scores": {}')
    record = read_study(folder)
    with pytest.raises(LrkitError, match="is not a result: it holds no JSON"):
        record.cells[0].status
    path.unlink()
    assert read_study(folder).cells[0].status == "running"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 2}, "of format 2, and this lrkit reads up to 1"),
        ({"scores": {}}, "holds no score"),
        ({"steps": "9"}, "result.steps"),
        ({"parameters": None}, "result.parameters"),
    ],
)
def test_bad_results_refused(folder: Path, change: dict[str, Any], told: str) -> None:
    """A result.json that is something else is refused in one line that names the path."""
    path = folder / "cells" / read_study(folder).cells[0].key / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(LrkitError) as caught:
        read_study(folder).cells[0].result
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "holds no JSON"),
        ("\xff", "holds no JSON"),
        ("[]", "a JSON list, not an object"),
        ({"x": 1}, 'no "format" number'),
        ({"format": 7}, "of format 7, and this lrkit reads up to 1"),
        ({"rows": []}, "no rows"),
        ({"rows": None}, "study.rows"),
        ({"base": 9}, "base 9 is not one of its 4 rows"),
        ({"cells": [{"key": "../up", "row": 0, "task": "movies", "seed": 0}]}, "'../up' is no key"),
        ({"cells": [{"key": "a", "row": 4, "task": "movies", "seed": 0}]}, "of row 4, and there are 4"),
        ({"cells": [{"key": "a", "row": 0, "task": "rte", "seed": 0}]}, "task 'rte', which is none of its tasks"),
        ({"cells": [{"key": k, "row": 0, "task": "movies", "seed": 0} for k in "ab"]}, "there twice"),
        ({"cells": [{"key": "a", "row": 0, "task": "movies", "seed": "0"}]}, "study.cells[0].seed"),
    ],
)
def test_bad_studies_refused(folder: Path, content: Any, told: str) -> None:
    """A study.json that is something else, or at odds with itself, is refused in one line with its path."""
    path = folder / "study.json"
    if isinstance(content, str):
        path.write_bytes(content.encode("latin-1"))
    elif content == {"x": 1}:
        path.write_text(json.dumps(content))
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    with pytest.raises(LrkitError) as caught:
        read_study(folder)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_study_there(tmp_path: Path) -> None:
    """A folder without a study, and no folder at all, are told apart."""
    with pytest.raises(LrkitError, match="holds no study"):
        read_study(tmp_path)
    with pytest.raises(LrkitError, match="is no folder"):
        read_study(tmp_path / "nowhere")


def test_costs_may_be_missing(folder: Path) -> None:
    """A cost that is not measured, or could not be, is no error of the study."""
    paths = sorted((folder / "costs").iterdir())
    paths[1].write_text('{"error": "no memory\\nleft"}')
    paths[2].write_text('{"row_st')
    paths[3].unlink()
    costs = read_study(folder).costs
    assert sorted(costs) == [(0, "movies"), (1, "movies"), (2, "movies")]
    assert costs[1, "movies"].error == "no memory left"
    assert costs[1, "movies"].step_ratio is None
    assert "no JSON" in costs[2, "movies"].error


def test_frame_of_cells(tmp_path: Path) -> None:
    """The frame has one line per cell, with its scores, parameters and error."""
    folder = studies.write_study(
        tmp_path / "s",
        labels=["a", "b"],
        seeds=(3, 4),
        steps=20,
        missing=[(0, "movies", 4)],
        diverged=[(1, "movies", 3)],
        failed=[(1, "movies", 4)],
    )
    table = frame(read_study(folder))
    assert table[["row", "seed", "status"]].values.tolist() == [
        ["a", 3, "done"],
        ["a", 4, "missing"],
        ["b", 3, "done"],
        ["b", 4, "failed"],
    ]
    assert table["score"].isna().tolist() == [False, True, True, True]
    raw = json.loads((folder / "cells" / table["key"][0] / "result.json").read_text())
    first = table.iloc[0]
    assert first["score"] == first["scores.accuracy"] == raw["scores"]["accuracy"]
    assert first["scores.f1"] == raw["scores"]["f1"]
    assert [first[f"parameters.{name}"] for name in ("start", "now", "average")] == [
        raw["parameters"][name] for name in ("start", "now", "average")
    ]
    assert first["flops"] == raw["flops"]["run"]
    assert table["steps"].tolist() == [20, 0, 20, 10]
    assert table["error"].tolist() == ["", "", "", "RuntimeError: no memory left"]


def test_frame_without_cells(folder: Path) -> None:
    """The frame of a study without cells has its columns and no line."""
    path = folder / "study.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cells": []}))
    table = frame(read_study(folder))
    assert len(table) == 0
    assert list(table.columns[:5]) == ["row", "task", "seed", "status", "score"]
