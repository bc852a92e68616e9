"""``lrkit plugins``: what is registered, what can be set in it, whether it keeps its contract, and a new one."""

import inspect
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer

from lrkit import foreign
from lrkit.cli import screen
from lrkit.cli.doctor import Component, Report, examine
from lrkit.cli.folders import new_folder, write_text
from lrkit.cli.options import Json
from lrkit.cli.scaffold import KINDS, written
from lrkit.cli.tables import Column
from lrkit.errors import LrkitError, LrkitWarning, nearest

if TYPE_CHECKING:
    from lrkit.registry import Offer


def plugins(context: typer.Context, as_json: Json = False) -> None:
    """List what is registered, by which distribution.

    If something is wrong with a plug-in, it is told on stderr, and is exit code 2.
    """
    if context.invoked_subcommand is not None:
        return
    from lrkit.registry import current

    registry = current()
    offers = registry.offers()
    if as_json:
        components = [
            {"kind": o.kind, "name": o.name, "object": foreign.where(o.value), "distribution": o.distribution}
            for o in offers
        ]
        problems = [
            {"distribution": p.distribution, "plugin": p.plugin, "message": p.message} for p in registry.problems
        ]
        screen.say_json({"components": components, "problems": problems})
    else:
        columns = [Column("kind"), Column("name"), Column("distribution"), Column("object", extra=True)]
        screen.table(columns, [[o.kind, o.name, o.distribution, foreign.where(o.value)] for o in offers])
    if registry.problems:
        raise typer.Exit(2)


# ---- new -------------------------------------------------------------------------------------------------------------


def new(
    name: Annotated[str, typer.Argument(help="The package's name, such as lrkit-movement.")],
    kind: Annotated[str, typer.Option(help=f"What it offers: {', '.join(KINDS)}.")],
    out: Annotated[Path | None, typer.Option(help="A new folder for it; ./NAME if none is given.")] = None,
) -> None:
    """Write a plug-in package that works: pyproject.toml, module, tests and README."""
    texts = written(name, kind)
    folder = new_folder(Path(name) if out is None else out)
    for path, text in texts.items():
        write_text(folder / path, text)
    screen.say(f"written: {' '.join(str(folder / path) for path in texts)}")
    screen.say(f"next: python -m pytest {folder}; pip install -e {folder}; lrkit plugins doctor {name}")


# ---- doctor ----------------------------------------------------------------------------------------------------------


def doctor(
    name: Annotated[str | None, typer.Argument(help="One distribution or entry point; all if none is given.")] = None,
    as_json: Json = False,
) -> None:
    """Check that installed plug-ins keep the contract.

    Each is shown with what it offers. The exit code is 2 if one does not keep its contract.
    """
    from rich.console import Console

    console = Console(stderr=True, quiet=as_json, soft_wrap=True)

    def told(component: Component, seen: int, total: int) -> None:
        seconds = "" if component.seconds is None else f" ({component.seconds:.1f} s)"
        line = f"[{seen}/{total}] {component.kind} {component.name}: {component.state}{seconds}"
        console.print(line, highlight=False, markup=False)

    reports = examine(name, told=told)
    sound = all(report.sound for report in reports)
    if as_json:
        plain = [attrs.asdict(report) | {"sound": report.sound} for report in reports]
        screen.say_json({"plugins": plain, "sound": sound})
    elif not reports:
        screen.say("no plug-in is installed beside lrkit's own components; `lrkit plugins doctor lrkit` checks those")
    else:
        columns = [Column("distribution"), Column("version", extra=True), Column("entry point", extra=True)]
        columns += [Column("kind"), Column("name"), Column("contract"), Column("seconds", number=True, extra=True)]
        screen.table(columns, [row for report in reports for row in _rows(report)])
        for line in [line for report in reports for line in _reasons(report)]:
            screen.say(line)
    if not sound:
        raise typer.Exit(2)


def _rows(report: Report) -> list[list[str]]:
    point = f"{report.plugin} = {report.module}" if report.module else report.plugin
    rows = []
    for each in report.components:
        seconds = "-" if each.seconds is None else f"{each.seconds:.1f}"
        rows.append([report.distribution, report.version, point, each.kind, each.name, each.verdict, seconds])
    return rows or [[report.distribution, report.version, point, "-", "-", "cannot be used", "-"]]


def _reasons(report: Report) -> list[str]:
    who = f"{report.distribution} {report.version}".strip()
    lines = [f"{who}: {problem}" for problem in report.problems]
    for each in report.components:
        lines += [f"{who}, {each.kind} {each.name}: {f.clause}: {f.message}" for f in each.findings]
        lines += [f"{who}, {each.kind} {each.name}: {each.state}"] if each.note else []
    return lines


# ---- show ------------------------------------------------------------------------------------------------------------


def show(
    name: Annotated[str, typer.Argument(help="A name that is registered, as `lrkit plugins` lists them.")],
    as_json: Json = False,
) -> None:
    """Say what a component or method is, and what can be set in it, with the defaults."""
    from lrkit.registry import current

    offers = current().offers()
    found = [offer for offer in offers if offer.name == name]
    if not found:
        names = sorted({offer.name for offer in offers})
        raise LrkitError(f'nothing is registered as "{name}"{nearest(name, names)}; `lrkit plugins` lists what is')
    described = [_described(offer) for offer in found]
    if as_json:
        screen.say_json(described)
        return
    for each in described:
        screen.say(f"{each['kind']} {name}, {each['distribution']}\n")
        screen.say(f"{_unmarked(each['about'])}\n", reflow=True)
        if parts := each.get("parts"):
            screen.say("".join(f"{kind}: {part}\n" for kind, part in parts.items()))
        for setting in each["settings"]:
            default = f", default {setting['default']}" if setting["default"] else ""
            kind = f"  {setting['type']}" if setting["type"] else ""
            screen.say_below(_unmarked(f"--set {setting['path']}{kind}{default}"), _unmarked(setting["about"]))


def _described(offer: "Offer") -> dict[str, Any]:
    """Describe a registered component as plain data."""
    told: dict[str, Any] = {"kind": offer.kind, "name": offer.name, "distribution": offer.distribution}
    if offer.kind == "study":
        from lrkit.study.catalogue import about

        return told | {"about": about(offer.name), "settings": []}
    text = (foreign.doc(offer.value) or "There is no description.").partition("Args:\n")[0].strip()
    prefix = "" if offer.kind == "method" else f"{offer.kind}."
    takes = [] if offer.kind in ("task", "executor") else _takes(offer)
    keys = ("path", "type", "default", "about")
    told |= {
        "about": text,
        "settings": [dict(zip(keys, (f"{prefix}{key}", *others), strict=True)) for key, *others in takes],
    }
    parts = parts_of(offer.name) if offer.kind == "method" else {}
    return told | ({"parts": parts} if parts else {})


def _takes(offer: "Offer") -> list[tuple[str, str, str, str]]:
    try:
        return settings_of(offer.value)
    except Exception as error:  # of a plug-in, and none that Python can look into
        message = f'{offer.kind} "{offer.name}" of {offer.distribution}: {foreign.line_of(error)}'
        warnings.warn(message, LrkitWarning, stacklevel=1)
        return []


def settings_of(component: Any) -> list[tuple[str, str, str, str]]:
    """List the settings of a component's class, or the arguments of a function: name, type, default, and meaning."""
    said: dict[str, str] = {}
    for source in reversed(inspect.getmro(component)) if isinstance(component, type) else (component,):
        said |= _arguments(inspect.cleandoc(source.__doc__ or ""))
    return [
        (
            name,
            "" if p.annotation is p.empty else _type_of(p.annotation),
            "" if p.default is p.empty or p.default is attrs.NOTHING else foreign.text_of(p.default),
            said.get(name, ""),
        )
        for name, p in inspect.signature(component).parameters.items()
    ]


def _type_of(annotation: Any) -> str:
    """Write an annotation without the modules that it comes from."""
    return re.sub(r"\b(typing|collections\.abc)\.", "", inspect.formatannotation(annotation))


def _arguments(text: str) -> dict[str, str]:
    """Read what the section ``Args:`` of a docstring says of each argument."""
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


def parts_of(name: str) -> dict[str, str]:
    """Name a registered method's parts, by kind; none, with a warning, if it cannot be made."""
    from lrkit.compose import to_plain
    from lrkit.method import FIELDS
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
    """Take the marks for code out of a docstring's text, for a terminal."""
    return re.sub(r"``(.+?)``|`(.+?)`", lambda match: match[1] or match[2], text)
