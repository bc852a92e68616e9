"""What belongs to the user's program: random generators, threads and switches, looked at and put back."""

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def global_state() -> dict[str, Any]:
    """What belongs to the user's program, by name."""
    return {
        "torch's random generator": torch.get_rng_state().tolist(),
        "Python's random generator": random.getstate(),
        "NumPy's random generator": pickle.dumps(np.random.get_state()),
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
        "the gradient mode": torch.is_grad_enabled(),
        "the switch for deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the switch for anomaly detection": torch.is_anomaly_enabled(),
    }


@contextmanager
def as_it_was() -> Iterator[None]:
    """Put it all back as it was: what runs within may seed, set threads and throw switches as it likes."""
    before, numpy = global_state(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(torch.tensor(before["torch's random generator"], dtype=torch.uint8))
        random.setstate(before["Python's random generator"])
        np.random.set_state(numpy)
        torch.set_default_dtype(before["the default dtype"])
        torch.set_num_threads(before["the number of threads"])
        torch.set_grad_enabled(before["the gradient mode"])
        torch.use_deterministic_algorithms(before["the switch for deterministic algorithms"])
        torch.autograd.set_detect_anomaly(before["the switch for anomaly detection"])
