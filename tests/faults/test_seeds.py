"""Seeds too few for any row to come below 0.05: said before the first step, and never in a study that ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lrkit
from lrkit.cli import main
from lrkit.study.catalogue import shipped
from lrkit.study.paired import enough_pairs, holm, smallest_p, too_few_seeds
from lrkit.study.plan import lay_out, read_study

SMALL = ["--set", "run.steps=2", "--set", "run.batch_size=4", "--set", "run.max_length=16", "--set", "rank=2"]
SMALL += ["--set", "target_rank=1", "--set", "run.validation_rows=8"]


def test_enough_pairs_by_hand() -> None:
    """2 m / 2^n < 0.05: six for one row, seven for two and three, eight for four to six, nine for seven to twelve."""
    wanted = {1: 6, 2: 7, 3: 7, 4: 8, 6: 8, 7: 9, 12: 9, 13: 10}
    assert {rows: enough_pairs(rows) for rows in wanted} == wanted


@pytest.mark.parametrize("rows", [1, 2, 5, 12])
def test_enough_is_what_holm_needs(rows: int) -> None:
    """With so many pairs the least p of all rows comes below 0.05 after the correction; with one fewer it does not."""
    best = [[smallest_p(n)] * rows for n in (enough_pairs(rows), enough_pairs(rows) - 1)]
    assert min(holm(best[0])) < 0.05 <= min(holm(best[1]))


def test_what_is_said() -> None:
    """The least p that there can be, and how many seeds it takes."""
    assert too_few_seeds(2, 7) is None
    assert too_few_seeds(0, 1) is None
    assert too_few_seeds(2, 6) == (
        "6 seeds are too few to show a difference: over 2 rows after Holm's correction no p can be below 0.062, whatever "
        "the scores; 7 seeds could bring it below 0.05"
    )
    assert "for one row no p can be below 1," in (too_few_seeds(1, 1) or "")


@pytest.mark.parametrize("name", shipped())
def test_shipped_studies_have_enough(name: str) -> None:
    """Each study that ships can show a difference in its rows."""
    plan = lay_out(read_study(name))
    assert too_few_seeds(len(plan.rows) - 1, len(plan.seeds)) is None


def test_the_dry_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """--dry-run shows it under the plan, and --json has it in a field."""
    study = ["ablate", "adalora", "--swap", "metric=magnitude,sensitivity", *SMALL, "--dry-run"]
    assert run(study) == 0
    assert "6 seeds are too few" in capsys.readouterr().out
    assert run([*study, "--json"]) == 0
    assert "6 seeds are too few" in json.loads(capsys.readouterr().out)["too_few_seeds"]
    assert run([*study, "--seeds", "7"]) == 0
    assert "too few" not in capsys.readouterr().out


def test_ablate_says_so_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line and the library say it before a cell is begun."""

    def stop(*_: Any, **__: Any) -> None:
        raise lrkit.LrkitError("the first step")

    monkeypatch.setattr("lrkit.study.execute.run_missing", stop)
    swap = {"metric": ["magnitude"]}
    with (
        pytest.warns(lrkit.LrkitWarning, match="2 seeds are too few"),
        pytest.raises(lrkit.LrkitError, match="first step"),
    ):
        lrkit.ablate("adalora", swap, seeds=2, out=tmp_path / "a", workers=0)
    command = ["ablate", "adalora", "--swap", "metric=magnitude", *SMALL, "--seeds", "2", "--workers", "0"]
    assert run([*command, "--out", str(tmp_path / "b")]) == 2
    said = capsys.readouterr().err
    assert 0 <= said.index("2 seeds are too few") < said.index("the first step")


def run(arguments: list[str]) -> Any:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return left.value.code
