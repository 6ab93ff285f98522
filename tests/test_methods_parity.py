"""Methods against their authors' formulas, written out in float64 with every z materialised.

Each oracle restates a paper or its authors' code, with the package's noise in the place of their draws.  A
run and its oracle move alike: the largest difference is at most 2e-5 of the largest movement.  Every option
has a case in which it differs from its default by far more than that."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from zosgd_cases import BOTH, same_bits

import zokernels as zk
from zokernels.contract import derive_seed_int
from zokernels.optim import (
    EGGROLL,
    ES,
    FZOO,
    LOZO,
    QZO,
    ZOSGD,
    Adam,
    AMSGrad,
    FactorAdam,
    FreshFactors,
    HiZOO,
    Momentum,
    SparseMeZO,
    Subspace,
    SubZero,
    TemporalFactor,
    TensorScale,
    TeZO,
    TwoSided,
    ZerothOrder,
    ZOAdam,
    ZOAdamW,
    ZOConservative,
    ZOSignSGD,
    decay_groups,
)
from zokernels.step.directions.low_rank import near_square
from zokernels.trajectory import replay_

SHAPES = {
    "embed.w": (6, 10),
    "layers.0.w": (5, 7),
    "layers.0.norm": (7,),
    "layers.1.w": (4, 9),
    "layers.1.bias": (9,),
    "final": (3,),
}
EPS, STEPS = 2.0**-6, 4


def model(seed=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: (torch.randn(shape, generator=generator) * 0.3).to(dtype)
    return {name: nn.Parameter(draw(shape)) for name, shape in SHAPES.items()}


def loss_of(theta):
    """A smooth loss, of other curvature in each tensor, in float64."""
    total = 0.0
    for i, t in enumerate(theta.values()):
        x = t.detach().double()
        total = total + (i + 1) * ((x - 0.1 * i) ** 2).sum() + torch.sin(3 * x).sum()
    return total


def double(params):
    return {name: p.detach().double() for name, p in params.items()}


def dense(name, shape, seed, dist="normal"):
    return zk.noise(shape, seed=seed, stream=zk.stream_of(name), dist=dist).double()


def directions(seed, step, q, z=None, dist="normal"):
    """z_k of every tensor, for k = 0 .. q - 1."""
    z = z or (lambda name, shape, s, step: dense(name, shape, s, dist))
    return [{n: z(n, s, derive_seed_int(seed, step, k), step) for n, s in SHAPES.items()} for k in range(q)]


def at(theta, z, c):
    return {n: t + c * z[n] for n, t in theta.items()}


def minus(theta, lr, g):
    return {n: t - lr * g[n] for n, t in theta.items()}


def weighted(zs, coefficients):
    return {n: sum(c * z[n] for c, z in zip(coefficients, zs, strict=True)) for n in SHAPES}


def central(theta, z, eps=EPS):
    return (loss_of(at(theta, z, eps)) - loss_of(at(theta, z, -eps))) / (2 * eps)


def ratio(params, theta, start):
    """The largest difference over the largest movement."""
    moved = max((theta[n] - start[n]).abs().max().item() for n in SHAPES)
    assert moved > 1e-4
    return max((params[n].detach().double() - theta[n]).abs().max().item() for n in SHAPES) / moved


def compare(make, oracle, rng, *, steps=STEPS, tolerance=2e-5, closure=loss_of, **options):
    """Runs ``make`` and ``oracle(theta, seed, step)``, which returns the new weights; their ratio is
    small.
    """
    seed, params = rng.getrandbits(62), model()
    opt = make(list(params.items()), eps=EPS, seed=seed, **options)
    start = theta = double(params)
    for step in range(steps):
        opt.step(lambda: closure(params))
        theta = oracle(theta, seed, step)
    found = ratio(params, theta, start)
    assert found <= tolerance
    return opt


def differs(make, oracle, rng, **options):
    """The same with an option left out: more than a hundred times the tolerance."""
    with pytest.raises(AssertionError):
        compare(make, oracle, rng, tolerance=2e-3, **options)


# --- evolution strategies ---


def zscores(values):
    values = torch.stack(values)
    return (values - values.mean()) / (((values - values.mean()) ** 2).mean().sqrt() + 1e-8)


def test_es_at_scale(rng):
    """theta += alpha / N sum_n zscore(R_n) eps_n, numpy's std: divided by N."""
    n, alpha = 6, 0.02

    def oracle(theta, seed, step):
        zs = directions(seed, step, n)
        rewards = zscores([-loss_of(at(theta, z, EPS)) for z in zs])
        return {
            name: t + alpha / n * sum(r * z[name] for r, z in zip(rewards, zs, strict=True))
            for name, t in theta.items()
        }

    reward = lambda theta: -loss_of(theta)
    make = lambda p, **o: ES(p, alpha, population=n, **o)
    compare(make, oracle, rng, closure=reward)
    differs(make, oracle, rng)  # a loss, which is not to be maximised
    compare(make, oracle, rng, maximize=False)
    differs(make, oracle, rng, closure=reward, shaping="ranks")


def test_es_in_mirrored_pairs_with_centred_ranks(rng):
    """Salimans et al.: ranks in [-1/2, 1/2] of all 2 n members, each with its own sign of the noise."""
    n, alpha = 3, 0.02

    def oracle(theta, seed, step):
        zs = directions(seed, step, n)
        members = [(z, sign) for z in zs for sign in (1, -1)]
        rewards = [-loss_of(at(theta, z, sign * EPS)).item() for z, sign in members]
        ranks = [sum(other < r for other in rewards) / (2 * n - 1) - 0.5 for r in rewards]
        g = {
            m: sum(rank * sign * z[m] for rank, (z, sign) in zip(ranks, members, strict=True)) for m in SHAPES
        }
        return minus(theta, -alpha / (2 * n), g)

    make = lambda p, **o: ES(p, alpha, population=2 * n, shaping="ranks", **o)
    compare(make, oracle, rng, closure=lambda theta: -loss_of(theta), mirrored=True)
    differs(make, oracle, rng, closure=lambda theta: -loss_of(theta))


def test_es_does_not_move_on_equal_rewards_and_skips_what_is_not_finite():
    params = model()
    before = [p.detach().clone() for p in params.values()]
    opt = ES(list(params.items()), 0.1, population=4)
    constant = lambda: 1.0 + 0 * loss_of(params)
    opt.step(constant)
    assert all(torch.equal(p, b) for p, b in zip(params.values(), before, strict=True))
    values = iter([1.0, 2.0, float("nan"), 3.0])
    with pytest.warns(UserWarning, match="skipped"):
        opt.step(lambda: next(values) * constant())
    assert same_bits([p.detach() for p in params.values()], before)


def rank_one(name, shape, seed, step):
    if len(shape) < 2:
        return dense(name, shape, seed)
    flat = dense(name, (sum(shape),), seed)
    return torch.outer(flat[: shape[0]], flat[shape[0] :])


def test_eggroll(rng):
    """HyperscaleES: fitness (s - mean) / sqrt(var + 1e-5); update sqrt(N) times the mean of fitness *
    sigma * E.
    """
    q, lr, n = 3, 2.0, 6
    small = lambda theta: loss_of(theta) / 128  # so that the 1e-5 counts

    def oracle(theta, seed, step):
        members = [(z, sign) for z in directions(seed, step, q, rank_one) for sign in (1, -1)]
        scores = torch.stack([-small(at(theta, z, sign * EPS)) for z, sign in members])
        fitness = (scores - scores.mean()) / (((scores - scores.mean()) ** 2).mean() + 1e-5).sqrt()
        mean = {
            m: sum(f * sign * EPS * z[m] for f, (z, sign) in zip(fitness, members, strict=True)) / n
            for m in SHAPES
        }
        return minus(theta, -lr * n**0.5, mean)

    make = lambda p, lr=lr, **o: EGGROLL(p, lr, directions=q, **o)
    compare(make, oracle, rng, closure=small)
    compare(make, oracle, rng, closure=lambda theta: -small(theta), maximize=True)
    differs(make, oracle, rng, closure=small, shaping="z-score")
    differs(make, oracle, rng, closure=small, shaping=None, lr=lr * EPS**2 * n**0.5)

    def raw(theta, seed, step):
        members = [(z, sign) for z in directions(seed, step, q, rank_one) for sign in (1, -1)]
        scores = [-small(at(theta, z, sign * EPS)) for z, sign in members]
        mean = {
            m: sum(s * sign * EPS * z[m] for s, (z, sign) in zip(scores, members, strict=True)) / n
            for m in SHAPES
        }
        return minus(theta, -100 * lr * n**0.5, mean)

    compare(make, raw, rng, closure=small, shaping=None, lr=100 * lr * EPS**2 * n**0.5)


def test_eggroll_with_signs(rng):
    """alteggroll: the members have A B^T, the update sign(A) sign(B)^T; vectors the same noise in both."""
    q, lr, r, n = 3, 2.0, 2, 6

    def of_rank(name, shape, seed, step, signs=False):
        if len(shape) < 2:
            return dense(name, shape, seed)
        flat = dense(name, (sum(shape), r), seed)
        a, b = (flat.sign() if signs else flat).split(shape)
        return a @ b.t() / r**0.5

    signed = lambda *args: of_rank(*args, signs=True)

    def oracle(theta, seed, step):
        zs, us = (directions(seed, step, q, kind) for kind in (of_rank, signed))
        scores = torch.stack([-loss_of(at(theta, z, sign * EPS)) for z in zs for sign in (1, -1)])
        fitness = (scores - scores.mean()) / (((scores - scores.mean()) ** 2).mean() + 1e-5).sqrt()
        mean = weighted(us, (fitness[::2] - fitness[1::2]) * EPS / n)
        return minus(theta, -lr * n**0.5, mean)

    make = lambda p, **o: EGGROLL(p, lr, directions=q, rank=r, **o)
    compare(make, oracle, rng, signs=True)
    compare(make, oracle, rng, signs=True, restore="inplace", tolerance=1e-3)  # each move rounds
    differs(make, oracle, rng, signs=False)


def test_eggroll_with_noise_of_several_steps(rng):
    """noise_reuse: the members of step t have the noise of step floor(t / refresh), vectors included."""
    q, lr, n = 3, 2.0, 6

    def oracle(theta, seed, step, refresh=3):
        zs = directions(seed, step // refresh, q, rank_one)
        scores = torch.stack([-loss_of(at(theta, z, sign * EPS)) for z in zs for sign in (1, -1)])
        fitness = (scores - scores.mean()) / (((scores - scores.mean()) ** 2).mean() + 1e-5).sqrt()
        return minus(theta, -lr * n**0.5, weighted(zs, (fitness[::2] - fitness[1::2]) * EPS / n))

    make = lambda p, **o: EGGROLL(p, lr, directions=q, **o)
    compare(make, oracle, rng, refresh=3, steps=5)
    compare(make, oracle, rng, refresh=3, steps=5, restore="inplace", tolerance=1e-3)  # each move rounds
    differs(make, oracle, rng, steps=5)


# --- estimators ---


@pytest.mark.parametrize("sigma", ["sample", "population"])
def test_fzoo_sigma(sigma, rng):
    q, lr = 4, 0.02

    def oracle(theta, seed, step, sigma=sigma):
        zs = directions(seed, step, q, dist="rademacher")
        base, losses = loss_of(theta), torch.stack([loss_of(at(theta, z, EPS)) for z in zs])
        spread = ((losses - losses.mean()) ** 2).sum() / (q - 1 if sigma == "sample" else q)
        return minus(theta, lr, weighted(zs, (losses - base) / (q * spread.sqrt())))

    make = lambda p, lr=lr, **o: FZOO(p, lr, directions=q, **o)
    compare(make, oracle, rng, sigma=sigma)
    differs(make, oracle, rng, sigma={"sample": "population", "population": "sample"}[sigma])
    if sigma == "population":  # the factor that the docstring names
        compare(make, oracle, rng, lr=lr * (q / (q - 1)) ** 0.5)


@pytest.mark.parametrize("sigma", ["sample", "population"])
def test_fzoo_with_the_losses_of_the_step_before(sigma, rng):
    """FZOO-R: sigma of this step's losses and the last one's together; g of this step's alone."""
    q, lr = 3, 0.02

    def remembering():
        before = None

        def oracle(theta, seed, step):
            nonlocal before
            zs = directions(seed, step, q, dist="rademacher")
            base, losses = loss_of(theta), torch.stack([loss_of(at(theta, z, EPS)) for z in zs])
            all_ = torch.cat((losses, losses if before is None else before))
            before = losses
            spread = ((all_ - all_.mean()) ** 2).sum() / (len(all_) - (sigma == "sample"))
            return minus(theta, lr, weighted(zs, (losses - base) / (q * spread.sqrt())))

        return oracle

    make = lambda p, **o: FZOO(p, lr, directions=q, sigma=sigma, **o)
    opt = compare(make, remembering(), rng, reuse=True)
    assert len(opt.last_losses) == q + 1
    differs(make, remembering(), rng)


def test_fzoo_r_goes_on_from_its_log(tmp_path, rng):
    seed, path = rng.getrandbits(62), tmp_path / "run.zk"

    def run(steps, **options):
        params = model()
        opt = FZOO(list(params.items()), 0.02, EPS, directions=3, reuse=True, seed=seed, **options)
        for _ in range(steps):
            opt.step(lambda: loss_of(params))
        if opt.trajectory:
            opt.trajectory.close()
        return [p.detach() for p in params.values()]

    want = run(5)
    run(3, trajectory=path)
    assert same_bits(run(2, trajectory=path, resume=True), want)
    base = model()
    assert replay_(base, path) == 5
    assert same_bits([p.detach() for p in base.values()], want)


def test_sign_of_the_difference(rng):
    """zo_sign_opt: theta -= lr sign(g) z; of q directions their mean."""
    q, lr = 3, 0.01

    def oracle(theta, seed, step):
        zs = directions(seed, step, q)
        return minus(theta, lr / q, weighted(zs, [central(theta, z).sign() for z in zs]))

    make = lambda p, **o: ZOSignSGD(p, lr, directions=q, **o)
    compare(make, oracle, rng, of="difference")
    differs(make, oracle, rng)


def test_conservative_on_ties():
    """ZO-Bench: theta + lr g z wins every tie, theta - lr g z one with theta."""

    def chosen(trials, **options):
        p = nn.Parameter(torch.zeros(5))
        losses = iter([1.3, 1.0, *trials])
        opt = ZOConservative([("p", p)], lr=0.5, eps=EPS, **options)
        opt.step(lambda: next(losses) + 0 * p.sum().item())
        g = 0.3 / (2 * EPS)
        return round(opt.last_projected_gradient.item() / g)

    cases = {  # losses at theta, theta - lr g z, theta + lr g z: (authors', ours)
        (1.0, 1.0, 1.0): (-1, 0),
        (1.0, 1.0, 2.0): (1, 0),
        (1.0, 2.0, 1.0): (-1, 0),
        (2.0, 1.0, 1.0): (-1, 1),
        (2.0, 1.0, 1.5): (1, 1),
        (2.0, 1.5, 1.0): (-1, -1),
        (1.0, 1.5, 1.2): (0, 0),
        (1.0, float("nan"), 1.0): (-1, 0),
    }
    for trials, (last, first) in cases.items():
        assert (chosen(trials, ties="last"), chosen(trials)) == (last, first), trials


# --- masks, scales, floors ---


@BOTH
def test_dynamic_mask_of_sparse_mezo(restore, rng):
    """The paper: thresholds before training, every step perturbs and updates the weights that lie below
    them.
    """
    lr, density = 0.02, 0.5
    start = double(model())
    thresholds = {
        n: t.abs().flatten().sort().values[max(1, round(density * t.numel())) - 1] for n, t in start.items()
    }

    def oracle(theta, seed, step):
        z = {n: v * (theta[n].abs() <= thresholds[n]) for n, v in directions(seed, step, 1)[0].items()}
        return minus(theta, lr, {n: central(theta, z) * v for n, v in z.items()})

    make = lambda p, **o: SparseMeZO(p, lr, density=density, restore=restore, **o)
    # In place the points carry the roundings of fp32 weights, of which a difference of losses makes more.
    tolerance = 2e-5 if restore == "exact" else 1e-3
    opt = compare(make, oracle, rng, steps=6, tolerance=tolerance)
    assert any(
        int(zk.pack_mask(start[n].abs() <= thresholds[n]).ne(opt.state[p]["mask"]).sum())
        for n, p in params_of(opt)
    )
    differs(make, oracle, rng, steps=6, dynamic=False)
    differs(make, oracle, rng, steps=6, refresh=1, dynamic=False)


def params_of(opt):
    return [(n, p) for g in opt.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)]


def test_qzo_keeps_scales_positive(rng):
    """Clipped derivative, then s = max(s, 1e-7)."""
    lr, clip = 0.02, 3.0

    def oracle(theta, seed, step, minimum=1e-7):
        z = directions(seed, step, 1)[0]
        g = central(theta, z).clamp(-clip, clip)
        return {n: (t - lr * g * z[n]).clamp(min=minimum) for n, t in theta.items()}

    make = lambda p, **o: QZO(p, lr, clip=clip, **o)
    opt = compare(make, oracle, rng)
    assert all((p >= 1e-7).all() for _, p in params_of(opt))
    differs(lambda p, **o: ZOSGD(p, lr, clip=clip, **o), oracle, rng)
    differs(make, oracle, rng, minimum=0.05)


def test_a_skipped_step_of_qzo_leaves_small_scales():
    p = nn.Parameter(torch.tensor([-1.0, 0.0, 1.0]))
    with pytest.warns(UserWarning, match="skipped"):
        QZO([("p", p)], 0.1).step(lambda: p.sum().item() * float("nan"))
    assert torch.equal(p, torch.tensor([-1.0, 0.0, 1.0]))


def layer_of(name):
    return next((part for part in ("embed", "lm_head", "layers.0.", "layers.1.") if part in name), None)


@pytest.mark.parametrize("kind", ["variance", "expectation"])
def test_scales_of_layers(kind, rng):
    """MeZO's param_norm: c of a layer is the length of its weights and biases; others are not scaled."""
    lr = 0.003
    squares = {}
    for name, t in double(model()).items():
        squares[layer_of(name)] = squares.get(layer_of(name), 0.0) + (t**2).sum()
    c = {n: 1.0 if layer_of(n) is None else squares[layer_of(n)].sqrt() for n in SHAPES}

    def oracle(theta, seed, step):
        z = directions(seed, step, 1)[0]
        g = central(theta, {n: v / c[n] for n, v in z.items()})
        return minus(theta, lr, {n: g * v * (c[n] if kind == "variance" else 1.0) for n, v in z.items()})

    make = lambda p, direction, **o: ZOSGD(p, lr, direction=direction, **o)
    compare(make, oracle, rng, direction=TensorScale(kind, norm="l2", per="layer"))
    compare(make, oracle, rng, direction=TensorScale(kind, sizes={n: float(v) for n, v in c.items()}))
    differs(make, oracle, rng, direction=TensorScale(kind))
    differs(make, oracle, rng, direction=TensorScale(kind, norm="l2"))
    differs(make, oracle, rng, direction=TensorScale(kind, per="layer"))


# --- low rank ---


def kept_seed(seed, window):
    return derive_seed_int(seed, window, 0x80000001)


def factors(name, shape, seed, r, rows, before):
    """[rows, r] numbers of the stream, from element ``before`` on."""
    return zk.noise((rows, r), seed=seed, stream=zk.stream_of(name), offset=before).double()


def lozo_noise(run_seed, r, interval):
    def z(name, shape, seed, step):
        if len(shape) < 2:
            return dense(name, shape, seed)
        u = factors(name, shape, seed, r, shape[0], 0)
        return u @ factors(name, shape, kept_seed(run_seed, step // interval), r, shape[1], shape[0] * r).t()

    return z


def test_lozo_as_the_authors_have_it(rng):
    """U V^T for matrices and dense noise for vectors, at one eps and one lr."""
    lr, r = 0.0005, 3

    def oracle(theta, seed, step):
        z = directions(seed, step, 1, lozo_noise(seed, r, 2))[0]
        return minus(theta, lr, {n: central(theta, z) * v for n, v in z.items()})

    make = lambda p, **o: LOZO(p, lr, rank=r, interval=2, **o)
    compare(make, oracle, rng, scaled=False)
    differs(make, oracle, rng)

    def groups(p, eps, **options):  # the factors that the docstring names
        wide, flat = ([(n, t) for n, t in p if (t.dim() >= 2) == is_wide] for is_wide in (True, False))
        first = {"params": wide, "eps": eps * r**0.5, "lr": lr * r}
        return LOZO([first, {"params": flat}], lr, eps=eps, rank=r, interval=2, **options)

    compare(groups, oracle, rng)


def test_tezo_as_the_paper_has_it(rng):
    lr, r = 0.0005, 3

    def oracle(theta, seed, step):
        def z(name, shape, s, step):
            if len(shape) < 2:
                return dense(name, shape, s)
            u = factors(name, shape, kept_seed(seed, 0), r, shape[0], 0)
            v = factors(name, shape, kept_seed(seed, 0), r, shape[1], shape[0] * r)
            return u @ torch.diag(dense(name, (r,), s)) @ v.t()

        z = directions(seed, step, 1, z)[0]
        return minus(theta, lr, {n: central(theta, z) * v for n, v in z.items()})

    make = lambda p, **o: TeZO(p, lr, rank=r, **o)
    compare(make, oracle, rng, scaled=False)
    differs(make, oracle, rng)


@BOTH
@pytest.mark.parametrize("scaled", [False, True])
def test_lozo_with_momentum(restore, scaled, rng):
    """LOZO-M: beta M + (1 - beta) g u, of which the first is g u; M v_old^T v / n at a refresh."""
    lr, r, interval, beta, wd = 0.001, 3, 2, 0.7, 0.1
    c = r**-0.5 if scaled else 1.0
    averages = {}

    def oracle(theta, seed, step):
        z = directions(seed, step, 1, lozo_noise(seed, r, interval))[0]
        z = {n: (c if len(SHAPES[n]) > 1 else 1.0) * v for n, v in z.items()}
        g, moved = central(theta, z), {}
        for n, shape in SHAPES.items():
            s = derive_seed_int(seed, step, 0)
            if len(shape) < 2:
                averages[n] = g * z[n] if step == 0 else beta * averages[n] + (1 - beta) * g * z[n]
                moved[n] = averages[n]
                continue
            u = c * factors(n, shape, s, r, shape[0], 0)
            kept = lambda w: factors(n, shape, kept_seed(seed, w), r, shape[1], shape[0] * r)  # noqa: B023
            v = kept(step // interval)
            if step == 0:
                averages[n] = g * u
            elif step % interval == 0:
                old = kept(step // interval - 1)
                averages[n] = beta * averages[n] @ old.t() @ v / shape[1] + (1 - beta) * g * u
            else:
                averages[n] = beta * averages[n] + (1 - beta) * g * u
            moved[n] = averages[n] @ v.t()
        return {n: t - lr * (moved[n] + wd * t) for n, t in theta.items()}

    make = lambda p, **o: LOZO(
        p, lr, rank=r, interval=interval, scaled=scaled, weight_decay=wd, restore=restore, **o
    )
    tolerance = 2e-5 if restore == "exact" else 1e-3
    opt = compare(make, oracle, rng, steps=6, tolerance=tolerance, momentum=beta)
    assert {n: tuple(opt.state[p]["factor"].shape) for n, p in params_of(opt)} == {
        n: (s[0], r) if len(s) > 1 else s for n, s in SHAPES.items()
    }
    averages.clear()
    differs(make, oracle, rng, steps=6)


def test_tezo_with_momentum(rng):
    """TeZO-m: the momentum of tau, r numbers a matrix."""
    lr, r, beta = 0.0005, 3, 0.7
    tau, averages = {}, {}

    def oracle(theta, seed, step):
        def z(name, shape, s, step):
            if len(shape) < 2:
                tau[name] = dense(name, shape, s)
                return tau[name]
            tau[name] = dense(name, (r,), s)
            return product(name, shape, tau[name])

        def product(name, shape, t):
            u = factors(name, shape, kept_seed(seed, 0), r, shape[0], 0)
            v = factors(name, shape, kept_seed(seed, 0), r, shape[1], shape[0] * r)
            return sum(t[s] * torch.outer(u[:, s], v[:, s]) for s in range(r))

        g = central(theta, directions(seed, step, 1, z)[0])
        for n in SHAPES:
            averages[n] = g * tau[n] if step == 0 else beta * averages[n] + (1 - beta) * g * tau[n]
        wide = lambda n: averages[n] if len(SHAPES[n]) < 2 else product(n, SHAPES[n], averages[n])
        return minus(theta, lr, {n: wide(n) for n in SHAPES})

    make = lambda p, **o: TeZO(p, lr, rank=r, scaled=False, **o)
    opt = compare(make, oracle, rng, momentum=beta)
    assert all(opt.state[p]["factor"].shape == (1, r) for n, p in params_of(opt) if p.dim() > 1)
    averages.clear()
    differs(make, oracle, rng)


def test_tezo_adam(rng):
    """Moments of the r weights tau; the second one's product has the squares of u and v."""
    lr, r, b1, b2, eps = 0.01, 3, 0.8, 0.9, 1e-6
    moments = {}

    def oracle(theta, seed, step):
        if step == 0:
            moments.clear()

        def z(name, shape, s, step):
            if len(shape) < 2:
                return dense(name, shape, s)
            u, v = kept(name, shape, seed)
            return u @ torch.diag(dense(name, (r,), s)) @ v.t()

        def kept(name, shape, seed):
            u = factors(name, shape, kept_seed(seed, 0), r, shape[0], 0)
            return u, factors(name, shape, kept_seed(seed, 0), r, shape[1], shape[0] * r)

        (one,) = directions(seed, step, 1, z)
        g, s, new = central(theta, one), derive_seed_int(seed, step, 0), {}
        for n, t in theta.items():
            own = g * (dense(n, (r,), s) if t.dim() == 2 else one[n])
            m, v = moments.get(n, (0.0, 0.0))
            m, v = b1 * m + (1 - b1) * own, b2 * v + (1 - b2) * own**2
            moments[n] = m, v
            m, v = m / (1 - b1 ** (step + 1)), v / (1 - b2 ** (step + 1))
            if t.dim() == 2:
                left, right = kept(n, t.shape, seed)
                m, v = left @ torch.diag(m) @ right.t(), left**2 @ torch.diag(v) @ (right**2).t()
            new[n] = t - lr * m / (v.sqrt() + eps)
        return new

    def make(p, rule, **options):
        direction = TemporalFactor(r, None, False)
        return ZerothOrder(p, lr, estimator=TwoSided(1), rule=rule, direction=direction, **options)

    adam = lambda **o: FactorAdam(**{"betas": (b1, b2), "adam_eps": eps, **o})
    opt = compare(make, oracle, rng, tolerance=1e-3, rule=adam())  # quotients of small moments
    assert all(opt.state[p]["factor_sq"].shape == (1, r) for n, p in params_of(opt) if p.dim() > 1)
    differs(make, oracle, rng, rule=adam(betas=(b1, 0.5)))
    differs(make, oracle, rng, rule=Adam((b1, b2), eps))


def test_momentum_of_factors_survives_a_skipped_refresh(rng):
    """A step that begins a window and is skipped still brings the momentum to the new factors."""
    seed, params = rng.getrandbits(60), model()
    opt = LOZO(list(params.items()), 0.001, eps=EPS, seed=seed, rank=3, interval=2, momentum=0.7)
    for _ in range(2):
        opt.step(lambda: loss_of(params))
    before = {n: (p.detach().clone(), opt.state[p]["factor"].clone()) for n, p in params.items()}
    with pytest.warns(UserWarning, match="skipped"):
        opt.step(lambda: loss_of(params) * float("nan"))
    for n, p in params.items():
        theta, factor = before[n]
        assert torch.equal(p, theta)
        want = factor.double()
        if p.dim() > 1:
            m, k = p.shape
            old, new = (factors(n, p.shape, kept_seed(seed, w), 3, k, m * 3) for w in (0, 1))
            want = want @ old.t() @ new / k
        torch.testing.assert_close(opt.state[p]["factor"].double(), want, rtol=1e-5, atol=1e-6)


def authors_squares(count):
    """reshape_matrix of SubZero's trainer: the pair of factors with the smallest difference."""
    pairs = [(i, count // i) for i in range(1, int(math.sqrt(count)) + 1) if count % i == 0]
    return min(pairs, key=lambda pair: pair[1] - pair[0])


def subzero_noise(run_seed, r, interval):
    def z(name, shape, seed, step):
        if len(shape) < 2:
            return dense(name, shape, seed)
        m, n = authors_squares(math.prod(shape))
        kept = kept_seed(run_seed, step // interval)
        u, v = (torch.linalg.qr(factors(name, shape, kept, r, rows, b)).Q for rows, b in ((m, 0), (n, m * r)))
        return (u @ dense(name, (r, r), seed).t() @ v.t() * math.sqrt(m * n / r**2)).view(shape)

    return z


def test_subzero_takes_thin_matrices_as_squares(rng):
    lr, r = 0.002, 5  # more than the rows of a 4 x 9 matrix, which becomes 6 x 6

    def oracle(theta, seed, step):
        z = directions(seed, step, 1, subzero_noise(seed, r, 2))[0]
        return minus(theta, lr, {n: central(theta, z) * v for n, v in z.items()})

    make = lambda p, **o: SubZero(p, lr, rank=r, interval=2, **o)
    compare(make, oracle, rng, near_square=True)
    with pytest.raises(
        ValueError, match=r"rank: .* \(4, 9\) taken as \(4, 9\) \(or near_square=True\), got 5"
    ):
        compare(make, oracle, rng)


def test_near_squares():
    assert near_square(8 * 4096) == (128, 256)
    assert all(near_square(n) == authors_squares(n) for n in range(1, 300))


def test_subzero_has_dense_noise_in_matrices_of_one_row(rng):
    p, seed = nn.Parameter(torch.zeros(1, 40)), rng.getrandbits(60)
    opt = SubZero([("p", p)], 1.0, eps=1.0, seed=seed)
    seen = []
    opt.step(lambda: seen.append(p.detach().clone()) or float(len(seen)))
    z = zk.noise((1, 40), seed=derive_seed_int(seed, 0, 0), stream=zk.stream_of("p"))
    assert same_bits([seen[0]], [z])


# --- rules ---


@pytest.mark.parametrize("make", [ZOAdam, ZOAdamW])
def test_amsgrad_is_torchs(make, rng):
    """Large gradients first, small ones after: the largest v stays, where Adam's falls."""
    seed, params = rng.getrandbits(62), model()
    scales = [1.0, 1.0, 1e-2, 1e-2, 1e-2, 1e-2, 1e-2, 1e-2]
    options = {"betas": (0.8, 0.6), "weight_decay": 0.05}
    start = double(params)
    opt = make(list(params.items()), 0.02, eps=EPS, seed=seed, amsgrad=True, **options)
    theirs = {n: nn.Parameter(t.clone()) for n, t in start.items()}
    kind = torch.optim.Adam if make is ZOAdam else torch.optim.AdamW
    torchs = kind(theirs.values(), 0.02, amsgrad=True, **options)
    plain = model()
    without = make(list(plain.items()), 0.02, eps=EPS, seed=seed, **options)
    for step, scale in enumerate(scales):
        opt.step(lambda scale=scale: scale * loss_of(params))
        without.step(lambda scale=scale: scale * loss_of(plain))
        z = directions(seed, step, 1)[0]
        g = scale * central({n: p.detach() for n, p in theirs.items()}, z)
        for n, p in theirs.items():
            p.grad = g * z[n]
        torchs.step()
    theta = {n: p.detach() for n, p in theirs.items()}
    assert ratio(params, theta, start) < 2e-5
    assert ratio(plain, theta, start) > 1e-2


BETAS = (0.8, 0.6)
SOLVERS = {
    "momentum": (Momentum(0.8, l2=0.1), lambda p: torch.optim.SGD(p, 0.01, momentum=0.8, weight_decay=0.1)),
    "adam": (Adam(BETAS), lambda p: torch.optim.Adam(p, 0.01, betas=BETAS, weight_decay=0.1)),
    "adamw": (
        Adam(BETAS, decoupled=True),
        lambda p: torch.optim.AdamW(p, 0.01, betas=BETAS, weight_decay=0.1),
    ),
    "amsgrad": (
        AMSGrad(BETAS),
        lambda p: torch.optim.Adam(p, 0.01, betas=BETAS, weight_decay=0.1, amsgrad=True),
    ),
}


@BOTH
@pytest.mark.parametrize("kind", ["EGGROLL", "SubZero"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_on_low_rank(solver, kind, restore, rng):
    """torch's own optimizers, given the dense gradient sum_k g_k z_k."""
    seed, params, (rule, torchs_of) = rng.getrandbits(62), model(), SOLVERS[solver]
    options = {"lr": 0.01, "eps": EPS, "seed": seed, "rule": copy.deepcopy(rule), "restore": restore}
    decay = {"weight_decay": 0.1} if solver != "momentum" else {}
    if kind == "EGGROLL":
        opt = EGGROLL(list(params.items()), directions=2, shaping=None, **options, **decay)
        noise_of = rank_one
    else:
        direction = Subspace(3, 2, near_square=True)
        options |= {"estimator": TwoSided(2), "direction": direction}
        opt = ZerothOrder(list(params.items()), **options, **decay)
        noise_of = subzero_noise(seed, 3, 2)
    start = double(params)
    theirs = {n: nn.Parameter(t.clone()) for n, t in start.items()}
    torchs = torchs_of(theirs.values())
    for step in range(5):
        opt.step(lambda: loss_of(params))
        zs = directions(seed, step, 2, noise_of)
        theta = {n: p.detach() for n, p in theirs.items()}
        for n, g in weighted(zs, [central(theta, z) / 2 for z in zs]).items():
            theirs[n].grad = g
        torchs.step()
    theta = {n: p.detach() for n, p in theirs.items()}
    # In place the points carry the roundings of fp32 weights, of which a difference of losses makes more.
    assert ratio(params, theta, start) < (5e-5 if restore == "exact" else 1e-3)


def test_signs_on_low_rank(rng):
    lr, seed = 0.01, rng.getrandbits(62)
    params = model()
    start = theta = double(params)
    opt = ZOSignSGD(list(params.items()), lr, eps=EPS, seed=seed, l2=0.1, direction=FreshFactors(1))
    for step in range(3):
        opt.step(lambda: loss_of(params))
        z = directions(seed, step, 1, rank_one)[0]
        theta = minus(theta, lr, {n: (central(theta, z) * v + 0.1 * theta[n]).sign() for n, v in z.items()})
    assert ratio(params, theta, start) < 2e-5


@pytest.mark.parametrize("make", [HiZOO, lambda p, lr, **o: ZOAdamW(p, lr, window=2, **o)])
def test_rules_that_need_each_z_are_refused_on_low_rank(make):
    params = model()
    before = [p.detach().clone() for p in params.values()]
    with pytest.raises((ValueError, TypeError), match=r"rule|direction"):
        make(list(params.items()), 0.1, direction=FreshFactors(1)).step(lambda: loss_of(params))
    assert same_bits([p.detach() for p in params.values()], before)


def test_decay_groups():
    named = [
        *model().items(),
        ("h.0.ln_1.weight", nn.Parameter(torch.ones(2))),
        ("wordbias", nn.Parameter(torch.ones(2))),
    ]
    decays, stays = decay_groups(named, 0.1)
    names = lambda group: [n for n, _ in group["params"]]
    assert names(decays) == ["embed.w", "layers.0.w", "layers.1.w", "final", "wordbias"]
    assert names(stays) == ["layers.0.norm", "layers.1.bias", "h.0.ln_1.weight"]
    assert (decays["weight_decay"], stays["weight_decay"]) == (0.1, 0.0)
    assert [names(g) for g in decay_groups(named[:2], 0.1)] == [["embed.w", "layers.0.w"]]
    opt = ZOSGD(decay_groups(named, 0.5), lr=0.1)
    before = {n: p.detach().clone() for n, p in named}
    opt.step(lambda: 1.0 + 0 * sum(p.sum() for _, p in named))
    for n, p in named:
        torch.testing.assert_close(p.detach(), before[n] * (0.95 if n in names(decays) else 1.0))


# --- replay from the log, and resuming ---

LOGGED = {
    "ES": lambda p, **o: ES(p, 0.02, population=4, mirrored=True, maximize=False, **o),
    "EGGROLL": lambda p, **o: EGGROLL(p, 20.0, directions=2, **o),
    "FZOO": lambda p, **o: FZOO(p, 0.002, directions=3, sigma="population", **o),
    "signs": lambda p, **o: ZOSignSGD(p, 0.01, of="difference", **o),
    "conservative": lambda p, **o: ZOConservative(p, 0.01, ties="last", **o),
    "dynamic": lambda p, **o: SparseMeZO(p, 0.02, density=0.5, **o),
    "QZO": lambda p, **o: QZO(p, 0.02, minimum=0.01, **o),
    "layers": lambda p, **o: ZOSGD(p, 0.002, direction=TensorScale("variance", norm="l2", per="layer"), **o),
    "sizes": lambda p, **o: ZOSGD(p, 0.002, direction=TensorScale("expectation", sizes={"final": 2.0}), **o),
    "LOZO": lambda p, **o: LOZO(p, 0.001, rank=3, interval=2, scaled=False, **o),
    "TeZO": lambda p, **o: TeZO(p, 0.001, rank=3, scaled=False, **o),
    "LOZO-M": lambda p, **o: LOZO(p, 0.001, rank=3, interval=3, momentum=0.7, weight_decay=0.1, **o),
    "TeZO-m": lambda p, **o: TeZO(p, 0.001, rank=3, momentum=0.7, **o),
    "SubZero": lambda p, **o: SubZero(p, 0.002, rank=5, interval=2, near_square=True, **o),
    "AMSGrad": lambda p, **o: ZOAdamW(p, 0.02, amsgrad=True, weight_decay=0.1, **o),
    "Adam on SubZero": lambda p, **o: ZOAdamW(p, 0.02, direction=Subspace(3, 2), weight_decay=0.1, **o),
    "EGGROLL's signs": lambda p, **o: EGGROLL(p, 20.0, directions=2, signs=True, refresh=3, **o),
    "momentum on EGGROLL": lambda p, **o: EGGROLL(p, 20.0, directions=2, rule=Momentum(0.8), **o),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", LOGGED)
def test_log_replays_and_resumes(method, dtype, tmp_path, rng):
    """The weights of six steps: again from the log alone, and from a run that stopped after four."""
    make, seed, path = LOGGED[method], rng.getrandbits(62), tmp_path / "run.zk"
    whole, base = model(dtype=dtype), model(dtype=dtype)
    opt = make(list(whole.items()), seed=seed, trajectory=path)
    for _ in range(4):
        opt.step(lambda: loss_of(whole))
    opt.trajectory.close()
    resumed = model(dtype=dtype)
    again = make(list(resumed.items()), seed=seed, trajectory=path, resume=True)
    assert same_bits([p.detach() for p in resumed.values()], [p.detach() for p in whole.values()])
    for _ in range(2):
        again.step(lambda: loss_of(resumed))
    again.trajectory.close()
    unlogged = model(dtype=dtype)
    plain = make(list(unlogged.items()), seed=seed)
    for _ in range(6):
        plain.step(lambda: loss_of(unlogged))
    assert same_bits([p.detach() for p in resumed.values()], [p.detach() for p in unlogged.values()])
    assert replay_(base, path, direction=opt.direction if method == "sizes" else None) == 6
    assert same_bits([p.detach() for p in base.values()], [p.detach() for p in unlogged.values()])


BAD = {
    "population": (lambda p: ES(p, 1.0, population=1), "ES: population: expected an integer >= 2, got 1"),
    "pairs": (
        lambda p: ES(p, 1.0, population=5, mirrored=True),
        "ES: population: expected an even number .*, got 5",
    ),
    "shaping": (lambda p: EGGROLL(p, 1.0, shaping="x"), "EGGROLL: shaping: expected 'z-score' or"),
    "maximize": (lambda p: EGGROLL(p, 1.0, shaping=None, maximize=True), "EGGROLL: maximize: expected False"),
    "sigma": (lambda p: FZOO(p, 1.0, sigma="x"), "FZOO: sigma: expected 'sample' or 'population'"),
    "of": (lambda p: ZOSignSGD(p, 1.0, of="x"), "ZOSignSGD: of: expected 'sum' or 'difference'"),
    "l2": (lambda p: ZOSignSGD(p, 1.0, of="difference", l2=0.1), "ZOSignSGD: l2: expected 0"),
    "ties": (lambda p: ZOConservative(p, 1.0, ties="x"), "Conservative: ties: expected 'first' or 'last'"),
    "minimum": (lambda p: QZO(p, 1.0, minimum=0.0), "QZO: minimum: expected a finite number > 0"),
    "norm": (
        lambda p: ZOSGD(p, 1.0, direction=TensorScale(norm="x")),
        "TensorScale: norm: expected 'rms' or 'l2'",
    ),
    "sizes": (
        lambda p: ZOSGD(p, 1.0, direction=TensorScale(refresh=2, sizes={})),
        "TensorScale: refresh: expected None",
    ),
    "amsgrad": (
        lambda p: ZOAdamW(p, 1.0, amsgrad=True, window=2),
        "ZOAdamW: amsgrad: expected False with a window",
    ),
    "window": (
        lambda p: ZOSGD(p, 1.0, momentum=0.5, window=2, direction=SparseMeZO(p, 1.0).direction),
        "ZOSGD: window: expected a direction that is not refreshed",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad):
    make, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        make(list(model().items()))
