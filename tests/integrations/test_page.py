"""The examples of docs/trainers.md, which need packages that the other pages do without."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_examples_of_trainers_run(tmp_path, monkeypatch):
    """Each example of the page runs as it stands, after those before it and in one folder."""
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    names = {"__name__": "__main__"}
    for block in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), names)
    assert {"SFTTrainer", "DPOTrainer", "GRPOTrainer", "RewardTrainer", "Seq2SeqTrainer", "Accelerator"} <= set(names)
