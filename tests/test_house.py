"""The size of rooms: what can be taken in at one reading. Which room may know which is in pyproject.toml (import-linter)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "lrkit").rglob("*.py"), *(ROOT / "plugins").glob("*/lrkit_*/*.py")])
LINES, CODE, ATTRIBUTES = 300, 200, 12


def code(text: str, tree: ast.Module) -> set[int]:
    """Return the numbers of the lines that hold code: no blanks, comments or docstrings."""
    prose: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            prose.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), 1)
    return {i for i, line in lines if line.strip() and not line.strip().startswith("#")} - prose


def classes(tree: ast.Module) -> Iterator[ast.ClassDef]:
    """Yield every class of a module."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


def attributes(cls: ast.ClassDef) -> set[str]:
    """Return the names that a class's methods assign on ``self``."""
    found = set()
    for node in ast.walk(cls):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            found |= {node.attr} if node.value.id == "self" else set()
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_are_small(path: Path) -> None:
    """No file has more than 300 lines, no class more than 200 of code or 12 attributes."""
    text = path.read_text("utf-8")
    tree = ast.parse(text)
    assert text.count("\n") <= LINES
    lines = code(text, tree)
    for cls in classes(tree):
        assert sum(cls.lineno <= i <= (cls.end_lineno or 0) for i in lines) <= CODE, cls.name
        assert len(attributes(cls)) <= ATTRIBUTES, f"{cls.name}: {sorted(attributes(cls))}"


def test_the_measures_measure() -> None:
    """A class of three lines of code, a comment, a docstring and two attributes is counted as such."""
    text = 'class A:\n    """Say."""\n\n    def f(self):\n        # why\n        self.a, self.b = 1, 2\n'
    tree = ast.parse(text)
    assert code(text, tree) == {1, 4, 6}
    assert [attributes(cls) for cls in classes(tree)] == [{"a", "b"}]
