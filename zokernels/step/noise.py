"""The one place where noise is applied to weights.

There are four calls: perturb, move, update and step.  All of them take their z from
:meth:`Noise.kernel_args`, so a perturbation and the update that follows it cannot disagree about z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..functional import Dist, combine, combine_, update_
from ..functional import Rule as KernelRule
from .shard import locals_of, placed

Tensors = Sequence[Tensor]


class Members(NamedTuple):
    """Parameters that one kernel call takes, their noise streams, and the distribution of their noise."""

    params: Tensors
    streams: Sequence[int]
    dist: Dist


class Noise:
    """Dense noise: z_k is drawn for every weight, from seed k, the parameter's stream and the group's dist.

    Once a step, the direction gives each bucket such an object.  Other kinds of noise override
    :meth:`kernel_args`, or the calls themselves.  In all of them ``seeds`` is int64 [K] and ``coeffs`` is
    fp32 [K], on the device of the parameters.
    """

    #: False if perturbing and updating use different scales of z (MeZO variance scaling); restore then needs
    #: its own pass.
    same_scale = True

    def kernel_args(self, members: Members, seeds: Tensor, coeffs: Tensor) -> dict[str, Any]:
        """The arguments of a combine that say what is added to ``members``.

        A sharded parameter gets the part of the noise that belongs to its local shard.
        """
        args = {"seeds": seeds, "coeffs": coeffs, "streams": members.streams, "dist": members.dist}
        return args | placed(members.params)

    def perturb(self, out: Tensors, members: Members, seeds: Tensor, coeffs: Tensor, **options: Any) -> None:
        """out = round(decay * theta + sum_k c_k z_k), rounded to nearest.

        ``options``: theta, the weights that are read (by default the parameters), and decay (by default 1).
        """
        theta = locals_of(options.pop("theta", members.params))
        combine(locals_of(out), theta, **self.kernel_args(members, seeds, coeffs), **options)

    def move(self, members: Members, seeds: Tensor, coeffs: Tensor) -> None:
        """In place, theta = round(theta + sum_k c_k z_k), rounded to nearest."""
        combine_(locals_of(members.params), **self.kernel_args(members, seeds, coeffs))

    def update(self, members: Members, seeds: Tensor, coeffs: Tensor, **rounding: Any) -> None:
        """In place and in one pass, theta = round(decay * theta + sum_k c_k z_k).

        ``rounding``: the arguments decay, rounding and rounding_seed of :func:`zokernels.combine_`.
        """
        combine_(locals_of(members.params), **self.kernel_args(members, seeds, coeffs), **rounding)

    def step(
        self, members: Members, rule: KernelRule, hyper: Tensor, seeds: Tensor, coeffs: Tensor, **options: Any
    ) -> None:
        """One :func:`zokernels.update_` with G = sum_k c_k z_k, for a rule that keeps a state of each weight.

        ``options``: the arguments first, second, decay, rounding and rounding_seed of that function.
        """
        update_(locals_of(members.params), rule, hyper, **self.kernel_args(members, seeds, coeffs), **options)


DENSE = Noise()
