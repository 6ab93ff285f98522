"""Descent along directions whose space is measured in some steps (:class:`GradientSpace`)."""

from __future__ import annotations

from torch import Tensor

from ...checks import fail
from ...transfer import to_device
from ..directions.spaces import GradientSpace
from ..estimators import ProjectedDifference
from ..probes.probe import Probe
from ..roles import OptimizerView
from ..types import Bucket, Estimate
from .sgd import SGD


class Projected(SGD):
    """:class:`SGD` along direction 0; the g of the other directions estimate a gradient, whose space is kept.

    The space is made of g in fp32, as a log holds it, so that a replay makes the same.
    """

    through_noise = False

    def check_parts(self, optimizer: OptimizerView) -> None:
        parts = optimizer.estimator, optimizer.direction
        if not isinstance(parts[0], ProjectedDifference) or not isinstance(parts[1], GradientSpace):
            fail(optimizer.op, "estimator, direction", "ProjectedDifference and GradientSpace", parts)
        if optimizer.restore != "exact" or optimizer.subset is not None:
            got = (optimizer.restore, optimizer.subset)
            fail(optimizer.op, "restore, subset", "'exact' and no subset: a step has two kinds of noise", got)

    def begin(self, optimizer: OptimizerView, probe: Probe, estimate: Estimate) -> None:
        """Keeps the space that this step's other g give; one that is not finite keeps the one before."""
        space = optimizer.direction
        if not space.renews(optimizer, probe.buckets) or not bool(estimate.finite):
            return
        made = optimizer.cache.pop("spaces", {})  # none in a replay
        for bucket, g in zip(probe.buckets, estimate.gradients, strict=True):
            if (bases := made.get(id(bucket))) is None:
                coeffs = to_device(g[1:], bucket.device)
                bases = space.measured(bucket, probe.seeds[bucket.device][1:], coeffs)
            space.use(optimizer, bucket, bases)
            space.store(optimizer, bucket, bases)

    def update(
        self, optimizer: OptimizerView, bucket: Bucket, seeds: Tensor, g: Tensor, finite: Tensor
    ) -> None:
        super().update(optimizer, bucket, seeds[:1], g[:1], finite)
