"""The step: forwards at perturbed points, an estimate from their losses, one pass over the weights."""

from __future__ import annotations

import functools
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import ParamsT

from ..checks import check_choice, check_integer, fail, named_arguments
from ..ops.low_rank_linear import MAX_RANK
from ..transfer import known_on_host
from . import groups
from .checkpoint import Held, check_state_dict, from_groups, own_state, with_own_state
from .cohort import Cohort, CohortReader, members_within
from .description import brief, check_parts, describe
from .directions.direction import Direction
from .directions.low_rank import LowRank
from .estimators import Estimator, TwoSided
from .graphs import GraphRng, check_capturable, check_capture
from .guards import OwnProcess, RngState, ThreadState, check_transforms, is_capturing, uninterrupted
from .loss import LossReader, run_closure, type_of
from .probes.blocks import Blocks
from .probes.exact import ExactProbe, TangentProbe
from .probes.inplace import InplaceProbe
from .probes.probe import Probe
from .probes.products import Learned, ProductProbe, neighbours
from .probes.sharded import CopiedShardProbe, MovedShardProbe
from .roles import MEMORY, Log, Team, common_home
from .rules.rule import Rule
from .rules.sgd import SGD
from .scalars import NO, descent, gate, projected_gradient
from .scratch import ScratchPool
from .state import DeviceState, HostState, check_seed
from .subset import Subset
from .two_pass import ThreePass, TwoPass, check_two_pass
from .types import Bucket, Estimate, LossesAt, Point, Seeds
from .unfinished import Update
from .watch import Watch

#: What a group has that says nothing else.
GROUP_DEFAULTS = {"eps": 1e-3, "weight_decay": 0.0, "dist": "normal", "rounding": "stochastic", "clip": None}


def _is_followed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a profiler runs, or a hook of steps is registered, of ``optimizer`` or of all optimizers."""
    return bool(
        profiler._is_profiler_enabled
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )


class StepOptimizer(torch.optim.Optimizer):
    """The step alone: an optimizer without a log, other processes or streamed weights.

    :class:`zokernels.optim.ZerothOrder` adds these three, and says what the arguments mean.  Some methods
    here are not for users, but for the folders that build on the step: they replay it, share it out, or
    stream its weights.

    Args:
        defaults: the hyper-parameters of groups that do not have their own: lr, and those of
            :data:`GROUP_DEFAULTS`.
    """

    #: True if a log of seeds and coefficients (``trajectory``) is the whole run.
    replayable = True
    #: True if a step on some of the parameters (a stage of a pipeline) is a part of the step on all of them.
    staged = True
    #: True if the run also trains weights that no log of this optimizer holds.
    part = False
    #: True if forwards are at theta, of dual numbers whose tangents are the directions.
    tangents = False
    #: Whether a CUDA graph is being captured, on any of the devices given.
    is_capturing = staticmethod(is_capturing)

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        seed: int,
        restore: str,
        capturable: bool = False,
        direction: Direction | None = None,
        subset: Subset | None = None,
        scratch: int | None = None,
        cohort: int | None = None,
        estimator: Estimator,
        rule: Rule,
    ) -> None:
        self.rule = rule
        check_choice(self.op, "restore", restore, groups.RESTORES)
        direction = Direction() if direction is None else direction
        check_parts(self.op, estimator=estimator, direction=direction, rule=rule, subset=subset)
        self.estimator, self.subset, self.restore = estimator, subset, restore
        self.direction = direction
        defaults = {**GROUP_DEFAULTS, **defaults, **rule.defaults}
        self._check_group(defaults)
        if capturable and (self.direction.refresh is not None or subset is not None):
            fail(self.op, "capturable", "False with a schedule that the host keeps (refresh, subset)", True)
        if restore == "products":
            self._check_products(capturable)
        if cohort is not None:
            check_integer(self.op, "cohort", cohort)
        self.cohort = cohort
        self.run_state = (DeviceState if capturable else HostState)(check_seed(self.op, seed))
        self.warned: set[str] = set()
        if scratch is not None:
            check_integer(self.op, "scratch", scratch, 0)
        self.block_bytes = scratch
        self._begin_alone()
        #: g of the last step, with the eps and clip of the first group: fp32, on the device, 0-dim for one
        #: direction, else [q].
        self.last_projected_gradient: Tensor | None = None
        #: What the last step returned.
        self.last_loss: Tensor | None = None
        #: The losses of the last step, in the order of the forwards: the estimator's points, then the rule's
        #: trials.
        self.last_losses: tuple[Tensor, ...] | Tensor | None = None
        rule.check_parts(self)
        params = groups.listed(self.op, params)
        super().__init__(params, defaults)
        self.run_state.place(groups.devices_of(self.param_groups))

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """``func``, a ``step``, as torch wraps it: with hooks, and a label for profilers.

        The label is a custom object of TorchScript and two calls of operators, which take longer than all
        forwards of a small model.  So where no profiler and no hook would see the wrapper, it is left out.
        """
        hooked = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: StepOptimizer, *args: Any, **kwargs: Any) -> Any:
            return (hooked if _is_followed(self) else func)(self, *args, **kwargs)

        return step

    def _begin_alone(self) -> None:
        """Sets what neither a copy nor a pickle takes along: the surroundings, scratch and graphs."""
        self.team, self.log, self.passes = Team(), Log(), ThreePass()
        self.scratch, self.planner = ScratchPool(), groups.Planner()
        self.blocks = Blocks(self.block_bytes)
        self.cache: dict[Any, Any] = {}
        self.graph_rng: GraphRng | None = None
        self.carried = False
        self._process, self._stepper = OwnProcess(), 0  # the thread that steps
        self._unfinished: Update | None = None  #: an update that has begun
        self._open: Probe | None = None  #: of the step that runs, or that was left without its end
        #: torch.Generator objects that the closure draws from, and which are set back before each further
        #: forward of a step, as torch's default generators are.  A copy of the optimizer has none.
        self.generators: Sequence[torch.Generator] = ()
        self.learned = Learned()
        self._reader: CohortReader | None = None
        self._points_kept: tuple[Any, Any, list[list[Point]]] = (None, None, [])  # of the last buckets
        self.watch = Watch(self.op, self.warned)

    def _check_products(self, capturable: bool) -> None:
        direction = self.direction
        if not isinstance(direction, LowRank) or direction.rank > MAX_RANK:
            expected = f"a direction of low rank, of at most {MAX_RANK}, with 'products'"
            expected += " (as LOZO and EGGROLL have it)"
            fail(self.op, "restore", expected, brief(direction))
        if capturable:
            fail(self.op, "restore", "'exact' or 'inplace' with capturable", "'products'")

    @functools.cached_property
    def op(self) -> str:
        """The class's name, for error messages.

        A bare step is what replays the log of a :class:`ZerothOrder`, and has its name.
        """
        return "ZerothOrder" if type(self) is StepOptimizer else type(self).__name__

    @property
    def seed(self) -> int:
        """The seed of the run.  Step t draws z_k with ``derive_seed(seed, t, k)``."""
        return self.run_state.seed

    @property
    def step_count(self) -> int:
        """The number of steps taken, skipped ones included.

        With ``capturable`` reading it waits for the device.
        """
        return self.run_state.step

    @property
    def skipped_steps(self) -> Tensor:
        """The number of steps skipped because a loss was not finite: int64, on the loss's device.

        Reading it warns of new ones.
        """
        self._warn_skipped()
        return self.run_state.skipped

    @property
    def bytes_sent(self) -> int:
        """The bytes that this rank gave to collectives in the last step; 0 without a mesh."""
        return self.team.bytes_sent

    @property
    def in_two_pass(self) -> bool:
        """Whether updates add the next step's perturbation (:meth:`two_pass`)."""
        return self.passes.in_two_pass

    @property
    def is_half_updated(self) -> bool:
        """Whether an exception has left a part of an update, of which it is not known how it is finished."""
        return self._unfinished is not None or (self._open is not None and self._open.lost)

    @property
    def most_points(self) -> int:
        """How many points a step has at most: as many ranks can share them."""
        return len(self.estimator.points())

    @property
    def own_settings(self) -> dict[str, Any]:
        """What the class keeps beside its parts and groups; all ranks of a mesh must have the same."""
        return {}

    def _check_group(self, group: dict[str, Any]) -> None:
        groups.check_hyperparameters(self.op, group)
        self.rule.check(self.op, group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, which is copied: what the caller has stays as it is."""
        if isinstance(param_group, dict):  # torch refuses anything else
            param_group = dict(param_group)
            groups.check_keys(self.op, param_group, self.defaults)
        groups.name_empty_groups(self.param_groups, param_group)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "optimizer contains a parameter group with duplicate", UserWarning
            )
            super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            groups.check_new_group(self.op, self.param_groups)
            self.home = common_home(self.op, self.param_groups)
            self.team.changed()
        except BaseException:
            self.param_groups.pop()
            raise

    def __repr__(self) -> str:
        return describe(self)

    # One step -----------------------------------------------------------------------------------------------

    # torch's annotations say that a step returns a float, and None without a closure.
    @named_arguments
    def step(  # type: ignore[override]
        self, closure: Callable[..., Any] | None = None, *, batched: bool = False
    ) -> Tensor:
        """Takes one step.

        ``closure`` runs the forward and returns the scalar loss, a tensor or a number.  It is called once for
        each of the estimator's points and the rule's trials, without gradients, each time from the same torch
        RNG state (and from the same states of :attr:`generators`).

        Returns the estimator's loss (the mean, unless it says otherwise) on the losses' device.  Nothing in a
        step waits for a GPU.  If the closure raises, the weights are back at theta and the step does not
        count.  A loss that is not finite skips the update.

        ``batched`` (with restore="products"): the closure runs once for many members of the step's
        population, which are its points.  It gets a :class:`Cohort`, and returns a loss of each member,
        [len(cohort)]::

            def closure(cohort):
                losses = per_example_loss(model(cohort.repeat(inputs)), cohort.repeat(targets))
                return cohort.mean(losses)

        Before the first such step of an optimizer the closure runs twice more, for one member and for two:
        what a forward of many members cannot perturb is found there, and then members run one by one, which a
        warning says.  Members of one forward draw the same random numbers only where these do not depend on
        the row: dropout differs from member to member.

        Without a closure and with every lr 0, as ``torch.distributed.checkpoint`` calls it so that an
        optimizer makes its state, nothing happens."""
        if closure is None and not any(isinstance(g["lr"], Tensor) or g["lr"] for g in self.param_groups):
            return torch.zeros(())
        return self._run_batched(closure) if batched else self.run_step(closure, LossReader())

    def _run_batched(self, closure: Callable[[Cohort], Any] | None) -> Tensor:
        if self.restore != "products":
            fail(self.op, "batched", "restore='products'", repr(self.restore))
        if not callable(closure):
            expected = "a function of a Cohort that runs the forward and returns the losses"
            fail(self.op, "closure", expected, repr(closure), TypeError)
        self._reader = CohortReader(self.op, closure)
        try:
            if self.learned.size is None:
                self._look()
            return self.run_step(self._reader.run, self._reader)
        finally:
            self._reader = None

    @torch.no_grad()
    def _look(self) -> None:
        """The first forwards of a batched run, which say how many members a forward may have."""
        buckets = self.plan()
        rng = RngState(list(dict.fromkeys(b.device for b in buckets)))
        points = [[b.point(k, sign) for b in buckets] for k, sign in self.estimator.points()]
        try:
            with self.probed(buckets) as probe:
                assert isinstance(probe, ProductProbe)
                reason, one, two = probe.look(points, map(rng.forward, itertools.count()))
        finally:
            rng.restore()
        size = len(points) if self.cohort is None else self.cohort
        if self.block_bytes is not None and reason is None and size > 1:
            together = neighbours([k for k, _ in self.estimator.points()])
            size = min(size, members_within(self.block_bytes, one, two, len(points), together))
            if one > self.block_bytes:
                reason = f"a forward of one takes {one:,} bytes of the {self.block_bytes:,} of scratch"
        if reason is not None and len(points) > 1 and self.cohort != 1:
            size = 1
            warnings.warn(f"{self.op}: members run one by one: {reason}", stacklevel=5)
        self.learned.size = size

    @property
    def members_at_once(self) -> int:
        """How many members a forward has; 0 unless steps are batched."""
        return self.learned.size or 0

    def run_step(
        self,
        closure: Callable[[], Any] | None,
        reader: LossReader,
        consume: Callable[[Probe, Estimate], object] | None = None,
    ) -> Tensor:
        """Takes one step, in which ``reader`` reads the closure's results.

        ``consume(probe, estimate)``: called instead of the update; AsyncExchange publishes the estimate with
        it.
        """
        if not callable(closure):
            expected = "a function that runs the forward and returns the loss (a lambda, for example)"
            got = type_of(closure)
            if closure is None:
                got += ", as loops with gradients call a step (of a transformers.Trainer: take ZOTrainer)"
            fail(self.op, "closure", expected, got, TypeError)
        self._process.check(self.op, "step")
        check_transforms(self.op)
        if self._stepper:
            got = "one inside the closure of another step of this optimizer, or in another thread"
            fail(self.op, "step", "one step at a time", got, RuntimeError)
        grad = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)
            loss = self._run_alone(closure, reader, consume or self._finish)
        finally:
            self._stepper = 0  # again: what raises there may have kept the first one from being reached
            torch._C._set_grad_enabled(grad)
        if not self.run_state.capturable and known_on_host(self.run_state.skipped):
            self._warn_skipped()
        return loss

    def _run_alone(
        self, closure: Callable[[], Any], reader: LossReader, consume: Callable[[Probe, Estimate], object]
    ) -> Tensor:
        state, hold = ThreadState(), uninterrupted()
        try:
            self._stepper = threading.get_ident()
            if self._unfinished is not None or self._open is not None:
                self._settle()
            with hold:  # signals are delivered inside the closure, and when all is done
                result = functools.partial(hold.call, functools.partial(run_closure, self.op, closure))
                return self._run_held(result, reader, consume)
        except BaseException:
            state.restore()
            # where another thread's exception has kept the rest of the step from doing it
            try:
                self._settle(at_once=True)
            finally:
                hold.__exit__()
            raise
        finally:
            self._stepper = 0

    def _run_held(
        self, closure: Callable[[], Any], reader: LossReader, consume: Callable[[Probe, Estimate], object]
    ) -> Tensor:
        buckets = self.plan()
        devices = list(dict.fromkeys([b.device for b in buckets]))
        capturing = self.is_capturing(devices)
        rng = self._rng(buckets, devices, capturing)
        watch = self.watch
        if looking := watch.is_looking and isinstance(rng, RngState):
            watch.begin(rng.cpu)
        self.run_state.place(devices)
        self.team.begin(self, buckets)
        self.log.begin(self)
        with self._probe(buckets) as probe:
            self._take(probe)
            same_rng = map(rng.forward, itertools.count())

            run = (lambda: watch.forward(closure)) if looking else closure

            def forward() -> Any:
                result = self.team.loss_of(run())
                watch.result(result)
                return reader.read(self.op, result, devices[0], capturing)

            own: list[Tensor | None] = []  # of this process, for each call of losses_at

            def take() -> Estimate:
                asked = itertools.count()

                def losses_at(points: Any, count: int) -> Tensor:
                    if (turn := next(asked)) == len(own):
                        results = probe.forwards(points, self.team.share(count), same_rng, forward)
                        own.append(reader.losses(results) if results else None)
                    return self.team.gather(own[turn], count, devices[0])

                self.team.rewind()
                estimate = self.estimate(probe.buckets, losses_at)
                if looking:
                    watch.end()
                if not self.run_state.capturable:
                    watch.gradients(estimate.raw.values())
                consume(probe, estimate)
                return estimate

            step = None if self.run_state.capturable else self.run_state.step
            try:
                estimate = take()
            except BaseException:
                if self.team.is_decided and self.run_state.step == step and self._unfinished is None:
                    with suppress(Exception):  # the caller gets the first one
                        take()  # as the others do
                raise
        self._open = None
        self.publish(estimate)
        self.last_loss = self.estimator.loss(estimate.losses)
        return self.last_loss

    def _finish(self, probe: Probe, estimate: Estimate) -> None:
        try:
            # first: a step that cannot be recorded does not happen
            self.log.append(self, probe.buckets, estimate)
            self.update(probe, estimate)
        except BaseException:
            if self._unfinished is None:
                self.log.retract(self)
            else:
                self._settle_update(at_once=True)
            raise

    def plan(self) -> list[Bucket]:
        """The buckets of the next step.  Raises where the groups would make it fail."""
        buckets = self.planner.plan(self.op, self.param_groups, self.home, self.rule.check)
        return buckets if self.subset is None else self.subset.select(self, buckets)

    @contextmanager
    def probed(self, buckets: list[Bucket]) -> Iterator[Probe]:
        """The probe of a step, as a context.  The weights leave it unperturbed, or updated."""
        with self._probe(buckets) as probe:
            self._take(probe)
            yield probe
        self._open = None

    def _probe(self, buckets: list[Bucket]) -> Probe:
        seeds = self.run_state.seeds(dict.fromkeys([b.device for b in buckets]), self.estimator.directions)
        self.direction.prepare(self, buckets, seeds)
        return self.home.probe(self, buckets, seeds)

    def _take(self, probe: Probe) -> None:
        self.carried = any([b.at for b in probe.buckets])
        self._open = probe
        self.passes.release()  # from here on the probe restores

    def own_probe(self, buckets: list[Bucket], seeds: Seeds) -> Probe:
        """How the closure sees parameters that are in memory."""
        if (probe := self.passes.probe(self.run_state, buckets, seeds)) is not None:
            return probe
        if self.restore == "products":
            shared = (self.blocks, self.warned, self.learned)
            return ProductProbe(self.op, buckets, seeds, *shared, self._reader)
        exact = self.restore == "exact"
        if any([b.is_sharded for b in buckets]):
            if self.tangents:
                expected = "plain tensors: a tangent is handed to each function"
                fail(self.op, "params", expected, "a DTensor", TypeError)
            return (
                CopiedShardProbe(buckets, seeds, self.scratch) if exact else MovedShardProbe(buckets, seeds)
            )
        return self.exact_probe(buckets, seeds) if exact else InplaceProbe(buckets, seeds)

    def exact_probe(self, buckets: list[Bucket], seeds: Seeds, shared: bool = False) -> ExactProbe:
        kind = TangentProbe if self.tangents else ExactProbe
        return kind(self.op, buckets, seeds, self.scratch, self.blocks, self.warned, shared)

    def estimate(self, buckets: list[Bucket], losses_at: LossesAt) -> Estimate:
        """g of every bucket from the losses at the estimator's points; then the rule's choice of a trial."""
        points = self._points_of(buckets)
        losses = losses_at(points, len(points))
        here = [b.group for b in buckets]
        foreign = self.team.foreign(self, here)
        scales = [(b.eps, b.group["clip"]) for b in buckets]
        if foreign:
            scales += [(group["eps"], group["clip"]) for group in foreign]
        raw = {scale: self._gradient(losses, *scale) for scale in dict.fromkeys(scales)}
        reads = not self.run_state.capturable
        gradients, finite = gate([*here, *foreign], [raw[scale] for scale in scales], reads=reads)
        elsewhere = list(zip(foreign, gradients[len(here) :], strict=True))
        gradients = gradients[: len(here)]
        estimate = Estimate(
            losses, gradients, finite, finite is NO, losses.unbind(), elsewhere=elsewhere, raw=raw
        )
        if not self.rule.trials:
            return estimate
        points = self.trial_points(buckets, estimate.gradients)
        trials = losses_at(points, len(points))
        multiple = self.rule.choose(trials.double()).to(losses.device, torch.float32)
        return estimate._replace(forwards=(*losses, *trials), multiple=multiple)

    def _points_of(self, buckets: list[Bucket]) -> list[list[Point]]:
        """The estimator's points, of each bucket."""
        known, estimator, points = self._points_kept
        if known is not buckets or estimator is not self.estimator:
            points = [[b.point(k, sign) for b in buckets] for k, sign in self.estimator.points()]
            self._points_kept = buckets, self.estimator, points
        return points

    def _gradient(self, losses: Tensor, eps: float, clip: float | None) -> Tensor:
        return projected_gradient(self.estimator.coefficients(losses.double(), float(eps)), clip)

    def trial_points(self, buckets: list[Bucket], gradients: list[Tensor]) -> list[list[Point]]:
        """For each of the rule's trials, the point of each bucket."""
        steps = [descent(b.group, g).unbind() for b, g in zip(buckets, gradients, strict=True)]
        scaled = lambda step, multiple: {k: multiple * c for k, c in enumerate(step)} if multiple else {}
        return [[scaled(step, multiple) for step in steps] for multiple in self.rule.trials]

    def update(self, probe: Probe, estimate: Estimate) -> None:
        """Applies the rule, bucket by bucket; in the two-pass form this adds the next step's +eps z, too."""
        probe.restore_before_update(self.rule.folds_restore)
        self._unfinished = Update(self, probe, estimate)
        self._unfinished.run()
        self._unfinished = None

    def _settle(self, at_once: bool = False) -> None:
        """Finishes what an exception has left of the last step, or takes it back.

        ``at_once``: while that exception is on its way.

        Raises RuntimeError where that is not known: where what a rule keeps, or a bucket that takes several
        calls, has a part of its update, and where a move in place was left half-way.
        """
        self._settle_update(at_once)
        if (probe := self._open) is not None and not (at_once and (probe.lost or self._unfinished)):
            probe.mend()
            self._open = None

    def _settle_update(self, at_once: bool) -> None:
        if (update := self._unfinished) is not None:
            if update.has_happened:
                pass
            elif update.is_untouched:
                self.log.retract(self)
            elif at_once:
                if not update.can_go_on:
                    return
                try:
                    update.run()
                except Exception:  # what fails again is left to the next use, which raises its error
                    return
            elif update.can_go_on:
                update.run()
            else:
                expected = "weights that no exception has left half updated (load a checkpoint)"
                fail(self.op, "step", expected, f"those of step {self.step_count}", RuntimeError)
            self._unfinished = None

    def publish(self, estimate: Estimate) -> None:
        """Sets ``last_losses`` and ``last_projected_gradient`` from the estimate of a step."""
        first = self.param_groups[0]
        scale = first["eps"], first["clip"]
        g = estimate.raw[scale] if scale in estimate.raw else self._gradient(estimate.losses, *scale)
        g = g if estimate.multiple is None else estimate.multiple * g
        self.last_losses, self.last_projected_gradient = (
            estimate.forwards,
            g if g.numel() > 1 else g.reshape(()),
        )

    def _warn_skipped(self) -> None:
        self.watch.read()
        if new := self.run_state.new_skips():
            text = f"{self.op}: {new} step(s) skipped: loss not finite; the weights did not change"
            warnings.warn(text, stacklevel=3)

    # Two-pass form ------------------------------------------------------------------------------------------

    @contextmanager
    def two_pass(self, *modules: nn.Module) -> Iterator[None]:
        """Inside, the update also adds the next step's perturbation: two passes a step, not three.

            theta'' = round(decay * theta' + (-lr * g - decay * at * eps) * z_t + eps * z_{t+1}),   at = -1

        There is one rounding a pass, so half-precision weights differ from those of the three-pass form.

        Between steps the weights hold a perturbation, which :meth:`flush` takes out.  Leaving the context
        flushes, however it is left.  So do this optimizer's ``state_dict``, a forward of any module with
        managed parameters, and ``state_dict`` and ``load_state_dict`` of ``modules``, which must own all
        trained parameters.  Whatever else reads weights (a tensor saved or averaged by itself, ``.to()``)
        must call :meth:`flush` first.  docs/optimizer.md has the list.

        Raises: ValueError without restore="inplace", with ``capturable``, with another estimator than
        two-sided with one direction, with another rule than SGD, and where ``modules`` lack a trained
        parameter.
        """
        parts = (type(self.rule), type(self.direction), type(self.subset))
        if self.estimator != TwoSided(1) or parts != (SGD, Direction, type(None)):
            got = f"{self.estimator} with {', '.join(p.__name__ for p in parts)}"
            fail(
                self.op, "two_pass", "the two-sided estimator with one direction and SGD on dense noise", got
            )
        check_two_pass(self, modules)
        self.flush()
        passes, after = TwoPass(modules), ThreePass()
        try:
            with passes:
                try:
                    self.passes = passes
                    yield
                finally:
                    try:
                        with uninterrupted():
                            passes.flush()
                    finally:
                        if passes.pending is not None and passes.pending.lost:
                            self._open = passes.pending  # which the next use tells
                        else:
                            passes.flush()  # what another thread's exception has left to be moved
                        self.passes = after
        finally:
            self.passes = after  # again: an exception may have kept the first one from being reached

    def flush(self) -> None:
        """Takes the perturbation of a :meth:`two_pass` out of the weights; without one it does nothing."""
        if self.passes.pending:
            with uninterrupted():
                self.passes.flush()

    # CUDA graphs --------------------------------------------------------------------------------------------

    def register_graph(self, graph: torch.cuda.CUDAGraph) -> None:
        """To be called before the capture of a step that draws random numbers on the GPU (dropout).

        It gives ``graph`` copies of each default CUDA generator, one for each forward, so that all forwards
        see the same numbers at every replay.  Replays do not move the default generator, and reseeding it
        does not reach them.
        """
        check_capturable(self.op, self.run_state)
        self.graph_rng = self._new_graph_rng(groups.devices_of(self.param_groups))
        self.graph_rng.register(graph)

    def _new_graph_rng(self, devices: list[torch.device]) -> GraphRng:
        return GraphRng(self.op, devices, len(self.estimator.points()) + len(self.rule.trials))

    def _rng(
        self, buckets: list[Bucket], devices: list[torch.device], capturing: bool
    ) -> RngState | GraphRng:
        """What gives all forwards of a step the same random numbers."""
        if capturing:
            return check_capture(self.op, self.run_state, self.graph_rng, buckets, devices)
        if self.run_state.capturable and self.graph_rng is None:
            self.graph_rng = self._new_graph_rng(devices)  # a capture cannot make generators
        return RngState(devices, self.generators)

    # Checkpoints and copies ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's state_dict, with a third entry "zo" of plain numbers and lists.

        It holds the contract, the seed, the step, the skipped steps, and what the rule keeps of each group.
        """
        self.flush()
        self._settle()
        self.log.flush()
        with groups.without_strangers(self.state, self.param_groups):
            state = super().state_dict()
        self.home.fill_states(state)
        self._warn_skipped()
        return with_own_state(state, own_state(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues bit for bit from a :meth:`state_dict`, with its seed, step, hyper-parameters and streams.

        Raises ValueError, before anything changes, where it is of another optimizer, contract or list of
        parameters.
        """
        state_dict = from_groups(self.op, state_dict)
        check_state_dict(self, state_dict)
        self.home.check_load(self.op, state_dict)
        self.passes.drop_lost()
        self.flush()
        if self._unfinished is not None:
            self.log.retract(self)
        self._unfinished = self._open = None
        held, here = Held(self), self.home.without_states(self, state_dict)
        super().load_state_dict(here)
        held.load(here)
        self.home.load_states(self, state_dict)
        self.team.changed()

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle, where torch's own keeps only groups and state."""
        if not self.team.alone:
            fail(self.op, "mesh", "no copy: processes are not copied", "an optimizer on a mesh", RuntimeError)
        if self.passes.pending:
            fail(
                self.op, "two_pass", "flush() before a copy", "weights that hold a perturbation", RuntimeError
            )
        keys = ("estimator", "rule", "direction", "subset", "restore", "cohort", "run_state", "warned")
        last = ("last_projected_gradient", "last_loss", "last_losses")
        return {
            **super().__getstate__(),
            **{key: self.__dict__[key] for key in (*keys, "block_bytes", *last)},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "team" not in self.__dict__:  # torch calls this from load_state_dict, too
            self._begin_alone()
            self.home = MEMORY
