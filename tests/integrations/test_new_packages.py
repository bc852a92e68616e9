"""A new package of each kind passes its own tests; the default suite runs one of them, and `doctor` on two."""

from test_scaffold import new_packages_pass as test_new_packages_pass
from test_scaffold import packages

__all__ = ["packages", "test_new_packages_pass"]
