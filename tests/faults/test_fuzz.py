"""A hundred bad inputs: each is refused in one line, or taken for what it is. `make fuzz` tries 4,000."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fuzz


def test_bad_input_is_refused():
    """No traceback, no hang, no changed model, no long line; and every kind is among the cases."""
    counts, faults = fuzz.fuzz(100, seed=0)
    assert not faults, "\n".join(f"case {number} ({kind}): {found}" for number, kind, found in faults)
    assert sum(counts.values()) == 100
    assert set(counts) == set(fuzz.KINDS)
