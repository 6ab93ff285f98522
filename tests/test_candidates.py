"""Consensus hopping, and the line search of ZO-RankSGD, against the papers' formulas in float64."""

import pytest
import torch
from torch import nn
from zosgd_cases import same_bits

import zokernels as zk
from zokernels.optim import ConsensusHopping, ZORankSearch, ZORankSGD
from zokernels.trajectory import replay_


def noise_of(p, seed, step, k):
    return zk.noise(p.shape, seed=zk.derive_seed(seed, step, k), stream=zk.stream_of("p")).double()


@pytest.mark.parametrize("restore", ["exact", "inplace"])
@pytest.mark.parametrize(("lr", "alpha"), [(1.0, 30.0), (0.25, 0.0), (1.0, 1e4)])
def test_a_hop_leads_to_the_weighted_mean_of_the_candidates(restore, lr, alpha, rng):
    g = torch.Generator().manual_seed(rng.getrandbits(60))
    p, goal, seed = (
        nn.Parameter(torch.randn(17, generator=g)),
        torch.randn(17, generator=g),
        rng.getrandbits(60),
    )
    loss = lambda x: (x - goal).double().square().mean()
    opt = ConsensusHopping([("p", p)], lr, 0.3, candidates=5, alpha=alpha, seed=seed, restore=restore)
    for step in range(3):
        theta = p.detach().double()
        points = torch.stack([theta + 0.3 * noise_of(p, seed, step, k) for k in range(5)])
        weights = torch.softmax(-alpha * torch.stack([loss(x) for x in points]), 0)
        want = theta + lr * ((weights[:, None] * points).sum(0) - theta)
        opt.step(lambda: loss(p))
        # alpha times the rounding of fp32 points to losses (about 1e-6) changes the weights by that share.
        torch.testing.assert_close(p.detach().double(), want, rtol=0, atol=1e-5 + 2e-6 * min(alpha, 1e3))


def test_hops_descend_where_slopes_mislead():
    """The mean of a wide search crosses the ripples of Rastrigin's function, in which gradients end."""
    p = nn.Parameter(torch.full((4,), 2.6))
    ripples = lambda: (p.square() + 1.5 * (1 - torch.cos(6.2832 * p))).sum()
    opt = ConsensusHopping([("p", p)], eps=0.4, candidates=24, alpha=3.0)
    first = ripples().item()
    for _ in range(60):
        opt.step(ripples)
    assert ripples().item() < 0.25 * first


def searched(loss, theta, z, lr, eps, m, trials, rounds):
    """One step of ZO-RankSGD with its line search, by the paper: theta after it, and its forwards."""
    total, forwards = torch.zeros_like(theta), 0
    for r in range(rounds):
        noise = z[r * m : (r + 1) * m]
        losses = [float(loss(theta + eps * x)) for x in noise]
        order = sorted(range(m), key=losses.__getitem__)
        edges = [(i, j) for at, i in enumerate(order) for j in order[at + 1 :]]  # i is better than j
        total += sum(noise[j] - noise[i] for i, j in edges) / len(edges)
        points = [theta - lr * 0.5**j * total / (r + 1) for j in range(trials)]
        points += [theta + eps * noise[order[0]]]
        values = [float(loss(x)) for x in points]
        forwards += m + trials + 2
        if min(values) < float(loss(theta)):
            return points[values.index(min(values))], forwards
    return theta, forwards


@pytest.mark.parametrize("restore", ["exact", "inplace"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_steps_of_the_line_search_are_the_papers(restore, rounds, rng):
    g = torch.Generator().manual_seed(rng.getrandbits(60))
    p, goal, seed = (
        nn.Parameter(torch.randn(9, generator=g)),
        torch.randn(9, generator=g),
        rng.getrandbits(60),
    )
    loss = lambda x: (x.double() - goal).square().sum()
    options = {"candidates": 4, "trials": 3, "rounds": rounds, "seed": seed, "restore": restore}
    opt = ZORankSearch([("p", p)], lr=2.0, eps=0.5, **options)
    for step in range(6):
        theta = p.detach().double()
        z = torch.stack([noise_of(p, seed, step, k) for k in range(4 * rounds)])
        want, forwards = searched(loss, theta, z, 2.0, 0.5, 4, 3, rounds)
        before = float(loss(p))
        lowest = opt.step(lambda: loss(p))
        torch.testing.assert_close(p.detach().double(), want, rtol=0, atol=1e-5)
        assert len(opt.last_losses) == forwards
        assert float(loss(p)) <= before * (1 + 1e-6)
        if restore == "exact":  # a trial sees what the update makes
            theta_is_best = float(loss(p)) == before
            assert theta_is_best or float(loss(p)) == float(torch.stack(opt.last_losses[-5:]).min())
        assert float(lowest) <= float(loss(p)) * (1 + 1e-6)


def test_any_lr_is_tolerated():
    """On a quadratic, equal forwards: with the search, lr over two orders of magnitude ends below 5 % of the
    start; without, the largest diverges.
    """
    torch.manual_seed(3)
    scale = torch.logspace(0, 1, 20)

    def last(kind, lr, steps, **options):
        p = nn.Parameter(torch.ones(20))
        opt = kind([("p", p)], lr=lr, eps=0.01, candidates=8, **options)
        loss = lambda: (scale * p.square()).sum()
        for _ in range(steps):
            opt.step(loss)
        return float(loss()) / float(scale.sum())

    ends = [last(ZORankSearch, lr, 100, trials=6, rounds=1) for lr in (0.1, 1.0, 10.0)]
    assert max(ends) < 0.05
    assert last(ZORankSGD, 10.0, 200) > 1


def test_ranks_of_anything_drive_the_search():
    p, goal = nn.Parameter(torch.zeros(6)), torch.linspace(-1, 1, 6)
    opt = ZORankSearch([("p", p)], lr=1.0, eps=0.1, candidates=4, top=2, rounds=2)
    calls = []

    def rank(texts):
        calls.append(len(texts))
        order = sorted(range(len(texts)), key=lambda i: sum((float(x) - y) ** 2 for x, y in zip(
            texts[i].split(), goal.tolist(), strict=True)))  # fmt: skip
        return order[: 2 if len(texts) == 4 else 1]

    for _ in range(15):
        best = opt.step(lambda: " ".join(f"{x:.6f}" for x in p.tolist()), rank)
        torch.testing.assert_close(
            torch.tensor([float(x) for x in best.split()]), p.detach(), rtol=0, atol=2e-6
        )
    assert (p.detach() - goal).square().sum() < 0.3 * goal.square().sum()
    assert calls[:2] == [4, 7]


@pytest.mark.parametrize(
    ("kind", "options"),
    [(ConsensusHopping, {"candidates": 3}), (ZORankSearch, {"candidates": 3, "rounds": 2})],
)
def test_a_log_replays_to_the_same_bits(kind, options, tmp_path, rng):
    torch.manual_seed(rng.getrandbits(32))
    model, goal = nn.Linear(5, 3).bfloat16(), torch.randn(3)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = kind(model.named_parameters(), 0.5, 0.1, trajectory=tmp_path / "run.zk", **options)
    for _ in range(4):
        opt.step(lambda: (model(torch.ones(2, 5).bfloat16()).float() - goal).square().mean())
    opt.trajectory.close()
    replay_(base, tmp_path / "run.zk")
    assert same_bits(list(base.values()), [p.detach() for p in model.parameters()])


@pytest.mark.parametrize("kind", [ConsensusHopping, ZORankSearch])
def test_a_loss_that_is_not_finite_skips_the_step(kind):
    p, losses = nn.Parameter(torch.ones(5)), iter([1.0, float("nan"), *[1.0] * 40])
    opt = kind([("p", p)], 1.0, 0.1, candidates=4)
    with pytest.warns(UserWarning, match="skipped"):
        opt.step(lambda: next(losses) + 0 * p.sum())
    assert p.tolist() == [1.0] * 5
    assert opt.skipped_steps == 1


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            ConsensusHopping,
            {"candidates": 1},
            "ConsensusHopping: candidates: expected an integer >= 2, got 1",
        ),
        (ConsensusHopping, {"alpha": -1.0}, "alpha"),
        (ZORankSearch, {"trials": 0}, "trials: expected an integer >= 1, got 0"),
        (ZORankSearch, {"candidates": 4, "top": 5}, r"top: expected an integer in \[1, 4\], got 5"),
        (ZORankSearch, {"clip": 1.0}, "clip: expected None"),
        (ZORankSearch, {"mesh": object()}, "mesh: expected None"),
        (ZORankSearch, {"capturable": True}, "rounds: expected 1 with capturable"),
    ],
)
def test_arguments(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind([nn.Parameter(torch.ones(2))], 0.1, **options)
