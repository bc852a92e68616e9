"""Controls of methods that are given their ranks: they train at these, scaled as the method is."""

import folders
import lrkit_calibrated
import models
import pytest

import lrkit
from lrkit.study.execute import execute
from lrkit.study.models import empty_model
from lrkit.study.plan import lay_out, study_from
from lrkit.study.records import read_study
from lrkit.testing import only


@pytest.fixture(autouse=True)
def registry():
    with only(lrkit_calibrated, distribution="lrkit-calibrated 0.1.0") as made:
        yield made


def asked(place, base, settings, control):
    return study_from(
        {
            "base": base,
            "set": {"rank": 4, "alpha": 6.0, "calibration": 2, **settings},
            "rows": [{"from": base, "control": kind, "set": control} for kind in ("found", "uniform")],
            "tasks": [{"data": str(place / "data")}],
            "model": str(place / "model"),
            "seeds": [3],
            "run": {"steps": 3, "batch_size": 8, "max_length": 12, "lr": 0.01},
        }
    )


@pytest.mark.parametrize(
    ("base", "settings", "control", "scale"),
    [
        ("eva", {}, {"parameterization.rho": 1.0}, lambda rank: 6.0 / 4),
        ("fim-lora", {}, {}, lambda rank: 6.0 / rank),
        ("fim-lora", {"scale_of": "first-rank"}, {}, lambda rank: 6.0 / 4),
        ("gora", {"least": 1}, {}, lambda rank: 6.0 / rank**0.5),
    ],
)
def test_ranks_and_scales(tmp_path, base, settings, control, scale):
    """`found` trains at the ranks that were given, and every row is scaled by the method's own rule."""
    place = folders.write_place(tmp_path, layers=2)
    out = tmp_path / "s"
    outcome = execute(lay_out(asked(place, base, settings, control)), out, workers=0, threads=1, costs=False)
    assert (outcome.done, outcome.failed) == (3, ())
    record = read_study(out)
    layers = [{layer.name: layer for layer in cell.result.layers} for cell in record.cells]
    assert len({layer.rank for layer in layers[0].values()}) > 1
    assert [each.rank for each in layers[0].values()] == [each.rank for each in layers[1].values()]
    for found in layers:
        for layer in found.values():
            assert not layer.rank or layer.scale == pytest.approx(scale(layer.rank), rel=1e-4)
    adapted = lrkit.attach(
        empty_model(record.model), lrkit.from_plain(record.cells[1].config["method"])
    )  # from step 1 on
    assert {n: a.rank for n, a in adapted.adapters.items()} == {n: x.initial_rank for n, x in layers[1].items()}


def test_more_than_it_is_given_refused(tmp_path):
    """EVA begins with ρ r candidates: a control of it is refused before a step is spent, unless ρ is 1."""
    place = folders.write_place(tmp_path, layers=1)
    with pytest.raises(lrkit.LrkitError, match=r'row eva, found: control "found" trains at .* of rank 4 begins with 8'):
        lay_out(asked(place, "eva", {}, {}))


@pytest.mark.parametrize("method", [lrkit_calibrated.eva, lrkit_calibrated.fim_lora, lrkit_calibrated.gora])
def test_what_peft_trained_is_not_replaced(method, tmp_path):
    """A method that draws all components before the first step would throw away what PEFT trained: refused."""
    adapted = lrkit.attach(models.make("bert"), lrkit.methods.lora(rank=2))
    lrkit.export(adapted, tmp_path)
    with pytest.raises(lrkit.LrkitError, match="replaces all components before the first step, and what PEFT trained"):
        lrkit.from_peft(models.make("bert"), tmp_path, method(rank=4))
