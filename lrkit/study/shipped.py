"""Studies that ship, lrkit's own and plug-ins', and the profiles of a study file.

A study file may have *profiles*: tables ``[profile.NAME]`` with what differs between the places where it is run, such as the
embedded model and data, and the paper's. The first one is taken where none is asked for.
"""

import os
import warnings
from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

import attrs

from lrkit import foreign
from lrkit.errors import LrkitError, LrkitWarning, nearest
from lrkit.foreign import ForeignError
from lrkit.hookspecs import hookimpl
from lrkit.reading import TOML_BYTES, parse_toml, read_text


@attrs.frozen(kw_only=True)
class Shipped:
    """A study that ships.

    Args:
        name: its name, for ``lrkit ablate NAME``.
        title: its title.
        profiles: names of its profiles, the default first.
        distribution: who brought it.
    """

    name: str
    title: str
    profiles: tuple[str, ...]
    distribution: str


def files_in(package: str) -> dict[str, Traversable]:
    """The study files of a package, for its `lrkit_studies`: ``studies/signs.toml`` is the study "signs".

    Args:
        package: the package's name, as in ``__name__``.
    """
    files = sorted((resources.files(package) / "studies").iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(".toml"): file for file in files if file.name.endswith(".toml")}


@hookimpl
def lrkit_studies() -> Mapping[str, Traversable]:
    """Offer the studies that need lrkit's own methods alone."""
    return files_in("lrkit")


def names() -> list[str]:
    """Names of the studies that ship with lrkit and with the plug-ins that are installed."""
    from lrkit.registry import current

    return current().names("study")


def text_of(name: str) -> str:
    """A shipped study's text. Raises LrkitError for an unknown name, or a file that cannot be read."""
    from lrkit.registry import current

    value = current().get("study", name)
    if isinstance(value, str):
        return value
    try:
        if isinstance(value, os.PathLike):
            return read_text(value, TOML_BYTES)
        text: str = foreign.call(value.read_text, "utf-8")  # of a package that is no folder
    except (LrkitError, OSError, ForeignError) as error:
        raise LrkitError(f'study "{name}" cannot be read: {error}') from None
    return text


def catalogue() -> list[Shipped]:
    """All studies that ship. One that cannot be read is left out with a warning."""
    from lrkit.registry import current

    found = []
    for offer in current().offers("study"):
        try:
            plain = parse_toml(text_of(offer.name), offer.name)
            profiles = tuple(_profiles(plain, offer.name))
        except LrkitError as error:
            warnings.warn(f"{offer.distribution}: {error}", LrkitWarning, stacklevel=2)
            continue
        title = str(plain.get("title", ""))
        found.append(Shipped(name=offer.name, title=title, profiles=profiles, distribution=offer.distribution))
    return found


def about(name: str) -> str:
    """A shipped study in words: title, note, profiles. Raises LrkitError where it cannot be read."""
    plain = parse_toml(text_of(name), name)
    profiles = list(_profiles(plain, name))
    told = f"Profiles: {', '.join([f'{profiles[0]} (the default)', *profiles[1:]])}." if profiles else ""
    return "\n\n".join(filter(None, (str(plain.get("title", "")), str(plain.get("note", "")), told)))


def _profiles(plain: Mapping[str, Any], where: str) -> Mapping[str, Mapping[str, Any]]:
    profiles = plain.get("profile", {})
    if not isinstance(profiles, Mapping) or not all(isinstance(each, Mapping) for each in profiles.values()):
        raise LrkitError(f"{where}: profile must be tables, [profile.NAME], not {profiles!r}")
    return profiles


def with_profile(plain: Mapping[str, Any], profile: str | None, where: str) -> dict[str, Any]:
    """A study's plain data with one of its profiles put in.

    ``set``, ``run`` and ``swap`` of the profile are added to the file's; ``rows`` says which of the file's rows, by label,
    and a table with a label changes that row or adds one; anything else takes the place of the file's.

    Args:
        plain: the file's data.
        profile: a profile's name; None for the first one.
        where: what errors call the file.

    Raises:
        LrkitError: no such profile (with those that there are), or one that is no table.
    """
    data = dict(plain)
    profiles = _profiles(data, where)
    data.pop("profile", None)
    if profile is None and not profiles:
        return data
    name = next(iter(profiles)) if profile is None else profile
    if name not in profiles:
        known = f"there are {', '.join(profiles)}" if profiles else "it has none"
        raise LrkitError(f'{where} has no profile "{name}"{nearest(name, profiles)}; {known}')
    own = dict(profiles[name])
    for key in ("base", "profile"):
        if key in own:
            raise LrkitError(f"{where}: profile {name}: {key} is the file's own, and cannot stand in a profile")
    if {"task", "tasks"} & set(own):
        data = {key: value for key, value in data.items() if key not in ("task", "tasks")}
    for key, value in own.items():
        there = data.get(key)
        if key in ("set", "run", "swap") and isinstance(there, Mapping) and isinstance(value, Mapping):
            data[key] = {**there, **value}
        elif key == "rows" and isinstance(value, list):
            data[key] = _rows(there if isinstance(there, list) else [], value, f"{where}: profile {name}")
        else:
            data[key] = value
    return data


def _rows(there: list[Any], picked: list[Any], where: str) -> list[Any]:
    labelled = {row["label"]: row for row in there if isinstance(row, Mapping) and isinstance(row.get("label"), str)}
    rows = []
    for pick in picked:
        if isinstance(pick, str) and pick not in labelled:
            raise LrkitError(f'{where}: the file has no row "{pick}"{nearest(pick, labelled)}')
        label = pick.get("label") if isinstance(pick, Mapping) else pick
        row = labelled.get(label) if isinstance(label, str) else None
        if row is None or isinstance(pick, str):
            rows.append(pick if row is None else row)
            continue
        merged = {
            key: {**row[key], **value} if isinstance(value, Mapping) and isinstance(row.get(key), Mapping) else value
            for key, value in pick.items()
        }
        rows.append({**row, **merged})
    return rows


def check_required(required: list[str], where: str) -> None:
    """Raise LrkitError where a distribution that a study names is not installed."""
    from lrkit.registry import current
    from lrkit.vetting import normalized

    there = {normalized(offer.distribution.partition(" ")[0]) for offer in current().offers()}
    missing = [name for name in required if normalized(name) not in there]
    if missing:
        raise LrkitError(f"{where} needs {', '.join(missing)}, which is not installed: pip install {' '.join(missing)}")
