"""ZOSGD: stochastic gradient descent on two forwards (SPSA), without gradients, activations or stored noise."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..checks import fail
from ..contract import CONTRACT, canonical_name, derive_seed_int, seed_to_int64
from ..functional import combine_
from .exact import ExactProbe
from .groups import (
    OP,
    RESTORES,
    Bucket,
    assign_streams,
    check_choice,
    check_hyperparameters,
    check_param,
    check_streams,
    label_of,
    plan,
)
from .guards import RngState, uninterrupted
from .inplace import InplaceProbe
from .scratch import ScratchPool


class ZOSGD(torch.optim.Optimizer):
    r"""theta <- (1 - lr * weight_decay) * theta - lr * g * z,   g = (L(theta + eps z) - L(theta - eps z)) / (2 eps).

    z is the noise of contract ``zk1``, a pure function of (seed, step, parameter), regenerated wherever it is needed:
    the optimizer stores a seed and a counter.  A step is two forwards and one fused pass over the weights.

    Args:
        params: ``model.named_parameters()`` (recommended: noise then depends on names, not on order), parameters,
            or group dicts of either.  A group takes lr, eps, weight_decay, dist, rounding and streams (a 32-bit id for
            each parameter).  Parameters with ``requires_grad=False`` are neither perturbed nor updated.
        lr: step size, in units of theta per unit of g; a number or a one-element tensor.  Read at every step.
        eps: size of the perturbation, in units of theta.  A group with an eps of its own divides by that one.
        weight_decay: decoupled: theta shrinks by the factor 1 - lr * weight_decay at each step.
        seed: run seed, an integer in [-2^63, 2^64).  0 is a seed like any other.
        dist: "normal" or "rademacher".
        rounding: of the update, "stochastic" (bf16 and fp16 keep small updates on average; fp32 is not changed by it)
            or "nearest".
        restore: "exact": the weights do not move during the forwards; each torch function gets perturbed copies, and
            scratch is the size of the call with the most weights.  "inplace": the weights move by +eps z and -2 eps z
            and the update brings them back: no scratch, any kind of model, but half-precision weights drift.

    Raises:
        TypeError, ValueError: naming argument, what was expected and what came.
        HiddenParameters: (exact) the closure runs TorchScript or another graph that holds weights; they are untouched.

    Example::

        opt = ZOSGD(model.named_parameters(), lr=1e-6, seed=0)
        loss = opt.step(lambda: F.cross_entropy(model(x), y))

    Sources: SPSA, Spall 1992; MeZO, Malladi et al. 2023 (arXiv 2305.17333).  See docs/optimizer.md.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        dist: str = "normal",
        rounding: str = "stochastic",
        restore: str = "exact",
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "dist": dist, "rounding": rounding}
        check_hyperparameters(defaults)
        check_choice("restore", restore, RESTORES)
        if isinstance(seed, bool) or not hasattr(seed, "__index__") or isinstance(seed, Tensor):
            fail(OP, "seed", "an integer", repr(seed), TypeError)
        seed_to_int64(operator.index(seed))  # raises outside the range
        self._seed, self._steps, self._restore = operator.index(seed), 0, restore
        self._skipped, self._skips_told = torch.zeros((), dtype=torch.int64), 0
        self._told: set[str] = set()
        self._pool = ScratchPool()
        #: g of the last step (a device tensor, fp32), with the first group's eps; (L(theta + eps z), L(theta - eps z)).
        self.last_projected_gradient: Tensor | None = None
        self.last_losses: tuple[Tensor, Tensor] | None = None
        super().__init__(params, defaults)

    @property
    def seed(self) -> int:
        """Seed of the run; step t draws z with ``derive_seed(seed, t, 0)``."""
        return self._seed

    @property
    def step_count(self) -> int:
        """Steps taken, skipped ones included."""
        return self._steps

    @property
    def skipped_steps(self) -> Tensor:
        """Steps skipped because a loss was not finite (int64, on the loss's device).  Reading warns of new ones."""
        self._warn_skipped()
        return self._skipped

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "optimizer contains a parameter group with duplicate", UserWarning)
            super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_hyperparameters(group)
            if len({id(p) for p in group["params"]}) != len(group["params"]):
                fail(OP, "params", "each parameter once (tied ones are one parameter)", "a duplicate")
            for i, param in enumerate(group["params"]):
                if param.requires_grad:
                    check_param(param, label_of(group, i))
            assign_streams(self.param_groups)
        except BaseException:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float] | None = None) -> Tensor:
        """One step.  ``closure`` runs the forward and returns the scalar loss (a tensor or a number); it is called
        twice, without gradients and with the same torch RNG state.

        Returns the mean of the two losses, on their device; nothing in a step waits for a GPU.  If the closure raises,
        the weights are back at theta and the step does not count.  A loss that is not finite skips the update.
        """
        if not callable(closure):
            fail(OP, "closure", "a function that runs the forward and returns the loss", repr(closure), TypeError)
        buckets = plan(self.param_groups)
        devices = list(dict.fromkeys(b.device for b in buckets))
        seed = seed_to_int64(derive_seed_int(self._seed, self._steps, 0))
        seeds = {d: torch.full((1,), seed, dtype=torch.int64, device=d) for d in devices}
        rng = RngState(devices)
        with self._probe(buckets, seeds) as probe:
            losses = []
            for sign in (1, -1):
                if losses:
                    rng.restore()
                with probe.at(sign):
                    losses.append(_as_loss(closure(), devices[0]))
            plus, minus = losses[0], losses[1].to(losses[0].device)
            with uninterrupted():
                self._update(buckets, seeds, plus, minus)
                self._steps += 1
        if _known_on_host(self._skipped):
            self._warn_skipped()
        return (plus + minus) / 2

    def _probe(self, buckets: list[Bucket], seeds: dict[torch.device, Tensor]) -> ExactProbe | InplaceProbe:
        if self._restore == "exact":
            return ExactProbe(buckets, seeds, self._pool, self._told)
        return InplaceProbe(buckets, seeds)

    def _update(self, buckets: list[Bucket], seeds: dict[torch.device, Tensor], plus: Tensor, minus: Tensor) -> None:
        """theta = round(decay * theta' + (-lr * g - decay * at * eps) * z), where theta' = theta + at * eps * z.

        The scalars are computed in float64 and rounded to fp32 once each, so that a log of g gives the same
        coefficients in plain Python.
        """
        difference = plus.double() - minus.double()
        self.last_losses = (plus, minus)
        self.last_projected_gradient = (difference / (2 * self.param_groups[0]["eps"])).float()
        steps = []
        for b in buckets:
            lr, eps = b.group["lr"], b.group["eps"]
            if isinstance(lr, Tensor):
                lr = lr.detach().reshape(()).to(plus.device, torch.float64, non_blocking=True)
            g = (difference / (2 * eps)).float().double()
            decay = torch.ones_like(g) - lr * b.group["weight_decay"]
            back = -b.at * eps
            steps.append((b, decay.float(), back, (decay * back - lr * g).float()))
        finite = torch.isfinite(torch.stack([coeff for *_, coeff in steps])).all()
        self._skipped = self._skipped.to(plus.device) + ~finite
        if _known_on_host(finite) and not finite:
            return  # in place, the probe restores the weights
        for b, decay, back, coeff in steps:
            if b.at == 0 and not isinstance(b.group["lr"], Tensor) and b.group["lr"] == 0:
                continue  # 0 * z would turn a weight of -0.0 into 0.0
            coeff, decay = torch.where(finite, coeff, back), torch.where(finite, decay, 1.0)
            combine_(
                b.params,
                seeds[b.device],
                coeff.reshape(1).to(b.device, non_blocking=True),
                streams=b.streams,
                dist=b.group["dist"],
                decay=decay.reshape(1).to(b.device, non_blocking=True) if b.group["weight_decay"] else None,
                rounding=b.group["rounding"],
                rounding_seed=seeds[b.device],
            )
            b.at = 0
        torch.clear_autocast_cache()  # casts of the old weights, where step() runs inside autocast

    def _warn_skipped(self) -> None:
        if (count := int(self._skipped)) > self._skips_told:
            new, self._skips_told = count - self._skips_told, count
            warnings.warn(
                f"ZOSGD: {new} step(s) skipped: the loss was not finite; the weights did not change", stacklevel=3
            )

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with a third entry "zo": contract, seed, step, skipped steps.  Plain numbers and lists only."""
        state = super().state_dict()
        self._warn_skipped()
        zo = {"contract": CONTRACT, "seed": self._seed, "step": self._steps, "skipped_steps": int(self._skipped)}
        return {**state, "zo": zo}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue bit for bit from a :meth:`state_dict`, whose seed, step, hyper-parameters and streams replace ours.

        Raises ValueError, before anything changes, where it is not of this optimizer, contract or list of parameters.
        """
        zo, groups = state_dict.get("zo"), state_dict["param_groups"]
        if zo is None:
            fail(OP, "state_dict", "an entry 'zo' (written by ZOSGD.state_dict)", f"entries {sorted(state_dict)}")
        if zo["contract"] != CONTRACT:
            fail(OP, "state_dict", f"noise contract {CONTRACT!r}", repr(zo["contract"]))
        for ours, theirs in zip(self.param_groups, groups):  # noqa: B905  torch reports a different number of groups
            check_hyperparameters(theirs)
            if "param_names" in ours and "param_names" in theirs:
                for mine, saved in zip(ours["param_names"], theirs["param_names"]):  # noqa: B905  as above
                    if canonical_name(mine) != canonical_name(saved):
                        fail(OP, "state_dict", f"parameters in the same order ({mine!r} here)", repr(saved))
        check_streams(groups)
        super().load_state_dict(state_dict)
        self._seed, self._steps = zo["seed"], zo["step"]
        self._skipped = torch.full_like(self._skipped, zo["skipped_steps"])
        self._skips_told = zo["skipped_steps"]

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle; torch's own keeps only groups and state.  Scratch is not copied."""
        own = {k: v for k, v in self.__dict__.items() if k in ("last_projected_gradient", "last_losses")}
        own |= {k: getattr(self, k) for k in ("_seed", "_steps", "_restore", "_skipped", "_skips_told", "_told")}
        return {**super().__getstate__(), **own, "_pool": ScratchPool()}


def _known_on_host(value: Tensor) -> bool:
    """Whether the host can read ``value`` without waiting for a device."""
    return value.device.type == "cpu"


def _as_loss(value: object, device: torch.device) -> Tensor:
    """The closure's result as a new 0-dim tensor: fp32, or float64 where it was float64 or a Python number.

    A copy, because a closure may return one buffer twice.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            fail(OP, "closure", "a real scalar loss", f"{value.dtype} of shape {tuple(value.shape)}")
        dtype = torch.float32 if value.dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float64
        return value.detach().reshape(()).to(dtype, copy=True)
    if isinstance(value, bool) or not isinstance(value, Real):
        fail(OP, "closure", "a scalar loss (a tensor or a number)", repr(value), TypeError)
    return torch.full((), float(value), dtype=torch.float64, device=device)
