"""Studies that ship, lrkit's own and plug-ins': their names, their texts, and what they need."""

import os
import warnings

import attrs

from lrkit import foreign
from lrkit.errors import LrkitError, LrkitWarning
from lrkit.foreign import ForeignError
from lrkit.reading import TOML_BYTES, parse_toml, read_text
from lrkit.study.shipped import profiles_of


@attrs.frozen(kw_only=True)
class Shipped:
    """A study that ships.

    Args:
        name: its name, for ``lrkit ablate NAME``.
        title: its title.
        profiles: names of its profiles, the default first.
        distribution: the distribution that brought it.
    """

    name: str
    title: str
    profiles: tuple[str, ...]
    distribution: str


def names() -> list[str]:
    """List the studies that ship with lrkit and with the plug-ins that are installed."""
    from lrkit.registry import current

    return current().names("study")


def text_of(name: str) -> str:
    """Read a shipped study's text. Raise LrkitError for an unknown name, or a file that cannot be read."""
    from lrkit.registry import current

    value = current().get("study", name)
    if isinstance(value, str):
        return value
    try:
        if isinstance(value, os.PathLike):
            return read_text(value, TOML_BYTES)
        text: str = foreign.call(value.read_text, "utf-8")  # of a package that is not a folder
    except (LrkitError, OSError, ForeignError) as error:
        raise LrkitError(f'study "{name}" cannot be read: {error}') from None
    return text


def catalogue() -> list[Shipped]:
    """Describe all studies that ship. Leave out one that cannot be read, with a warning."""
    from lrkit.registry import current

    found = []
    for offer in current().offers("study"):
        try:
            plain = parse_toml(text_of(offer.name), offer.name)
            profiles = tuple(profiles_of(plain, offer.name))
        except LrkitError as error:
            warnings.warn(f"{offer.distribution}: {error}", LrkitWarning, stacklevel=2)
            continue
        title = str(plain.get("title", ""))
        found.append(Shipped(name=offer.name, title=title, profiles=profiles, distribution=offer.distribution))
    return found


def shipped() -> dict[str, str]:
    """Map the names of the studies that ship to their titles."""
    return {study.name: study.title for study in catalogue()}


def about(name: str) -> str:
    """Describe a shipped study in words: title, note, profiles. Raise LrkitError if it cannot be read."""
    plain = parse_toml(text_of(name), name)
    profiles = list(profiles_of(plain, name))
    told = f"Profiles: {', '.join([f'{profiles[0]} (the default)', *profiles[1:]])}." if profiles else ""
    return "\n\n".join(filter(None, (str(plain.get("title", "")), str(plain.get("note", "")), told)))


def check_required(required: list[str], where: str) -> None:
    """Raise LrkitError if a distribution that a study names is not installed."""
    from lrkit.registry import current
    from lrkit.vetting import normalized

    there = {normalized(offer.distribution.partition(" ")[0]) for offer in current().offers()}
    missing = [name for name in required if normalized(name) not in there]
    if missing:
        raise LrkitError(f"{where} needs {', '.join(missing)}, which is not installed: pip install {' '.join(missing)}")
