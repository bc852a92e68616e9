"""A long look at plug-ins that says nothing on the way, or waits for threads."""

from __future__ import annotations

import types

import attrs
import pytest
import torch

import lrkit
from lrkit import testing
from lrkit.cli import doctor, plugins
from lrkit.registry import Registry


@attrs.frozen(kw_only=True)
class One(lrkit.metrics.Magnitude):
    """The size of λ; with measure. Source: arXiv 2303.10512."""


@attrs.frozen(kw_only=True)
class Two(lrkit.metrics.Magnitude):
    """The size of λ, with noise; with measure. Source: this test."""

    def score(self, weight, state):
        return weight.abs() + torch.rand_like(weight)


def of(*offers: object) -> Registry:
    plugins = []
    for number, offered in enumerate(offers):
        module = types.ModuleType("plugin")
        module.lrkit_metrics = lrkit.hookimpl(lambda offered=offered: offered)  # type: ignore[attr-defined]
        plugins.append((f"acme-{number} 1.0", f"p{number}", module))
    return Registry(plugins, discover=False)


def test_each_component_is_told_at_once() -> None:
    """After each component: its state, its time, and how many there are; before the next one is begun."""
    told = []
    doctor.examine(
        registry=of({"one": One}, {"two": Two}),
        told=lambda component, seen, total: told.append((component, seen, total)),
    )
    assert [(c.name, c.state.split()[-1], seen, total) for c, seen, total in told] == [
        ("one", "kept", 1, 2),
        ("two", "broken", 2, 2),
    ]
    assert all(c.seconds > 0 for c, _, _ in told)


def test_progress_is_on_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command shows it beside the table, with --json nothing but JSON."""
    registry = of({"one": One})
    monkeypatch.setattr("lrkit.registry.current", lambda: registry)
    plugins.doctor(name=None, as_json=False)
    out, err = capsys.readouterr()
    assert err.startswith("[1/1] metric one: kept (")
    assert "seconds" in out
    plugins.doctor(name=None, as_json=True)
    assert capsys.readouterr().err == ""


def test_contracts_run_on_one_thread() -> None:
    """On small tensors more threads wait for each other; afterwards there are as many as before."""
    seen = []

    @attrs.frozen(kw_only=True)
    class Counts(lrkit.metrics.Magnitude):
        """The size of λ; with measure. Source: this test."""

        def score(self, weight, state):
            seen.append(torch.get_num_threads())
            return super().score(weight, state)

    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        testing.check(Counts())
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}
