"""ZOSGD: stochastic gradient descent on two forwards (SPSA), without gradients, activations or stored noise."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import fail
from ..contract import CONTRACT
from ..functional import combine_
from .exact import ExactProbe
from .groups import (
    OP,
    RESTORES,
    Bucket,
    assign_streams,
    check_choice,
    check_groups,
    check_hyperparameters,
    check_param,
    devices_of,
    label_of,
    plan,
)
from .guards import GraphRng, RngState, is_capturing, uninterrupted
from .inplace import InplaceProbe
from .loss import as_loss
from .scratch import ScratchPool
from .state import DeviceState, HostState, check_capturable, check_capture, check_seed
from .two_pass import TwoPass, check_two_pass
from .update import coefficients, is_zero, known_on_host, projected_gradient


class ZOSGD(torch.optim.Optimizer):
    r"""theta <- (1 - lr * weight_decay) * theta - lr * g * z,   g = (L(theta + eps z) - L(theta - eps z)) / (2 eps).

    z is the noise of contract ``zk1``, a pure function of (seed, step, parameter), regenerated wherever it is needed:
    the optimizer stores a seed and a counter.  A step is two forwards and one fused pass over the weights.

    Args:
        params: ``model.named_parameters()`` (recommended: noise then depends on names, not on order), parameters,
            or group dicts of either.  A group takes lr, eps, weight_decay, dist, rounding, clip and streams (a 32-bit
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
            scratch is the size of the call with the most weights.  "inplace": the weights move by +eps z and -2 eps z
            and the update brings them back: no scratch, any kind of model, but half-precision weights drift.
            :meth:`two_pass` saves one of its three passes.
        clip: bound on \|g\|, in units of g: min(max(g, -clip), clip).  A g that is not finite still skips the step.
        capturable: the step counter and the seeds live on the device and no step needs the host, so that one whole step
            can be captured in a CUDA graph and replayed; see :meth:`register_graph`.

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
        *,
        clip: float | None = None,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "dist": dist,
            "rounding": rounding,
            "clip": clip,
        }
        check_hyperparameters(defaults)
        check_choice("restore", restore, RESTORES)
        self._restore, self._told, self._skips_told = restore, set(), 0
        self._state = (DeviceState if capturable else HostState)(check_seed(seed))
        self._pool, self._two_pass, self._graph_rng = ScratchPool(), None, None
        #: g of the last step (on the device, fp32), with the first group's eps and clip; the losses at +eps and -eps.
        self.last_projected_gradient: Tensor | None = None
        self.last_losses: tuple[Tensor, Tensor] | None = None
        super().__init__(params, defaults)
        self._state.place(devices_of(self.param_groups))

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
        if capturing := is_capturing(devices):
            check_capture(self._state, self._graph_rng, buckets, devices)
        elif self._state.capturable and self._graph_rng is None:
            self._graph_rng = GraphRng(devices)  # a capture cannot make generators
        self._state.place(devices)
        rng = self._graph_rng if capturing else RngState(devices)
        with self._probe(buckets, devices) as probe:
            if self._two_pass:
                self._two_pass.release()  # from here on the probe restores
            losses = []
            for index, sign in enumerate((1, -1)):
                with rng.forward(index), probe.at(sign):
                    losses.append(as_loss(closure(), devices[0], capturing))
            plus, minus = losses[0], losses[1].to(losses[0].device)
            with uninterrupted():
                self._update(probe, plus, minus)
        if not self._state.capturable and known_on_host(self._state.skipped):
            self._warn_skipped()
        return (plus + minus) / 2

    def _probe(self, buckets: list[Bucket], devices: list[torch.device]) -> ExactProbe | InplaceProbe:
        if self._two_pass:
            key = (self._state.seed, self._state.step)
            return self._two_pass.take(key, buckets) or InplaceProbe(buckets, self._state.seeds(devices), key)
        if self._restore == "exact":
            return ExactProbe(buckets, self._state.seeds(devices), self._pool, self._told)
        return InplaceProbe(buckets, self._state.seeds(devices))

    def _update(self, probe: ExactProbe | InplaceProbe, plus: Tensor, minus: Tensor) -> None:
        """One combine a bucket, which also restores; in the two-pass form it adds the next step's +eps z as well."""
        difference = plus.double() - minus.double()
        first, buckets, seeds = self.param_groups[0], probe.buckets, probe.seeds
        values, finite = coefficients(buckets, difference)
        skip = not self._state.capturable and known_on_host(finite) and not finite
        following = self._two_pass and self._two_pass.following(probe, self._state)
        try:
            for i, (b, (coeff, decay)) in enumerate(zip(buckets, values, strict=True)):
                if b.at == 0 and (skip or is_zero(b.group["lr"])):
                    continue  # 0 * z would turn a weight of -0.0 into 0.0
                z_seeds, coeffs = seeds[b.device], coeff.reshape(1).to(b.device, non_blocking=True)
                if following:
                    z_seeds = torch.cat((z_seeds, following.seeds[b.device]))
                    coeffs = torch.cat((coeffs, torch.full_like(coeffs, b.eps)))
                combine_(
                    b.params,
                    z_seeds,
                    coeffs,
                    streams=b.streams,
                    dist=b.dist,
                    decay=decay.reshape(1).to(b.device, non_blocking=True) if b.group["weight_decay"] else None,
                    rounding=b.group["rounding"],
                    rounding_seed=seeds[b.device],
                )
                b.at = 0
                if following:
                    following.buckets[i].at = 1
        except BaseException:
            if following:
                following.move(0)
            raise
        torch.clear_autocast_cache()  # casts of the old weights, where step() runs inside autocast
        self.last_losses = (plus, minus)
        self.last_projected_gradient = projected_gradient(difference, first["eps"], first["clip"])
        self._state.advance(finite)
        if following:
            self._two_pass.keep(following)

    @contextmanager
    def two_pass(self, *modules: nn.Module) -> Iterator[None]:
        """Inside, the update also adds the next step's perturbation: two passes over the weights a step, not three.

            theta'' = round(decay * theta' + (-lr * g - decay * at * eps) * z_t + eps * z_{t+1}),   at = -1

        One rounding a pass, so half-precision weights differ from those of the three-pass form.  Between steps the
        weights hold a perturbation; :meth:`flush` takes it out.  Leaving the context flushes, however it is left; so do
        this optimizer's ``state_dict``, a forward of any module with managed parameters, and ``state_dict`` and
        ``load_state_dict`` of ``modules``, which must own all trained parameters.  Whatever else reads weights
        (a tensor saved or averaged by itself, ``.to()``) calls :meth:`flush` first.  docs/optimizer.md has the list.

        Raises: ValueError without restore="inplace", with ``capturable``, where ``modules`` lack a trained parameter.
        """
        check_two_pass(self._restore, self._state, self._two_pass, self.param_groups, modules)
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
        """Before the capture of a step that draws random numbers on the GPU (dropout): gives ``graph`` two copies of
        each default CUDA generator as it stands, one for each forward: both see the same numbers at every replay.

        Replays do not move the default generator, and reseeding it does not reach them.
        """
        check_capturable(self._state)
        self._graph_rng = GraphRng(devices_of(self.param_groups))
        self._graph_rng.register(graph)

    def _warn_skipped(self) -> None:
        if (count := int(self._state.skipped)) > self._skips_told:
            new, self._skips_told = count - self._skips_told, count
            warnings.warn(f"ZOSGD: {new} step(s) skipped: loss not finite; the weights did not change", stacklevel=3)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with a third entry "zo": contract, seed, step, skipped steps.  Plain numbers and lists only."""
        self.flush()
        state = super().state_dict()
        self._warn_skipped()
        own = {"seed": self._state.seed, "step": self._state.step, "skipped_steps": int(self._state.skipped)}
        return {**state, "zo": {"contract": CONTRACT, **own}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue bit for bit from a :meth:`state_dict`, whose seed, step, hyper-parameters and streams replace ours.

        Raises ValueError, before anything changes, where it is not of this optimizer, contract or list of parameters.
        """
        zo, groups = state_dict.get("zo"), state_dict["param_groups"]
        if zo is None:
            fail(OP, "state_dict", "an entry 'zo' (written by ZOSGD.state_dict)", f"entries {sorted(state_dict)}")
        if zo["contract"] != CONTRACT:
            fail(OP, "state_dict", f"noise contract {CONTRACT!r}", repr(zo["contract"]))
        check_groups(self.param_groups, groups)
        self.flush()
        rates = [g["lr"] for g in self.param_groups]
        super().load_state_dict(state_dict)
        for group, lr in zip(self.param_groups, rates, strict=True):
            if self._state.capturable and isinstance(lr, Tensor):  # a graph holds its address
                group["lr"] = lr.fill_(group["lr"])
        self._state.load(zo["seed"], zo["step"], zo["skipped_steps"])
        self._skips_told = zo["skipped_steps"]

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle; torch's own keeps only groups and state.  Scratch and graphs are not copied."""
        if self._two_pass and self._two_pass.pending:
            fail(OP, "two_pass", "flush() before a copy", "weights that hold a perturbation", RuntimeError)
        keys = ("_restore", "_state", "_skips_told", "_told", "last_projected_gradient", "last_losses")
        own = {k: self.__dict__[k] for k in keys} | {"_two_pass": None, "_graph_rng": None}
        return {**super().__getstate__(), **own, "_pool": ScratchPool()}
