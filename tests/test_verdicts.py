"""The verdicts that docs/replication.md prints, against the committed cells."""

from pathlib import Path

import pytest

from lrkit.study.claims import judge, to_markdown
from lrkit.study.records import read_study
from lrkit.study.taken import unpack

DOCS = Path(__file__).parents[1] / "docs"
PACKS = sorted(path.parent.name for path in DOCS.glob("replication/*/cells.jsonl.gz"))
TABLE = (DOCS / "replication.md").read_text().split("## Verdicts")[1].split("\n## ")[0].splitlines()


def rows(study):
    """The rows of a study in the page's first table."""
    return [line for line in TABLE if line.startswith(f"| `{study}`: ")]


def printed(study, line):
    """The page's row of a line of claims.md: some of its columns."""
    claim, verdict, difference, n, p, _, chosen, _ = line.strip("| ").split(" | ")
    name = claim.split("**")[1].replace("-", " ")
    return f"| `{study}`: {name} | {verdict} | {difference} | {p} | {n} | {chosen} |"


def test_studies_with_rows():
    """Whatever the table names is packed, and it names at least one study."""
    named = {line.split("`")[1] for line in TABLE if line.startswith("| `")}
    assert named and named <= set(PACKS)


@pytest.mark.parametrize("study", PACKS)
def test_printed_verdicts(study, tmp_path):
    """The table has the line of each claim of a finished study as the cells give it, and none of an unfinished one."""
    unpack(DOCS / "replication" / study, tmp_path / study)
    record = read_study(tmp_path / study)
    judged = judge(record)
    missing = sum(each.missing for each in judged)
    lines = to_markdown(record, judged).splitlines()[2:]
    assert rows(study) == ([] if missing else [printed(study, line) for line in lines])
