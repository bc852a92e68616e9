"""A plug-in that is broken costs one line, and only those whom it concerns."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lrkit import LrkitError, Registry, foreign
from lrkit.foreign import ForeignError
from lrkit.hookspecs import hookimpl

ALONE = """
import json, sys, warnings
sys.path.insert(0, {folder!r})
from lrkit.cli import main
main(sys.argv[1:])
"""


def installed(folder, source, points="[lrkit]\nentry = broken_plugin\n", metadata="Name: broken-dist\nVersion: 2.3\n"):
    """A distribution in a folder of its own."""
    info = folder / "broken_dist-2.3.dist-info"
    info.mkdir()
    (folder / "broken_plugin.py").write_text(source)
    content = metadata if isinstance(metadata, bytes) else f"Metadata-Version: 2.1\n{metadata}".encode()
    (info / "METADATA").write_bytes(content)
    (info / "entry_points.txt").write_bytes(points if isinstance(points, bytes) else points.encode())
    return folder


def lrkit_in(folder, *arguments):
    """The command line in a process that has the distribution."""
    return subprocess.run(
        [sys.executable, "-c", ALONE.format(folder=str(folder)), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


METHOD = "import lrkit\n{}\n@lrkit.hookimpl\ndef lrkit_methods():\n    return {{'odd': odd}}\n"
HOSTILE = {
    "an import that interrupts": ("raise KeyboardInterrupt", "[lrkit]\nentry = broken_plugin\n"),
    "points that are no list": ("", "[lrkit]\njust a line\n"),
    "a broken __getattr__": (
        "class P:\n    def __getattr__(self, name): raise RuntimeError(name)\nobj = P()\n",
        "[lrkit]\nentry = broken_plugin:obj\n",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_commands_beside_it_work(tmp_path, case):
    """The commands that do not need it work, and say in one line what is wrong with it."""
    source, points = HOSTILE[case]
    done = lrkit_in(installed(tmp_path, source, points), "methods", "--json")
    assert done.returncode == 0, done.stderr
    assert {"lora", "adalora"} <= set(json.loads(done.stdout))
    (line,) = [line for line in done.stderr.splitlines() if "broken-dist" in line]
    assert "Traceback" not in done.stderr and line.startswith("lrkit: plug-in ")


def test_metadata_without_a_name(tmp_path):
    """A distribution whose metadata cannot be read still offers what it has."""
    source = METHOD.format("def odd(): return lrkit.methods.lora()")
    done = lrkit_in(installed(tmp_path, source, metadata=b"\xff\xfe"), "plugins", "--json")
    offered = {c["name"]: c["distribution"] for c in json.loads(done.stdout)["components"]}
    assert offered["odd"] == "an unknown distribution" and "Traceback" not in done.stderr


def test_a_foreign_list_concerns_nobody(tmp_path):
    """Entry points that cannot be read, and have no group of lrkit's, are not told."""
    done = lrkit_in(installed(tmp_path, "", points="[console_scripts]\njust a line\n"), "methods", "--json")
    assert (done.returncode, done.stderr) == (0, "")


def hostile(**_):
    """An object that raises whatever is asked of it."""

    class Hostile:
        def __getattribute__(self, name):
            raise RuntimeError(name)

    return Hostile()


class Directory:
    def __dir__(self):
        raise RuntimeError("dir")


class Equal:
    def __eq__(self, other):
        raise RuntimeError("eq")

    __hash__ = object.__hash__


class Silent(Exception):
    def __str__(self):
        raise KeyboardInterrupt


def raising(error):
    def function(**_):
        raise error

    return function


class Offers:
    """A plug-in that offers one method."""

    def __init__(self, method):
        self.method = method

    @hookimpl
    def lrkit_methods(self):
        return {"odd": self.method}


def alone(plugin):
    registry = Registry(discover=False)
    registry.add("broken-dist 2.3", "entry", plugin)
    return registry


@pytest.mark.parametrize("make", [lambda: None, hostile, Directory, Equal, int, str, lambda: type])
def test_an_odd_entry_point(make):
    """It is left out with one line, and the next plug-in is asked all the same."""
    plugin = make()
    registry = Registry(discover=False)
    with pytest.warns(UserWarning, match=r'plug-in "entry" of broken-dist 2\.3: '):
        registry.add("broken-dist 2.3", "entry", plugin)
    assert len(registry.problems) == 1 and "\n" not in str(registry.problems[0])
    import lrkit

    registry.add("good 1.0", "good", Offers(lrkit.methods.lora))
    assert registry.method("odd") == lrkit.methods.lora()


@pytest.mark.parametrize(
    "method",
    [
        raising(RuntimeError("no")),
        raising(SystemExit(7)),
        raising(KeyboardInterrupt()),
        raising(GeneratorExit()),
        raising(Silent()),
        raising(ExceptionGroup("many", [ValueError()])),
        lambda: 5,
        lambda x: x,
        hostile,
        dict,
    ],
)
def test_a_method_that_cannot_be_made(method):
    """Who asks for it is told in one line whose it is; nothing else is raised."""
    with pytest.raises(LrkitError, match=r'method "odd" of broken-dist 2\.3 ') as caught:
        alone(Offers(method)).method("odd")
    assert "\n" not in str(caught.value)


def test_a_refusal_stays_as_it_is():
    """A plug-in's own LrkitError is its answer about its input."""
    with pytest.raises(LrkitError, match=r"^odd's rank must be even$"):
        alone(Offers(raising(LrkitError("odd's rank must be even")))).method("odd")


@pytest.mark.parametrize("words", ["methods", "plugins show odd", "plugins"])
@pytest.mark.parametrize("doc", [5, property(lambda _: 1 / 0)])
def test_a_docstring_that_is_no_text(doc, words, monkeypatch, capsys):
    """A method whose description cannot be read is one without a description."""
    import lrkit
    from lrkit.cli import main

    odd = type("Odd", (), {"__doc__": doc, "__call__": lambda self: lrkit.methods.lora()})()
    registry = alone(Offers(odd))
    monkeypatch.setattr("lrkit.registry.current", lambda: registry)
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 0
    assert "odd" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["task", "executor"])
def test_loaders_that_raise(kind):
    """A task or an executor that raises is told in one line, with the distribution."""

    class Plugin:
        @hookimpl
        def lrkit_tasks(self):
            return {"odd": lambda *_: 1 / 0}

        @hookimpl
        def lrkit_executors(self):
            return {"odd": lambda *_: 1 / 0}

    with pytest.raises(LrkitError, match=rf'{kind} "odd" of broken-dist 2\.3 cannot be made: ZeroDivisionError'):
        alone(Plugin()).made(kind, "odd", None)


@pytest.mark.parametrize("word", ["nan", "inf", "Infinity", "none", "true"])
def test_a_name_for_a_value(word):
    """`plugins new` refuses names that the registry would refuse."""
    from lrkit.cli.scaffold import written

    with pytest.raises(LrkitError, match=r"word for a value|no Python name"):
        written(f"lrkit-{word}", "metric")


def test_a_ctrl_c_of_the_users_stays_one():
    """While a plug-in's code runs, the signal ends the command; an exception of that name alone does not."""
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        foreign.call(time.sleep, 5)
    with pytest.raises(ForeignError, match="KeyboardInterrupt"):
        foreign.call(raising(KeyboardInterrupt()))
