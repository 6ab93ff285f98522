"""What update rules have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...checks import check_number, fail
from ..guards import is_capturing
from ..probes.probe import Probe
from ..roles import OptimizerView, home_of
from ..scalars import decay_of, gated_decay
from ..shard import full_like, local_of
from ..types import Bucket, Estimate, Group


def check_betas(op: str, betas: object) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        fail(op, "betas", "two numbers", repr(betas), TypeError)
    for i, beta in enumerate(betas):
        check_fraction(op, f"betas[{i}]", beta)


def check_fraction(op: str, argument: str, value: Any) -> None:
    check_number(op, argument, value)
    if value >= 1:
        fail(op, argument, "a number in [0, 1)", value)


def groups_of(buckets: Iterable[Bucket]) -> list[Group]:
    """The groups of ``buckets``, each once."""
    return list({id(b.group): b.group for b in buckets}.values())


def _shape(values: Any, floats: bool) -> list[int] | None:
    """The shape of nested lists of numbers; None where they are no such.

    ``floats``: numbers that are no integers are taken, too.
    """
    try:
        found = torch.tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return list(found.shape) if floats or found.dtype is torch.int64 else None


class Rule:
    """What is done with the gradient estimate sum_k g_k z_k.

    Once a step the optimizer calls :meth:`begin`, and then :meth:`update` for each bucket, under
    ``torch.no_grad`` and with interrupts held back.  A rule belongs to one optimizer.

    A rule may keep a tensor for each weight, in ``optimizer.state[p]`` as torch's optimizers do
    (:attr:`states`), and small tensors for each group, on the device of the losses (:meth:`initial`).  The
    latter are only ever written in place, because a CUDA graph holds their addresses.

    Args:
        state_dtype: of the tensors in ``optimizer.state``: fp32, or bf16, which is rounded as the group's
            ``rounding`` says.
        defaults: keys of the parameter groups that are the rule's own, with their default values.
    """

    #: The names of the tensors in ``optimizer.state[p]``, each with the value that it begins with.
    states: ClassVar[dict[str, float]] = {}
    #: True if :meth:`update` itself subtracts the perturbation; otherwise ``probe.restore()`` runs first.
    folds_restore = False
    #: True if weight_decay is a factor of theta.  Where it is not, the rule adds its gradient to the
    #: estimate.
    decoupled = True
    #: Multiples of the update sum_k -lr * g_k z_k.  Before :meth:`update` the closure runs once at each of
    #: them, and the update then gets the g_k times the multiple whose loss is lowest.
    trials: tuple[int, ...] = ()
    #: True if an update touches weights and states through the bucket's noise alone, so that a replay may put
    #: it off.
    through_noise = True
    #: True if the rule reads the losses themselves.  A log of the run must then hold them.
    reads_losses = False

    def __init__(self, state_dtype: torch.dtype = torch.float32, **defaults: Any) -> None:
        if state_dtype not in (torch.float32, torch.bfloat16):
            fail(type(self).__name__, "state_dtype", "torch.float32 or torch.bfloat16", state_dtype)
        self.state_dtype, self.defaults = state_dtype, defaults
        #: What is kept of each group.  It belongs to the group itself, whatever its place among the others
        #: becomes.
        self._kept: list[tuple[Group, dict[str, Tensor]]] = []
        self._groups: list[Group] = []  #: the optimizer's own list, which says the groups' places

    def check(self, op: str, group: Group) -> None:
        """Raises where a group lacks one of the rule's own keys; a subclass checks their values, too."""
        if missing := [key for key in self.defaults if key not in group]:
            fail(op, "param_groups", f"entries {missing} of the rule {type(self).__name__}", "none")

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def check_parts(self, optimizer: OptimizerView) -> None:
        """Raises where the rule does not go with the optimizer's estimator, direction and subset."""

    def initial(self, optimizer: OptimizerView) -> dict[str, Tensor]:
        """What is kept of each group, as it is before the first step: int64 or float64 tensors on the CPU."""
        return {}

    def kept(self, optimizer: OptimizerView, group: Group, device: torch.device) -> dict[str, Tensor]:
        """What is kept of ``group``, on ``device``."""
        self._groups = optimizer.param_groups
        found = next((kept for g, kept in self._kept if g is group), None)
        kept = found or self.initial(optimizer)
        if found is None or any(t.device != device for t in kept.values()):
            self._check_capture(optimizer, device, "none with this group")
            with torch.inference_mode(False):  # later, ordinary steps could not write to an inference tensor
                kept = {name: t.to(device, copy=True) for name, t in kept.items()}
            self._keep(group, kept)
        return kept

    def _keep(self, group: Group, kept: dict[str, Tensor]) -> None:
        """Keeps ``kept`` of ``group``, and nothing any more of groups that the optimizer no longer has."""
        here = {id(g) for g in self._groups}
        self._kept = [(g, k) for g, k in self._kept if g is not group and id(g) in here]
        self._kept.append((group, kept))

    def _by_place(self) -> dict[int, dict[str, Tensor]]:
        """What is kept, by the place of the group."""
        places = {id(g): i for i, g in enumerate(self._groups)}
        found = ((places[id(g)], kept) for g, kept in self._kept if id(g) in places)
        return dict(sorted(found, key=lambda item: item[0]))

    def _check_capture(self, optimizer: OptimizerView, device: torch.device, got: str) -> None:
        if is_capturing([device]):  # what a capture creates, every replay resets
            fail(optimizer.op, "step", "one step before the capture", got, RuntimeError)

    def state(self, optimizer: OptimizerView, bucket: Bucket, name: str) -> list[Tensor]:
        """``optimizer.state[p][name]`` of the bucket's parameters; of sharded ones, the local shard."""
        # no shards, and mostly nothing to make: hundreds of look-ups are all that is left
        if bucket.plan is not None:
            with contextlib.suppress(KeyError):
                return [optimizer.state[p][name] for p in bucket.params]
        found = []
        for p, label in zip(bucket.params, bucket.names, strict=True):
            state = optimizer.state[p]
            if name not in state:
                self._check_capture(optimizer, p.device, f"none with {label}")
                if (elsewhere := home_of(p).state(optimizer, p, name)) is not None:
                    state[name] = elsewhere
                    found.append(elsewhere)
                    continue
                with torch.inference_mode(False):
                    state[name] = full_like(p, self.states[name], self.state_dtype)
            found.append(local_of(state[name]))
        return found

    def kept_of(self, param: Tensor) -> list[tuple[str, tuple[int, ...], torch.dtype, float]]:
        """The name, shape, dtype and first value of each tensor in ``optimizer.state[param]``."""
        return [(name, tuple(param.shape), self.state_dtype, value) for name, value in self.states.items()]

    def begin(self, optimizer: OptimizerView, probe: Probe, estimate: Estimate) -> None:
        """Once a step, before the first bucket: renews what is kept of the groups.

        Nothing may change unless ``estimate.finite``.
        """

    def rounding(self, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor) -> dict[str, Any]:
        """The arguments of a kernel that say how the update decays the weights, and how it rounds them."""
        decays = self.decoupled and bucket.group["weight_decay"]
        decay = gated_decay(decay_of(bucket.group, g), finite, bucket.device) if decays else None
        return {
            "decay": decay,
            "rounding": bucket.group["rounding"],
            "rounding_seed": seeds if seeds.numel() == 1 else seeds[:1],
        }

    def state_dict(self) -> dict[str, Any]:
        """What is kept of the groups, as plain numbers and lists."""
        groups = {i: {name: t.tolist() for name, t in kept.items()} for i, kept in self._by_place().items()}
        return {"name": type(self).__name__, "groups": groups}

    def check_state_dict(self, optimizer: OptimizerView, state: dict[str, Any]) -> None:
        op, name = optimizer.op, type(self).__name__
        if state["name"] != name:
            fail(op, "state_dict", f"of the rule {name}", state["name"])
        initial = self.initial(optimizer)
        shapes = {key: list(t.shape) for key, t in initial.items()}
        for place, kept in state["groups"].items():
            if not str(place).isdecimal() or int(place) >= (count := len(optimizer.param_groups)):
                fail(op, "state_dict", f"groups by numbers below {count}", repr(place))
            of_floats = {key: t.is_floating_point() for key, t in initial.items()}
            entries = kept if isinstance(kept, Mapping) else {}
            got = {key: _shape(v, of_floats.get(key, True)) for key, v in entries.items()}
            if got != shapes:
                fail(op, "state_dict", f"what {name} keeps of a group, of shapes {shapes}", got)

    def load_state_dict(self, optimizer: OptimizerView, state: dict[str, Any]) -> None:
        initial, before = self.initial(optimizer), self._by_place()
        # JSON makes texts of numbers
        groups = {int(place): saved for place, saved in state["groups"].items()}
        self._groups, self._kept = optimizer.param_groups, []  # torch puts other groups in their places
        for place in sorted({*before, *groups}):
            saved, kept = groups.get(place, {}), before.get(place, {})
            for name, value in initial.items():
                loaded = torch.tensor(saved[name], dtype=value.dtype) if name in saved else value
                if name in kept:
                    kept[name].copy_(loaded)
                else:
                    kept[name] = loaded
            self._keep(self._groups[place], kept)

    def choose(self, losses: Tensor) -> Tensor:
        """The multiple (0-dim) whose trial has the lowest of ``losses`` (float64).

        Of equal losses the first wins.  A trial whose loss is NaN never wins, unless it is the first.
        """
        best, chosen = losses[0], torch.full_like(losses[0], self.trials[0])
        for loss, multiple in zip(losses[1:], self.trials[1:], strict=True):
            better = loss < best
            best = torch.where(better, loss, best)
            chosen = torch.where(better, torch.full_like(chosen, multiple), chosen)
        return chosen

    def update(
        self, optimizer: OptimizerView, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor
    ) -> None:
        """Updates the weights of ``bucket``.

        Args:
            seeds: int64 [q], on the bucket's device; ``seeds[:1]`` is the step's rounding seed.
            g: fp32 [q], clipped, on the losses' device; all 0 unless ``finite``.
            finite: bool, on the losses' device.  Unless it holds, no weight and no state changes.
        """
        raise NotImplementedError
