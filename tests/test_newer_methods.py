"""Methods of 2025 and 2026 against their authors' formulas in float64, with every z materialised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_methods_parity import (
    EPS,
    at,
    compare,
    dense,
    differs,
    directions,
    factors,
    kept_seed,
    loss_of,
    minus,
    model,
    weighted,
)
from zosgd_cases import same_bits

from zokernels.optim import SGD, Bayesian, KeptLeft, MeZOGV, OneSided, Orthogonal, ZerothOrder
from zokernels.trajectory import replay_

# --- BSZO ---


def kalman(y, samples, prior, noise, ema):
    """The filter with whole matrices, observations along axes, then along the leading eigenvector's axis."""
    dim = len(y)
    mu, sigma, square, s = np.zeros(dim), prior**2 * np.eye(dim), noise**2, noise
    for sample in range(samples):
        axis = sample
        if sample >= dim:
            axis = int(np.argmax(np.abs(np.linalg.eigh(sigma)[1][:, -1])))
        d = np.eye(dim)[axis]
        if ema:
            square = (1 - ema) * square + ema * (y[axis] - d @ mu) ** 2
            s = max(noise * 0.1, np.sqrt(square))
        k = sigma @ d / (d @ sigma @ d + s**2)
        mu = mu + k * (y[axis] - d @ mu)
        sigma = sigma - np.outer(k, d @ sigma)
        sigma = (sigma + sigma.T) / 2 + 1e-10 * np.eye(dim)
    return mu


@pytest.mark.parametrize("ema", [0.0, 0.1])
@pytest.mark.parametrize(("q", "samples"), [(1, 1), (2, 2), (2, 3), (4, 9)])
def test_bayesian_mean(q, samples, ema, rng):
    one = Bayesian(q, samples, 1.5, 0.7, ema)
    for _ in range(5):
        losses = torch.tensor([rng.gauss(1, 1) for _ in range(q + 1)], dtype=torch.float64)
        want = kalman(((losses[1:] - losses[0]) / 0.25).numpy(), samples, 1.5, 0.7, ema)
        torch.testing.assert_close(
            one.coefficients(losses, 0.25), torch.from_numpy(want), rtol=1e-9, atol=1e-12
        )
    assert one.coefficients(torch.tensor([1.0, float("inf")] + [1.0] * (q - 1)).double(), 1.0).isnan().all()


def test_bszo(rng):
    lr, prior, noise = 0.003, 40.0, 30.0

    def oracle(theta, seed, step):
        zs = directions(seed, step, 2)
        y = np.array([(loss_of(at(theta, z, EPS)) - loss_of(theta)).item() / EPS for z in zs])
        return minus(theta, lr, weighted(zs, kalman(y, 3, prior, noise, 0.1)))

    make = lambda p, estimator, **o: ZerothOrder(p, lr, estimator=estimator, rule=SGD(), **o)
    compare(make, oracle, rng, estimator=Bayesian(2, 3, prior, noise))
    differs(make, oracle, rng, estimator=Bayesian(2, 3, prior, noise, ema=0.0))
    differs(make, oracle, rng, estimator=Bayesian(2, 2, prior, noise))
    differs(make, oracle, rng, estimator=OneSided(2))


# --- MeZO-GV and MeZO-Greedy ---


@pytest.mark.parametrize("best", [False, True])
def test_guiding_vector(best, rng):
    """v = mean z of the lowest losses less the mean z of the others, or the z of the lowest."""
    lr, q, top = 0.003, 5, 2

    def oracle(theta, seed, step):
        zs = directions(seed, step, q)
        order = sorted(zs, key=lambda z: loss_of(at(theta, z, EPS)).item())
        mean = lambda some: {n: sum(z[n] for z in some) / len(some) for n in theta}
        low, high = mean(order[:top]), mean(order[top:])
        v = order[0] if best else {n: low[n] - high[n] for n in theta}
        g = (loss_of(at(theta, v, EPS)) - loss_of(at(theta, v, -EPS))) / (2 * EPS)
        return {n: t - lr * g * v[n] for n, t in theta.items()}

    make = lambda p, top=top, **o: MeZOGV(p, lr, candidates=q, top=top, **o)
    compare(make, oracle, rng, best=best, restore="inplace", tolerance=1e-3)  # each move rounds
    opt = compare(make, oracle, rng, best=best)
    assert len(opt.last_losses) == q + 2
    differs(make, oracle, rng, best=not best)
    if not best:
        differs(make, oracle, rng, top=1)


def test_a_step_along_a_guide_that_is_not_finite_is_skipped():
    for bad in range(6):
        params = model()
        before = [p.detach().clone() for p in params.values()]
        calls = iter(range(6))
        opt = MeZOGV(list(params.items()), 0.1, candidates=4)
        with pytest.warns(UserWarning, match="skipped"):
            opt.step(lambda: loss_of(params) * (float("nan") if next(calls) == bad else 1.0))  # noqa: B023
        assert same_bits([p.detach() for p in params.values()], before)


# --- ZO-Muon ---


@pytest.mark.parametrize("scaled", [False, True])
def test_zo_muon(scaled, rng):
    """P [m, r] orthonormal and kept, u [r, n] fresh; W -= lr P msign(mean g u), of one-sided g."""
    lr, q, r, interval = 0.01, 3, 3, 2
    msign = lambda x: (lambda usv: usv[0] @ usv[2])(torch.linalg.svd(x, full_matrices=False))

    def oracle(theta, seed, step):
        kept = lambda n, s: torch.linalg.qr(factors(n, s, kept_seed(seed, step // interval), r, s[0], 0)).Q
        fresh = {}

        def z(name, shape, s, step):
            if len(shape) < 2:
                return dense(name, shape, s)
            fresh.setdefault(name, []).append(factors(name, shape, s, r, shape[1], 0).t())
            return ((shape[0] / r) ** 0.5 if scaled else 1.0) * kept(name, shape) @ fresh[name][-1]

        zs = directions(seed, step, q, z)
        g = [(loss_of(at(theta, one, EPS)) - loss_of(theta)) / EPS for one in zs]
        moved = {}
        for n, t in theta.items():
            if t.dim() < 2:
                moved[n] = sum(c * one[n] for c, one in zip(g, zs, strict=True)) / q
            else:
                moved[n] = kept(n, t.shape) @ msign(sum(c * u for c, u in zip(g, fresh[n], strict=True)) / q)
        return minus(theta, lr, moved)

    make = lambda p, rule, **o: ZerothOrder(p, lr, estimator=OneSided(q), rule=rule, **o)
    compare(make, oracle, rng, tolerance=1e-4, rule=Orthogonal(), direction=KeptLeft(r, interval, scaled))
    differs(make, oracle, rng, rule=SGD(), direction=KeptLeft(r, interval, scaled))


# --- logs ---

LOGGED = {
    "BSZO": lambda p, **o: ZerothOrder(p, 0.002, estimator=Bayesian(2, 3, 40.0, 30.0), rule=SGD(), **o),
    "MeZO-GV": lambda p, **o: MeZOGV(p, 0.002, candidates=3, top=1, clip=50.0, weight_decay=0.1, **o),
    "ZO-Muon": lambda p, **o: ZerothOrder(
        p, 0.01, 2.0**-6, 0.1, estimator=OneSided(2), rule=Orthogonal(), direction=KeptLeft(3, 4), **o
    ),
    "MeZO-Greedy": lambda p, **o: MeZOGV(p, 0.002, candidates=3, best=True, **o),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", LOGGED)
def test_log_replays_and_resumes(method, dtype, tmp_path, rng):
    make, seed, path = LOGGED[method], rng.getrandbits(62), tmp_path / "run.zk"

    def run(params, opt, steps):
        for _ in range(steps):
            opt.step(lambda: loss_of(params))
        if opt.trajectory:
            opt.trajectory.close()
        return [p.detach() for p in params.values()]

    whole, half, base = model(dtype=dtype), model(dtype=dtype), model(dtype=dtype)
    want = run(whole, make(list(whole.items()), seed=seed), 6)
    run(half, make(list(half.items()), seed=seed, trajectory=path), 4)
    rest = model(dtype=dtype)
    again = make(list(rest.items()), seed=seed, trajectory=path, resume=True)
    assert same_bits(run(rest, again, 2), want)
    assert replay_(base, path) == 6
    assert same_bits([p.detach() for p in base.values()], want)


BAD = {
    "samples": (lambda p: Bayesian(3, 2), "Bayesian: samples: expected an integer >= 3, got 2"),
    "prior": (lambda p: Bayesian(prior=0.0), "Bayesian: prior: expected a finite number > 0"),
    "top": (
        lambda p: MeZOGV(p, 1.0, candidates=3, top=3),
        r"MeZOGV: top: expected an integer in \[1, 2\], got 3",
    ),
    "restore": (
        lambda p: MeZOGV(p, 1.0, restore="inplace", trajectory="run.zk"),
        "MeZOGV: restore: expected 'exact' with a trajectory",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad):
    make, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        make(list(model().items()))
