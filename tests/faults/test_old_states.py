"""States that an earlier lrkit wrote, before a setting was there."""

import models
import torch
from test_attach import METHODS, fit

import lrkit


def test_missing_settings_are_defaults():
    """A method's table without a setting that is new now loads as it is."""
    model = models.make("bert", seed=1)
    adapted = lrkit.attach(model, METHODS["adalora"])
    fit(model, adapted, steps=20)
    state = adapted.state_dict()
    assert state["meta"]["method"]["scheduler"].pop("rounding") == "down"
    other = lrkit.attach(models.make("bert", seed=2), METHODS["adalora"])
    other.load_state_dict(state)
    assert other.history == adapted.history
    assert all(torch.equal(a, b) for a, b in zip(adapted.parameters(), other.parameters(), strict=True))
