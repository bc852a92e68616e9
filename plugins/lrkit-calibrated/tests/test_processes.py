"""All three in two DDP processes, and resumed."""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import lrkit_calibrated
import models
import pytest
import torch

import lrkit
from lrkit.testing import only

WORKER = Path(__file__).with_name("calibrated_pair.py")
_spec = importlib.util.spec_from_file_location("calibrated_pair", WORKER)
calibrated_pair = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(calibrated_pair)


@pytest.fixture(autouse=True)
def registry():
    with only(lrkit_calibrated, distribution="lrkit-calibrated 0.1.0") as made:
        yield made


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    paths = [str(Path(models.__file__).parent), os.environ.get("PYTHONPATH", "")]
    outs = [folder / f"{rank}.pt" for rank in range(2)]
    running = [
        subprocess.Popen(
            [sys.executable, "-P", str(WORKER), str(rank), "2", str(folder / "init"), out],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    errors = [process.communicate(timeout=150)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    return [torch.load(out) for out in outs]


@pytest.mark.parametrize("name", calibrated_pair.METHODS)
@pytest.mark.parametrize("kind", calibrated_pair.KINDS)
def test_two_processes_are_one(name, kind, pair):
    """Both end with the same tensors and decisions, and these are those of one process with all rows."""
    (deltas, history), (others, other) = (each[name, kind] for each in pair)
    alone, wanted = calibrated_pair.run(name)
    assert history == other
    assert all(torch.equal(delta, others[layer]) for layer, delta in deltas.items())
    if name == "eva":  # its directions are joined from those that two processes keep, and not from all rows
        assert history[0][:3] == wanted[0][:3]
        assert len(set(history[0][3]) ^ set(wanted[0][3])) <= 6
        return
    assert history == wanted
    for layer, delta in deltas.items():
        torch.testing.assert_close(delta, alone[layer], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", calibrated_pair.METHODS)
@pytest.mark.parametrize("at", [None, 0, 2])
def test_resumed_runs_are_the_run(name, at, tmp_path):
    """A state from before bind, from step 0 or later goes on bitwise, without a second calibration."""

    def started():
        torch.manual_seed(at or 7)
        return models.make("bert", seed=3).eval()

    def train(model, adapted, optimizer, begin):
        for step in range(begin, 4):
            if step == at:
                adapted.save(tmp_path)
                states.append(copy.deepcopy(optimizer.state_dict()))
            model(**models.ragged(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    states, model = [], started()
    adapted = lrkit.attach(model, calibrated_pair.METHODS[name])
    adapted.calibrate([models.ragged(50 + i) for i in range(2)])
    assert [d.step for d in adapted.history] == [0]
    if at is None:
        adapted.save(tmp_path)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2, momentum=0.9)
    adapted.bind(optimizer, total_steps=4)
    train(model, adapted, optimizer, 0)
    again = started()
    loaded = lrkit.load(again, tmp_path)
    optimizer = torch.optim.SGD(loaded.parameters(), lr=1e-2, momentum=0.9)
    if states:
        optimizer.load_state_dict(states[0])
    loaded.bind(optimizer, total_steps=4)
    train(again, loaded, optimizer, at or 0)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert loaded.history == adapted.history
