"""Look at what belongs to the user's program, and put it back: random generators, threads and switches."""

import os
import pickle
import random
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from lrkit.precision import without_autocast


def global_state() -> dict[str, Any]:
    """Return the state of what belongs to the user's program, by name."""
    return {
        "torch's random generator": torch.get_rng_state().tolist(),
        "Python's random generator": random.getstate(),
        "NumPy's random generator": pickle.dumps(np.random.get_state()),
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
        "the gradient mode": torch.is_grad_enabled(),
        "the switch for deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "the switch for anomaly detection": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "the precision of float32 products": torch.get_float32_matmul_precision(),
        "the switches of cuDNN": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
    }


@contextmanager
def as_it_was() -> Iterator[None]:
    """Put everything of `global_state` back after the block, the environment and the warnings' filters too.

    For example, a contract's test may seed, set threads and throw switches as it likes.
    """
    before, numpy = global_state(), np.random.get_state()
    environment, filters = dict(os.environ), list(warnings.filters)
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.set_rng_state(torch.tensor(before["torch's random generator"], dtype=torch.uint8))
        random.setstate(before["Python's random generator"])
        np.random.set_state(numpy)
        torch.set_default_dtype(before["the default dtype"])
        torch.set_num_threads(before["the number of threads"])
        torch.set_grad_enabled(before["the gradient mode"])
        deterministic, warn_only = before["the switch for deterministic algorithms"]
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.autograd.set_detect_anomaly(*before["the switch for anomaly detection"])
        if torch.get_float32_matmul_precision() != before["the precision of float32 products"]:
            torch.set_float32_matmul_precision(before["the precision of float32 products"])
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before["the switches of cuDNN"]
        if dict(os.environ) != environment:
            for name in set(os.environ) - set(environment):
                del os.environ[name]
            os.environ.update(environment)
        if warnings.filters != filters:
            warnings.filters[:] = filters  # type: ignore[index]
            warnings._filters_mutated()  # type: ignore[attr-defined]
        if devices:
            torch.cuda.set_rng_state_all(devices)


@contextmanager
def as_if_new() -> Iterator[None]:
    """Run the block in the modes of a process that has just begun, and put this one's modes and state back."""
    with ExitStack() as modes:
        modes.enter_context(as_it_was())
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            modes.enter_context(without_autocast(device))
        torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def swapped(places: Iterable[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Put other values in places for a while, and what was there back afterwards, whatever happens.

    Args:
        places: a table, a name in it, and the value for it. A generator may look at the tables between two places.
    """
    held: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for table, name, value in places:
            held.append((table, name, table[name]))
            table[name] = value
        yield
    finally:
        for table, name, before in reversed(held):
            table[name] = before
