"""The contract of a parameterization."""

import functools
import random
import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrkit import actions, metrics
from lrkit.adapt.adapted import Adapted, attach, load
from lrkit.adapt.targets import find_targets
from lrkit.errors import LrkitError
from lrkit.method import Method
from lrkit.process import as_it_was
from lrkit.testing.base import (
    POINTS,
    Broken,
    PartContract,
    Run,
    TinyModel,
    batch,
    builtin_actions,
    builtin_metrics,
    calling,
    clause,
    close,
    decides,
    expect,
    gap,
    is_rate,
    method_with,
    near,
    or_refused,
    raised,
    resumes,
    seed_torch,
    tiny,
)
from lrkit.units import Part


def _conv1d(d_in: int, d_out: int, bias: bool = True) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer: nn.Module = Conv1D(d_out, d_in)  # type: ignore[no-untyped-call]
    return layer


class ParameterizationContract(PartContract):
    """The contract of a `lrkit.Parameterization`."""

    def _host(self, component: Any) -> Method:
        return Method(parameterization=component)

    def _exercise(self, component: Any) -> None:
        # Its own start may be drawn from torch's generator, and from nothing else.
        with as_it_was():
            model = tiny().eval()
        rng = torch.get_rng_state()
        adapted = attach(model, Method(parameterization=component))
        torch.set_rng_state(rng)
        x, labels = batch()
        loss = F.cross_entropy(model(x), labels) + adapted.penalty()
        loss.backward()  # type: ignore[no-untyped-call]

    def _attached(self, component: Any, **options: Any) -> tuple[TinyModel, Adapted]:
        model = tiny(**options).eval()
        seed_torch(8)
        with calling("attach to the tiny model"):
            adapted = attach(model, Method(parameterization=component))
        return model, adapted

    def _stirred(self, component: Any) -> tuple[TinyModel, Adapted]:
        """Trained for a few steps, and then far from zero."""
        run = Run(Method(parameterization=component), 10)
        run.to(3)
        with torch.no_grad():
            for p in run.adapted.adapter_parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(9)).to(p) * 0.05)
        return run.model.eval(), run.adapted

    @clause
    def test_parts_are_what_is_there(self, component: Any) -> None:
        """`parts` names tensors of every adapter, with `components` entries along their axis; a core is [components]."""
        parts = component.parts
        good = isinstance(parts, tuple) and all(isinstance(part, Part) for part in parts)
        expect(good, f"parts must be a tuple of lrkit.Part, not {parts!r}")
        names = [part.name for part in parts]
        expect(len(set(names)) == len(names), f"parts names a tensor twice: {', '.join(names)}")
        expect(sum(part.core for part in parts) <= 1, "parts has more than one core")
        _, adapted = self._attached(component)
        rank = component.components
        good = rank is None or (isinstance(rank, int) and rank >= 0)
        expect(good, f"components must be an int of at least 0, or None where it follows from the layer, not {rank!r}")
        trained = {id(p) for p in adapted.parameters()}
        trains = dict.fromkeys(names, False)
        for layer, adapter in adapted.adapters.items():
            for part in parts:
                with calling(f"{layer}: the part {part.name}"):
                    tensor = part.of(adapter)
                trains[part.name] |= id(tensor) in trained
                if part.axis is not None:
                    first = next(other for other in parts if other.axis is not None)
                    wanted = first.of(adapter).shape[first.axis] if rank is None else rank
                    expect(
                        -tensor.ndim <= part.axis < tensor.ndim and tensor.shape[part.axis] == wanted,
                        f"{layer}: the part {part.name} {list(tensor.shape)} must have {wanted} entries (`components`) "
                        f"along its axis {part.axis}",
                    )
                expect(
                    not part.core or (part.axis == 0 and tensor.ndim == 1),
                    f"{layer}: a core is one scalar for each component, axis 0 of [components]; {part.name} is "
                    f"{list(tensor.shape)} with axis {part.axis}",
                )
        for part in parts:
            does = "trains" if trains[part.name] else "does not train in any layer"
            expect(
                trains[part.name] == part.trains,
                f"the part {part.name} is declared with trains={part.trains}, and it {does}",
            )

    @clause
    def test_starts_at_the_model(self, component: Any) -> None:
        """Fresh adapters change no output: ΔW = 0."""
        x, _ = batch(torch.float64)
        plain = tiny(torch.float64).eval()(x)
        model, _ = self._attached(component, dtype=torch.float64)
        with calling("forward"):
            outputs = model(x)
        expect(outputs.shape == plain.shape, f"outputs are {list(outputs.shape)}, without it {list(plain.shape)}")
        moved = gap(outputs, plain)
        expect(
            moved <= 1e-6 * plain.detach().abs().max().item(),
            f"with fresh adapters outputs differ by {moved:.2g}: ΔW must be 0",
        )

    @clause
    def test_layers_are_left_as_they_are(self, component: Any) -> None:
        """Building adapters changes no weight of the model, and each layer's parameters stay in it, as the same objects."""
        model = tiny()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        objects = dict(model.named_parameters())
        seed_torch(8)
        with calling("attach"):
            adapted = attach(model, Method(parameterization=component))
        for name, p in objects.items():
            expect(torch.equal(p, before[name]), f"building adapters changes the model's own {name}")
        there = {id(p) for p in model.parameters()}
        lost = [name for name, p in objects.items() if id(p) not in there]
        expect(
            not lost,
            f"{', '.join(lost[:2])} is in the model no more: keep the layer as a submodule (self.base = target.layer), so "
            "that it moves and is saved with the model",
        )
        names = {target.name for target in component.choose(find_targets(tiny(), "all-linear"))}
        missing, extra = sorted(names - set(adapted.adapters)), sorted(set(adapted.adapters) - names)
        expect(
            not missing,
            f"adapt must give each target its module, by the target's name: {', '.join(missing[:2])} is missing",
        )
        expect(not extra, f"adapt gives a module for {', '.join(extra[:2])}, which is no target (see `choose`)")

    @clause
    def test_every_trained_parameter_learns(self, component: Any) -> None:
        """Within three steps each tensor that trains gets a gradient that is not zero, and what is fixed does not move."""
        run = Run(Method(parameterization=component), 10)
        parameters = dict(run.adapted.named_parameters())
        expect(run.adapted.adapter_parameters(), "nothing trains")
        fixed = {n: p.detach().clone() for n, p in run.model.named_parameters() if n not in parameters}
        learns: set[str] = set()
        for _ in range(3):
            x, labels = batch()
            with calling("forward or backward"):
                (F.cross_entropy(run.model(x), labels) + run.adapted.penalty()).backward()  # type: ignore[no-untyped-call]
            learns |= {n for n, p in parameters.items() if p.grad is not None and bool((p.grad != 0).any())}
            bad = [n for n, p in parameters.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
            expect(not bad, f"the gradient of {', '.join(bad[:2])} is not finite")
            run.optimizer.step()
            run.optimizer.zero_grad()
        idle = [name for name in parameters if name not in learns]
        expect(
            not idle,
            f"{len(idle)} tensors that train have had no gradient but zero in 3 steps, such as {', '.join(idle[:2])}",
        )
        for name, p in run.model.named_parameters():
            expect(name not in fixed or torch.equal(p, fixed[name]), f"{name} is fixed, and it has moved")

    @clause
    def test_loss_goes_down(self, component: Any) -> None:
        """At its `learning_rate`, without the head's help, the loss on one batch goes down."""
        rate = component.learning_rate
        expect(is_rate(rate), f"learning_rate must be above 0, not {rate!r}")
        losses = Run(Method(parameterization=component), 25, train_also=()).to(25)
        expect(
            min(losses[-5:]) < losses[0],
            f"after 25 steps of AdamW at {rate:g} the loss is {min(losses[-5:]):.4f}, at first it was {losses[0]:.4f}",
        )

    @clause
    def test_same_seed_same_start(self, component: Any) -> None:
        """The random start is drawn from torch's global generator alone, and evaluation is not random at all."""
        model, _ = self._attached(component)
        random.random()
        np.random.random()
        twin, _ = self._attached(component)
        ours, theirs = model.state_dict(), twin.state_dict()
        odd = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        expect(not odd, f"with the same seed {', '.join(odd[:2])} starts differently: draw from torch's generator")
        stirred, _ = self._stirred(component)
        x, _ = batch()
        first = stirred(x)
        expect(torch.equal(first, stirred(x)), "in evaluation the same input gives other outputs the second time")

    @clause
    def test_any_leading_shape(self, component: Any) -> None:
        """An adapter takes [tokens, d_in] and [batch, length, d_in], one row or many, as the layer does."""
        _, adapted = self._stirred(component)
        for name, adapter in adapted.adapters.items():
            d_in = dict(tiny().named_modules())[name].in_features
            x = torch.randn(2, 3, int(d_in), generator=torch.Generator().manual_seed(10))
            with calling(f"{name}: forward"):
                y = adapter(x)
                flat, row = adapter(x.flatten(0, 1)), adapter(x[:1, :1])
            expect(y.shape[:2] == (2, 3) and close(flat, y.flatten(0, 1)), f"{name}: [6, d_in] and [2, 3, d_in] differ")
            expect(close(row, y[:1, :1]), f"{name}: one row alone has another output than among others")

    @clause
    def test_penalty_is_a_scalar(self, component: Any) -> None:
        """`penalty` gives a finite scalar, or None; it changes nothing."""
        _, adapted = self._stirred(component)
        before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
        with calling("penalty"):
            penalty = component.penalty(list(adapted.adapters.values()))
        if penalty is not None:
            good = isinstance(penalty, Tensor) and penalty.numel() == 1 and penalty.ndim == 0
            expect(
                good and bool(torch.isfinite(penalty)),
                f"penalty must be a finite scalar tensor or None, not {penalty!r}",
            )
        for name, p in adapted.named_parameters():
            expect(torch.equal(p, before[name]), f"penalty changes {name}")

    @clause
    def test_other_dtypes_or_refused(self, component: Any) -> None:
        """It trains in float64, bfloat16 and under autocast, with outputs in the model's dtype; or refuses in one line."""
        cases = ((torch.float64, False), (torch.bfloat16, False), (torch.float32, True))
        for dtype, cast in cases:
            name = "autocast" if cast else str(dtype).removeprefix("torch.")
            seed_torch(8)
            model = tiny(dtype)
            try:
                adapted = attach(model, Method(parameterization=component))
            except LrkitError as error:
                expect("\n" not in str(error), f"{name}: refused in more than one line: {error}")
                continue
            optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-3)
            adapted.bind(optimizer, total_steps=2)
            # What trains is float32 at least: a model of which everything trains is float32 as a whole.
            now = {p.dtype for p in model.parameters()}
            own = dtype if dtype in now else max(now, key=lambda each: each.itemsize)
            x, labels = batch(own)
            wanted = torch.bfloat16 if cast else own
            for _ in range(2):
                with calling(f"{name}: forward or backward"), torch.autocast("cpu", torch.bfloat16, enabled=cast):
                    outputs = model(x)
                    loss = F.cross_entropy(outputs.float(), labels) + adapted.penalty().float()
                with calling(f"{name}: backward or the optimizer's step"):
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    optimizer.zero_grad()
                expect(outputs.dtype == wanted, f"{name}: outputs are {outputs.dtype}, the model's are {wanted}")
                expect(bool(torch.isfinite(outputs).all()), f"{name}: outputs are not finite")

    @clause
    def test_conv1d_or_refused(self, component: Any) -> None:
        """GPT-2's transposed ``Conv1D`` is adapted as a Linear of the same weights is; or refused in one line."""
        model = tiny(linear=_conv1d).eval()
        x, _ = batch()
        plain = model(x)
        seed_torch(8)
        try:
            adapted = attach(model, Method(parameterization=component))
        except LrkitError as error:
            expect("\n" not in str(error), f"refused in more than one line: {error}")
            return
        except Exception as error:
            raise Broken(f"attach to Conv1D layers {raised(error)}; expected a LrkitError in one line") from error
        with calling("forward on Conv1D layers"):
            outputs = model(x)
        expect(near(outputs, plain), "with fresh adapters on Conv1D layers outputs differ: ΔW must be 0")
        F.cross_entropy(outputs, batch()[1]).backward()  # type: ignore[no-untyped-call]
        self._merge(model, adapted, "on Conv1D layers ")

    @clause
    def test_merge_gives_the_same_outputs(self, component: Any) -> None:
        """A merged model is a plain one with the adapted one's outputs; an adapter that cannot be merged says so."""
        model, adapted = self._stirred(component)
        self._merge(model, adapted, "")

    def _merge(self, model: nn.Module, adapted: Adapted, where: str) -> None:
        with torch.no_grad():
            for p in adapted.adapter_parameters():
                p.add_(0.02)
        x, _ = batch()
        outputs = model(x)
        try:
            merged = adapted.merge()
        except LrkitError as error:
            expect("\n" not in str(error), f"{where}merge is refused in more than one line: {error}")
            return
        except Exception as error:
            raise Broken(f"{where}merge {raised(error)}") from error
        expect(near(merged(x), outputs), f"{where}after merge outputs differ by {gap(merged(x), outputs):.2g}")

    @clause
    def test_detach_gives_the_model_back(self, component: Any) -> None:
        """After training, `detach` gives back the model bit for bit: its modules, values, flags and outputs."""
        plain, (_, adapted) = tiny().eval(), self._stirred(component)
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
        model, adapted = self._stirred(component)
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

    @clause
    def test_masked_components_contribute_nothing(self, component: Any) -> None:
        """Where a core value is zero its component is out, however the rest of it stands; its gradient can bring it back."""
        parts = [part for part in component.parts if part.axis is not None]
        core = next((part for part in parts if part.core and part.trains), None)
        if core is None:
            return
        model, adapted = self._stirred(component)
        x, labels = batch()
        with torch.no_grad():
            for adapter in adapted.adapters.values():
                core.of(adapter)[0] = 0.0
            before = model(x)
            for part in parts:
                for adapter in adapted.adapters.values():
                    if not part.core and part.axis is not None:
                        part.of(adapter).select(part.axis, 0).add_(0.5)
            moved = gap(model(x), before)
        expect(
            moved <= 1e-5,
            f"component 0 has a core value of zero in every layer, and moving it changes outputs by {moved:.2g}",
        )
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()  # type: ignore[no-untyped-call]
        grads = [core.of(adapter).grad for adapter in adapted.adapters.values()]
        expect(
            any(grad is not None and bool(grad[0] != 0) for grad in grads),
            "at a core value of zero the gradient is zero in every layer: a pruned component could never come back",
        )

    @clause
    def test_can_be_cut(self, component: Any) -> None:
        """`compact`, which cuts pruned components out of every part, leaves outputs as they are, and training goes on."""
        for action in (actions.Prune(), actions.Zero()):
            metric = metrics.SensitivityUncertainty()
            build = functools.partial(method_with, component, action=action, metric=metric)
            method = or_refused(build, component, action, metric)
            if method is not None:
                self._cut(method)

    def _cut(self, method: Method) -> None:
        run = Run(method, 10)
        run.to(9)
        model, (x, _) = run.model.eval(), batch()
        before = model(x).detach()
        try:
            run.adapted.compact()
        except LrkitError as error:
            expect("\n" not in str(error), f"compact is refused in more than one line: {error}")
            return
        with calling("forward after compact"):
            after = model(x)
        expect(near(after, before), f"compact changes outputs by {gap(after, before):.2g}")
        with calling("a step after compact"):
            run.to(10)

    @clause
    def test_trains_or_is_refused_everywhere(self, component: Any) -> None:
        """With each of lrkit's metrics and actions it trains and decides, or is refused with both sides named."""
        for metric in builtin_metrics():
            for action in builtin_actions():
                sides = {"metric": metric, "action": action}
                method = or_refused(functools.partial(method_with, component, **sides), component, *sides.values())
                if method is not None:
                    with calling(f"a run with {metric!r} and {action!r}"):
                        run = Run(method, 10)
                        run.to(10)
                        decides(run)

    @clause
    def test_resumes_exactly(self, component: Any) -> None:
        """A run that is saved and resumed is bitwise the run, alone and with every action that it takes."""
        resumes(Method(parameterization=component), 6, (2,))
        for action in builtin_actions():
            metric = metrics.GradientUncertainty()
            build = functools.partial(method_with, component, metric=metric, action=action)
            method = or_refused(build, component, metric, action)
            if method is not None:
                resumes(method, 10, POINTS)
