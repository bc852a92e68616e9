"""Movie-review sentences with human ratings: the task that needs no data hub.

The sentences are Rotten Tomatoes review snippets, each rated by 20 people from -4 to 4 (Hutto and Gilbert,
"VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014). They are
part of the source distribution of `vaderSentiment` 3.3.2 (MIT licence), which pip fetches by name; the wheel
does not carry them.
"""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
import tempfile
from pathlib import Path

from lrkit.errors import LrkitError
from lrkit.models.fetching import cache_folder, no_pip, pip_download
from lrkit.moves import replacing
from lrkit.tasks.classification import Classification

NAME, VERSION = "vaderSentiment", "3.3.2"
SDIST = f"{NAME}-{VERSION}.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = f"{NAME}-{VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

NEUTRAL = 0.5  # on the scale -4 ... 4: sentences rated nearer to 0 than this say neither
VALIDATION_SHARE = 0.15


def load_movies() -> Classification:
    """Load the task `movies`: is this sentence from a review good (1) or bad (0)?

    Sentences rated within `NEUTRAL` of 0 and repeated texts are dropped. The split is by a hash of the text,
    so it is the same on every machine and does not depend on the order of the file.

    Raises:
        LrkitError: if the data is not in the cache and cannot be had.
    """
    import datasets

    splits = {
        name: datasets.Dataset.from_dict(
            {"sentence": [text for text, _ in rated], "label": [int(rating > 0) for _, rating in rated]}
        )
        for name, rated in rated_splits().items()
    }
    return Classification(name="movies", **splits, fields=("sentence",), labels=("negative", "positive"))


def rated_splits() -> dict[str, list[tuple[str, float]]]:
    """List the rated sentences of ``train`` and ``validation``. Raises LrkitError if the data cannot be had."""
    splits: dict[str, list[tuple[str, float]]] = {"train": [], "validation": []}
    for text, rating in ratings(sdist()):
        splits["validation" if held_out(text) else "train"].append((text, rating))
    return splits


def held_out(text: str) -> bool:
    """Tell if a text belongs to validation, by the first 8 bytes of its SHA-256 as a share of all values."""
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return share < VALIDATION_SHARE


def ratings(archive: bytes) -> list[tuple[str, float]]:
    """List the clearly rated sentences in the source distribution `archive`, each text once, with its mean rating.

    Read in memory: nothing is unpacked to disk.
    """
    text = _member(_member(archive, INNER), RATINGS).decode("utf-8")
    found: dict[str, float] = {}
    for line in text.splitlines():
        _number, rating, sentence = line.split("\t")
        sentence = " ".join(sentence.split())
        if abs(float(rating)) >= NEUTRAL:
            found.setdefault(sentence, float(rating))
    return list(found.items())


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        file = tar.extractfile(name)
        if file is None:
            raise LrkitError(f"{name} is not a file in the archive")
        return file.read()


def sdist() -> bytes:
    """Read the source distribution out of the cache, after fetching it if need be.

    A file in the cache that is not the right one (cut short, for example) is fetched again.

    Raises:
        LrkitError: saying what could not be had, and what to do.
    """
    path = cache_folder() / SDIST
    try:
        cached = path.read_bytes()
    except FileNotFoundError:
        cached = None
    except OSError as error:
        why = error.strerror or error
        raise LrkitError(f"cannot read {path}: {why}; set LRKIT_CACHE to another folder") from error
    if cached is not None:
        if _is_right(cached):
            return cached
        sys.stderr.write(f"lrkit: {path} is damaged (wrong SHA-256); fetching it again\n")
    return _fetch(path)


def _is_right(archive: bytes) -> bool:
    return hashlib.sha256(archive).hexdigest() == SHA256


def _fetch(path: Path) -> bytes:
    by_hand = f"or put {SDIST} from https://pypi.org/project/{NAME}/{VERSION}/#files at {path}"
    if why := no_pip():
        raise LrkitError(f"cannot fetch the movie sentences: {why}, {by_hand}")
    sys.stderr.write(f"lrkit: fetching {SDIST} (2.4 MB, the movie sentences) with pip into {path.parent}\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as scratch:
            archive = _download(Path(scratch), by_hand)
        with replacing(path) as draft:  # two processes that fetch at once put the same bytes in its place
            draft.write_bytes(archive)
    except OSError as error:
        raise LrkitError(
            f"cannot write to {path.parent}: {error.strerror or error}; "
            "set LRKIT_CACHE to a folder that can be written to"
        ) from error
    return archive


def _download(folder: Path, by_hand: str) -> bytes:
    """Have pip download the source distribution into `folder`, and return its checked bytes.

    The hash is given to pip as well, which checks it before it runs the package's setup script for its
    metadata. That needs setuptools: pip fetches it for an isolated build, and if it cannot, the one installed
    beside lrkit may do.
    """
    source = f"--no-binary={NAME}"
    why = pip_download(f"{NAME}=={VERSION}", SHA256, folder, ([source], [source, "--no-build-isolation"]))
    try:
        archive = (folder / SDIST).read_bytes()
    except FileNotFoundError:
        raise LrkitError(
            f"pip could not download {SDIST} (the movie sentences): {why or 'it says nothing about why'}; "
            f"check the network or pip's index, {by_hand}, or use --data FOLDER"
        ) from None
    if not _is_right(archive):
        raise LrkitError(f"{SDIST} from pip's index has the wrong SHA-256 (not {SHA256}): check pip's index, {by_hand}")
    return archive
