"""What pyproject.toml asks for: wide ranges, whose ends are what is tested."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import lrkit

ROOT = Path(__file__).parent.parent
PROJECTS = [ROOT / "pyproject.toml", *sorted((ROOT / "plugins").glob("*/pyproject.toml"))]
TOOLS = {"import-linter", "mypy", "ruff", "furo", "myst-parser", "sphinx"}
TRIED_BY_INTEGRATIONS = {
    "bitsandbytes",
    "lightning",
    "rouge-score",
    "sacrebleu",
    "torchao",
}  # by `make test-integrations` alone


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+", line) for line in lines)
    return {plain(line.partition("==")[0]): line.partition("==")[2] for line in lines}


def requirements(path: Path) -> Iterator[tuple[str, str]]:
    """Name and range of all that a project and its extras ask for."""
    project = tomllib.loads(path.read_text())["project"]
    for line in [
        *project["dependencies"],
        *(x for extra in project.get("optional-dependencies", {}).values() for x in extra),
    ]:
        found = re.fullmatch(r"([\w.-]+)(.*)", line)
        assert found
        yield plain(found[1]), found[2]


def numbers(version: str) -> list[int]:
    whole = [int(part) for part in version.partition("+")[0].split(".")]
    while whole and whole[-1] == 0:
        whole.pop()
    return whole


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: path.parent.name)
def test_ranges_have_no_upper_end(path: Path) -> None:
    """pip replaces nothing that somebody has installed by an older version."""
    for name, wanted in requirements(path):
        assert re.fullmatch(r">=[\d.]+" if name != "lrkit" else "", wanted), f"{name}{wanted}"


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: path.parent.name)
def test_lower_ends_are_tested(path: Path) -> None:
    """Each is the version in constraints-lowest.txt; tools that look at the text alone are not run there."""
    lowest, exact = pins("constraints-lowest.txt"), pins("constraints-integrations.txt") | pins("constraints.txt")
    for name, wanted in requirements(path):
        if name in ("lrkit",):
            continue
        least = numbers(wanted.removeprefix(">="))
        assert least <= numbers(exact[name]), f"{name}: constraints.txt has {exact[name]}, below {wanted}"
        if name not in TOOLS | TRIED_BY_INTEGRATIONS:
            assert numbers(lowest[name]) == least, f"{name}{wanted}, and constraints-lowest.txt has {lowest[name]}"


def test_pins_do_not_overlap() -> None:
    """What `make test-integrations` adds is not in constraints.txt already."""
    assert not pins("constraints-integrations.txt").keys() & pins("constraints.txt").keys()


def test_citation_names_version() -> None:
    """The file and the page that say how to cite lrkit name the version that this is."""
    assert f"\nversion: {lrkit.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"version = {{{lrkit.__version__}}}" in (ROOT / "docs" / "index.md").read_text("utf-8")


def test_pages_read_plain() -> None:
    """Browsed as files, pages show no directive, role or empty link, and from the index links lead to each of them."""
    docs = ROOT / "docs"
    pages = {path: re.sub(r"<!--.*?-->", "", path.read_text("utf-8"), flags=re.DOTALL) for path in docs.rglob("*.md")}
    for path, text in pages.items():
        raw = re.findall(r"```\{\w+\}|\{[a-z:]+\}`|\[\]\(", text)
        assert not raw or path.name == "api.md", f"{path}: {raw}"
    seen, coming = set(), [docs / "index.md"]
    while coming:
        page = coming.pop()
        seen.add(page)
        linked = (
            (page.parent / link).resolve() for link in re.findall(r"\]\(([\w./-]+\.md)(?:#[\w-]+)?\)", pages[page])
        )
        coming += [path for path in linked if path in pages and path not in seen]
    assert seen == set(pages)
