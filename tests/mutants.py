"""Change one number at a time in a copy of lrkit, and see whether the tests beside it notice: by hand, `make mutants`.

Each place in `mutants.toml` names a file, a function, a text that stands once in that function, and what replaces it. The
tool copies the package into a temporary folder, puts that folder first on the path, checks that the tests pass there, and
then, one mutant after the other, runs the tests that should see it, up to the first that fails. Source files are never
touched. A text that is no longer found (or is found twice) is said, and makes the run fail: code has moved, and the list
must follow. So does a mutant that survives.

    python tests/mutants.py                    every mutant, one at a time, some 10 minutes
    python tests/mutants.py --only tally.py    those whose line has this text
    python tests/mutants.py --check            only whether every text is still found

Standard library alone, but for pytest, which runs the tests.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import importlib
import os
import py_compile
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 600
"""Seconds that tests may take: a mutant that never ends is caught."""
MEMORY = 8 << 30
"""Bytes that tests may take: so is one that never has enough."""

_PRELOADED = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"


@dataclass(frozen=True)
class Place:
    """One mutant: where it is, what it does, and which tests should see it; `why` for one that no test can see."""

    file: str
    function: str
    operator: str
    old: str
    new: str
    tests: tuple[str, ...] = ()
    why: str = ""

    def __str__(self) -> str:
        return f"{self.file} {self.function}: {self.operator}: {self.old} -> {self.new}"


def places() -> list[Place]:
    """The list in `mutants.toml`, equivalent ones included."""
    found = []
    for file, entry in tomllib.loads((ROOT / "tests" / "mutants.toml").read_text("utf-8")).items():
        for function, operator, old, new, *tests in entry["places"]:
            chosen = tuple(t if "/" in t.split("::")[0] else f"tests/{t}" for t in tests or entry["tests"])
            found.append(Place(file, function, operator, old, new, chosen))
        for function, operator, old, new, why in entry.get("equivalent", ()):
            found.append(Place(file, function, operator, old, new, why=why))
    return found


def span(source: str, file: str, function: str) -> tuple[int, int] | None:
    """Where a function (or class, such as ``Tally.count`` or ``Linear``) begins and ends in a file's text."""
    if file.endswith(".c"):
        begin = re.search(rf"^[a-z#].*\b{re.escape(function)}\(", source, re.M)
        macro = begin is not None and begin[0].startswith("#")
        end = begin and re.compile(r"[^\\]\n" if macro else r"^}", re.M).search(source, begin.end())
        return (begin.start(), end.end()) if begin and end else None
    nodes: list[ast.stmt] = ast.parse(source).body
    node: ast.stmt | None = None
    for name in function.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        node = next((n for n in nodes if isinstance(n, kinds) and n.name == name), None)
        if not isinstance(node, kinds):
            return None
        nodes = node.body
    assert node is not None and node.end_lineno is not None
    lines = source.splitlines(keepends=True)
    return sum(map(len, lines[: node.lineno - 1])), sum(map(len, lines[: node.end_lineno]))


def mutated(source: str, place: Place) -> str | None:
    """The file's text with one place changed; None where the text does not stand there exactly once, or says nothing."""
    where = span(source, place.file, place.function)
    if where is None or source[slice(*where)].count(place.old) != 1:
        return None
    begin, end = where
    changed = source[:begin] + source[begin:end].replace(place.old, place.new) + source[end:]
    if place.file.endswith(".py") and ast.dump(_bare(source)) == ast.dump(_bare(changed)):
        return None  # it stood in a docstring or a comment
    return changed


def _bare(source: str) -> ast.Module:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0].value.value = ""
    return tree


def preload() -> None:
    """Import what every test imports, but lrkit: forked children begin from there, in a tenth of the time."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    sys.path.insert(0, str(ROOT / "tests"))
    for name in ("models", "numpy", "pytest", "scipy.stats", "torch.testing", "torch.distributed"):
        importlib.import_module(name)
    sys.path.pop(0)
    if "lrkit" in sys.modules:
        sys.exit("lrkit was imported before there was a mutant of it")


def run(tests: list[str], folder: Path, *options: str) -> tuple[int, str]:
    """Pytest's exit code and output for some tests, on the package in a folder; 124 where they do not end."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            _test([*options, *tests], folder, output.fileno())
        give_up = time.monotonic() + LONGEST
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > give_up:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return 124, ""
            time.sleep(0.05)
        output.seek(0)
        return os.waitstatus_to_exitcode(ended[1]), output.read()


def _test(tests: list[str], folder: Path, output: int) -> NoReturn:
    code = 3
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        for stream in (1, 2):
            os.dup2(output, stream)
        os.chdir(ROOT)
        os.environ |= {
            "PYTHONPATH": str(folder),  # for processes that tests start
            "XDG_CACHE_HOME": str(folder / "cache"),  # where lrkit compiles native.c
            "HYPOTHESIS_PROFILE": "first",
        }
        sys.path.insert(0, str(folder))
        import pytest

        code = int(pytest.main(["-q", "-p", "no:cacheprovider", "--tb=line", "-W", _PRELOADED, *tests]))
        used = Path(getattr(sys.modules.get("lrkit"), "__file__", ""))
        if code in (0, 1) and folder not in used.parents:
            print(f"the tests did not see the copy, but {used}")
            code = 3
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def copied(folder: Path) -> Path:
    """A copy of the package whose compiled files are checked by content: sources change within one second here."""
    copy = folder / "lrkit"
    shutil.copytree(ROOT / "lrkit", copy, ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(copy, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    return copy


def failing(mutants: list[Place], copy: Path) -> list[str]:
    """The tests that fail before anything is changed: they can catch nothing, and are left out."""
    code, output = run(sorted({test for place in mutants for test in place.tests}), copy.parent)
    if code not in (0, 1):
        sys.exit(f"{output[-3000:]}\nthe tests do not run before anything was changed: pytest ended with {code}")
    return [line.removeprefix("FAILED ").split(" - ")[0] for line in output.splitlines() if line.startswith("FAILED ")]


def verdict(place: Place, copy: Path, left_out: list[str]) -> str:
    """``caught``, ``survived``, or why it cannot be said."""
    path = copy / place.file
    source = path.read_text("utf-8")
    changed = mutated(source, place)
    assert changed is not None
    path.write_text(changed, "utf-8")
    try:
        code, output = run(list(place.tests), copy.parent, "-x", *(f"--deselect={test}" for test in left_out))
    finally:
        path.write_text(source, "utf-8")
    if code in (1, 124) or code < 0:  # a test failed, or did not end, or the process died of what C did
        return "caught"
    return "survived" if code == 0 else f"pytest ended with {code}: {output[-300:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="only mutants whose line has this text")
    parser.add_argument("--check", action="store_true", help="only whether every text is still found")
    chosen = parser.parse_args()
    every = [place for place in places() if chosen.only in str(place)]
    sources = {place.file: (ROOT / "lrkit" / place.file).read_text("utf-8") for place in every}
    lost = [place for place in every if mutated(sources[place.file], place) is None]
    for place in lost:
        print(f"NOT FOUND  {place}")
    mutants = [place for place in every if not place.why and place not in lost]
    print(
        f"{len(mutants)} mutants, {len(every) - len(mutants) - len(lost)} known to change nothing, {len(lost)} not found"
    )
    if chosen.check or not mutants:
        return bool(lost)
    sys.dont_write_bytecode = True
    preload()
    caught = 0
    with tempfile.TemporaryDirectory() as temporary:
        copy = copied(Path(temporary).resolve())
        left_out = failing(mutants, copy)
        for test in left_out:
            print(f"FAILS BEFORE ANYTHING IS CHANGED  {test}")
        for place in mutants:
            began = time.monotonic()
            what = verdict(place, copy, left_out)
            caught += what == "caught"
            print(
                f"{what.upper() if what != 'caught' else what:10} {place} ({time.monotonic() - began:.0f} s)",
                flush=True,
            )
    print(f"{caught} of {len(mutants)} caught")
    return bool(lost or left_out) or caught < len(mutants)


if __name__ == "__main__":
    sys.exit(main())
