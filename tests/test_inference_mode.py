"""Whatever is called in torch's mode for inference makes and changes tensors that train on, as anywhere else."""

import models
import pytest
import torch

import lrkit
from lrkit.compose import compose, from_plain

PLACES = {
    "adalora": ("attach", "bind", "state_dict", "load_state_dict", "rewind", "compact"),
    "increlora": ("attach", "load_state_dict", "rewind"),
    "gora": ("attach", "calibrate", "rewind"),
    "cut at step 0": ("attach", "bind"),
}
CUT = lrkit.Method(
    parameterization=lrkit.parameterizations.SVD(rank=4),
    metric=lrkit.metrics.Random(),
    scheduler=lrkit.schedulers.Once(target=2, calibration=0),
    action=lrkit.actions.Prune(cut="always"),
)
BATCHES = [models.batch(seed=10 + i) for i in range(3)]
ENDS = {}


def run(name, place):
    """Train for 23 steps, with one of the calls in the mode for inference, and return all that is left."""

    def mode(call):
        return torch.inference_mode(call == place)

    model = models.make("bert", seed=3)
    with mode("attach"):
        adapted = lrkit.attach(model, CUT if name == "cut at step 0" else from_plain(compose(name)))
    if any(policy.scheduler.calibration for policy in adapted.method.policies):
        with mode("calibrate"):
            adapted.calibrate(BATCHES)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)

    def train(begin, end):
        for step in range(begin, end):
            torch.manual_seed(step)
            (model(**models.batch(seed=step)).loss + adapted.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()

    with mode("bind"):
        adapted.bind(optimizer, total_steps=24)
    train(0, 8)
    with mode("state_dict"):
        state = adapted.state_dict()
    with mode("load_state_dict"):
        adapted.load_state_dict(state)
    train(8, 12)
    adapted.unbind(quietly=True)
    with mode("rewind"):
        adapted.rewind(state)
    adapted.bind(optimizer, total_steps=24)
    train(12, 23)
    if name == "adalora":
        with mode("compact"):
            adapted.compact()
        train(23, 24)
    return {name: tensor.detach().clone() for name, tensor in adapted.state_dict()["tensors"].items()}


@pytest.mark.parametrize(("name", "place"), [(name, place) for name, places in PLACES.items() for place in places])
def test_mode_changes_nothing(name, place):
    """A run goes on bitwise as if the mode had been another: layers, masks, columns and statistics can all train."""
    if name not in ENDS:
        ENDS[name] = run(name, None)
    end = run(name, place)
    assert end.keys() == ENDS[name].keys()
    assert all(torch.equal(tensor, end[key]) for key, tensor in ENDS[name].items())
