"""The study files of a package, and the profiles of a study file.

A study file may have *profiles*: tables ``[profile.NAME]`` with the settings that differ between the places where it is
run, for example the embedded model and data, and the paper's. The first one is taken if none is asked for.
"""

from collections.abc import Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from lrkit.errors import LrkitError, nearest
from lrkit.hookspecs import hookimpl


def files_in(package: str) -> dict[str, Traversable]:
    """List the study files of a package, for its `lrkit_studies`: ``studies/signs.toml`` is the study "signs".

    So is ``studies/replication/signs.toml``: a folder puts studies in order, and is no part of their names.

    Args:
        package: the package's name, as in ``__name__``.

    Raises:
        LrkitError: two files make studies of one name.
    """
    found: dict[str, Traversable] = {}
    for file in _toml_files(resources.files(package) / "studies"):
        name = file.name.removesuffix(".toml")
        if name in found:
            raise LrkitError(f'{package} has two study files of the name "{name}": {found[name]} and {file}')
        found[name] = file
    return dict(sorted(found.items()))


def _toml_files(folder: Traversable) -> Iterator[Traversable]:
    for each in folder.iterdir():
        if each.is_dir():
            yield from _toml_files(each)
        elif each.name.endswith(".toml"):
            yield each


@hookimpl
def lrkit_studies() -> Mapping[str, Traversable]:
    """Offer lrkit's own studies. One that needs a plug-in's methods names its distribution in ``requires``."""
    return files_in("lrkit")


def profiles_of(plain: Mapping[str, Any], where: str) -> Mapping[str, Mapping[str, Any]]:
    """Return the profiles of a study file, by name.

    Args:
        plain: the file's data.
        where: the name that errors call the file by.

    Raises:
        LrkitError: they are not tables.
    """
    profiles = plain.get("profile", {})
    if not isinstance(profiles, Mapping) or not all(isinstance(each, Mapping) for each in profiles.values()):
        raise LrkitError(f"{where}: profile must be tables, [profile.NAME], not {profiles!r}")
    return profiles


def with_profile(plain: Mapping[str, Any], profile: str | None, where: str) -> dict[str, Any]:
    """Put one of its profiles into a study's plain data.

    ``set``, ``run`` and ``swap`` of the profile are added to the file's; ``rows`` says which of the file's rows, by label,
    and a table with a label changes that row or adds one; anything else takes the place of the file's.

    Args:
        plain: the file's data.
        profile: a profile's name; None for the first one.
        where: the name that errors call the file by.

    Raises:
        LrkitError: no such profile (with those that there are), or one that is not a table.
    """
    data = dict(plain)
    profiles = profiles_of(data, where)
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
    """Pick rows of a file by label, and change or add those that are tables."""
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
