"""Say beforehand if bfloat16 costs time instead of saving it: a CPU without units for it computes it in software."""

import functools
import time
from collections.abc import Iterable

SLOWER = 3.0
"""So many times the time of float32, or more, is told: with units bfloat16 takes less than once."""

# Matrices so small that a product ends before another process takes its turn, and large enough for units to pay.
_SIDE = 128
_TIMES = 9


@functools.cache
def slowdown() -> float:
    """Measure how many times as long a product of two matrices takes in bfloat16 as in float32 on this CPU."""
    import torch

    def seconds(kind: torch.dtype) -> float:
        # In the mode for inference, so that no autocast of the caller's and no recording of gradients takes part.
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            left, right = torch.ones(_SIDE, _SIDE, dtype=kind), torch.ones(_SIDE, _SIDE, dtype=kind)
            found = []
            for _ in range(1 + _TIMES):
                start = time.perf_counter()
                left @ right
                found.append(time.perf_counter() - start)
        return min(found[1:])  # the first one is slower: it loads the code

    return seconds(torch.bfloat16) / seconds(torch.float32)


def slow_bf16(asked: Iterable[bool]) -> str | None:
    """Say in one line that runs in bfloat16 are slow here.

    Args:
        asked: `bf16` of each run.

    Returns:
        The line; None if no run is in bfloat16, if a GPU trains, or if this CPU has units for it.
    """
    if not any(asked):
        return None
    import torch

    if torch.cuda.is_available() or slowdown() < SLOWER:
        return None
    return (
        f"run.bf16: on this CPU a product of two matrices takes {slowdown():.0f} times as long in bfloat16 as in float32; "
        "--set run.bf16=false computes in float32"
    )
