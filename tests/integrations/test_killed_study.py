"""A study that is killed three times; the default suite kills it once."""

from test_study import killed_study_resumes as test_killed_study_resumes
from test_study import place, undisturbed

__all__ = ["place", "test_killed_study_resumes", "undisturbed"]
