"""Coordinate-wise estimation: one weight moves at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import ParamsT

from ..checks import check_choice, check_integer, check_number, fail, is_integer
from ..contract import derive_seed_int, derive_stream_seed
from ..difference import stepped
from ..distributed.exchange import Exchange
from ..functional import low_rank_
from ..ops.arguments import Rounding
from ..step.directions.masks import KeptMask
from ..step.guards import uninterrupted
from ..step.noise import DENSE
from ..step.probes.probe import Probe
from ..step.rules.rule import check_fraction
from ..step.rules.sgd import SGD
from ..step.scalars import (
    NO,
    decay_of,
    descent,
    gate,
    gated_decay,
    is_zero,
    learning_rate,
    projected_gradient,
    scalars,
)
from ..step.shard import any_sharded
from ..step.subset import Subset
from ..step.types import Bucket, Estimate, LossesAt, Seeds
from ..transfer import to_device
from .arguments import Sides
from .optimizer import ZerothOrder
from .reuse import Features
from .zosgd import ESTIMATORS

#: k of the seed that chooses coordinates: far above any direction's.
_CHOICE_K = 0xC0000000


class Entries(NamedTuple):
    """The weights of one parameter that a step moves, n of them."""

    bucket: Bucket
    weights: Tensor  #: all weights of the parameter, flat
    stream: int
    places: Tensor  #: int64 [n]: which of them
    positions: list[int]  #: the same, on the host
    own: Tensor  #: [n]: their values
    sides: list[Tensor]  #: [n] each: the values that they are moved to

    def steps(self) -> Tensor:
        """float64 [n]: the distance between the two points of each difference."""
        return self.sides[0].double() - (self.sides[1] if len(self.sides) > 1 else self.own).double()

    def updated(self, change: Tensor, seed: Tensor, decay: Tensor | None, rounding: Any) -> Tensor:
        """[n]: round(decay * theta_i + change_i), each with the rounding bits of its place in the parameter.

        ``low_rank_`` computes it: each run of neighbouring weights is a matrix with one column, and its
        change is a product of rank 1.  The kernel sums a product from 0, so a change of 0.0 and one of -0.0
        look the same to it.  It takes -change with the coefficient -1, which treats both as -0.0 and leaves
        the weight its bits.  That is wrong for a change of 0.0 to -0.0, which is 0.0 (as in combine), so
        these weights are set afterwards.
        """
        bounds = [i for i, place in enumerate(self.positions) if not i or place != self.positions[i - 1] + 1]
        sizes = [end - begin for begin, end in itertools.pairwise([*bounds, len(self.positions)])]
        new, one = self.own.clone(), torch.ones(1, 1, 1, device=change.device)
        low_rank_(
            [run.view(-1, 1) for run in new.split(sizes)],
            [run.view(1, -1, 1) for run in (-change).split(sizes)],
            [one] * len(sizes),
            -1.0,
            streams=[self.stream] * len(sizes),
            offsets=[self.positions[i] for i in bounds],
            decay=decay,
            rounding=rounding,
            rounding_seed=seed,
        )
        acc = self.own.float() if decay is None else decay * self.own.float()
        return new.masked_fill_((acc == 0) & (change == 0) & ~change.signbit(), 0.0)


#: A weight (flat tensor, position), the value that it is moved to and its own; None: theta itself.
Move = tuple[Tensor, int, Tensor, Tensor]


class CoordinateProbe(Probe):
    """At a point one weight holds another value; then its own bits are put back."""

    features: Features | None = None

    def _forward(self, moved: Tensor | None) -> AbstractContextManager[None]:
        return nullcontext() if self.features is None else self.features.forward(moved)

    @contextmanager
    def at(self, point: Move | None) -> Iterator[None]:
        if point is None:
            with self._forward(None):
                yield
            return
        weights, i, value, own = point
        try:
            weights[i] = value
            torch.clear_autocast_cache()  # a cast of the weight before the move
            with self._forward(weights):
                yield
        finally:
            with uninterrupted():
                weights[i] = own
                torch.clear_autocast_cache()


class ZOCGE(ZerothOrder):
    """theta_i <- (1 - lr * weight_decay) * theta_i - lr * g_i   for the coordinates i of the step alone.

        g_i = (L(theta + h e_i) - L(theta)) / h               1 + n forwards for n coordinates ("one-sided")
        g_i = (L(theta + h e_i) - L(theta - h' e_i)) / (h + h')    2 n forwards ("two-sided")

    These are finite differences, without the variance of random directions, for small models and for few
    weights of large ones.  h is eps as it becomes in the weight's dtype, and never less, so that half
    precision loses no step.

    Each weight gets its own bits back before the next one moves.  All updates come after the last forward,
    each rounded once, with the rounding bits of its place in the parameter.

    On a ``mesh`` the coordinates are shared out along "perturbation" (the authors' forward parallelism), so P
    ranks take 1 / P of the forwards each; the losses are gathered once, and all ranks make the same update,
    with the bits of one process.

    Args:
        eps: size of a step, in units of theta.
        estimator: "one-sided" or "two-sided".
        mask: which weights may move: :class:`GivenMask` (bool masks or indices of your own) or
            :class:`MagnitudeMask`; default: all.
        per_step: how many of those are drawn from the seed for each step.  This is a number, of all
            parameters together; or shares in (0, 1] by parameter name, as layer-wise pruning ratios leave
            them (1 for a name that is not there).  Default: all, in every step.
        interval: how many steps move the drawn coordinates before others are drawn.  (DeepZero's code draws
            them every five epochs.)
        clip: bound on each |g_i|.
        momentum, l2: with either, all weights take part in the update, those that no step moves included:

                m <- momentum m + (g + l2 theta);   theta <- (1 - lr weight_decay) theta - lr m

            with g = 0 where no difference was measured, and m (``state[p]["momentum_buffer"]``, fp32) 0 at
            first.  This is torch.optim.SGD, and DeepZero's training with momentum=0.9 and l2=5e-4.
        reuse: modules in the order in which a forward calls them, such as a network's layers.  While a weight
            of one of them is moved, those before it return what they have returned in this step, so a
            forward computes half of the layers on average, with the same losses (:class:`Features`).  It
            holds their outputs during a step.
        params, lr, weight_decay, seed, rounding, subset, mesh: as :class:`ZerothOrder`.  Any model: weights
            move in place; no sharded ones, and no "pipeline" in the mesh.

    ``last_losses`` are those of all forwards, and ``last_projected_gradient`` [n] are the g_i, in the order
    of the parameters and of i.  ``step`` returns L(theta) where one-sided, else the mean loss.  A loss that
    is not finite skips the update of all coordinates.

    Source: DeepZero, Chen et al., 2024, arXiv 2310.02025.
    """

    replayable = False  # a step's record would be as long as its coordinates
    staged = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 5e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        rounding: Rounding = "stochastic",
        *,
        estimator: Sides = "one-sided",
        mask: KeptMask | None = None,
        per_step: int | Mapping[str, float] | None = None,
        interval: int = 1,
        clip: float | None = None,
        momentum: float = 0.0,
        l2: float = 0.0,
        reuse: Sequence[nn.Module] | None = None,
        subset: Subset | None = None,
        mesh: DeviceMesh | Exchange | None = None,
    ) -> None:
        check_choice(self.op, "estimator", estimator, tuple(ESTIMATORS))
        if mask is not None and not isinstance(mask, KeptMask):
            fail(self.op, "mask", "a GivenMask or a MagnitudeMask", repr(mask), TypeError)
        if isinstance(per_step, Mapping):
            for name, share in per_step.items():
                if not 0 < share <= 1:
                    fail(self.op, f"per_step[{name!r}]", "a share in (0, 1]", share)
        elif per_step is not None and not is_integer(per_step, 1):
            fail(self.op, "per_step", "an integer >= 1, or shares by parameter name", repr(per_step))
        check_integer(self.op, "interval", interval)
        check_fraction(self.op, "momentum", momentum)
        check_number(self.op, "l2", l2)
        self._per_step, self._interval, self._momentum, self._l2 = per_step, interval, momentum, l2
        self._features = None if reuse is None else Features(self.op, reuse)
        super().__init__(
            *(params, lr, eps, weight_decay, seed),
            rounding=rounding,
            clip=clip,
            direction=mask,
            subset=subset,
            mesh=mesh,
            estimator=ESTIMATORS[estimator](),
            rule=SGD(),
        )
        names = {name for group in self.param_groups for name in group.get("param_names", ())}
        if isinstance(per_step, Mapping) and (unknown := [name for name in per_step if name not in names]):
            fail(self.op, "per_step", "names of the optimizer's parameters", repr(unknown[0]))

    @property
    def most_points(self) -> int:
        sizes = [p.numel() for group in self.param_groups for p in group["params"]]
        count = self._per_step if isinstance(self._per_step, int) else sum(sizes)
        signs = [sign for _, sign in self.estimator.points()]
        return signs.count(0) + count * (len(signs) - signs.count(0))

    @property
    def own_settings(self) -> dict[str, Any]:
        own = {"per_step": self._per_step, "interval": self._interval}
        return {**own, "momentum": self._momentum, "l2": self._l2}

    def own_probe(self, buckets: list[Bucket], seeds: Seeds) -> CoordinateProbe:
        if any_sharded(p for b in buckets for p in b.params):
            fail(self.op, "params", "plain tensors: one weight moves at a time", "a DTensor", TypeError)
        probe = CoordinateProbe(buckets, seeds)
        probe.features = self._features
        return probe

    def estimate(self, buckets: list[Bucket], losses_at: LossesAt) -> Estimate:
        signs = [sign for _, sign in self.estimator.points()]
        self._entries = [self._entry(*chosen, [s for s in signs if s]) for chosen in self._choose(buckets)]
        centre = [None for s in signs if not s]
        moves = (
            (e.weights, i, side[at], e.own[at])
            for e in self._entries
            for at, i in enumerate(e.positions)
            for side in e.sides
        )
        count = len(centre) + sum(len(e.positions) * len(e.sides) for e in self._entries)
        try:
            losses = losses_at(itertools.chain(centre, moves), count)
        finally:
            if self._features is not None:
                self._features.clear()
        groups, reads = [e.bucket.group for e in self._entries], not self.run_state.capturable
        gradients, finite = gate(groups, self._gradients(losses), reads=reads)
        return Estimate(losses, gradients, finite, finite is NO, losses)

    def _gradients(self, losses: Tensor) -> list[Tensor]:
        """g of each entry of the step, fp32, clipped."""
        values = losses.double()
        one_sided = len(self._entries[0].sides) == 1
        change = values[1:] - values[0] if one_sided else values[::2] - values[1::2]
        parts = change.split([len(e.positions) for e in self._entries])
        return [
            projected_gradient(part / to_device(e.steps(), losses.device), e.bucket.group["clip"])
            for part, e in zip(parts, self._entries, strict=True)
        ]

    def update(self, probe: Probe, estimate: Estimate) -> None:
        (self._update_all if self._momentum or self._l2 else self._update_moved)(probe, estimate)
        torch.clear_autocast_cache()
        self.run_state.advance(estimate.finite)

    def _update_all(self, probe: Probe, estimate: Estimate) -> None:
        """With a momentum or l2: one pass over each parameter and its m, after plain fp32 operations on m."""
        measured = {
            e.weights.data_ptr(): (e, g) for e, g in zip(self._entries, estimate.gradients, strict=True)
        }
        for bucket in probe.buckets:
            finite = to_device(estimate.finite, bucket.device)
            states = []
            for p in bucket.params:
                m = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p, dtype=torch.float32))
                new = self._momentum * m + self._l2 * p.detach().float()
                if p.data_ptr() in measured:
                    e, g = measured[p.data_ptr()]
                    new.view(-1).index_add_(0, e.places, to_device(g, bucket.device))
                states.append(m.copy_(torch.where(finite, new, m)))
            group, seeds = bucket.group, probe.seeds[bucket.device]
            like = estimate.losses
            lr = scalars((learning_rate(group, like),), like.device)
            lr = torch.where(estimate.finite, lr, torch.zeros_like(lr))
            hyper = to_device(torch.cat((scalars((0.0, 1.0, 0.0), like.device), lr)).float(), bucket.device)
            decays = group["weight_decay"] > 0
            decay = gated_decay(decay_of(group, like), estimate.finite, bucket.device) if decays else None
            none = torch.empty(0, dtype=torch.float32, device=bucket.device)
            rounding = {"decay": decay, "rounding": group["rounding"], "rounding_seed": seeds[:1]}
            DENSE.step(bucket.members, "momentum", hyper, seeds[:0], none, first=states, **rounding)

    def _update_moved(self, probe: Probe, estimate: Estimate) -> None:
        for e, g in zip(self._entries, estimate.gradients, strict=True):
            group, device = e.bucket.group, e.weights.device
            if is_zero(group["lr"]):
                continue  # 0 * g would turn a weight of -0.0 into 0.0
            decay = (
                gated_decay(decay_of(group, g), estimate.finite, device) if group["weight_decay"] else None
            )
            change = to_device(descent(group, g), device)  # -0.0 unless finite: the weights keep their bits
            e.weights[e.places] = e.updated(change, probe.seeds[device][:1], decay, group["rounding"])

    def publish(self, estimate: Estimate) -> None:
        g = torch.cat(self._gradients(estimate.losses))
        self.last_losses, self.last_projected_gradient, self._entries = estimate.forwards, g, []

    def _entry(self, bucket: Bucket, param: Tensor, stream: int, index: Tensor, signs: list[int]) -> Entries:
        weights = param.detach().view(-1)
        own = weights[index]
        sides = [stepped(own, sign * bucket.eps) for sign in signs]
        return Entries(bucket, weights, stream, index, index.tolist(), own, sides)

    def _choose(self, buckets: list[Bucket]) -> list[tuple[Bucket, Tensor, int, Tensor]]:
        """The step's coordinates (int64, ascending) of each parameter that has any."""
        allowed = [
            (b, p, stream, self._allowed(p))
            for b in buckets
            for p, stream in zip(b.params, b.streams, strict=True)
        ]
        counts = [p.numel() if index is None else index.numel() for _, p, _, index in allowed]
        seed = derive_seed_int(self.seed, self.step_count // self._interval, _CHOICE_K)
        if self._per_step is None:
            chosen: list[Sequence[int]] = [range(n) for n in counts]
        elif isinstance(self._per_step, int):
            total, ends = sum(counts), list(itertools.accumulate(counts))
            if self._per_step > total:
                fail(self.op, "per_step", f"at most {total} coordinates", self._per_step)
            drawn = sample(seed, 0, self._per_step, total)
            chosen = [
                [i - end + n for i in drawn if end - n <= i < end]
                for n, end in zip(counts, ends, strict=True)
            ]
        else:
            names = {
                id(p): name
                for group in self.param_groups
                for name, p in zip(group.get("param_names", ()), group["params"], strict=True)
            }
            shares = [self._per_step.get(names[id(p)], 1.0) for _, p, *_ in allowed]
            chosen = [
                sample(seed, stream, round(share * n), n)
                for (*_, stream, _), share, n in zip(allowed, shares, counts, strict=True)
            ]
        found = []
        for (b, p, stream, index), at in zip(allowed, chosen, strict=True):
            if len(at):
                places = to_device(torch.tensor(at), p.device)
                found.append((b, p, stream, places if index is None else index[places]))
        if not found:
            fail(self.op, "mask, per_step", "at least one coordinate in a step", "none")
        return found

    def _allowed(self, param: Tensor) -> Tensor | None:
        """The positions (int64, ascending) that the parameter's mask keeps; None: all of them."""
        if "mask" not in self.state[param]:
            return None
        packed = self.state[param]["mask"]
        bits: Tensor = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
        return bits.flatten()[: param.numel()].nonzero().squeeze(1)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_per_step", "_interval", "_momentum", "_l2")
        # A copy has no modules to watch: it runs whole forwards.
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in own}, "_features": None}


def sample(seed: int, stream: int, count: int, total: int) -> list[int]:
    """``count`` different integers of range(total), ascending; every set is as likely.  Floyd's algorithm."""
    found: set[int] = set()
    for last in range(total - count, total):
        drawn = derive_stream_seed(seed, last, stream) % (last + 1)
        found.add(last if drawn in found else drawn)
    return sorted(found)
