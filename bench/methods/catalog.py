"""The methods, one entry each.  ``use`` is the line that a user writes, and also the line that is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zokernels import optim

from . import eager


@dataclass(frozen=True)
class Method:
    name: str
    paper: str
    formula: str
    #: An expression in ``named`` (named parameters), ``lr``, ``masks`` (of the positive weights) and
    #: ``model`` (whose parameters they are, where there is one), evaluated with the names of
    #: zokernels.optim.  Of a black box, a line to read.
    use: str
    #: Of a step; where some steps take more, their mean.
    forwards: float
    #: Accesses of weights in one step of restore="exact", in units of all trained weights.
    accesses: float
    #: Extra memory in bytes a weight, as text.
    memory: str
    #: The same method in eager PyTorch: class, options.
    eager: tuple[type[eager.Eager], dict[str, Any]] | None
    #: Step size in the training runs, of a coarse search on seed 0.
    lr: float
    #: Bytes of state read and written a weight and step, beside the weights.
    state_bytes: float = 0.0
    task: str = "weights"
    #: Whether the optimizer has a restore="inplace", in which it is timed.
    inplace: bool = True

    def bytes(self, itemsize: int) -> float:
        """The bytes that a step moves for each weight, as they are counted and not measured."""
        return self.accesses * itemsize + self.state_bytes

    def make(
        self, named: list[tuple[str, Tensor]], lr: float, model: Any = None, **options: Any
    ) -> torch.optim.Optimizer:
        """Makes the optimizer of :attr:`use`, with ``options`` added to its arguments."""
        names = {n: _with(getattr(optim, n), options) for n in optim.__all__}
        masks = {name: p.detach() > 0 for name, p in named} if "masks" in self.use else None
        own = {"named": named, "lr": lr, "masks": masks, "model": model, "bfloat16": torch.bfloat16}
        scope = {**own, **names}
        return eval(self.use, {"__builtins__": {}}, scope)


def _with(what: Any, options: dict[str, Any]) -> Callable[..., Any]:
    """Adds ``options`` to the arguments of a class if it is an optimizer, and not if it is a direction or a
    subset.
    """
    if isinstance(what, type) and issubclass(what, torch.optim.Optimizer):
        return lambda *args, **own: what(*args, **(options | own))
    return what


METHODS = [
    Method(
        "MeZO (ZO-SGD, SPSA)", "[2305.17333](https://arxiv.org/abs/2305.17333)",
        "g = (L+ - L-) / 2 eps, theta -= lr g z", "ZOSGD(named, lr)", 2, 6, "0", (eager.Eager, {}), 0.005,
    ),
    Method(
        "with rademacher directions", "[2506.09034](https://arxiv.org/abs/2506.09034)",
        "z = +1 or -1", "ZOSGD(named, lr, dist='rademacher')", 2, 6, "0", (eager.Rademacher, {}), 0.005,
    ),
    Method(
        "with weight decay", "[2305.17333](https://arxiv.org/abs/2305.17333)",
        "theta = (1 - lr wd) theta - lr g z", "ZOSGD(named, lr, weight_decay=0.1)", 2, 6, "0", (eager.Decay,
        {}), 0.005,
    ),
    Method(
        "one-sided", "[1312.2139](https://arxiv.org/abs/1312.2139)",
        "g = (L+ - L0) / eps", "ZOSGD(named, lr, estimator='one-sided')", 2, 4, "0", (eager.OneSided, {}),
        0.005,
    ),
    Method(
        "n-SPSA, q = 4", "[2305.17333](https://arxiv.org/abs/2305.17333)",
        "theta -= lr / q sum g_k z_k, one pass", "ZOSGD(named, lr, directions=4)", 8, 18, "0",
        (eager.ManyDirections, {"directions": 4}), 0.03,
    ),
    Method(
        "FZOO, q = 8", "[2506.09034](https://arxiv.org/abs/2506.09034)",
        "theta -= lr / (q sigma) sum (L_k - L0) z_k", "FZOO(named, lr, directions=8)", 9, 18, "0",
        (eager.FZOO, {"directions": 8}), 0.02,
    ),
    Method(
        "ZO-RankSGD, m = 8", "[2303.03751](https://arxiv.org/abs/2303.03751)",
        "w_k = (times worse - times better) / edges", "ZORankSGD(named, lr, candidates=8)", 8, 18, "0",
        (eager.Ranking, {"directions": 8}), 0.02,
    ),
    Method(
        "ZO-RankSGD, line search", "[2303.03751](https://arxiv.org/abs/2303.03751)",
        "best of theta, theta + eps z_best, theta - lr 0.5^j G",
        "ZORankSearch(named, lr, candidates=8, rounds=1)", 15, 30, "0",
        (eager.RankSearch, {"directions": 8}), 0.1,
    ),
    Method(
        "consensus hopping, q = 8", "[2306.09778](https://arxiv.org/abs/2306.09778)",
        "theta += lr sum_k softmax_k(-alpha L_k) eps z_k",
        "ConsensusHopping(named, lr, eps=0.03, candidates=8, alpha=100.0)", 8, 18,
        "0", (eager.Consensus, {"directions": 8}), 1.0,  # the paper's lr; eps is the width of the search
    ),
    Method(
        "conservative", "[2402.11592](https://arxiv.org/abs/2402.11592)",
        "best of theta, theta -+ lr g z", "ZOConservative(named, lr)", 5, 10, "0", (eager.Conservative, {}),
        0.02,
    ),
    Method(
        "ZO-signSGD", "[ICLR 2019](https://openreview.net/forum?id=BJe-DsC5Fm)",
        "theta -= lr sign(g z)", "ZOSignSGD(named, lr)", 2, 6, "0", (eager.Sign, {}), 0.001,
    ),
    Method(
        "ZO-SGD with momentum", "[2402.11592](https://arxiv.org/abs/2402.11592)",
        "m = beta m + g z, theta -= lr m", "ZOSGD(named, lr, momentum=0.9)", 2, 6, "4 (m)",
        (eager.Momentum, {}), 0.0005, state_bytes=8,
    ),
    Method(
        "ZO-AdamW", "[2402.11592](https://arxiv.org/abs/2402.11592)",
        "AdamW on g z", "ZOAdamW(named, lr)", 2, 6, "8 (m, v)", (eager.Adam, {}), 0.001, state_bytes=16,
    ),
    Method(
        "ZO-Adam", "[1412.6980](https://arxiv.org/abs/1412.6980)",
        "Adam on g z + wd theta", "ZOAdam(named, lr, weight_decay=0.01)", 2, 6, "8 (m, v)",
        (eager.Adam, {"l2": 0.01}), 0.001, state_bytes=16,
    ),
    Method(
        "ZO-AdamW, bf16 state", "[2402.11592](https://arxiv.org/abs/2402.11592)",
        "AdamW, m and v in bf16, rounded stochastically", "ZOAdamW(named, lr, "
                                                          "state_dtype=bfloat16)", 2, 6, "4 (m, v)",
        (eager.Adam, {}), 0.001, state_bytes=8,
    ),
    Method(
        "momentum without state, h = 8", "[MeZO, issue 37](https://github.com/princeton-nlp/MeZO/issues/37)",
        "theta -= lr sum_j beta^j g_j z_j", "ZOSGD(named, lr, momentum=0.9, window=8)", 2, 6, "0",
        (eager.WindowMomentum, {"window": 8}), 0.0005,
    ),
    Method(
        "Adam without state, h = 8", "[MeZO, issue 37](https://github.com/princeton-nlp/MeZO/issues/37)",
        "m, v from the last h (seed, g)", "ZOAdamW(named, lr, window=8)", 2, 6, "0",
        (eager.WindowAdam, {"window": 8}), 0.001,
    ),
    Method(
        "HiZOO", "[2402.15173](https://arxiv.org/abs/2402.15173)",
        "theta +- eps z / sqrt(h), h from L+ + L- - 2 L0", "HiZOO(named, lr)", 3, 6, "4 (h)",
        (eager.HiZOO, {}), 0.005, state_bytes=16,
    ),
    Method(
        "Sparse-MeZO, 25 %", "[2402.15751](https://arxiv.org/abs/2402.15751)",
        "z of the smallest weights alone", "SparseMeZO(named, lr, density=0.25)", 2, 7, "1/8 (mask)",
        (eager.Masked, {}), 0.02, state_bytes=4 / 8,
    ),
    Method(
        "random mask, 25 %", "[2402.15751](https://arxiv.org/abs/2402.15751)",
        "z where a drawn mask keeps it", "ZOSGD(named, lr, direction=RandomMask(0.25))", 2, 6, "0",
        (eager.RandomMasked, {}), 0.02,
    ),
    Method(
        "a mask of your own", "[2310.02025](https://arxiv.org/abs/2310.02025)",
        "z where a given mask keeps it", "ZOSGD(named, lr, direction=GivenMask(masks))", 2, 6, "1/8 (mask)",
        (eager.Masked, {"sparsity": 0.5}), 0.005, state_bytes=3 / 8,
    ),
    Method(
        "block coordinate descent", "[2402.11592](https://arxiv.org/abs/2402.11592)",
        "one block of layers a step", "ZOBCD(named, lr)", 2, 6 / 9, "0", (eager.Subset, {}), 0.01,
    ),
    Method(
        "LeZO, 75 % skipped", "[2410.09823](https://arxiv.org/abs/2410.09823)",
        "a random quarter of the layers a step", "LeZO(named, lr, skipped=0.75)", 2, 2.1, "0",
        (eager.Subset, {"kept": 2}), 0.005,
    ),
    Method(
        "LOZO, r = 4", "[2410.07698](https://arxiv.org/abs/2410.07698)",
        "z = U V^T / sqrt(r), V kept", "LOZO(named, lr, rank=4)", 2, 6, "0", (eager.LOZO, {}), 0.005,
    ),
    Method(
        "LOZO, r = 4, products", "[2410.07698](https://arxiv.org/abs/2410.07698)",
        "y = x W^T + c (x V) U^T", "LOZO(named, lr, rank=4, restore='products')", 2, 2, "0",
        (eager.LOZO, {}), 0.005, task="products",
    ),
    Method(
        "SubZero, r = 8", "[2410.08989](https://arxiv.org/abs/2410.08989)",
        "z = U G V^T, U and V orthonormal, kept", "SubZero(named, lr, rank=8)", 2, 6, "(m + n) r",
        (eager.SubZero, {"rank": 8}), 0.005,
    ),
    Method(
        "SubZero, r = 8, products", "[2410.08989](https://arxiv.org/abs/2410.08989)",
        "y = x W^T + c (x V) (U G)^T", "SubZero(named, lr, rank=8, restore='products')", 2, 2, "(m + n) r",
        (eager.SubZero, {"rank": 8}), 0.005, task="products",
    ),
    Method(
        "TeZO, r = 8", "[2501.19057](https://arxiv.org/abs/2501.19057)",
        "z = sum tau_s u_s v_s^T, u and v kept", "TeZO(named, lr, rank=8)", 2, 6, "0", (eager.TeZO,
        {"rank": 8}), 0.005,
    ),
    Method(
        "TeZO, r = 8, products", "[2501.19057](https://arxiv.org/abs/2501.19057)",
        "y = x W^T + c (x V) (U diag tau)^T", "TeZO(named, lr, rank=8, restore='products')", 2, 2, "0",
        (eager.TeZO, {"rank": 8}), 0.005, task="products",
    ),
    Method(
        "ES at scale, N = 8", "[2509.24372](https://arxiv.org/abs/2509.24372)",
        "theta += lr / N sum_n zscore(R)_n z_n", "ES(named, lr, population=8, maximize=False)", 8, 18, "0",
        (eager.ES, {"directions": 8}), 0.04,
    ),
    Method(
        "MeZO-GV, 4 candidates", "[2601.04710](https://arxiv.org/abs/2601.04710)",
        "v = mean z of low losses - mean z of high ones", "MeZOGV(named, lr, candidates=4)", 6, 14, "0",
        (eager.Guided, {"directions": 4}), 0.005,
    ),
    Method(
        "BSZO, q = 2", "[2601.01452](https://arxiv.org/abs/2601.01452)",
        "g = posterior mean of the derivatives along z_k",
        "ZerothOrder(named, lr, estimator=Bayesian(2), rule=SGD())", 3, 6, "0",
        (eager.Bayesian, {"directions": 2}), 0.015,
    ),
    Method(
        "ConMeZO", "[2511.02757](https://arxiv.org/abs/2511.02757)",
        "z = sqrt(d) cos t m / |m| + sin t u", "ConMeZO(named, lr)", 2, 9, "4 (m)", (eager.Cone, {}), 0.005,
        state_bytes=20,
    ),
    Method(
        "P-GAP, r = 8", "[2510.18228](https://arxiv.org/abs/2510.18228)",
        "z = U Z V^T, U and V of an estimated gradient", "PGAP(named, lr, rank=8, probes=4, interval=100)",
        2.08, 6, "(m + n) r", (eager.GradientSpace, {}), 0.0632, task="space", inplace=False,
    ),
    Method(
        "LOREN, q = 6", "[2511.07971](https://arxiv.org/abs/2511.07971)",
        "z = u - alpha a, a learned", "LOREN(named, lr, directions=6)", 6, 16, "4 (M)",
        (eager.Covariance, {"directions": 6}), 0.00158, state_bytes=8,
    ),
    Method(
        "CurvZO, 40 %", "[2603.21725](https://arxiv.org/abs/2603.21725)",
        "z of tensors drawn by their scores", "CurvZO(named, lr, ratio=0.4)", 2, 6, "0",
        (eager.Sampled, {}), 0.002,
    ),
    Method(
        "AGZO, r = 16", "[2601.17261](https://arxiv.org/abs/2601.17261)",
        "z = R A^T, A spans a layer's inputs", "AGZO(named, lr, model=model, rank=16)", 2, 4, "0",
        (eager.Activations, {}), 0.00632, task="activations",
    ),
    Method(
        "EGGROLL, r = 1, 4 pairs", "[2511.16652](https://arxiv.org/abs/2511.16652)",
        "z = A B^T / sqrt(r), losses standardised", "EGGROLL(named, lr, rank=1, directions=4)", 8, 18, "0",
        (eager.EGGROLLPairs, {"directions": 4, "rank": 1}), 30.0,
    ),
    Method(
        "EGGROLL, 4 pairs, products", "[2511.16652](https://arxiv.org/abs/2511.16652)",
        "y = x W^T + c (x B) A^T", "EGGROLL(named, lr, rank=1, directions=4, restore='products')", 8, 2, "0",
        (eager.EGGROLLPairs, {"directions": 4, "rank": 1}), 30.0, task="products",
    ),
    Method(
        "scaled by tensor", "[2305.17333](https://arxiv.org/abs/2305.17333)",
        "z times the tensor's rms", "ZOSGD(named, lr, direction=TensorScale('rms'))", 2, 6, "0",
        (eager.TensorScaled, {}), 0.5,
    ),
    Method(
        "variance-modified SPSA", "[2305.17333](https://arxiv.org/abs/2305.17333)",
        "perturb by z / d_t, update by d_t z", "ZOSGD(named, lr, "
                                               "direction=TensorScale('variance'))", 2, 6, "0",
        (eager.TensorScaled, {}), 0.002,
    ),
    Method(
        "expectation-modified SPSA", "[2305.17333](https://arxiv.org/abs/2305.17333)",
        "perturb by z / d_t, update by z", "ZOSGD(named, lr, "
                                           "direction=TensorScale('expectation'))", 2, 6, "0",
        (eager.TensorScaled, {}), 0.0002,
    ),
    Method(
        "on a sphere", "[cs/0408007](https://arxiv.org/abs/cs/0408007)",
        "z sqrt(d) / |z|", "ZOSGD(named, lr, direction=Sphere())", 2, 6, "0", (eager.Sphere, {}), 0.005,
    ),
    Method(
        "CGE (DeepZero), 32 coordinates", "[2310.02025](https://arxiv.org/abs/2310.02025)",
        "g_i = (L(theta + mu e_i) - L) / mu", "ZOCGE(named, lr, per_step=32)", 33, 0, "0",
        (eager.Coordinatewise, {"coordinates": 32}), 5.0, inplace=False,
    ),
    Method(
        "forward gradient", "[2202.08587](https://arxiv.org/abs/2202.08587)",
        "g = <grad L, z> by forward mode", "ForwardGradient(named, lr)", 1, 6, "0", (eager.Eager, {}), 0.005,
        task="forward",
    ),
    Method(
        "QZO, int4 scales", "[2505.13430](https://arxiv.org/abs/2505.13430)",
        "SPSA on the scales of integer weights", "QZO(named, lr)", 2, 6 / 128, "0",
        (eager.Floored, {}), 1e-5,
        task="scales",
    ),
    Method(
        "QuZO, int8", "[2502.12346](https://arxiv.org/abs/2502.12346)",
        "q -= lr g z, rounded stochastically to integers", "QuZO(named, lr)", 2, 3, "0", (eager.QuZO, {}),
        100.0,
        task="integers",
    ),
    Method(
        "QES, int8, N = 8", "[2602.03120](https://arxiv.org/abs/2602.03120)",
        "u = decay e - lr g d, q += round(u), e = u - round(u)",
        "QES(named, lr, population=8, maximize=False)", 8, 10, "4 (e)", (eager.QES, {"directions": 8}), 20.0,
        state_bytes=8, task="integers",
    ),
    Method(
        "ZO-AE-DS, random, q = 16", "[2203.14195](https://arxiv.org/abs/2203.14195)",
        "grad_x = sum_k (f(x + mu z_k) - f(x)) z_k / (mu q)", "BlackBox(f, estimator='rge', "
                                                              "queries=16)", 17, 0, "0",
        None, 1e-3, task="black box",
    ),
    Method(
        "ZO-AE-DS, coordinates", "[2203.14195](https://arxiv.org/abs/2203.14195)",
        "grad_x_i = (f(x + mu e_i) - f(x)) / mu", "BlackBox(f, estimator='cge')", 65, 0, "0", None, 1e-3,
        task="black box",
    ),
]  # fmt: skip
