"""The statistics of AdaLoRA and AFLoRA in one pass over memory, where a C compiler is at hand.

As tensor operations the two running means take six passes over all entries, and a CPU waits for memory in each. The
same formula in C (`native.c`, sixty lines) reads and writes every entry once. It is compiled with ``cc`` when it is first
needed (a fifth of a second), kept in the user's cache folder, and never needed: without a compiler, for small problems,
on other devices and for other dtypes the tensor operations run. ``LRKIT_NATIVE=0`` turns it off.

Both ways round alike to the last bits or so, not bit for bit: a run is resumed bitwise where both halves ran one way.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Sequence
from importlib import resources
from operator import attrgetter
from pathlib import Path

import attrs
import torch
from torch import Tensor, nn

_SMALLEST = 1 << 16
"""Entries from which on it is worth it: below, tensor operations stay in the cache."""

_KINDS = {"sensitivity": 0, "gradient": 1, "ratio": 2}
_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}


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


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None where it is turned off or cannot be had."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if os.environ.get("LRKIT_NATIVE") == "0" or compiler is None:
        return None
    source = resources.files("lrkit") / "native.c"
    flags = ("-O3", "-fPIC", "-shared", "-fopenmp-simd", *_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ()))
    # The processor's abilities are among the flags: a cache shared between machines holds one library for each.
    key = hashlib.sha256("\0".join((source.read_text(encoding="utf-8"), compiler, *flags, os.uname().machine)).encode())
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        folder = base / "lrkit"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        target = folder / f"native-{key.hexdigest()[:24]}.so"
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=folder) as build, resources.as_file(source) as path:
                made = Path(build) / target.name
                subprocess.run([compiler, *flags, str(path), "-o", str(made), "-lm"], check=True, capture_output=True)
                os.replace(made, target)  # in one move: several processes may do this at once
        return ctypes.CDLL(str(target))
    except (OSError, RuntimeError, subprocess.CalledProcessError):
        return None


class Tensors:
    """The live tensors of a layout, as the library takes them.

    Args:
        tensors: in flat order.
    """

    def __init__(self, tensors: Sequence[nn.Parameter]) -> None:
        self.tensors = list(tensors)
        self.sizes = array("q", (p.numel() for p in tensors))
        self.total = sum(self.sizes)
        self._checked: array[int] | None = None

    def observe(self, kernel: Kernel, grads: Sequence[Tensor], mean: Tensor, deviation: Tensor) -> bool | None:
        """Move Ī and Ū by one step.

        Args:
            kernel: what I is.
            grads: one for each tensor.
            mean: Ī [N].
            deviation: Ū [N].

        Returns:
            True; False where a gradient is not finite, and nothing was changed; None where it cannot be done this way.
        """
        c = usable(mean, deviation) if grads else None
        if c is None or not all(map(Tensor.is_contiguous, grads)) or set(map(_dtype, grads)) != {torch.float32}:
            return None
        weights = array("Q", map(Tensor.data_ptr, self.tensors))
        # Tensors that lie where they lay when they were looked at are as they were then.
        if weights != self._checked and not self._fit():
            return None
        self._checked = weights
        pointers, count = array("Q", map(Tensor.data_ptr, grads)), ctypes.c_int64(len(grads))
        if not c.lrkit_finite(count, _address(pointers), _address(self.sizes)):
            return False
        c.lrkit_smooth(
            _KINDS[kernel.kind],
            count,
            _address(weights),
            _address(pointers),
            _address(self.sizes),
            ctypes.c_void_p(mean.data_ptr()),
            ctypes.c_void_p(deviation.data_ptr()),
            ctypes.c_float(1 - kernel.beta1),
            ctypes.c_float(1 - kernel.beta2),
            ctypes.c_float(kernel.epsilon),
        )
        return True

    def _fit(self) -> bool:
        return all(
            type(p) is nn.Parameter
            and p.device.type == "cpu"
            and p.dtype == torch.float32
            and p.is_contiguous()
            and p.numel() == size
            and (p.grad is None or p.grad.numel() == size)
            for p, size in zip(self.tensors, self.sizes, strict=True)
        )


def usable(mean: Tensor, deviation: Tensor) -> ctypes.CDLL | None:
    """The library, where statistics [N] are such as it takes."""
    if mean.numel() < _SMALLEST or any(t.device.type != "cpu" or not t.is_contiguous() for t in (mean, deviation)):
        return None
    return library()


def add_scores(scores: Tensor, outer: int, mean: Tensor, deviation: Tensor) -> None:
    """Add to scores [blocks, units] (float64) the means of Ī · Ū over entries that lie as [blocks, outer, units, inner]."""
    c = library()
    assert c is not None and scores.is_contiguous() and mean.is_contiguous() and deviation.is_contiguous()
    blocks, units = scores.shape
    c.lrkit_score(
        ctypes.c_int64(blocks),
        ctypes.c_int64(outer),
        ctypes.c_int64(units),
        ctypes.c_int64(mean.numel() // (blocks * outer * units)),
        ctypes.c_void_p(mean.data_ptr()),
        ctypes.c_void_p(deviation.data_ptr()),
        ctypes.c_void_p(scores.data_ptr()),
    )


_dtype = attrgetter("dtype")


def _address(values: "array[int]") -> ctypes.c_void_p:
    return ctypes.c_void_p(values.buffer_info()[0])
