"""A resumed run is bitwise the run: any method, any step, a process that was killed; and what is no state is refused."""

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import attrs
import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_attach import METHODS

import lrkit
from lrkit.adapt import checkpoint

HERE = Path(__file__).parent
STEPS = 14

PRUNE = lrkit.Policy(
    metric=lrkit.metrics.SensitivityUncertainty(),
    scheduler=lrkit.schedulers.Cubic(target=1, warmup=2, final=3, interval=2),
    action=lrkit.actions.Prune(),
)


def switching(parameterization, metric, **action):
    """A method of which half of the units train, others every second step."""
    return lrkit.Method(
        parameterization=parameterization,
        metric=metric,
        scheduler=lrkit.schedulers.Constant(target=0.5, interval=2, ending="open"),
        action=lrkit.actions.Switch(**action),
    )


DRAWN = {
    "blocks in turn": switching(lrkit.parameterizations.Full(), lrkit.metrics.Random(), state="kept"),
    "matrices in turn": switching(
        lrkit.parameterizations.LoRA(rank=2), lrkit.metrics.GradientUncertainty(), unit="matrix", state="new"
    ),
    **{name: attrs.evolve(m) for name, m in METHODS.items() if name not in ("adalora", "aflora", "hybrid")},
    "adalora": lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=4, interval=3),
    "adalora released": lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=4, interval=3, variant="released"),
    "adalora open": attrs.evolve(
        lrkit.methods.adalora(rank=4, target_rank=2),
        scheduler=lrkit.schedulers.Linear(target=2, warmup=2, final=5, ending="open"),
    ),
    "aflora": lrkit.methods.aflora(rank=4, warmup=2, final=4),
    "aflora together": lrkit.methods.aflora(rank=4, warmup=2, final=4, train="both", together=True),
    "aflora released": lrkit.methods.aflora(rank=4, warmup=2, final=4, variant="released"),
    "hybrid": attrs.evolve(lrkit.methods.aflora(rank=4, warmup=1, final=5), also=(PRUNE,)),
    "hybrid on SVD": attrs.evolve(
        lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=4),
        also=(
            lrkit.Policy(
                metric=lrkit.metrics.GradientUncertainty(window=3),
                scheduler=lrkit.schedulers.Linear(target=0.0, warmup=1, final=4),
                action=lrkit.actions.Freeze(),
            ),
        ),
    ),
}


def start(method):
    model = models.make("bert", seed=3).eval()
    adapted = lrkit.attach(model, method)
    return model, adapted, torch.optim.AdamW(adapted.parameters(), lr=1e-2, weight_decay=0.1)


def steps(model, adapted, optimizer, begin, end):
    for step in range(begin, end):
        (model(**models.batch(seed=step, rows=4, length=6)).loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()


def same(one, two):
    assert one["meta"] == two["meta"]
    assert one["tensors"].keys() == two["tensors"].keys()
    for key, tensor in one["tensors"].items():
        assert torch.equal(tensor, two["tensors"][key]), key


_whole: dict[str, tuple] = {}


def whole(name):
    """The run that is not interrupted: its state and its optimizer's after every step."""
    if name not in _whole:
        model, adapted, optimizer = start(DRAWN[name])
        adapted.bind(optimizer, total_steps=STEPS)
        states = [(adapted.state_dict(), copy.deepcopy(optimizer.state_dict()))]
        for step in range(STEPS):
            steps(model, adapted, optimizer, step, step + 1)
            states.append((adapted.state_dict(), copy.deepcopy(optimizer.state_dict())))
        _whole[name] = states
    return _whole[name]


@settings(max_examples=40)
@given(name=st.sampled_from(sorted(DRAWN)), at=st.integers(0, STEPS))
def test_resume_is_exact(name, at):
    """Any method, resumed at any step, is bitwise the run."""
    states = whole(name)
    model, adapted, optimizer = start(DRAWN[name])
    adapted.load_state_dict(states[at][0])
    adapted.bind(optimizer, total_steps=STEPS)
    optimizer.load_state_dict(states[at][1])
    same(adapted.state_dict(), states[at][0])
    steps(model, adapted, optimizer, at, STEPS)
    same(adapted.state_dict(), states[-1][0])
    for one, two in zip(states[-1][1]["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(one[k], two[k]) for k in one)


WORKER = """
import os, sys, torch
sys.path.insert(0, {here!r})
import lrkit, test_resume as t
from pathlib import Path
folder = Path(sys.argv[1])
model, adapted, optimizer = t.start(t.DRAWN[sys.argv[2]])
adapted.bind(optimizer, total_steps=t.STEPS)
saved = sorted(folder.glob("step-*"), key=lambda p: int(p.name[5:]))
if saved:
    adapted.load_state_dict(lrkit.adapt.checkpoint.read(saved[-1]))
    optimizer.load_state_dict(torch.load(saved[-1] / "optimizer.pt"))
print("from", adapted.step, flush=True)
while adapted.step < t.STEPS:
    t.steps(model, adapted, optimizer, adapted.step, adapted.step + 1)
    temporary = folder / f"tmp-{{adapted.step}}"
    adapted.save(temporary)
    torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
    os.replace(temporary, folder / f"step-{{adapted.step}}")
    print(adapted.step, flush=True)
"""


@pytest.mark.parametrize("name", ["hybrid on SVD"])  # AdaLoRA's is in tests/integrations/test_killed.py
def test_killed_process_resumes(name, tmp_path):
    """A process that is killed while it saves goes on from its last whole state."""
    script = tmp_path / "worker.py"
    script.write_text("import lrkit.adapt.checkpoint\n" + WORKER.format(here=str(HERE)))
    runs = tmp_path / "runs"
    runs.mkdir()

    def run(kill_at):
        process = subprocess.Popen(
            [sys.executable, "-P", str(script), str(runs), name],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},  # as many as here: sums are cut alike
        )
        begun = None
        for line in process.stdout:
            begun = int(line.split()[1]) if line.startswith("from") else begun
            if kill_at is not None and line.strip() == str(kill_at):
                time.sleep(0.01)  # somewhere in the middle of the next step, or of its checkpoint
                os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        return begun, process.returncode

    assert run(5)[1] == -signal.SIGKILL
    begun, code = run(9)
    assert begun >= 5 and code == -signal.SIGKILL
    begun, code = run(None)
    assert begun >= 9 and code == 0
    same(checkpoint.read(runs / f"step-{STEPS}"), whole(name)[-1][0])


# ---- hostile checkpoints ----


def refused(adapted, folder, match, anywhere=True):
    before = adapted.state_dict()
    with pytest.raises(lrkit.LrkitError, match=match) as error:
        adapted.load_state_dict(checkpoint.read(folder))
    assert "\n" not in str(error.value)
    same(adapted.state_dict(), before)
    if not anywhere:  # not wrong in itself: only beside a run that is bound for another length
        return
    plain = models.make("bert", seed=3)
    names = [n for n, _ in plain.named_modules()]
    with pytest.raises(lrkit.LrkitError):
        lrkit.load(plain, folder)
    assert [n for n, _ in plain.named_modules()] == names


@pytest.fixture
def run(tmp_path):
    model, adapted, optimizer = start(DRAWN["adalora"])
    adapted.bind(optimizer, total_steps=STEPS)
    steps(model, adapted, optimizer, 0, 6)
    return adapted, adapted.save(tmp_path / "good"), tmp_path


def rewrite(path, folder, tensors=None, meta=None):
    """The same file with other tensors or other JSON."""
    folder.mkdir()
    state = checkpoint.read(path)
    meta = state["meta"] if meta is None else meta(copy.deepcopy(state["meta"]))
    tensors = state["tensors"] if tensors is None else tensors(dict(state["tensors"]))
    save_file(tensors, folder / checkpoint.FILE, metadata={"lrkit": json.dumps(meta)})
    return folder


def without(key):
    return lambda d: {k: v for k, v in d.items() if k != key}


TENSORS = {
    "no masks": (without("policy.0.kept"), "policy.0.kept"),
    "no statistics": (without("policy.0.buffer.importance"), "policy.0.buffer.importance"),
    "no weight": (lambda t: {k: v for k, v in t.items() if not k.endswith("query.A")}, "missing or not expected"),
    "a weight of another shape": (lambda t: {k: v[:2] if k.endswith("A") else v for k, v in t.items()}, "does not fit"),
    "masks of another length": (lambda t: t | {"policy.0.kept": t["policy.0.kept"][:5]}, "kept is not bool"),
    "masks that are numbers": (lambda t: t | {"policy.0.kept": t["policy.0.kept"].float()}, "kept is not bool"),
    "statistics of another length": (
        lambda t: t | {"policy.0.buffer.uncertainty": t["policy.0.buffer.uncertainty"][:7]},
        "policy.0.buffer.uncertainty",
    ),
    "statistics of doubles": (
        lambda t: t | {"policy.0.buffer.uncertainty": t["policy.0.buffer.uncertainty"].double()},
        "policy.0.buffer.uncertainty is not float32",
    ),
    "a weight of integers": (lambda t: {k: v.int() if k.endswith("query.A") else v for k, v in t.items()}, "int32"),
    "something more": (lambda t: t | {"policy.0.extra": torch.zeros(1)}, "policy.0.extra"),
}
META = {
    "another format": (lambda m: m | {"format": 99}, "format 99"),
    "no history": (without("history"), "no state of lrkit"),
    "another method": (lambda m: m | {"method": lrkit.to_plain(DRAWN["aflora"])}, "another method: parameterization"),
    "other layers": (lambda m: m | {"targets": m["targets"][1:]}, "other layers"),
    "steps that are words": (lambda m: m | {"step": "six"}, "step"),
    "a longer run": (lambda m: m | {"total_steps": 99}, "run of 99 steps"),
    "policies that are none": (lambda m: m | {"policies": [7]}, "policies"),
    "a history that is none": (lambda m: m | {"history": [{"step": 3}]}, "history"),
    "sums of other layers": (lambda m: m | {"sums": {}}, "sums"),
    "ranks of other layers": (lambda m: m | {"ranks": {}}, "ranks"),
    "a list": (lambda m: [1, 2], "no state of lrkit"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_wrong_tensors_refused(run, case):
    """A file with wrong tensors is refused, and changes nothing."""
    adapted, path, folder = run
    change, match = TENSORS[case]
    refused(adapted, rewrite(path, folder / "bad", tensors=change), match)


@pytest.mark.parametrize("case", META)
def test_wrong_data_refused(run, case):
    """A file with wrong data beside its tensors is refused, and changes nothing."""
    adapted, path, folder = run
    change, match = META[case]
    refused(adapted, rewrite(path, folder / "bad", meta=change), match, anywhere=case != "a longer run")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_truncated_file_refused(run, share):
    """A truncated file is refused in one line."""
    adapted, path, folder = run
    (folder / "bad").mkdir()
    data = path.read_bytes()
    (folder / "bad" / checkpoint.FILE).write_bytes(data[: int(share * len(data))])
    refused(adapted, folder / "bad", "truncated")


def test_foreign_files_refused(run):
    """A pickle, and a file of another program, are refused."""
    adapted, path, folder = run
    (folder / "pickle").mkdir()
    (folder / "pickle" / checkpoint.FILE).write_bytes(pickle.dumps({"meta": {}, "tensors": {}}))
    refused(adapted, folder / "pickle", "no safetensors file")
    (folder / "foreign").mkdir()
    save_file(load_file(path), folder / "foreign" / checkpoint.FILE)
    refused(adapted, folder / "foreign", "not one of lrkit's")
    (folder / "none").mkdir()
    refused(adapted, folder / "none", "no lrkit state")


def test_failed_save(run, monkeypatch):
    """A save that fails leaves the old file as it was."""
    adapted, path, _ = run
    before = path.read_bytes()

    def full(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        adapted.save(path.parent)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [checkpoint.FILE]
