"""Plug-ins: a package to begin with, and a look at those that are installed.

``lrkit plugins new`` writes what is in ``templates/`` under other names. ``lrkit plugins doctor`` runs the contract of
`lrkit.testing` over what is registered. ``lrkit plugins show`` says what can be set.
"""

import importlib.util
import inspect
import keyword
import re
import time
import warnings
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer

from lrkit import foreign
from lrkit.errors import LrkitError, LrkitWarning, nearest

if TYPE_CHECKING:
    from lrkit.registry import Offer, Registry
    from lrkit.testing import Finding

KINDS = ("metric", "scheduler", "action", "parameterization", "method", "task")
"""The kinds that there is a template for."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", re.IGNORECASE)
_USE = {
    "metric": "lrkit run adalora --swap metric={}",
    "scheduler": "lrkit run adalora --swap scheduler={}",
    "action": "lrkit run adalora --swap action={}",
    "parameterization": "lrkit run adalora --swap parameterization={}",
    "method": "lrkit run {}",
    "task": "lrkit run adalora --task {}",
}


# ---- new -------------------------------------------------------------------------------------------------------------


def written(name: str, kind: str) -> dict[str, str]:
    """The files of a new plug-in package: path in the package to text.

    Args:
        name: the distribution's name. What it offers has the same name, without ``lrkit-`` in front.
        kind: one of `KINDS`.

    Raises:
        LrkitError: a name that is none, that is taken, or that makes no Python names; or an unknown kind.
    """
    if kind not in KINDS:
        raise LrkitError(
            f'there is no template for --kind "{kind}"{nearest(kind, KINDS)}; there are {", ".join(KINDS)}'
        )
    if not _NAME.fullmatch(name):
        raise LrkitError(
            f'"{name}" is no name for a distribution: letters, digits, ".", "_" and "-", with a letter or digit at both ends'
        )
    distribution = re.sub(r"[-_.]+", "-", name).lower()
    module = distribution.replace("-", "_")
    offered = distribution.removeprefix("lrkit-")
    function = offered.replace("-", "_")
    cls = "".join(word.capitalize() for word in offered.split("-"))
    for what, word in (("module", module), ("function", function), ("class", cls)):
        if not word.isidentifier() or keyword.iskeyword(word):
            raise LrkitError(f'"{name}" makes no Python name: the {what} would be called {word}')
    if importlib.util.find_spec(module) is not None:
        raise LrkitError(f'a module "{module}" can be imported already, and would be in the way: choose another name')
    from lrkit.registry import current, is_name

    if not is_name(offered):
        raise LrkitError(f'"{name}" would offer "{offered}", which is a word for a value: choose another name')
    for offer in current().offers():
        if (offer.kind, offer.name) == (kind, offered):
            raise LrkitError(f'{kind} "{offered}" is already offered by {offer.distribution}: choose another name')
    words = {
        "example-distribution": distribution,
        "example_use": f"```sh\n{_USE[kind].format(offered)}\n```",
        "example_kind": kind,
        # In a method's module, its function; everywhere else the module.
        "def example_name": f"def {function}",
        ": example_name}": f": {function}}}",
        "import example_name\n\n\nclass": f"import {function}\n\n\nclass",
        "component = example_name": f"component = {function}",
        "evolve(example_name(": f"evolve({function}(",
        "example_name": module,
        "example-name": offered,
        "ExampleName": cls,
    }

    def text(template: str) -> str:
        read = (files("lrkit") / "templates" / template).read_text(encoding="utf-8")
        for old, new in words.items():
            read = read.replace(old, new)
        return read

    return {
        "pyproject.toml": text("pyproject.txt"),
        "README.md": text("readme.txt"),
        f"{module}.py": text(f"{kind}.py"),
        f"tests/test_{module}.py": text(f"{kind}_test.txt") + text("offered_test.txt"),
    }


def new(
    name: Annotated[str, typer.Argument(help="The package's name, such as lrkit-movement.")],
    kind: Annotated[str, typer.Option(help=f"What it offers: {', '.join(KINDS)}.")],
    out: Annotated[Path | None, typer.Option(help="A new folder for it; ./NAME where none is given.")] = None,
) -> None:
    """Write a plug-in package that works: pyproject.toml, module, tests and README."""
    from lrkit import cli

    texts = written(name, kind)
    folder = cli._new_folder(Path(name) if out is None else out, "")
    for path, text in texts.items():
        cli._make((folder / path).parent)
        (folder / path).write_text(text, encoding="utf-8")
    typer.echo(f"written: {'  '.join(str(folder / path) for path in texts)}")
    typer.echo(f"next: python -m pytest {folder}; pip install -e {folder}; lrkit plugins doctor")


# ---- doctor ----------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Component:
    """What a plug-in offers, and whether it keeps its contract.

    Args:
        kind: its kind.
        name: its registered name.
        kept: None where it was not checked; `note` then says why.
        findings: the clauses that it breaks.
        note: why it was not checked.
        seconds: how long the check took; None where it was not checked.
    """

    kind: str
    name: str
    kept: bool | None
    findings: "tuple[Finding, ...]" = ()
    note: str = ""
    seconds: float | None = None

    @property
    def state(self) -> str:
        """Whether it keeps its contract, in words."""
        broken = f"{len(self.findings)} clause{'s' if len(self.findings) > 1 else ''} broken"
        return {True: "kept", False: broken, None: f"not checked: {self.note}"}[self.kept]


@attrs.frozen(kw_only=True)
class Report:
    """One plug-in.

    Args:
        distribution: the distribution that brings it.
        version: the distribution's version.
        plugin: its entry point's name.
        module: what the entry point names; empty for one that was added in this process.
        components: what it offers.
        problems: why it, or a part of it, cannot be used.
    """

    distribution: str
    version: str
    plugin: str
    module: str
    components: tuple[Component, ...]
    problems: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong with it."""
        return not self.problems and all(component.kept is not False for component in self.components)


def examine(
    name: str | None = None,
    registry: "Registry | None" = None,
    told: Callable[[Component, int, int], None] | None = None,
) -> list[Report]:
    """Every installed plug-in, with its contract checked.

    Args:
        name: one distribution or entry point; None for all but lrkit's own.
        registry: what is looked at; None for this process's.
        told: called after each component, with how many have been looked at and how many there are.

    Raises:
        LrkitError: nothing of that name is installed.
    """
    from lrkit.registry import current, installed

    registry = registry or current()
    modules = {(distribution, point.name): point.value for distribution, point in installed()[0]}
    brought = [(offer.distribution, offer.plugin) for offer in registry.offers()]
    brought += [(problem.distribution, problem.plugin) for problem in registry.problems]
    known = list(dict.fromkeys(brought))
    ours = known[0]  # the built-ins are registered first
    chosen = [key for key in known if (key != ours if name is None else _plain(name) in _names(*key))]
    if name is not None and not chosen:
        names = sorted({word for key in known for word in _names(*key)})
        raise LrkitError(f'no plug-in "{name}" is installed{nearest(name, names)}; there are {", ".join(names)}')
    reports: list[Report] = []
    total = sum((offer.distribution, offer.plugin) in chosen for offer in registry.offers())
    seen = 0
    for distribution, plugin in chosen:
        whose, _, version = distribution.rpartition(" ")
        problems = [p.message for p in registry.problems if (p.distribution, p.plugin) == (distribution, plugin)]
        components = []
        for offer in registry.offers():
            if (offer.distribution, offer.plugin) == (distribution, plugin):
                others = [o for o in registry.offers(offer.kind) if o.name == offer.name and o is not offer]
                collision = f'{offer.kind} "{offer.name}" is offered by {", ".join(o.distribution for o in others)} too'
                if others and not any(f'{offer.kind} "{offer.name}"' in problem for problem in problems):
                    problems.append(collision)
                components.append(_component(offer, collision if others else ""))
                seen += 1
                if told is not None:
                    told(components[-1], seen, total)
        reports.append(
            Report(
                distribution=whose or distribution,
                version=version if whose else "",
                plugin=plugin,
                module=modules.get((distribution, plugin), ""),
                components=tuple(components),
                problems=tuple(problems),
            )
        )
    return reports


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _names(distribution: str, plugin: str) -> set[str]:
    return {_plain(distribution.rpartition(" ")[0] or distribution), _plain(plugin)}


def _component(offer: "Offer", collision: str) -> Component:
    from lrkit.testing import CONTRACTS, Finding, check

    if collision:
        return Component(kind=offer.kind, name=offer.name, kept=None, note=collision)
    if offer.kind == "task":
        return Component(kind=offer.kind, name=offer.name, kept=None, note="loading it may need the network")
    if offer.kind == "study":
        note = f"lrkit ablate {offer.name} --dry-run checks it"
        return Component(kind=offer.kind, name=offer.name, kept=None, note=note)
    if offer.kind not in CONTRACTS:
        return Component(kind=offer.kind, name=offer.name, kept=None, note="there is no contract for it")
    begin = time.monotonic()
    try:
        findings = tuple(check(offer.value, kind=offer.kind))
    except (Exception, SystemExit) as error:
        findings = (Finding("can be checked", f"{type(error).__name__}: {' '.join(str(error).split())}"),)
    seconds = time.monotonic() - begin
    return Component(kind=offer.kind, name=offer.name, kept=not findings, findings=findings, seconds=seconds)


def doctor(
    name: Annotated[
        str | None, typer.Argument(help="One distribution or entry point; all where none is given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable results on stdout.")] = False,
) -> None:
    """Say for each installed plug-in what it offers and whether it keeps the contract (exit code 2 where one does not)."""
    from rich.console import Console

    from lrkit import cli

    console = Console(stderr=True, quiet=as_json)

    def told(component: Component, seen: int, total: int) -> None:
        line = f"[{seen}/{total}] {component.kind} {component.name}: {component.state}{_time(component)}"
        console.print(line, highlight=False, markup=False)

    reports = examine(name, told=told)
    sound = all(report.sound for report in reports)
    if as_json:
        plain = [attrs.asdict(report) | {"sound": report.sound} for report in reports]
        cli._json({"plugins": plain, "sound": sound})
    elif not reports:
        typer.echo("no plug-in is installed beside lrkit's own components; `lrkit plugins doctor lrkit` checks those")
    else:
        header = ["distribution", "version", "entry point", "kind", "name", "contract", "seconds"]
        cli._table(header, [row for report in reports for row in _rows(report)], numbers=6)
        for line in [line for report in reports for line in _reasons(report)]:
            typer.echo(line)
    if not sound:
        raise typer.Exit(2)


def _rows(report: Report) -> list[list[str]]:
    point = f"{report.plugin} = {report.module}" if report.module else report.plugin
    rows = []
    for each in report.components:
        seconds = "-" if each.seconds is None else f"{each.seconds:.1f}"
        rows.append([report.distribution, report.version, point, each.kind, each.name, each.state, seconds])
    return rows or [[report.distribution, report.version, point, "-", "-", "cannot be used", "-"]]


def _time(component: Component) -> str:
    return "" if component.seconds is None else f" ({component.seconds:.1f} s)"


def _reasons(report: Report) -> list[str]:
    who = f"{report.distribution} {report.version}".strip()
    lines = [f"{who}: {problem}" for problem in report.problems]
    for each in report.components:
        lines += [f"{who}, {each.kind} {each.name}: {f.clause}: {f.message}" for f in each.findings]
    return lines


# ---- show ------------------------------------------------------------------------------------------------------------


def settings_of(component: Any) -> list[tuple[str, str, str, str]]:
    """Each setting of a component's class, or each argument of a function: name, type, default, and what it means."""
    said: dict[str, str] = {}
    for source in reversed(inspect.getmro(component)) if isinstance(component, type) else (component,):
        said |= _arguments(inspect.cleandoc(source.__doc__ or ""))
    return [
        (
            name,
            "" if p.annotation is p.empty else inspect.formatannotation(p.annotation).replace("typing.", ""),
            _shown(p.default),
            said.get(name, ""),
        )
        for name, p in inspect.signature(component).parameters.items()
    ]


def _shown(default: Any) -> str:
    if default is inspect.Parameter.empty:
        return ""
    return "" if default is attrs.NOTHING else foreign.text_of(default)


def _arguments(text: str) -> dict[str, str]:
    """What the section ``Args:`` of a docstring says of each."""
    found: dict[str, str] = {}
    name = ""
    for line in text.partition("Args:\n")[2].splitlines():
        if line and not line.startswith(" "):
            break
        if match := re.match(r"    (\w+): (.*)", line):
            name, found[match[1]] = match[1], match[2]
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    return found


def show(
    name: Annotated[str, typer.Argument(help="A name that is registered, as `lrkit plugins` lists them.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable results on stdout.")] = False,
) -> None:
    """Say what a component or method is, and what can be set in it, with the defaults."""
    from lrkit import cli
    from lrkit.registry import current

    offers = current().offers()
    found = [offer for offer in offers if offer.name == name]
    if not found:
        names = sorted({offer.name for offer in offers})
        raise LrkitError(f'nothing is registered as "{name}"{nearest(name, names)}; `lrkit plugins` lists what is')
    plain: list[dict[str, Any]] = []
    for offer in found:
        if offer.kind == "study":
            from lrkit.study.catalogue import about as about_study

            plain.append(
                {"kind": "study", "name": name, "distribution": offer.distribution, "about": about_study(name)}
            )
            plain[-1]["settings"] = []
            if not as_json:
                typer.echo(f"study {name}, {offer.distribution}\n\n{plain[-1]['about']}\n")
            continue
        about = (foreign.doc(offer.value) or "There is no description.").partition("Args:\n")[0].strip()
        prefix = "" if offer.kind == "method" else f"{offer.kind}."
        takes = [] if offer.kind in ("task", "executor") else _takes(offer)
        rows = [[f"{prefix}{key}", *others] for key, *others in takes]
        plain.append(
            {"kind": offer.kind, "name": name, "distribution": offer.distribution, "about": about}
            | {"settings": [dict(zip(("path", "type", "default", "about"), row, strict=True)) for row in rows]}
        )
        parts = _parts(name) if offer.kind == "method" else {}
        if parts:
            plain[-1]["parts"] = parts
        if not as_json:
            typer.echo(f"{offer.kind} {name}, {offer.distribution}\n\n{_unmarked(about)}\n")
            if parts:
                typer.echo("".join(f"{kind}: {part}\n" for kind, part in parts.items()))
            if rows:
                cli._table(["--set", "type", "default", ""], [[_unmarked(cell) for cell in row] for row in rows])
    if as_json:
        cli._json(plain)


def _takes(offer: "Offer") -> list[tuple[str, str, str, str]]:
    try:
        return settings_of(offer.value)
    except Exception as error:  # of a plug-in, and none that Python can look into
        message = f'{offer.kind} "{offer.name}" of {offer.distribution}: {foreign.line_of(error)}'
        warnings.warn(message, LrkitWarning, stacklevel=1)
        return []


def _parts(name: str) -> dict[str, str]:
    """The names of a named method's parts, by kind; empty, with a warning, where it cannot be made."""
    from lrkit.method import FIELDS, to_plain
    from lrkit.registry import current

    try:
        composition = to_plain(current().method(name))
    except LrkitError as error:
        warnings.warn(str(error), LrkitWarning, stacklevel=1)
        return {}
    parts: dict[str, Any] = {kind: composition[kind] for kind in FIELDS}
    for index, policy in enumerate(composition.get("also", ())):
        parts |= {f"also.{index}.{kind}": part for kind, part in policy.items()}
    return {kind: part["name"] for kind, part in parts.items() if part}


def _unmarked(text: str) -> str:
    """A docstring's text without its marks for code, for a terminal."""
    return re.sub(r"``(.+?)``|`(.+?)`", lambda match: match[1] or match[2], text)


def commands(app: Any) -> None:
    """Hang these commands on the command line's ``plugins``."""
    app.command(name="show")(show)
    app.command(name="new")(new)
    app.command(name="doctor")(doctor)
