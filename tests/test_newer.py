"""The eight newer methods by their defaults, whose plug-ins are installed here; and runs that calibrate or read layers."""

from __future__ import annotations

import json
from pathlib import Path

import folders
import models
import pytest
import torch
from signals import InputNorm, method
from transformers import BertConfig, BertForSequenceClassification

import lrkit
from lrkit.cli import main
from lrkit.study.checkpoints import Record
from lrkit.study.run import Result, RunSettings, train
from lrkit.tasks import load_folder

STEPS = 20
NEWER = ("eva", "fim-lora", "gora", "lisa", "adagradselect", "l1ra", "dylora", "lora-drop")


@pytest.mark.parametrize("name", NEWER)
def test_newer_methods_decide_by_default(name: str) -> None:
    """What they decide stands in the history; what is kept of it is what trains or acts."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 20}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, **sizes)).eval()
    method = lrkit.current().get("method", name)()
    adapted = lrkit.attach(model, method)
    if asked := max(policy.scheduler.calibration for policy in method.policies):
        adapted.calibrate([models.batch(seed=i, rows=4) for i in range(asked)])
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-3)
    adapted.bind(optimizer, total_steps=STEPS)
    for step in range(STEPS):
        (model(**models.batch(seed=step, rows=4)).loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    history = adapted.history
    assert history and all(0 <= decision.step <= STEPS for decision in history)
    begins = {"eva": 0, "fim-lora": 0, "gora": 0, "lisa": 0, "dylora": 0}
    assert history[0].step == begins.get(name, history[0].step)
    if name == "dylora":  # one rank for all layers, drawn at each step; all components act in the end
        layers = len(adapted.adapters)
        drawn = [decision.kept / layers for decision in history]
        assert all(rank in range(1, 9) for rank in drawn) and len(set(drawn)) > 3 and drawn[-1] == 8
    if name in ("eva", "fim-lora", "gora"):
        ranks = [layer.rank for layer in adapted.summary().layers]
        assert len(set(ranks)) > 1 and sum(ranks) == history[0].kept
    if name in ("lisa", "adagradselect"):
        (state,) = adapted.controller.policies
        assert all(decision.kept == 2 for decision in history)
        assert [any(p.requires_grad for p in block.tensors) for block in state.blocks] == state.kept.tolist()


SMALL = {"steps": 10, "batch_size": 4, "max_length": 12, "lr": 1e-2}


def test_the_command_line_calibrates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`lrkit run` shows a method its batches before the first step, and counts what they cost."""
    place = tmp_path / "place"
    place.mkdir()
    folders.write_place(place)
    settings = [f"--set=run.{name}={value}" for name, value in SMALL.items()]
    costs = []
    for name in ("lora", "fim-lora"):
        with pytest.raises(SystemExit) as left:
            main(["run", name, "--data", str(place / "data"), "--model", str(place / "model"), *settings, "--json"])
        assert left.value.code == 0
        told = json.loads(capsys.readouterr().out)
        costs.append(told["flops"]["run"])
        if name == "fim-lora":
            assert told["history"][0]["step"] == 0
    assert costs[1] > costs[0]


def test_a_resumed_run_has_read_what_the_run_has(tmp_path: Path) -> None:
    """A run whose metric reads layers, broken off and resumed, is the run: what is counted on the way shows it nothing."""
    place = tmp_path / "place"
    place.mkdir()
    folders.write_place(place)
    task = load_folder(place / "data")

    def run(folder: str, last: int = 100) -> Result:
        steps: list[int] = []
        (tmp_path / folder).mkdir(exist_ok=True)
        return train(
            method(InputNorm()),
            task,
            model=str(place / "model"),
            settings=RunSettings(**SMALL),
            record=Record(
                folder=tmp_path / folder, checkpoint_seconds=0.0, stop=lambda: len(steps.append(1) or steps) == last
            ),
        )

    with lrkit.current().lend("metric", "input-norm", InputNorm):
        whole = run("whole")
        with pytest.raises(KeyboardInterrupt), pytest.warns(lrkit.LrkitWarning, match="before the last decision"):
            run("broken", last=5)
        resumed = run("broken")
    assert resumed.history == whole.history and len(whole.history) == 3
    assert [d.threshold for d in resumed.history] == [d.threshold for d in whole.history]
    assert resumed.scores == whole.scores
