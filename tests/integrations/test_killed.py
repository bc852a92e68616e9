"""Runs of each kind of task that are stopped or killed go on bitwise; the default suite does it for packed rows and tags."""

import pytest
import test_causal_runs
import test_killed_kinds
import test_resume
from test_causal_runs import place
from test_question_answering import killed_run_resumes as test_answers
from test_question_answering import model
from test_text_to_text import folder, whole
from test_text_to_text import killed_run_resumes as test_written_texts


@pytest.mark.parametrize("kind", ["plain", "written", "text"])
def test_causal_models(place, kind, tmp_path):
    """Rows that are not packed, texts that are written, and plain text."""
    test_causal_runs.test_stopped_run_goes_on(place, kind, tmp_path)


def test_words(tmp_path):
    """Labels as words."""
    test_killed_kinds.test_killed_run_is_same("words", tmp_path)


def test_adalora(tmp_path):
    """A process that is killed while it saves goes on from its last whole state."""
    test_resume.test_killed_process_resumes("adalora", tmp_path)


__all__ = ["folder", "model", "place", "test_answers", "test_written_texts", "whole"]
