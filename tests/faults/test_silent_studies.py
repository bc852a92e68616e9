"""Studies that were silently another one: names of the base, statements made late, settings that lost, scales, packs."""

import functools
import json
import shutil

import attrs
import folders
import pytest
import studies
from transformers import TrainingArguments

import lrkit
from lrkit.cli import main
from lrkit.cli.studies import _study
from lrkit.compose import from_plain
from lrkit.errors import LrkitError
from lrkit.study.asked import study_from, study_named
from lrkit.study.controls import allocated
from lrkit.study.cost import _stepped
from lrkit.study.execute import check
from lrkit.study.files import CellResult, Parameters
from lrkit.study.graph import jobs_of
from lrkit.study.ledger import write_plan
from lrkit.study.models import empty_model
from lrkit.study.needs import Source
from lrkit.study.pack import write_pack
from lrkit.study.plan import lay_out
from lrkit.study.records import read_study
from lrkit.study.run import train
from lrkit.study.run_settings import settings_from
from lrkit.study.statistics import compare
from lrkit.study.study_file import read_study_file
from lrkit.study.trainer import RunTrainer
from lrkit.study.tune import Tuned, _toml, tuning_plan
from lrkit.study.tuned import Choice, TrialRecord
from lrkit.tasks import load_task

RUN = {"steps": 4, "batch_size": 8, "max_length": 16, "validation_rows": 16}
CLAIM = {"name": "c", "says": "s", "source": "us", "higher": "AdaLoRA", "lower": "metric=magnitude"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return folders.write_place(tmp_path_factory.mktemp("place"), layers=2)


@pytest.fixture
def write(place, tmp_path):
    """Plan AdaLoRA with another metric, and write it into a folder."""

    def write(name, **changes):
        where = {"tasks": [{"data": str(place / "data")}], "model": str(place / "model"), "run": RUN, "seeds": 2}
        plan = lay_out(study_from({"base": "adalora", "swap": {"metric": ["magnitude"]}, **where, **changes}))
        tasks = check(plan)
        write_plan(plan, jobs_of(plan), tasks, tmp_path / name)
        return tmp_path / name

    return write


def test_relabelled_base_keeps_statements(write):
    """A base that is called otherwise now is the same base, and claims, values and controls that name it follow."""
    write("s")
    stated = {
        "label": "AdaLoRA",
        "claims": [CLAIM],
        "margin": 0.01,
        "published": {"source": "x", "values": {"AdaLoRA": {"data": "95.8"}}},
        "rows": [{"label": "u", "from": "AdaLoRA", "control": "uniform"}],
    }
    for _ in range(2):  # the same command goes on
        record = read_study(write("s", **stated))
        assert [row.label for row in record.rows] == ["adalora", "metric=magnitude", "u"]
        assert (record.claims[0].higher, record.rows[2].source) == ("adalora", "adalora")
        assert [row.published for row in compare(record).rows] == ["95.8", "", ""]


def test_relabelled_base_beside_its_namesake(write):
    """A row that has the base's name of before would be taken for the base."""
    write("s")
    with pytest.raises(LrkitError, match='its base is called "adalora", which is another row here'):
        write("s", label="AdaLoRA", rows=[{"label": "adalora", "base": "lora"}])


@pytest.mark.parametrize("rates", [[1e-3, 3e-3], [1e-3, 3e-3, 1e-2]])
def test_late_claims_beside_wider_tuning(write, rates):
    """Claims come before the first test cell, though a wider tuning chooses anew and trains other cells."""
    tuned = {"space": {"run.lr": [1e-3, 3e-3]}, "seeds": 1}
    folder = write("s", tune=tuned)
    for cell in read_study_file(folder).cells:
        (folder / "cells" / cell.key).mkdir(parents=True)
    with pytest.raises(LrkitError, match="must be stated before the first test cell"):
        write("s", label="AdaLoRA", tune={**tuned, "space": {"run.lr": rates}}, margin=0.01, claims=[CLAIM])


def test_claim_margin_in_points(place):
    """A claim's own margin is a share, as the study's is: no advantage of accuracy reaches 1."""
    with pytest.raises(LrkitError, match="the margin of claim c must be below 1"):
        check(
            lay_out(
                study_from(
                    {
                        "base": "adalora",
                        "label": "AdaLoRA",
                        "swap": {"metric": ["magnitude"]},
                        "tasks": [{"data": str(place / "data")}],
                        "model": str(place / "model"),
                        "run": RUN,
                        "claims": [{**CLAIM, "margin": 1.0}],
                    }
                )
            )
        )


def test_chosen_settings_win(tmp_path):
    """The file of chosen settings trains what the best trial trained, though the task has settings of its own."""
    task = {"task": "movies", "run": {"lr": 5e-4, "batch_size": 4}, "set": {"parameterization.alpha": 4}}
    space = {"run.lr": [1e-3, 3e-3], "alpha": [8, 16]}
    study = study_from({"base": "lora", "run": RUN, "tasks": [task], "tune": {"space": space}})
    plan = tuning_plan(study)
    cell = jobs_of(plan)[0].cell
    chosen = {"run.lr": cell.run["lr"], "parameterization.alpha": cell.method["parameterization"]["alpha"]}
    choice = Choice(trial=0, settings=chosen, default={})
    trial = TrialRecord(number=0, settings=chosen, scores={1000: 0.5}, mean=0.5)
    tuned = Tuned(method="lora", choice=choice, trials=(trial,), folder=tmp_path)
    (tmp_path / "chosen.toml").write_text(_toml(study, plan.tasks[0], tuned))
    plan = lay_out(study_named(tmp_path / "chosen.toml"))
    settings, method = plan.settings(plan.rows[0], plan.tasks[0], 0), plan.method(plan.rows[0], plan.tasks[0])
    assert (settings.lr, method.parameterization.alpha) == (1e-3, 8)
    assert settings.batch_size == 4


@pytest.mark.parametrize("scale", ["rank", "sqrt-rank"])
def test_controls_keep_the_scale(scale):
    """A control of rank 2 scales its increment as its source of rank 8 does, by α/r and by α/√r."""
    fixed = {"rank": 8, "target_rank": 2, "parameterization.alpha": 16.0, "parameterization.scale": scale}
    rows = [{"from": "adalora", "control": "uniform", "label": "u"}]
    source, control = jobs_of(
        lay_out(study_from({"base": "adalora", "set": fixed, "rows": rows, "run": RUN, "seeds": 1}))
    )
    net = empty_model("minilm", load_task("movies").head)

    def scaling(adapted):
        return {round(adapter.scaling, 3) for adapter in adapted.adapters.values()}

    adapted = lrkit.attach(net, from_plain(source.cell.method))
    layers, theirs = tuple(attrs.evolve(each, rank=2) for each in adapted.summary().layers), scaling(adapted)
    adapted.detach()
    size = Parameters(start=1, now=1, average=1, head=0, step=20)
    result = CellResult(scores={"accuracy": 0.5}, steps=20, parameters=size, layers=layers)
    needed = Source(key="x", config=source.cell.to_plain(), result=result)
    adapted = lrkit.attach(net, from_plain(allocated(control.cell, [needed], {"control": "uniform"}).method))
    assert scaling(adapted) == theirs == {round(16 / (8 if scale == "rank" else 8**0.5), 3)}


def test_one_tuning_seed_has_no_next(place):
    """Transplanted ranks are the next seed's, in trials as well."""
    study = {
        "base": "adalora",
        "rows": [{"from": "adalora", "control": "transplanted"}],
        "tune": {"space": {"run.lr": [1e-3, 3e-3]}, "seeds": 1},
        "seeds": 3,
    }
    with pytest.raises(LrkitError, match="there is one tuning seed"):
        lay_out(study_from(study))


@pytest.mark.parametrize("halving", [0, 1, -2])
def test_halving_by_less_than_two(halving):
    """Halving by nothing is refused in a line, before anything is counted by it."""
    with pytest.raises(LrkitError, match="halving must be 2 or more"):
        lay_out(study_from({"base": "lora", "tune": {"space": {"run.lr": [1e-3, 3e-3]}, "halving": halving}}))


def test_tune_given_twice(capsys):
    """The second --tune of a setting would replace the first one's values."""
    with pytest.raises(SystemExit, match="2"):
        main(["ablate", "lora", "--tune", "run.lr=1e-3", "--tune", "run.lr=3e-3", "--dry-run"])
    assert "--tune run.lr is given twice: join its values" in capsys.readouterr().err


def test_costs_of_rows_alike():
    """Rows that train other layers, or in another precision, are measured; rows of another rate or seed are not."""
    cell = {"method": {}, "targets": "all-linear", "train_also": "auto", "run": {"lr": 1e-3, "seed": 0, "bf16": False}}
    same = {**cell, "run": {**cell["run"], "lr": 3e-3, "seed": 1}}
    assert _stepped(cell) == _stepped(same)
    for other in ({"targets": ["query"]}, {"train_also": []}, {"run": {**cell["run"], "bf16": True}}):
        assert _stepped(cell) != _stepped({**cell, **other})


@pytest.mark.parametrize("option", ["--size", "--margin"])
def test_power_of_points(tmp_path, capsys, option):
    """A size in points is no share: of accuracy 0.01 is one point."""
    studies.write_study(tmp_path / "s", costs=False)
    with pytest.raises(SystemExit, match="2"):
        main(["power", str(tmp_path / "s"), option, "1"])
    assert f"{option} must be below 1" in capsys.readouterr().err


def test_best_of_perplexities(tmp_path):
    """The bold mean in LaTeX is the lowest one of a score that is better if it is lower, and the note does not lie."""
    labels = ("a", "b")
    studies.write_study(tmp_path / "s", labels=labels, score=lambda row, task, seed: 10 + seed / 10 - row, costs=False)
    text = compare(read_study(tmp_path / "s")).to_latex()
    assert "Bold: the best mean." in text and "highest" not in text


def test_another_study_s_pack_stays(tmp_path):
    """A pack of the same rows, tasks and seeds but of another length is not replaced."""
    for name in ("one", "other"):
        studies.write_study(tmp_path / name, seeds=range(3), costs=False, layers=1, evaluate=0)
    plain = json.loads((tmp_path / "other" / "study.json").read_text())
    plain["run"] = {**plain["run"], "steps": 7}
    (tmp_path / "other" / "study.json").write_text(json.dumps(plain))
    write_pack(tmp_path / "one", tmp_path / "pack")
    before = (tmp_path / "pack" / "cells.jsonl.gz").read_bytes()
    with pytest.raises(LrkitError, match="is of another study, whose run is"):
        write_pack(tmp_path / "other", tmp_path / "pack")
    assert (tmp_path / "pack" / "cells.jsonl.gz").read_bytes() == before
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    write_pack(tmp_path / "copy", tmp_path / "pack")


@pytest.mark.parametrize("seeds", [5, 6])
def test_equal_differences_are_told(tmp_path, seeds):
    """The table says of equal differences that they are coarse, also where there are too few for an interval."""
    labels = ("adalora", "metric=magnitude")
    studies.write_study(tmp_path / "s", labels=labels, seeds=range(seeds), score=lambda *_: 0.8, costs=False)
    _, row = compare(read_study(tmp_path / "s")).rows
    assert any(note.startswith(f"all {seeds} differences are equal") for note in row.notes)


def test_settings_beside_a_file(tmp_path):
    """Settings of the command line replace those of the file, and those of its tasks."""
    file = tmp_path / "mine.toml"
    file.write_text(
        'base = "adalora"\nseeds = 6\n[swap]\nmetric = ["magnitude"]\n[run]\nsteps = 20\n[[tasks]]\ntask = "movies"\n'
        'run = {lr = 5e-3, batch_size = 8}\nset = {"scheduler.warmup" = 0.4}\n'
    )
    changes = {"set": {}, "run": {}, "swap": {}, "tune": {}, "loading": {}}
    given = ({"run": {"lr": 1e-5}}, {"set": {"scheduler.warmup": 0.25}}, {"set": {"warmup": 0.25}})
    plans = [lay_out(_study(str(file), {**changes, **each}, [], None)) for each in given]
    found = [
        (plan.settings(plan.rows[0], plan.tasks[0], 0), plan.method(plan.rows[0], plan.tasks[0]).scheduler.warmup)
        for plan in plans
    ]
    assert [(settings.lr, settings.batch_size, warmup) for settings, warmup in found] == [
        (1e-5, 8, 0.4),
        (5e-3, 8, 0.25),
        (5e-3, 8, 0.25),
    ]


def test_another_base_with_old_cells(write):
    """A study with another base is another study, whatever has become of the code that its cells are of."""
    folder = write("s", rows=[{"label": "lora", "base": "lora"}], swap={})
    plain = json.loads((folder / "study.json").read_text())
    for cell in plain["cells"]:
        cell["code"] = "0123456789abcdef"
    (folder / "study.json").write_text(json.dumps(plain))
    with pytest.raises(LrkitError, match='its base is "adalora", and not "lora"'):
        write("s", base="lora", rows=[{"label": "adalora", "base": "adalora"}], swap={})


def test_one_device_in_one_process(place, monkeypatch):
    """A run has one GPU, however many a process sees: transformers would feed all of them, a batch each."""

    class Seen(Exception):
        """Ends the run."""

    real = TrainingArguments.__dict__["_setup_devices"].func

    def two(self):
        device, self._n_gpu = real(self), 2
        return device

    def trained(self, **_):
        assert (self.args.n_gpu, self.args.train_batch_size) == (1, 4)
        raise Seen

    seen = functools.cached_property(two)
    seen.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", seen)
    monkeypatch.setattr(RunTrainer, "train", trained)
    where = {"model": str(place / "model"), "settings": settings_from({**RUN, "batch_size": 4})}
    with pytest.raises(Seen):
        train(lrkit.methods.lora(rank=2), load_task(data=str(place / "data")), **where)


def test_counts_that_are_not_exact(capsys):
    """A count that depends on which units go is marked; one that does not is exact."""
    with pytest.raises(SystemExit, match="0"):
        main(["params", "adalora", "aflora", "--model", "minilm"])
    found = capsys.readouterr().out
    lines = {line.split()[0]: line for line in found.splitlines() if line.strip()}
    assert "≈ 332,064" in lines["adalora"] and " 20,880 " in lines["aflora"] and "≈ 20,880" not in lines["aflora"]
    assert "--json has the range" in found


@pytest.mark.filterwarnings("ignore:run.bf16:lrkit.errors.LrkitWarning")
def test_second_run_in_bfloat16():
    """A run in bfloat16 computes so in whichever place of its process: accelerate's mark on the model would turn it off."""
    losses = []
    for bf16 in (True, True, False, True):
        settings = settings_from({**RUN, "steps": 2, "bf16": bf16, "seed": 1})
        losses.append(train(lrkit.methods.lora(rank=2), load_task("movies"), settings=settings).losses)
    assert losses[0] == losses[1] == losses[3] != losses[2]
