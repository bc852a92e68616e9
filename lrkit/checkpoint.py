"""One file for a run's state: safetensors, with the JSON data in its metadata. Never pickle.

One file, so that it is replaced in one move: a process killed at any moment leaves the old state or the new one.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lrkit.errors import LrkitError

FILE = "lrkit.safetensors"
_KEY = "lrkit"


def write(folder: Path, state: Mapping[str, Any]) -> Path:
    """Write a state into a folder, which is made if need be, in one move.

    Args:
        folder: where to.
        state: ``{"meta": JSON data, "tensors": name to tensor}``.

    Returns:
        The file's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{FILE}.")
    os.close(handle)
    try:
        tensors = {name: tensor.contiguous().cpu() for name, tensor in state["tensors"].items()}
        save_file(tensors, temporary, metadata={_KEY: json.dumps(state["meta"])})
        os.chmod(temporary, 0o666 & ~umask())  # mkstemp makes files for their owner alone
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, folder / FILE)
    except BaseException:
        os.unlink(temporary)
        raise
    return folder / FILE


def umask() -> int:
    """The permissions that new files of this process are made without."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read(folder: Path) -> dict[str, Any]:
    """Read a state that `write` wrote.

    Raises:
        LrkitError: no such file, a truncated one, or one that lrkit did not write.
    """
    path = folder / FILE if folder.is_dir() else folder
    if not path.is_file():
        study = ": this is a study's folder, and a run's is one of its cells/*" if (folder / "cells").is_dir() else ""
        raise LrkitError(f"no lrkit state at {path}{study}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping: it has keys alone)
        meta = json.loads(metadata[_KEY])
    except KeyError:
        raise LrkitError(f"{path} is a safetensors file, but not one of lrkit's") from None
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise LrkitError(f"{path} is truncated, or no safetensors file ({error})") from None
    return {"meta": meta, "tensors": tensors}
