"""A hook of hatchling: README.md as the package index shows it, with links and pictures of this version's tag."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Readme(MetadataHookInterface):
    """Give the readme, whose relative links lead nowhere outside of the repository."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the readme."""
        root = Path(self.root)
        version = re.search(r'__version__ = "(.+)"', (root / "lrkit" / "version.py").read_text("utf-8"))
        assert version is not None
        repository = metadata["urls"]["Repository"]
        text = absolute((root / "README.md").read_text("utf-8"), repository, f"v{version[1]}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def absolute(text: str, repository: str, tag: str) -> str:
    """Make relative links of Markdown absolute: a page's to the page of a tag, a picture's to the picture itself."""
    places = {"": f"{repository}/blob/{tag}/", "!": f"{repository}/raw/{tag}/"}
    return re.sub(
        r"(!?)(\[[^\]]*\]\()(?![a-z]+:|#)([^)\s]+)",
        lambda found: f"{found[1]}{found[2]}{places[found[1]]}{found[3]}",
        text,
    )
