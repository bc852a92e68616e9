"""Ask how a parameterization leaves the model: merged, taken out, or saved and loaded."""

import tempfile
from typing import Any

import torch

from lrkit.adapt.adapted import load
from lrkit.testing.base import clause
from lrkit.testing.findings import calling, expect
from lrkit.testing.parameterization.clauses import ParameterizationClauses
from lrkit.testing.parameterization.subjects import merges, stirred
from lrkit.testing.tiny import batch, seed_torch, tiny


class Leaving(ParameterizationClauses):
    """The clauses about the ways out of a model."""

    @clause
    def test_merge_gives_the_same_outputs(self, component: Any) -> None:
        """A merged model is a plain one with the adapted one's outputs; an adapter that cannot be merged says so."""
        model, adapted = stirred(component)
        merges(model, adapted)

    @clause
    def test_detach_gives_the_model_back(self, component: Any) -> None:
        """After training, `detach` gives back the model bit for bit: its modules, values, flags and outputs."""
        plain, (_, adapted) = tiny().eval(), stirred(component)
        with calling("detach"):
            back = adapted.detach().eval()
        kinds = [(name, type(module)) for name, module in plain.named_modules()]
        expect([(n, type(m)) for n, m in back.named_modules()] == kinds, "after detach the model has other modules")
        state, wanted = back.state_dict(), plain.state_dict()
        odd = [name for name in wanted if name not in state or not torch.equal(state[name], wanted[name])]
        expect(
            not odd and len(state) == len(wanted),
            f"after detach {', '.join(odd[:2]) or 'the state dict'} is not what it was",
        )
        flags = [name for name, p in back.named_parameters() if not p.requires_grad]
        expect(not flags, f"after detach {', '.join(flags[:2])} has lost requires_grad")
        x, _ = batch()
        expect(torch.equal(back(x), plain(x)), "after detach outputs are not what they were: a hook may be left behind")

    @clause
    def test_saved_and_loaded(self, component: Any) -> None:
        """`save` and `load`, onto a fresh model in a process with another seed, give the same outputs bit for bit."""
        model, adapted = stirred(component)
        x, _ = batch()
        with tempfile.TemporaryDirectory() as folder:
            with calling("save"):
                adapted.save(folder)
            fresh = tiny().eval()
            seed_torch(99)
            with calling("load"):
                load(fresh, folder)
        expect(
            torch.equal(fresh(x), model(x)),
            "a model loaded from what was saved has other outputs: what is random at the start must be a parameter (fixed "
            "ones with requires_grad=False) or a lasting buffer",
        )
