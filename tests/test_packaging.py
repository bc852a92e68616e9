"""What pyproject.toml asks for: wide ranges, whose ends are what is tested."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

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
        assert re.fullmatch(r">=[\d.]+", wanted), f"{name}{wanted}"


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


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: path.parent.name)
def test_metadata_is_complete(path: Path) -> None:
    """lrkit and all plug-ins are of one version, and say on the package index who, what, where and under which licence."""
    project = tomllib.loads(path.read_text())["project"]
    assert project.get("version", lrkit.__version__) == lrkit.__version__
    assert len(project["description"]) < 130 and project["keywords"] and project["authors"]
    assert (project["license"], project["license-files"], project["requires-python"]) == (
        "Apache-2.0",
        ["LICENSE"],
        ">=3.11",
    )
    assert (path.parent / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert {"Programming Language :: Python :: 3.11", "Typing :: Typed"} <= set(project["classifiers"])
    mine = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    urls = project["urls"]
    assert {"Repository", "Documentation", "Issues"} <= set(urls)
    assert all(url.startswith(mine) for url in urls.values())
    page = urls["Documentation"].removeprefix(f"{mine}/blob/main/")
    assert (ROOT / page).is_file()


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: path.parent.name)
def test_readme_leads_somewhere(path: Path) -> None:
    """On the package index every link and picture is absolute, and what it leads to in the repository is there."""
    text = (path.parent / "README.md").read_text("utf-8")
    if path.parent == ROOT:
        spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
        assert spec and spec.loader
        hook = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(hook)
        relative = set(re.findall(r"\]\(([^):\s]+)\)", text))
        assert relative
        text = hook.absolute(text, "https://host/lrkit", "v9")
        for link in relative:
            assert (ROOT / link.partition("#")[0]).is_file(), link
            assert f"](https://host/lrkit/{'raw' if link.endswith('.png') else 'blob'}/v9/{link})" in text
        assert hook.absolute(text, "https://else/where", "v1") == text
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert all(re.match("https?://|#", link) for link in links), links


def test_citation_file() -> None:
    """The file has what version 1.2.0 of its format asks for."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert (cited["cff-version"], cited["license"], cited["type"]) == ("1.2.0", "Apache-2.0", "software")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", str(cited["date-released"]))


def test_workflow_calls_make() -> None:
    """Continuous integration is `make check` and `make test`, targets that there are."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))["jobs"]
    ran = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert {"make check", "make test"} <= set(ran)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert {line.removeprefix("make ") for line in ran} <= set(targets)


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
