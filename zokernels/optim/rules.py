"""Update rules: what is done with the gradient estimate sum_k g_k z_k."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..checks import fail
from ..transfer import to_device
from .groups import Bucket, check_number
from .guards import is_capturing
from .shard import full_like, local_of
from .update import decay_of, gated_decay, is_zero, learning_rate

if TYPE_CHECKING:
    from .optimizer import Estimate, ZerothOrder
    from .probe import Probe


def check_betas(op: str, betas: object) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        fail(op, "betas", "two numbers", repr(betas), TypeError)
    for i, beta in enumerate(betas):
        check_fraction(op, f"betas[{i}]", beta)


def check_fraction(op: str, argument: str, value: Any) -> None:
    check_number(op, argument, value)
    if value >= 1:
        fail(op, argument, "a number in [0, 1)", value)


def groups_of(buckets: Iterable[Bucket]) -> list[dict[str, Any]]:
    return list({id(b.group): b.group for b in buckets}.values())


class Rule:
    """:meth:`begin` once a step, then :meth:`update` for each bucket, under ``torch.no_grad`` and with interrupts held
    back.

    What it keeps of each weight is in ``optimizer.state[p]``, as torch does it (:attr:`states`); what it keeps of each
    group are small tensors on the losses' device (:meth:`initial`), only ever written in place, because a CUDA graph
    holds their addresses.  A rule belongs to one optimizer.

    Args:
        state_dtype: of the tensors in ``optimizer.state``: fp32 or bf16, which is rounded as the group's ``rounding``
            says.
        defaults: keys of the param groups that are the rule's own.
    """

    #: Names in ``optimizer.state[p]``, and what the tensors begin with.
    states: ClassVar[dict[str, float]] = {}
    #: Whether :meth:`update` takes what ``bucket.at`` says out of the weights; where not, that is done before.
    restores = False
    #: Multiples of the update sum_k -lr * g_k z_k at which the closure runs once more before :meth:`update`, which gets
    #: the g_k times that multiple whose loss is lowest.
    trials: tuple[int, ...] = ()
    #: Whether it reads the losses themselves, which a log of the run then holds.
    reads_losses = False

    def __init__(self, state_dtype: torch.dtype = torch.float32, **defaults: Any) -> None:
        if state_dtype not in (torch.float32, torch.bfloat16):
            fail(type(self).__name__, "state_dtype", "torch.float32 or torch.bfloat16", state_dtype)
        self.state_dtype, self.defaults = state_dtype, defaults
        self._kept: dict[int, dict[str, Tensor]] = {}

    def check(self, op: str, group: dict[str, Any]) -> None:
        """Whether a group's own keys are there and valid; a subclass checks their values."""
        if missing := [key for key in self.defaults if key not in group]:
            fail(op, "param_groups", f"entries {missing} of the rule {type(self).__name__}", "none")

    def check_parts(self, optimizer: ZerothOrder) -> None:
        """Whether the rule goes with the optimizer's estimator, direction and subset."""

    def initial(self, optimizer: ZerothOrder) -> dict[str, Tensor]:
        """What is kept of each group before the first step: int64 or float64 tensors on the CPU."""
        return {}

    def kept(self, optimizer: ZerothOrder, group: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
        """What is kept of ``group``, on ``device``."""
        index = next(i for i, g in enumerate(optimizer.param_groups) if g is group)
        kept = self._kept.get(index) or self.initial(optimizer)
        if index not in self._kept or any(t.device != device for t in kept.values()):
            self._check_capture(optimizer, device, f"none with group {index}")
            with torch.inference_mode(False):  # an inference tensor could not be written to in later, ordinary steps
                self._kept[index] = kept = {name: t.to(device, copy=True) for name, t in kept.items()}
        return kept

    def _check_capture(self, optimizer: ZerothOrder, device: torch.device, got: str) -> None:
        if is_capturing([device]):  # what a capture creates, every replay resets
            fail(type(optimizer).__name__, "step", "one step before the capture", got, RuntimeError)

    def state(self, optimizer: ZerothOrder, bucket: Bucket, name: str) -> list[Tensor]:
        """``optimizer.state[p][name]`` of all of the bucket's parameters; of sharded ones, what lies here."""
        found = []
        for p, label in zip(bucket.params, bucket.names, strict=True):
            state = optimizer.state[p]
            if name not in state:
                self._check_capture(optimizer, p.device, f"none with {label}")
                with torch.inference_mode(False):
                    state[name] = full_like(p, self.states[name], self.state_dtype)
            found.append(local_of(state[name]))
        return found

    def begin(self, optimizer: ZerothOrder, probe: Probe, estimate: Estimate) -> None:
        """Once a step, before the first bucket: what is kept of the groups of ``probe.buckets``, from ``probe.seeds``
        and ``estimate``.  Unless ``estimate.finite`` nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        groups = {i: {name: t.tolist() for name, t in kept.items()} for i, kept in self._kept.items()}
        return {"name": type(self).__name__, "groups": groups}

    def check_state_dict(self, optimizer: ZerothOrder, state: dict[str, Any]) -> None:
        op, name = type(optimizer).__name__, type(self).__name__
        if state["name"] != name:
            fail(op, "state_dict", f"of the rule {name}", state["name"])
        shapes = {key: list(t.shape) for key, t in self.initial(optimizer).items()}
        for kept in state["groups"].values():
            if (got := {key: list(torch.tensor(values).shape) for key, values in kept.items()}) != shapes:
                fail(op, "state_dict", f"what {name} keeps of a group, of shapes {shapes}", got)

    def load_state_dict(self, optimizer: ZerothOrder, state: dict[str, Any]) -> None:
        initial = self.initial(optimizer)
        for index in {*self._kept, *state["groups"]}:
            saved, kept = state["groups"].get(index, {}), self._kept.setdefault(index, {})
            for name, value in initial.items():
                loaded = torch.tensor(saved[name], dtype=value.dtype) if name in saved else value
                if name in kept:
                    kept[name].copy_(loaded)
                else:
                    kept[name] = loaded

    def choose(self, losses: Tensor) -> Tensor:
        """The multiple (0-dim) of the lowest of the trials' losses (float64); of equal ones the first, and never one of
        NaN but the first."""
        best, chosen = losses[0], torch.full_like(losses[0], self.trials[0])
        for loss, multiple in zip(losses[1:], self.trials[1:], strict=True):
            better = loss < best
            best = torch.where(better, loss, best)
            chosen = torch.where(better, torch.full_like(chosen, multiple), chosen)
        return chosen

    def update(self, optimizer: ZerothOrder, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor) -> None:
        """Update the weights of ``bucket``.

        Args:
            seeds: int64 [q], on the bucket's device; ``seeds[:1]`` is the step's rounding seed.
            g: fp32 [q], clipped, on the losses' device; all 0 unless ``finite``.
            finite: bool, on the losses' device: unless it holds, no weight and no state changes.
        """
        raise NotImplementedError


class SGD(Rule):
    """theta <- round(decay * theta' + sum_k c_k z_k + ahead),   decay = 1 - lr * weight_decay: one pass.

        c_k = fp32(-lr * g_k - decay * at_k),   theta' = theta + sum_k at_k z_k

    at_k is where the probe left the weights (0 with restore="exact"), so the pass also restores; ahead is the next
    step's perturbation (:meth:`ZerothOrder.two_pass`).  Computed in float64 from the fp32 g and rounded to fp32 once,
    so that a log of g gives the same bits in plain Python.  Unless ``finite``, decay = 1 and c_k = -at_k: it only
    restores.
    """

    restores = True

    def __init__(self) -> None:
        super().__init__()

    def update(self, optimizer: ZerothOrder, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor) -> None:
        if not bucket.at and is_zero(bucket.group["lr"]):
            return  # 0 * z would turn a weight of -0.0 into 0.0
        decay, back = decay_of(bucket.group, g), bucket.way_back(g)
        c = (decay * back - learning_rate(bucket.group, g) * g.double()).float()
        # The other side of torch.where as a tensor of the device: a number would be copied there, and waited for.
        coeffs = to_device(torch.where(finite, c, back.float()), bucket.device)
        rounding_seed = seeds[:1]
        if bucket.ahead is not None:
            seeds, coeffs = torch.cat((seeds, bucket.ahead[0])), torch.cat((coeffs, bucket.ahead[1]))
        bucket.direction.update(
            bucket,
            seeds,
            coeffs,
            decay=gated_decay(decay, finite, bucket.device) if bucket.group["weight_decay"] else None,
            rounding=bucket.group["rounding"],
            rounding_seed=rounding_seed,
        )


class Conservative(SGD):
    """:class:`SGD` that keeps the best of theta, theta - lr sum_k g_k z_k and theta + lr sum_k g_k z_k: three forwards
    more, which see the update without weight decay, rounded to nearest.  Weight decay is applied whichever is kept.

    ZO-SGD-Cons of Zhang et al., 2024 (arXiv 2402.11592).
    """

    trials = (0, 1, -1)
