"""The zeroth-order step: forwards at perturbed points, an estimate from their losses, one pass over the weights."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from ..checks import fail
from ..contract import CONTRACT
from .direction import Direction, Point
from .estimators import Estimator, TwoSided
from .exact import ExactProbe
from .groups import (
    RESTORES,
    Bucket,
    assign_streams,
    check_choice,
    check_groups,
    check_hyperparameters,
    check_param,
    devices_of,
    label_of,
    one_engine,
    plan,
    takes_part,
)
from .guards import GraphRng, RngState, is_capturing, uninterrupted
from .inplace import InplaceProbe
from .kept import KeptProbe, ShardProbe, any_sharded
from .loss import Losses
from .probe import Probe
from .rules import SGD, Rule
from .scratch import ScratchPool
from .state import DeviceState, HostState, check_capturable, check_capture, check_seed
from .subset import Subset
from .two_pass import TwoPass, check_two_pass
from .update import descent, gate, known_on_host, projected_gradient

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ..distributed import Exchange
    from ..offload.engine import Engine
    from ..trajectory import Follower


class Estimate(NamedTuple):
    """What the forwards of a step gave."""

    losses: Tensor  #: at the estimator's points
    gradients: list[Tensor]  #: g of each bucket, fp32 [q], all 0 unless ``finite``
    finite: Tensor
    skip: bool  #: whether the host knows that ``finite`` is false
    forwards: tuple[Tensor, ...] | Tensor = ()  #: the losses, those of the rule's trials included
    multiple: Tensor | None = (
        None  #: of the gradients, for the update: the rule's choice among its trials (fp32, 0-dim)
    )
    #: Groups whose parameters are on other stages of a pipeline alone, and their g.
    elsewhere: Sequence[tuple[dict[str, Any], Tensor]] = ()


class ZerothOrder(torch.optim.Optimizer):
    r"""An :class:`Estimator` makes sum_k g_k z_k of losses at perturbed weights, and a :class:`Rule` applies it.

    z_k is the noise of contract ``zk1``, a pure function of (seed, step, k, parameter), regenerated wherever it is
    needed: the optimizer stores a seed and a counter, and whatever state the rule keeps.

    Args:
        params: ``model.named_parameters()`` (recommended: noise then depends on names, not on order), parameters,
            or group dicts of either.  A group takes lr, eps, weight_decay, dist, rounding, clip and streams (a 56-bit
            id for each parameter).  Parameters with ``requires_grad=False`` are neither perturbed nor updated.
        lr: step size, in units of theta per unit of g; a number or a one-element tensor.  Read at every step; in a CUDA
            graph a number is a constant, and a tensor is read at each replay.
        eps: size of the perturbation, in units of theta.  A group with an eps of its own divides by that one.
        weight_decay: decoupled: theta shrinks by the factor 1 - lr * weight_decay at each step.
        seed: run seed, an integer in [-2^63, 2^64).  0 is a seed like any other.
        dist: "normal" or "rademacher".
        rounding: of the update, "stochastic" (bf16 and fp16 keep small updates on average; fp32 is not changed by it)
            or "nearest".
        restore: "exact": the weights do not move during the forwards; each torch function gets perturbed copies, and
            scratch is the size of the call with the most weights.  "inplace": the weights move from point to point
            and the update brings them back: no scratch, any kind of model, but half-precision weights drift.
        clip: bound on each \|g_k\|, in units of g: min(max(g, -clip), clip).  A g that is not finite still skips the
            step.
        capturable: the step counter and the seeds live on the device and no step needs the host, so that one whole step
            can be captured in a CUDA graph and replayed; see :meth:`register_graph`.
        direction: what z is (default: dense noise): a mask, factors of low rank, a scale (:class:`Direction`).
        subset: which parameters take part in a step (default: all): blocks in turn, layers at random.
        trajectory: path of a file that gets a record of every step (:func:`zokernels.trajectory.record`).
        resume: continue the run in ``trajectory``, where that file exists: the parameters, which hold the run's base
            weights, and this optimizer take the recorded steps before the constructor returns.
        mesh: the processes of the run, a ``torch.distributed`` DeviceMesh with dimensions "data" (each rank its own
            batches), "perturbation" (each rank its share of the step's forwards), "pipeline" (each rank its own
            parameters), or several of them; or an
            :class:`zokernels.distributed.Exchange` of one.  All ranks call :meth:`step` together.  docs/distributed.md.
        estimator, rule: what a subclass is made of.

    Raises:
        TypeError, ValueError: naming argument, what was expected and what came.
        HiddenParameters: (exact) the closure runs TorchScript or another graph that holds weights; they are untouched.

    See docs/optimizer.md.
    """

    #: Whether a log of seeds and coefficients (``trajectory``) is the whole run.
    replayable = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        dist: str = "normal",
        rounding: str = "stochastic",
        restore: str = "exact",
        *,
        clip: float | None = None,
        capturable: bool = False,
        direction: Direction | None = None,
        subset: Subset | None = None,
        trajectory: str | os.PathLike[str] | None = None,
        resume: bool = False,
        mesh: DeviceMesh | Exchange | None = None,
        estimator: Estimator,
        rule: Rule,
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "dist": dist,
            "rounding": rounding,
            "clip": clip,
            **rule.defaults,
        }
        self.rule = rule
        self._check_group(defaults)
        check_choice(self._op, "restore", restore, RESTORES)
        self.estimator, self.subset = estimator, subset
        self.direction = Direction() if direction is None else direction
        if capturable and (self.direction.refresh is not None or subset is not None):
            fail(self._op, "capturable", "False with a schedule that the host keeps (refresh, subset)", True)
        self._restore, self._skips_told = restore, 0
        self._told: set[str] = set()
        self._state = (DeviceState if capturable else HostState)(check_seed(self._op, seed))
        self._pool = ScratchPool()
        self._two_pass: TwoPass | None = None
        self._graph_rng: GraphRng | None = None
        self._engine: Engine | None = None  # where parameters are streamed
        self._recorder: Follower | None = None
        self._carried = False  # whether the step began with a perturbation of the two-pass form
        self._exchange: Exchange | None = None
        if mesh is not None:
            from ..distributed.exchange import exchange_of

            self._exchange = exchange_of(self, mesh)
        #: g of the last step (fp32, on the device; 0-dim for one direction, else [q]), of the first group's eps, clip.
        self.last_projected_gradient: Tensor | None = None
        #: What the last step returned.
        self.last_loss: Tensor | None = None
        #: The losses of the last step, in the order of the forwards: the estimator's points, the rule's trials.
        self.last_losses: tuple[Tensor, ...] | Tensor | None = None
        rule.check_parts(self)
        super().__init__(params, defaults)
        self._state.place(devices_of(self.param_groups))
        if self._engine:
            self._engine.attach(self, trajectory)
        if trajectory is not None:
            from ..trajectory import record

            record(self, trajectory, resume=resume)
        elif self._exchange:
            self._exchange.agreement.start(self)

    @property
    def _op(self) -> str:
        return type(self).__name__

    @property
    def seed(self) -> int:
        """Seed of the run; step t draws z with ``derive_seed(seed, t, 0)``."""
        return self._state.seed

    @property
    def step_count(self) -> int:
        """Steps taken, skipped ones included.  With ``capturable`` reading it waits for the device."""
        return self._state.step

    @property
    def skipped_steps(self) -> Tensor:
        """Steps skipped because a loss was not finite (int64, on the loss's device).  Reading warns of new ones."""
        self._warn_skipped()
        return self._state.skipped

    @property
    def trajectory(self) -> Follower | None:
        """The log that gets a record of every step; ``optimizer.trajectory.close()`` ends it."""
        return self._recorder

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank gave to collectives in the last step; 0 without a mesh."""
        return self._exchange.bytes_sent if self._exchange else 0

    def _check_group(self, group: dict[str, Any]) -> None:
        check_hyperparameters(self._op, group)
        self.rule.check(self._op, group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._name_empty(param_group)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "optimizer contains a parameter group with duplicate", UserWarning)
            super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            if len({id(p) for p in group["params"]}) != len(group["params"]):
                fail(self._op, "params", "each parameter once (tied ones are one parameter)", "a duplicate")
            for i, param in enumerate(group["params"]):
                if takes_part(group, param):
                    check_param(self._op, group, param, label_of(group, i))
            assign_streams(self._op, self.param_groups)
            self._engine = one_engine(self._op, self.param_groups)
            if self._exchange:
                self._exchange.agreement.expire()
        except BaseException:
            self.param_groups.pop()
            raise

    def _name_empty(self, param_group: dict[str, Any]) -> None:
        """Groups without parameters (on a stage of a pipeline) count as named where the others are; torch refuses a
        mixture."""
        params = param_group["params"]
        if isinstance(params, (Tensor, set)):
            return
        param_group["params"] = params = list(params)
        if any("param_names" in group for group in self.param_groups) and not params:
            param_group["param_names"] = []
        elif params and isinstance(params[0], tuple):
            for group in self.param_groups:
                if not group["params"]:
                    group["param_names"] = []

    # torch's annotations say that a step returns a float, and None without a closure.
    def step(self, closure: Callable[[], Tensor | float] | None = None) -> Tensor:  # type: ignore[override]
        """One step.  ``closure`` runs the forward and returns the scalar loss (a tensor or a number); it is called
        once for each of the estimator's points and the rule's trials, without gradients, each time from the same torch
        RNG state.

        Returns the estimator's loss (the mean, unless it says otherwise) on the losses' device; nothing in a step waits
        for a GPU.  If the closure raises, the weights are back at theta and the step does not count.  A loss that is
        not finite skips the update.
        """
        return self._step(closure, Losses())

    @torch.no_grad()
    def _step(
        self, closure: Callable[[], Any] | None, reading: Losses, use: Callable[..., object] | None = None
    ) -> Tensor:
        """``use``: what is done with the probe and the estimate in place of the update."""
        if not callable(closure):
            fail(self._op, "closure", "a function that runs the forward and returns the loss", repr(closure), TypeError)
        buckets = self._buckets()
        devices = list(dict.fromkeys(b.device for b in buckets))
        if capturing := is_capturing(devices):
            check_capture(self._op, self._state, self._graph_rng, buckets, devices)
        elif self._state.capturable and self._graph_rng is None:
            self._graph_rng = self._new_graph_rng(devices)  # a capture cannot make generators
        self._state.place(devices)
        rng = self._graph_rng if capturing else RngState(devices)
        assert rng is not None  # check_capture
        if self._exchange:
            self._exchange.begin(self)
        elif any_sharded(buckets):
            fail(self._op, "mesh", "a mesh with all ranks that share the weights", None)
        if self._recorder:
            self._recorder.begin(self)
        with self._probed(buckets, devices) as probe:
            around = map(rng.forward, itertools.count())

            counts = self._exchange.loss_of if self._exchange else lambda result: result
            forward = lambda: reading.read(self._op, counts(closure()), devices[0], capturing)

            def losses_at(points: Any) -> Tensor:
                # None: all of them; and those of coordinates are a stream.
                mine = self._exchange.share(len(points)) if self._exchange else None
                if self._engine:
                    with next(around):
                        results = probe.forwards(points if mine is None else [points[i] for i in mine], forward)
                else:
                    results = []
                    for i, of_buckets in enumerate(points):
                        if mine is not None and i not in mine:
                            probe.move(of_buckets)  # in place, each move rounds: all ranks make all of them
                            continue
                        with next(around), probe.at(of_buckets):
                            results.append(forward())
                if not self._exchange:
                    return reading.losses(results)
                return self._exchange.gather(reading.losses(results) if results else None, len(points), devices[0])

            estimate = self._estimate(probe.buckets, losses_at)
            with uninterrupted():
                (use or self._take)(probe, estimate)
        self._publish(estimate)
        self.last_loss = self.estimator.loss(estimate.losses)
        if not self._state.capturable and known_on_host(self._state.skipped):
            self._warn_skipped()
        return self.last_loss

    def _buckets(self) -> list[Bucket]:
        buckets = plan(self._op, self.param_groups)
        for group in self.param_groups:
            self.rule.check(self._op, group)
        return buckets if self.subset is None else self.subset.select(self, buckets)

    @contextmanager
    def _probed(self, buckets: list[Bucket], devices: list[torch.device]) -> Iterator[Probe]:
        """The probe of a step; the weights leave it unperturbed, or updated."""
        seeds = self._state.seeds(devices, self.estimator.directions)
        self.direction.prepare(self, buckets, seeds)
        with self._probe(buckets, seeds) as probe:
            self._carried = any(b.at for b in probe.buckets)
            if self._two_pass:
                self._two_pass.release()  # from here on the probe restores
            yield probe

    def _probe(self, buckets: list[Bucket], seeds: dict[torch.device, Tensor]) -> Probe:
        if self._engine:
            return self._engine.probe(self, buckets, seeds)
        if self._two_pass:
            key = (self._state.seed, self._state.step)
            return self._two_pass.take(key, buckets) or InplaceProbe(buckets, seeds, key)
        if any_sharded(buckets):
            return KeptProbe(buckets, seeds, self._pool) if self._restore == "exact" else ShardProbe(buckets, seeds)
        if self._restore == "exact":
            return ExactProbe(self._op, buckets, seeds, self._pool, self._told)
        return InplaceProbe(buckets, seeds)

    def _gradient(self, losses: Tensor, eps: float, clip: float | None) -> Tensor:
        return projected_gradient(self.estimator.coefficients(losses.double(), eps), clip)

    def _estimate(self, buckets: list[Bucket], losses_at: Callable[[Any], Tensor]) -> Estimate:
        """``losses_at``: runs the closure at each of some points, which are what :meth:`Probe.at` takes."""
        losses = losses_at([[b.point(k, sign) for b in buckets] for k, sign in self.estimator.points()])
        groups = [b.group for b in buckets]
        foreign = self._exchange.agreement.foreign(self, groups) if self._exchange else []
        scales = [(b.eps, b.group["clip"]) for b in buckets] + [(group["eps"], group["clip"]) for group in foreign]
        gradients, finite = gate([*groups, *foreign], [self._gradient(losses, *scale) for scale in scales])
        elsewhere = list(zip(foreign, gradients[len(groups) :], strict=True))
        estimate = Estimate(
            losses, gradients[: len(groups)], finite, self._skips(finite), tuple(losses), elsewhere=elsewhere
        )
        if not self.rule.trials:
            return estimate
        trials = losses_at(self._trial_points(buckets, estimate.gradients))
        multiple = self.rule.choose(trials.double()).to(losses.device, torch.float32)
        return estimate._replace(forwards=(*losses, *trials), multiple=multiple)

    def _publish(self, estimate: Estimate) -> None:
        first = self.param_groups[0]
        g = self._gradient(estimate.losses, first["eps"], first["clip"])
        g = g if estimate.multiple is None else estimate.multiple * g
        self.last_losses, self.last_projected_gradient = estimate.forwards, g if len(g) > 1 else g.reshape(())

    def _skips(self, finite: Tensor) -> bool:
        return not self._state.capturable and known_on_host(finite) and not finite

    def _trial_points(self, buckets: list[Bucket], gradients: list[Tensor]) -> list[list[Point]]:
        """Of each of the rule's trials, for each bucket."""
        steps = [descent(b.group, g).unbind() for b, g in zip(buckets, gradients, strict=True)]
        scaled = lambda step, multiple: {k: multiple * c for k, c in enumerate(step)} if multiple else {}
        return [[scaled(step, multiple) for step in steps] for multiple in self.rule.trials]

    def _take(self, probe: Probe, estimate: Estimate) -> None:
        self._update(probe, estimate)
        if self._recorder:
            self._recorder.append(self, probe.buckets, estimate)

    def _update(self, probe: Probe, estimate: Estimate) -> None:
        """The rule, bucket by bucket; in the two-pass form it adds the next step's +eps z as well."""
        buckets, finite, multiple = probe.buckets, estimate.finite, estimate.multiple
        scaled = lambda g: g if multiple is None else multiple * g
        if not (self.rule.restores and probe.says_where and all(b.direction.uniform for b in buckets)):
            probe.restore()
        self.rule.begin(self, probe, estimate)
        two_pass = self._two_pass
        following = two_pass and two_pass.following(probe, self._state)
        try:
            for i, (b, g) in enumerate(zip(buckets, estimate.gradients, strict=True)):
                if b.at or not estimate.skip:
                    self.rule.update(self, b, probe.seeds[b.device], scaled(g), finite)
                    b.at = {}
                if following:
                    following.buckets[i].at = b.point(0, 1)
        except BaseException:
            if following:
                following.restore()
            raise
        torch.clear_autocast_cache()  # casts of the old weights, where step() runs inside autocast
        self._state.advance(finite)
        if two_pass and following:
            two_pass.keep(following)

    @contextmanager
    def two_pass(self, *modules: nn.Module) -> Iterator[None]:
        """Inside, the update also adds the next step's perturbation: two passes over the weights a step, not three.

            theta'' = round(decay * theta' + (-lr * g - decay * at * eps) * z_t + eps * z_{t+1}),   at = -1

        One rounding a pass, so half-precision weights differ from those of the three-pass form.  Between steps the
        weights hold a perturbation; :meth:`flush` takes it out.  Leaving the context flushes, however it is left; so do
        this optimizer's ``state_dict``, a forward of any module with managed parameters, and ``state_dict`` and
        ``load_state_dict`` of ``modules``, which must own all trained parameters.  Whatever else reads weights
        (a tensor saved or averaged by itself, ``.to()``) calls :meth:`flush` first.  docs/optimizer.md has the list.

        Raises: ValueError without restore="inplace", with ``capturable``, with another estimator than two-sided with
        one direction, with another rule than SGD, where ``modules`` lack a trained parameter.
        """
        parts = (type(self.rule), type(self.direction), type(self.subset))
        if self.estimator != TwoSided(1) or parts != (SGD, Direction, type(None)):
            got = f"{self.estimator} with {', '.join(p.__name__ for p in parts)}"
            fail(self._op, "two_pass", "the two-sided estimator with one direction and SGD on dense noise", got)
        check_two_pass(self._op, self._restore, self._state, self._two_pass, self.param_groups, modules)
        with TwoPass(modules) as self._two_pass:
            try:
                yield
            finally:
                with uninterrupted():
                    self._two_pass.flush()
                    self._two_pass = None

    def flush(self) -> None:
        """Take the perturbation of a :meth:`two_pass` out of the weights; without one, nothing to do."""
        if self._two_pass:
            with uninterrupted():
                self._two_pass.flush()

    def register_graph(self, graph: torch.cuda.CUDAGraph) -> None:
        """Before the capture of a step that draws random numbers on the GPU (dropout): gives ``graph`` copies of
        each default CUDA generator as it stands, one for each forward: all see the same numbers at every replay.

        Replays do not move the default generator, and reseeding it does not reach them.
        """
        check_capturable(self._op, self._state)
        self._graph_rng = self._new_graph_rng(devices_of(self.param_groups))
        self._graph_rng.register(graph)

    def _new_graph_rng(self, devices: list[torch.device]) -> GraphRng:
        return GraphRng(self._op, devices, len(self.estimator.points()) + len(self.rule.trials))

    def _warn_skipped(self) -> None:
        if (count := int(self._state.skipped)) > self._skips_told:
            new, self._skips_told = count - self._skips_told, count
            text = f"{self._op}: {new} step(s) skipped: loss not finite; the weights did not change"
            warnings.warn(text, stacklevel=3)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with a third entry "zo" of plain numbers and lists: contract, seed, step, skipped steps, and what
        the rule keeps of each group."""
        self.flush()
        if self._recorder:
            self._recorder.flush()
        state = super().state_dict()
        self._warn_skipped()
        own = {"seed": self._state.seed, "step": self._state.step, "skipped_steps": int(self._state.skipped)}
        return {**state, "zo": {"contract": CONTRACT, **own, "rule": self.rule.state_dict()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue bit for bit from a :meth:`state_dict`, whose seed, step, hyper-parameters and streams replace ours.

        Raises ValueError, before anything changes, where it is not of this optimizer, contract or list of parameters.
        """
        zo, groups = state_dict.get("zo"), state_dict["param_groups"]
        if zo is None:
            fail(self._op, "state_dict", "an entry 'zo' (as zokernels.optim writes)", f"entries {sorted(state_dict)}")
        if zo["contract"] != CONTRACT:
            fail(self._op, "state_dict", f"noise contract {CONTRACT!r}", repr(zo["contract"]))
        check_groups(self._op, self.param_groups, groups)
        for group in groups:
            self.rule.check(self._op, group)
        self.rule.check_state_dict(self, zo["rule"])
        self.flush()
        rates, held = [g["lr"] for g in self.param_groups], {p: dict(state) for p, state in self.state.items()}
        super().load_state_dict(state_dict)
        self._load_tensors(state_dict, held if self._state.capturable else {})
        self.rule.load_state_dict(self, zo["rule"])
        for group, lr in zip(self.param_groups, rates, strict=True):
            if self._state.capturable and isinstance(lr, Tensor):  # a graph holds its address
                group["lr"] = lr.fill_(group["lr"])
        self._state.load(zo["seed"], zo["step"], zo["skipped_steps"])
        self._skips_told = zo["skipped_steps"]
        if self._exchange:
            self._exchange.agreement.expire()

    def _load_tensors(self, state_dict: dict[str, Any], held: dict[Tensor, dict[str, Any]]) -> None:
        """The states' bits and dtypes as they were saved: torch has cast them to their parameters' dtype.

        ``held``: the states until now, whose addresses a CUDA graph may hold: they are written in place.
        """
        params = [p for g in self.param_groups for p in g["params"]]
        indices = [i for g in state_dict["param_groups"] for i in g["params"]]
        for p, index in zip(params, indices, strict=True):
            loaded, ours = state_dict["state"].get(index, {}), held.get(p, {})
            for key, value in loaded.items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.detach().to(p.device, copy=True)
            for key, tensor in ours.items():
                if key in loaded and (tensor.shape, tensor.dtype) == (loaded[key].shape, loaded[key].dtype):
                    self.state[p][key] = tensor.copy_(loaded[key])
                elif key not in loaded and key in self.rule.states:
                    self.state[p][key] = tensor.fill_(self.rule.states[key])

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle; torch's own keeps only groups and state.  Scratch and graphs are not copied."""
        if self._exchange:
            fail(self._op, "mesh", "no copy: processes are not copied", "an optimizer on a mesh", RuntimeError)
        if self._two_pass and self._two_pass.pending:
            fail(self._op, "two_pass", "flush() before a copy", "weights that hold a perturbation", RuntimeError)
        keys = (
            "estimator",
            "rule",
            "direction",
            "subset",
            "_restore",
            "_state",
            "_skips_told",
            "_told",
            "last_projected_gradient",
            "last_loss",
            "last_losses",
        )
        none = ("_two_pass", "_graph_rng", "_recorder", "_exchange", "_engine")
        own = {k: self.__dict__[k] for k in keys} | dict.fromkeys(none)
        return {**super().__getstate__(), **own, "_pool": ScratchPool(), "_carried": False}
