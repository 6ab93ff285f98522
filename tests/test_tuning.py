"""``find_lr`` and ``diagnose``: what they measure, and that nothing of it stays."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zokernels.optim import (
    ES,
    FZOO,
    ZOSGD,
    ConMeZO,
    HiZOO,
    MagnitudeMask,
    MeZOGV,
    ZOAdamW,
    ZORankSearch,
    find_lr,
)


@pytest.fixture
def task(rng):
    """A layer with a BatchNorm and dropout, a batch of it, and a closure."""
    torch.manual_seed(rng.getrandbits(60))
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    return model, lambda rows=slice(None): F.cross_entropy(model(x[rows]), y[rows])


def everything(model, optimizer):
    """Weights, buffers, states and random numbers, as bits."""
    tensors = [*model.parameters(), *model.buffers(), torch.get_rng_state()]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    numbers = [optimizer.step_count, int(optimizer.skipped_steps), str(optimizer.state_dict()["zo"])]
    numbers += [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return [t.detach().clone().reshape(-1).view(torch.uint8) for t in tensors], copy.deepcopy(numbers)


def assert_same(one, other):
    assert len(one[0]) == len(other[0])
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    assert one[1] == other[1]


MADE = {
    "sgd": lambda named: ZOSGD(named, 1e-2),
    "in place, bf16": lambda named: ZOSGD(named, 1e-2, restore="inplace", directions=2),
    "momentum": lambda named: ZOSGD(named, 1e-2, momentum=0.9),
    "adam": lambda named: ZOAdamW(named, 1e-3),
    "mask": lambda named: ZOSGD(named, 1e-2, direction=MagnitudeMask(0.5)),
    "hizoo": lambda named: HiZOO(named, 1e-3),
    "cone": lambda named: ConMeZO(named, 1e-3),
    "search": lambda named: ZORankSearch(named, 1e-2, candidates=3, trials=2, rounds=1),
    "guided": lambda named: MeZOGV(named, 1e-2),
}


@pytest.mark.parametrize("made", MADE)
def test_nothing_stays(made, task):
    """After both, a run goes on as if they had not been: bit for bit, in the middle of a training."""
    model, closure = task
    if made.endswith("bf16"):
        model = model.bfloat16()
        x, y = torch.randn(16, 6).bfloat16(), torch.randint(3, (16,))
        closure = lambda: F.cross_entropy(model(x).float(), y)
    twin = copy.deepcopy(model)
    optimizer = MADE[made](model.named_parameters())
    for _ in range(2):
        optimizer.step(closure)
    before = everything(model, optimizer)
    sweep = find_lr(optimizer, closure, [1e-3, 1e-1], steps=2, model=model)
    assert_same(everything(model, optimizer), before)
    assert sweep.lrs == [1e-3, 1e-1]
    assert sweep.losses[0] != sweep.losses[1]
    optimizer.diagnose(closure, directions=2, model=model)
    assert_same(everything(model, optimizer), before)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_the_loss_of_a_run_is_that_of_the_run(task):
    """Each point of the curve, against the same steps taken by hand."""
    model, closure = task
    model.eval()  # no buffers, no dropout
    named = lambda m: list(m.named_parameters())
    optimizer = FZOO(named(model), 1e-2, seed=3)
    rows = [torch.arange(i, 16, 3) for i in range(3)]
    sweep = find_lr(optimizer, closure, [3e-3, 0.1], steps=4, batches=rows)
    start = copy.deepcopy(model.state_dict())
    mean = lambda: sum(float(closure(r)) for r in rows) / len(rows)
    with torch.no_grad():
        assert sweep.before == mean()
    for lr, loss in zip(sweep.lrs, sweep.losses, strict=True):
        model.load_state_dict(start)
        own = FZOO(named(model), lr, seed=3)
        for i in range(4):
            own.step(lambda i=i: closure(rows[i % 3]))
        with torch.no_grad():
            assert loss == mean()
    assert sweep.lr == min(zip(sweep.losses, sweep.lrs, strict=True))[1]
    assert sweep.forwards == 4 * 9


def test_groups_keep_their_ratio():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = ZOSGD([{"params": [a]}, {"params": [b], "lr": 0.0}], 0.1)
    seen = []

    def closure():
        seen.append(b.detach().clone())
        return (a * b).square().sum()

    find_lr(optimizer, closure, [1e-2, 1.0], steps=2)
    assert all(torch.equal(value, torch.ones(3)) for value in seen[:3])
    assert torch.equal(b, torch.ones(3))
    assert optimizer.param_groups[0]["lr"] == 0.1


def bowl(scale=1.0):
    """scale / 2 |w|^2 of 50 weights at 1: an lr of about 2 / (scale 52) is where SPSA diverges on average."""
    w = nn.Parameter(torch.ones(50))
    return w, lambda: 0.5 * scale * w.square().sum()


@pytest.mark.parametrize("first", [1e-6, 1.0])
def test_the_search_walks_until_both_sides_are_worse(first):
    w, closure = bowl()
    sweep = find_lr(ZOSGD([("w", w)], first), closure, steps=30)
    assert sweep.lr is not None
    assert not sweep.at_edge
    assert 1e-3 < sweep.lr < 0.2
    best = sweep.lrs.index(sweep.lr)
    assert sweep.losses[best] < min(sweep.losses[best - 1], sweep.losses[best + 1], sweep.before)
    assert all(math.isclose(b / a, math.sqrt(10), rel_tol=0.01) for a, b in zip(sweep.lrs, sweep.lrs[1:]))  # noqa: B905
    assert torch.equal(w, torch.ones(50))


def test_the_curve_is_drawn():
    w, closure = bowl()
    sweep = find_lr(ZOSGD([("w", w)], 1e-2), closure, [1e-4, 1e-2, 10.0], steps=10)
    assert sweep.losses[-1] == math.inf
    lines = str(sweep).splitlines()
    assert len(lines) == 4
    assert "<- best" in lines[2]
    assert "diverged" in lines[3]
    assert lines[1].count("#") > lines[2].count("#")
    worse = find_lr(ZOSGD([("w", w)], 1e-2), closure, [10.0, 100.0], steps=5)
    assert worse.lr is None
    assert "all are too large: try smaller ones (lrs=)" in str(worse)
    still = find_lr(ZOSGD([("w", w)], 1e-2), lambda: (0 * w).sum() + 1, [1e-3, 1e-2], steps=2)
    assert still.lr is None
    assert "optimizer.diagnose" in str(still)


def test_rewards_are_to_grow():
    w, closure = bowl()
    optimizer = ES([("w", w)], 1e-2, 1e-2, population=8)
    sweep = find_lr(optimizer, lambda: -closure(), [1e-3, 1e-1], steps=20)
    assert sweep.maximize
    assert sweep.losses[1] > sweep.losses[0] > sweep.before
    assert sweep.lr == 1e-1


def test_what_a_search_refuses(task, tmp_path):
    model, closure = task
    named = list(model.named_parameters())
    with pytest.raises(TypeError, match=r"find_lr: optimizer: expected an optimizer of zokernels\.optim"):
        find_lr(torch.optim.SGD(model.parameters(), 0.1), closure)
    with pytest.raises(ValueError, match=r"find_lr: lrs\[1\]"):
        find_lr(ZOSGD(named, 0.1), closure, [1e-3, -1.0])
    with pytest.raises(TypeError, match="find_lr: batches"):
        find_lr(ZOSGD(named, 0.1), closure, batches=iter([1]))
    with pytest.raises(ValueError, match="find_lr: lr: "):
        find_lr(ZOSGD(named, 0.0), closure)
    head = torch.optim.SGD(model[3].parameters(), 0.1)
    with pytest.raises(ValueError, match="find_lr: optimizer: expected one without first_order"):
        find_lr(ZOSGD(model[0].named_parameters(), 0.1, first_order=head), closure)
    logged = ZOSGD(named, 0.1, trajectory=tmp_path / "run.zk")
    find_lr(logged, closure, [1e-3], steps=3)
    logged.trajectory.close()
    from zokernels.trajectory import read

    with pytest.raises(ValueError, match="no step was recorded"):
        read(tmp_path / "run.zk")


# diagnose ---------------------------------------------------------------------------------------------------


def test_a_straight_loss_has_nothing_to_mend():
    """L = a . w: differences are 2 eps a . z, whatever eps is; here in float64."""
    w, a = nn.Parameter(torch.randn(200)), torch.randn(200).double()
    optimizer = ZOSGD([("w", w)], 1e-3, eps=1e-2)
    found = optimizer.diagnose(lambda: w.double() @ a, directions=16)
    assert found.advice == []
    assert (found.repeats, found.bends, found.batch) == (True, False, None)
    assert found.dtype is torch.float64
    assert all(cosine > 0.999 for cosine in found.straight)
    for eps, difference in zip(found.eps, found.differences, strict=True):
        # 2 eps |a| times the root of a mean of 16 squared normals, whose tails of 1e-8 lie within
        assert 0.2 < difference / (2 * eps * float(a.norm())) < 2.5
    assert "nothing to mend" in str(found)


def test_a_loss_in_half_precision():
    w, x = nn.Parameter(torch.randn(64) * 0.1), torch.randn(64)
    optimizer = ZOSGD([("w", w)], 1e-3)
    found = optimizer.diagnose(lambda: (1 + w @ x * 1e-3).bfloat16())
    assert found.dtype is torch.bfloat16
    assert found.spacing == 2**-7 if found.loss >= 1 else 2**-8
    assert any("compute it in fp32" in text for text in found.advice)
    good = optimizer.diagnose(lambda: 1 + w @ x)
    assert not any("fp32" in text for text in good.advice)


def test_rounding_asks_for_a_larger_eps():
    """Losses that are rounded to multiples of 0.01 on their way: differences of 0.001 drown in that."""
    w, a = nn.Parameter(torch.randn(400)), torch.randn(400)
    a = a / a.norm()
    coarse = lambda: 10 + ((w.double() @ a.double()) * 100).round() / 100
    found = ZOSGD([("w", w)], 1e-3, eps=1e-3).diagnose(coarse, directions=32)
    assert found.difference < 5 * found.rounding
    assert not found.bends
    assert any("take a larger eps" in text for text in found.advice)
    assert ZOSGD([("w", w)], 1e-3, eps=0.3).diagnose(coarse, directions=32).advice == []


def test_a_loss_that_bends_asks_for_a_smaller_eps():
    w, a = nn.Parameter(torch.zeros(100)), torch.randn(100)
    a = a / a.norm()
    found = ZOSGD([("w", w)], 1e-3, eps=1.0).diagnose(
        lambda: 10 + (3 * (w @ a)).sin().double(), directions=32
    )
    assert found.bends
    assert any("take a smaller one" in text for text in found.advice)


def test_a_closure_with_data_of_its_own():
    w, generator = nn.Parameter(torch.randn(20)), torch.Generator().manual_seed(1)
    drawn = lambda: (w * torch.randn(20, generator=generator)).sum()
    optimizer = ZOSGD([("w", w)], 1e-3)
    found = optimizer.diagnose(drawn)
    assert not found.repeats
    assert any("not the same twice" in text for text in found.advice)
    optimizer.generators = [generator]
    assert optimizer.diagnose(drawn).repeats
    assert optimizer.diagnose(lambda: (w * torch.randn(20)).sum()).repeats  # torch's own numbers


def test_the_noise_of_the_batch():
    """Of batches that disagree, and of one that is all of the data."""
    w, x = nn.Parameter(torch.zeros(30)), torch.randn(4, 30).double()
    loss = lambda i: w.double() @ (0.1 + x[i])
    optimizer = ZOSGD([("w", w)], 1e-3)
    found = optimizer.diagnose(loss, batches=[0, 1, 2, 3], directions=32)
    # A difference is 2 eps z . (0.1 + x_i): from batch to batch it varies by 2 eps |x|, |x| about root 30.
    assert 0.5 < found.batch / (2e-3 * math.sqrt(30)) < 2.0
    same = optimizer.diagnose(loss, batches=[0, 0, 0])
    assert same.batch == 0.0
    assert optimizer.diagnose(lambda: loss(0)).batch is None


def test_a_loss_that_depends_on_nothing():
    w = nn.Parameter(torch.randn(20))
    found = ZOSGD([("w", w)], 1e-3).diagnose(lambda: (w * 0).sum() + 1)
    assert any("does not depend on these parameters" in text for text in found.advice)
    assert "not finite" not in str(found)
    bad = ZOSGD([("w", w)], 1e-3).diagnose(lambda: w.sum() * float("nan"))
    assert any("nothing can be measured" in text for text in bad.advice)


def test_weights_that_eps_does_not_move():
    params = {"norm": nn.Parameter(torch.ones(64).bfloat16()), "w": nn.Parameter(torch.randn(64) * 0.02)}
    closure = lambda: (params["norm"].float() * params["w"]).sum()
    found = ZOSGD(params.items(), 1e-3, eps=1e-3).diagnose(closure)
    assert found.moved.keys() == {"norm"}
    assert any("less than half of the weights of norm" in text for text in found.advice)
    assert "norm: eps moves" in str(found)


def test_find_lr_with_arguments_that_it_does_not_have():
    w = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match=r"^find_lr: lr: expected 'lrs', the nearest of its arguments"):
        find_lr(ZOSGD([w], 0.1), lambda: w.sum(), lr=[0.1])
    with pytest.raises(TypeError, match=r"^find_lr: optimizer, closure: expected all of them"):
        find_lr(ZOSGD([w], 0.1))
    with pytest.raises(TypeError, match=r"^len\(\)"):
        find_lr(ZOSGD([w], 0.1), lambda: len(), [0.1])
