"""What users make: a step that is joined with a log of its run, other processes, and streamed weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import ParamsT

from ..checks import fail
from ..distributed.exchange import Exchange, exchange_of
from ..ops.arguments import Dist, Rounding
from ..step.directions.direction import Direction
from ..step.estimators import Estimator
from ..step.groups import Restore
from ..step.loss import LossReader
from ..step.rules.rule import Rule
from ..step.step import StepOptimizer
from ..step.subset import Subset
from ..step.watch import warn_of_resolution
from ..trajectory.recorder import Follower
from ..trajectory.recording import record
from .arguments import Described
from .diagnosis import Diagnosis, diagnose
from .first_order import FirstOrder
from .lightning import check_accumulation


class ZerothOrder(StepOptimizer, metaclass=Described):
    """An :class:`Estimator` makes sum_k g_k z_k of losses at perturbed weights; a :class:`Rule` applies it.

    z_k is the noise of contract ``zk1``, a pure function of (seed, step, k, parameter).  It is drawn again
    wherever it is needed, so the optimizer stores only a seed and a counter, and whatever state the rule
    keeps.

    Args:
        params: ``model.named_parameters()`` (recommended: noise then depends on names, not on order),
            parameters, or group dicts of either.  A group takes lr, eps, weight_decay, dist, rounding, clip
            and streams (a 56-bit id for each parameter).  Parameters with ``requires_grad=False`` are neither
            perturbed nor updated.
        lr: step size, in units of theta per unit of g; a number or a one-element tensor.  It is read at every
            step.  In a CUDA graph a number is a constant, and a tensor is read at each replay.
        eps: size of the perturbation, in units of theta.  A group with an eps of its own divides by that one.
        weight_decay: decoupled: theta shrinks by the factor 1 - lr * weight_decay at each step.
        seed: run seed, an integer in [-2^63, 2^64).  0 is a seed like any other.
        dist: "normal" or "rademacher".
        rounding: how the update rounds, "stochastic" or "nearest".  With "stochastic" bf16 and fp16 weights
            keep small updates on average; fp32 is not changed by it.
        restore: where perturbed weights are during the forwards, "exact" (in copies), "inplace" or "products"
            (nowhere).  "exact": the weights do not move during the forwards.  Torch functions get perturbed
            copies, which are made for a block of parameters at a time.  "inplace": the weights move from
            point to point, and the update brings them back.  This needs no scratch and takes any kind of
            model, but half-precision weights drift.  "products", with a direction of low rank: the weights
            stay, and what a perturbation adds to a product is added to its result; see
            docs/populations.md.  Losses then differ from those of perturbed weights in their last bits.
        clip: bound on each |g_k|, in units of g: min(max(g, -clip), clip).  A g that is not finite still
            skips the step.
        capturable: keep the step counter and the seeds on the device, so that no step needs the host.  One
            whole step can then be captured in a CUDA graph and replayed; see :meth:`register_graph`.
        direction: what z is, by default dense noise: a mask, factors of low rank, a scale
            (:class:`Direction`).
        subset: which parameters take part in a step, by default all: blocks in turn, or layers at random.
        cohort: with "products", how many members of a population one forward of a batched step has
            (:meth:`step`); None: all of them, or as many as ``scratch`` has room for.
        scratch: with "exact", the bytes up to which parameters are perturbed together; by default 16 MiB on
            the CPU and 64 MiB on a GPU.  No bit depends on it.  The parameters of one torch function take
            what they take.  With "products", the bytes that activations and factors of a forward of several
            members may take, by what the first forwards of a run took: so many members it has at once.
        trajectory: path of a file that gets a record of every step (:func:`zokernels.trajectory.record`).
        resume: continue the run in ``trajectory``, where that file exists.  The parameters must hold the
            run's base weights; they and this optimizer take the recorded steps before the constructor
            returns.
        mesh: the processes of the run, a ``torch.distributed`` DeviceMesh with dimensions "data" (each rank
            its own batches), "perturbation" (each rank its share of the step's forwards), "pipeline" (each
            rank its own parameters), or several of them; or an :class:`zokernels.distributed.Exchange` of
            one.  All ranks call :meth:`step` together; see docs/distributed.md.
        first_order: an optimizer of torch for other parameters (a head, LoRA), or for some of the same, which
            takes a step with gradients in each step (:class:`FirstOrder`, docs/optimizer.md): both parts are
            measured at theta, and move after the last forward.  The closure then returns a tensor with a
            gradient.  A log holds the zeroth-order part alone, and says so.
        first_order_closure: what these gradients are of, for batches of their own; by default the step's
            closure.
        estimator, rule: the parts that a named class chooses.

    Raises:
        TypeError, ValueError: naming argument, what was expected and what came.
        HiddenParameters: with "exact", where the closure runs TorchScript or another graph that holds
            weights.  They have not changed.

    See docs/optimizer.md.
    """

    #: The names of arguments where the parts that a class makes of them have others.
    spelled: ClassVar[dict[str, str]] = {}
    #: The first-order optimizer that takes its steps with this one's; None: there is none.
    partner: FirstOrder | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        dist: Dist = "normal",
        rounding: Rounding = "stochastic",
        restore: Restore = "exact",
        *,
        clip: float | None = None,
        capturable: bool = False,
        direction: Direction | None = None,
        subset: Subset | None = None,
        scratch: int | None = None,
        cohort: int | None = None,
        trajectory: str | os.PathLike[str] | None = None,
        resume: bool = False,
        mesh: DeviceMesh | Exchange | None = None,
        first_order: torch.optim.Optimizer | None = None,
        first_order_closure: Callable[[], Tensor] | None = None,
        estimator: Estimator,
        rule: Rule,
    ) -> None:
        parts: dict[str, Any] = {
            "direction": direction,
            "subset": subset,
            "estimator": estimator,
            "rule": rule,
        }
        options = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "dist": dist,
            "rounding": rounding,
            "clip": clip,
        }
        super().__init__(
            params,
            options,
            seed=seed,
            restore=restore,
            capturable=capturable,
            scratch=scratch,
            cohort=cohort,
            **parts,
        )
        if mesh is not None:
            self.team = exchange_of(self, mesh)
        if first_order is not None:
            self.partner = FirstOrder(self, first_order, first_order_closure)
            self.part = True
            if self.partner.shares:
                self.replayable = False
                if trajectory is not None:
                    expected = "None where both optimizers move a parameter: its log would not be whole"
                    fail(self.op, "trajectory", expected, repr(trajectory))
        elif first_order_closure is not None:
            fail(self.op, "first_order_closure", "None without first_order", repr(first_order_closure))
        self.home.attach(self, trajectory)
        if trajectory is not None:
            record(self, trajectory, resume=resume)
        else:
            if resume:
                fail(self.op, "resume", "False without trajectory=, the log of the run that goes on", resume)
            self.team.join(self)
        self._warn_of_eps()

    def _warn_of_eps(self) -> None:
        warn_of_resolution(self, self.warned)

    def _run_batched(self, closure: Any) -> Tensor:
        if self.partner is not None:
            expected = "False with first_order: backward takes a forward of its own"
            fail(self.op, "batched", expected, True)
        return super()._run_batched(closure)

    def run_step(self, closure: Any, reader: LossReader, consume: Any = None) -> Tensor:
        try:
            if not self._stepper:  # a step inside another one is none
                self.team.enter(self)
            check_accumulation(self.op, closure)
            if self.partner is None or not callable(closure):
                return super().run_step(closure, reader, consume)
            try:
                self.partner.measure(closure)
                return super().run_step(closure, reader, self.partner.consume(consume or self._finish))
            finally:
                self.partner.clear()
        except Exception as error:
            self.team.failed(self, error)
            raise

    def diagnose(
        self,
        closure: Callable[..., Any],
        *,
        batches: Sequence[Any] | None = None,
        directions: int = 8,
        model: nn.Module | None = None,
    ) -> Diagnosis:
        """Measures whether a step can see anything: how |L+ - L-| stands to what would drown it.

        That is the distance between neighbouring numbers of the loss's dtype, what is rounded on the way to
        the loss, and how differences vary from batch to batch.  ``print`` of what it returns says what eps,
        batch or dtype would mend.

        It takes two forwards at theta, 10 for each of ``directions``, and 6 more for each of them where
        batches differ; all from one state of torch's random numbers.  Afterwards weights, state, step and
        random numbers are what they were, bit for bit.

        Args:
            closure: as for :meth:`step`; with ``batches`` a function of a batch that returns the loss.
            batches: some batches, of which four are compared.  Without it the closure has its own data.
            directions: how many of this optimizer's directions are measured (dense noise where its rule
                shapes them).
            model: its buffers are put back, too (BatchNorm).

        Example::

            print(opt.diagnose(lambda batch: model(**batch).loss, batches=list(islice(loader, 4))))
        """
        return diagnose(self, closure, batches, directions, model)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return (
            state if self.partner is None else {**state, "first_order": self.partner.optimizer.state_dict()}
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.partner is not None and "first_order" not in state_dict:
            got = f"entries {sorted(state_dict)}"
            fail(self.op, "state_dict", "an entry 'first_order', as this optimizer has one", got)
        if self.partner is None:
            super().load_state_dict(state_dict)
            return
        other = self.partner.optimizer
        held = other.state_dict()
        other.load_state_dict(state_dict["first_order"])  # it raises before it changes anything
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            other.load_state_dict(held)
            raise

    def __getstate__(self) -> dict[str, Any]:
        if self.partner is not None:
            expected = "no copy: state_dict holds both parts"
            fail(self.op, "first_order", expected, "an optimizer with another beside it", RuntimeError)
        return super().__getstate__()

    @property
    def trajectory(self) -> Follower | None:
        """The log that gets a record of every step; ``optimizer.trajectory.close()`` ends it."""
        return self.log if isinstance(self.log, Follower) else None
