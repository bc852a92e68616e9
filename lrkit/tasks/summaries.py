"""Summaries of news from the Hugging Face hub: XSum, and CNN/DailyMail."""

from __future__ import annotations

from lrkit.errors import LrkitError
from lrkit.tasks.hub import load_hub
from lrkit.tasks.text_to_text import TextToText


def load_xsum(rest: str | None) -> TextToText:
    """Load XSum: BBC articles and their one-sentence summaries. Source: arXiv 1808.08745."""
    _refuse_parts("xsum", rest)
    splits = load_hub("xsum", "EdinburghNLP/xsum")
    return TextToText(
        name="xsum",
        train=splits["train"],
        validation=splits["validation"],
        source="document",
        target="summary",
        max_target_length=64,
    )


def load_cnn_dailymail(rest: str | None) -> TextToText:
    """Load CNN/DailyMail, version 3.0.0: articles and their highlights, three or four. Source: arXiv 1704.04368.

    The trivial summary is the article's first three sentences, as in the literature.
    """
    _refuse_parts("cnn_dailymail", rest)
    splits = load_hub("cnn_dailymail", "abisee/cnn_dailymail", "3.0.0")
    return TextToText(
        name="cnn_dailymail",
        train=splits["train"],
        validation=splits["validation"],
        source="article",
        target="highlights",
        lead=3,
    )


def _refuse_parts(name: str, rest: str | None) -> None:
    if rest is not None:
        raise LrkitError(f'task "{name}" has no parts: write "{name}", not "{name}/{rest}"')
