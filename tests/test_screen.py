"""Tables on a terminal: at 80 columns, and at any width, no word and no number is broken."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import folders
import pytest
import studies
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from lrkit.cli.tables import GLUE, Column, lay_out

WORD = st.text(st.sampled_from("abz0,.-_λ層é→"), min_size=1, max_size=12)
CELL = st.lists(WORD, min_size=1, max_size=6).map(" ".join)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[Column], list[list[str]], int]:
    """Columns, rows and a width."""
    columns = [Column(draw(CELL), draw(st.booleans()), draw(st.booleans())) for _ in range(draw(st.integers(1, 7)))]
    columns[0] = columns[0]._replace(extra=False)
    rows = draw(st.lists(st.lists(CELL, min_size=len(columns), max_size=len(columns)), max_size=4))
    return columns, rows, draw(st.integers(10, 120))


@given(tables())
def test_words_stay_whole(drawn: tuple[list[Column], list[list[str]], int]) -> None:
    """Every word of every column shown is on the screen as often as it is in the table, and no other."""
    columns, rows, width = drawn
    laid, left_out = lay_out(columns, rows, width)
    shown = [i for i, column in enumerate(columns) if not (column.extra and column.header in left_out)]
    if [columns[i].header for i in range(len(columns)) if i not in shown] != left_out:
        return  # two columns of one name, and one of them is left out
    found = Counter(word for table in laid for line in [*table.header, *table.rows] for word in line.split())
    told = Counter(
        word for i in shown for cell in [columns[i].header, *(row[i] for row in rows)] for word in cell.split()
    )
    first = Counter(word for cell in [columns[0].header, *(row[0] for row in rows)] for word in cell.split())
    for _ in laid[1:]:
        told += first
    assert found == told


@given(tables())
def test_lines_fit(drawn: tuple[list[Column], list[list[str]], int]) -> None:
    """A line is wider than the terminal only if its two widest words are."""
    columns, rows, width = drawn
    longest = [
        max(map(cell_len, " ".join(cells).split())) for cells in zip([c.header for c in columns], *rows, strict=True)
    ]
    two = longest[0] + 2 + max(longest[1:], default=-2)
    for table in lay_out(columns, rows, width)[0]:
        assert table.width <= max(width, two)
        assert all(cell_len(line) <= table.width for line in [*table.header, *table.rows])


def test_columns_go_before_headers_wrap() -> None:
    """An extra column goes first, then headers take two lines, then texts."""
    columns = [Column("name"), Column("trainable at start", True), Column("layers", True, True), Column("what it is")]
    rows = [["lora", "1,327,104", "72", "two matrices, one of them zero"]]
    tables, left_out = lay_out(columns, rows, 80)
    assert (len(tables[0].header), left_out) == (1, [])
    tables, left_out = lay_out(columns, rows, 60)
    assert (len(tables[0].header), len(tables[0].rows), left_out) == (1, 1, ["layers"])
    tables, left_out = lay_out(columns, rows, 50)
    assert (len(tables[0].header), len(tables[0].rows)) == (2, 1)
    tables, left_out = lay_out(columns, rows, 35)
    assert (len(tables), len(tables[0].rows)) == (1, 2)
    tables, left_out = lay_out(columns, rows, 16)
    assert len(tables) == 2 and all(table.header[-1].startswith("name") for table in tables)


def test_glue_holds() -> None:
    """A number and its unit stay together, and look like any other text."""
    column = [Column("n"), Column("FLOPs", True)]
    ((table,), _) = lay_out(column, [["lora", f"153.36{GLUE}M"]], 4)
    assert table.rows == ["lora  153.36 M"]


# ---- a real terminal -------------------------------------------------------------------------------------------------

CELLS = ["--set", "run.steps=4", "--set", "run.batch_size=4", "--set", "run.max_length=8", "--model", "model"]
RUN = [*CELLS, "--data", "data"]
LEFT_OUT = r"Left out at 80 columns: [^.]*\.\s+A\s+wider\s+terminal\s+or\s+--json\s+has\s+it\s+all\."
COMMANDS = {
    "methods": ["methods"],
    "plugins": ["plugins"],
    "params": ["params"],
    "params with FLOPs": ["params", "full", "adalora", "aflora", "--tokens", "16"],
    "show": ["plugins", "show", "cubic"],
    "show a method": ["plugins", "show", "adalora"],
    "doctor": ["plugins", "doctor", "acme"],
    "run": ["run", "adalora", "--swap", "metric=ratio-uncertainty", *RUN, "--out", "run"],
    "export": ["export", "run", "--to", "merged", "--out", "merged"],
    "demo": ["demo", "--steps", "20", "--out", "demo"],
    "list of studies": ["ablate", "--list"],
    "dry run": ["ablate", "adalora", "--swap", "metric=sensitivity,gradient-uncertainty", *RUN, "--dry-run"],
    "ablate": ["ablate", "lora", "--swap", "rank=2", "--seeds", "2", *RUN, "--workers", "0", "--out", "ablated"],
    "report": ["report", "study"],
    "power": ["power", "study", "--size", "0.01", "--margin", "0.01"],
}
PROGRAM = """
import contextlib, fcntl, json, os, struct, sys, termios, types
import lrkit.registry
registry = lrkit.registry.Registry(discover=False)  # no other plug-in is part of this test
lrkit.registry.current = lambda: registry
import attrs, lrkit, lrkit.study.run as run, lrkit.tasks as tasks
from lrkit.cli import main

@attrs.frozen(kw_only=True)
class Mine(lrkit.metrics.Magnitude):
    'The size of λ; with measure. Source: arXiv 2303.10512.'

acme = types.ModuleType("acme")
acme.lrkit_metrics = lrkit.hookimpl(lambda: {"a-metric-with-a-long-name": Mine})
acme.lrkit_studies = lrkit.hookimpl(lambda: {"a-study-with-a-long-name": "base = 'lora'"})
registry.add("acme-with-a-long-name 1.0", "acme", acme)
# The demo, of a small model.
train, load_task = run.train, tasks.load_task
run.train = lambda *a, **k: train(*a, **{"model": "model"} | k | {"settings": run.RunSettings(steps=4, max_length=8)})
tasks.load_task = lambda *a, **k: load_task(**k | {"data": "data"})
home = os.getcwd()
for columns in map(int, sys.argv[2:]):
    os.chdir(os.path.join(home, str(columns)))
    os.environ["COLUMNS"] = str(columns)
    fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    for case, words in json.loads(sys.argv[1]).items():
        print("=====", columns, case)
        try:
            main(words)
        except SystemExit as end:
            print("===== exit", end.code)
"""


def on_terminal(widths: tuple[int, ...], place: Path) -> dict[tuple[int, str], str]:
    """Run all commands with a terminal as stdout, at each width: what each said, its exit code last."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(COMMANDS), *map(str, widths)],
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        cwd=place,
        env=environment,
    )
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(ours, 65536):
            said += part
    os.close(ours)
    assert process.wait(timeout=60) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", said.decode().replace("\r\n", "\n"))
    parts = re.split(r"^===== (\d+) (.*)\n", text, flags=re.MULTILINE)[1:]
    return {(int(parts[i]), parts[i + 1]): parts[i + 2] for i in range(0, len(parts), 3)}


@pytest.fixture(scope="module")
def screens(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], str]:
    """What the commands say at 400 columns and at 80, on the same model, data and studies."""
    place = folders.write_place(tmp_path_factory.mktemp("place"))
    labels = ("adalora", "metric=sensitivity-uncertainty, scheduler.warmup=0.25", "parameterization.orthogonality=0.0")
    studies.write_study(place / "study", labels=labels, tasks=("movies", "glue/rte"))
    (place / "ablated").mkdir()
    for columns in (400, 80):
        (place / str(columns)).mkdir()
        for name in ("model", "data", "study", "ablated"):
            (place / str(columns) / name).symlink_to(place / name)
    said = on_terminal((400, 80), place)
    # Costs are not measured again though the model lies under another path.
    assert len(list((place / "ablated" / "costs").glob("*.json"))) == 2
    return said


@pytest.mark.parametrize("case", COMMANDS)
def test_eighty_columns_break_nothing(case: str, screens: dict[tuple[int, str], str]) -> None:
    """Each word at 80 columns is one of those that are there at 400, and no line is wider than the terminal."""
    said = re.sub(LEFT_OUT, "", screens[80, case])
    assert said.endswith("===== exit 0\n")
    wide = set(screens[400, case].split())
    if case == "methods":  # which shows the parts in one column
        wide |= {*"composition + lrkit plugins show NAME: what one is, and what can be set".split()}  # noqa: SIM905
    assert [word for word in said.split() if word not in wide and set(word) != {"─"}] == []
    assert [line for line in said.split("\n") if cell_len(line) > 80] == []
    assert len(said.split("\n")) > 2
