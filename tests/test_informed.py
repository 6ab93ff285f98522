"""Methods whose directions follow what was measured, against their formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from test_methods_parity import EPS, SHAPES, at, central, compare, dense, differs, directions, loss_of, model
from torch import nn
from zosgd_cases import same_bits

import zokernels as zk
from zokernels.contract import derive_seed_int
from zokernels.optim import (
    AGZO,
    LOREN,
    PGAP,
    QES,
    Blocks,
    ConMeZO,
    CovarianceDescent,
    CurvZO,
    OneSided,
    RankOneCovariance,
    ZerothOrder,
)
from zokernels.step.directions.sampled import inclusion
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
    if q > 1:
        return
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


# --- AGZO ---


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.scale, self.one, self.two = nn.Parameter(torch.ones(7)), nn.Linear(7, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.two(torch.tanh(self.one(self.scale * x)))


def net_loss(net, x):
    out = net(x)
    return ((out - 1) ** 2).sum() + torch.sin(3 * out).sum()


@pytest.mark.parametrize("scaled", [False, True])
def test_agzo(scaled, rng):
    """Inputs H of each layer at theta; a power iteration on H^T H; z = R A^T; forward differences."""
    lr, r, q, iterations, seed = 0.003, 2, 2, 3, rng.getrandbits(62)
    net, x = Net(), torch.randn(6, 7)
    theta = {n: p.detach().double() for n, p in net.named_parameters()}
    start = dict(theta)
    options = {"rank": r, "iterations": iterations, "scaled": scaled, "directions": q, "seed": seed}
    opt = AGZO(net.named_parameters(), lr, EPS, model=net, **options)
    drawn = lambda name, shape, s: zk.noise(shape, seed=s, stream=zk.stream_of(name)).double()

    def run(weights):
        inputs, h = {}, weights["scale"] * x.double()
        for i, layer in enumerate(("one", "two")):
            inputs[layer] = h
            h = h @ weights[f"{layer}.weight"].t() + weights[f"{layer}.bias"]
            h = torch.tanh(h) if not i else h
        return ((h - 1) ** 2).sum() + torch.sin(3 * h).sum(), inputs

    for step in range(3):
        opt.step(lambda: net_loss(net, x))
        base, inputs = run(theta)
        spaces = {}
        for layer, h in inputs.items():
            name = f"{layer}.weight"
            first = drawn(name, (h.shape[1], r), derive_seed_int(seed, step, 0x80000002))
            basis = torch.linalg.qr(first).Q
            for _ in range(iterations):
                basis = torch.linalg.qr(h.t() @ (h @ basis)).Q
            spaces[name] = basis * (math.sqrt(h.shape[1] / r) if scaled else 1)
        new = theta
        for k in range(q):
            s = derive_seed_int(seed, step, k)
            z = {
                n: drawn(n, (t.shape[0], r), s) @ spaces[n].t() if n in spaces else drawn(n, t.shape, s)
                for n, t in theta.items()
            }
            g = (run(plus(theta, z, EPS))[0] - base) / (EPS * q)
            new = plus(new, z, -lr * g)
        theta = new
    moved = max((theta[n] - start[n]).abs().max() for n in theta)
    worst = max((theta[n] - p.detach().double()).abs().max() for n, p in net.named_parameters())
    assert moved > 1e-3
    assert worst < 1e-3 * moved  # the power iteration is in fp32


def test_activations_span_the_rows_of_the_gradient():
    net, x = Net(), torch.randn(2, 3, 7)
    opt = AGZO(net.named_parameters(), 0.0, model=net, rank=6)
    opt.step(lambda: net_loss(net, x))
    net_loss(net, x).backward()
    for layer in (net.one, net.two):
        basis = opt.direction.bases[opt.direction.streams[id(layer.weight)]][0]
        assert torch.allclose(basis.t() @ basis, torch.eye(basis.shape[1]), atol=1e-5)
        outside = layer.weight.grad - layer.weight.grad @ basis @ basis.t()
        assert outside.norm() < 1e-3 * layer.weight.grad.norm()
    assert not net.one._forward_pre_hooks
    other = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="expected a forward that calls linear layers of the model"):
        AGZO(net.named_parameters(), 0.0, model=other).step(lambda: net_loss(net, x))


def test_a_layer_in_a_loop_has_the_inputs_of_all_its_calls():
    torch.manual_seed(2)
    layer, xs = nn.Linear(6, 6), torch.randn(2, 2, 6)
    opt = AGZO(layer.named_parameters(), 0.0, model=layer, rank=4, iterations=30)
    opt.step(lambda: sum(layer(x).square().sum() for x in xs))
    (basis, _) = next(iter(opt.direction.bases.values()))
    rows = xs.reshape(4, 6)
    assert (rows - rows @ basis @ basis.t()).norm() < 1e-4 * rows.norm()


# --- P-GAP ---


def gap(lr, r, probes, interval, delta, last, decay, scaled):
    """The reproduction's loop: probes along dense noise, a singular value decomposition, the moved Z."""
    spaces = {}

    def oracle(theta, seed, step):
        if step % interval == 0:
            zs = directions(seed, step, 1 + probes)[1:]
            gs = [central(theta, z) for z in zs]
            for n, t in theta.items():
                if t.dim() == 2:
                    u, s, vh = torch.linalg.svd(sum(g * z[n] for g, z in zip(gs, zs, strict=True)))
                    spaces[n] = u[:, :r], s[:r], vh[:r].t()
        strength = delta + min(step / decay, 1.0) * (last - delta)
        s0, side = derive_seed_int(seed, step, 0), derive_seed_int(seed, step, 0x80000002)

        def z_of(name, t):
            if t.dim() < 2:
                return dense(name, t.shape, s0)
            u, s, v = spaces[name]
            z, xi = dense(name, (r, r), s0), dense(name, (1,), side, "rademacher")[0]
            z = z - (((z * torch.diag(s)).sum() - xi * strength**0.5 * s.norm()) / s.norm() ** 2) * s.diag()
            assert torch.isclose((z * torch.diag(s)).sum() / s.norm(), xi * strength**0.5)
            m, n = t.shape
            return (math.sqrt(m * n) / r if scaled else 1.0) * u @ z @ v.t()

        z = {n: z_of(n, t) for n, t in theta.items()}
        return plus(theta, z, -lr * central(theta, z))

    return oracle


@pytest.mark.parametrize("scaled", [False, True])
def test_pgap(scaled, rng):
    options = {"rank": 3, "probes": 3, "interval": 2, "delta": 2.0, "last_delta": 0.5, "decay_steps": 3}
    lr = 0.002
    make = lambda p, **o: PGAP(p, lr, **{**options, "scaled": scaled, **o})
    oracle = lambda: gap(lr, 3, 3, 2, 2.0, 0.5, 3, scaled)
    opt = compare(make, oracle(), rng, steps=5, tolerance=1e-3)  # singular vectors of an fp32 gradient
    assert len(opt.last_losses) == 8
    if scaled:
        return
    differs(make, oracle(), rng, delta=0.1)
    differs(make, oracle(), rng, interval=3)
    differs(make, oracle(), rng, last_delta=2.0)


# --- LOREN ---


def loren(lr, q, beta, rho, axis_lr, decay):
    """The authors' update with all directions together: u - alpha a', momentum, and the vectors' gradient."""
    axes, momenta = {}, {}

    def oracle(theta, seed, step):
        if not axes:
            for n, s in SHAPES.items():
                width = s[1] if len(s) == 2 else s[0]
                axes[n] = dense(n, (width,), derive_seed_int(seed, 0, 0x80000003))
                momenta[n] = torch.zeros(s, dtype=torch.float64)
        us, zs, tiles = directions(seed, step, q), [], {}
        for n, s in SHAPES.items():
            tiles[n] = axes[n].expand(s).clone()
        for u in us:
            z = {}
            for n, a in tiles.items():
                s, dot = (a * a).sum(), (a * u[n]).sum()
                root = (rho + s).sqrt()
                z[n] = u[n] - (rho**0.5 + root) * dot / (s * root) * a
            zs.append(z)
        losses = torch.stack([loss_of(at(theta, z, EPS)) for z in zs])
        weights = losses - losses.mean()
        new = {}
        for n, t in theta.items():
            a, grad, turn = tiles[n], 0.0, 0.0
            s = (a * a).sum()
            root = (rho + s).sqrt()
            for w, u, z in zip(weights, us, zs, strict=True):
                grad = grad + w / (EPS * (q - 1)) * z[n]
                dot = (a * u[n]).sum()
                c1 = dot * u[n] - a
                c2 = (rho**0.5 + root) * (dot**2 - s) * a / (s * root)
                turn = turn + w * EPS**2 * (c1 - c2) / root / (q - 1)
            if t.dim() == 2:
                momenta[n] = grad = beta * momenta[n] + grad
                turn = turn.sum(0)
            new[n] = (1 - lr * decay) * t - lr * grad
            axes[n] = (1 - axis_lr * decay) * axes[n] - axis_lr * turn
        return new

    return oracle


def test_loren(rng):
    # The rate of a is large, so that it counts within a few steps.
    lr, options = 0.0005, {"directions": 4, "momentum": 0.8, "damping": 0.3, "axis_lr": 300.0}
    make = lambda p, **o: LOREN(p, lr, weight_decay=0.001, **{**options, **o})
    oracle = lambda: loren(lr, 4, 0.8, 0.3, 300.0, 0.001)
    compare(make, oracle(), rng, steps=5, tolerance=1e-4)
    compare(make, oracle(), rng, restore="inplace", tolerance=5e-3)  # each move rounds
    differs(make, oracle(), rng, steps=5, momentum=0.0)
    differs(make, oracle(), rng, steps=5, damping=3.0)
    with pytest.raises(AssertionError):  # the covariance that stays
        compare(make, oracle(), rng, steps=5, tolerance=1e-3, axis_lr=0.0)


def test_covariance_of_the_noise(rng):
    """(I + a a^T / damping)^-1 of many draws: 1 across a, damping / (damping + s) along it."""
    p = nn.Parameter(torch.zeros(9))
    opt = LOREN([("p", p)], 0.0, 1.0, directions=400, damping=0.5, seed=rng.getrandbits(62))
    seen = []
    opt.step(lambda: seen.append(p.detach() + 0) or p.sum())
    a = opt.state[p]["axis"].double()
    z = torch.stack([v.double() for v in seen])
    along = (z @ a / a.norm()).square().mean().item()
    other = torch.linalg.svd(a[None]).Vh[1]
    across = (z @ other).square().mean().item()
    share = 0.5 / (0.5 + (a @ a).item())
    # Each is a mean of 400 squares of normals: 1 +- 0.07, and 0.6 is eight of these away.
    assert abs(along / share - 1) < 0.6
    assert abs(across - 1) < 0.6


# --- CurvZO ---


def curvzo(lr, ratio, interval, rate, pace, first):
    """The reproduction's loop, in Python's numbers."""
    state = {"scores": [first] * len(SHAPES), "mean": 1e-8, "ratio": ratio}

    def oracle(theta, seed, step):
        scores, count = state["scores"], len(SHAPES)
        share = [s / sum(scores) for s in scores]
        wanted = max(1, min(math.floor(count * state["ratio"]), count))
        low, high = 0.0, 1 / (max(share) + 1e-18)
        for _ in range(40):
            middle = (low + high) / 2
            if sum(min(1.0, middle * s) for s in share) > wanted:
                high = middle
            else:
                low = middle
        chance = [min(1.0, low * s) for s in share]
        s0 = derive_seed_int(seed, step, 0)
        u = [(derive_seed_int(s0, zk.stream_of(n), 0x80000004) >> 11) / 2**53 for n in SHAPES]
        chosen = [a < b for a, b in zip(u, chance, strict=True)]
        if not any(chosen):
            chosen[chance.index(max(chance))] = True
        (z,) = directions(seed, step, 1)
        z = {n: v * c for (n, v), c in zip(z.items(), chosen, strict=True)}
        g = central(theta, z).item()
        state["mean"] = (1 - pace) * state["mean"] + pace * abs(g)
        squares = [v.square().sum().item() for v in z.values()]
        energy = [c * v / p**2 for c, v, p in zip(chosen, squares, chance, strict=True)]
        new = [
            (1 - rate) * s + rate * abs(g) / state["mean"] * e / sum(energy) if c else s
            for s, c, e in zip(scores, chosen, energy, strict=True)
        ]
        state["scores"] = new
        if step % interval == 0:
            q = [s / sum(new) for s in new]
            effective = sum(s**0.5 for s in new) ** 2 / sum(new) / count
            entropy = -sum(p * math.log(p) for p in q) / math.log(count)
            raw = 0.1 + 0.7 * (0.7 * effective + 0.3 * (1 - entropy))
            state["ratio"] = min(max(0.9 * state["ratio"] + 0.1 * raw, 0.1), 0.8)
        return {n: t - lr * g / p * z[n] for (n, t), p in zip(theta.items(), chance, strict=True)}

    return oracle


def test_curvzo(rng):
    lr, options = 0.002, {"ratio": 0.5, "interval": 2, "rate": 0.3, "pace": 0.2, "first": 0.05}
    make = lambda p, **o: CurvZO(p, lr, **{**options, **o})
    oracle = lambda: curvzo(lr, *options.values())
    opt = compare(make, oracle(), rng, steps=7)
    scores = [s["score"].item() for s in opt.state.values()]
    assert len(set(scores)) > 1
    compare(make, oracle(), rng, steps=7, restore="inplace", tolerance=1e-3)  # each move rounds
    differs(make, oracle(), rng, steps=7, ratio=1.0)


def test_probabilities_sum_to_the_count(rng):
    for count in (1, 2, 9, 40):
        scores = torch.tensor([rng.random() ** 4 + 1e-9 for _ in range(count)], dtype=torch.float64)
        for ratio in (0.1, 0.5, 1.0):
            p = inclusion(scores, torch.tensor(ratio, dtype=torch.float64))
            wanted = min(max(1, math.floor(count * ratio)), (scores.sum() / scores.max()).item())
            assert abs(p.sum().item() - wanted) < 1e-6
            assert p.max() <= 1
            assert torch.allclose(p / scores, (p / scores)[0].expand_as(p))


# --- QES ---


def test_qes(rng):
    """u = decay e + alpha sum_n zscore(R)_n d_n / sigma;  q += round(u);  e = u - round(u)."""
    n, lr, eps, decay, bits, seed = 4, 2.0, 0.6, 0.8, 4, rng.getrandbits(62)
    shapes, limit = {"a": (6, 5), "b": (11,)}, 7
    draw = lambda s, f: torch.tensor([f() for _ in range(math.prod(s))]).view(s)
    q = {k: draw(s, lambda: rng.randint(-7, 7)) for k, s in shapes.items()}
    target = {k: draw(s, lambda: rng.gauss(0, 4)).double() for k, s in shapes.items()}
    start, params = dict(q), {k: v.to(torch.int8) for k, v in q.items()}
    opt = QES(list(params.items()), lr, eps, population=n, error_decay=decay, bits=bits, seed=seed)
    reward = lambda q: -sum(((q[k].double() - t) ** 2).sum() for k, t in target.items())
    errors = {}
    for k, s in shapes.items():
        first = derive_seed_int(seed, zk.stream_of(k), 0x80000005)
        index = iter(range(math.prod(s)))
        errors[k] = draw(s, lambda: (derive_seed_int(first, next(index), 0x80000005) >> 40) / 2**24 - 0.5)  # noqa: B023
    gate = lambda q, d: torch.where((q + d).abs() <= limit, d, torch.zeros_like(d))
    for step in range(6):
        opt.step(lambda: reward(params))
        ds = []
        for k in range(n):
            s, d = derive_seed_int(seed, step, k), {}
            for name, v in q.items():
                own = torch.zeros(v.shape, dtype=torch.int8)
                own_seed = {"streams": zk.stream_of(name), "rounding_seed": derive_seed_int(s, 0, 0)}
                zk.requantize_(own, s, eps, low=-15, high=15, **own_seed)
                d[name] = gate(v, own.long())
            ds.append(d)
        rewards = torch.stack([reward({k: v + d[k] for k, v in q.items()}) for d in ds])
        z = (rewards - rewards.mean()) / (((rewards - rewards.mean()) ** 2).mean().sqrt() + 1e-8)
        for name, v in q.items():
            u = torch.tensor(decay) * errors[name]
            for weight, d in zip(z, ds, strict=True):
                g = (-weight / n).float().double()  # a log holds it so
                u = u + ((-(lr * g).float()).double() / eps).float() * d[name].float()
            moves = gate(v, u.round().long())
            q[name], errors[name] = v + moves, (u - moves).clamp(-1.5, 1.5)
    assert any(not torch.equal(q[k], start[k]) for k in q)
    for k, p in params.items():
        assert torch.equal(p.long(), q[k])
        assert torch.equal(opt.state[p]["error"], errors[k])


def test_error_feedback_adds_up_what_no_update_could_move(rng):
    """A fifth of a step in every update: after some, weights have moved; without e they never do."""

    def moved(**options):
        p = torch.zeros(400, dtype=torch.int8)
        opt = QES([("p", p)], 0.2, 1.0, population=2, seed=rng.getrandbits(62), **options)
        for _ in range(6):
            opt.step(lambda: p.double().sum())
        return p.count_nonzero().item()

    assert moved(error_decay=0.99) > 40
    # u is at most 0.2 times the mean of two directions there, which is 2 for one weight in thirty.
    assert moved(error_decay=0.0, spread=False) < 40


@pytest.mark.parametrize("bits", [4, 8])
def test_log_of_integers_replays(bits, tmp_path, rng):
    seed, path = rng.getrandbits(62), tmp_path / "run.zk"
    start = torch.tensor([rng.randint(-7, 7) for _ in range(60)], dtype=torch.int8).view(6, 10)
    reward = lambda p: -((p.double() - 2) ** 2).sum()
    make = lambda p, **o: QES([("w", p)], 3.0, 0.5, population=3, bits=bits, seed=seed, **o)

    def run(steps, **o):
        w = start.clone()
        opt = make(w, **o)
        for _ in range(steps):
            opt.step(lambda: reward(w))
        if opt.trajectory:
            opt.trajectory.close()
        return w

    want = run(5)
    run(3, trajectory=path)
    assert torch.equal(run(2, trajectory=path, resume=True), want)
    base = start.clone()
    assert replay_({"w": base}, path) == 5
    assert torch.equal(base, want)
    assert not torch.equal(want, start)


# --- logs ---

LOGGED = {
    "ConMeZO": lambda p, **o: ConMeZO(p, 0.002, momentum=0.7, clip=50.0, weight_decay=0.1, **o),
    "PGAP": lambda p, **o: PGAP(p, 0.002, rank=3, probes=2, interval=3, clip=200.0, weight_decay=0.1, **o),
    "LOREN": lambda p, **o: LOREN(p, 0.0005, directions=3, axis_lr=30.0, weight_decay=0.01, **o),
    "CurvZO": lambda p, **o: CurvZO(p, 0.002, interval=2, weight_decay=0.1, **o),
}


@pytest.mark.parametrize("method", LOGGED)
def test_log_replays_and_resumes(method, tmp_path, rng):
    dtype = torch.bfloat16
    make, seed, path = LOGGED[method], rng.getrandbits(62), tmp_path / "run.zk"

    def run(params, opt, steps):
        for _ in range(steps):
            opt.step(lambda: loss_of(params))
        if opt.trajectory:
            opt.trajectory.close()
        return [p.detach() for p in params.values()]

    new = lambda params, **o: make(list(params.items()), seed=seed, **o)
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
    "momentum": (lambda p: ConMeZO(p, 1.0, momentum=1.0), "ConMeZO: momentum: expected a number in"),
    "probes": (lambda p: PGAP(p, 1.0, probes=0), "PGAP: probes: expected an integer >= 1"),
    "ratio": (lambda p: CurvZO(p, 1.0, ratio=0.0), r"CurvZO: ratio: expected a number in \(0, 1\]"),
    "in place": (
        lambda p: PGAP(p, 1.0, restore="inplace"),
        "PGAP: restore, subset: expected 'exact' and no subset",
    ),
    "log": (
        lambda p: AGZO(p, 1.0, model=nn.Linear(2, 2), trajectory="run.zk"),
        "AGZO: trajectory: expected None: the directions come from the activations",
    ),
    "products": (
        lambda p: AGZO(p, 1.0, model=nn.Linear(2, 2), restore="products"),
        "AGZO: restore: expected 'exact' or 'inplace': the directions come from the step's first forward",
    ),
    "losses": (
        lambda p: ZerothOrder(
            p, 1.0, estimator=OneSided(2), direction=RankOneCovariance(), rule=CovarianceDescent()
        ),
        "ZerothOrder: estimator, direction: expected LeaveOneOut and RankOneCovariance",
    ),
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
