"""Methods whose directions follow what was measured, against their formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from test_methods_parity import SHAPES, central, compare, differs, directions, loss_of, model
from torch import nn
from zosgd_cases import same_bits

from zokernels.optim import Blocks, ConMeZO
from zokernels.trajectory import replay_


def plus(theta, z, c):
    return {n: t + c * z[n] for n, t in theta.items()}


# --- ConMeZO ---


def cone(lr, beta, angle, q=1):
    """The authors' loop: z from the momentum, the step, the momentum; its length is the expected one."""
    m, size = {n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()}, 0.0

    def oracle(theta, seed, step):
        nonlocal m, size
        cos, sin = (math.cos(angle) / size, math.sin(angle)) if size else (0.0, 1.0)
        zs = [{n: cos * m[n] + sin * u[n] for n in theta} for u in directions(seed, step, q)]
        gs = [(central(theta, z) / q).item() for z in zs]
        new = theta
        for g, z in zip(gs, zs, strict=True):
            new = plus(new, z, -lr * g)
        m = {n: beta * m[n] + (1 - beta) * sum(g * z[n] for g, z in zip(gs, zs, strict=True)) for n in theta}
        along = (beta + (1 - beta) * cos * sum(gs)) * size
        size = math.sqrt(along**2 + (1 - beta) ** 2 * sin**2 * sum(g * g for g in gs))
        return new

    return oracle


@pytest.mark.parametrize("q", [1, 3])
def test_conmezo(q, rng):
    lr, beta, angle = 0.002, 0.7, 1.1
    make = lambda p, **o: ConMeZO(p, lr, directions=q, **{"momentum": beta, "angle": angle, **o})
    opt = compare(make, cone(lr, beta, angle, q), rng, steps=6)
    assert opt.state[opt.param_groups[0]["params"][0]]["momentum_buffer"].abs().max() > 0
    compare(make, cone(lr, beta, angle, q), rng, restore="inplace", tolerance=1e-3)  # each move rounds
    differs(make, cone(lr, beta, angle, q), rng, momentum=0.0)
    differs(make, cone(lr, beta, angle, q), rng, angle=1.5)


def test_the_expected_length_of_the_momentum_is_near_the_true_one():
    p = nn.Parameter(torch.zeros(60_000))
    opt = ConMeZO([("p", p)], lr=1e-6, momentum=0.9)
    slope = torch.linspace(-1, 1, len(p))
    for _ in range(12):
        opt.step(lambda: (slope * p).sum())
    (buffer,) = (s["momentum_buffer"] for s in opt.state.values())
    true = buffer.double().square().mean().sqrt().item()
    expected = opt.rule.momentum_size(opt, opt.plan()).item()
    assert true > 0
    # Each of 12 steps adds a cross term of order 1 / sqrt(d) = 0.004 of the square.
    assert abs(expected / true - 1) < 0.1


# --- logs, masks, meshes ---

LOGGED = {
    "ConMeZO": lambda p, **o: ConMeZO(p, 0.002, momentum=0.7, clip=50.0, weight_decay=0.1, **o),
}


@pytest.mark.parametrize("restore", ["exact", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", LOGGED)
def test_log_replays_and_resumes(method, dtype, restore, tmp_path, rng):
    make, seed, path = LOGGED[method], rng.getrandbits(62), tmp_path / "run.zk"
    losses = iter([1.0] * 100)

    def run(params, opt, steps):
        for _ in range(steps):
            opt.step(lambda: loss_of(params) * next(losses))
        if opt.trajectory:
            opt.trajectory.close()
        return [p.detach() for p in params.values()]

    new = lambda params, **o: make(list(params.items()), seed=seed, restore=restore, **o)
    whole, half, base, rest = (model(dtype=dtype) for _ in range(4))
    want = run(whole, new(whole), 6)
    run(half, new(half, trajectory=path), 4)
    assert same_bits(run(rest, new(rest, trajectory=path, resume=True), 2), want)
    assert replay_(base, path) == 6
    assert same_bits([p.detach() for p in base.values()], want)


@pytest.mark.parametrize("method", LOGGED)
def test_state_dict_goes_on(method, rng):
    make, seed = LOGGED[method], rng.getrandbits(62)

    def run(params, opt, steps):
        for _ in range(steps):
            opt.step(lambda: loss_of(params))
        return opt

    whole, part = model(), model()
    run(whole, make(list(whole.items()), seed=seed), 5)
    saved = run(part, make(list(part.items()), seed=seed), 3).state_dict()
    again = make(list(part.items()), seed=0)
    again.load_state_dict(saved)
    run(part, again, 2)
    assert same_bits([p.detach() for p in part.values()], [p.detach() for p in whole.values()])


@pytest.mark.parametrize("method", LOGGED)
def test_a_loss_that_is_not_finite_changes_nothing(method, rng):
    params = model()
    opt = LOGGED[method](list(params.items()), seed=rng.getrandbits(62))
    for _ in range(3):
        opt.step(lambda: loss_of(params))
    state = {n: {k: v.clone() for k, v in opt.state[p].items()} for n, p in params.items()}
    kept = opt.rule.state_dict()
    before = [p.detach().clone() for p in params.values()]
    with pytest.warns(UserWarning, match="skipped"):
        opt.step(lambda: loss_of(params) * float("nan"))
    assert same_bits([p.detach() for p in params.values()], before)
    assert opt.rule.state_dict() == kept
    for n, p in params.items():
        assert state[n].keys() == opt.state[p].keys()
        assert all(torch.equal(v, opt.state[p][k]) for k, v in state[n].items())


BAD = {
    "angle": (lambda p: ConMeZO(p, 1.0, angle=2.0), "ConMeZO: angle: expected a number of radians in"),
    "momentum": (lambda p: ConMeZO(p, 1.0, momentum=1.0), r"ConMeZO: momentum: expected a number in \[0, 1\)"),
    "subset": (
        lambda p: ConMeZO(p, 1.0, subset=Blocks()),
        r"ConMeZO: direction, subset: expected Cone\(\) and no subset",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad):
    make, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        make(list(model().items()))
