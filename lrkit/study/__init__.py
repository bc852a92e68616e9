"""Runs: one method trained on one task, and what came of it."""

from lrkit.study.run import Result, RunSettings, train

__all__ = ["Result", "RunSettings", "train"]
