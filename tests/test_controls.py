"""Control rows against their definitions: ranks that were found, moved, shuffled, drawn or spread, trained from step 1."""

import json
import zlib

import attrs
import folders
import pytest

import lrkit
from lrkit.errors import LrkitError
from lrkit.study.cell import Cell
from lrkit.study.execute import execute
from lrkit.study.graph import jobs_of
from lrkit.study.models import empty_model
from lrkit.study.plan import lay_out, study_from
from lrkit.study.records import read_study
from lrkit.study.settling import settle

KINDS = ("found", "transplanted", "shuffled", "random", "uniform", "cut-at-end")
SEEDS = (3, 5)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return folders.write_place(tmp_path_factory.mktemp("place"), layers=2)


def asked(place, **changes):
    return study_from(
        {
            "base": "adalora",
            "set": {
                "rank": 4,
                "target_rank": 1,
                "warmup": 1,
                "final": 2,
                "interval": 1,
                "alpha": 3.0,
                "orthogonality": 0.2,
                "scheduler.amount": "parameters",
            },
            "rows": [{"from": "adalora", "control": kind} for kind in KINDS],
            "tasks": [{"data": str(place / "data")}],
            "model": str(place / "model"),
            "seeds": list(SEEDS),
            "run": {"steps": 8, "batch_size": 4, "max_length": 12, "lr": 0.05},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def done(place, tmp_path_factory):
    """The study of all controls, run to its end."""
    out = tmp_path_factory.mktemp("controls")
    outcome = execute(lay_out(asked(place)), out, workers=0, threads=1, costs=False)
    assert (outcome.done, outcome.failed) == (7 * len(SEEDS), ())
    return out


def ranks(out):
    """Row to seed to layer to final rank."""
    record = read_study(out)
    found = {}
    for cell in record.cells:
        layers = {layer.name: layer for layer in cell.result.layers}
        found.setdefault(record.rows[cell.row].label.removeprefix("adalora, "), {})[cell.seed] = layers
    return found


def test_found_and_transplanted(done):
    """Found ranks are the row's own with the same seed, transplanted ones the next seed's, the first after the last."""
    found = ranks(done)
    own = {seed: {name: layer.rank for name, layer in layers.items()} for seed, layers in found["adalora"].items()}
    assert len({tuple(each.values()) for each in own.values()}) > 1
    for seed, after in zip(SEEDS, (*SEEDS[1:], SEEDS[0]), strict=True):
        assert {name: layer.rank for name, layer in found["found"][seed].items()} == own[seed]
        assert {name: layer.rank for name, layer in found["transplanted"][seed].items()} == own[after]


def test_trained_from_the_start(done):
    """A control has its ranks from the first step to the last one; cut-at-end has all of them until then."""
    found = ranks(done)
    for kind in KINDS[:-1]:
        for layers in found[kind].values():
            assert all(layer.initial_rank == layer.rank for layer in layers.values()), kind
    for layers in found["cut-at-end"].values():
        assert all(layer.initial_rank == 4 for layer in layers.values())
    record = read_study(done)
    cut = next(c for c in record.cells if record.rows[c.row].label == "adalora, cut-at-end")
    assert [decision.step for decision in cut.decisions] == [8]


def test_shuffled_keeps_the_ranks(done):
    """Shuffled ranks are the found ones, layer for layer of equal size, and not all where they were."""
    found = ranks(done)
    moved = 0
    for seed in SEEDS:
        by_size = {}
        for kind in ("found", "shuffled"):
            for layer in found[kind][seed].values():
                by_size.setdefault((layer.d_in + layer.d_out), {}).setdefault(kind, []).append(layer.rank)
        for each in by_size.values():
            assert sorted(each["found"]) == sorted(each["shuffled"])
            moved += each["found"] != each["shuffled"]
    assert moved


def test_one_budget(done):
    """All rows end with the parameters of rank 1 in every layer, within the largest component."""
    for kind, seeds in ranks(done).items():
        for layers in seeds.values():
            budget = sum((layer.d_in + layer.d_out) for layer in layers.values())
            largest = max((layer.d_in + layer.d_out) for layer in layers.values())
            spent = sum(layer.rank * (layer.d_in + layer.d_out) for layer in layers.values())
            assert budget - 2 * largest < spent <= budget, kind
    for layers in ranks(done)["uniform"].values():
        assert {layer.rank for layer in layers.values()} <= {0, 1}


def test_same_scale_and_penalty(done):
    """A control is scaled as the row is, α/r of its initial rank, and has its γ."""
    record = read_study(done)
    scales = {}
    for cell in record.cells:
        method = lrkit.from_plain(cell.config["method"])
        assert method.parameterization.orthogonality == 0.2
        adapted = lrkit.attach(empty_model(record.model), method)
        found = {a.scaling for a in adapted.adapters.values() if a.rank}
        scales.setdefault(record.rows[cell.row].label, set()).update(found)
    assert all(value == pytest.approx(3.0 / 4, rel=1e-4) for each in scales.values() for value in each)


def test_keys_name_the_source(place):
    """A control's key changes with the cell that it needs, and so does that of everything after it."""
    plain, other = (
        {(job.label, job.seed): job for job in jobs_of(lay_out(asked(place, **changes)))}
        for changes in ({"seeds": [3, 5, 8]}, {"seeds": [3, 5]})
    )
    assert plain["adalora", 3].key == other["adalora", 3].key
    assert plain["adalora, found", 3].key == other["adalora, found", 3].key
    assert plain["adalora, transplanted", 5].key != other["adalora, transplanted", 5].key
    assert plain["adalora, found", 3].sources == (plain["adalora", 3].key,)


def test_settled_by_results_alone(done):
    """A cell is settled from the folders of those that it needs: the same ranks whenever that is done."""
    record = read_study(done)
    cell = next(c for c in record.cells if record.rows[c.row].label == "adalora, random")
    planned = Cell.from_config(cell.config, planned=True)
    assert planned.key == cell.key and planned.needs
    assert settle(planned, done / "cells").method == cell.config["method"]


def test_source_that_fails(place, tmp_path, monkeypatch):
    """A cell whose source fails fails in one line that names it, and is not begun."""
    import lrkit.study.run

    real = lrkit.study.run.train

    def fails(method, *args, **kwargs):
        if method.action is not None and kwargs["settings"].seed == 5:
            raise RuntimeError("no memory left")
        return real(method, *args, **kwargs)

    monkeypatch.setattr(lrkit.study.run, "train", fails)
    rows = [{"from": "adalora", "control": kind} for kind in ("found", "uniform")]
    outcome = execute(lay_out(asked(place, rows=rows)), tmp_path / "s", workers=0, threads=1, costs=False)
    failed = dict(outcome.failed)
    assert outcome.done == 3
    assert failed.pop("adalora, data, seed 5") == "RuntimeError: no memory left"
    line = "it needs the cell of adalora, data, seed 5, which failed"
    assert failed == {f"adalora, {kind}, data, seed 5": line for kind in ("found", "uniform")}
    monkeypatch.undo()
    again = execute(lay_out(asked(place, rows=rows)), tmp_path / "s", workers=0, threads=1, costs=False)
    assert (again.done, again.ran, again.failed) == (6, 3, ())


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"control": "found"}, 'say of which, from = "LABEL"'),
        ({"from": "adalor", "control": "found"}, 'there is no row "adalor" before it (did you mean "adalora"?)'),
        ({"from": "adalora", "control": "fond"}, 'there is no control "fond" (did you mean "found"?)'),
        ({"from": "lora", "control": "found"}, "the row has no policy"),
        ({"from": "first", "control": "found"}, 'row "first" is a control itself'),
        ({"from": "adalora", "control": "found", "from_task": "data"}, "from_task is for"),
        ({"from": "adalora", "control": "transplanted", "from_task": "x"}, 'there is no task "x"'),
        ({"from": "adalora", "base": "lora", "control": "found"}, "not with both"),
        ({"from": "adalora", "control": "oracle"}, "knows no layers"),
    ],
)
def test_refused_in_one_line(place, tmp_path, row, said):
    """A control that cannot be had is refused before a step is spent, with the row's name."""
    rows = [{"label": "lora", "base": "lora"}, {"from": "adalora", "control": "found", "label": "first"}]

    def begin():
        plan = lay_out(asked(place, rows=[*rows, {"label": "row", **row}]))
        execute(plan, tmp_path / "s", workers=0, costs=False)

    with pytest.raises(LrkitError, match=r"^row row") as caught:
        begin()
    assert said in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_follows_its_source(place, tmp_path):
    """A control is run again if the cell that it needs has another result now, and stays if it has the same."""
    rows = [{"from": "adalora", "control": "found"}]
    study, out = asked(place, rows=rows, seeds=[3]), tmp_path / "s"

    def run():
        return execute(lay_out(study), out, workers=0, threads=1, costs=False).ran

    assert run() == 2
    cells = {read_study(out).rows[c.row].label: c for c in read_study(out).cells}
    source, control = cells["adalora"].folder, cells["adalora, found"].folder
    before = (control / "result.json").read_bytes()
    (source / "result.json").unlink()  # run again, to the same bits: looked at, and left as it is
    assert run() == 2
    assert (control / "result.json").read_bytes() == before
    assert (control / "attempts.jsonl").read_text().count("begin") == 1
    result = json.loads((source / "result.json").read_text())
    ranked = [layer for layer in result["layers"] if layer["rank"]]
    ranked[0]["rank"] = 4 if ranked[0]["rank"] != 4 else 1
    content = json.dumps(result)
    (source / "result.json").write_text(content)
    sums = json.loads((source / "files.json").read_text())
    (source / "files.json").write_text(json.dumps({**sums, "result.json": zlib.crc32(content.encode())}))
    assert run() == 1
    now = {layer.name: layer.rank for layer in read_study(out).cells[1].result.layers}
    assert now == {layer["name"]: layer["rank"] for layer in result["layers"]}


def test_ends_each_dependent_once(place, tmp_path, monkeypatch):
    """A cell that needs two cells, one of which needs the other, fails once, and the others go on."""
    import lrkit.study.run

    def fails(*_, **__):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(lrkit.study.run, "train", fails)
    tune = {"space": {"run.lr": [0.01, 0.05]}, "seeds": [90]}
    rows = [{"from": "adalora", "control": "found"}]
    outcome = execute(lay_out(asked(place, rows=rows, seeds=[3], tune=tune)), tmp_path / "s", workers=0, costs=False)
    assert (outcome.done, len(outcome.failed)) == (0, 6)


def test_scales_of_their_own_refused(place, tmp_path):
    """A row whose layers begin with ranks that differ has no one scale to give to a control, unless it is of their mean."""
    ranks = {"query": 4, "*": 2}
    rows = [{"from": "adalora", "control": "found"}]
    settings = {**attrs.asdict(asked(place))["set"], "rank": ranks}
    outcome = execute(
        lay_out(asked(place, rows=rows, seeds=[3], set=settings)), tmp_path / "s", workers=0, threads=1, costs=False
    )
    ((_, line),) = outcome.failed
    assert "give it scale_by" in line
    settings["parameterization.scale_by"] = "mean-rank"
    done = execute(
        lay_out(asked(place, rows=rows, seeds=[3], set=settings)), tmp_path / "t", workers=0, threads=1, costs=False
    )
    assert done.failed == ()
    record = read_study(tmp_path / "t")
    scales = [
        {
            a.scaling
            for a in lrkit.attach(empty_model(record.model), lrkit.from_plain(c.config["method"])).adapters.values()
        }
        for c in record.cells
    ]
    assert max(scales[0]) == pytest.approx(min(scales[1]), rel=1e-4)
