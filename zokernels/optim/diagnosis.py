"""What the differences of a step's losses are made of: signal, rounding, and the noise of the batch."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_integer
from ..step.directions.direction import Direction
from ..step.directions.integers import IntegerSteps
from ..step.directions.low_rank import FreshFactors, KeptLeft, KeptRight, Subspace, TemporalFactor
from ..step.directions.masks import GivenMask, MagnitudeMask, RandomMask
from ..step.directions.scaling import Sphere, TensorScale
from ..step.estimators import TwoSided
from ..step.groups import devices_of, label_of, takes_part
from ..step.loss import LossReader, run_closure
from ..step.rules.sgd import SGD
from ..step.step import StepOptimizer
from ..step.watch import moved_shares
from .trial import Closures, Unchanged, check_alone

#: The sizes of the perturbation that are compared, in units of the group's eps.
FACTORS = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
#: The place of the optimizer's own among them.
_OWN_EPS = FACTORS.index(1.0)
#: At least so many times the rounding of the losses a difference should be.
_CLEAR = 5.0
#: At least so high a cosine of the differences at eps and at four times eps counts as straight.
_STRAIGHT = 0.9
#: Directions that need nothing from the rule, so that they can be drawn here.
_OWN = (
    *(Direction, FreshFactors, KeptLeft, KeptRight, Subspace, TemporalFactor, GivenMask, MagnitudeMask),
    *(RandomMask, Sphere, TensorScale),
)
#: So many batches are compared at most.
_BATCHES = 4


@dataclass(frozen=True)
class Diagnosis:
    """What :meth:`ZerothOrder.diagnose` measured; ``print`` shows it.  All numbers are in units of the loss.

    Attributes:
        loss: at theta.
        dtype: of what the closure returns.
        difference: root mean square of L(theta + eps z) - L(theta - eps z) over the directions.
        spacing: the distance between neighbouring numbers of ``dtype`` at the loss.
        rounding: of a difference, as its dependence on eps shows it: from four times the differences at
            eps / 16, less those at eps / 4.  It holds what bf16 activations and weights lose, too.
        batch: standard deviation of a difference from batch to batch; None where all batches are one.
        bends: whether the loss is far from straight within eps.
        straight: for each eps of the table but the first the cosine between its differences and those at a
            quarter of it: near 1 where the loss is straight and its rounding small.
        differences: for each eps of the table the root mean square of the differences.
        eps: the perturbations of the table.
        repeats: whether the loss at theta is the same twice.
        moved: by name the share of the weights that eps moves, of tensors where that is below 0.9.
        advice: what would mend something, each a sentence; empty where nothing is wrong.
        dense: whether dense noise was measured in the place of the optimizer's directions.
    """

    loss: float
    dtype: torch.dtype
    difference: float
    spacing: float
    rounding: float
    batch: float | None
    bends: bool
    straight: list[float]
    differences: list[float]
    eps: list[float]
    repeats: bool
    moved: dict[str, float]
    advice: list[str]
    dense: bool

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        lines = [
            f"loss                       {self.loss:.6g} ({kind}, neighbours {self.spacing:.2g} apart)",
            f"|L+ - L-|                  {self.difference:.3g}, root mean square over directions"
            + (" (dense noise)" if self.dense else ""),
            f"  to the loss's spacing    {_ratio(self.difference, self.spacing)}",
            f"  to rounding              {_ratio(self.difference, self.rounding)}",
        ]
        if self.batch is not None:
            lines.append(f"  to the batch's noise     {_ratio(self.difference, self.batch)}")
        lines.append(f"{'eps':>12} {'|L+ - L-|':>11} {'as one above':>14}")
        for eps, difference, cosine in zip(self.eps, self.differences, ["", *self.straight], strict=True):
            text = cosine if isinstance(cosine, str) else f"{cosine:.3f}"
            lines.append(f"{eps:12.2e} {difference:11.3g} {text:>14}")
        for name, share in sorted(self.moved.items(), key=lambda item: item[1])[:5]:
            lines.append(f"{name}: eps moves {100 * share:.3g} % of the weights")
        return "\n".join([*lines, *(f"* {text}" for text in self.advice or ["nothing to mend"])])


def _ratio(signal: float, noise: float) -> str:
    return f"{signal / noise:.3g} times" if noise else "no noise seen"


def diagnose(
    optimizer: StepOptimizer,
    closure: Callable[..., Any],
    batches: Sequence[Any] | None,
    directions: int,
    model: nn.Module | None,
) -> Diagnosis:
    """What :meth:`ZerothOrder.diagnose` does; its docstring says what the arguments mean."""
    op = f"{optimizer.op}.diagnose"
    check_alone(op, optimizer)
    check_integer(op, "directions", directions, 2)
    closures = Closures(op, closure, batches)
    with Unchanged(optimizer, model) as kept, torch.no_grad():
        return _Measured(op, optimizer, closures, kept, directions).diagnosis()


class _Measured:
    """The forwards of one diagnosis."""

    def __init__(
        self, op: str, optimizer: StepOptimizer, closures: Closures, kept: Unchanged, directions: int
    ) -> None:
        self.op, self.optimizer, self.closures, self.kept = op, optimizer, closures, kept
        self.directions, self.dtype = directions, torch.float64
        self.device = devices_of(optimizer.param_groups)[0]
        self.eps = optimizer.param_groups[0]["eps"]
        first, second = self._at_theta(), self._at_theta()
        self.loss, self.repeats = first, first == second or (math.isnan(first) and math.isnan(second))
        self.dense = not _is_own(optimizer)

    def _at_theta(self) -> float:
        """The loss of the first batch, from the random numbers of the beginning."""
        self.kept.random.restore()
        result = run_closure(self.op, self.closures[0])
        if isinstance(result, Tensor):
            self.dtype = result.dtype
        return float(LossReader().read(self.op, result, self.device, False))

    def _differences(self, factor: float, batch: int) -> Tensor:
        """L(theta + factor eps z_k) - L(theta - factor eps z_k), float64 [directions], of one batch."""
        trial = _plain(self.op, self.optimizer, self.directions, factor)
        if len(self.closures) or not batch:
            self.kept.random.restore()
        losses: list[Tensor] = []

        class Reader(LossReader):
            def losses(self, results: list[Any]) -> Tensor:
                losses.append(super().losses(results).double())
                return losses[0]

        trial.run_step(self.closures[batch], Reader(), lambda probe, estimate: None)
        self.kept.restore_weights()
        plus, minus = losses[0].cpu().view(-1, 2).unbind(1)
        return plus - minus

    def diagnosis(self) -> Diagnosis:
        ladder = [self._differences(factor, 0) for factor in FACTORS]
        sizes = [_rms(d) for d in ladder]
        straight = [_cosine(a, b) for a, b in itertools.pairwise(ladder)]
        # If d(e) = 2 e g + noise, then 4 d(e) - d(4 e) is noise alone, with 17 times the variance of d's.  At
        # the next pair of eps noise is the same, while what bends has grown with the third power of eps.
        rounding, after = (_rms(4 * a - b) / math.sqrt(17) for a, b in itertools.pairwise(ladder[:3]))
        if flat := not sizes[0]:  # nothing of losses in coarse steps is seen at so small an eps
            rounding = max(rounding, after)
        bends = not flat and straight[1] < _STRAIGHT and after > 4 * rounding
        batch = self._batch_noise(ladder[_OWN_EPS])
        spacing = _spacing(self.loss, self.dtype)
        moved = _moved(self.optimizer)
        found = Diagnosis(
            loss=self.loss,
            dtype=self.dtype,
            difference=sizes[_OWN_EPS],
            spacing=spacing,
            rounding=rounding,
            batch=batch,
            bends=bends,
            straight=straight,
            differences=sizes,
            eps=[self.eps * factor for factor in FACTORS],
            repeats=self.repeats,
            moved=moved,
            advice=[],
            dense=self.dense,
        )
        found.advice.extend(_advice(found, len(self.closures)))
        return found

    def _batch_noise(self, first: Tensor) -> float | None:
        """The standard deviation of a difference from batch to batch."""
        count = min(len(self.closures), _BATCHES) if len(self.closures) else _BATCHES
        found = [first, *(self._differences(1.0, batch) for batch in range(1, count))]
        if len(found) < 2 or (not len(self.closures) and all(torch.equal(d, first) for d in found)):
            return None
        return float(torch.stack(found).var(0).mean().sqrt())


def _is_own(optimizer: StepOptimizer) -> bool:
    return type(optimizer.direction) in _OWN or isinstance(optimizer.direction, IntegerSteps)


class _Plain(StepOptimizer):
    """A step whose errors have the name of what was called."""

    def __init__(self, op: str, *args: Any, **kwargs: Any) -> None:
        self._name = op
        super().__init__(*args, **kwargs)

    @property
    def op(self) -> str:
        return self._name


def _plain(op: str, optimizer: StepOptimizer, directions: int, factor: float) -> StepOptimizer:
    """A step with two-sided differences along the optimizer's directions, at ``factor`` times its eps."""
    keys = ("params", "param_names", "streams", "dist", "rounding", "clip", "weight_decay", "bits")
    groups = []
    for group in optimizer.param_groups:
        own = {key: group[key] for key in keys if key in group}
        if names := own.pop("param_names", None):
            own["params"] = list(zip(names, own["params"], strict=True))
        groups.append({**own, "lr": 0.0, "eps": group["eps"] * factor, "clip": None})
    direction = Direction()
    if isinstance(optimizer.direction, IntegerSteps):
        direction = IntegerSteps(optimizer.direction.bits)
    elif _is_own(optimizer):
        direction = copy.copy(optimizer.direction)
    trial = _Plain(
        op,
        groups,
        {"lr": 0.0},
        seed=optimizer.seed,
        restore="inplace" if optimizer.restore == "inplace" else "exact",
        direction=direction,
        subset=optimizer.subset,
        scratch=optimizer.block_bytes,
        estimator=TwoSided(directions),
        rule=SGD(),
    )
    trial.generators = optimizer.generators
    trial.warned |= {"half loss", "zero g", "same numbers", "other numbers"}  # said by the advice
    return trial


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _cosine(a: Tensor, b: Tensor) -> float:
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length else 0.0


def _spacing(loss: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of ``dtype`` at ``loss``."""
    info = torch.finfo(dtype if dtype.is_floating_point else torch.float64)
    if not math.isfinite(loss) or not loss:
        return float(info.smallest_normal)
    return float(info.eps * 2.0 ** (math.frexp(abs(loss))[1] - 1))


def _moved(optimizer: StepOptimizer) -> dict[str, float]:
    found = {}
    for group in optimizer.param_groups:
        if "bits" in group:
            continue
        for i, p in enumerate(group["params"]):
            if takes_part(group, p) and p.numel():
                (share,) = moved_shares([p], group["eps"], group["dist"])
                if share < 0.9:
                    found[label_of(group, i).strip("'")] = share
    return found


def _advice(found: Diagnosis, batches: int) -> list[str]:
    out, half, eps = [], found.dtype in (torch.bfloat16, torch.float16), found.eps[_OWN_EPS]
    if not math.isfinite(found.loss):
        return [f"the loss at the weights as they are is {found.loss}: nothing can be measured"]
    if not found.repeats:
        out.append(
            "the loss at the same weights is not the same twice: the closure draws its own data or random "
            "numbers, so the differences of a step are noise. Draw the batch before the step, and list "
            "generators of your own in optimizer.generators"
        )
        return out
    if not any(found.differences) and not half:
        return [*out, "no perturbation changes the loss at all: it does not depend on these parameters"]
    if half:
        kind = str(found.dtype).removeprefix("torch.")
        out.append(f"the loss is in {kind}: compute it in fp32, from logits in fp32")
    noise = max(found.rounding, found.spacing)
    clear = found.difference >= _CLEAR * noise
    if found.difference > abs(found.loss) / 2:
        out.append(f"differences are as large as the loss: take a far smaller eps than {eps:.2g}")
    elif found.bends:
        out.append(
            f"the loss bends within eps={eps:.2g}, because differences at eps / 4 point elsewhere: "
            f"take a smaller one, eps={eps / 4:.2g}"
        )
    elif not clear and not half:
        better = [
            e for e, d in zip(found.eps, found.differences, strict=True) if e > eps and d >= _CLEAR * noise
        ]
        way = f"a larger eps, {better[0]:.2g}" if better else "a larger eps"
        out.append(
            f"differences are {found.difference / noise:.2g} times the rounding of the losses, of which "
            f"{_CLEAR:g} would be clear: take {way}, and fp32 activations where they are in half precision"
        )
    if found.batch is not None and found.batch > found.difference:
        times = (found.batch / found.difference) ** 2
        out.append(
            f"from batch to batch differences vary by {found.batch / found.difference:.2g} times their size: "
            f"a batch {times:.2g} times as large would make both equal"
        )
    stuck = [name for name, share in found.moved.items() if share < 0.5]
    if stuck:
        text = ", ".join(stuck[:3]) + (f" and {len(stuck) - 3} more" if len(stuck) > 3 else "")
        out.append(
            f"eps={eps:.2g} moves less than half of the weights of {text}: take a larger eps for them, "
            "keep them in fp32, or leave them out (requires_grad_(False))"
        )
    return out
