"""The one place where noise is applied to weights: four calls, so perturbation and update cannot differ in z."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..functional import Dist, combine, combine_, update_
from ..functional import Rule as KernelRule
from .shard import locals_of, placed


class Members(NamedTuple):
    """Parameters that one kernel call takes, the noise stream of each, and the distribution of their noise."""

    params: Sequence[Tensor]
    streams: Sequence[int]
    dist: Dist


class Noise:
    """z_k is the noise of seed k in every weight: dense, of the parameter's stream and the group's distribution.

    A direction gives each bucket such an object, once a step.  Another kind of noise overrides :meth:`kernel_args`,
    or the calls themselves.  In all of them ``seeds`` is int64 [K] and ``coeffs`` fp32 [K], on the parameters' device.
    """

    #: False if perturbing and updating use different scales of z (MeZO's variance scaling): the update then cannot
    #: take a perturbation out, and restoring needs a pass of its own.
    same_scale = True

    def kernel_args(self, members: Members, seeds: Tensor, coeffs: Tensor) -> dict[str, Any]:
        """The arguments of a combine that say what is added; of sharded parameters, to the part that lies here."""
        args = {"seeds": seeds, "coeffs": coeffs, "streams": members.streams, "dist": members.dist}
        return args | placed(members.params)

    def perturb(
        self,
        out: Sequence[Tensor],
        members: Members,
        seeds: Tensor,
        coeffs: Tensor,
        decay: float | None = None,
        theta: Sequence[Tensor] | None = None,
    ) -> None:
        """out = round(decay * theta + sum_k c_k z_k), to nearest.  ``theta``: default, the parameters themselves."""
        theta = locals_of(members.params) if theta is None else theta
        combine(locals_of(out), theta, **self.kernel_args(members, seeds, coeffs), decay=decay)

    def move(self, members: Members, seeds: Tensor, coeffs: Tensor) -> None:
        """In place, theta = round(theta + sum_k c_k z_k), to nearest."""
        combine_(locals_of(members.params), **self.kernel_args(members, seeds, coeffs))

    def update(self, members: Members, seeds: Tensor, coeffs: Tensor, **rounding: Any) -> None:
        """In place and in one pass, theta = round(decay * theta + sum_k c_k z_k).

        ``rounding``: the arguments decay, rounding and rounding_seed of :func:`zokernels.combine_`.
        """
        combine_(locals_of(members.params), **self.kernel_args(members, seeds, coeffs), **rounding)

    def step(
        self,
        members: Members,
        rule: KernelRule,
        hyper: Tensor,
        seeds: Tensor,
        coeffs: Tensor,
        **states_and_rounding: Any,
    ) -> None:
        """One :func:`zokernels.update_` with G = sum_k c_k z_k, for a rule that keeps a state of each weight.

        ``states_and_rounding``: its arguments first, second, decay, rounding and rounding_seed.
        """
        args = self.kernel_args(members, seeds, coeffs)
        update_(locals_of(members.params), rule, hyper, **args, **states_and_rounding)


DENSE = Noise()
