"""``lrkit demo --causal`` on a small model, and the verdicts that it learns."""

import json
import os

import pytest
import talkers

from lrkit.cli import main
from lrkit.study import run
from lrkit.tasks import movies, verdicts

RATED = [(f"the film {n} was {word}", rating) for n in range(12) for word, rating in (("dull", -3.0), ("fine", 1.0))]


@pytest.fixture
def rated(monkeypatch):
    """Sentences that need no fetching: a quarter is set aside."""
    monkeypatch.setattr(movies, "sdist", lambda: b"")
    monkeypatch.setattr(movies, "ratings", lambda archive: RATED)
    monkeypatch.setattr(movies, "held_out", lambda text: " 1" in text)


@pytest.mark.parametrize(
    ("rating", "stars"), [(-4.0, 1), (-2.1, 1), (-2.0, 2), (-0.5, 2), (0.5, 4), (1.9, 4), (2.0, 5), (4.0, 5)]
)
def test_verdicts_follow_ratings(rating, stars):
    """A higher rating has more stars."""
    assert f"({stars} of 5 stars)" in verdicts.verdict_of(rating)


def test_prompts_meet_completions(rated):
    """No token spans both: a prompt ends without a blank, and a completion begins with one."""
    task = verdicts.load_verdicts()
    assert len(task.train) + len(task.validation) == len(RATED)
    assert task.train[0] == {
        "prompt": "Review of a film: the film 0 was dull\nVerdict:",
        "completion": " terrible (1 of 5 stars)",
    }
    for split in (task.train, task.validation):
        assert all(prompt[-1] == ":" for prompt in split["prompt"])
        assert all(said[0] == " " and said[1] != " " for said in split["completion"])


def test_causal_demo_speaks(rated, monkeypatch, tmp_path, capsys):
    """Three methods are trained, with a table, pictures, and an answer before and after."""
    model, tokenizer = tmp_path / "model", talkers.byte_level()
    talkers.llama(tokenizer).save_pretrained(model)
    tokenizer.save_pretrained(model)
    train = run.train
    monkeypatch.setattr(run, "train", lambda *a, **given: train(*a, **given | {"model": str(model)}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--causal", "--steps", "20", "--out", "demo"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert "A lower perplexity is better." in told
    assert all(f"{who}: " in told for who in ("input", "reference", "without training", "lora", "adalora", "aflora"))
    runs = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert list(runs) == ["lora", "adalora", "aflora"]
    assert {"ranks.png", "freezing.png", "budget.png"} <= set(os.listdir(tmp_path / "demo"))
