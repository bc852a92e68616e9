"""The command line with --json, called in this process."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lrkit.cli import main


def ask(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """Return what a command prints as JSON, or fail with its errors."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert caught.value.code == 0, err
    told: dict[str, Any] = json.loads(out)
    return told
