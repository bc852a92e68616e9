"""The loop of an adaptive method: observe, score, decide, apply.

At every real optimizer step, each policy's metric observes weights and gradients. When the scheduler says that a
decision is due, entry-wise scores are reduced to unit scores, the action decides who is kept, and it is applied.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lrkit.errors import Once, listing
from lrkit.loop import fitting, rules, saving
from lrkit.loop.components import Components
from lrkit.loop.draws import seed_of
from lrkit.loop.gradients import Unclipped
from lrkit.loop.history import Decision
from lrkit.loop.layout import GradientOf, own_gradient
from lrkit.loop.liveness import Liveness
from lrkit.loop.policy import PolicyState, leave_out
from lrkit.loop.remembered import Observed, Peers
from lrkit.loop.resizing import Ranks
from lrkit.loop.run import Run
from lrkit.loop.state import Saved
from lrkit.loop.tally import Tally


class Controller:
    """All policies of one run and their state. Without a saved one it is the state before the first step.

    Args:
        run: the method and the adapters.
        saved: a saved run that `check` has passed; the adapters' tensors must hold its weights.
        tensors: its tensors.
        warn: says warnings once; a new one by default.
        off: ``id`` of each tensor that somebody froze by hand.
    """

    def __init__(
        self,
        run: Run,
        saved: Saved | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        warn: Once | None = None,
        off: Collection[int] = (),
    ) -> None:
        self.run, self.step, off = run, 0, set(off)
        self.warn = Once() if warn is None else warn
        self.peers: Peers | None = None
        self.total_steps: int | None = None
        self.history: list[Decision] = []
        self.liveness = Liveness(run.modules, run.trained, run.others, whole=run.penalized)
        tally = run.tally()
        if saved is None:
            ranks, self.policies = Ranks(run.ranks), run.policies(off)
            for state in self.policies:
                state.begin()
            # All chance follows from this and the step alone, so that a resumed run draws the same. To read the program's
            # own seed changes no number that is drawn later.
            self.seed = int(torch.randint(2**62, ())) if run.grows else torch.initial_seed() % 2**62
        else:
            self._take(saved, tensors or {}, off)
            ranks = Ranks(run.ranks, saved.components, saved.numbered)
            tally.load(saved.step, fitting.sums_of(run, saved))
        self.components = Components(run, self.policies, ranks, tally, off)
        self.components.survey(self.step)

    @property
    def ranks(self) -> Ranks:
        """The components that each layer stores."""
        return self.components.ranks

    @property
    def tally(self) -> Tally:
        """The count of all that trains, layer by layer."""
        return self.components.tally

    def _take(self, saved: Saved, tensors: Mapping[str, Tensor], off: set[int]) -> None:
        self.step, self.total_steps, self.seed = saved.step, saved.total_steps, saved.seed
        self.history = list(saved.history)
        self.liveness.dead = None if saved.dead is None else list(saved.dead)
        self.policies = fitting.policies_of(self.run, saved, tensors, off)
        for state in self.policies:
            # Only what the loaded tensors do not hold is made again; a mask is never applied a second time, since λ may
            # have moved since.
            state.fate.restore(state.blocks, state.kept)
        for state, record in zip(self.policies, saved.policies, strict=True):
            state.remember(tensors, record.observations)
        for d in self.history:
            if d.step == self.step:
                self.liveness.doubt(self.policies[d.policy].blocks, d.returned)

    def loaded(self, saved: Saved, tensors: Mapping[str, Tensor], off: Collection[int]) -> "Controller":
        """Make the controller of a saved run of this method, which `check` has passed.

        If this one is bound for more steps, all schedules of the saved run have ended, and it goes on for as many.
        """
        made = Controller(self.run, saved, tensors, self.warn, off)
        made.schedule(max(self.total_steps or 0, made.total_steps or 0) or None)
        made.peers = self.peers
        return made

    def check(self, saved: Saved, tensors: Mapping[str, Tensor], off: Collection[int] = ()) -> None:
        """Raise LrkitError if a state is not one of this run; change nothing."""
        fitting.check(self.run, saved, tensors, self.total_steps, off)

    def schedule(self, total_steps: int | None, *, dry: bool = False) -> None:
        """Bind every schedule that has not ended to the length of the run.

        Args:
            total_steps: T; None leaves all as it is.
            dry: look whether they fit, and change nothing.

        Raises:
            LrkitError: a schedule does not fit.
        """
        if total_steps is None:
            return
        bound = [(state, rules.timetable(state, total_steps)) for state in self.policies if not state.ended]
        if not dry:
            self.total_steps = total_steps
            for state, times in bound:
                state.times = times

    def begin(self, total_steps: int) -> None:
        """Bind every schedule to the length of the run, and say what it will not reach. Raises as `schedule`."""
        self.schedule(total_steps)
        self.components.begin(self.step)
        self.foretell(total_steps)

    def foretell(self, total_steps: int) -> None:
        """Say once what a run of so many steps will not reach by its schedules."""
        for state in self.policies:
            if not state.ended:
                rules.forewarn(state, state.over(total_steps), self.warn)
            elif told := rules.over(state, self.step, total_steps):
                self.warn(f"over {state.index}", told)

    def objection(self, total_steps: int) -> str | None:
        """Say why a run that has begun cannot go on as one of so many steps; None if it can."""
        return rules.objection(self.policies, self.step, self.total_steps, total_steps)

    def unfinished(self) -> str | None:
        """Say what training that ends now leaves undone; None if every last decision has been taken."""
        return rules.unfinished(self.policies, self.step, self.total_steps)

    def look(self) -> None:
        """See which adapters have gradients, name those that have none, and leave them out of the rankings."""
        if not self.liveness.look():
            return
        dead, modules = self.liveness.dead or [], self.run.modules
        leave_out(self.policies, self.run.tensors_of(dead))
        if dead:
            self.warn(
                "dead",
                f"no gradient reaches {len(dead)} of {len(modules)} adapted layers, because the loss does not depend "
                "on them or the model reads their weight without a call: they take no part in any ranking until one does. "
                f"They are {listing(dead)}",
            )

    @property
    def wants_unclipped(self) -> bool:
        """Whether a metric measures gradients as they were before clipping."""
        return any(state.policy.metric.measure == "before-clipping" for state in self.policies)

    def readers(self) -> list[PolicyState]:
        """Return the policies that observe the next step and read what goes through layers."""
        return [state for state in self.policies if state.statistics.reads and state.observes(self.step + 1)]

    def before_step(
        self, scale: Tensor | None = None, unclipped: Unclipped | None = None, loss_scale: float | None = None
    ) -> None:
        """Observe, when the optimizer is about to step.

        Args:
            scale: a factor that the gradients still carry; None for none.
            unclipped: the gradients as backward left them, if a metric wants them.
            loss_scale: the factor that those carry; None for none.
        """
        self.look()
        for state in self.policies:
            state.follow_device()
            measure = state.policy.metric.measure
            if measure == "before-step":
                self._observe(state, self.step + 1, scale)
            elif measure == "before-clipping" and unclipped is not None:
                whole = None if loss_scale is None else torch.tensor(loss_scale)
                self._observe(state, self.step + 1, whole, unclipped.of)

    def after_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Observe and decide, when the optimizer has stepped.

        Returns:
            True if tensors have stopped training, or are of another size: DDP has to follow then.
        """
        assert self.total_steps is not None
        self.step += 1
        if self.step == self.total_steps + 1:
            self.warn(
                "over",
                f"step {self.step} of a run that was bound for total_steps={self.total_steps}: every schedule has ended",
            )
        # All observe before any decides: a matrix that one policy freezes has no gradient for the next.
        for state in self.policies:
            if state.policy.metric.measure == "after-step":
                # Even a fused optimizer, which unscales the gradients itself, has written them back by now.
                self._observe(state, self.step, None)
        return self.act([state for state in self.policies if state.due(self.step)], optimizer)

    def act(self, due: Collection[PolicyState], optimizer: torch.optim.Optimizer | None) -> bool:
        """Let policies decide that have to, and hold the last decision of those that have ended. Returns as `after_step`."""
        changed = moved = False
        for state in self.policies:
            if state in due:
                self.components.look()
                decision, settled = self._decide(state, optimizer)
                changed |= bool(decision.lost or decision.returned)
                moved |= settled
            elif state.ended:
                state.fate.hold(state.blocks, state.kept)
        if moved:
            self.components.survey(self.step)
        elif changed:
            self.components.count(self.step)
        return moved

    def _observe(self, state: PolicyState, step: int, scale: Tensor | None, of: GradientOf = own_gradient) -> None:
        if not state.observes(step):
            return
        self.take_in(state, step, scale, of, scoring=state.due(step))

    def take_in(
        self,
        state: PolicyState,
        step: int,
        scale: Tensor | None,
        of: GradientOf = own_gradient,
        *,
        scoring: bool = False,
    ) -> Observed:
        """Let a policy observe a step, or at step 0 a batch; say what was wrong with it, and return it."""
        seen: Observed = state.statistics.observe(scale, of, scoring=scoring, peers=self.peers)
        for key, message in seen.warnings(step):
            self.warn(key, message)
        return seen

    def _decide(self, state: PolicyState, optimizer: torch.optim.Optimizer | None) -> tuple[Decision, bool]:
        """Take one policy's decision, and carry it out. Returns its record, and whether tensors stopped or were resized."""
        assert state.times is not None
        action = state.policy.action
        standing = None if optimizer is None else action.proximal(state.blocks, state.times.share(self.step), optimizer)
        decided = state.decide(self.step, standing, seed_of(self.seed, self.step, state.index))
        if decided.skipped:
            self.warn("finite", f"gradients are not finite before step {self.step}: the statistics skip this step")
        verdict, before = decided.verdict, state.kept
        if verdict.told:
            self.warn(f"told by policy {state.index}", verdict.told)
        state.kept = verdict.kept
        action.apply(state.blocks, verdict.kept, optimizer)
        lost, returned = (state.names(units) for units in (before & ~verdict.kept, verdict.kept & ~before))
        settled = state.fate.settles(bool(lost), bool(returned))
        self.components.settle(changed=settled)
        seed = (self.seed + 1_000_003 * self.step + state.index) % 2**63
        fresh = self.components.renew(state, verdict, optimizer, seed)
        if self.step == state.times.last:
            state.end()
        decision = Decision(
            step=self.step,
            policy=state.index,
            budget=state.times.budget(self.step) if verdict.budget is None else verdict.budget,
            kept=int(state.kept.sum()),
            units=max(state.capacity, len(state.kept)),  # another policy may have added some
            threshold=decided.threshold,
            lost=lost,
            returned=returned,
            fresh=fresh,
            amount=state.policy.scheduler.amount,
            spent=(spent := state.cost(state.kept)),
            whole=max(state.costs.whole, spent),
        )
        self.history.append(decision)
        self.liveness.doubt(state.blocks, returned)
        return decision, settled or verdict.cut or bool(fresh)

    @torch.inference_mode(False)
    def compact(self, optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
        """Cut components that are masked and add nothing, once every policy has ended. Returns each layer's rank now.

        The parameters stay the same objects, and the optimizer's state is cut with them.
        """
        self.components.compact(optimizer)
        self.components.survey(self.step)
        return self.ranks.now()

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of all tensors that the loop remembers, by name."""
        return {name: tensor.clone() for state in self.policies for name, tensor in state.tensors().items()}

    saved = saving.saved
