"""Study files: what becomes rows, and what is told of a file that is wrong."""

import contextlib
import re
import tomllib

import attrs
import folders
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings

import lrkit
from lrkit.cli import main
from lrkit.study import records
from lrkit.study.ablate import _study
from lrkit.study.catalogue import shipped, text_of
from lrkit.study.plan import RowSpec, Study, TaskSpec, changes, lay_out, read_study, study_from


def labels(plain):
    return [row.label for row in lay_out(study_from(plain)).rows]


def test_swaps_one_by_one():
    """Each value of a swap is a row by itself, after the base."""
    plain = {"base": "adalora", "swap": {"metric": ["sensitivity", "magnitude"], "scheduler": ["linear"]}}
    assert labels(plain) == ["adalora", "metric=sensitivity", "metric=magnitude", "scheduler=linear"]


def test_grid_of_combinations():
    """A grid has every combination of its values, and the base once."""
    plain = {
        "base": "adalora",
        "grid": True,
        "swap": {"metric": ["sensitivity-uncertainty", "magnitude"], "scheduler": ["cubic", "linear"]},
    }
    assert labels(plain) == [
        "adalora",
        "metric=sensitivity-uncertainty, scheduler=linear",
        "metric=magnitude, scheduler=cubic",
        "metric=magnitude, scheduler=linear",
    ]


def test_swap_changes_one_thing():
    """A row differs from the base in the settings that it names, and in nothing else."""
    plan = lay_out(
        study_from(
            {
                "base": "adalora",
                "set": {"rank": 6, "target_rank": 3, "metric.beta1": 0.5},
                "swap": {
                    "metric": [{"name": "sensitivity", "smoothed": True}],
                    "action.ties": ["threshold"],
                    "target_rank": [2],
                },
                "leave_out": ["penalty", "policy"],
                "rows": [{"base": "lora", "set": {"rank": 3}, "run": {"lr": 0.001}}],
            }
        )
    )
    found = {row.label: {(c["path"], c["base"], c["value"]) for c in changes(plan, row)} for row in plan.rows}
    policy = {("metric", "sensitivity-uncertainty", None), ("scheduler", "cubic", None), ("action", "prune", None)}
    assert found == {
        "adalora": set(),
        "metric=sensitivity(smoothed=true)": {("metric", "sensitivity-uncertainty", "sensitivity(smoothed=true)")},
        "action.ties=threshold": {("action.ties", "budget", "threshold")},
        "target_rank=2": {("scheduler.target", 3, 2)},
        "without penalty": {("parameterization.orthogonality", 0.1, 0.0)},
        "without policy": policy,
        "lora, rank=3, run.lr=0.001": policy | {("parameterization", "svd", "lora(rank=3)"), ("run.lr", None, 0.001)},
    }
    by_label = {row.label: row.method for row in plan.rows}
    # The settings that both metrics have are carried over.
    assert by_label["metric=sensitivity(smoothed=true)"].metric == lrkit.metrics.Sensitivity(smoothed=True, beta1=0.5)
    assert by_label["target_rank=2"].metric.beta1 == 0.5


def rows_of(swap, rows=()):
    return lay_out(_study("adalora", swap, "movies", "minilm", "all-linear", 1, None, None, rows, (), False, "")).rows[
        1:
    ]


def test_one_is_no_share():
    """A count and a share, which Python has equal."""
    tried = [lrkit.schedulers.Linear(target=1), lrkit.schedulers.Linear(target=1.0)]
    assert [repr(row.method.scheduler.target) for row in rows_of({"scheduler": tried})] == ["1", "1.0"]
    assert [repr(row.method.scheduler.target) for row in rows_of({"scheduler.target": [1, 1.0]})] == ["1", "1.0"]


@attrs.frozen(kw_only=True)
class Powered(lrkit.Metric):
    """s = abs(w) to a power. Source: this test."""

    power: float
    offsets: tuple[float, ...] = attrs.field(factory=tuple)

    def score(self, weight, state):
        return weight.abs() ** self.power


def test_settings_without_defaults():
    """A component may be swapped in with settings that have no plain default."""
    with lrkit.current().lend("metric", "powered", Powered):
        tried = [{"name": "powered", "power": 2.0}, Powered(power=3.0), Powered(power=3.0, offsets=(1.0,))]
        rows = rows_of({"metric": tried})
        assert [(row.label, row.method.metric) for row in rows] == [
            ("metric=powered(power=2.0)", Powered(power=2.0)),
            ("metric=powered(power=3.0)", Powered(power=3.0)),
            ("metric=powered(power=3.0, offsets=[1.0])", Powered(power=3.0, offsets=(1.0,))),
        ]
        with pytest.raises(lrkit.LrkitError, match=r'no setting "metric\.pwer"'):
            rows_of({"metric": [{"name": "powered", "pwer": 2.0}]})


def test_rows_hold_instances():
    """Components and methods may stand in rows as instances."""
    rows = [{"swap": {"metric": lrkit.metrics.Magnitude()}}, {"label": "x", "base": lrkit.methods.lora(rank=2)}]
    assert [row.method for row in rows_of({}, rows)] == [
        attrs.evolve(lrkit.methods.adalora(), metric=lrkit.metrics.Magnitude()),
        lrkit.methods.lora(rank=2),
    ]


def test_labels_of_instances():
    """What an instance becomes. Nothing is carried over to it, and a label does not list what it left alone."""
    tried = [lrkit.metrics.Sensitivity(smoothed=True), lrkit.metrics.Sensitivity(), lrkit.metrics.Magnitude()]
    rows = lay_out(
        _study(
            "adalora",
            {"metric": [*tried, "sensitivity"]},
            "movies",
            "minilm",
            "all-linear",
            1,
            None,
            None,
            (),
            (),
            False,
            "",
        )
    ).rows
    assert [(row.label, row.method.metric) for row in rows[1:4]] == [
        ("metric=sensitivity(smoothed=true)", tried[0]),
        ("metric=sensitivity()", tried[1]),
        ("metric=magnitude()", tried[2]),
    ]


def test_swaps_reach_also():
    """A path may lead into the further policies of a method."""
    hybrid = attrs.evolve(
        lrkit.methods.aflora(rank=4, train="both"),
        also=(
            lrkit.Policy(
                metric=lrkit.metrics.Magnitude(),
                scheduler=lrkit.schedulers.Cubic(target=2),
                action=lrkit.actions.Prune(),
            ),
        ),
    )
    plain = {
        "base": lrkit.to_plain(hybrid),
        "swap": {"also.0.metric": ["sensitivity"]},
        "leave_out": ["also", "policy"],
    }
    plan = lay_out(study_from(plain))
    assert [row.label for row in plan.rows] == ["base", "also.0.metric=sensitivity", "without also", "without policy"]
    assert plan.rows[1].method.also[0].metric == lrkit.metrics.Sensitivity()
    assert plan.rows[2].method == attrs.evolve(hybrid, also=())
    assert plan.rows[3].method.policies == hybrid.also


def test_order_of_settings():
    """Settings come from the study, then from the task, then from the row."""
    study = {
        "base": "adalora",
        "run": {"steps": 10, "lr": 0.1, "batch_size": 8},
        "tasks": [{"task": "movies", "run": {"lr": 0.2, "batch_size": 4}, "set": {"scheduler.warmup": 3}}],
        "rows": [{"label": "slow", "run": {"lr": 0.3}}, {"label": "plain", "base": "lora"}],
    }
    plan = lay_out(study_from(study))
    given = plan.settings(plan.rows[1], plan.tasks[0], 5)
    assert (given.steps, given.lr, given.batch_size, given.seed) == (10, 0.3, 4, 5)
    assert plan.method(plan.rows[0], plan.tasks[0]).scheduler.warmup == 3
    assert plan.method(plan.rows[2], plan.tasks[0]) == lrkit.methods.lora(), "a schedule means nothing to it"


def test_shipped_studies_have_titles():
    """Every study that ships has a title, and those of the papers are there."""
    names = set(shipped())
    assert {
        "adalora-figure-1",
        "adalora-figure-2",
        "aflora-table-2",
        "aflora-table-3",
        "aflora-table-6",
        "aflora-figure-3",
        "aflora-figure-4",
        "hybrid",
    } <= names
    for name in names:
        assert shipped()[name]


WRONG = {
    "no base": ({}, "study: base is missing"),
    "key": ({"base": "lora", "sead": 3}, 'there is no key "sead" (did you mean "seeds"?)'),
    "row key": ({"base": "lora", "rows": [{"lable": "x"}]}, 'rows[0] there is no key "lable" (did you mean "label"?)'),
    "task key": ({"base": "lora", "tasks": [{"tusk": "x"}]}, '"tusk" (did you mean "task"?)'),
    "no task": ({"base": "lora", "tasks": [{"run": {"steps": 2}}]}, "each has task (a name), data (a folder), or both"),
    "tune a run's": ({"base": "lora", "tune": {"space": {"lr": [1e-3, 1e-2]}}}, '"lr" (did you mean "run.lr"?)'),
    "tune nothing": ({"base": "lora", "tune": {"seeds": 2}}, "tune space is missing: the settings to tune"),
    "seeds": ({"base": "lora", "seeds": "six"}, "seeds must be a number of seeds (6)"),
    "no seeds": ({"base": "lora", "seeds": 0}, "seeds must be a number of seeds (6)"),
    "twice a seed": ({"base": "lora", "seeds": [1, 1]}, "different seeds"),
    "a flag": ({"base": "lora", "grid": "yes"}, "grid must be true or false, not 'yes'"),
    "swap no list": ({"base": "lora", "swap": {"metric": "magnitude"}}, '"metric" must be a list of values to try'),
    "method": ({"base": "adalorra"}, 'unknown method "adalorra" (did you mean "adalora"?)'),
    "base": ({"base": 7}, "base must be a method's name"),
    "setting": ({"base": "adalora", "set": {"rnk": 3}}, 'has no argument "rnk" (did you mean "rank"?)'),
    "swap path": (
        {"base": "adalora", "swap": {"metrik": ["magnitude"]}},
        'no component "metrik" (did you mean "metric"?)',
    ),
    "swap value": (
        {"base": "adalora", "swap": {"metric": ["magnitud"]}},
        'row metric=magnitud: unknown metric "magnitud" (did you mean "magnitude"?)',
    ),
    "swap number": ({"base": "adalora", "swap": {"metric": [3]}}, "row metric=3: metric must be a name"),
    "component": (
        {"base": "adalora", "swap": {"metric": [{"nam": "x"}]}},
        "metric must be a name, or a table with a name",
    ),
    "does not fit": ({"base": "adalora", "swap": {"rank": [4]}}, "row rank=4: Cubic.target = 8 is above"),
    "leave out": ({"base": "adalora", "leave_out": ["penality"]}, '"penality" (did you mean "penalty"?)'),
    "no penalty": ({"base": "lora", "leave_out": ["penalty"]}, 'parameterization "lora" has no penalty'),
    "no policy": ({"base": "lora", "leave_out": ["policy"]}, "the method has no policy"),
    "run": ({"base": "lora", "run": {"step": 3}}, 'run has no setting "step" (did you mean "steps"?)'),
    "row run": ({"base": "lora", "rows": [{"label": "x", "run": {"lr": "fast"}}]}, "row x: run.lr must be"),
    "labels": (
        {"base": "lora", "rows": [{"label": "a", "set": {"rank": 2}}, {"label": "a", "set": {"rank": 3}}]},
        'two rows are called "a"',
    ),
    "tasks": ({"base": "lora", "tasks": ["movies", "movies"]}, 'two tasks are called "movies"'),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_studies_refused(case):
    """A study that is wrong is refused in one line that says where."""
    plain, told = WRONG[case]
    with pytest.raises(lrkit.LrkitError) as error:
        lay_out(study_from(plain))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_files_refused(tmp_path):
    """A study file that is not there or not TOML is refused, with the nearest right name."""
    with pytest.raises(lrkit.LrkitError, match=r'no such file \(did you mean "aflora-table-2"\?\)'):
        read_study("aflora-tabel-2")
    (tmp_path / "a.toml").write_text("base = lora")
    with pytest.raises(lrkit.LrkitError, match=r"a\.toml: no TOML: Invalid value"):
        read_study(str(tmp_path / "a.toml"))


# ---- two hundred files that somebody got wrong -----------------------------------------------------------------------

_VALUES = st.recursive(
    st.one_of(
        st.none().map(lambda _: "none"),
        st.booleans(),
        st.integers(-5, 2**40),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["adalora", "lora", "magnitude", "cubic", "prune", "svd", "movies", "rank", "metric"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["name", "rank", "metric", "label", "set", "x"]), inner, max_size=3),
    ),
    max_leaves=5,
)
_KEYS = st.one_of(
    st.sampled_from([f.name for cls in (Study, RowSpec, TaskSpec) for f in attrs.fields(cls)] + ["parameterization"]),
    st.text(max_size=6),
)


def _toml(value):
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return _quoted(value) if isinstance(value, str) else repr(value)


def _quoted(text):
    return '"' + "".join(f"\\U{ord(c):08X}" if not 0xD800 <= ord(c) < 0xE000 else "?" for c in text) + '"'


@settings(max_examples=220, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(_KEYS, _VALUES, max_size=4), st.integers(0, 400), st.booleans())
@example({"swap": {"parameterization": ["full"]}}, 0, False)
@example({"rows": [{"base": {"parameterization": {"name": "svd", "rank": 2**40}}}]}, 0, False)
@example({"base": {"parameterization": "lora", "also": 3}}, 0, False)
@example({"base": {"parameterization": "lora", "metric": [1]}}, 0, False)
@example({"seeds": 2**40}, 0, False)
def test_fuzzed_study_files(tmp_path_factory, capsys, changes, cut, torn):
    """Whatever a study file holds, the command line gives rows or one line."""
    plain = {"base": "adalora", **changes}
    text = "\n".join(f"{_quoted(key)} = {_toml(value)}" for key, value in plain.items())
    if torn:
        text = text[: len(text) - cut % (len(text) + 1)]
    path = tmp_path_factory.mktemp("fuzz") / "study.toml"
    path.write_text(text, encoding="utf-8")
    with contextlib.suppress(lrkit.LrkitError):
        lay_out(read_study(str(path)))
        return
    with pytest.raises(SystemExit) as ended:
        main(["ablate", str(path), "--out", str(path.parent / "out")])
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.startswith("lrkit: ") and told.count("\n") == 1 and "Traceback" not in told
    assert not (path.parent / "out").exists()


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return folders.write_place(tmp_path_factory.mktemp("place"))


def test_command_line_equals_file(place, tmp_path, capsys):
    """The same study comes from options and from a file."""
    given = ["--data", str(place / "data"), "--model", str(place / "model"), "--set", "run.max_length=12"]
    given += ["--set", "run.steps=6", "--set", "run.batch_size=4", "--workers", "0", "--no-costs", "--json"]
    swaps = ["--set", "rank=4", "--set", "target_rank=2", "--swap", "metric=magnitude", "--seeds", "2"]
    with pytest.raises(SystemExit) as ended:
        main(["ablate", "adalora", *swaps, *given, "--out", str(tmp_path / "one")])
    assert ended.value.code == 0
    import json

    told = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in told["rows"]] == ["adalora", "metric=magnitude"]
    assert (tmp_path / "one" / "report.html").is_file()
    (tmp_path / "study.toml").write_text(
        'base = "adalora"\nseeds = 9\n[set]\nrank = 4\ntarget_rank = 2\n[swap]\nmetric = ["magnitude"]\n'
    )
    with pytest.raises(SystemExit):
        main(["ablate", str(tmp_path / "study.toml"), "--seeds", "0,1", *given, "--out", str(tmp_path / "two")])
    capsys.readouterr()

    def cells(name):
        return sorted(path.name for path in (tmp_path / name / "cells").iterdir())

    assert cells("one") == cells("two") and len(cells("one")) == 4
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "one"), "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["rows"] == told["rows"]

    more = [*swaps[:-1], "3", *given[:-1]]
    with pytest.raises(SystemExit) as ended:
        main(["ablate", "adalora", *more, "--out", str(tmp_path / "one")])
    assert ended.value.code == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("lrkit: 3 seeds are too few")
    assert lines[1] == "6 cells, 4 are there already; 2 to run"
    assert re.fullmatch(r"\[5/6\] .*, seed 2: [0-9.]+ \(about \d+ s left\)", lines[2])
    assert re.fullmatch(r"\[6/6\] .*, seed 2: [0-9.]+", lines[3])


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (90000, "25 h")],
)
def test_durations_in_words(seconds, words):
    """A duration is said in about two figures."""
    from lrkit.study import progress

    assert progress.duration(seconds) == words


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("cells", [1, 2, 7, 8, 10, 16, 40])
def test_time_left_estimate(cells, workers):
    """The time left is right to within a cell."""
    from lrkit.study import progress

    ends = [600.0 * (1 + place // workers) for place in range(cells)]
    for ended in range(1, cells):
        left = progress.time_left([600.0] * ended, ends[ended - 1], workers, cells - ended)
        assert left == pytest.approx(ends[-1] - ends[ended - 1], abs=600)
    assert progress.time_left([600.0] * cells, ends[-1], workers, 0) is None
    assert progress.time_left([], 0.0, workers, cells) is None


def test_curves_reach_tensorboard(place, tmp_path):
    """Losses, scores and ranks go to TensorBoard if it is asked for."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lrkit.ablate(
        "lora",
        task={"data": str(place / "data")},
        model=str(place / "model"),
        out=tmp_path / "out",
        seeds=1,
        run={"steps": 4, "batch_size": 4, "max_length": 12, "eval_every": 2},
        workers=0,
        costs=False,
        report_to=["tensorboard"],
    )
    (cell,) = (tmp_path / "out" / "cells").iterdir()
    events = EventAccumulator(str(cell / "runs"))
    events.Reload()
    lines = [__import__("json").loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
    written = [line["loss"] for line in lines if "loss" in line]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(written)
    assert len(events.Scalars("eval/accuracy")) == 2
    assert [e.value for e in events.Scalars("train/lrkit/rank/mean")] == [8.0] * 4


def test_ablate_takes_components(place, tmp_path):
    """`ablate` takes instances, and leaves the caller's random state alone."""
    torch.manual_seed(7)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    table = lrkit.ablate(
        lrkit.methods.adalora(rank=4, target_rank=2),
        {"metric": [lrkit.metrics.Sensitivity(smoothed=True)], "action.ties": ["threshold"]},
        task={"data": str(place / "data")},
        model=str(place / "model"),
        out=tmp_path / "out",
        seeds=[3],
        run={"steps": 6, "batch_size": 4, "max_length": 12},
        workers=0,
        costs=False,
    )
    frame = table.frame()
    assert len(frame) == 3
    assert table.rows[0].label == "base"
    assert "action.ties=threshold" in str(table)
    # Run in this process, it leaves the caller's seed and threads alone.
    assert torch.equal(torch.rand(1), drawn)
    assert torch.get_num_threads() == threads
    assert records.read_study(tmp_path / "out").title == "base: metric, action"


def test_unknown_to_workers_refused(place, tmp_path):
    """A component that only this process knows is refused before a worker is asked."""

    @attrs.frozen(kw_only=True)
    class Own(lrkit.metrics.Magnitude):
        """The size of a weight; measure. Source: this test."""

    with lrkit.current().lend("metric", "own", Own), pytest.raises(lrkit.LrkitError, match=r'"own".*workers=0'):
        lrkit.ablate(
            "adalora",
            {"metric": ["own"]},
            task={"data": str(place / "data")},
            model=str(place / "model"),
            out=tmp_path / "out",
            run={"steps": 4},
            workers=1,
        )
    assert not list(tmp_path.glob("out/cells/*"))


def test_study_files_are_plain():
    """Every key of the study files that ship is one that a study has."""
    for name in shipped():
        text = text_of(name)
        assert attrs.asdict(study_from(tomllib.loads(text), name))["base"]
