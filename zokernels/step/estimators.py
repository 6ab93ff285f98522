"""Gradient estimators: where the closure runs, and how its losses become a coefficient of each direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_choice, check_integer, check_number, fail
from ..transfer import known_on_host


@dataclass(frozen=True)
class Estimator:
    """The gradient estimate is sum_k g_k z_k over the directions k = 0 .. q - 1.

    z_k is the noise of seed ``derive_seed(run_seed, step, k)``.  All losses of a step are measured before its
    one update, so each of them is a loss at the same theta, perturbed.
    """

    #: q, the number of directions in a step.
    directions: int = 1

    def __post_init__(self) -> None:
        check_integer(type(self).__name__, "directions", self.directions, 1)

    def points(self) -> list[tuple[int, int]]:
        """(k, sign) of each forward, in order: at theta + sign * eps * z_k; sign 0 is theta itself."""
        raise NotImplementedError

    def coefficients(self, losses: Tensor, eps: float) -> Tensor:
        """g (float64 [q]) from the losses (float64 [n], in the order of :meth:`points`), on their device."""
        raise NotImplementedError

    def loss(self, losses: Tensor) -> Tensor:
        """What a step returns."""
        return losses.mean()


@dataclass(frozen=True)
class TwoSided(Estimator):
    """g_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps q): central differences, 2 q forwards.

    SPSA (Spall, 1992); n-SPSA of MeZO (Malladi et al., 2023, arXiv 2305.17333).
    """

    def points(self) -> list[tuple[int, int]]:
        return [(k, sign) for k in range(self.directions) for sign in (1, -1)]

    def coefficients(self, losses: Tensor, eps: float) -> Tensor:
        scale = 2 * eps * self.directions
        if known_on_host(losses):  # Python's numbers are float64, too, and take less time than four kernels
            values = losses.tolist()
            g = [(plus - minus) / scale for plus, minus in zip(values[::2], values[1::2], strict=True)]
            return torch.tensor(g, dtype=torch.float64, device=losses.device)
        plus, minus = losses.view(-1, 2).unbind(1)
        return (plus - minus) / scale


@dataclass(frozen=True)
class ProjectedDifference(TwoSided):
    """g_0 = (L(theta + eps z_0) - L(theta - eps z_0)) / (2 eps), and in some steps g_1 .. alike: 2 forwards.

    The other directions estimate a gradient from time to time, at 2 forwards each.  In all other steps their
    g are 0.  A step returns the mean of the two losses along z_0.  :class:`PGAP` runs the forwards.
    """

    directions: int = 5

    def __post_init__(self) -> None:
        check_integer("ProjectedDifference", "directions", self.directions, 2)

    def coefficients(self, losses: Tensor, eps: float) -> Tensor:
        plus, minus = losses.view(-1, 2).unbind(1)
        g = (plus - minus) / (2 * eps)
        return torch.cat((g, g.new_zeros(self.directions - len(g))))

    def loss(self, losses: Tensor) -> Tensor:
        return losses[:2].mean()


@dataclass(frozen=True)
class LeaveOneOut(Estimator):
    """g_k = (L_k - mean) / (eps (q - 1)), L_k = L(theta + eps z_k): q forwards, q >= 2.

    Each loss is compared with the mean of the others (the baseline of REINFORCE leave-one-out), and the q
    comparisons are averaged, which is the same as the above.

    Source: LOREN (Seung, Lee and Ko, 2026, arXiv 2511.07971).
    """

    directions: int = 6

    def __post_init__(self) -> None:
        check_integer("LeaveOneOut", "directions", self.directions, 2)

    def points(self) -> list[tuple[int, int]]:
        return [(k, 1) for k in range(self.directions)]

    def coefficients(self, losses: Tensor, eps: float) -> Tensor:
        return (losses - losses.mean()) / (eps * (self.directions - 1))


@dataclass(frozen=True)
class SignOfDifference(TwoSided):
    """g_k = sign(L(theta + eps z_k) - L(theta - eps z_k)) / q; sign(0) = 0: 2 q forwards.

    Only which side is better counts, so a step moves the weights by lr z whatever the loss's scale.  The
    rule :class:`Sign` is another method: there it is the sign of each weight's own sum_k g_k z_k.

    Source: ``zo_sign_opt`` of ZO-Bench (Zhang et al., 2024, arXiv 2402.11592).
    """

    def coefficients(self, losses: Tensor, eps: float) -> Tensor:
        difference = super().coefficients(losses, eps)
        return torch.where(difference.isfinite(), difference.sign(), difference) / self.directions


@dataclass(frozen=True)
class OneSided(Estimator):
    """g_k = (L(theta + eps z_k) - L(theta)) / (eps q): forward differences, q + 1 forwards.

    A step returns L(theta).  Nesterov and Spokoiny, 2017, "Random gradient-free minimization of convex
    functions".
    """

    def points(self) -> list[tuple[int, int]]:
        return [(0, 0), *((k, 1) for k in range(self.directions))]

    def coefficients(self, losses: Tensor, eps: float) -> Tensor:
        return (losses[1:] - losses[0]) / (eps * self.directions)

    def loss(self, losses: Tensor) -> Tensor:
        return losses[0].clone()


@dataclass(frozen=True)
class ThreePoint(Estimator):
    """g = (L+ - L-) / (2 eps), and |L+ + L- - 2 L0| / eps^2 for the curvature along z: three forwards.

    There is one direction.  L0 = L(theta), which a step returns, and L+- = L(theta +- eps z).  g is not
    finite where the second difference is not.
    """

    def __post_init__(self) -> None:
        check_integer(type(self).__name__, "directions", self.directions, 1, 1)

    def points(self) -> list[tuple[int, int]]:
        return [(0, 0), (0, 1), (0, -1)]

    def coefficients(self, losses: Tensor, eps: float) -> Tensor:
        g = (losses[1:2] - losses[2:]) / (2 * eps)
        finite = self.second_difference(losses, eps).float().isfinite()
        return torch.where(finite, g, torch.full_like(g, float("nan")))

    def second_difference(self, losses: Tensor, eps: float) -> Tensor:
        """|L+ + L- - 2 L0| / eps^2, float64, 0-dim."""
        return (losses[1] + losses[2] - 2 * losses[0]).abs() / eps**2

    def loss(self, losses: Tensor) -> Tensor:
        return losses[0].clone()


@dataclass(frozen=True)
class StdNormalized(OneSided):
    """g_k = (L_k - L_0) / (q sigma), sigma^2 = sum_k (L_k - mean)^2 / (q - 1): q + 1 forwards, q >= 2.

    L_k = L(theta + eps z_k) and L_0 = L(theta).  sigma is about eps times the length of the gradient, and
    takes the place of eps, so steps are normalized.  Where sigma <= std_eps (in units of the loss) g is 0:
    losses that are all equal to their rounding say nothing, and would be divided by nothing.

    ``sigma``: "sample" divides by q - 1, as above and in the paper; "population" divides by q, as the
    authors' code does.  The same lr then makes steps sqrt(q / (q - 1)) times as long.

    Losses behind the first q + 1 count for sigma alone (the step before's, :class:`FZOO` with ``reuse``).

    Source: FZOO (Dang et al., 2025, arXiv 2506.09034).
    """

    std_eps: float = 1e-8
    sigma: str = "sample"

    def __post_init__(self) -> None:
        check_integer(type(self).__name__, "directions", self.directions, 2)
        check_choice(type(self).__name__, "sigma", self.sigma, ("sample", "population"))
        if not self.std_eps >= 0:
            fail(type(self).__name__, "std_eps", "a number >= 0", repr(self.std_eps))

    def coefficients(self, losses: Tensor, eps: float) -> Tensor:
        difference = losses[1 : self.directions + 1] - losses[0]
        sigma = losses[1:].std(correction=int(self.sigma == "sample"))
        g = difference / (self.directions * sigma)
        return torch.where(sigma <= self.std_eps, torch.zeros_like(g), g)


@dataclass(frozen=True)
class Ranking(Estimator):
    """The mean of z_j - z_i over all edges "i is better than j" between q candidates theta + eps z_k.

    The edges are what the order of the best ``top`` candidates tells (None: of all): each of them is better
    than those after it, and than all that are not among them.  So g_k = (times worse - times better) / number
    of edges.

    Only the order of the losses counts, but NaN and infinity skip the step all the same.  Of equal losses the
    first is the better.  A step returns the lowest loss.

    Source: ZO-RankSGD (Tang, Rybin and Chang, 2023, arXiv 2303.03751).
    """

    directions: int = 2
    top: int | None = None

    def __post_init__(self) -> None:
        check_integer(type(self).__name__, "directions", self.directions, 2)
        if self.top is not None:
            check_integer(type(self).__name__, "top", self.top, 1, self.directions)

    def points(self) -> list[tuple[int, int]]:
        return [(k, 1) for k in range(self.directions)]

    def coefficients(self, losses: Tensor, eps: float) -> Tensor:
        q, top = self.directions, self.top or self.directions
        edges = top * (top - 1) // 2 + top * (q - top)
        place = losses.argsort(stable=True).argsort().double()
        difference = torch.where(place < top, 2 * place - (q - 1), torch.full_like(place, top))
        return torch.where(losses.isfinite().all(), difference / edges, torch.full_like(place, float("nan")))

    def loss(self, losses: Tensor) -> Tensor:
        return losses.min()


#: From the values of a population (float64 [N]) and what is subtracted from each to the numbers that count,
#: by the name of the shaping.
_SHAPINGS = {
    "z-score": lambda x, centre: (x - centre) / (x.std(correction=0) + 1e-8),
    "variance": lambda x, centre: (x - centre) / (x.var(correction=0) + 1e-5).sqrt(),
    "ranks": lambda x, centre: x.argsort(stable=True).argsort().double() / (len(x) - 1) - 0.5,
    "mean": lambda x, centre: x - centre,
}


@dataclass(frozen=True)
class Population(Estimator):
    """Evolution strategies: g_k = s(L_k) / N over the N members theta + eps z_k of a population.

    s shapes the values of the whole population, so that neither their scale nor their offset counts:

    ============  ==========================================================================================
    "z-score"     (x - mean) / (std + 1e-8), std of the population (divided by N)
    "variance"    (x - mean) / sqrt(var + 1e-5), var of the population: what EGGROLL's code does
    "ranks"       rank / (N - 1) - 1/2, the lowest has rank 0 (centred ranks); of equals the first is lower
    "mean"        x - mean
    ============  ==========================================================================================

    With ``mirrored`` each direction has two members, theta + eps z_k and theta - eps z_k (antithetic pairs),
    so N = 2 q and g_k = (s(L_k+) - s(L_k-)) / N.  With ``maximize`` the closure returns rewards, of which
    more is better, and g_k changes its sign.  There is no division by eps, since eps is no step towards a
    limit here but the width of the search.  The coefficient of a step is lr / N, whatever eps is.

    ``baseline``: the value at theta, for which there is one forward more, takes the place of the mean; std
    and var stay those of the members.  ``group``: the mean is that of the group of so many neighbouring
    members (pairs are neighbours), each of which had its own task; std and var stay those of all.  Neither
    goes with ranks, from which nothing is subtracted, nor one with the other.

    N >= 2.  A value that is not finite skips the step.

    Sources: ES at scale (Qiu et al., 2025, arXiv 2509.24372: z-scores); OpenAI's evolution strategies
    (Salimans et al., 2017, arXiv 1703.03864: mirrored, centred ranks); EGGROLL's code (Sarkar et al., 2025,
    arXiv 2511.16652: variance, groups, a baseline subtracted).
    """

    shaping: str = "z-score"
    mirrored: bool = False
    maximize: bool = False
    baseline: bool = False
    group: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_integer(name, "directions", self.directions, 1 if self.mirrored else 2)
        check_choice(name, "shaping", self.shaping, tuple(_SHAPINGS))
        if (self.baseline or self.group is not None) and self.shaping == "ranks":
            fail(name, "baseline, group", "another shaping than 'ranks'", (self.baseline, self.group))
        if self.group is None:
            return
        members = self.directions * (2 if self.mirrored else 1)
        check_integer(name, "group", self.group, 2, members)
        if members % self.group or self.baseline:
            expected = f"a divisor of the {members} members, and no baseline"
            fail(name, "group", expected, (self.group, self.baseline))

    def points(self) -> list[tuple[int, int]]:
        signs = (1, -1) if self.mirrored else (1,)
        members = [(k, sign) for k in range(self.directions) for sign in signs]
        return [(0, 0), *members] if self.baseline else members

    def _members(self, losses: Tensor) -> Tensor:
        return losses[1:] if self.baseline else losses

    def coefficients(self, losses: Tensor, eps: float) -> Tensor:
        values = -losses if self.maximize else losses
        members = self._members(values)
        centre = values[0] if self.baseline else members.mean()
        if self.group is not None:
            centre = members.view(-1, self.group).mean(1).repeat_interleave(self.group)
        shaped: Tensor = _SHAPINGS[self.shaping](members, centre)
        shaped = torch.where(losses.isfinite().all(), shaped, torch.full_like(shaped, float("nan")))
        if self.mirrored:
            plus, minus = shaped.view(-1, 2).unbind(1)
            shaped = plus - minus
        return shaped / len(members)

    def loss(self, losses: Tensor) -> Tensor:
        return self._members(losses).mean()


@dataclass(frozen=True)
class ScaledPopulation(Population):
    """:class:`Population`, with the coefficients times eps sqrt(N): EGGROLL's code.

    There an update is the mean over the members of fitness times perturbation (eps z), times sqrt(N).

    Source: Sarkar et al., 2025, arXiv 2511.16652.
    """

    directions: int = 8
    shaping: str = "variance"
    mirrored: bool = True

    def coefficients(self, losses: Tensor, eps: float) -> Tensor:
        scaled: Tensor = super().coefficients(losses, eps) * (eps * len(self._members(losses)) ** 0.5)
        return scaled


@dataclass(frozen=True)
class Bayesian(OneSided):
    """g is the mean of a posterior over the q directional derivatives: q + 1 forwards.

    y_k = (L(theta + eps z_k) - L(theta)) / eps are noisy observations of g_k, whose prior is N(0, prior^2).
    A Kalman filter takes them one after the other.  With the variance v_k of g_k, prior^2 at first, and the
    variance s^2 of the noise:

        K = v_k / (v_k + s^2),   g_k <- g_k + K (y_k - g_k),   v_k <- v_k - K v_k

    ``samples`` > q: what comes after the q-th repeats the observation whose variance is the largest, without
    a forward.  ``ema`` > 0: s^2 follows the squared residuals, s^2 <- (1 - ema) s^2 + ema (y_k - g_k)^2
    before each K, from ``noise``^2 on, and s is at least ``noise`` / 10.  The posterior shrinks g towards 0,
    the more the noisier the losses are.

    The authors set prior = noise = sqrt(n / 10^6) for n weights.  They carry s from step to step; here it
    begins anew, so that a step depends on its own losses alone.

    Source: BSZO (arXiv 2601.01452) and its code, version 3.
    """

    directions: int = 2
    samples: int = 3
    prior: float = 1.0
    noise: float = 1.0
    ema: float = 0.1

    def __post_init__(self) -> None:
        check_integer("Bayesian", "directions", self.directions, 1)
        check_integer("Bayesian", "samples", self.samples, self.directions)
        check_number("Bayesian", "prior", self.prior, positive=True)
        check_number("Bayesian", "noise", self.noise, positive=True)
        check_number("Bayesian", "ema", self.ema)

    def coefficients(self, losses: Tensor, eps: float) -> Tensor:
        y = (losses[1:] - losses[0]) / eps
        mean, variance = torch.zeros_like(y), torch.full_like(y, self.prior**2)
        noise = torch.full_like(y[0], self.noise**2)
        axes = torch.arange(self.directions, device=y.device)
        for sample in range(self.samples):
            # Where variances are equal, the last axis is taken, as an eigensolver orders them.
            last = self.directions - 1 - variance.flip(0).argmax()
            here = axes == (last if sample >= self.directions else sample)
            residual = y - mean
            if self.ema:
                squared = torch.where(here, residual.square(), torch.zeros_like(y)).sum()
                noise = (1 - self.ema) * noise + self.ema * squared
            gain = variance / (variance + noise.clamp(min=(self.noise / 10) ** 2))
            mean = torch.where(here, mean + gain * residual, mean)
            # The authors' code keeps the covariance away from singular.
            variance = torch.where(here, variance - gain * variance, variance) + 1e-10
        return torch.where(y.isfinite().all(), mean, torch.full_like(mean, float("nan")))


@dataclass(frozen=True)
class Guided(Estimator):
    """g along one guiding vector v = sum_k w_k z_k, chosen by the losses of q candidates: q + 2 forwards.

        w_k = 1 / top for the ``top`` candidates theta + eps z_k of lowest loss, else -1 / (q - top)
        g = (L(theta + eps v) - L(theta - eps v)) / (2 eps);   the gradient estimate is g v

    With ``best`` v is the one candidate of lowest loss alone: w is 1 there, else 0.  The two last points
    depend on the losses before them; :class:`MeZOGV` runs them.

    Source: MeZO-GV and MeZO-Greedy (Jin, Cen and Tan, 2026, arXiv 2601.04710).
    """

    directions: int = 4
    top: int = 2
    best: bool = False

    def __post_init__(self) -> None:
        check_integer("Guided", "directions", self.directions, 2)
        check_integer("Guided", "top", self.top, 1, self.directions - 1)

    def points(self) -> list[tuple[int, int]]:
        """The candidates; then theta +- eps v, for which two places are kept."""
        return [*((k, 1) for k in range(self.directions)), (0, 1), (0, -1)]

    def guide(self, losses: Tensor) -> Tensor:
        """w (float64 [q]) from the losses of the candidates; 0 unless all are finite."""
        q, pool = self.directions, losses[: self.directions].double()
        place = pool.argsort(stable=True).argsort()
        top, low, high = (1, 1.0, 0.0) if self.best else (self.top, 1 / self.top, -1 / (q - self.top))
        w = torch.where(place < top, torch.full_like(pool, low), torch.full_like(pool, high))
        return torch.where(pool.isfinite().all(), w, torch.zeros_like(w))

    def coefficients(self, losses: Tensor, eps: float) -> Tensor:
        g = (losses[-2] - losses[-1]) / (2 * eps)
        finite = losses.isfinite().all()
        return torch.where(finite, g, torch.full_like(g, float("nan"))) * self.guide(losses)

    def loss(self, losses: Tensor) -> Tensor:
        return losses[-2:].mean()


@dataclass(frozen=True)
class ForwardMode(Estimator):
    """g_k = <grad L(theta), z_k> / q, by forward-mode automatic differentiation: q forwards.

    It needs no eps, and no memory of activations.  Losses are pairs, (L, derivative along z_k).  Baydin et
    al., 2022, "Gradients without backpropagation" (arXiv 2202.08587); among the methods of Zhang et al., 2024
    (arXiv 2402.11592).
    """

    def points(self) -> list[tuple[int, int]]:
        return [(k, 1) for k in range(self.directions)]

    def coefficients(self, losses: Tensor, eps: float) -> Tensor:
        return losses[:, 1] / self.directions

    def loss(self, losses: Tensor) -> Tensor:
        return losses[:, 0].mean()
