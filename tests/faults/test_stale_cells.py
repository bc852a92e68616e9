"""Cells of other code, with damaged files or with leftovers: told, and mended by the same command."""

import json
import os
import shutil
import warnings
from pathlib import Path

import attrs
import folders
import pytest

import lrkit
from lrkit.cli import main
from lrkit.study import code
from lrkit.study.execute import execute
from lrkit.study.plan import lay_out, study_from
from lrkit.study.records import frame, read_study

PACKAGE = Path(lrkit.__file__).parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return folders.write_place(tmp_path_factory.mktemp("place"))


def study(place, **changes):
    plain = {"base": "lora", "set": {"rank": 2}, "tasks": [{"data": str(place / "data")}], "seeds": 1}
    plain |= {"model": str(place / "model"), "run": {"steps": 2, "batch_size": 4, "max_length": 8}}
    return study_from(plain | changes)


def go(place, out, keep_old=False, **changes):
    return execute(lay_out(study(place, **changes)), out, workers=0, costs=False, keep_old=keep_old)


@pytest.fixture
def other_code(monkeypatch):
    """From here on lrkit's sources have another digest."""

    def change(digest="another"):
        monkeypatch.setattr(code, "lrkit_digest", lambda: digest)

    return change


def test_cells_of_other_code_are_computed_again(place, tmp_path, other_code):
    """They are told, and replaced; unless they are to be kept, and then shown as such."""
    go(place, tmp_path / "out")
    other_code()
    shutil.copytree(tmp_path / "out", tmp_path / "kept")
    with pytest.warns(lrkit.errors.LrkitWarning, match=r"1 cell in .* is of other code .* 1 are computed again"):
        assert go(place, tmp_path / "out").ran == 1
    assert not read_study(tmp_path / "out").cells[0].old
    with pytest.warns(lrkit.errors.LrkitWarning, match="1 are kept as they are"):
        assert go(place, tmp_path / "kept", keep_old=True).ran == 0
    record = read_study(tmp_path / "kept")
    assert record.cells[0].old and list(frame(record)["other_code"]) == [True]
    from lrkit.study.report import write_report

    write_report(tmp_path / "kept")
    assert "1 cell is of other code" in (tmp_path / "kept" / "report.html").read_text()


def test_other_rows_of_other_code_are_marked(place, tmp_path, other_code):
    """What is not asked for again stays in the study, and is shown as of other code."""
    go(place, tmp_path / "out", swap={"parameterization.alpha": [4.0]})
    other_code()
    with pytest.warns(lrkit.errors.LrkitWarning, match="other code"):
        go(place, tmp_path / "out")
    assert [cell.old for cell in read_study(tmp_path / "out").cells] == [False, True]


def test_a_changed_default_rate_is_another_cell(place, tmp_path, monkeypatch):
    """The rates in force are part of a cell's key and of its config.json."""
    from lrkit.parameterizations import LoRA

    go(place, tmp_path / "out")
    monkeypatch.setattr(LoRA, "learning_rate", 0.25)
    assert go(place, tmp_path / "out").ran == 1
    configs = [json.loads(path.read_text())["run"] for path in (tmp_path / "out").glob("cells/*/config.json")]
    assert sorted(run["lr"] for run in configs) == [0.001, 0.25]
    assert {"lr", "head_lr", "grad_clip", "lr_warmup", "weight_decay"} <= configs[0].keys()


def test_a_changed_default_setting_gives_way(place, tmp_path, other_code):
    """A row whose cells are all of other code may be another method now; one of this code may not."""
    go(place, tmp_path / "out")
    with pytest.raises(lrkit.LrkitError, match="holds another study"):
        go(place, tmp_path / "out", set={"rank": 3})
    other_code()
    with pytest.warns(lrkit.errors.LrkitWarning, match="other code"):
        assert go(place, tmp_path / "out", set={"rank": 3}).ran == 1
    assert len(read_study(tmp_path / "out").cells) == 1


def test_a_folder_of_the_version_before_is_read(place, tmp_path):
    """Cells without a digest are of other code; they can be kept, whatever their rates were."""
    go(place, tmp_path / "out")
    path = tmp_path / "out" / "study.json"
    plain = json.loads(path.read_text())
    (cell,) = plain["cells"]
    folder = tmp_path / "out" / "cells" / cell["key"]
    old = "0" * 16
    folder.rename(folder.with_name(old))
    for name in ("config.json", "result.json"):
        file = folder.with_name(old) / name
        content = json.loads(file.read_text()) | {"key": old}
        if name == "config.json":
            del content["versions"]["code"]
            content["run"] |= {"lr": None, "head_lr": None}
        file.write_text(json.dumps(content))
    (folder.with_name(old) / "files.json").unlink()
    plain["cells"] = [{k: v for k, v in cell.items() if k not in ("code", "old")} | {"key": old}]
    for row in plain["rows"]:
        del row["rates"]
    path.write_text(json.dumps(plain))
    assert read_study(tmp_path / "out").cells[0].old
    with pytest.warns(lrkit.errors.LrkitWarning, match="kept"):
        assert go(place, tmp_path / "out", keep_old=True).ran == 0
    with pytest.warns(lrkit.errors.LrkitWarning, match="computed again"):
        assert go(place, tmp_path / "out").ran == 1


def test_a_study_before_targets_is_joined(place, tmp_path):
    """A study.json from before targets and heads were written down is gone on with, and nothing runs again."""
    go(place, tmp_path / "out", swap={"parameterization.alpha": [4.0]})
    path = tmp_path / "out" / "study.json"
    plain = json.loads(path.read_text())
    del plain["train_also"]
    for row in plain["rows"]:
        del row["targets"], row["train_also"], row["run"]
    path.write_text(json.dumps(plain))
    assert go(place, tmp_path / "out", swap={"parameterization.alpha": [4.0]}).ran == 0
    with pytest.raises(lrkit.LrkitError, match='train_also is "auto" there'):
        go(place, tmp_path / "out", train_also=[])


def test_what_is_outside_the_digest():
    """Every file of the package counts but for those listed; each that is listed is there."""
    inside = {path.relative_to(PACKAGE).as_posix() for path in code.inside(PACKAGE)}
    everything = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*") if p.is_file()}
    left_out = {
        name for name in everything - inside if "__pycache__" not in name and not Path(name).name.startswith(".")
    }
    assert all((PACKAGE / name).exists() for name in code.OUTSIDE)
    assert all(any(name == out or name.startswith(f"{out}/") for out in code.OUTSIDE) for name in left_out)
    assert {
        "loop/native.c",
        "method.py",
        "study/run.py",
        "study/trainer.py",
        "metrics/base.py",
        "tasks/base.py",
    } <= inside


def test_a_new_module_counts(tmp_path):
    """A file that nobody has listed changes the digest, one that is outside does not."""
    shutil.copytree(PACKAGE, tmp_path / "lrkit", ignore=shutil.ignore_patterns("__pycache__"))

    def digest():
        return code._hash((p.name, p) for p in code.inside(tmp_path / "lrkit"))

    before = digest()
    (tmp_path / "lrkit" / "cli" / "app.py").write_text("")
    assert digest() == before
    (tmp_path / "lrkit" / "brand_new.py").write_text("")
    assert digest() != before


@pytest.fixture(scope="module")
def made(place, tmp_path_factory):
    """A study that has run to its end."""
    out = tmp_path_factory.mktemp("made") / "out"
    go(place, out)
    return out


@pytest.mark.parametrize("name", ["predictions.npz", "lrkit.safetensors", "config.json", "files.json", "result.json"])
@pytest.mark.parametrize("damage", ["half", "byte", "gone", "FIFO"])
def test_a_damaged_file_is_made_again(place, made, tmp_path, name, damage):
    """Cut short, with one byte changed, gone, or no file at all: the same command makes the cell again."""
    out = shutil.copytree(made, tmp_path / "out")
    (path,) = out.glob(f"cells/*/{name}")
    whole = path.read_bytes()
    spoilt = {"half": whole[: len(whole) // 2], "byte": whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:]}
    if damage in ("gone", "FIFO"):
        path.unlink()
        if damage == "FIFO":
            os.mkfifo(path)
    else:
        path.write_bytes(spoilt[damage])
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        again = go(place, out)
    if damage == "gone" and name == "files.json":
        return  # a cell from before there was such a list
    assert again.ran == 1 and path.read_bytes() == whole


def test_done_cells_are_tidied(place, tmp_path):
    """What a kill after the result left is taken away by the same command."""
    go(place, tmp_path / "out")
    (cell,) = (tmp_path / "out" / "cells").iterdir()
    (cell / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    for name in ("checkpoints/checkpoint-2/optimizer.pt", ".lrkit.safetensors.x", ".predictions.npz.y", "error.txt"):
        (cell / name).write_bytes(b"x")
    (tmp_path / "out" / ".study.json.z").write_bytes(b"x")
    go(place, tmp_path / "out")
    left = [p.name for p in [*cell.iterdir(), *(tmp_path / "out").iterdir()]]
    assert not [name for name in left if name.startswith(".") or name in ("checkpoints", "error.txt")]


def workers_reach_the_executor(place, tmp_path, capsys):
    """As many processes run cells as the command line asks for. See tests/integrations/test_more_processes.py."""
    command = ["ablate", "lora", "--data", str(place / "data"), "--model", str(place / "model"), "--seeds", "4"]
    command += ["--set", "run.steps=25", "--set", "run.batch_size=4", "--set", "run.max_length=8", "--no-costs"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--workers", "2", "--out", str(tmp_path / "out")])
    assert ended.value.code == 0, capsys.readouterr().err
    lines = [json.loads(path.read_text().splitlines()[0]) for path in (tmp_path / "out").glob("cells/*/attempts.jsonl")]
    assert len({line["pid"] for line in lines}) == 2


def test_options_reach_what_they_name(place, tmp_path, monkeypatch):
    """Every option of how a study is run arrives at `execute` as it was given."""
    seen = {}

    def spy(plan, folder, **given):
        seen.update(given, folder=folder)
        raise lrkit.LrkitError("seen")

    monkeypatch.setattr("lrkit.study.execute.execute", spy)
    words = "--executor ray --workers 3 --threads 5 --address a:1 --no-costs --checkpoint 7 --keep-old"
    words += " --report-to tensorboard"
    with pytest.raises(SystemExit):
        main(["ablate", "lora", "--out", str(tmp_path / "o"), *words.split()])
    expected = {"executor": "ray", "workers": 3, "threads": 5, "address": "a:1", "costs": False}
    expected |= {"checkpoint_seconds": 7.0, "report_to": ["tensorboard"], "keep_old": True}
    assert {key: seen[key] for key in expected} == expected


def test_threads_that_the_environment_asks_for(place, tmp_path, monkeypatch):
    """OMP_NUM_THREADS is what a worker gets, unless --threads says otherwise."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    go(place, tmp_path / "out")
    (env,) = (tmp_path / "out").glob("cells/*/env.json")
    assert json.loads(env.read_text())["threads"] == 1


@pytest.mark.filterwarnings("ignore:run.bf16:lrkit.errors.LrkitWarning")
def test_a_run_leaves_nothing_to_the_next(place, tmp_path):
    """Each cell saves the bytes that it saves alone, whatever ran before: bfloat16, another seed, another method."""
    rows = [
        {"label": "b", "run": {"bf16": True}},
        {"label": "d", "base": "adalora", "set": {"rank": 4, "target_rank": 2}},
    ]
    go(place, tmp_path / "many", rows=rows, seeds=[1, 0])
    go(place, tmp_path / "one", seeds=[0])
    (key,) = [p.name for p in (tmp_path / "one" / "cells").iterdir()]
    for name in ("lrkit.safetensors", "predictions.npz", "result.json"):
        one, many = ((tmp_path / folder / "cells" / key / name).read_bytes() for folder in ("one", "many"))
        assert one == many, name


def test_a_swap_says_what_else_it_changes(place, capsys):
    """The dry run has each row's rate, and the rate that a swap of the parameterization brings along."""
    command = ["ablate", "svd-lora", "--swap", "parameterization=lora", "--dry-run", "--json"]
    with pytest.raises(SystemExit):
        main([*command, "--data", str(place / "data"), "--model", str(place / "model"), "--set", "run.steps=4"])
    told = json.loads(capsys.readouterr().out)
    assert [rate["data"]["lr"] for rate in told["rates"].values()] == [0.01, 0.001]
    assert {"path": "run.lr (by default)", "base": 0.01, "value": 0.001} in told["rows"]["parameterization=lora"]


def test_formulas_in_csv():
    """A text that a spreadsheet would run gets an apostrophe; a number does not."""
    from lrkit.study.sheet import harmless, safe_csv

    for text in (
        "=1+1",
        "+cmd",
        "-cmd",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\n=1",
        " =1",
        "＝1",
        "＋1",
        "－1",
        "＠a",
        '"=1',
        "|x",
    ):
        assert harmless(text) == f"'{text}"
    for text in ("-0.5", "+1e-3", "nan", "-inf", "adalora", "a=b", "", "0"):
        assert harmless(text) == text
    assert safe_csv('row,x\n"=a,b",-1\n') == 'row,x\n"\'=a,b",-1\n'


def test_long_messages_are_cut(place, tmp_path, monkeypatch, capsys):
    """Of 100,000 characters the beginning and the end are printed and kept."""
    from lrkit.metrics import Magnitude

    monkeypatch.setattr(
        Magnitude, "score", lambda *_: 1 / 0 if False else (_ for _ in ()).throw(ValueError("x" * 10**5))
    )
    changes = {"base": "adalora", "set": {"rank": 4, "target_rank": 2}, "swap": {"metric": ["magnitude"]}}
    outcome = execute(lay_out(study(place, **changes)), tmp_path / "out", workers=0, costs=False)
    ((_, error),) = outcome.failed
    assert len(error) < 3000
    written = "\n".join(path.read_text() for path in (tmp_path / "out").glob("cells/*/attempts.jsonl"))
    assert max(map(len, written.splitlines())) < 5000
    with pytest.raises(SystemExit):
        main(["run", "lora", "--set", f"parameterization.rank={'x' * 10**5}"])
    assert len(capsys.readouterr().err) < 3000


def test_what_was_trained_is_kept_elsewhere(place, tmp_path, monkeypatch):
    """A folder that fails at the end loses nothing: it is in another one, and that is said."""
    from lrkit.study.place import written

    (tmp_path / "file").write_text("")
    there, why = written(tmp_path / "file", lambda folder: (folder / "a").write_text("mine"))
    assert (there / "a").read_text() == "mine" and why and there != tmp_path / "file"


def test_attributes_of_a_cell():
    """A cell's plain data is all that its key is made of."""
    from lrkit.study.cell import Cell

    names = {field.name for field in attrs.fields(Cell)}
    trained = {"task", "model", "targets", "train_also", "method", "run", "versions"}
    assert names == trained | {"needs", "selection", "stop", "loading"}
