"""Successive halving, and a compiler without OpenMP."""

from test_native import compiler_without_openmp as test_compiler_without_openmp
from test_tuning import halving as test_halving
from test_tuning import place

__all__ = ["place", "test_compiler_without_openmp", "test_halving"]
