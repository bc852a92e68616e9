"""A study's files: one class for what is written and what is read back, and each file replaced in one move."""

import csv
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import hypothesis.strategies as st
import pytest
from hypothesis import given
from older import told

import lrkit
from lrkit.adapt import checkpoint
from lrkit.adapt.summary import LayerSummary
from lrkit.loop.history import Decision
from lrkit.moves import replacing
from lrkit.strict import strict_converter, structured
from lrkit.study.files import CellResult, Parameters, RunFlops, decision_in, read_result
from lrkit.study.records import frame, read_study
from lrkit.study.statistics import compare
from lrkit.study.store import Lines, read_lines, write_bytes, write_json
from lrkit.study.study_file import (
    CellEntry,
    ChangeRecord,
    CostEntry,
    RowRecord,
    StudyFile,
    TaskRecord,
    read_study_file,
    write_study_file,
)
from lrkit.study.tuned import lr_of

SPECIMENS = Path(__file__).parent / "specimens"

# ---- written and read back -------------------------------------------------------------------------------------------

whole = st.integers(0, 10**9)
real = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
texts = st.lists(text, max_size=3).map(tuple)
plain = st.dictionaries(text, st.one_of(st.none(), whole, real, text, st.booleans()), max_size=3)

decisions = st.builds(
    Decision, whole, whole, whole, whole, whole, threshold=st.none() | real, lost=texts, returned=texts, fresh=texts
)
layers = st.builds(
    LayerSummary, text, st.none() | whole, st.none() | whole, frozen=texts, start=whole, now=whole, average=real
)
parameters = st.builds(
    Parameters,
    start=whole,
    now=whole,
    average=real,
    beside=whole,
    head=whole,
    step=whole,
    coverage=st.none() | plain,
)
results = st.builds(
    CellResult,
    scores=st.dictionaries(text, real, min_size=1, max_size=3),
    majority=st.none() | real,
    steps=whole,
    parameters=parameters,
    layers=st.lists(layers, max_size=3).map(tuple),
    flops=st.none() | st.builds(RunFlops, run=real, first_step=real, last_step=real),
)
rows = st.builds(
    RowRecord,
    label=text,
    changes=st.lists(st.builds(ChangeRecord, path=text, base=whole, value=text), max_size=2).map(tuple),
    method=plain,
    run=plain,
    rates=st.dictionaries(text, st.dictionaries(st.sampled_from(["lr", "head_lr"]), real), max_size=2),
    targets=st.none() | text | st.lists(text, max_size=2),
    train_also=st.none() | text,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@given(listed=st.lists(decisions, max_size=4))
def test_decisions_come_back(place: Path, listed: list[Decision]) -> None:
    """A line of history.jsonl is the decision that was written."""
    path = place / "history.jsonl"
    path.unlink(missing_ok=True)
    lines = Lines(path)
    for decision in listed:
        lines.write(attrs.asdict(decision))
    lines.close()
    assert [decision_in(line) for line in read_lines(path)] == listed


@given(result=results)
def test_results_come_back(place: Path, result: CellResult) -> None:
    """A result.json is the result that was written."""
    write_json(place / "result.json", result.to_file("0123"))
    assert read_result(place / "result.json") == result


@given(
    given_rows=st.lists(rows, min_size=1, max_size=3),
    run=plain,
    seeds=st.lists(whole, unique=True, max_size=3),
    old=st.booleans(),
)
def test_studies_come_back(
    place: Path, given_rows: list[RowRecord], run: dict[str, Any], seeds: list[int], old: bool
) -> None:
    """A study.json is the study that was written."""
    study = StudyFile(
        name="s",
        title="t",
        note="n",
        base=len(given_rows) - 1,
        rows=tuple(given_rows),
        tasks=(TaskRecord(name="rte", metric="accuracy", majority=0.5),),
        model="minilm",
        targets=["query"],
        train_also=["classifier"],
        seeds=tuple(seeds),
        run=run,
        cells=tuple(
            CellEntry(key=f"c{seed}", row=0, task="rte", seed=seed, setup="x", code="y", old=old) for seed in seeds
        ),
        costs=(CostEntry(key="k", row=0, task="rte"),),
    )
    write_study_file(place, study)
    assert read_study_file(place) == study


def test_diverged_scores_are_null(tmp_path: Path) -> None:
    """JSON has no NaN: it is written as null, and null is read as NaN."""
    numbers = Parameters(start=1, now=1, average=1.0, head=1, step=1)
    result = CellResult(scores={"accuracy": math.nan}, steps=1, parameters=numbers)
    write_json(tmp_path / "result.json", result.to_file("0123"))
    assert json.loads((tmp_path / "result.json").read_text())["scores"] == {"accuracy": None}
    back = read_result(tmp_path / "result.json")
    assert back is not None and math.isnan(back.score)


# ---- studies of an earlier lrkit -------------------------------------------------------------------------------------


def as_plain(value: Any) -> Any:
    """Plain data with None for NaN, as the specimen has it."""
    return json.loads(json.dumps(value).replace("NaN", "null"))


def test_old_studies_read_the_same() -> None:
    """A folder that lrkit wrote before these classes is read as that lrkit read it, number by number."""
    expected = json.loads((SPECIMENS / "study_as_read.json").read_text())
    record = read_study(SPECIMENS / "study")
    found: dict[str, Any] = {"title": record.title, "cells": []}
    found["rows"] = [
        [row.label, lr_of(record, n, record.tasks[0].name), [[c.path, c.base, c.value] for c in row.changes]]
        for n, row in enumerate(record.rows)
    ]
    found["tasks"] = [[task.name, task.metric, task.majority] for task in record.tasks]
    for cell in record.cells:
        result = cell.result
        assert result is not None and result.flops is not None
        p, f = result.parameters, result.flops
        found["cells"].append(
            {
                "key": cell.key,
                "status": cell.status,
                "scores": result.scores,
                "steps": result.steps,
                "majority": result.majority,
                "parameters": [p.start, p.now, p.average, p.head, p.step],
                "flops": [f.run, f.first_step, f.last_step],
                "layers": [
                    [x.name, x.rank, x.initial_rank, list(x.frozen), x.start, x.now, x.average] for x in result.layers
                ],
                "attempts": [[a.event, a.time, a.step, a.error] for a in cell.attempts],
                "losses": cell.losses,
                "evaluations": cell.evaluations,
                "decisions": [
                    [d.step, d.policy, d.budget, d.kept, d.units, d.before, d.lost, d.returned, d.fresh]
                    for d in cell.decisions
                ],
            }
        )
    found["costs"] = [
        [*place, c.step_ratio, c.step_ratio_end, c.step_ms, c.base_step_ms, c.peak_memory, c.base_peak_memory, *machine]
        for place, c in record.costs.items()
        for machine in [(c.device, c.threads, c.error)]
    ]
    found["frame"] = frame(record).to_csv(index=False)
    was = list(csv.DictReader(io.StringIO(expected.pop("csv"))))
    now = list(csv.DictReader(io.StringIO(compare(record).to_csv())))
    for old, new in zip(was, now, strict=True):  # more columns and notes, after the old ones
        assert new.pop("notes").startswith(old.pop("notes"))
        assert {key: new[key] for key in old} == old
    assert as_plain(found) == expected


def test_old_files_are_written_the_same(tmp_path: Path) -> None:
    """Each file of that folder is written back with every key and value that it has, in their order."""

    def same(written: Path, old: Path) -> None:
        new, before = (json.loads(path.read_text()) for path in (written, old))
        assert json.dumps(told(before, new)) == json.dumps(before)

    study = read_study_file(SPECIMENS / "study")
    assert study is not None
    write_study_file(tmp_path, study)
    same(tmp_path / "study.json", SPECIMENS / "study" / "study.json")
    for cell in study.cells:
        path = SPECIMENS / "study" / "cells" / cell.key / "result.json"
        result = read_result(path)
        assert result is not None
        write_json(tmp_path / "result.json", result.to_file(cell.key))
        same(tmp_path / "result.json", path)


def test_missing_keys_have_defaults(tmp_path: Path) -> None:
    """A study from before a key was written has what was always so, and its cells are of other code."""
    plain_study = json.loads((SPECIMENS / "study" / "study.json").read_text())
    for key in ("train_also", "note", "costs"):
        del plain_study[key]
    for row in plain_study["rows"]:
        for key in ("run", "rates", "targets", "train_also"):
            del row[key]
    for cell in plain_study["cells"]:
        for key in ("setup", "code", "old"):
            del cell[key]
    (tmp_path / "study.json").write_text(json.dumps(plain_study))
    study = read_study_file(tmp_path)
    assert study is not None
    assert (study.train_also, study.note, study.costs) == ("auto", "", ())
    assert all((row.rates, row.targets, row.train_also) == ({}, None, None) for row in study.rows)
    assert all(cell.old for cell in read_study(tmp_path).cells)


# ---- strictness ------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Leaf:
    kept: int
    name: str = ""
    share: float | None = None


@attrs.frozen(kw_only=True)
class Tree:
    history: tuple[Leaf, ...] = ()
    rates: dict[str, dict[str, float]] = attrs.field(factory=dict)
    final: bool = False


WRONG = {
    "text for number": ({"history": [{"kept": 1}, {"kept": "2"}]}, "history[1].kept must be a whole number, not '2'"),
    "half a unit": ({"history": [{"kept": 1.5}]}, "history[0].kept must be a whole number, not 1.5"),
    "true is no number": ({"history": [{"kept": True}]}, "history[0].kept must be a whole number, not True"),
    "number for text": ({"history": [{"kept": 1, "name": 3}]}, "history[0].name must be a text, not 3"),
    "text for share": ({"history": [{"kept": 1, "share": "x"}]}, "history[0].share must be a number, not 'x'"),
    "missing": ({"history": [{}]}, "history[0].kept is missing"),
    "no list": ({"history": "abc"}, "history must be a list, not 'abc'"),
    "no table": ({"history": [3]}, "history[0] must be a table, not 3"),
    "number for key": ({"rates": {3: {}}}, "rates must have texts as keys, not 3"),
    "inside tables": ({"rates": {"rte": {"lr": "1"}}}, "rates.rte.lr must be a number, not '1'"),
    "number for flag": ({"final": 1}, "final must be true or false, not 1"),
    "nothing at all": ([], "must be a table, not []"),
    "unknown key": (
        {"histori": []},
        'there is no key "histori" (did you mean "history"?); there are history, rates, final',
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_path(case: str) -> None:
    """One line says which value does not fit, and what it must be."""
    data, told = WRONG[case]
    with pytest.raises(lrkit.LrkitError) as caught:
        structured(data, Tree, strict_converter(forbid_extra_keys=True))
    assert str(caught.value) == told


def test_unknown_keys_are_passed_over() -> None:
    """A file of a later lrkit with one more key is read, unless keys are forbidden."""
    assert structured({"more": 1}, Tree, strict_converter()) == Tree()


# ---- one move --------------------------------------------------------------------------------------------------------


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_new_files_obey_the_umask(tmp_path: Path) -> None:
    """A study's file and a checkpoint have the permissions that this process gives to any new file."""
    (tmp_path / "usual").write_text("")
    write_bytes(tmp_path / "study.json", b"{}")
    state = checkpoint.write(tmp_path, {"meta": {}, "tensors": {}})
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "usual", tmp_path / "study.json", state)}
    assert len(set(modes.values())) == 1, modes
    assert modes["usual"] & 0o777 == 0o640


def test_a_failure_keeps_the_old_file(tmp_path: Path) -> None:
    """If the block raises, the old file stays and no draft is left."""
    path = tmp_path / "study.json"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as draft:
            draft.write_text("ne")
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["study.json"]
    assert path.read_text() == "old"


def test_a_draft_is_on_disk_before_it_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft is flushed to the disk, and only then takes the file's name."""
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real_call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=real_call: (calls.append(n), f(*a))[1])
    write_bytes(tmp_path / "a", b"new")
    assert calls == ["fsync", "replace"]
    assert (tmp_path / "a").read_bytes() == b"new"


# ---- imports ---------------------------------------------------------------------------------------------------------


def imported(*modules: str) -> set[str]:
    """The modules that a new process has after importing some."""
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "modules",
    [
        ("lrkit.loop.history", "lrkit.moves", "lrkit.strict"),
        ("lrkit.study.files", "lrkit.study.study_file", "lrkit.study.store"),
        ("lrkit.study.records", "lrkit.study.statistics", "lrkit.study.table"),
        ("lrkit.study.run_settings", "lrkit.study.checkpoints", "lrkit.study.cell_folder"),
    ],
    ids=["core", "files", "readers", "writers"],
)
def test_reading_needs_no_torch(modules: tuple[str, ...]) -> None:
    """A study's folder is read, and compared, without torch, transformers, numpy or pandas."""
    assert not {"torch", "transformers", "numpy", "pandas"} & imported(*modules)


READERS = {"comparison", "records", "report", "results", "statistics", "table", "texts"}


def test_writers_do_not_read() -> None:
    """The side that trains imports nothing of the side that reads results and compares them."""
    found = imported("lrkit.study.worker", "lrkit.study.trainer", "lrkit.study.recorder", "lrkit.study.execute")
    assert not {f"lrkit.study.{name}" for name in READERS} & found
