"""`lrkit plugins new` and `lrkit plugins doctor`, in processes of their own, and installed with pip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

import lrkit
from lrkit.cli import main
from lrkit.cli.doctor import examine
from lrkit.cli.plugins import parts_of
from lrkit.cli.scaffold import KINDS, REGISTERED, written
from lrkit.registry import PluginWarning, Registry

NAMES = {kind: f"lrkit-acme-{kind}" for kind in KINDS}


def python(*arguments: str, cwd: Path, sites: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    before = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*before, *map(str, sites)])}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=180, cwd=cwd, env=environment
    )


def command(*arguments: str, cwd: Path, sites: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    return python("-c", "from lrkit.cli import main; main()", *arguments, cwd=cwd, sites=sites)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one new package of each kind."""
    folder, here = tmp_path_factory.mktemp("packages"), Path.cwd()
    os.chdir(folder)
    try:
        for kind, name in NAMES.items():
            with pytest.raises(SystemExit) as left:
                main(["plugins", "new", name, "--kind", kind])
            assert left.value.code == 0
    finally:
        os.chdir(here)
    return folder


def test_four_files_are_written(packages: Path) -> None:
    """None of which says "example" any more."""
    for kind, name in NAMES.items():
        module = name.replace("-", "_")
        files = sorted(str(p.relative_to(packages / name)) for p in (packages / name).rglob("*") if p.is_file())
        assert files == sorted(["README.md", f"{module}.py", "pyproject.toml", f"tests/test_{module}.py"])
        for path in files:
            text = (packages / name / path).read_text()
            assert "example" not in text.lower(), f"{kind}: {path}"


def new_packages_pass(packages: Path) -> None:
    """In one process, for time's sake (tests/integrations/test_new_packages.py); one of them below as its README has it."""
    folders = [packages / name for name in NAMES.values()]
    done = python(
        *("-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(packages)),
        *("--import-mode=importlib", *(str(folder / "tests") for folder in folders)),
        cwd=packages,
        sites=tuple(folders),
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_passes_alone(packages: Path) -> None:
    """As its README has it."""
    done = python("-m", "pytest", "-p", "no:cacheprovider", cwd=packages / NAMES["scheduler"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "17 passed" in done.stdout


@pytest.fixture(scope="module")
def site(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of them, installed with pip, without a network."""
    folder = tmp_path_factory.mktemp("site")
    pip = ["-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-index", "--no-deps"]
    projects = [f"./{NAMES['metric']}", f"./{NAMES['parameterization']}"]
    done = python(*pip, "--no-build-isolation", "--target", str(folder), *projects, cwd=packages)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def distribution(folder: Path, name: str, source: str, version: str = "1.0") -> Path:
    """What pip leaves behind of a distribution with one module and one entry point."""
    module = name.replace("-", "_")
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[lrkit]\n{name} = {module}\n")
    (folder / f"{module}.py").write_text(source)
    return folder


DRIFTING = '''
import attrs, lrkit, torch

@attrs.frozen(kw_only=True)
class Drifting(lrkit.Metric):
    """The size of a weight, and some noise. Source: this test. With measure."""

    def score(self, weight, state):
        return weight.abs() + torch.rand_like(weight)

@lrkit.hookimpl
def lrkit_metrics():
    return {"drifting": Drifting}
'''


def test_installed_ones_are_sound(site: Path, tmp_path: Path) -> None:
    """pip installs them, and the doctor finds nothing wrong."""
    for kind in ("metric", "parameterization"):
        done = command("plugins", "doctor", NAMES[kind], "--json", cwd=tmp_path, sites=(site,))
        assert done.returncode == 0
        (report,) = json.loads(done.stdout)["plugins"]
        assert (report["distribution"], report["version"], report["sound"]) == (NAMES[kind], "0.1.0", True)
        assert (report["plugin"], report["module"]) == (f"acme-{kind}", f"lrkit_acme_{kind}")
        (component,) = report["components"]
        assert (component["kind"], component["name"], component["kept"]) == (kind, f"acme-{kind}", True)


def test_broken_ones_are_named(site: Path, tmp_path: Path) -> None:
    """One that cannot be imported and one that breaks its contract, each with the reason."""
    distribution(tmp_path / "a", "bad-import", "raise RuntimeError('no licence')")
    distribution(tmp_path / "b", "bad-metric", DRIFTING)
    sites = (site, tmp_path / "a", tmp_path / "b")
    (tmp_path / "cwd").mkdir()
    lines = []
    for name in ("bad-import", "bad-metric"):
        done = command("plugins", "doctor", name, cwd=tmp_path / "cwd", sites=sites)
        assert done.returncode == 2
        assert "Traceback" not in done.stdout + done.stderr
        lines += done.stdout.splitlines()
    assert "bad-import 1.0: cannot be imported: RuntimeError: no licence" in lines
    (reason,) = [line for line in lines if line.startswith("bad-metric 1.0, metric drifting: score changes nothing: ")]
    assert reason.endswith("score says something else when it is asked again")
    (row,) = [line for line in lines if "bad-import" in line and "cannot be used" in line]
    assert row.split()[:3] == ["bad-import", "1.0", "bad-import"]


# ---- in this process -------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Sound(lrkit.metrics.Magnitude):
    """The size of λ; with measure. Source: arXiv 2303.10512."""


@attrs.frozen(kw_only=True)
class AlsoSound(lrkit.metrics.Magnitude):
    """The size of λ; with measure. Source: arXiv 2303.10512."""


@attrs.frozen(kw_only=True)
class Quits(lrkit.Metric):
    """Ends the process; with measure. Source: this test."""

    def score(self, weight, state):
        raise SystemExit(3)


def plugin(**offers: object) -> types.ModuleType:
    made = types.ModuleType("plugin")
    for name, offered in offers.items():
        setattr(made, name, lrkit.hookimpl(lambda offered=offered: offered))
    return made


def test_lrkit_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """lrkit's own components are looked at only if it is named."""
    assert examine(registry=Registry(discover=False)) == []
    monkeypatch.setattr("lrkit.testing.check", lambda *_, **__: [])
    (report,) = examine("lrkit", Registry(discover=False))
    assert (report.distribution, report.version, report.sound) == ("lrkit", lrkit.__version__, True)
    notes = {c.kind for c in report.components if c.kept is None}
    assert notes == {"layer", "task", "executor", "study"}


def test_contested_names_are_problems() -> None:
    """A name that two claim is a problem of both, and neither is checked."""
    with pytest.warns(PluginWarning, match="already offered"):
        registry = Registry(
            [
                ("one 1.0", "a", plugin(lrkit_metrics={"same": Sound})),
                ("two 2.0", "b", plugin(lrkit_metrics={"same": AlsoSound})),
            ],
            discover=False,
        )
    one, two = examine(registry=registry)
    assert one.problems == ('metric "same" is offered by two 2.0 too',)
    assert two.problems == ('metric "same" is already offered by one 1.0',)
    assert not one.sound and not two.sound
    assert [c.kept for r in (one, two) for c in r.components] == [None, None]


def test_built_in_names_are_taken() -> None:
    """Who claims one has a problem, and offers nothing."""
    with pytest.warns(PluginWarning, match="already offered"):
        registry = Registry([("one 1.0", "a", plugin(lrkit_metrics={"magnitude": Sound}))], discover=False)
    (report,) = examine(registry=registry)
    assert report.problems == (f'metric "magnitude" is already offered by lrkit {lrkit.__version__}',)
    assert report.components == () and not report.sound


def test_quitting_is_a_finding() -> None:
    """A component that ends the process does not end the doctor."""
    registry = Registry([("one 1.0", "a", plugin(lrkit_metrics={"quits": Quits}))], discover=False)
    (report,) = examine(registry=registry)
    (component,) = report.components
    assert component.kept is False
    assert "SystemExit: 3" in component.findings[0].message


def test_unknown_plugins_are_refused() -> None:
    """With the nearest name; names are compared as pip compares them."""
    registry = Registry([("acme-one 1.0", "a", plugin(lrkit_metrics={"mine": Sound}))], discover=False)
    with pytest.raises(lrkit.LrkitError, match=r'no plug-in "acme-on" is installed \(did you mean "acme-one"\?\)'):
        examine("acme-on", registry)
    assert [r.distribution for r in examine("Acme_One", registry)] == ["acme-one"]


BAD: dict[str, tuple[list[str], str]] = {
    "kind": (["x", "--kind", "metrics"], 'no template for --kind "metrics" (did you mean "metric"?)'),
    "slash": (["../x", "--kind", "metric"], '"../x" is no name for a distribution'),
    "blank": (["my metric", "--kind", "metric"], '"my metric" is no name for a distribution'),
    "letters": (["métrique", "--kind", "metric"], '"métrique" is no name for a distribution'),
    "digit": (["4bit", "--kind", "metric"], '"4bit" makes no Python name: the module would be called 4bit'),
    "digit behind lrkit": (["lrkit-4bit", "--kind", "metric"], "the function would be called 4bit"),
    "keyword": (["lrkit-lambda", "--kind", "method"], "the function would be called lambda"),
    "module": (["json", "--kind", "metric"], 'a module "json" can be imported already'),
    "lrkit": (["lrkit", "--kind", "metric"], 'a module "lrkit" can be imported already'),
    "built-in": (
        ["lrkit-cubic", "--kind", "scheduler"],
        f'scheduler "cubic" is already offered by lrkit {lrkit.__version__}',
    ),
    "no kind": (["x"], "Missing option '--kind'"),
}


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["plugins", *arguments])
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return run


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD)
def test_bad_names_are_refused(call, tmp_path: Path, arguments: list[str], words: str) -> None:
    """With one line, and nothing is written."""
    code, out, err = call("new", *arguments)
    assert (code, out) == (2, "")
    assert words in err and err.startswith("lrkit: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(call, tmp_path: Path) -> None:
    """A folder that holds anything is refused; a new one may be deep."""
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    code, _, err = call("new", "lrkit-acme", "--kind", "metric", "--out", "there")
    assert (code, err) == (2, "lrkit: there exists and is not empty: nothing is overwritten, choose another --out\n")
    assert [p.name for p in tmp_path.rglob("*")] == ["there", "mine.txt"]
    code, out, _ = call("new", "Lrkit_Acme.Two", "--kind", "metric", "--out", "deep/er")
    assert code == 0 and "deep/er/lrkit_acme_two.py" in out
    assert 'name = "lrkit-acme-two"' in (tmp_path / "deep/er/pyproject.toml").read_text()


def test_every_kind_has_a_template() -> None:
    """Whatever the name, the module compiles and registers it."""
    for kind in KINDS:
        texts = written("some-odd-name", kind)
        assert compile(texts["some_odd_name.py"], "module", "exec")
        assert '"some-odd-name"' in texts["some_odd_name.py"]
    assert set(REGISTERED) == set(KINDS) and set(REGISTERED.values()) < set(lrkit.registry.KINDS)


def test_further_policies_are_shown():
    """Each policy of `also` with its number."""
    prune = lrkit.Policy(
        metric=lrkit.metrics.Magnitude(), scheduler=lrkit.schedulers.Linear(), action=lrkit.actions.Prune()
    )
    with lrkit.current().lend("method", "both", lambda: attrs.evolve(lrkit.methods.aflora(), also=(prune,))):
        parts = parts_of("both")
    assert parts["action"] == "freeze"
    assert {kind: part for kind, part in parts.items() if kind.startswith("also")} == {
        "also.0.metric": "magnitude",
        "also.0.scheduler": "linear",
        "also.0.action": "prune",
    }
