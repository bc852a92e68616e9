"""Packs: finished cells travel in one small file, and a fresh folder goes on from there."""

import contextlib
import gzip
import json
import shutil
import warnings
from pathlib import Path

import attrs
import folders
import killed_study
import pytest
import studies
from command_line import ask
from hypothesis import given, settings
from hypothesis import strategies as st

import lrkit
from lrkit.errors import LrkitError
from lrkit.study import settling, taken
from lrkit.study.cell_folder import is_packed
from lrkit.study.execute import execute
from lrkit.study.pack import CURVE, write_pack
from lrkit.study.packed import PACK, read_pack
from lrkit.study.plan import lay_out, study_from
from lrkit.study.records import frame, read_study
from lrkit.study.report import write_report
from lrkit.study.store import read_json
from lrkit.study.taken import Source, unpack

TABLES = ("table.csv", "table.md", "table.tex", "cells.csv")


def small(place, **changes):
    plain = attrs.asdict(killed_study.study(place, seeds=2, steps=8))
    return study_from({**plain, **changes})


def run(study, out, **how):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        outcome = execute(lay_out(study), out, workers=0, threads=1, costs=False, **how)
    return outcome, " ".join(str(each.message) for each in told if each.category is lrkit.LrkitWarning)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return folders.write_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """A study that is done, and its pack."""
    out = tmp_path_factory.mktemp("whole") / "study"
    run(small(place), out)
    write_pack(out, out.parent / "pack")
    return out


@pytest.fixture
def packed(whole):
    return whole.parent / "pack" / PACK


def of_other_code(monkeypatch):
    """Let everything from here on be of other code."""
    monkeypatch.setattr("lrkit.study.cell.code_of", lambda method, task: "0ther")
    monkeypatch.setattr("lrkit.study.joining.code_of", lambda method, task: "0ther")
    monkeypatch.setattr("lrkit.study.worker.code_of", lambda method, task: "0ther")


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_same_tables_from_pack(place, whole, packed, tmp_path):
    """A pack holds no weights, is the same bytes each time, and its tables are those of the study that it is of."""
    again = write_pack(whole, tmp_path / "again")[0][0]
    outcome, told = run(small(place), tmp_path / "study", packed=Source(path=packed))
    for folder in (whole, tmp_path / "study"):
        write_report(folder)

    assert again.read_bytes() == packed.read_bytes() and packed.read_bytes()[4:8] == bytes(4)  # no time of writing
    assert (outcome.done, outcome.ran) == (6, 0) and "6 finished cells are taken in" in told
    assert [(whole / name).read_bytes() for name in TABLES] == [
        (tmp_path / "study" / name).read_bytes() for name in TABLES
    ]
    assert "Taken in" in (tmp_path / "study" / "report.html").read_text()
    assert not list((tmp_path / "study").rglob("*.safetensors")) and not list((tmp_path / "study").rglob("*.npz"))
    assert write_pack(tmp_path / "study", tmp_path / "third")[0][0].stat().st_size < 40_000
    records = [read_study(folder) for folder in (whole, tmp_path / "study")]
    assert [c.config for c in records[0].cells] == [c.config for c in records[1].cells]
    assert str(place).encode() not in gzip.decompress(packed.read_bytes())
    assert [c.decisions for c in records[0].cells] == [c.decisions for c in records[1].cells]


def test_unpacked_without_data(whole, packed, tmp_path, capsys):
    """A pack becomes a study's folder anywhere: the same tables and decisions, and a pack of it is the same again."""
    told = ask(capsys, "unpack", packed.parent, tmp_path / "study")
    for folder in (whole, tmp_path / "study"):
        write_report(folder)

    assert (
        told == {"folder": str(tmp_path / "study"), "cells": 6} == told | {"cells": unpack(packed, tmp_path / "again")}
    )
    assert [(whole / name).read_bytes() for name in TABLES] == [
        (tmp_path / "study" / name).read_bytes() for name in TABLES
    ]
    records = [read_study(folder) for folder in (whole, tmp_path / "study")]
    assert [c.decisions for c in records[0].cells] == [c.decisions for c in records[1].cells]
    assert write_pack(tmp_path / "study", tmp_path / "third")[1] == 6
    assert [attrs.asdict(cell) for cell in read_pack(tmp_path / "third").cells.values()] == [
        attrs.asdict(cell) for cell in read_pack(packed).cells.values()
    ]


def test_odd_unpacking_refused(packed, tmp_path):
    """A folder with something in it, a file, and a pack that is not what it says are refused, and nothing is written."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    for place in (tmp_path / "full", tmp_path / "full" / "letter.txt"):
        with pytest.raises(LrkitError, match="is not an empty folder"):
            unpack(packed, place)
    lines = [json.loads(line) for line in gzip.decompress(packed.read_bytes()).splitlines()]
    lines[1]["config"]["method"]["parameterization"]["rank"] = 7
    (tmp_path / "odd.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    with pytest.raises(LrkitError, match="is not of the configuration"):
        unpack(tmp_path / "odd.gz", tmp_path / "study")
    assert not (tmp_path / "study").exists() and [p.name for p in (tmp_path / "full").iterdir()] == ["letter.txt"]


def test_other_code_is_kept(place, packed, tmp_path, monkeypatch):
    """Cells that are taken in stay as they are whatever code they are of, with its digest, and a new seed is computed."""
    code = read_pack(packed).study.cells[0].code
    of_other_code(monkeypatch)
    outcome, told = run(small(place, seeds=3), tmp_path / "study", packed=Source(path=packed))
    again, silent = run(small(place, seeds=3), tmp_path / "study", packed=Source(path=packed))
    cells = read_study(tmp_path / "study").cells

    assert (outcome.done, outcome.ran, again.done, again.ran) == (9, 3, 9, 0) and code in told and not silent
    assert [cell.code for cell in cells if cell.old] == [code] * 6
    assert {cell.code for cell in cells if cell.seed == 2} == {"0ther"}
    assert list(frame(read_study(tmp_path / "study")).other_code) == [cell.seed < 2 for cell in cells]


def test_folders_elsewhere(place, packed, tmp_path):
    """A pack is of the same study if data and model lie elsewhere: they count by their content."""
    moved = shutil.copytree(place, tmp_path / "elsewhere")
    outcome, told = run(small(moved), tmp_path / "study", packed=Source(path=packed))
    assert (outcome.done, outcome.ran) == (6, 0) and "taken in" in told


def test_recompute_computes_again(place, packed, tmp_path, monkeypatch):
    """With recompute cells that were taken in are computed again, of this code or another; keep_old is its opposite."""
    of_two = small(place, seeds=1, swap={}, rows=[])
    run(of_two, tmp_path / "study", packed=Source(path=packed))
    first, _ = run(of_two, tmp_path / "study", recompute=True)
    key = read_study(tmp_path / "study").cells_of(0)[0].key

    assert (first.done, first.ran) == (1, 1) and not is_packed(tmp_path / "study" / "cells" / key)
    with pytest.raises(LrkitError, match="give one of them"):
        run(of_two, tmp_path / "study", recompute=True, keep_old=True)
    of_other_code(monkeypatch)
    run(of_two, tmp_path / "other", packed=Source(path=packed))
    second, _ = run(of_two, tmp_path / "other", recompute=True, packed=Source(path=packed))
    assert second.ran == 1 and not read_study(tmp_path / "other").cells_of(0)[0].old


def test_needs_go_on_from_pack(place, tmp_path, monkeypatch):
    """A control's cell that is not packed goes on from a packed cell of other code, under the key that it has there."""
    rows = [{"label": "found", "from": "adalora", "control": "found"}]
    seen = []

    def allocated(cell, sources, settings):
        seen.extend(source.key for source in sources)
        return real["allocation"](cell, sources, settings)

    real = settling.rules()
    monkeypatch.setattr(settling, "rules", lambda: {**real, "allocation": allocated})
    study = small(place, seeds=1, swap={}, rows=rows)
    run(study, tmp_path / "one")
    write_pack(tmp_path / "one", tmp_path / "pack")
    keys = {cell.row: cell.key for cell in read_study(tmp_path / "one").cells}
    path = changed(tmp_path / "pack", lambda lines: without(lines, keys[1]))
    of_other_code(monkeypatch)
    whole, _ = run(study, tmp_path / "two", packed=Source(path=tmp_path / "pack"))
    outcome, _ = run(study, tmp_path / "three", packed=Source(path=path))
    config = read_study(tmp_path / "three").cells_of(1)[0].config

    assert (whole.done, whole.ran, outcome.done, outcome.ran) == (2, 0, 2, 1)
    assert seen == [keys[0]] * 2 and config["planned"]["needs"][0]["cells"] == [keys[0]]
    assert config["key"] != keys[1]


def test_tuned_study_travels(place, tmp_path, monkeypatch):
    """Trials and what they chose travel too: of other code nothing is computed again, and a new seed goes on from them."""
    study = small(place, seeds=1, swap={}, rows=[], tune={"space": {"run.lr": [1e-3, 1e-2]}, "seeds": 1})
    run(study, tmp_path / "one")
    _, number = write_pack(tmp_path / "one", tmp_path / "pack")
    of_other_code(monkeypatch)
    outcome, _ = run(study, tmp_path / "two", packed=Source(path=tmp_path / "pack"))
    more, _ = run(attrs.evolve(study, seeds=2), tmp_path / "two", packed=Source(path=tmp_path / "pack"))
    record = read_study(tmp_path / "two")

    assert (number, outcome.done, outcome.ran, more.done, more.ran) == (3, 3, 0, 4, 1)
    assert len(record.trials) == 2 and len({cell.config["run"]["lr"] for cell in record.cells}) == 1


def test_killed_while_taking_in(place, packed, tmp_path, monkeypatch):
    """A process that is killed at any file of a cell is taken up where it was."""
    restore, left = taken._restore, [3]

    def dying(*given):
        left[0] -= 1
        if not left[0]:
            write = taken.write_json
            monkeypatch.setattr(taken, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            try:
                restore(*given)
            finally:
                monkeypatch.setattr(taken, "write_json", write)
        restore(*given)

    monkeypatch.setattr(taken, "_restore", dying)
    with pytest.raises(KeyboardInterrupt):
        run(small(place), tmp_path / "study", packed=Source(path=packed))
    monkeypatch.setattr(taken, "_restore", restore)
    outcome, told = run(small(place), tmp_path / "study", packed=Source(path=packed))

    assert (outcome.done, outcome.ran) == (6, 0) and "4 finished cells" in told


def test_own_cells_left_alone(place, packed, tmp_path):
    """A cell that is done in the folder stays; an unfinished one gives way to the packed one, and no cell is lost."""
    out = tmp_path / "study"
    run(small(place, seeds=[0, 5], swap={}, rows=[]), out)
    mine = {c.seed: (c.folder / "result.json").stat().st_mtime_ns for c in read_study(out).cells}
    outcome, told = run(small(place), out, packed=Source(path=packed))
    record = read_study(out)

    assert outcome.ran == 0 and "5 finished cells" in told and len(record.cells) == 7
    assert {
        c.seed: (c.folder / "result.json").stat().st_mtime_ns for c in record.cells if c.seed in mine and c.row == 0
    } == mine


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"run": {"steps": 9}}, "run is"),
        ({"base": "lora", "set": {}, "swap": {}, "rows": []}, "base"),
        ({"rows": [{"label": "aflora", "base": "lora"}]}, 'row "aflora" is another method'),
    ],
)
def test_other_study_refused(place, packed, tmp_path, changes, told):
    """A pack of another study is refused in one line, before anything is written; one that was found is passed over."""
    with pytest.raises(LrkitError, match=told) as error:
        run(small(place, **changes), tmp_path / "study", packed=Source(path=packed))
    assert "\n" not in str(error.value) and not (tmp_path / "study").exists()


def test_other_data_refused(place, packed, tmp_path):
    """Packed cells of other data on a task of the same name are refused."""
    data = folders.write_data(tmp_path / "data")
    with (data / "train.jsonl").open("a") as file:
        file.write('{"sentence": "the film was good", "label": 1}\n')
    with pytest.raises(LrkitError, match="is of other data"):
        run(small(place, tasks=[{"data": str(data)}]), tmp_path / "study", packed=Source(path=packed))
    assert not (tmp_path / "study").exists()


def test_refused_before_it_is_written(place, packed, tmp_path):
    """A pack of other tasks, without this study's margin, or with a cell that is not of its key leaves no folder behind."""
    moved = shutil.copytree(place / "data", tmp_path / "renamed")
    odd = tmp_path / "odd.gz"

    def other_rank(lines):
        lines[1]["config"]["method"]["parameterization"]["rank"] = 7
        return lines

    lines = [json.loads(line) for line in gzip.decompress(packed.read_bytes()).splitlines()]
    odd.write_bytes(gzip.compress("\n".join(map(json.dumps, other_rank(lines))).encode()))
    for changes, path, told in (
        ({"tasks": [{"data": str(moved)}]}, packed, "is of other tasks"),
        ({"margin": 0.01}, packed, "was begun without margin"),
        ({}, odd, "is not of the configuration that it holds"),
    ):
        with pytest.raises(LrkitError, match=told):
            run(small(place, **changes), tmp_path / "study", packed=Source(path=path))
        assert not (tmp_path / "study").exists()


def test_folder_of_something_else(place, packed, tmp_path):
    """Nothing is taken in to a folder that holds something else; a folder that holds the pack alone is fine."""
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "letter.txt").write_text("dear")
    with pytest.raises(LrkitError, match="holds no study"):
        run(small(place), tmp_path / "study", packed=Source(path=packed))
    assert [p.name for p in (tmp_path / "study").iterdir()] == ["letter.txt"]
    shutil.copytree(packed.parent, tmp_path / "pack")
    with pytest.warns(lrkit.LrkitWarning, match="6 finished cells are taken in"):
        table = lrkit.ablate(small(place), out=tmp_path / "pack", workers=0, costs=False)
    assert len(table.rows) == 3 and (tmp_path / "pack" / "study.json").exists()


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    folder = studies.write_study(
        tmp_path_factory.mktemp("made-up") / "study", labels=("adalora", "lora"), seeds=(0, 1), layers=1
    )
    write_pack(folder, folder.parent / "pack")
    return folder


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_flipped_byte_is_seen(made_up, data):
    """A pack of which any byte is another, or that ends early, is refused in one line, or is the same all the same."""
    content = (made_up.parent / "pack" / PACK).read_bytes()
    good = read_pack(made_up.parent / "pack")
    at = data.draw(st.integers(0, 30) | st.integers(0, len(content) - 1))
    flip = data.draw(st.integers(1, 255))
    cut = data.draw(st.booleans())
    bad = content[:at] if cut else content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :]
    path = made_up.parent / "bad.gz"
    path.write_bytes(bad)
    with contextlib.suppress(LrkitError):
        assert attrs.evolve(read_pack(path), path=good.path) == good


def changed(folder, change):
    """Write a pack anew with its lines changed."""
    lines = [json.loads(line) for line in gzip.decompress((folder / PACK).read_bytes()).splitlines()]
    lines = change(lines) or lines
    path = folder.parent / "changed.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    return path


def without(lines, key):
    """Leave out a cell."""
    lines[0]["cells"] -= 1
    return [line for line in lines if line.get("key") != key]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda lines: lines[0].update(format=2), "a newer lrkit wrote it"),
        (lambda lines: lines[0].update(format="1"), "no pack of a study"),
        (lambda lines: lines[0]["study"].update(format=99), "a newer lrkit wrote it"),
        (lambda lines: lines[0]["study"]["cells"][0].update(key="../x"), "is no key of a cell"),
        (lambda lines: lines[1].update(key="../../x"), "does not list"),
        (lambda lines: lines[1].update(key="elsewhere"), "does not list"),
        (lambda lines: lines[:-1], "should hold 4 cells, and holds 3"),
        (lambda lines: [*lines[:-1], lines[1]], "twice"),
        (lambda lines: lines[1]["result"].update(key="another"), "files of another cell"),
        (lambda lines: lines[1]["result"].update(scores={}), "no score"),
        (lambda lines: lines[1].update(history=["x"]), "history"),
        (lambda lines: lines[0].update(costs={"../x": {}}), "its costs"),
        (lambda lines: [[], *lines], "not an object"),
    ],
)
def test_odd_packs_refused(made_up, change, told):
    """A pack that is whole and says something impossible is refused in one line."""
    with pytest.raises(LrkitError, match=told) as error:
        read_pack(changed(made_up.parent / "pack", change))
    assert "\n" not in str(error.value)


def test_no_pack_there(tmp_path):
    """What is no pack at all is refused in one line."""
    (tmp_path / "x").write_text("hello")
    for path in (tmp_path / "x", tmp_path / "nothing", tmp_path):
        with pytest.raises(LrkitError):
            read_pack(path)


def test_no_cell_is_lost(tmp_path, made_up):
    """Packing again replaces the pack in one move, unless a cell of the old one is not done in the folder."""
    one = studies.write_study(
        tmp_path / "one", labels=("adalora", "lora"), seeds=(0, 1), layers=1, missing={(1, "movies", 1)}
    )
    three = studies.write_study(tmp_path / "three", labels=("adalora", "lora"), seeds=(0, 1, 2), layers=1)
    write_pack(made_up, tmp_path / "pack")
    before = files(tmp_path / "pack")
    with pytest.raises(LrkitError, match=r"1 cells that are not done .* lora, movies, seed 1"):
        write_pack(one, tmp_path / "pack")
    assert files(tmp_path / "pack") == before
    (written, table), number = write_pack(three, tmp_path / "pack")
    assert number == 6 == len(read_pack(written).cells) and len(table.read_text().splitlines()) == 7
    with pytest.raises(LrkitError, match="nothing to pack"):
        write_pack(
            studies.write_study(tmp_path / "none", seeds=(0,), labels=("lora",), missing={(0, "movies", 0)}),
            tmp_path / "empty",
        )
    assert not (tmp_path / "empty").exists()


def test_curves_are_thinned(made_up):
    """Of 120 losses a hundred are packed, first and last among them; evaluations and costs are all there."""
    pack = read_pack(made_up.parent / "pack")
    for cell in pack.cells.values():
        steps = [line["step"] for line in cell.metrics if "loss" in line]
        assert len(steps) == CURVE == len(set(steps)) and (steps[0], steps[-1]) == (1, 120)
        assert [line["step"] for line in cell.metrics if "scores" in line] == [20, 40, 60, 80, 100, 120]
    assert pack.costs["0000c057"] == read_json(made_up / "costs" / "0000c057.json")


def test_shipped_study_found(place, packed, tmp_path, monkeypatch):
    """A study that ships goes on from the pack in docs/replication by itself, and passes over one of other settings."""
    names = lambda: ["mine"]  # noqa: E731
    monkeypatch.setattr("lrkit.study.catalogue.names", names)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(packed.parent, tmp_path / "docs" / "replication" / "mine")
    found = taken.source_of(None, "mine", tmp_path / "new")

    assert found == Source(path=Path("docs/replication/mine") / PACK, asked=False)
    assert taken.source_of(None, "other", tmp_path / "new") is None
    outcome, told = run(small(place), tmp_path / "new", packed=found)
    assert outcome.ran == 0 and "taken in from docs/replication/mine" in told
    outcome, told = run(small(place, seeds=1, swap={}, rows=[], run={"steps": 7}), tmp_path / "other", packed=found)
    assert outcome.ran == 1 and "not taken in" in told


def test_dry_run_counts_pack(place, packed, tmp_path, capsys, monkeypatch):
    """A study file goes on from the pack in the folder beside it, and a dry run counts the cells that it would take in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(
        f"""base = "adalora"
set = {{rank = 4, target_rank = 2, warmup = 2, final = 3, interval = 1}}
swap = {{metric = ["magnitude"]}}
rows = [{{label = "aflora", base = "aflora"}}]
tasks = [{{data = "{place / "data"}"}}]
model = "{place / "model"}"
seeds = 2
run = {{steps = 8, batch_size = 4, max_length = 12, eval_every = 5}}
"""
    )
    shutil.copytree(packed.parent, tmp_path / "mine")
    before = files(tmp_path)
    dry = ("ablate", "mine.toml", "--dry-run", "--json")

    assert ask(capsys, *dry)["taken_in"] == ask(capsys, *dry, "--out", tmp_path / "new")["taken_in"] == 6
    assert "taken_in" not in ask(capsys, *dry, "--recompute") and files(tmp_path) == before
    source = taken.source_of(None, "mine.toml", tmp_path / "new")
    assert source == Source(path=Path("mine") / PACK, asked=False)
    outcome, _ = run(small(place), tmp_path / "new", packed=source)
    assert outcome.ran == 0 and ask(capsys, *dry, "--out", tmp_path / "new")["taken_in"] == 0
    (tmp_path / "mine" / PACK).unlink()
    assert "taken_in" not in ask(capsys, *dry) and taken.source_of(None, "mine.toml", tmp_path / "new") is None


def test_folder_stands_in(place, tmp_path):
    """A folder stands in for a task by name, with that task's metric; its content, and not its path, is in the key."""
    data = folders.write_data(tmp_path / "anything")
    study = small(place, seeds=1, swap={}, rows=[], tasks=[{"task": "glue/mrpc"}])
    keys = []
    for folder in (data, shutil.copytree(data, tmp_path / "copy")):
        from lrkit.study.asked import standing_in
        from lrkit.study.graph import jobs_of

        keys.append(jobs_of(lay_out(standing_in(study, {"glue/mrpc": folder})))[0].key)
        both = small(place, seeds=1, swap={}, rows=[], tasks=[{"task": "glue/mrpc", "data": str(folder)}])
        assert jobs_of(lay_out(both))[0].key == keys[-1], "as a study file says it"
    table = lrkit.ablate(study, out=tmp_path / "study", workers=0, costs=False, data={"glue/mrpc": data})

    assert keys[0] == keys[1] == read_study(tmp_path / "study").cells[0].key
    assert table.tasks == ("glue/mrpc",) and set(read_study(tmp_path / "study").cells[0].result.scores) == {
        "accuracy",
        "f1",
    }
    with pytest.raises(LrkitError, match='did you mean "glue/mrpc"'):
        lrkit.ablate(study, out=tmp_path / "x", data={"glue/mrcp": data})


def test_studies_in_subfolders(tmp_path, monkeypatch):
    """A study file in a subfolder is offered by its plain name; two of one name are refused; a missing plug-in is named."""
    from lrkit.study import shipped

    monkeypatch.setattr("lrkit.study.shipped.resources.files", lambda package: tmp_path)
    (tmp_path / "studies" / "replication").mkdir(parents=True)
    (tmp_path / "studies" / "b.toml").write_text('base = "lora"\n')
    (tmp_path / "studies" / "replication" / "a.toml").write_text('base = "lora"\nrequires = ["lrkit-nowhere"]\n')
    found = shipped.files_in("x")

    assert list(found) == ["a", "b"]
    with pytest.raises(LrkitError, match="needs lrkit-nowhere, which is not installed"):
        lrkit.ablate(str(found["a"]), out=tmp_path / "out")
    (tmp_path / "studies" / "replication" / "b.toml").write_text('base = "lora"\n')
    with pytest.raises(LrkitError, match='two study files of the name "b"'):
        shipped.files_in("x")
