"""Coordinate-wise estimation against differences in float64, and which bits it leaves alone."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits
from torch import nn
from zosgd_cases import batch, combined, loss_of, mlp, same_bits, weights

import zokernels as zk
from zokernels.contract import derive_seed_int, seed_to_int64
from zokernels.optim import ZOCGE, Blocks, GivenMask, MagnitudeMask, RandomMask, grasp_shares
from zokernels.optim.cge import sample
from zokernels.trajectory import record

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ESTIMATOR = pytest.mark.parametrize("estimator", ["one-sided", "two-sided"])


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


@ESTIMATOR
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_loss_has_its_gradient(estimator, dtype, rng):
    g = torch.Generator().manual_seed(rng.getrandbits(60))
    p = nn.Parameter(torch.randn(7, 5, generator=g).to(dtype))
    a = torch.randn(7, 5, generator=g).double()
    opt = ZOCGE([p], lr=0.0, eps=1e-3, estimator=estimator)
    opt.step(lambda: (a * p.double()).sum())
    torch.testing.assert_close(opt.last_projected_gradient, a.flatten().float(), rtol=1e-6, atol=1e-6)
    assert len(opt.last_losses) == (1 + 35 if estimator == "one-sided" else 70)


def test_the_gradient_of_an_mlp(rng):
    """Central differences of a float64 loss of fp32 weights have an error of O(eps^2), here below 1e-6."""
    torch.manual_seed(rng.getrandbits(32))
    model, x = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(8, 6).double()
    exact = copy.deepcopy(model).double()
    loss = lambda values: torch.func.functional_call(exact, values, (x,)).square().mean()
    loss(dict(exact.named_parameters())).backward()
    opt = ZOCGE(model.named_parameters(), lr=0.0, eps=1e-4, estimator="two-sided")
    opt.step(lambda: loss({n: p.double() for n, p in model.named_parameters()}))
    want = flat([p.grad for p in exact.parameters()]).float()
    torch.testing.assert_close(opt.last_projected_gradient, want, rtol=1e-4, atol=1e-5)


@ESTIMATOR
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_step_is_one_rounding_of_the_log(estimator, dtype, rounding, weight_decay, rng):
    """The weights follow from g as combine computes them with z = 1, with the same rounding bits."""
    model, (x, y), lr, seed = mlp(dtype), batch(), 0.3, rng.getrandbits(63)
    opt = ZOCGE(
        model.named_parameters(), lr, 0.05, weight_decay, seed, rounding, estimator=estimator, clip=0.02
    )
    for step in range(2):
        theta = weights(model)
        opt.step(lambda: loss_of(model, x, y))
        g = opt.last_projected_gradient
        assert g.abs().max() == torch.tensor(0.02)
        assert g.unique().numel() > 3
        own = seed_to_int64(zk.derive_seed(seed, step)) if rounding == "stochastic" else None
        parts = g.split([p.numel() for p in theta])
        for (name, p), old, part in zip(model.named_parameters(), theta, parts, strict=True):
            c = -(lr * part.double()).float().view_as(p)
            want = combined(old, c, 1.0, decay=1 - lr * weight_decay if weight_decay else None,
                stochastic_seed=own,
                            stream=zk.stream_of(name))  # fmt: skip
            assert same_bits([p.detach()], [want])
            assert not torch.equal(p, old)


@ESTIMATOR
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("lr_times_decay", [0.0, 0.7])
def test_zero_and_minus_zero_add_as_in_combine(estimator, dtype, rounding, lr_times_decay):
    """-lr * g underflows to 0.0 or to -0.0, by the sign of g: -0.0 + 0.0 is 0.0, and -0.0 + -0.0 is -0.0."""
    tiny, lr = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, 1e-30
    own = torch.tensor([-0.0, 0.0, -tiny, tiny, 1.0]).to(dtype)
    p, slope = nn.Parameter(own.repeat(2)), torch.tensor([-1e-20] * 5 + [1e-20] * 5).double()
    before = p.detach().clone()
    opt = ZOCGE([("p", p)], lr, weight_decay=lr_times_decay / lr, rounding=rounding, estimator=estimator)
    opt.step(lambda: (slope * p.double()).sum())
    change = -(lr * opt.last_projected_gradient.double()).float()
    assert change.tolist() == [0.0] * 10
    assert change.signbit().tolist() == [False] * 5 + [True] * 5
    own_seed = seed_to_int64(zk.derive_seed(0, 0)) if rounding == "stochastic" else None
    decay = 1 - lr_times_decay if lr_times_decay else None
    want = combined(before, change, 1.0, decay=decay, stochastic_seed=own_seed, stream=zk.stream_of("p"))
    assert_same_bits(p.detach(), want)
    assert p.signbit().tolist()[::5] == [False, True]


def test_rounding_bits_are_those_of_the_place(rng):
    """The step equals combine over the whole tensor with a change of 0 for all other entries."""
    g = torch.Generator().manual_seed(rng.getrandbits(60))
    p, a = nn.Parameter(torch.randn(500, generator=g).bfloat16()), torch.randn(500, generator=g).double()
    before, index, seed = (
        p.detach().clone(),
        torch.tensor(sorted(rng.sample(range(500), 60))),
        rng.getrandbits(64),
    )
    opt = ZOCGE([("p", p)], lr=1e-2, seed=seed, mask=GivenMask({"p": index}))
    opt.step(lambda: (a * p.double()).sum())
    change = torch.zeros(500).index_put((index,), -(1e-2 * opt.last_projected_gradient.double()).float())
    own = seed_to_int64(zk.derive_seed(seed, 0))
    want = combined(before, change, 1.0, stochastic_seed=own, stream=zk.stream_of("p"))
    assert same_bits([p.detach()], [want])
    assert (p != before).sum() > 5


@ESTIMATOR
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_weight_moves_at_a_time_and_comes_back(estimator, dtype, rng):
    model, (x, y) = mlp(dtype), batch()
    with torch.no_grad():
        next(model.parameters()).view(-1)[:4] = torch.tensor([-0.0, 0.0, 1.0, float(torch.finfo(dtype).tiny)])
    theta, moved = weights(model), []
    eps = 1e-3

    def closure():
        now = weights(model)
        differs = [(n, i.item()) for n, (p, q) in enumerate(zip(now, theta, strict=True))
                   for i in (p != q).flatten().nonzero()]  # fmt: skip
        assert all(
            abs(now[n].view(-1)[i].double() - theta[n].view(-1)[i].double()) >= eps for n, i in differs
        )
        moved.append(differs)
        return loss_of(model, x, y)

    ZOCGE(model.parameters(), lr=0.0, eps=eps, estimator=estimator).step(closure)
    assert same_bits(weights(model), theta)
    every = [[(n, i)] for n, p in enumerate(theta) for i in range(p.numel())]
    assert moved == ([[], *every] if estimator == "one-sided" else [e for e in every for _ in "+-"])


@pytest.mark.parametrize("at", [0, 1, 40])
def test_an_exception_brings_the_weight_back(at, rng):
    model, (x, y), calls = mlp(torch.bfloat16), batch(), itertools.count()
    theta, seen = weights(model), []

    def closure():
        seen.append(same_bits(weights(model), theta))
        if next(calls) == at:
            raise KeyboardInterrupt
        return loss_of(model, x, y)

    opt = ZOCGE(model.parameters(), lr=0.1)
    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert same_bits(weights(model), theta)
    assert seen == [True, *[False] * at]
    assert opt.step_count == 0


def changed(model, before):
    return {
        n: (p.detach() != before[n]).flatten().nonzero().flatten().tolist()
        for n, p in model.named_parameters()
    }


def test_masks_and_indices(rng):
    model, (x, y) = mlp(), batch()
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    (a, n), (b, m), (c, _), (d, _) = sizes.items()
    keep = torch.tensor([rng.random() < 0.3 for _ in range(n)])
    keep[rng.randrange(n)] = True
    index = torch.tensor(rng.sample(range(m), 3))
    masks = {
        a: keep.view_as(model[0].weight),
        b: index,
        c: torch.zeros_like(model[3].weight, dtype=torch.bool),
    }
    before = {k: v.clone() for k, v in model.state_dict().items()}
    opt = ZOCGE(model.named_parameters(), lr=0.5, weight_decay=0.1, mask=GivenMask(masks))
    opt.step(lambda: loss_of(model, x, y))
    got = changed(model, before)
    assert got[a] == keep.nonzero().flatten().tolist()
    assert got[b] == sorted(index.tolist())
    assert got[c] == []
    assert len(got[d]) == sizes[d]
    assert len(opt.last_projected_gradient) == sum(map(len, got.values()))


def test_small_weights(rng):
    model, (x, y) = mlp(), batch()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    opt = ZOCGE(model.named_parameters(), lr=0.5, mask=MagnitudeMask(0.25))
    for _ in range(2):
        opt.step(lambda: loss_of(model, x, y))
    for name, places in changed(model, before).items():
        size = before[name].flatten().abs()
        assert (
            places == (size <= size.kthvalue(round(0.25 * size.numel())).values).nonzero().flatten().tolist()
        )


def sloping(model):
    """A loss (float64) that depends on every coordinate, with a slope of its own for each."""
    return sum((p.double().flatten() * torch.linspace(0.1, 1, p.numel())).sum() for p in model.parameters())


def test_random_coordinates(rng):
    model, seed = mlp(), rng.getrandbits(64)
    opt = ZOCGE(model.named_parameters(), lr=0.5, per_step=11, seed=seed)
    sets = []
    for _ in range(3):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        opt.step(lambda: sloping(model))
        sets.append(changed(model, before))
        assert sum(map(len, sets[-1].values())) == 11
    assert sets[0] != sets[1] != sets[2]
    again = ZOCGE(mlp().named_parameters(), lr=0.5, per_step=11, seed=seed)
    other = again.param_groups[0]["params"]
    theta = weights(nn.ParameterList(other))
    again.step(lambda: sloping(nn.ParameterList(other)))
    assert [len((p != q).nonzero()) for p, q in zip(other, theta, strict=True)] == [
        *map(len, sets[0].values())
    ]


def test_shares_of_layers(rng):
    model = mlp()
    shares = {"0.weight": 0.25, "3.weight": 0.5, "0.bias": 1e-9}
    opt = ZOCGE(model.named_parameters(), lr=0.5, per_step=shares, seed=rng.getrandbits(64))
    sets = []
    for _ in range(2):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        opt.step(lambda: sloping(model))
        sets.append(changed(model, before))
        assert {n: len(i) for n, i in sets[-1].items()} == {
            "0.weight": 14,
            "0.bias": 0,
            "3.weight": 14,
            "3.bias": 3,
        }
    assert sets[0]["0.weight"] != sets[1]["0.weight"]


def test_samples_are_uniform(rng):
    """In 2000 draws each of the 20 subsets of three of six comes about 100 times.

    Chi squared lies below its 1e-9 quantile for 19 degrees of freedom.
    """
    counts = {}
    for _ in range(2000):
        found = sample(rng.getrandbits(64), 3, 3, 6)
        assert found == sorted(set(found))
        counts[tuple(found)] = counts.get(tuple(found), 0) + 1
    assert len(counts) == 20
    assert sum((n - 100) ** 2 / 100 for n in counts.values()) < 88
    assert sample(5, 0, 6, 6) == [0, 1, 2, 3, 4, 5]


def test_groups_dtypes_and_subsets(rng):
    torch.manual_seed(rng.getrandbits(32))
    a, b = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3, 2).bfloat16())
    frozen = nn.Parameter(torch.randn(2), requires_grad=False)
    before = [p.detach().clone() for p in (a, b, frozen)]
    opt = ZOCGE(
        [{"params": [("layers.0.a", a), ("f", frozen)]}, {"params": [("layers.1.b", b)], "lr": 0.5}], lr=0.0
    )
    opt.step(lambda: a.sum() + b.float().square().sum())
    assert same_bits([a.detach(), frozen.detach()], [before[0], before[2]])
    assert not torch.equal(b, before[1])
    opt = ZOCGE([("layers.0.a", a), ("layers.1.b", b)], lr=0.5, subset=Blocks())
    before = [p.detach().clone() for p in (a, b)]
    opt.step(lambda: a.sum() + b.float().square().sum())
    assert not torch.equal(a, before[0])
    assert torch.equal(b, before[1])


def test_losses_that_are_not_finite(rng):
    model, (x, y), calls = mlp(), batch(), itertools.count()
    with torch.no_grad():
        model[0].bias[:2] = torch.tensor([-0.0, 0.0])
    theta = weights(model)
    opt = ZOCGE(model.parameters(), lr=0.1, weight_decay=0.1, clip=0.1)
    with pytest.warns(UserWarning, match="loss not finite"):
        opt.step(lambda: loss_of(model, x, y) * (float("nan") if next(calls) == 7 else 1))
    assert same_bits(weights(model), theta)
    assert (opt.step_count, int(opt.skipped_steps)) == (1, 1)


def test_one_rng_state_for_all_forwards(rng):
    p, seen = nn.Parameter(torch.randn(3)), []
    ZOCGE([p], lr=0.1).step(lambda: seen.append(torch.rand(2)) or p.sum())
    assert len(seen) == 4
    assert all(torch.equal(s, seen[0]) for s in seen)


def test_autocast_sees_each_move(rng):
    """Autocast keeps casts of weights where gradients are on; a kept one would hide the move.

    Everything is positive, so that each move makes the loss larger, by more than bf16 rounds away.
    """
    layer, x = nn.Linear(4, 3), 0.5 + torch.rand(2, 4)
    with torch.no_grad():
        for p in layer.parameters():
            p.abs_()
    opt = ZOCGE(layer.parameters(), lr=0.1, eps=0.5)
    with torch.autocast("cpu", torch.bfloat16):

        def closure():
            with torch.enable_grad():
                return layer(x).float().square().sum()

        opt.step(closure)
    assert (opt.last_projected_gradient > 0).all()


@pytest.mark.parametrize("per_step", [None, 7, {"0.weight": 0.3}])
def test_a_saved_run_goes_on(per_step, rng):
    a, seed, (x, y) = mlp(), rng.getrandbits(64), batch()
    make = lambda m, seed: ZOCGE(m.named_parameters(), lr=0.5, per_step=per_step, seed=seed)
    run = lambda opt, m: [opt.step(lambda: loss_of(m, x, y)) for _ in range(2)]
    first = make(a, seed)
    run(first, a)
    b = copy.deepcopy(a)
    second = make(b, 0)
    second.load_state_dict(first.state_dict())
    (c, third) = copy.deepcopy((a, first))
    losses = run(first, a)
    for model, opt in ((b, second), (c, third)):
        assert_same_bits(torch.stack(run(opt, model)), torch.stack(losses))
        assert same_bits(weights(model), weights(a))


@ESTIMATOR
def test_training_on_digits(estimator, rng):
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(x[:256] / 16).float(), torch.tensor(y[:256])
    torch.manual_seed(rng.getrandbits(32))
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    loss = lambda: F.cross_entropy(model(x), y)
    before = loss().item()
    opt = ZOCGE(model.named_parameters(), lr=2.0, estimator=estimator, per_step=200, seed=rng.getrandbits(64))
    for _ in range(25):
        opt.step(loss)
    assert loss().item() < 0.75 * before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"estimator": "three-sided"},
            "ZOCGE: estimator: expected 'two-sided' or 'one-sided', got 'three-sided'",
        ),
        ({"mask": RandomMask()}, "ZOCGE: mask: expected a GivenMask or a MagnitudeMask"),
        ({"per_step": 0}, "ZOCGE: per_step: expected an integer >= 1, or shares by parameter name, got 0"),
        ({"per_step": {"p": 0.0}}, r"ZOCGE: per_step\['p'\]: expected a share in \(0, 1\], got 0.0"),
        ({"per_step": {"q": 0.5}}, "ZOCGE: per_step: expected names of the optimizer's parameters, got 'q'"),
        ({"eps": 0.0}, "ZOCGE: eps: expected a finite number > 0"),
    ],
)
def test_arguments(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ZOCGE([("p", nn.Parameter(torch.ones(3)))], lr=0.1, **options)


def test_no_log():
    opt = ZOCGE([nn.Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(ValueError, match="trajectory: optimizer: expected steps along directions, got ZOCGE"):
        record(opt, "never-written")


def test_sets_without_coordinates():
    p = nn.Parameter(torch.ones(3))
    for options, message in (
        ({"per_step": 4}, "ZOCGE: per_step: expected at most 3 coordinates, got 4"),
        (
            {"per_step": {"p": 0.01}},
            "ZOCGE: mask, per_step: expected at least one coordinate in a step, got none",
        ),
        (
            {"mask": GivenMask({"p": torch.zeros(3, dtype=torch.bool)})},
            "ZOCGE: mask, per_step: expected at least one",
        ),
    ):
        opt = ZOCGE([("p", p)], lr=0.1, **options)
        with pytest.raises(ValueError, match=message):
            opt.step(lambda: p.sum())


@ESTIMATOR
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_momentum_and_coupled_decay_are_torchs_sgd_on_all_weights(estimator, dtype, rng):
    """DeepZero: a sparse gradient, SGD with momentum 0.9 and weight decay 5e-4 over every weight."""
    seed, model = rng.getrandbits(60), mlp(dtype)
    start = [p.detach().double() for p in model.parameters()]
    theirs = [nn.Parameter(t.clone()) for t in start]
    torchs = torch.optim.SGD(theirs, 0.3, momentum=0.9, weight_decay=0.05)
    opt = ZOCGE(
        model.named_parameters(), 0.3, 2.0**-6, seed=seed, per_step=20, interval=2, momentum=0.9, l2=0.05,
        estimator=estimator, rounding="nearest",
    )  # fmt: skip
    x, y = batch()
    moved = []
    for _ in range(4):
        opt.step(lambda: loss_of(model, x, y))
        moved.append([e for e in chosen_of(opt)])
        for p, g in zip(theirs, moved[-1], strict=True):
            p.grad = g
        torchs.step()
    where = [[g.nonzero().tolist() for g in of_step] for of_step in moved]
    assert where[0] == where[1] != where[2] == where[3]
    still = [
        all(not g.flatten()[i] for of_step in moved for g in of_step[:1]) for i in range(theirs[0].numel())
    ]
    assert any(still)  # a weight that no step measured, and yet decays
    rounding = 1e-6 if dtype is torch.float32 else 2.0**-8
    for p, want in zip(model.parameters(), theirs, strict=True):
        torch.testing.assert_close(p.detach().double(), want.detach(), rtol=0, atol=rounding)
    assert max((a.detach() - b).abs().max() for a, b in zip(theirs, start, strict=True)) > 5 * rounding


def chosen_of(opt):
    """The g of a step as a dense gradient of each parameter, from its record and the coordinates' seed."""
    params = [p for group in opt.param_groups for p in group["params"]]
    dense = torch.zeros(sum(p.numel() for p in params), dtype=torch.float64)
    seed = zk.contract.derive_seed_int(opt.seed, (opt.step_count - 1) // 2, 0xC0000000)
    dense[sample(seed, 0, 20, len(dense))] = opt.last_projected_gradient.double()
    return [part.view_as(p) for part, p in zip(dense.split([p.numel() for p in params]), params, strict=True)]


def test_a_skipped_step_with_momentum_changes_nothing():
    model = mlp()
    opt = ZOCGE(model.named_parameters(), 0.1, per_step=3, momentum=0.9, l2=0.1, weight_decay=0.1)
    x, y = batch()
    opt.step(lambda: loss_of(model, x, y))
    before, states = weights(model), [opt.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    assert any(s.abs().max() > 0 for s in states)
    with pytest.warns(UserWarning, match="skipped"):
        opt.step(lambda: loss_of(model, x, y) * float("nan"))
    assert same_bits(weights(model), before)
    assert same_bits([opt.state[p]["momentum_buffer"] for p in model.parameters()], states)


def test_momentum_resumes(rng):
    x, y = batch()

    def run(model, opt, steps):
        for _ in range(steps):
            opt.step(lambda: loss_of(model, x, y))

    make = lambda model: ZOCGE(
        model.named_parameters(), 0.1, per_step=9, interval=3, momentum=0.9, l2=0.01, seed=5
    )
    whole = mlp(torch.bfloat16)
    run(whole, make(whole), 5)
    half = mlp(torch.bfloat16)
    opt = make(half)
    run(half, opt, 2)
    rest = copy.deepcopy(half)
    again = make(rest)
    again.load_state_dict(opt.state_dict())
    run(rest, again, 3)
    assert same_bits(weights(rest), weights(whole))


def test_shares_by_zo_grasp(rng):
    """|theta H g| of gradients along directions of length 1 in each matrix, in float64."""
    q, step, seed, density = 5, 0.05, rng.getrandbits(62), 0.3
    shapes = {"a.weight": (4, 5), "b.weight": (3, 6), "b.bias": (6,)}
    params = {n: nn.Parameter(torch.tensor([rng.gauss(0, 1) for _ in range(math.prod(s))]).view(s))
              for n, s in shapes.items()}  # fmt: skip
    curvature = {"a.weight": 3.0, "b.weight": 0.5, "b.bias": 1.0}

    def loss(at):
        return sum(
            c * (at[n].double() ** 2).sum() + torch.sin(2 * at[n].double()).sum()
            for n, c in curvature.items()
        )

    before = [p.detach().clone() for p in params.values()]
    found = grasp_shares(params.items(), lambda: loss(params), density, queries=q, step=step, seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(before, params.values(), strict=True))
    theta = {n: p.detach().double() for n, p in params.items()}

    def gradient(at, round_):
        g = {n: torch.zeros_like(at[n]) for n in found}
        for k in range(q):
            s = derive_seed_int(seed, round_, k)
            z = {n: zk.noise(at[n].shape, seed=s, stream=zk.stream_of(n)).double() for n in found}
            z = {n: v / v.norm() for n, v in z.items()}
            moved = at | {n: at[n] + step * z[n] for n in found}
            for n in found:
                g[n] += (loss(moved) - loss(at)) * z[n] / q
        return g

    first = gradient(theta, 0)
    second = gradient(theta | {n: theta[n] + step * first[n] for n in found}, 1)
    scores = {n: (theta[n] * (second[n] - first[n])).abs() for n in found}
    every = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values
    bound = every[round(density * len(every)) - 1]
    want = {n: max(1, (s >= bound).sum().item()) / s.numel() for n, s in scores.items()}
    # Scores that are nearly the bound may change sides.
    assert all(abs(found[n] - want[n]) <= 1 / theta[n].numel() + 1e-9 for n in want)
    opt = ZOCGE(params.items(), 0.01, per_step=found, seed=1)
    opt.step(lambda: loss(params))
    with pytest.raises(ValueError, match="density: expected a number in"):
        grasp_shares(params.items(), lambda: 0.0, 1.5)


# --- feature reuse ---


class Counted(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def stack(rng, *between):
    torch.manual_seed(rng.getrandbits(32))
    sizes = (5, 4, 6, 3)
    layers = [Counted(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*(m for layer in layers for m in (layer, *between, nn.Tanh())), nn.Linear(3, 2))


@ESTIMATOR
def test_reused_features_change_no_bit(estimator, rng):
    model, x, seed = stack(rng), torch.randn(7, 5), rng.getrandbits(60)
    whole = copy.deepcopy(model)

    def run(m, steps=3, **options):
        opt = ZOCGE(m.named_parameters(), 0.3, seed=seed, per_step=20, estimator=estimator, **options)
        for step in range(steps):
            opt.step(lambda: m(x + step).square().mean())  # noqa: B023
        return opt.last_losses

    layers = [m for m in model if isinstance(m, nn.Linear)]
    losses = run(model, reuse=layers)
    assert same_bits(losses, run(whole))
    assert same_bits(weights(model), weights(whole))
    forwards = 3 * (21 if estimator == "one-sided" else 40)
    calls, before = ([m.calls for m in net if isinstance(m, Counted)] for net in (model, whole))
    assert before == [forwards] * 3
    assert calls[0] < calls[1] < calls[2] < forwards
    assert all("forward" not in m.__dict__ for m in layers)
    again = copy.deepcopy(ZOCGE(model.named_parameters(), 0.1, reuse=layers))
    assert again._features is None


def test_a_weight_outside_of_the_modules_is_moved_in_whole_forwards(rng):
    model, x = stack(rng), torch.randn(7, 5)
    whole = copy.deepcopy(model)
    for m, options in (
        (model, {"reuse": [model[2], model[4]]}),
        (whole, {}),
    ):  # the first and last are not there
        ZOCGE(m.named_parameters(), 0.3, **options).step(lambda: m(x).square().mean())  # noqa: B023
    assert same_bits(weights(model), weights(whole))
    assert model[2].calls < whole[2].calls


BAD_REUSE = {
    "order": (lambda m: [m[2], m[0]], (), "modules in the order .*, each once, got reuse\\[0\\] after"),
    "inside": (lambda m: [m, m[0]], (), "modules of which none is in another, got reuse\\[1\\], which is"),
    "random": (lambda m: [m[0], m[3]], (nn.Dropout(0.5),), "a forward without random numbers"),
    "in place": (lambda m: [m[0], m[3]], (nn.ReLU(inplace=True),), "outputs that no later module changes"),
    "module": (lambda m: ["0"], (), "a module, got '0'"),
}


@pytest.mark.parametrize("bad", BAD_REUSE)
def test_features_that_cannot_be_reused(bad, rng):
    modules, between, message = BAD_REUSE[bad]
    model, x = stack(rng, *between), torch.randn(7, 5)
    before = weights(model)
    with pytest.raises((ValueError, TypeError), match=f"ZOCGE: reuse.*: expected {message}"):
        ZOCGE(model.named_parameters(), 0.3, reuse=modules(model)).step(lambda: model(x).square().mean())
    assert same_bits(weights(model), before)
    assert all("forward" not in m.__dict__ for m in model)
