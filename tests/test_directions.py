"""Every kind of direction against a materialised z: the points that the closure sees, the update, and
what stays.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from zosgd_cases import BOTH, combined, same_bits

import zokernels as zk
from zokernels.backends.reference.combine import fma
from zokernels.backends.reference.noise import uniform16
from zokernels.contract import DOMAIN_MASK, derive_seed_int, seed_to_int64
from zokernels.optim import (
    EGGROLL,
    LOZO,
    ZOBCD,
    ZOSGD,
    FreshFactors,
    GivenMask,
    KeptRight,
    LeZO,
    MagnitudeMask,
    RandomMask,
    SparseMeZO,
    Sphere,
    Subspace,
    SubZero,
    TemporalFactor,
    TensorScale,
    TeZO,
)

EPS, LR, SEED = 1e-3, 1e-2, 77
SHAPES = {
    "embed.w": (6, 10),
    "layers.0.w": (5, 3, 2),
    "layers.0.b": (7,),
    "layers.1.w": (4, 9),
    "layers.2.w": (3, 3),
}


def model(dtype=torch.float32) -> dict[str, nn.Parameter]:
    torch.manual_seed(3)
    return {name: nn.Parameter((torch.randn(shape) * 0.1).to(dtype)) for name, shape in SHAPES.items()}


def noise(name, shape, seed, offset=0):
    return zk.noise(shape, seed=seed, stream=zk.stream_of(name), offset=offset)


def product(left, right, shape):
    """The product of two factors, as chains of fma over the rank that begin at 0."""
    out = torch.zeros(left.shape[0], right.shape[0])
    for s in range(left.shape[1]):
        out = fma(left[:, s, None].expand_as(out), right[None, :, s].expand_as(out), out)
    return out.view(shape)


# z of a parameter at a step: (z, factor of every coefficient), by plain arithmetic.


def z_dense(name, theta, seed, step):
    return noise(name, theta.shape, seed), 1.0


def z_magnitude(name, theta, seed, step):
    smallest = theta.abs().flatten().float().sort().values[max(1, round(0.3 * theta.numel())) - 1]
    return noise(name, theta.shape, seed) * (theta.abs().float() <= smallest), 1.0


def z_random(name, theta, seed, step):
    mask_seed = torch.tensor(seed_to_int64(derive_seed_int(SEED, step // 2, 0x80000000)))
    u16 = uniform16(mask_seed, zk.stream_of(name), DOMAIN_MASK, 0, theta.numel()).view(theta.shape)
    return noise(name, theta.shape, seed) * (u16 < round(0.4 * 65536)), 1.0


GIVEN = {"embed.w": torch.tensor([0, 7, 59]), "layers.0.b": torch.tensor([True, False] * 3 + [True])}


def z_given(name, theta, seed, step):
    keep = torch.ones(theta.shape, dtype=torch.bool)
    if name == "embed.w":
        keep = torch.zeros(theta.numel(), dtype=torch.bool).index_fill(0, GIVEN[name], True).view(theta.shape)
    elif name in GIVEN:
        keep = GIVEN[name]
    return noise(name, theta.shape, seed) * keep, 1.0


def z_rms(name, theta, seed, step):
    return noise(name, theta.shape, seed), theta.float().square().mean().sqrt().item()


def kept_seed(step, interval):
    return derive_seed_int(SEED, step // interval if interval else 0, 0x80000001)


def factor(name, rows, rank, seed, offset, c=1.0):
    return noise(name, (rows, rank), seed, offset) * torch.tensor(c)


def low_rank(left_seed, right_seed, tau=False):
    def z(name, theta, seed, step):
        if theta.dim() < 2:
            return noise(name, theta.shape, seed), 1.0
        m, n, r = theta.shape[0], theta.numel() // theta.shape[0], 2
        left = factor(name, m, r, left_seed(seed, step), 0, r**-0.5)
        if tau:
            left = left * noise(name, (1, r), seed)
        return product(left, factor(name, n, r, right_seed(seed, step), m * r), theta.shape), 1.0

    return z


def z_subspace(name, theta, seed, step):
    if theta.dim() < 2:
        return noise(name, theta.shape, seed), 1.0
    m, n, r, kept = theta.shape[0], theta.numel() // theta.shape[0], 2, kept_seed(step, 2)
    u, v = (
        torch.linalg.qr(factor(name, rows, r, kept, at).double()).Q.float()
        for rows, at in ((m, 0), (n, m * r))
    )
    left = torch.tensor(math.sqrt(m * n) / r) * product(u, noise(name, (r, r), seed), (m, r))
    return product(left, v, theta.shape), 1.0


KINDS = {
    "dense": (lambda: None, z_dense),
    "magnitude": (lambda: MagnitudeMask(0.3), z_magnitude),
    "random": (lambda: RandomMask(0.4, refresh=2), z_random),
    "given": (lambda: GivenMask(GIVEN), z_given),
    "rms": (lambda: TensorScale("rms"), z_rms),
    "LOZO": (lambda: KeptRight(2, 2), low_rank(lambda s, t: s, lambda s, t: kept_seed(t, 2))),
    "EGGROLL": (lambda: FreshFactors(2), low_rank(lambda s, t: s, lambda s, t: s)),
    "TeZO": (
        lambda: TemporalFactor(2),
        low_rank(lambda s, t: kept_seed(t, None), lambda s, t: kept_seed(t, None), tau=True),
    ),
    "SubZero": (lambda: Subspace(2, 2), z_subspace),
}
ALL = pytest.mark.parametrize("kind", KINDS)


class Recorder:
    """A closure that keeps the weights that it sees and returns the losses that it was given."""

    def __init__(self, params, losses):
        self.params, self.losses, self.seen = params, iter(losses), []

    def __call__(self):
        self.seen.append({name: p.clone().detach() for name, p in self.params.items()})
        return next(self.losses)


@BOTH
@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_points_and_update_have_one_z(kind, restore, dtype):
    """The same z in both perturbations and in the update, three steps on; what z leaves alone keeps its
    bits.
    """
    make, z_of = KINDS[kind]
    params = model(dtype)
    start = {name: p.detach().clone() for name, p in params.items()}
    opt = ZOSGD(
        params.items(), lr=LR, eps=EPS, seed=SEED, restore=restore, rounding="nearest", direction=make()
    )
    for step in range(3):
        theta = {name: p.detach().clone() for name, p in params.items()}
        record = Recorder(params, [1.3, 1.0])
        opt.step(record)
        plus, minus = record.seen
        g = torch.tensor(0.3 / (2 * EPS), dtype=torch.float64).float()
        for name, p in params.items():
            # Frozen masks and scales are those of the first step.
            source = start[name] if kind in ("magnitude", "rms") else theta[name]
            z, factor = z_of(name, source, derive_seed_int(SEED, step, 0), step)
            f = lambda c, factor=factor: (torch.tensor(c).float() * torch.tensor(factor).float()).item()
            up = combined(theta[name], z, f(EPS))
            if restore == "exact":
                down, last = (
                    combined(theta[name], z, f(-EPS)),
                    combined(theta[name], z, f(-(LR * g.double().item()))),
                )
            else:
                down = combined(up, z, f(-2 * EPS))
                last = combined(down, z, f(EPS - LR * g.double().item()))
            assert same_bits([plus[name], minus[name], p.detach()], [up, down, last]), (kind, name, step)
            still = z == 0
            assert same_bits([p.detach()[still]], [theta[name][still]])


@BOTH
@pytest.mark.parametrize("kind", ["variance", "expectation"])
def test_modified_spsa(kind, restore):
    """MeZO's variants: z / d perturbs, d z or z updates; in place the weights go back first."""
    params = model()
    opt = ZOSGD(params.items(), lr=LR, eps=EPS, seed=SEED, restore=restore, direction=TensorScale(kind))
    theta = {name: p.detach().clone() for name, p in params.items()}
    record = Recorder(params, [1.3, 1.0])
    opt.step(record)
    g = torch.tensor(0.3 / (2 * EPS), dtype=torch.float64).float()
    for name, p in params.items():
        z, d = z_rms(name, theta[name], derive_seed_int(SEED, 0, 0), 0)
        inverse = (1 / torch.tensor(d)).item()
        f = lambda c, by: (torch.tensor(c).float() * torch.tensor(by).float()).item()
        assert same_bits([record.seen[0][name]], [combined(theta[name], z, f(EPS, inverse))])
        base = theta[name]
        if restore == "inplace":
            base = combined(combined(record.seen[0][name], z, f(-2 * EPS, inverse)), z, f(EPS, inverse))
        by = d if kind == "variance" else 1.0
        assert same_bits([p.detach()], [combined(base, z, f(-(LR * g.double().item()), by))])


@BOTH
@pytest.mark.parametrize("dist", ["normal", "rademacher"])
def test_sphere(dist, restore):
    params = model()
    opt = ZOSGD(
        params.items(),
        lr=0.0,
        eps=EPS,
        seed=SEED,
        dist=dist,
        restore=restore,
        direction=Sphere(),
        directions=2,
    )
    record = Recorder(params, [1.0] * 4)
    theta = {name: p.detach().clone() for name, p in params.items()}
    opt.step(record)
    count = sum(p.numel() for p in theta.values())
    for k in range(2):
        moved = sum((record.seen[2 * k][n].double() - theta[n].double()).square().sum() for n in theta)
        # fp32 rounding of theta +- eps z: 1e-8 of 1e-3 a weight, and more in place
        assert moved.sqrt().item() == pytest.approx(EPS * count**0.5, rel=1e-4)


def test_magnitude_mask_is_of_unperturbed_weights_and_refreshes():
    params = model()
    options = {"density": 0.3, "refresh": 2, "dynamic": False, "restore": "inplace"}
    opt = SparseMeZO(params.items(), lr=5.0, eps=1.0, seed=SEED, **options)
    masks = []
    for step in range(4):
        now = {n: zk.pack_mask(z_magnitude(n, p.detach(), 1, 0)[0] != 0) for n, p in params.items()}
        opt.step(Recorder(params, [1.3, 1.0]))
        masks.append({n: opt.state[p]["mask"].clone() for n, p in params.items()})
        if step % 2 == 0:
            assert all(torch.equal(masks[-1][n], now[n]) for n in params)
    same = lambda a, b: all(torch.equal(masks[a][n], masks[b][n]) for n in params)
    assert same(0, 1)
    assert same(2, 3)
    assert not same(1, 2)


@pytest.mark.parametrize(
    "make", [LeZO, ZOBCD, lambda p, **o: ZOBCD(p, order="random", period=2, size=2, **o)]
)
@BOTH
def test_subsets_touch_only_their_layers(make, restore):
    params, seen = model(), []
    opt = make(list(params.items()), lr=LR, seed=SEED, restore=restore)
    for _ in range(12):
        before = {n: p.detach().clone() for n, p in params.items()}
        record = Recorder(params, [1.3, 1.0])
        opt.step(record)
        moved = {n for n, p in params.items() if not torch.equal(p, before[n])}
        for weights in record.seen:
            assert {n for n in params if not torch.equal(weights[n], before[n])} == moved
        seen.append(frozenset(moved))
    layers = {frozenset(int(n.split(".")[1]) if n.startswith("layers") else None for n in s) for s in seen}
    if make is LeZO:  # round(0.75 * 3) = 2 of 3 layers are left out
        assert layers == {frozenset({None, i}) for i in range(3)}
    elif make is ZOBCD:
        assert layers == {frozenset({i}) for i in (0, 1, 2, None)}
        assert seen[:4] == seen[4:8] != seen[1:5]
    else:
        assert layers == {frozenset({0, 1}), frozenset({2}), frozenset({None})}
        assert all(seen[i] == seen[i + 1] for i in range(0, 12, 2))


def test_subset_errors():
    with pytest.raises(ValueError, match="LeZO: subset: expected named parameters"):
        LeZO([nn.Parameter(torch.ones(3))], lr=1.0).step(lambda: 1.0)
    with pytest.raises(ValueError, match="LeZO: subset: expected names with a layer number"):
        LeZO([("w", nn.Parameter(torch.ones(3)))], lr=1.0).step(lambda: 1.0)
    with pytest.raises(ValueError, match="capturable"):
        LeZO(model().items(), lr=1.0, capturable=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SparseMeZO(p, lr=LR, refresh=3, seed=SEED),
        lambda p: ZOSGD(p, lr=LR, seed=SEED, direction=RandomMask(0.5, 2)),
        lambda p: ZOSGD(p, lr=LR, seed=SEED, direction=GivenMask(GIVEN)),
        lambda p: ZOSGD(p, lr=LR, seed=SEED, direction=TensorScale("variance", 3)),
        lambda p: LeZO(p, lr=LR, seed=SEED),
        lambda p: LOZO(p, lr=LR, seed=SEED, rank=2, interval=3),
        lambda p: SubZero(p, lr=LR, seed=SEED, rank=2, interval=3),
        lambda p: TeZO(p, lr=LR, seed=SEED, rank=2),
        lambda p: EGGROLL(p, lr=LR, seed=SEED, directions=2),
    ],
)
def test_resume_is_bit_identical(make, tmp_path):
    def run(params, opt, steps):
        for _ in range(steps):
            opt.step(lambda: sum((p.float() ** 2).sum() for p in params.values()))

    whole = model(torch.bfloat16)
    run(whole, make(list(whole.items())), 7)
    half = model(torch.bfloat16)
    opt = make(list(half.items()))
    run(half, opt, 4)
    torch.save((opt.state_dict(), {n: p.data for n, p in half.items()}), tmp_path / "run.pt")
    state, weights = torch.load(tmp_path / "run.pt", weights_only=True)
    rest = {n: nn.Parameter(w) for n, w in weights.items()}
    resumed = make(list(rest.items()))
    resumed.load_state_dict(state)
    run(rest, resumed, 3)
    assert same_bits([p.detach() for p in rest.values()], [p.detach() for p in whole.values()])


@ALL
def test_frozen_and_empty_and_tied(kind):
    make, _ = KINDS[kind]
    params = model()
    params["layers.1.w"].requires_grad_(False)
    frozen = params["layers.1.w"].clone()
    alone = ("layers.1.w", params["layers.1.w"])  # a group with nothing to train
    groups = [{"params": [(n, p) for n, p in params.items() if p.requires_grad]}, {"params": [alone]}]
    opt = ZOSGD(groups, lr=LR, seed=SEED, direction=make())
    tied = params["embed.w"]
    before = tied.detach().clone()
    opt.step(lambda: (tied @ tied.t()).sum() + sum(p.sum() for p in params.values()))
    assert torch.equal(params["layers.1.w"], frozen)
    assert not torch.equal(tied, before)


BAD = {
    "density": (
        lambda p: ZOSGD(p, lr=1.0, direction=MagnitudeMask(0.0)),
        r"MagnitudeMask: density: expected .*, got 0",
    ),
    "refresh": (
        lambda p: ZOSGD(p, lr=1.0, direction=RandomMask(0.5, 0)),
        "RandomMask: refresh: expected None or",
    ),
    "rank": (lambda p: LOZO(p, lr=1.0, rank=0), "LOZO: rank: expected an integer >= 1, got 0"),
    "kind": (lambda p: ZOSGD(p, lr=1.0, direction=TensorScale("x")), "TensorScale: kind: expected"),
    "capturable": (
        lambda p: LOZO(p, lr=1.0, capturable=True),
        "LOZO: capturable: expected False with a schedule",
    ),
    "order": (lambda p: ZOBCD(p, lr=1.0, order="up"), "ZOBCD: order: expected 'cyclic' or 'random'"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad):
    make, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        make(list(model().items()))


BAD_STEPS = {
    "rank": (
        SubZero,
        {"rank": 5},
        ValueError,
        r"Subspace: rank: .* every matrix, \(4, 9\) taken as \(4, 9\) \(or near_square=True\)",
    ),
    "name": (
        ZOSGD,
        {"direction": GivenMask({"no": torch.ones(1)})},
        ValueError,
        "GivenMask: masks: .* got 'no'",
    ),
    "dtype": (ZOSGD, {"direction": GivenMask({"layers.0.b": torch.ones(7)})}, TypeError, "float32 of shape"),
    "index": (
        ZOSGD,
        {"direction": GivenMask({"layers.0.b": torch.tensor([7])})},
        ValueError,
        r"indices in \[0, 7\)",
    ),
}


@pytest.mark.parametrize("bad", BAD_STEPS)
def test_bad_steps_change_nothing(bad):
    make, options, error, message = BAD_STEPS[bad]
    params = model()
    before = [p.detach().clone() for p in params.values()]
    opt = make(list(params.items()), lr=1.0, **options)
    with pytest.raises(error, match=message):
        opt.step(lambda: sum(p.sum() for p in params.values()))
    assert same_bits([p.detach() for p in params.values()], before)
    assert opt.step_count == 0


@pytest.mark.parametrize("kind", ["magnitude", "random", "rms", "EGGROLL", "TeZO"])
def test_two_pass_is_refused(kind):
    direction = KINDS[kind][0]()
    params = nn.ParameterList(model().values())
    opt = ZOSGD(params, lr=LR, restore="inplace", direction=direction)
    with pytest.raises(ValueError, match="dense noise"), opt.two_pass(params):
        pass
