"""Coordinate-wise estimation: one weight moves at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..backends.reference.noise import uniform16_at
from ..backends.reference.rounding import round_stochastic
from ..checks import fail
from ..contract import DOMAIN_ROUNDING, derive_seed_int, derive_stream_seed
from ..difference import stepped
from ..transfer import to_device
from .groups import Bucket, check_choice
from .guards import uninterrupted
from .masks import KeptMask
from .optimizer import Estimate, ZerothOrder
from .probe import Probe
from .rules import SGD
from .subset import Subset
from .update import decay_of, descent, gate, gated_decay, is_zero, projected_gradient
from .zosgd import ESTIMATORS

#: k of the seed that chooses coordinates: far above any direction's.
_CHOICE_K = 0xC0000000


class Entries(NamedTuple):
    """Some weights of a parameter."""

    bucket: Bucket
    weights: Tensor  #: all of them, flat
    stream: int
    places: Tensor  #: int64 [n]: which
    kept: Tensor  #: [n]: their values
    sides: list[Tensor]  #: [n] each: the values that they are moved to

    def steps(self) -> Tensor:
        """float64 [n]: the distance between the two points of each difference."""
        return self.sides[0].double() - (self.sides[1] if len(self.sides) > 1 else self.kept).double()


#: A weight (flat tensor, position), the value that it is moved to and its own; None: theta itself.
Move = tuple[Tensor, int, Tensor, Tensor]


class CoordinateProbe(Probe):
    """At a point one weight holds another value; then its own bits are put back."""

    @contextmanager
    def at(self, move: Move | None) -> Iterator[None]:
        if move is None:
            yield
            return
        weights, i, value, own = move
        try:
            weights[i] = value
            torch.clear_autocast_cache()  # a cast of the weight before the move
            yield
        finally:
            with uninterrupted():
                weights[i] = own
                torch.clear_autocast_cache()


class ZOCGE(ZerothOrder):
    r"""theta_i <- (1 - lr * weight_decay) * theta_i - lr * g_i   for the coordinates i of the step, and no other.

        g_i = (L(theta + h e_i) - L(theta)) / h               1 + n forwards for n coordinates ("one-sided")
        g_i = (L(theta + h e_i) - L(theta - h' e_i)) / (h + h')    2 n forwards ("two-sided")

    Finite differences, without the variance of random directions: for small models, and for few weights of large ones.
    h is eps as it becomes in the weight's dtype, never less, so that half precision loses no step.  Each weight gets
    its own bits back before the next one moves; all updates come after the last forward, each rounded once, with the
    rounding bits of its place in the parameter.

    Args:
        eps: size of a step, in units of theta.
        estimator: "one-sided" or "two-sided".
        mask: which weights may move: :class:`GivenMask` (bool masks or indices of your own) or :class:`MagnitudeMask`;
            default: all.
        per_step: how many of those are drawn anew for each step, from the seed: a number, of all parameters together;
            or shares in (0, 1] by parameter name, as layer-wise pruning ratios leave them (1 for a name that is not
            there).  Default: all, in every step.
        clip: bound on each \|g_i\|.
        params, lr, weight_decay, seed, rounding, subset: as :class:`ZerothOrder`.  Any model: weights move in place.

    ``last_losses`` [forwards] are those of all forwards, ``last_projected_gradient`` [n] the g_i, in the order of the
    parameters and of i.  ``step`` returns L(theta) where one-sided, else the mean loss.  A loss that is not finite
    skips the update of all coordinates.

    Source: DeepZero, Chen et al., 2024, arXiv 2310.02025.
    """

    replayable = False  # a step's record would be as long as its coordinates

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        eps: float = 5e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        rounding: str = "stochastic",
        *,
        estimator: str = "one-sided",
        mask: KeptMask | None = None,
        per_step: int | Mapping[str, float] | None = None,
        clip: float | None = None,
        subset: Subset | None = None,
    ) -> None:
        check_choice(self._op, "estimator", estimator, tuple(ESTIMATORS))
        if mask is not None and not isinstance(mask, KeptMask):
            fail(self._op, "mask", "a GivenMask or a MagnitudeMask", repr(mask), TypeError)
        if isinstance(per_step, Mapping):
            for name, share in per_step.items():
                if not 0 < share <= 1:
                    fail(self._op, f"per_step[{name!r}]", "a share in (0, 1]", share)
        elif per_step is not None and (not isinstance(per_step, int) or isinstance(per_step, bool) or per_step < 1):
            fail(self._op, "per_step", "an integer >= 1, or shares by parameter name", repr(per_step))
        self._per_step = per_step
        super().__init__(
            *(params, lr, eps, weight_decay, seed),
            rounding=rounding,
            clip=clip,
            direction=mask,
            subset=subset,
            estimator=ESTIMATORS[estimator](),
            rule=SGD(),
        )
        names = {name for group in self.param_groups for name in group.get("param_names", ())}
        if isinstance(per_step, Mapping) and (unknown := [name for name in per_step if name not in names]):
            fail(self._op, "per_step", "names of the optimizer's parameters", repr(unknown[0]))

    def _probe(self, buckets: list[Bucket], seeds: dict[torch.device, Tensor]) -> CoordinateProbe:
        return CoordinateProbe(buckets, seeds)

    def _estimate(self, buckets: list[Bucket], losses_at: Callable[[Iterable[Move | None]], Tensor]) -> Estimate:
        signs = [sign for _, sign in self.estimator.points()]
        self._entries = [self._entry(*chosen, [s for s in signs if s]) for chosen in self._choose(buckets)]
        moves = (
            (e.weights, i, side[at], e.kept[at])
            for e in self._entries
            for at, i in enumerate(e.places.tolist())
            for side in e.sides
        )
        losses = losses_at(itertools.chain((None for s in signs if not s), moves))
        gradients, finite = gate([e.bucket.group for e in self._entries], self._gradients(losses))
        return Estimate(losses, gradients, finite, self._skips(finite), losses)

    def _gradients(self, losses: Tensor) -> list[Tensor]:
        """g of each entry of the step, fp32, clipped."""
        values = losses.double()
        one_sided = len(self._entries[0].sides) == 1
        change = values[1:] - values[0] if one_sided else values[::2] - values[1::2]
        parts = change.split([e.places.numel() for e in self._entries])
        return [
            projected_gradient(part / to_device(e.steps(), losses.device), e.bucket.group["clip"])
            for part, e in zip(parts, self._entries, strict=True)
        ]

    def _update(self, probe: Probe, estimate: Estimate) -> None:
        for e, g in zip(self._entries, estimate.gradients, strict=True):
            group, device = e.bucket.group, e.weights.device
            if is_zero(group["lr"]):
                continue  # 0 * g would turn a weight of -0.0 into 0.0
            acc = e.kept.float()  # unless finite, times 1 plus -0.0: the same bits
            if group["weight_decay"]:
                acc = gated_decay(decay_of(group, g), estimate.finite, device) * acc
            acc = acc + to_device(descent(group, g), device)
            if group["rounding"] == "stochastic":
                fields = uniform16_at(probe.seeds[device], e.stream, DOMAIN_ROUNDING, e.places)
                e.weights[e.places] = round_stochastic(acc, fields, e.weights.dtype)
            else:
                e.weights[e.places] = acc.to(e.weights.dtype)
        torch.clear_autocast_cache()
        self._state.advance(estimate.finite)

    def _publish(self, estimate: Estimate) -> None:
        g = torch.cat(self._gradients(estimate.losses))
        self.last_losses, self.last_projected_gradient, self._entries = estimate.forwards, g, []

    def _entry(self, bucket: Bucket, param: Tensor, stream: int, index: Tensor, signs: list[int]) -> Entries:
        weights = param.detach().view(-1)
        kept = weights[index]
        sides = [stepped(kept, sign * bucket.eps) for sign in signs]
        return Entries(bucket, weights, stream, index, kept, sides)

    def _choose(self, buckets: list[Bucket]) -> list[tuple[Bucket, Tensor, int, Tensor]]:
        """The step's coordinates (int64, ascending) of each parameter that has any."""
        allowed = [
            (b, p, stream, self._allowed(p)) for b in buckets for p, stream in zip(b.params, b.streams, strict=True)
        ]
        counts = [p.numel() if index is None else index.numel() for _, p, _, index in allowed]
        seed = derive_seed_int(self.seed, self.step_count, _CHOICE_K)
        if self._per_step is None:
            chosen: list[Sequence[int]] = [range(n) for n in counts]
        elif isinstance(self._per_step, int):
            total, ends = sum(counts), list(itertools.accumulate(counts))
            if self._per_step > total:
                fail(self._op, "per_step", f"at most {total} coordinates", self._per_step)
            drawn = sample(seed, 0, self._per_step, total)
            chosen = [[i - end + n for i in drawn if end - n <= i < end] for n, end in zip(counts, ends, strict=True)]
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
            fail(self._op, "mask, per_step", "at least one coordinate in a step", "none")
        return found

    def _allowed(self, param: Tensor) -> Tensor | None:
        """Positions (int64, ascending) that the parameter's mask keeps; None: all, which are not listed."""
        if "mask" not in self.state[param]:
            return None
        packed = self.state[param]["mask"]
        bits: Tensor = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
        return bits.flatten()[: param.numel()].nonzero().squeeze(1)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_per_step": self._per_step}


def sample(seed: int, stream: int, count: int, total: int) -> list[int]:
    """``count`` different integers of range(total), ascending; all sets alike.  Floyd's algorithm."""
    found: set[int] = set()
    for last in range(total - count, total):
        drawn = derive_stream_seed(seed, last, stream) % (last + 1)
        found.add(last if drawn in found else drawn)
    return sorted(found)
