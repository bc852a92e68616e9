"""The statistics of AdaLoRA and AFLoRA in one pass over memory, where a C compiler is at hand.

As tensor operations the two running means take six passes over all entries, and a CPU waits for memory in each. The
same formula in C (`native.c`) reads and writes every entry once, and scores it while it is in the cache, on torch's own
OpenMP threads where the compiler knows OpenMP: threads of our own would wait for torch's, which go on spinning for a while
after each tensor operation. It is compiled with ``cc`` when it is first needed (a fifth of a second), kept in the user's
cache folder, and never needed: without a compiler, for toys, on other devices and for other dtypes the tensor operations
run. ``LRKIT_NATIVE=0`` turns it off.

The two ways agree to rounding, not bit for bit: a resumed run is bitwise the other where both go the same way. The number
of threads changes nothing.
"""

import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
from array import array
from collections.abc import Callable, Sequence
from importlib import resources
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from lrkit.metrics import GradientUncertainty, Metric, RatioUncertainty, SensitivityUncertainty
from lrkit.moves import replacing

SMALLEST = 1 << 12
"""Entries from which on it is used: below, either way takes a fraction of a millisecond, and no compiler is asked for."""

_SHARE = 1 << 16
"""Entries that are worth a thread."""

_KINDS = {"sensitivity": 0, "gradient": 1, "ratio": 2}
_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}


_forked = False
"""Whether this process was forked: OpenMP's threads stay behind in the parent, and waiting for them would never end."""


def _alone() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_alone)


@attrs.frozen
class Kernel:
    """One entry-wise importance I that `native.c` knows.

    Args:
        kind: ``"sensitivity"``: abs(w g); ``"gradient"``: abs(g); ``"ratio"``: abs(g) / (abs(w) + epsilon).
        beta1: smoothing of Ī.
        beta2: smoothing of Ū.
        epsilon: for ``"ratio"`` alone.
    """

    kind: str
    beta1: float
    beta2: float
    epsilon: float = 0.0


_Made = Callable[[Any], Kernel]
_OF: dict[type[Metric], _Made] = {
    SensitivityUncertainty: lambda m: Kernel("sensitivity", m.beta1, m.beta2),
    GradientUncertainty: lambda m: Kernel("gradient", m.beta1, m.beta2),
    RatioUncertainty: lambda m: Kernel("ratio", m.beta1, m.beta2, m.epsilon),
}


def kernel_of(metric: Metric) -> Kernel | None:
    """Return what the library computes in a metric's place; None for most.

    It knows three classes, and none of their subclasses, which may compute something else.
    """
    make = _OF.get(type(metric))
    return None if make is None or getattr(metric, "window", 1) != 1 else make(metric)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None where it is turned off or cannot be had."""
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if os.environ.get("LRKIT_NATIVE") == "0" or compiler is None or os.name != "posix":
        return None
    source = resources.files("lrkit.loop") / "native.c"
    flags = ("-O3", "-fPIC", "-shared", *_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ()))
    # The processor's abilities are among the flags: machines that share a home folder have a library each.
    key = hashlib.sha256("\0".join((source.read_text("utf-8"), compiler, *flags, platform.machine())).encode())
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrkit"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        target = folder / f"native-{key.hexdigest()[:24]}.so"
        if not target.exists():
            # Several processes may do this at once.
            with replacing(target) as draft, resources.as_file(source) as path:
                _compile([compiler, *flags, str(path), "-o", str(draft), "-lm"])
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.CalledProcessError, RuntimeError):  # the last one: a user without a home folder
        return None


def _compile(command: list[str]) -> None:
    """With threads; without them where the compiler has none, as on macOS."""
    for openmp in ("-fopenmp", "-fopenmp-simd"):
        done = subprocess.run([*command, openmp], check=False, capture_output=True)
        if done.returncode == 0:
            return
    done.check_returncode()


class _Job(ctypes.Structure):
    """``struct job`` of `native.c`."""

    _fields_: ClassVar = [
        ("kind", ctypes.c_int),
        ("scoring", ctypes.c_int),
        ("rate1", ctypes.c_float),
        ("rate2", ctypes.c_float),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("tensors", "shapes", "mean", "deviation", "scores")),
    ]


class Compiled:
    """Ī and Ū of a layout's live tensors, moved and scored by the library.

    Args:
        tensors: in flat order.
        shapes: for each (outer, units, inner): its entries lie as [outer, units, inner].
    """

    def __init__(self, tensors: Sequence[nn.Parameter], shapes: Sequence[tuple[int, int, int]]) -> None:
        self._tensors = list(tensors)
        self._sizes = [p.numel() for p in tensors]
        self._starts = [0, *itertools.accumulate(self._sizes)]
        first = [0, *itertools.accumulate(units for _, units, _ in shapes)]
        self._units = first[-1]
        places = zip(self._starts, shapes, first, strict=False)
        self._shapes = array("q", (n for start, shape, place in places for n in (start, *shape, place)))
        self._seen: array[int] | None = None

    def usable(self, mean: Tensor, deviation: Tensor) -> bool:
        """Whether these statistics [N] are such as the library takes, and there is one."""
        size = self._starts[-1]
        return (
            size >= SMALLEST
            and all(t.device.type == "cpu" and t.is_contiguous() and t.numel() == size for t in (mean, deviation))
            and library() is not None
        )

    def observe(
        self, kernel: Kernel, grads: Sequence[Tensor], mean: Tensor, deviation: Tensor, *, scoring: bool
    ) -> tuple[bool, Tensor] | None:
        """Move Ī and Ū by one step.

        Args:
            kernel: what I is.
            grads: one for each tensor.
            mean: Ī [N].
            deviation: Ū [N].
            scoring: whether scores are wanted too.

        Returns:
            True if all gradients were finite (if not, nothing was changed), and the scores as `score` gives them, or
            none. None where it cannot be done this way.
        """
        plain = all(map(Tensor.is_contiguous, grads)) and set(map(attrgetter("dtype"), grads)) == {torch.float32}
        if not plain or not self.usable(mean, deviation):
            return None
        weights = array("Q", map(Tensor.data_ptr, self._tensors))
        # Same addresses as at the last check, so dtype and contiguity need no second look.
        if weights != self._seen and not self._as_laid_out(grads):
            return None
        self._seen = weights
        pointers = array("Q", bytes(16 * len(weights)))
        pointers[::2], pointers[1::2] = weights, array("Q", map(Tensor.data_ptr, grads))
        return self._run(mean, deviation, scoring, kernel, pointers)

    def score(self, mean: Tensor, deviation: Tensor) -> Tensor:
        """The means of Ī · Ū over the entries of each tensor's units [Σ units], float64, tensor after tensor."""
        return self._run(mean, deviation, True, Kernel("gradient", 0.0, 0.0), None)[1]

    def _run(
        self, mean: Tensor, deviation: Tensor, scoring: bool, kernel: Kernel, pointers: "array[int] | None"
    ) -> tuple[bool, Tensor]:
        c = library()
        assert c is not None
        scores = torch.zeros(self._units if scoring else 0, dtype=torch.float64)
        job = _Job(
            kind=_KINDS[kernel.kind],
            scoring=scoring,
            rate1=1 - kernel.beta1,
            rate2=1 - kernel.beta2,
            epsilon=kernel.epsilon,
            tensors=None if pointers is None else _address(pointers),
            shapes=_address(self._shapes),
            mean=mean.data_ptr(),
            deviation=deviation.data_ptr(),
            scores=scores.data_ptr(),
        )
        threads = 1 if _forked else max(1, min(torch.get_num_threads(), self._starts[-1] // _SHARE))
        count = len(self._tensors)
        finite = c.lrkit_observe(ctypes.byref(job), ctypes.c_int64(count), ctypes.c_int(threads))
        return bool(finite), scores

    def _as_laid_out(self, grads: Sequence[Tensor]) -> bool:
        return all(
            p.device.type == "cpu" and p.dtype == torch.float32 and p.is_contiguous() and p.numel() == g.numel() == size
            for p, g, size in zip(self._tensors, grads, self._sizes, strict=True)
        )


def _address(values: "array[int]") -> int:
    return values.buffer_info()[0]
