# ruff: noqa: B023  closures of a loop run inside it
"""ZOSGD: the step against a plain PyTorch one that materialises z; groups, names, streams, tied
parameters.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zosgd_cases import BOTH, DTYPES, batch, combined, loss_of, mlp, same_bits, weights

import zokernels as zk
from zokernels.optim import ZOSGD


def plain_step(model, loss, step, *, seed, lr, eps, weight_decay, dist, rounding, restore):
    """Takes one step in ordinary PyTorch and returns the losses (l+, l-)."""
    s = zk.contract.seed_to_int64(zk.derive_seed(seed, step, 0))
    params = {n: p.detach() for n, p in model.named_parameters()}
    z = {n: zk.noise(p.shape, seed=s, stream=zk.stream_of(n), dist=dist) for n, p in params.items()}
    moved = lambda values, c: {n: combined(p, z[n], c) for n, p in values.items()}
    up = moved(params, eps)
    down = moved(params, -eps) if restore == "exact" else moved(up, -2 * eps)
    plus, minus = (loss(lambda x, w=w: torch.func.functional_call(model, w, (x,))) for w in (up, down))
    g = ((plus.double() - minus.double()) / (2 * eps)).float().item()
    decay = 1 - lr * weight_decay
    theta, c = (params, -lr * g) if restore == "exact" else (down, decay * eps - lr * g)
    for name, p in model.named_parameters():
        p.data.copy_(
            combined(
                theta[name],
                z[name],
                c,
                decay=decay if weight_decay else None,
                stochastic_seed=s if rounding == "stochastic" else None,
                stream=zk.stream_of(name),
            )
        )
    return plus, minus


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dist", "rounding", "weight_decay"), [("normal", "stochastic", 0.1), ("rademacher", "nearest", 0.0)]
)
def test_step_equals_plain_pytorch(dtype, dist, rounding, weight_decay, restore):
    options = dict(lr=0.03, eps=1e-2, weight_decay=weight_decay, seed=2**64 - 5, dist=dist, rounding=rounding)
    ours, plain = mlp(dtype), mlp(dtype)
    x, y = batch()
    opt = ZOSGD(ours.named_parameters(), restore=restore, **options)
    before = weights(ours)
    for step in range(3):
        loss = opt.step(lambda: loss_of(ours, x, y))
        with torch.no_grad():
            plus, minus = plain_step(
                plain, lambda f: F.cross_entropy(f(x.to(dtype)).float(), y), step, restore=restore, **options
            )
        assert torch.equal(opt.last_losses[0], plus)
        assert torch.equal(opt.last_losses[1], minus)
        assert torch.equal(loss, (plus + minus) / 2)
        assert plus != minus
        assert torch.equal(opt.last_projected_gradient, ((plus.double() - minus.double()) / 2e-2).float())
        assert same_bits(weights(ours), weights(plain))
    assert not any(torch.equal(p, q) for p, q in zip(weights(ours), before, strict=True))


@BOTH
def test_training_lowers_the_loss(restore):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    x = torch.randn(128, 4)
    y = (x.sum(1) > 0).long()
    opt = ZOSGD(model.named_parameters(), lr=0.2, restore=restore)
    losses = [opt.step(lambda: F.cross_entropy(model(x), y)).item() for _ in range(80)]
    assert losses[-1] < 0.5 * losses[0]
    assert int(opt.skipped_steps) == 0
    assert opt.step_count == 80


def test_small_bf16_updates_survive_stochastic_rounding():
    """An update of a thousandth of a ulp is lost by rounding to nearest, and kept on average by
    stochastic rounding.
    """
    moved = {}
    for rounding in ("nearest", "stochastic"):
        p = nn.Parameter(torch.ones(1 << 14, dtype=torch.bfloat16))
        opt = ZOSGD([p], lr=1e-5, eps=1e-2, dist="rademacher", rounding=rounding)
        # g = 0.5, so that the update is 5e-6 z; a ulp of 1.0 is 2^-7 above and 2^-8 below
        answers = iter((0.01, 0.0))
        opt.step(lambda: p.float().sum() * 0 + next(answers))
        z = zk.noise(p.shape, seed=zk.derive_seed(0, 0, 0), stream=0, dist="rademacher")
        moved[rounding] = (p.detach().double() - 1) @ z.double() / p.numel() / -5e-6
    assert moved["nearest"] == 0
    # variance of an element's move is below 5e-6 * 2^-7; six standard deviations of the mean
    assert abs(moved["stochastic"] - 1) < 6 * (5e-6 * 2**-7 / (1 << 14)) ** 0.5 / 5e-6


def test_gradient_of_a_quadratic_is_exact():
    """For L = a .

    theta g must be a . z, whatever eps is.  A loss that is a Python number is taken in float64.
    """
    p = nn.Parameter(torch.zeros(50))
    a = torch.linspace(-1, 1, 50)
    z = zk.noise(50, seed=zk.derive_seed(3, 0, 0), stream=0)
    opt = ZOSGD([p], lr=0.0, eps=0.5, seed=3)
    opt.step(lambda: float((p.double() * a).sum()))
    assert opt.last_losses[0].dtype is torch.float64
    assert opt.last_projected_gradient.item() == pytest.approx((a.double() @ z.double()).item(), rel=1e-6)


def test_seed_zero_is_a_seed():
    runs = {}
    for seed in (0, 1, 2**32, -(2**63)):
        model = mlp()
        ZOSGD(model.named_parameters(), lr=0.1, seed=seed).step(lambda: model(batch()[0]).square().mean())
        runs[seed] = torch.cat([w.flatten() for w in weights(model)])
    again = mlp()
    ZOSGD(again.named_parameters(), lr=0.1, seed=0).step(lambda: again(batch()[0]).square().mean())
    assert torch.equal(torch.cat([w.flatten() for w in weights(again)]), runs[0])
    assert len({tuple(r.tolist()) for r in runs.values()}) == 4
    with pytest.raises(TypeError, match="ZOSGD: seed: expected an integer, got None"):
        ZOSGD(mlp().parameters(), lr=0.1, seed=None)


def test_tensors_of_one_shape_get_their_own_noise():
    a, b = nn.Parameter(torch.zeros(40)), nn.Parameter(torch.zeros(40))
    opt = ZOSGD([a, b], lr=1.0)
    opt.step(lambda: (a + 2 * b).sum())
    assert opt.param_groups[0]["streams"] == [0, 1]
    assert not torch.equal(a, b)
    assert not torch.equal(a * 2, b)
    before = a.detach().clone()
    opt.step(lambda: (a + 2 * b).sum())
    assert not torch.allclose(a - before, before)  # and each step its own


# --- groups ---


def test_groups_have_their_own_hyperparameters():
    """Each group moves along a z of its own dist by -lr g, where g is divided by its own eps."""
    a, b = nn.Parameter(torch.zeros(20)), nn.Parameter(torch.ones(20))
    groups = [
        {"params": [("a", a)], "lr": 0.5},
        {"params": [("b", b)], "dist": "rademacher", "eps": 0.01, "weight_decay": 1.0, "rounding": "nearest"},
        {"params": []},  # as on another stage of a pipeline: it counts as named
    ]
    opt = ZOSGD(groups, lr=0.1)
    opt.step(lambda: (a.sum() - b.sum()).square())
    seed = zk.derive_seed(0, 0, 0)
    za = zk.noise(20, seed=seed, stream=zk.stream_of("a"))
    zb = zk.noise(20, seed=seed, stream=zk.stream_of("b"), dist="rademacher")
    g = opt.last_projected_gradient.double()
    difference = (opt.last_losses[0].double() - opt.last_losses[1].double()).item()
    gb = torch.tensor(difference / 0.02).float().item()
    assert torch.equal(a, combined(torch.zeros(20), za, -0.5 * g.item()))
    assert torch.equal(b, combined(torch.ones(20), zb, -0.1 * gb, decay=0.9))
    assert g.item() == pytest.approx(difference / 0.002)


def test_names_give_streams_across_groups_and_wrappers():
    model = mlp()
    named = list(model.named_parameters())
    whole = ZOSGD(named, lr=0.1)
    split = ZOSGD(
        [{"params": named[:1]}, {"params": [("module._orig_mod." + n, p) for n, p in named[1:]]}], lr=0.1
    )
    streams = [zk.stream_of(n) for n, _ in named]
    assert whole.param_groups[0]["streams"] == streams
    assert [s for g in split.param_groups for s in g["streams"]] == streams
    assert [g["streams"] for g in ZOSGD([{"params": [p]} for _, p in named], lr=0.1).param_groups] == [
        [0],
        [1],
        [2],
        [3],
    ]


def test_stream_collisions_name_both_parameters():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"'w'.*'module.w'"):
        ZOSGD([("w", a), ("module.w", b)], lr=0.1)
    with pytest.raises(ValueError, match=r"'w' of group 0.*'module.w' of group 1"):
        ZOSGD([{"params": [("w", a)]}, {"params": [("module.w", b)]}], lr=0.1)
    opt = ZOSGD([{"params": [("w", a)]}], lr=0.1)
    with pytest.raises(ValueError, match="7 for both"):
        ZOSGD([{"params": [a, b], "streams": [7, 7]}], lr=0.1)
    with pytest.raises(ValueError, match="of group 1"):
        opt.add_param_group({"params": [("module.w", b)]})
    assert len(opt.param_groups) == 1  # a refused group leaves no trace
    opt.add_param_group({"params": [("module.w", b)], "streams": [9]})
    assert opt.param_groups[1]["streams"] == [9]


def test_added_group_is_trained():
    a, b = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))
    opt = ZOSGD([a], lr=0.1)
    opt.step(lambda: (a + b).sum())
    assert torch.equal(b, torch.zeros(8))
    opt.add_param_group({"params": [b], "lr": 1.0})
    opt.step(lambda: (a + b).sum())
    assert opt.param_groups[1]["streams"] == [1]
    assert b.abs().min() > 0


@BOTH
def test_tied_parameters_are_one(restore):
    """A tied weight is listed once, under its first name, and both of its uses see one perturbation."""
    emb, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = emb.weight
    model = nn.ModuleDict({"emb": emb, "head": head})
    opt = ZOSGD(model.named_parameters(), lr=0.1, restore=restore)
    assert opt.param_groups[0]["param_names"] == ["emb.weight"]
    theta, seen = emb.weight.detach().clone(), []

    def closure():
        seen.append((emb(torch.arange(7)), head(torch.eye(4)).t().clone()))
        return seen[-1][1].square().sum()

    opt.step(closure)
    z = zk.noise((7, 4), seed=zk.derive_seed(0, 0, 0), stream=zk.stream_of("emb.weight"))
    up = combined(theta, z, 1e-3)
    down = combined(theta, z, -1e-3) if restore == "exact" else combined(up, z, -2e-3)
    for (a, b), expected in zip(seen, (up, down), strict=True):
        assert torch.equal(a, expected)
        assert torch.equal(b, expected)


def test_duplicates_and_shared_memory_are_refused():
    p = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="params: expected each parameter once"):
        ZOSGD([p, p], lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        ZOSGD([{"params": [p]}, {"params": [p]}], lr=0.1)
    twin = nn.Parameter(p.data)  # two parameters over one memory would get two different z
    opt = ZOSGD([{"params": [p]}, {"params": [twin]}], lr=0.1)
    with pytest.raises(ValueError, match="share no memory"):
        opt.step(lambda: pytest.fail("the closure must not run"))


def test_frozen_parameters_are_left_alone():
    model = mlp()
    model[0].weight.requires_grad_(False)
    counter = torch.zeros(3, dtype=torch.int64)  # of a dtype that could not be trained
    opt = ZOSGD([*model.named_parameters(), ("counter", counter)], lr=0.1)
    before, frozen_seen = weights(model), []

    def closure():
        frozen_seen.append(model[0].weight.clone())
        return loss_of(model, *batch())

    opt.step(closure)
    after = weights(model)
    assert torch.equal(after[0], before[0])
    assert all(torch.equal(f, before[0]) for f in frozen_seen)
    assert not any(torch.equal(a, b) for a, b in zip(after[1:], before[1:], strict=True))
    model[0].weight.requires_grad_(True)
    opt.step(closure)
    assert not torch.equal(model[0].weight, before[0])
    with pytest.raises(
        ValueError,
        match=r"at least one parameter with requires_grad=True .* got 1 frozen ones \(peft .* is_trainable",
    ):
        ZOSGD([counter], lr=0.1).step(lambda: 0.0)


@BOTH
def test_mixed_dtypes_and_scalars(restore):
    kinds = [((3, 2), torch.float32), ((5,), torch.bfloat16), ((), torch.float16), ((0, 4), torch.float32)]
    params = [
        nn.Parameter(torch.ones(shape, dtype=dtype)) for shape, dtype in [*kinds, ((4,), torch.float32)]
    ]
    opt = ZOSGD(params, lr=0.1, restore=restore)
    opt.step(lambda: sum(p.float().sum() for p in params))
    seed = zk.derive_seed(0, 0, 0)
    for i, p in enumerate(params):
        if p.numel() and restore == "exact":
            expected = torch.ones_like(p)
            c = (opt.last_projected_gradient.double() * -0.1).float()
            zk.combine_(expected.detach(), seed, c, streams=i, rounding="stochastic", rounding_seed=seed)
            assert torch.equal(p, expected)
        assert p.numel() == 0 or not torch.equal(p, torch.ones_like(p))
