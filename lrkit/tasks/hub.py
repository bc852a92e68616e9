"""Load data from the Hugging Face hub, ask whether it is there, and keep `datasets` quiet.

The hub's own client repeats a failed request five times with growing pauses: 23 s per data set and 49 s per model on a
machine without a network (measured). If one short question is asked first, there is one clear line after a moment.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lrkit.errors import LrkitError

if TYPE_CHECKING:
    import datasets

TIMEOUT = 5.0  # seconds for the one question; a slower hub is of no use for a download either


def reachable() -> bool:
    """Say whether the hub (or the mirror that `HF_ENDPOINT` names) answers at all within `TIMEOUT` seconds.

    Any answer counts, an error status too. False in the hub's offline mode (`HF_HUB_OFFLINE=1`).
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # the client's own tree of errors, OSError, or offline mode: all mean "no"
        return False
    return True


def load_hub(name: str, repository: str, config: str | None = None) -> datasets.DatasetDict:
    """Load a data set from the hub, or from the hub's cache on this machine if the hub is out of reach.

    Args:
        name: the task's name in errors: "glue/rte".
        repository: the data set's name on the hub: "nyu-mll/glue".
        config: which of its parts: "rte"; None if it has one alone.

    Returns:
        Its splits by name.

    Raises:
        LrkitError: the data cannot be had.
    """
    import datasets

    there = reachable()
    try:
        with quiet_datasets(offline=not there):
            return datasets.load_dataset(*((repository,) if config is None else (repository, config)))
    except Exception as error:  # the hub, its client, the cache and the data reader each have their own
        why = "the Hugging Face hub cannot be reached, and it is not in the hub's cache"
        if there:
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise LrkitError(
            f"cannot load {name}: {why}; for local files (train and validation: .jsonl, .csv, .parquet) use --data FOLDER, "
            f"or in a study --data {name}=FOLDER"
        ) from error


def new_fingerprint() -> str:
    """Return a name for rows that are made in memory: by default `datasets` pickles all that made them, to name a file."""
    return uuid.uuid4().hex[:16]


@contextmanager
def quiet_datasets(*, offline: bool = False) -> Iterator[None]:
    """Keep `datasets` quiet and, with `offline`, away from the hub; put everything back after."""
    import datasets

    bars = datasets.utils.is_progress_bar_enabled()
    was_offline = datasets.config.HF_HUB_OFFLINE
    logger = logging.getLogger("datasets")
    level = logger.level
    datasets.utils.disable_progress_bars()
    datasets.config.HF_HUB_OFFLINE = offline or was_offline
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        datasets.config.HF_HUB_OFFLINE = was_offline
        if bars:
            datasets.utils.enable_progress_bars()
