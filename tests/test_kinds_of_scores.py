"""Scores that are better if they are lower, several scores, answers to be read, and tokens: from a run to its report."""

import json
import math

import attrs
import lower_task
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import lrkit
from lrkit import LrkitError, methods
from lrkit.study.asked import study_from
from lrkit.study.choosing import best_of, means_of, winner_of
from lrkit.study.claims import judge
from lrkit.study.combined import combine
from lrkit.study.files import CellResult, Parameters
from lrkit.study.needs import Source
from lrkit.study.records import frame, read_study
from lrkit.study.run import RunSettings, train
from lrkit.study.scores import scale_of
from lrkit.study.statistics import compare

PARAMETERS = Parameters(start=1, now=1, average=1.0, head=0, step=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    lower_task.write(lower_task.llama, folder / "llama")
    lower_task.write(lower_task.t5, folder / "t5")
    return folder


@pytest.fixture
def offered(monkeypatch):
    """The two tasks as a plug-in offers them."""
    tasks = {"ppl": lower_task.perplexity, "echo": lower_task.echo}
    monkeypatch.setattr("lrkit.registry.registered_tasks", lambda: tasks)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "up", "text", "heading"),
    [
        ("perplexity", 8.12345, False, "8.123", "perplexity, lower is better"),
        ("perplexity", 812.345, False, "812.35", "perplexity, lower is better"),
        ("em", 0.8125, True, "81.25 %", "em, %"),
        ("rougeLsum", 0.31, True, "31.00 %", "rougeLsum, %"),
        ("has_answer_f1", 0.5, True, "50.00 %", "has_answer_f1, %"),
        ("accuracy_mm", 0.5, True, "50.00 %", "accuracy_mm, %"),
        ("matthews", 0.5, True, "0.5000", "matthews"),
    ],
)
def test_scores_written(name, value, up, text, heading):
    """A share is per cent; a perplexity has three places or two, and its heading says which way is better."""
    scale = scale_of([name], [value], higher_is_better=up)
    assert (scale.text(value), scale.heading(name)) == (text, heading)


def sources(*scores, up):
    results = [CellResult(scores={"s": each}, steps=1, parameters=PARAMETERS, higher_is_better=up) for each in scores]
    return [Source(key=str(n), result=each, config={}) for n, each in enumerate(results)]


def test_lowest_is_chosen():
    """Of trials 5.0, 3.0, inf and 4.0 the second is chosen; with halving the second and the fourth go on."""
    settings = {"space": {"run.lr": [1, 2, 3, 4]}, "seeds": 1}
    tried = sources(5.0, 3.0, math.inf, 4.0, up=False)
    assert winner_of(tried, settings) == (1, {"run.lr": 2})
    assert means_of(tried, 1) == [-5.0, -3.0, -math.inf, -4.0]
    halved = {**settings, "rungs": [4, 2]}
    assert winner_of([*tried, *sources(2.5, 2.0, up=False)], halved) == (5, {"run.lr": 4})
    assert winner_of(sources(5.0, 3.0, math.nan, 4.0, up=True), settings) == (0, {"run.lr": 1})
    with pytest.raises(LrkitError, match="diverged"):
        best_of(means_of(sources(math.inf, math.nan, up=False), 1))


def test_direction_in_result(tmp_path):
    """A result says its direction if it is down, and a file of before, or of a score that goes up, says nothing."""
    up = CellResult(scores={"s": 1.0}, steps=1, parameters=PARAMETERS)
    assert "higher_is_better" not in up.to_file("k")
    assert attrs.evolve(up, higher_is_better=False).to_file("k")["higher_is_better"] is False
    assert up.merit == 1.0 and attrs.evolve(up, higher_is_better=False).merit == -1.0


# ---- a study of a perplexity -----------------------------------------------------------------------------------------


def as_perplexity(folder, score, claims=()):
    """Write a made-up study whose score is a perplexity."""
    from studies import write_study

    write_study(folder, labels=("lora", "adalora", "aflora"), layers=1, steps=20, seeds=range(8), score=score)
    study = json.loads((folder / "study.json").read_text())
    study["tasks"] = [{"name": "movies", "metric": "perplexity", "majority": None, "higher_is_better": False}]
    study |= {"claims": list(claims), "margin": 2.0}
    (folder / "study.json").write_text(json.dumps(study))
    for path in folder.glob("cells/*/result.json"):
        result = json.loads(path.read_text())
        result["scores"] = {"perplexity": next(iter(result["scores"].values())), "nats": 1.5}
        result |= {"higher_is_better": False, "majority": 30.0}
        path.write_text(json.dumps(result))
    return folder


def claim(higher, lower):
    return {
        "name": f"{higher} over {lower}",
        "says": "one is better",
        "source": "a paper",
        "higher": higher,
        "lower": lower,
    }


def test_lower_wins_claims(tmp_path):
    """The row with the lower perplexity is the better one: in claims, in the table's mark, against a guess."""
    rng = np.random.default_rng(0)
    noise = rng.uniform(-0.2, 0.2, (3, 8))
    means = (20.0, 10.0, 31.0)
    folder = as_perplexity(
        tmp_path / "study",
        lambda row, _, seed: means[row] + noise[row, seed],
        [claim("adalora", "lora"), claim("aflora", "lora")],
    )
    record = read_study(folder)
    first, second = judge(record)
    assert (first.verdict, second.verdict) == ("replicated", "not replicated")
    assert 9.5 < first.tasks[0].difference < 10.5, "an advantage"
    table = compare(record)
    assert table.rows[1].difference == pytest.approx(-10, abs=0.5), "the row minus the base"
    assert [row.warning for row in table.rows] == ["", "", "not below the trivial answers"]
    assert r"\textbf{9.9" in table.to_latex() or r"\textbf{10.0" in table.to_latex()
    assert "lower is better" in table.to_markdown() and "Lower is better: a negative difference" in str(table)
    assert not combine(record)


def test_report_of_perplexity(tmp_path, monkeypatch):
    """The page says the direction and has the further scores; no row left of the front is lower; the best is the lowest."""
    from lrkit.study.report import figures, write_report
    from lrkit.study.report.tuning import best
    from lrkit.study.report.view import View

    drawn, scatter = [], figures.scatter
    monkeypatch.setattr(figures, "scatter", lambda points, **how: drawn.append(points) or scatter(points, **how))
    folder = as_perplexity(tmp_path / "study", lambda row, _, seed: 20.0 - row + 0.01 * seed)
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert "lower is better" in page and "Further scores" in page and "nats" in page
    assert "scores.nats" in (folder / "cells.csv").read_text().splitlines()[0]
    for point in drawn[0]:
        assert point.front != any(other.x <= point.x and other.y < point.y for other in drawn[0])
    record = read_study(folder)
    view = View(record=record, table=compare(record), styles=(), chips=())
    for each in best(view, "movies").rows:
        assert float(each.gain.replace("−", "-")) < 0, "lower on the way than at the end"


@pytest.mark.parametrize(("task", "fits"), [("ppl", True), ("echo", False)])
def test_margin_of_scores(place, offered, task, fits):
    """A margin of 2 may be meant for a perplexity, and for no share."""
    from lrkit.study.execute import check
    from lrkit.study.plan import lay_out

    model = {"ppl": "llama", "echo": "t5"}[task]
    plain = {"base": "lora", "tasks": [task], "model": str(place / model), "margin": 2.0, "run": {"steps": 2}}
    plan = lay_out(study_from(plain))
    if fits:
        assert not check(plan)[task].higher_is_better
    else:
        with pytest.raises(LrkitError, match=r"margin must be below 1.*em is a share"):
            check(plan)


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_tokens_are_counted(place):
    """Tokens of all batches: without padding, and of an encoder-decoder with the targets; in a run that goes on, too."""
    words = lower_task.tokenizer()
    texts = [len(words(text)["input_ids"]) for text in lower_task.ROWS * 4]
    lasts = [2] * len(texts)  # a word and the end
    settings = RunSettings(epochs=2, batch_size=10, threads=1)
    for kind, model, each in (
        (lower_task.perplexity(), "llama", sum(texts)),
        (lower_task.echo(), "t5", sum(texts) + sum(lasts)),
    ):
        result = train(methods.lora(rank=2), kind, model=str(place / model), settings=settings)
        assert result.tokens == 2 * each
        assert result.tokens_per_second == pytest.approx(result.tokens / result.train_seconds)


def test_packed_tokens():
    """Of packed texts of 4, 2 and 3 tokens in two blocks of 8, nine are counted, and not what fills the blocks up."""
    from lrkit.study.batches import tokens_in

    batch = {
        "input_ids": torch.ones(2, 8),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 0, 0], [0, 1, 2, 0, 0, 0, 0, 0]]),
    }
    assert int(tokens_in(batch, lower_task.llama())) == 9
    assert int(tokens_in({"input_ids": torch.ones(2, 8)}, lower_task.llama())) == 16


def test_tokens_after_stop(place, tmp_path):
    """A run that stopped and went on has counted what the run that did not has, and scored the same."""
    from lrkit.study.run import Record

    settings = RunSettings(steps=6, batch_size=4, threads=1, seed=3)
    asked = {"model": str(place / "t5"), "settings": settings}
    whole = train(methods.lora(rank=2), lower_task.echo(), **asked)
    steps = iter([False, False, True])
    (tmp_path / "run").mkdir()
    record = Record(folder=tmp_path / "run", stop=lambda: next(steps))
    with pytest.raises(KeyboardInterrupt):
        train(methods.lora(rank=2), lower_task.echo(), record=record, **asked)
    again = train(methods.lora(rank=2), lower_task.echo(), record=Record(folder=tmp_path / "run"), **asked)
    assert again.tokens == whole.tokens and again.samples == whole.samples
    assert again.predictions == whole.predictions and again.losses == whole.losses
    assert again.tokens_per_second * again.train_seconds == pytest.approx(whole.tokens / 2, rel=0.2)


def test_samples_leave_chance(place):
    """Answers come of the trained model and of the base, three of each, and draw nothing from torch's generator."""
    import transformers

    folder = str(place / "t5")
    settings = RunSettings(steps=15, batch_size=10, lr=0.3, threads=1)
    states = []

    def done(_):
        states.append(torch.get_rng_state())

    result = train(methods.lora(rank=4), lower_task.echo(), model=folder, settings=settings, done=done)
    train(methods.lora(rank=4), lower_task.echo(), model=folder, settings=settings, done=done, samples=0)
    assert torch.equal(*states)
    plain = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    words = lower_task.tokenizer()
    said = lower_task.echo().samples(plain, words, 128, 3)
    assert [each["base"] for each in result.samples] == [each.output for each in said]
    assert [each["output"] for each in result.samples] == result.predictions[:3]
    assert [each["output"] for each in result.samples] != [each["base"] for each in result.samples]


def test_flops_by_hand():
    """The forward pass of a Llama and a T5: two operations a multiply-add, of all layers, adapters and attention."""
    from lrkit.accounting import flops

    for name, model, batch in models_with_batches():
        adapted = lrkit.attach(model, methods.lora(rank=2))
        assert flops(model, batch).forward == pytest.approx(sum(by_hand(model, batch, adapted)), rel=0.01), name


def models_with_batches():
    yield "llama", lower_task.llama(), {"input_ids": torch.arange(4, 12)[None], "labels": torch.arange(4, 12)[None]}
    yield "t5", lower_task.t5(), {"input_ids": torch.arange(4, 12)[None], "labels": torch.arange(4, 7)[None]}


def by_hand(model, batch, adapted):
    """List the forward operations of each matrix product."""
    source, target = batch["input_ids"].shape[1], batch["labels"].shape[1]

    def tokens(name):
        keys_of_encoder = "EncDecAttention" in name and name.endswith((".k", ".v"))
        return (
            target
            if name.startswith(("decoder", "lm_head")) and "t5" in str(type(model)) and not keys_of_encoder
            else source
        )

    adapters = {layer.name for layer in adapted.summary().layers}
    for name, module in lrkit_free(model).named_modules():
        if isinstance(module, torch.nn.Linear):
            yield 2 * tokens(name) * module.in_features * module.out_features
            if name in adapters:
                yield 2 * tokens(name) * 2 * (module.in_features + module.out_features)
    sizes = (
        [(source, source)] if "llama" in str(type(model)) else [(source, source), (target, target), (target, source)]
    )
    yield from (2 * 2 * queries * keys * 16 for queries, keys in sizes)  # scores, and their sum of values


def lrkit_free(model):
    """Return a model of the same shape without adapters."""
    return lower_task.llama() if "llama" in str(type(model)) else lower_task.t5()


# ---- whole studies ---------------------------------------------------------------------------------------------------


def test_study_of_perplexity(place, offered, tmp_path):
    """Trials choose the rate with the lowest perplexity; curves, table and report are there; trials answer nothing."""
    base = {"task": "ppl", "model": str(place / "llama"), "run": {"steps": 6, "batch_size": 4, "eval_every": 2}}
    tune = {"space": {"run.lr": [1e-4, 3e-1]}, "seeds": 1}
    table = lrkit.ablate("lora", {}, seeds=[0], tune=tune, out=tmp_path / "study", workers=0, costs=False, **base)
    record = read_study(tmp_path / "study")
    from lrkit.study.tuned import chosen_of, trials_of

    for row in range(len(record.rows)):
        trials = trials_of(record, row, "ppl")
        lowest = min(trials, key=lambda trial: trial.mean)
        assert chosen_of(record, row, "ppl").settings == lowest.settings
        assert record.cells_of(row)[0].config["run"]["lr"] == lowest.settings["run.lr"]
    cell = record.cells[0]
    assert [step for step, _ in cell.evaluations] == [2, 4, 6]
    assert set(cell.evaluations[0][1]) == {"perplexity", "nats"}
    assert table.rows[0].guess is None and table.rows[0].tokens_per_second > 0
    assert not any(trial.samples for trial in record.trials)
    assert {"tokens", "tokens_per_second"} <= set(frame(record).columns)


def test_study_keeps_answers(place, offered, tmp_path):
    """Answers in words are kept a line a row; a few are in the report, escaped; damage to them is seen."""
    from lrkit.study.cell_folder import damaged, is_done
    from lrkit.study.report import write_report

    base = {"task": "echo", "model": str(place / "t5"), "run": {"steps": 2, "batch_size": 4}}
    lrkit.ablate("lora", {"rank": [1]}, seeds=[0], out=tmp_path / "study", workers=0, costs=False, **base)
    record = read_study(tmp_path / "study")
    folder = record.cells[0].folder
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and all(isinstance(line, str) for line in lines)
    first = record.cells[0].samples[0]
    assert (first.input, first.reference) == (lower_task.ROWS[0], "good") and first.base is not None
    assert first.output == lines[0]
    path = folder / "samples.json"
    path.write_text(path.read_text().replace("the cat", "<b>the</b> cat" + " long" * 200))
    assert not is_done(folder) and damaged(folder) == "samples.json"
    write_report(tmp_path / "study")
    page = (tmp_path / "study" / "report.html").read_text()
    assert "Answers to read" in page and "&lt;b&gt;the&lt;/b&gt;" in page and "<b>the</b>" not in page
    assert "without training" in page and "all of it" in page


def test_steps_are_timed(place, offered, tmp_path):
    """The cost of a row's step is measured on examples that have columns which no model takes."""
    from lrkit.study import cost
    from lrkit.study.graph import jobs_of
    from lrkit.study.plan import lay_out

    run = {"steps": 40, "batch_size": 2}
    plan = lay_out(study_from({"base": "lora", "tasks": ["echo"], "model": str(place / "t5"), "run": run, "seeds": 1}))
    cell = jobs_of(plan)[0].cell.to_plain()
    asked = {"base": cell, "row": cell, "threads": torch.get_num_threads(), "trained": [None, None]}
    assert cost._measure(asked, tmp_path)["step_ms"] > 0


def test_run_shows_answers(place, offered, tmp_path):
    """`lrkit run` prints a few answers and further scores, writes them into its folder, and gives them as JSON."""
    from lrkit.cli.app import app

    words = ["run", "lora", "--task", "echo", "--model", str(place / "t5"), "--set", "run.steps=2"]
    words += ["--set", "task.max_new_tokens=2"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "without training:" in done.output and "reference: good" in done.output and "words " in done.output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"predictions.jsonl", "samples.json", "result.json"} <= written
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert told["samples"][0]["reference"] == "good" and told["tokens"] > 0


def test_run_of_perplexity(place, offered):
    """`lrkit run` writes a perplexity as a number, says which way is better, and names no guess."""
    from lrkit.cli.app import app

    words = ["run", "lora", "--task", "ppl", "--model", str(place / "llama"), "--set", "run.steps=2"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "A lower perplexity is better." in done.output and "best trivial answers" not in done.output
    assert "%" not in done.output


@pytest.mark.parametrize(("kind", "model"), [("ppl", "llama"), ("echo", "t5")])
def test_cells_are_exported(place, offered, tmp_path, kind, model):
    """A run of a language model of either kind becomes PEFT's, whose answers are the adapted model's, and a plain model."""
    import peft
    import transformers

    from lrkit.cli.app import app

    words = ["run", "lora", "--task", kind, "--model", str(place / model), "--set", "run.steps=3"]
    done = CliRunner().invoke(app, [*words, "--set", "run.lr=0.05", "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    for to in ("peft-lora", "merged"):
        done = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--to", to, "--out", str(tmp_path / to)])
        assert done.exit_code == 0, done.output
    cls = {"llama": transformers.LlamaForCausalLM, "t5": transformers.T5ForConditionalGeneration}[model]
    batch = {"input_ids": torch.arange(4, 10)[None], "labels": torch.arange(4, 8 if model == "t5" else 10)[None]}
    plain, merged = (cls.from_pretrained(folder).eval() for folder in (place / model, tmp_path / "merged"))
    before = plain(**batch).logits
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "peft-lora").eval()
    logits = adapted(**batch).logits
    assert torch.allclose(logits, merged(**batch).logits, atol=1e-4) and not torch.allclose(logits, before, atol=1e-2)


def test_options_of_tasks(place, offered, capsys):
    """Names that tasks have are hinted at wherever they are typed, and a dry run shows what was asked for."""
    from lrkit.cli import main

    for words, right in (
        (["--set", "run.num_beams=4"], "--set task.num_beams=4"),
        (["--set", "max_new_tokens=9"], "--set task.max_new_tokens=9"),
        (["--doc-stride", "64"], "--set task.stride=64"),
    ):
        with pytest.raises(SystemExit):
            main(["run", "lora", *words])
        assert right in capsys.readouterr().err
    words = ["ablate", "lora", "--task", "echo", "--model", str(place / "t5"), "--set", "task.max_new_tokens=2"]
    with pytest.raises(SystemExit):
        main([*words, "--set", "run.steps=2", "--swap", "rank=2", "--dry-run"])
    assert "Task echo: max_new_tokens=2." in capsys.readouterr().out


def test_chosen_options(place, offered, tmp_path):
    """The study file of a tuned method has the task's options, and is one that a study can be made of."""
    from lrkit.study.asked import study_named

    task = {"task": "echo", "options": {"max_new_tokens": 2}}
    run = {"steps": 2, "batch_size": 4}
    tuned = lrkit.tune(
        "lora",
        {"run.lr": [1e-3, 1e-2]},
        out=tmp_path / "t",
        task=task,
        model=str(place / "t5"),
        run=run,
        seeds=1,
        workers=0,
    )
    study = study_named(str(tuned.folder / "chosen.toml"))
    assert study.tasks[0].options == {"max_new_tokens": 2} and study.run["lr"] == tuned.settings["run.lr"]


def test_long_scoring_tells(tmp_path, monkeypatch):
    """An evaluation tells every so often how many examples are scored, counted anew for each; a study's teller reads it."""
    from lrkit.study import recorder
    from lrkit.study.progress import scored_of, step_of

    times = iter(range(0, 100, 4))
    monkeypatch.setattr(recorder.time, "monotonic", lambda: next(times))
    told = []
    scoring = recorder.Scoring(lambda done, of: told.append((done, of)))

    class Loader(list):
        dataset = range(25)

    for loader in (Loader(range(5)), Loader(range(5))):
        for _ in loader:
            scoring.batch(loader)
    assert told and all(of == 25 and done % 5 == 0 and done <= 25 for done, of in told)
    assert told[0][0] < 25
    (tmp_path / "metrics.jsonl").write_text('{"step": 40, "loss": 1.0}\n{"step": 40, "scored": 15, "of": 25}\n')
    assert (step_of(tmp_path), scored_of(tmp_path)) == (40, ", scored 15 of 25")
    (tmp_path / "metrics.jsonl").write_text('{"step": 40, "scored": 15, "of": 25}\n{"step": 41, "loss": 1.0}\n{"st')
    assert (step_of(tmp_path), scored_of(tmp_path)) == (41, "")
