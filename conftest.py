"""Settings for every test, and the examples in README.md and docs/ as tests.

The environment is set before anything imports torch or transformers. One torch thread: sums come out the
same on every machine, and two pytest-xdist workers do not fight over two cores. LRKIT_TEST_THREADS
changes it.
"""

import gc
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": os.environ.get("LRKIT_TEST_THREADS", "1"),
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.update(_SETTINGS)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis  # noqa: E402
import pytest  # noqa: E402
from sybil import Sybil  # noqa: E402
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser  # noqa: E402

# "ci" tries the same examples every time, "first" as well; HYPOTHESIS_PROFILE=explore tries new ones, and more.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.register_profile(  # tests/mutants.py asks whether a test fails, not what the least example is
    "first", parent=hypothesis.settings.get_profile("ci"), phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate)
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=500, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _threads_are_the_process_s() -> Iterator[None]:
    """Left at two, torch's threads in two pytest workers on two cores make what follows ten times as slow."""
    yield
    if (torch := sys.modules.get("torch")) and torch.get_num_threads() != int(_SETTINGS["OMP_NUM_THREADS"]):
        torch.set_num_threads(int(_SETTINGS["OMP_NUM_THREADS"]))
        pytest.fail("torch's number of threads is not what it was before the test")


@pytest.fixture(autouse=True)
def _adapters_stay_fused() -> Iterator[None]:
    """Left unfused, adapters round otherwise than in a process that a test starts: a resumed run is not the run."""
    yield
    if (module := sys.modules.get("lrkit.parameterizations.lowrank")) and not module.LowRank.fused:
        module.LowRank.fused = True
        pytest.fail("LowRank.fused is not what it was before the test")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what collecting has made out of garbage collections: each run of the Trainer begins with a whole one."""
    gc.collect()
    gc.freeze()


def pytest_report_header() -> str:
    from importlib.util import find_spec

    spec = find_spec("lrkit")
    return f"lrkit under test: {spec.origin if spec else 'not installed'}"


def _enter(namespace: dict[str, object]) -> None:
    """A document's examples share one namespace and run in an empty folder of their own."""
    folder = tempfile.TemporaryDirectory()
    namespace["__name__"] = "__main__"
    namespace["_leave"] = (Path.cwd(), folder)
    os.chdir(folder.name)


def _leave(namespace: dict[str, object]) -> None:
    where, folder = namespace.pop("_leave")  # type: ignore[misc]
    os.chdir(where)
    folder.cleanup()


_documents = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["*.md"],
    excludes=[
        "CHANGELOG.md",
        "docs/trainers.md",
    ],  # tests/integrations/test_page.py runs the latter, with TRL and others
    setup=_enter,
    teardown=_leave,
).pytest()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if "_build" in file_path.parts:
        return None
    return _documents(file_path, parent)
