"""New plug-in packages in an environment as `python -m venv` makes it, with the setuptools and pip that Python brings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lrkit.cli.scaffold import KINDS, written


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock") / "venv"
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    subprocess.run([base, "-m", "venv", folder], check=True)
    return folder / "bin" / "python"


@pytest.mark.parametrize("editable", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_builds_with_what_python_brings(stock: Path, tmp_path: Path, kind: str, editable: bool) -> None:
    """As the README of the package says, `pip install`; pip fetches what builds it."""
    for path, text in written(f"lrkit-acme-{kind}", kind).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    arguments = ["install", "-q", "--no-deps", *(["-e"] if editable else []), str(tmp_path)]
    done = subprocess.run([stock, "-m", "pip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    code = "from importlib.metadata import entry_points; print(*entry_points(group='lrkit').names)"
    found = subprocess.run([stock, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert f"acme-{kind}" in found
    subprocess.run([stock, "-m", "pip", "uninstall", "-qy", f"lrkit-acme-{kind}"], check=True)
