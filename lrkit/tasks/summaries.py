"""Summaries of news from the Hugging Face hub: XSum, and CNN/DailyMail."""

from __future__ import annotations

from lrkit.tasks.hub import load_hub
from lrkit.tasks.named import OPTIONS, no_parts
from lrkit.tasks.text_to_text import TextToText


def load_xsum(rest: str | None) -> TextToText:
    """Load XSum: BBC articles and their one-sentence summaries. Source: arXiv 1808.08745."""
    return _load("xsum", rest, ("EdinburghNLP/xsum",), "document", "summary")


def load_cnn_dailymail(rest: str | None) -> TextToText:
    """Load CNN/DailyMail, version 3.0.0: articles and their highlights, three or four. Source: arXiv 1704.04368.

    The trivial summary is the article's first three sentences, as in the literature.
    """
    return _load("cnn_dailymail", rest, ("abisee/cnn_dailymail", "3.0.0"), "article", "highlights")


def _load(name: str, rest: str | None, hub: tuple[str, ...], source: str, target: str) -> TextToText:
    no_parts(name, rest)
    splits = load_hub(name, *hub)
    rows = {split: splits[split] for split in ("train", "validation")}
    return TextToText(name=name, **rows, source=source, target=target, **OPTIONS[name])
