"""Momentum of the fresh factor alone, for directions of low rank whose other factors are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_number, fail
from ...transfer import to_device
from ..directions.low_rank import Factored, KeptLeft, KeptRight, TemporalFactor
from ..probes.probe import Probe
from ..roles import OptimizerView
from ..scalars import learning_rate, scalars
from ..types import Bucket, Estimate, Group
from .rule import Rule, check_betas, check_fraction, groups_of


class FactorMomentum(Rule):
    """M <- momentum M + (1 - momentum) sum_k g_k U_k;   theta <- decay theta - lr M V^T.

    U_k is the fresh factor of the direction and V the kept one (:class:`KeptRight`), so the state of an
    [m, n] matrix is [m, r].  It is ``optimizer.state[p]["factor"]``, fp32.  Where V is drawn anew, M V_old^T
    is projected on the new one: M <- M V_old^T V / n.  With :class:`TemporalFactor`, whose fresh factor are
    r weights tau, the state is [1, r], and theta moves by -lr sum_s M_s u_s v_s^T.  A vector has a momentum
    of its size.

    The first update has no factor 1 - momentum, as in the authors' code.  The projection is summed in
    float64; its last bits may depend on the machine.

    Sources: LOZO-M (Chen et al., 2024, arXiv 2410.07698), TeZO-m (Sun et al., 2025, arXiv 2501.19057).
    """

    through_noise = False

    def __init__(self, momentum: float = 0.7) -> None:
        super().__init__(momentum=momentum)

    def check(self, op: str, group: Group) -> None:
        super().check(op, group)
        check_fraction(op, "momentum", group["momentum"])

    def check_parts(self, optimizer: OptimizerView) -> None:
        direction = optimizer.direction
        if not isinstance(direction, (KeptRight, TemporalFactor)) or optimizer.subset is not None:
            got = (direction, optimizer.subset)
            fail(optimizer.op, "direction, subset", "KeptRight or TemporalFactor, and no subset", got)

    def initial(self, optimizer: OptimizerView) -> dict[str, Tensor]:
        return {"updates": torch.zeros(1, dtype=torch.int64)}

    def begin(self, optimizer: OptimizerView, probe: Probe, estimate: Estimate) -> None:
        """Counts the update, and brings the states to the factors of a window that begins.

        The latter is done in a skipped step, too: the next one has the new factors.
        """
        self._gains = {}
        for group in groups_of(probe.buckets):
            updates = self.kept(optimizer, group, estimate.finite.device)["updates"]
            rest = torch.full_like(updates, 1 - group["momentum"], dtype=torch.float64)
            self._gains[id(group)] = torch.where(updates == 0, torch.ones_like(rest), rest)
            updates += estimate.finite
        if optimizer.step_count and optimizer.direction.begins_window(optimizer):
            for bucket in probe.buckets:
                self._noise(bucket).carry_over(bucket.members, self._states(optimizer, bucket), optimizer)

    def update(
        self, optimizer: OptimizerView, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor
    ) -> None:
        group, one = bucket.group, torch.ones(1, dtype=torch.float64, device=g.device)
        keep = torch.where(finite, group["momentum"] * one, one)
        coeffs = self._gains[id(group)] * g.double()
        lr = torch.where(finite, scalars((learning_rate(group, g),), g.device), torch.zeros_like(one))
        here = lambda t: to_device(t.float(), bucket.device)
        states, rounding = self._states(optimizer, bucket), self.rounding(bucket, seeds, g, finite)
        noise = self._noise(bucket)
        noise.descend(bucket.members, states, seeds, here(coeffs), here(keep), here(lr), **rounding)

    def _noise(self, bucket: Bucket) -> Factored:
        assert isinstance(bucket.noise, Factored)  # check_parts
        return bucket.noise

    def _states(self, optimizer: OptimizerView, bucket: Bucket) -> list[Tensor]:
        """The state of each parameter, 0 at first."""
        states = []
        for p, shape in zip(bucket.params, self._noise(bucket).fresh_shapes(bucket.members), strict=True):
            state = optimizer.state[p]
            if "factor" not in state:
                self._check_capture(optimizer, p.device, "none")
                with torch.inference_mode(False):
                    state["factor"] = torch.zeros(shape, dtype=torch.float32, device=p.device)
            states.append(state["factor"])
        return states


class FactorAdam(FactorMomentum):
    """Adam whose moments are of the fresh weights tau of :class:`TemporalFactor`: 2 r numbers for a matrix.

        t = sum_k g_k tau_k;   M <- b1 M + (1 - b1) t;   V <- b2 V + (1 - b2) t^2
        theta <- decay theta - lr (sum_s M'_s u_s v_s^T) / (sqrt(sum_s V'_s u_s^2 v_s^2^T) + adam_eps)

    The squares of u_s and v_s are of each element: the second moment leaves out the products of different s.
    M' = M / (1 - b1^n) and V' = V / (1 - b2^n), n updates, as in :class:`Adam`, whose rule vectors have.  A
    step makes two [m, n] tensors of fp32, one matrix after the other.

    Source: TeZO-Adam (Sun et al., 2025, arXiv 2501.19057).  The paper's text was not at hand: the separable
    second moment is from memory of it, and the bias corrections are Adam's.
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), adam_eps: float = 1e-8) -> None:
        Rule.__init__(self, betas=betas, adam_eps=adam_eps)

    def check(self, op: str, group: Group) -> None:
        Rule.check(self, op, group)
        check_betas(op, group["betas"])
        check_number(op, "adam_eps", group["adam_eps"])

    def check_parts(self, optimizer: OptimizerView) -> None:
        if not isinstance(optimizer.direction, TemporalFactor) or optimizer.subset is not None:
            got = (optimizer.direction, optimizer.subset)
            fail(optimizer.op, "direction, subset", "TemporalFactor, and no subset", got)

    def initial(self, optimizer: OptimizerView) -> dict[str, Tensor]:
        return {"products": torch.ones(2, dtype=torch.float64)}

    def begin(self, optimizer: OptimizerView, probe: Probe, estimate: Estimate) -> None:
        finite = estimate.finite
        for group in groups_of(probe.buckets):
            products = self.kept(optimizer, group, finite.device)["products"]
            products.mul_(
                torch.where(finite, scalars(group["betas"], finite.device), torch.ones_like(products))
            )

    def update(
        self, optimizer: OptimizerView, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor
    ) -> None:
        group, noise = bucket.group, self._noise(bucket)
        (b1, b2), like = group["betas"], g
        left = (1 - self.kept(optimizer, group, g.device)["products"]).to(bucket.device)
        lr = scalars((learning_rate(group, like),), g.device).to(bucket.device)
        on = to_device(finite, bucket.device)
        left = torch.where(on, left, torch.ones_like(left))  # no 0 / 0 before the first update
        lr = torch.where(on, lr, torch.zeros_like(lr))
        coeffs, rounding = to_device(g, bucket.device), self.rounding(bucket, seeds, g, finite)
        shapes = noise.fresh_shapes(bucket.members)
        for i, (p, shape) in enumerate(zip(bucket.params, shapes, strict=True)):
            one, state = bucket.members.picked([i]), optimizer.state[p]
            for key in ("factor", "factor_sq"):
                if key not in state:
                    self._check_capture(optimizer, p.device, "none")
                    with torch.inference_mode(False):
                        state[key] = torch.zeros(shape, dtype=torch.float32, device=p.device)
            fresh = noise.fresh(one, seeds, coeffs)
            new = b1 * state["factor"] + (1 - b1) * fresh, b2 * state["factor_sq"] + (1 - b2) * fresh * fresh
            for key, moment in zip(("factor", "factor_sq"), new, strict=True):
                state[key].copy_(torch.where(on, moment, state[key]))
            moments = state["factor"], state["factor_sq"]
            noise.descend_adam(one, moments, left, lr, group["adam_eps"], **rounding)


class Orthogonal(Rule):
    """theta <- decay theta - lr P msign(sum_k g_k U_k^T): every direction of the subspace moves equally far.

    P [m, r] and U_k [n, r] are the factors of :class:`KeptLeft`, and msign(X) = U V^T where X = U S V^T is a
    singular value decomposition.  Vectors take plain descent along sum_k g_k z_k.  lr is in units of theta
    for matrices, and in units of theta per unit of g for vectors, which should have a group of their own.
    (The authors' code has 1e-7 for them.)  Where no singular value is 0 the scale of g does not matter.

    Source: ZO-Muon (arXiv 2602.17155), with ``muon_svd`` of its code; its other form takes five steps of a
    Newton-Schulz iteration, whose singular values lie between 0.7 and 1.2.
    """

    through_noise = False

    def check_parts(self, optimizer: OptimizerView) -> None:
        if not isinstance(optimizer.direction, KeptLeft):
            fail(optimizer.op, "direction", "KeptLeft", optimizer.direction)

    def update(
        self, optimizer: OptimizerView, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor
    ) -> None:
        assert isinstance(bucket.noise, Factored)  # check_parts
        one = torch.ones(1, dtype=torch.float64, device=g.device)
        lr = torch.where(finite, scalars((learning_rate(bucket.group, g),), g.device), torch.zeros_like(one))
        here = lambda t: to_device(t.float(), bucket.device)
        rounding = self.rounding(bucket, seeds, g, finite)
        bucket.noise.orthogonal(bucket.members, seeds, here(g), here(lr), **rounding)
