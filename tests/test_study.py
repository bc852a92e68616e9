"""Studies as they are run: real processes, killed; cells named by what they are; one failure that stops nothing."""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor
from pathlib import Path

import attrs
import folders
import killed_study
import pytest
import torch
from command_line import ask

import lrkit
from lrkit.cli import main
from lrkit.study.cell import Cell, make_cell
from lrkit.study.code import inside
from lrkit.study.execute import execute
from lrkit.study.graph import jobs_of
from lrkit.study.plan import lay_out, study_from
from lrkit.study.store import Lines, lock, read_json, write_json
from lrkit.study.worker import run_cell

HERE = Path(__file__).resolve()
_NOT_NAMED = ("train_also", "needs", "selection", "stop", "loading")  # at their defaults


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return folders.write_place(tmp_path_factory.mktemp("place"), layers=2)


@pytest.fixture(scope="module")
def undisturbed(place, tmp_path_factory):
    """What the study of `killed_study` comes to where nobody kills it."""
    out = tmp_path_factory.mktemp("undisturbed")
    execute(lay_out(killed_study.study(place)), out, workers=0, threads=1, costs=False, checkpoint_seconds=0.0)
    return results(out)


def small(place, **changes):
    plain = attrs.asdict(killed_study.study(place, seeds=1, steps=8))
    return study_from({**plain, **changes})


def execute_here(study, out, **settings):
    return execute(lay_out(study), out, workers=0, costs=False, **settings)


def results(out):
    """Everything that a study came to, as bytes: results and predictions of each cell, by key."""
    cells = sorted((out / "cells").iterdir())
    return {c.name: ((c / "result.json").read_bytes(), (c / "predictions.npz").read_bytes()) for c in cells}


def events(cell):
    return [json.loads(line) for line in (cell / "attempts.jsonl").read_text().splitlines()]


def start(place, out, workers, executor="local", *rest):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(HERE.with_name("killed_study.py")), str(place), str(out)]
    return subprocess.Popen(
        [*command, str(workers), executor, *rest],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def checkpoints(out):
    return len(list(out.glob("cells/*/checkpoints/checkpoint-*")))


def all_events(out):
    """The events of all cells that have begun."""
    return [event for path in out.glob("cells/*/attempts.jsonl") for event in events(path.parent)]


def wait_for_checkpoint(process, out):
    """Wait until some cell has one, and return the pids of the workers that have begun."""
    deadline = time.monotonic() + 60
    while not checkpoints(out) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert checkpoints(out), process.communicate()
    return [e["pid"] for e in all_events(out) if e["event"] == "begin"]


def ends(pid):
    """Whether a process comes to its end within five seconds."""
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            return True
        time.sleep(0.05)
    return False


def kill_amid_a_cell(place, out):
    """Begin the study, and kill its process alone while a cell runs: its workers end as well, without a signal."""
    process = start(place, out, 2)
    pids = wait_for_checkpoint(process, out)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    outlived = [pid for pid in pids if not ends(pid)]
    for pid in outlived:
        os.kill(pid, signal.SIGKILL)
    assert not outlived, "a worker outlived its study"


def test_killed_study_goes_on(place, tmp_path, undisturbed):
    """A study whose process is killed amid a cell ends its workers, and comes to the same bytes as one that never was."""
    out = tmp_path / "killed"
    kill_amid_a_cell(place, out)
    outcome = execute(
        lay_out(killed_study.study(place)), out, workers=0, threads=1, costs=False, checkpoint_seconds=0.0
    )
    assert (outcome.done, outcome.failed) == (6, ())
    assert results(out) == undisturbed
    assert any(e.get("from_step") for cell in (out / "cells").iterdir() for e in events(cell)), "nothing was resumed"


def killed_study_resumes(place, tmp_path, undisturbed):
    """A study that is killed, and one of its workers, comes to the same bytes as one that never was.

    First the study's process alone is killed, amid a cell: its workers end as well, though no signal reaches them. Then all
    of them, at random. At last a worker: that costs a retry from the checkpoint. (tests/integrations/test_killed_study.py)
    """
    chance, out = random.Random(4), tmp_path / "killed"
    kill_amid_a_cell(place, out)
    process = start(place, out, 2)
    before, deadline = len(all_events(out)), time.monotonic() + 60
    while len(all_events(out)) == before and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(chance.uniform(0.0, 0.8))
    assert process.poll() is None, "it was over before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for path in out.glob("cells/*/result.json"):
        assert json.loads(path.read_text())["steps"] == 14
    begun = {e["pid"] for e in all_events(out) if e["event"] == "begin"}
    process = start(place, out, 2)
    mine, deadline = set(), time.monotonic() + 60
    while not mine and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
        running = {path.parents[1] for path in out.glob("cells/*/checkpoints/checkpoint-*")}
        mine = {e["pid"] for cell in running for e in events(cell) if e["event"] == "begin"} - begun
    os.kill(mine.pop(), signal.SIGKILL)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and re.search(r"^6 [1-6] \(\)$", told, re.MULTILINE), told
    assert results(out) == undisturbed
    for cell in (out / "cells").iterdir():
        assert [e["event"] for e in events(cell)].count("end") <= 1, "a cell ran twice to its end"
        assert not (cell / "checkpoints").exists()
    assert any(e.get("from_step") for cell in (out / "cells").iterdir() for e in events(cell)), "nothing was resumed"
    again = execute(lay_out(killed_study.study(place)), out, workers=0, threads=1, costs=False)
    assert (again.done, again.ran, again.failed) == (6, 0, ())


def test_cells_are_independent(place, tmp_path):
    """A cell's result does not depend on the cells that its worker ran before."""
    plan = lay_out(small(place))
    execute(plan, tmp_path / "one", workers=0, costs=False)
    turned = attrs.evolve(plan.study, rows=[], swap={"metric": ["magnitude"]})
    execute(lay_out(turned), tmp_path / "two", workers=0, costs=False)
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert set(two) < set(one)
    assert all(one[key] == two[key] for key in two)


def test_cell_keys(place):
    """A cell's key changes with all that decides its result, and with nothing else."""
    plan = lay_out(small(place))
    spec, row = plan.tasks[0], plan.rows[0]
    settings = attrs.asdict(plan.settings(row, spec, 0))
    plain = lrkit.to_plain(row.method)
    key = make_cell(plain, spec, plan.study.model, "all-linear", settings).key
    assert key == make_cell(dict(reversed(plain.items())), spec, plan.study.model, "all-linear", settings).key
    assert key == make_cell(plain, spec, plan.study.model, "all-linear", {**settings, "threads": 7}).key
    others = {
        make_cell(
            lrkit.with_setting(plain, "metric.measure", "after-step"), spec, plan.study.model, "all-linear", settings
        ).key,
        make_cell(plain, spec, plan.study.model, ["query"], settings).key,
        make_cell(plain, spec, "minilm", "all-linear", settings).key,
        make_cell(plain, spec, plan.study.model, "all-linear", {**settings, "seed": 1}).key,
        make_cell(plain, spec, plan.study.model, "all-linear", {**settings, "lr": 0.5}).key,
    }
    assert len(others | {key}) == 6


def test_number_counts_not(place, tmp_path, monkeypatch):
    """A version number alone changes no key: a study that is done under 0.1.0 is done under any other."""
    plan, keys = lay_out(small(place, rows=[], swap={})), []
    for number in ("0.1.0", "0.2.0", "7.0"):
        numbers = {"lrkit": number, "lrkit-sora": number}
        monkeypatch.setattr("lrkit.study.cell._version", lambda name, numbers=numbers: numbers.get(name, "1"))
        outcome = execute(plan, tmp_path, workers=0, costs=False)
        assert (outcome.done, outcome.ran) == (1, number == "0.1.0")
        cell = attrs.evolve(cell := jobs_of(plan)[0].cell, versions={**cell.versions, **numbers})
        keys.append((cell.key, cell.setup))
    first = attrs.evolve(cell, versions={**cell.versions, "lrkit": "0.1.0", "lrkit-sora": "0.1.0"})
    was = {name: each for name, each in first.to_plain().items() if name not in _NOT_NAMED}
    was["task"]["data"], was["model"] = first.versions["data"], first.versions["model"]
    text = json.dumps(was, sort_keys=True, separators=(",", ":"))
    assert set(keys) == {(hashlib.sha256(text.encode()).hexdigest()[:16], first.setup)}, "keys are as 0.1.0 made them"
    assert attrs.evolve(cell, versions={**cell.versions, "torch": "9"}).key != cell.key
    assert attrs.evolve(cell, versions={**cell.versions, "code": "9"}).key != cell.key
    assert not any(path.name == "version.py" for path in inside(Path(lrkit.__file__).parent))


def test_key_follows_data(place, tmp_path):
    """Other data in the same folder make another cell."""
    folders.write_data(tmp_path / "data")
    spec = attrs.evolve(lay_out(small(place)).tasks[0], data=str(tmp_path / "data"))
    plain, settings = lrkit.to_plain(lrkit.methods.lora()), {"seed": 0}
    before = make_cell(plain, spec, "minilm", "all-linear", settings).key
    with (tmp_path / "data" / "train.jsonl").open("a") as file:
        file.write('{"sentence": "the film was good", "label": 1}\n')

    assert make_cell(plain, spec, "minilm", "all-linear", settings).key != before


def test_failed_cell_is_retried(place, tmp_path, monkeypatch):
    """A cell that fails stops no other, and the same command runs it again."""
    study = small(place, swap={"metric": ["magnitude"]}, rows=[])
    from lrkit.metrics import Magnitude

    def broken(self, weight, state):
        raise ZeroDivisionError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(Magnitude, "score", broken)
        outcome = execute_here(study, tmp_path / "out")
    assert outcome.done == 1
    assert [name for name, _ in outcome.failed] == ["metric=magnitude, data, seed 0"]
    assert outcome.failed[0][1] == "ZeroDivisionError: on purpose"
    failed = next((tmp_path / "out").glob("cells/*/error.txt"))
    assert "in broken" in failed.read_text()
    again = execute_here(study, tmp_path / "out")
    assert (again.done, again.ran, again.failed) == (2, 1, ())
    assert not failed.exists()


def test_study_grows(place, tmp_path):
    """A study grows in its folder by rows and seeds, and another study is refused there."""
    out = tmp_path / "out"
    execute_here(small(place, rows=[], swap={}), out)
    before = results(out)
    more = execute_here(small(place, seeds=[0, 3]), out)
    assert (more.done, more.ran) == (6, 5)
    assert before.items() <= results(out).items()
    study = read_json(out / "study.json")
    assert [row["label"] for row in study["rows"]] == ["adalora", "metric=magnitude", "aflora"]
    assert study["seeds"] == [0, 3] and len(study["cells"]) == 6
    # A part of it asked for again takes nothing away.
    execute_here(small(place, rows=[], swap={}), out)
    assert len(read_json(out / "study.json")["cells"]) == 6
    scored, longer, scaled = (
        [{**attrs.asdict(small(place).tasks[0]), what: given}]
        for what, given in (
            ("options", {"metric": "matthews"}),
            ("run", {"steps": 5}),
            ("set", {"parameterization.alpha": 64.0}),
        )
    )
    for changes, what in (
        ({"base": "lora", "set": {}, "swap": {}}, "its base"),
        ({"run": {"steps": 9, "max_length": 12}}, "run is"),
        ({"tasks": scored}, "options of data are"),
        ({"tasks": longer}, 'run of data are {} there and {"steps":5} here'),
        ({"tasks": scaled}, "set of data are"),
    ):
        with pytest.raises(lrkit.LrkitError, match=f"holds another study: {what}"):
            execute_here(small(place, **changes), out)
    assert len(read_json(out / "study.json")["cells"]) == 6
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(lrkit.LrkitError, match="holds no study: nothing is overwritten"):
        execute_here(small(place), tmp_path / "other")


def test_dry_run_counts_what_is_done(place, tmp_path, capsys):
    """Of a named folder a dry run says how many cells are done, or refuses it as the run would; it writes nothing."""
    out = tmp_path / "out"
    words = ["ablate", "adalora", "--data", str(place / "data"), "--model", str(place / "model"), "--seeds", "0,3"]
    words += [w for s in ("run.steps=4", "run.max_length=12", "warmup=1", "final=1") for w in ("--set", s)]
    dry = [*words, "--out", out, "--dry-run"]
    assert ask(capsys, *dry)["done"] == 0 and not out.exists()
    ask(capsys, *words, "--out", out, "--workers", "0", "--no-costs")
    assert ask(capsys, *dry)["done"] == 2
    grown = ask(capsys, *dry, "--swap", "metric=magnitude")
    assert (grown["done"], grown["cells"]) == (2, 4)
    next(out.glob("cells/*/result.json")).unlink()
    assert ask(capsys, *dry)["done"] == 1 and "done" not in ask(capsys, *words, "--dry-run")
    before = sorted(out.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main([w.replace("length=12", "length=13") for w in map(str, dry)])
    assert caught.value.code == 2 and "holds another study: run is" in capsys.readouterr().err
    assert sorted(out.rglob("*")) == before


def test_checked_before_spending(place, tmp_path):
    """A study with a cell that cannot run is refused before a step is spent."""
    late = {"label": "late", "set": {"warmup": 6, "final": 3}}
    with pytest.raises(lrkit.LrkitError, match=r"row late on data: .*total_steps 8"):
        execute_here(small(place, rows=[late]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_busy_cell_is_left(place, tmp_path):
    """A cell that another process is running is left to it."""
    plan = lay_out(small(place, rows=[], swap={}))
    settings = attrs.asdict(plan.settings(plan.rows[0], plan.tasks[0], 0))
    cell = make_cell(lrkit.to_plain(plan.rows[0].method), plan.tasks[0], plan.study.model, "all-linear", settings)
    folder = tmp_path / "out" / "cells" / cell.key
    folder.mkdir(parents=True)
    held = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl; f=open({str(folder / 'lock')!r},'ab'); fcntl.flock(f, 2); print(1, flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    held.stdout.readline()
    assert run_cell(cell.to_plain(), str(folder), {})["status"] == "busy"
    blocked = folder.parent / "blocked"
    blocked.symlink_to("nowhere")
    answer = run_cell(cell.to_plain(), str(blocked), {})
    assert answer["status"] == "failed" and f"{blocked} cannot be made (File exists)" in answer["error"]
    blocked.unlink()
    assert [p.name for p in folder.iterdir()] == ["lock"]
    held.kill()
    held.communicate()
    with lock(folder / "lock") as mine:
        assert mine
    assert Cell(**cell.to_plain()) == cell


def test_any_executor_will_do(place, tmp_path):
    """Any executor of `concurrent.futures` runs cells, and is left running."""
    with ThreadPoolExecutor(1) as pool:
        outcome = execute(lay_out(small(place)), tmp_path / "out", executor=pool, costs=False)
        assert outcome.done == outcome.ran == 3
        assert pool.submit(int, "3").result() == 3, "somebody else's pool is left running"


def test_torn_line_closed_off(tmp_path):
    """A line that a killed process left torn is closed off before the next one."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    lines = Lines(path)
    lines.write({"step": 2, "loss": float("nan")})
    lines.close()
    assert path.read_text().splitlines() == ['{"step": 1}', '{"step": 2, "lo', '{"step": 2, "loss": null}']


def test_replaced_whole_or_not(tmp_path, monkeypatch):
    """If writing fails, the old file stays, and no draft is left."""
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})

    def full(*_):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def survives_kills(place, tmp_path, undisturbed, *executor):
    """A worker or job that is killed costs a retry, and changes no result. See tests/integrations/test_executors.py."""
    out = tmp_path / "out"
    process = start(place, out, 2, *executor)
    deadline = time.monotonic() + 100
    while not checkpoints(out) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0]
    pids = [e["pid"] for cell in (out / "cells").iterdir() for e in events(cell) if e["event"] == "begin"]
    os.kill(pids[-1], signal.SIGKILL)
    told, _ = process.communicate(timeout=200)
    assert told.strip().splitlines()[-1] == "6 6 ()", told
    assert results(out) == undisturbed
    begun = [sum(e["event"] == "begin" for e in events(cell)) for cell in (out / "cells").iterdir()]
    assert sorted(begun) == [1, 1, 1, 1, 1, 2], "one cell was tried again, and no other"


def dask_pool(place, tmp_path):
    """A pool of Dask runs cells. See tests/integrations/test_executors.py."""
    distributed = pytest.importorskip("distributed")
    alone = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**alone) as cluster, distributed.Client(cluster) as client:
        plan = lay_out(small(place))
        outcome = execute(plan, tmp_path / "out", executor=client.get_executor(), threads=1, costs=False)
    assert (outcome.done, outcome.failed) == (3, ())
    execute(plan, tmp_path / "here", workers=0, threads=1, costs=False)
    assert results(tmp_path / "out") == results(tmp_path / "here")


def test_begins_like_new(place, tmp_path):
    """Whatever the caller has switched on; and it is on again afterwards."""
    study = small(place, rows=[], swap={})
    execute_here(study, tmp_path / "neutral")
    try:
        torch.set_default_dtype(torch.float64)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            torch.autograd.set_detect_anomaly(True, check_nan=False)
            outcome = execute_here(study, tmp_path / "odd")
            assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
        assert (outcome.done, outcome.failed) == (1, ())
        assert torch.get_default_dtype() == torch.float64
        assert torch.is_anomaly_enabled() and not torch.is_anomaly_check_nan_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.autograd.set_detect_anomaly(False, check_nan=True)
    assert results(tmp_path / "odd") == results(tmp_path / "neutral")


def test_local_parts_refused(place, tmp_path):
    """A component that workers would not know is refused before they are asked."""

    class Mine:
        @lrkit.hookimpl
        def lrkit_tasks(self):
            return {"mine": lambda rest: None}

    registry = lrkit.Registry(discover=False)
    registry.add("this process", "mine", Mine())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lrkit.registry.current", lambda: registry)
        plan = lay_out(small(place, rows=[], swap={}, tasks=[{"task": "mine"}]))
        with pytest.raises(lrkit.LrkitError, match=r'task "mine" is registered in this process alone.*workers=0'):
            execute(plan, tmp_path / "out", workers=1, costs=False)
    assert not (tmp_path / "out").exists()


def test_absent_ray_refused(place, tmp_path):
    """A Ray cluster that does not answer is told soon, in one line."""
    with pytest.raises(lrkit.LrkitError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'"):
        execute(lay_out(small(place)), tmp_path / "out", executor="ray", address="127.0.0.1:1", workers=1, costs=False)


def cell_of_two_devices(place, tmp_path):
    """A cell with two devices trains in two processes by torchrun. See tests/integrations/test_more_processes.py."""
    study = small(place, rows=[], swap={})
    study = attrs.evolve(study, run={**study.run, "devices": 2})
    outcome = execute_here(study, tmp_path / "out")
    assert (outcome.done, outcome.failed) == (1, ())
    (cell,) = (tmp_path / "out" / "cells").iterdir()
    assert read_json(cell / "result.json")["steps"] == 8
    decided = [json.loads(line)["step"] for line in (cell / "history.jsonl").read_text().splitlines()]
    assert decided == sorted(set(decided)), "each decision is written once, by one of the two"
    losses = [line for line in map(json.loads, (cell / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert [line["step"] for line in losses] == list(range(1, 9))


def test_gpu_leases(tmp_path):
    """Each GPU is leased to one worker, and is free again when that ends."""
    code = (
        "import os, sys; from lrkit.study import executors; executors._lease(int(sys.argv[1]));"
        "print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); input()"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "5,7,8", "TMPDIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    held = []

    def lease(devices):
        command = [sys.executable, "-c", code, str(devices)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, env=environment, text=True, **pipes)
        held.append(process)
        return process.stdout.readline().strip() or process.stderr.read().strip().splitlines()[-1]

    try:
        assert [lease(1), lease(2)] == ["5", "7,8"]
        assert lease(1) == "lrkit.errors.LrkitError: every GPU is leased to another cell"
        held[0].kill()
        held[0].wait()
        assert lease(1) == "5"
    finally:
        for process in held:
            process.kill()
            process.communicate()


def test_damaged_checkpoint_passed_over(place, tmp_path):
    """Truncated, changed or gone: whichever file it is, the run starts anew, and comes to the same result."""
    plan = lay_out(small(place, rows=[], swap={}))
    execute(plan, tmp_path / "whole", workers=0, costs=False)
    job = jobs_of(plan)[0].cell
    from lrkit.study.run import Record

    stopped = tmp_path / "stopped" / job.key
    with stopped_at(5):
        answer = run_cell(job.to_plain(), str(stopped), {"checkpoint_seconds": 0.0})
    assert answer["status"] == "failed" and Record(folder=stopped).step() == 4
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "lrkit.safetensors"):
        cell = shutil.copytree(stopped, tmp_path / name / job.key)
        assert Record(folder=cell).step() == 4
        (damaged,) = cell.glob(f"checkpoints/*/{name}")
        damaged.write_bytes(damaged.read_bytes()[:-3])
        assert Record(folder=cell).step() == 0
        damaged.unlink()
        assert Record(folder=cell).step() == 0
        assert run_cell(job.to_plain(), str(cell), {})["status"] == "done"
        assert (cell / "result.json").read_bytes() == results(tmp_path / "whole")[job.key][0]


@contextlib.contextmanager
def stopped_at(step):
    """The optimizer's step number `step` of a run fails."""
    seen = []

    def hook(*_):
        seen.append(1)
        if len(seen) == step:
            raise RuntimeError("on purpose")

    from torch.optim.optimizer import register_optimizer_step_pre_hook

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_damaged_result_remade(place, tmp_path):
    """A result that is damaged is made again, to the same bytes."""
    study, out = small(place, rows=[], swap={}), tmp_path / "out"
    execute_here(study, out)
    before = results(out)
    (path,) = out.glob("cells/*/result.json")
    for content in (b"", b"{", b"null", b'{"format": 1}'):
        path.write_bytes(content)
        assert execute_here(study, out).ran == 1
        assert results(out) == before


def test_changed_data_is_seen(place, tmp_path):
    """Data that change between two studies of one process are read again, and never share a table."""
    folders.write_data(tmp_path / "data")
    study = small(place, rows=[], swap={}, tasks=[{"data": str(tmp_path / "data")}])
    execute_here(study, tmp_path / "one")
    validation = tmp_path / "data" / "validation.jsonl"
    rows = [json.loads(line) for line in validation.read_text().splitlines()]
    validation.write_text("\n".join(json.dumps({**row, "label": int(i == 0)}) for i, row in enumerate(rows)) + "\n")
    execute_here(study, tmp_path / "two")
    (one,), (two,) = results(tmp_path / "one").values(), results(tmp_path / "two").values()
    assert json.loads(one[0])["majority"] == 0.5 and json.loads(two[0])["majority"] == 0.875
    # And cells of two kinds of data are not put into one table.
    more = attrs.evolve(study, swap={"metric": ["magnitude"]})
    folders.write_data(tmp_path / "data")
    with pytest.raises(lrkit.LrkitError, match="are of other data"):
        execute_here(attrs.evolve(more, seeds=[7]), tmp_path / "two")


def test_threads_take_turns(place, tmp_path):
    """Cells in threads of one process come to the same results as one after the other."""
    execute_here(small(place), tmp_path / "one")
    with ThreadPoolExecutor(3) as pool:
        outcome = execute(lay_out(small(place)), tmp_path / "two", executor=pool, costs=False)
    assert outcome.failed == ()
    assert results(tmp_path / "one") == results(tmp_path / "two")


def test_broken_executor_given_up(place, tmp_path):
    """An executor that never runs a cell is given up after a few rounds."""

    class Broken(Executor):
        def submit(self, fn, /, *args, **kwargs):
            raise BrokenExecutor("no worker starts")

    with pytest.raises(lrkit.LrkitError, match="the executor does not run cells: BrokenExecutor: no worker starts"):
        execute(lay_out(small(place)), tmp_path / "out", executor=Broken(), costs=False)


def test_row_wins_over_task(place):
    """A setting that a row changes stays, whatever the task says."""
    task = {"data": str(place / "data"), "set": {"scheduler.interval": 1}}
    plan = lay_out(small(place, tasks=[task], swap={"scheduler.interval": [2]}))
    intervals = {row.label: plan.method(row, plan.tasks[0]).scheduler.interval for row in plan.rows}
    assert intervals["scheduler.interval=2"] == 2 and intervals["adalora"] == 1, "the row comes after the task"


def test_draft_is_no_study(place, tmp_path):
    """A draft of study.json that a killed process left is no study, and in nobody's way."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".study.json.abc").write_text("{")
    assert execute_here(small(place, rows=[], swap={}), out).done == 1
