"""A second Ctrl-C ends a run at once."""

from faults.test_interrupts import a_second_one_ends_it_at_once as test_a_second_one_ends_it_at_once
from faults.test_interrupts import place

__all__ = ["place", "test_a_second_one_ends_it_at_once"]
