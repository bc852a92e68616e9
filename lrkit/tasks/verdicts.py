"""Verdicts in words on movie-review sentences: prompts and completions for a causal language model, without a data hub.

They are made from the ratings that `lrkit.tasks.movies` fetches, each of which is the mean of 20 people's.
"""

from __future__ import annotations

from lrkit.tasks.completion import Completion
from lrkit.tasks.movies import rated_splits

VERDICTS = ((-2.0, "terrible (1 of 5 stars)"), (0.0, "weak (2 of 5 stars)"), (2.0, "good (4 of 5 stars)"))
BEST = "excellent (5 of 5 stars)"


def prompt_of(sentence: str) -> str:
    """Return what a model is asked of a sentence."""
    return f"Review of a film: {sentence}\nVerdict:"


def verdict_of(rating: float) -> str:
    """Put a rating, from -4 to 4, into words: the mean of many people's, none of which is 3 of 5 stars."""
    return next((words for below, words in VERDICTS if rating < below), BEST)


def load_verdicts() -> Completion:
    """Load the task `verdicts`: how good is the film, by a sentence of its review?

    The split is that of the task `movies`.

    Raises:
        LrkitError: if the data is not in the cache and cannot be had.
    """
    import datasets

    splits = {
        name: datasets.Dataset.from_dict(
            {
                "prompt": [prompt_of(sentence) for sentence, _ in rated],
                "completion": [f" {verdict_of(rating)}" for _, rating in rated],
            }
        )
        for name, rated in rated_splits().items()
    }
    return Completion(name="verdicts", **splits, max_new_tokens=12)
