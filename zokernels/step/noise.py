"""The one place where noise is applied to weights.

There are four calls: perturb, move, update and step.  All of them take their z from
:meth:`Noise.kernel_args`, so a perturbation and the update that follows it cannot disagree about z.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ..functional import Dist, Plan, combine, combine_, update_
from ..functional import Rule as KernelRule
from ..ops.combine import combine_planned
from ..transfer import to_device
from .shard import locals_of, placed

Tensors = Sequence[Tensor]
Empty = Callable[[int, tuple[int, ...]], Tensor]


class Members(NamedTuple):
    """Parameters that one kernel call takes, their noise streams, and the distribution of their noise."""

    params: Tensors
    streams: Sequence[int]
    dist: Dist
    #: Of just these parameters, where calls come again and again.
    plan: Plan | None = None

    @property
    def places(self) -> dict[str, Any]:
        """The arguments of an operation that say where in the noise the parameters are.

        A sharded parameter gets the part of the noise that belongs to its local shard.
        """
        return {"streams": self.streams} | placed(self.params)

    def picked(self, at: Sequence[int]) -> Members:
        """The members with these numbers."""
        return Members([self.params[i] for i in at], [self.streams[i] for i in at], self.dist)

    @property
    def target(self) -> tuple[Plan | Tensors, dict[str, Any]]:
        """The first argument of an operation that changes the parameters, and their places."""
        return (locals_of(self.params), self.places) if self.plan is None else (self.plan, {})


class Noise:
    """Dense noise: z_k is drawn for every weight, from seed k, the parameter's stream and the group's dist.

    Once a step, the direction gives each bucket such an object.  Other kinds of noise override
    :meth:`kernel_args`, or the calls themselves.  In all of them ``seeds`` is int64 [K] and ``coeffs`` is
    fp32 [K], on the device of the parameters.
    """

    #: False if perturbing and updating use different scales of z (MeZO variance scaling); restore then needs
    #: its own pass.
    same_scale = True
    #: (low, high) where the weights are integers, which every pass rounds and clamps to that range.
    bounds: tuple[int, int] | None = None
    #: Whether :meth:`kernel_args` are the seeds, the coefficients and the distribution alone.
    is_plain: ClassVar[bool] = True
    #: Whether the noise of matrices is a product of factors, which :meth:`stacked` gives.
    has_factors = False

    def __init_subclass__(cls) -> None:
        cls.is_plain = cls.kernel_args is Noise.kernel_args

    def is_dense(self, param: Tensor) -> bool:
        """Whether the noise of ``param`` is dense."""
        return not self.has_factors

    def is_plain_matrix(self, param: Tensor) -> bool:
        """Whether ``param`` is a matrix whose own rows and columns are those of the factors."""
        return False

    def stacked(
        self, param: Tensor, stream: int, seeds: Tensor, empty: Empty | None = None
    ) -> tuple[Tensor, Tensor]:
        """The factors of K directions of one matrix, [K, m, r] and [K, n, r]; what all directions share is
        [1, ...].

        ``empty(i, shape)``: memory for the left (0) or right (1) ones, fp32 on the device of the seeds.
        """
        raise NotImplementedError

    def factors(
        self, params: Sequence[Tensor], streams: Sequence[int], seeds: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The left [K, m, r] and right [K, n, r] factors of each of several matrices, for K seeds."""
        raise NotImplementedError

    def factor_bytes(self, params: Sequence[Tensor]) -> int:
        """What the factors of one direction take for these matrices."""
        raise NotImplementedError

    def kernel_args(self, members: Members, seeds: Tensor, coeffs: Tensor) -> dict[str, Any]:
        """The arguments of a combine that say what is added to ``members``, besides their places."""
        return {"seeds": seeds, "coeffs": coeffs, "dist": members.dist}

    def perturb(self, out: Tensors, members: Members, seeds: Tensor, coeffs: Tensor, **options: Any) -> None:
        """out = round(decay * theta + sum_k c_k z_k), rounded to nearest.

        ``options``: theta, the weights that are read (by default the parameters; or a plan of them), and
        decay (by default 1)."""
        theta = options.pop("theta", None)
        plan = members.plan if theta is None else theta
        if not isinstance(plan, Plan):
            theta, places = members.target if theta is None else (locals_of(theta), members.places)
            combine(locals_of(out), theta, **self.kernel_args(members, seeds, coeffs), **places, **options)
        elif self.is_plain:
            combine_planned(plan, out, seeds, coeffs, members.dist, **options)  # type: ignore[arg-type]
        else:
            combine(out, plan, **self.kernel_args(members, seeds, coeffs), **options)

    def move(self, members: Members, seeds: Tensor, coeffs: Tensor) -> None:
        """In place, theta = round(theta + sum_k c_k z_k), rounded to nearest."""
        Noise.update(self, members, seeds, coeffs)

    def update(self, members: Members, seeds: Tensor, coeffs: Tensor, **rounding: Any) -> None:
        """In place and in one pass, theta = round(decay * theta + sum_k c_k z_k).

        ``rounding``: the arguments decay, rounding and rounding_seed of :func:`zokernels.combine_`.
        """
        if members.plan is not None and self.is_plain:
            combine_planned(members.plan, None, seeds, coeffs, members.dist, **rounding)
            return
        theta, places = members.target
        combine_(theta, **self.kernel_args(members, seeds, coeffs), **places, **rounding)

    @property
    def measures(self) -> bool:
        """Whether :meth:`measure` has to run in this step, before the weights move."""
        return False

    def measure(self, params: Tensors) -> None:
        """Measures what this noise needs to know of ``params``, and keeps it with them.

        It is called only for weights that are elsewhere when a step begins; of others the direction itself
        has measured that.  Called again on the same weights, it finds the same.
        """

    def bound(self, views: Mapping[int, Tensor]) -> Noise:
        """This noise for tensors that stand for its parameters, and for what is kept of them.

        ``views``: these tensors, by the id of what they stand for.  Parameters that are streamed come to the
        device at another address each time, so others stand for them there.
        """
        return self

    def raise_to(self, members: Members, minimum: Tensor) -> None:
        """In place, theta = max(theta, minimum), with ``minimum`` rounded to theta's dtype."""
        raise_to(locals_of(members.params), minimum)

    def step(
        self, members: Members, rule: KernelRule, hyper: Tensor, seeds: Tensor, coeffs: Tensor, **options: Any
    ) -> None:
        """One :func:`zokernels.update_` with G = sum_k c_k z_k, for a rule that keeps a state of each weight.

        ``options``: the arguments first, second, decay, rounding and rounding_seed of that function.
        """
        theta, places = members.target
        update_(theta, rule, hyper, **self.kernel_args(members, seeds, coeffs), **places, **options)


def raise_to(params: Sequence[Tensor], minimum: Tensor) -> None:
    """In place, theta = max(theta, minimum) for each of ``params``.

    ``minimum``: a float of any dtype, 0-dim, on any device.
    """
    for p in params:
        p.clamp_(min=to_device(minimum, p.device, p.dtype))


DENSE = Noise()
