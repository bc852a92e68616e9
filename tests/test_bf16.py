"""bfloat16 on a CPU without units for it takes many times as long as float32, and is told before the first step."""

import itertools
import warnings

import folders
import pytest

import lrkit
from lrkit.errors import LrkitWarning
from lrkit.study import precision
from lrkit.study.asked import study_from
from lrkit.study.execute import execute
from lrkit.study.executors import Here
from lrkit.study.plan import lay_out
from lrkit.study.run import train
from lrkit.study.run_settings import settings_from
from lrkit.tasks import load_task

LINE = (
    "run.bf16: on this CPU a product of two matrices takes 46 times as long in bfloat16 as in float32; "
    "--set run.bf16=false computes in float32"
)
RUN = {"steps": 1, "batch_size": 4, "max_length": 8, "validation_rows": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return folders.write_place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def slow(monkeypatch):
    """A CPU without units for bfloat16, and no GPU."""
    monkeypatch.setattr(precision, "slowdown", lambda: 46.2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def told(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in caught if each.category is LrkitWarning]


def plan_of(place, bf16):
    plain = {"base": "lora", "set": {"rank": 2}, "tasks": [{"data": str(place / "data")}], "seeds": 1}
    return lay_out(study_from(plain | {"model": str(place / "model"), "run": RUN | {"bf16": bf16}}))


def test_measured_by_a_clock(monkeypatch):
    """The ratio is that of the shortest product after the first one, in bfloat16 over float32."""
    lengths = iter([90.0, 9.0, 8.0, *[10.0] * 7, 70.0, 2.0, *[3.0] * 8])
    ticks = itertools.chain.from_iterable((0.0, each) for each in lengths)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(ticks))
    assert precision.slowdown.__wrapped__() == 8.0 / 2.0


def test_a_study_says_it_once(place, tmp_path, slow):
    """Before its cells, of which none is left the second time; in float32 there is nothing to say."""
    plan = plan_of(place, bf16=True)
    for expected in ([LINE], []):
        assert told(lambda: execute(plan, tmp_path / "a", workers=0, costs=False)) == expected
    assert told(lambda: execute(plan_of(place, bf16=False), tmp_path / "b", workers=0, costs=False)) == []


def test_other_machines_are_their_own(place, tmp_path, slow):
    """An executor of the caller's may run cells anywhere."""
    assert told(lambda: execute(plan_of(place, bf16=True), tmp_path / "c", executor=Here(), costs=False)) == []


@pytest.mark.parametrize(("bf16", "cuda", "ratio"), [(True, False, 2.9), (True, True, 46.2), (False, False, 46.2)])
def test_units_or_a_gpu_are_fast(monkeypatch, bf16, cuda, ratio):
    monkeypatch.setattr(precision, "slowdown", lambda: ratio)
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    assert precision.slow_bf16([False, bf16]) is None


def test_a_run_says_it(slow):
    settings = settings_from({**RUN, "steps": 1, "bf16": True})
    assert told(lambda: train(lrkit.methods.lora(rank=2), load_task("movies"), settings=settings)) == [LINE]


def test_a_dry_run_says_it(place, slow, capsys):
    asked = ["ablate", "lora", "--swap", "rank=2,4", "--dry-run", "--data", place / "data", "--model", place / "model"]
    for bf16 in ("true", "false"):
        with pytest.raises(SystemExit):
            lrkit.cli.main([*map(str, asked), "--set", f"run.bf16={bf16}"])
        assert (f"lrkit: {LINE}\n" in capsys.readouterr().err) == (bf16 == "true")
