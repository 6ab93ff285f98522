# ruff: noqa: B023  closures of a loop run inside it
"""Every estimator against its formula in float64, and its steps bit for bit against materialised z."""

import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from estimator_cases import CASES, FORWARD, METHODS, PERTURBING, build, plain_step, ranked, seeds_of
from helpers import watched
from test_zosgd_capturable import NoReads
from test_zosgd_graph import capture, no_waiting, side_stream
from torch import nn
from torch.autograd import forward_ad
from zosgd_cases import BOTH, batch, combined, loss_of, mlp, same_bits, weights

import zokernels as zk
from zokernels.optim import FZOO, ZOSGD, ForwardGradient, ZerothOrder, ZOConservative, ZORankSGD
from zokernels.step.estimators import OneSided, Ranking, StdNormalized, TwoSided
from zokernels.step.rules.rule import Rule

# torch's forward-mode derivatives are compiled by torch.jit.script when first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def compare(method, model, plain, loss, steps, seed, **options):
    """Takes some steps of ``method`` with ``model`` and compares them with plain PyTorch on ``plain``."""
    case = METHODS[method]
    values = {
        "lr": 0.05,
        "eps": 2.0**-5,
        "weight_decay": 0.0,
        "dist": case.dist,
        "rounding": "stochastic",
        **options,
    }
    opt = build(method, [*model.named_parameters()], seed=seed, **options)
    theta = trained(plain)
    for step in range(steps):
        result = opt.step(lambda: loss(model))
        with torch.no_grad():
            of_weights = lambda w: loss(lambda *x: torch.func.functional_call(plain, w, x))
            log = opt.last_projected_gradient.tolist()
            losses, g, theta = plain_step(case, theta, of_weights, step, log, seed=seed, **values)
        assert torch.equal(torch.stack(opt.last_losses), torch.stack(losses))
        assert len({*map(float, losses)}) > 1
        torch.testing.assert_close(
            torch.tensor(log), torch.tensor(g, dtype=torch.float32), rtol=1e-6, atol=1e-9
        )
        expected = {"one-sided": losses[0], "fzoo": losses[0], "ranking": min(losses)}
        mean = torch.stack(losses[: len(case.points)]).mean()
        assert torch.equal(result, expected.get(method, mean))
        assert same_bits([*trained(model).values()], [*theta.values()])
    assert opt.step_count == steps
    assert int(opt.skipped_steps) == 0


@BOTH
@PERTURBING
@pytest.mark.parametrize(
    ("dtype", "weight_decay", "rounding"),
    [(torch.float32, 0.1, "nearest"), (torch.bfloat16, 0.0, "stochastic"), (torch.bfloat16, 0.1, "nearest")],
)
def test_steps_equal_plain_pytorch(method, dtype, weight_decay, rounding, restore, rng):
    x, y = batch()
    loss = lambda f: F.cross_entropy(f(x.to(dtype)).float(), y)
    options = {"weight_decay": weight_decay, "rounding": rounding, "restore": restore}
    compare(method, mlp(dtype), mlp(dtype), loss, 3, rng.getrandbits(64), **options)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.emb, self.mix, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.emb.weight
        self.mix.bias.requires_grad_(False)

    def forward(self, tokens):
        return self.head(torch.tanh(self.mix(self.emb(tokens))))


@BOTH
@PERTURBING
def test_tied_and_frozen_parameters(method, restore, rng):
    tokens = torch.arange(12) % 7
    loss = lambda f: F.cross_entropy(f(tokens[:-1]), tokens[1:])
    model = Tied()
    bias = model.mix.bias.detach().clone()
    compare(method, model, Tied(), loss, 2, rng.getrandbits(64), restore=restore)
    assert torch.equal(model.mix.bias, bias)


@CASES
def test_groups_are_one_step(method, restore, rng):
    """The weights of each group, whatever its dtype, follow from the log of g.

    One of the groups is empty.
    """
    a, b = nn.Parameter(torch.randn(11)), nn.Parameter(torch.randn(3, 5).bfloat16())
    before, seed = weights(nn.ParameterList([a, b])), rng.getrandbits(64)
    groups = [
        {"params": [("a", a)]},
        {"params": [], "param_names": []},
        {"params": [("b", b)], "lr": 0.2, "dist": "rademacher"},
    ]
    opt = build(method, groups, seed=seed, restore=restore, dist="normal", rounding="nearest")
    opt.step(lambda: (a * 3).square().sum() + b.float().square().sum())
    g = opt.last_projected_gradient.tolist()
    if restore == "exact":
        for name, p, theta, lr, dist in (
            ("a", a, before[0], 0.05, "normal"),
            ("b", b, before[1], 0.2, "rademacher"),
        ):
            z = tuple(
                zk.noise(p.shape, seed=s, stream=zk.stream_of(name), dist=dist)
                for s in seeds_of(seed, 0, len(g))
            )
            assert same_bits([p.detach()], [combined(theta, z, tuple(-lr * value for value in g))])
    assert not torch.equal(a, before[0]) or method == "conservative"
    assert int(opt.skipped_steps) == 0


@CASES
def test_perturbation_and_update_have_one_z(method, restore, rng):
    """z as the closure sees it (theta = 0, eps = 1) gives the update's weights from the log of g."""
    p, a, seen = nn.Parameter(torch.zeros(37)), torch.linspace(-1, 1, 37), []

    def closure():
        if method in FORWARD:
            seen.append(forward_ad.unpack_dual(p * 1).tangent)
        else:
            seen.append(p.clone())
        return (p * a).sum()

    options = {"seed": rng.getrandbits(64), "lr": 0.5, "eps": 1.0, "dist": "normal"}
    opt = build(method, [p], restore="exact", **options)
    if restore == "inplace":  # there the points are moved to, and each has the roundings of the way
        q = nn.Parameter(torch.zeros(37))
        build(method, [q], restore=restore, **options).step(lambda: (q * a).sum())
    opt.step(closure)
    case = {**METHODS, **FORWARD}[method]
    points = case.points or [(k, 1) for k in range(case.q)]
    z = {k: values for (k, sign), values in zip(points, seen, strict=False) if sign == 1}
    assert all(v.std() > 0.5 for v in z.values())
    g = opt.last_projected_gradient.tolist()
    assert torch.equal(
        p, combined(torch.zeros(37), tuple(z[k] for k in range(case.q)), tuple(-0.5 * v for v in g))
    )
    if restore == "inplace":
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-4)


# --- the formulas ---


@pytest.mark.parametrize("q", [1, 4])
@pytest.mark.parametrize("estimator", [TwoSided, OneSided])
def test_differences_of_a_linear_loss_are_exact(estimator, q, rng):
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    a, z = torch.randn(9, generator=generator).double(), torch.randn(q, 9, generator=generator).double()
    one = estimator(q)
    losses = torch.stack([3 + (sign * 0.25 * z[k] @ a if sign else 0 * a[0]) for k, sign in one.points()])
    torch.testing.assert_close(one.coefficients(losses, 0.25), z @ a / q)


def test_ranking_is_the_sum_over_edges(rng):
    for q in (2, 3, 5):
        for top in range(1, q + 1):
            losses = [rng.gauss(0, 1) for _ in range(q)]
            got = Ranking(q, top).coefficients(torch.tensor(losses, dtype=torch.float64), 0.1)
            torch.testing.assert_close(got, torch.tensor(ranked(losses, 0, q, top), dtype=torch.float64))
            assert abs(got.sum()) < 1e-12
    full, almost = (
        Ranking(4, top).coefficients(torch.tensor([3.0, 1.0, 2.0, 9.0]).double(), 1) for top in (None, 3)
    )
    assert torch.equal(full, almost)  # the last place is known from the others


def test_ranking_uses_the_order_alone():
    losses = torch.tensor([0.3, -2.0, 7.0, 0.1]).double()
    one = Ranking(4, 2)
    assert torch.equal(one.coefficients(losses, 1.0), one.coefficients(losses.exp() * 100, 0.1))
    for bad in (float("nan"), float("inf")):
        assert one.coefficients(torch.tensor([0.3, bad, 7.0, 0.1]).double(), 1.0).isnan().all()
    assert torch.equal(
        one.coefficients(torch.zeros(4).double(), 1.0) * 5, torch.tensor([-3.0, -1.0, 2.0, 2.0]).double()
    )


def test_std_normalized_steps_do_not_depend_on_the_scale_of_the_loss(rng):
    losses = torch.tensor([rng.gauss(2, 1) for _ in range(6)], dtype=torch.float64)
    one = StdNormalized(5)
    torch.testing.assert_close(one.coefficients(losses, 1.0), one.coefficients(1024 * losses, 0.1))
    equal = torch.tensor([1.0, 2.0, 2.0]).double()
    assert torch.equal(StdNormalized(2).coefficients(equal, 1.0), torch.zeros(2).double())
    assert StdNormalized(2).coefficients(equal * float("nan"), 1.0).isnan().all()


# --- Python numbers, non-finite losses, clipping, checkpoints, capturable ---


@BOTH
@PERTURBING
def test_closure_may_return_a_number(method, restore):
    p = nn.Parameter(torch.zeros(20))
    opt = build(method, [p], restore=restore)
    result = opt.step(lambda: float((p.detach() > 0).sum()) + float(p.double().square().sum()))
    assert opt.last_losses[0].dtype is result.dtype is torch.float64
    assert opt.step_count == 1
    assert not torch.equal(p, torch.zeros(20)) or method == "conservative"


@CASES
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.filterwarnings("ignore:[A-Za-z]+. . step:UserWarning")
def test_a_loss_that_is_not_finite_skips_the_step(method, restore, capturable, rng):
    theta = torch.tensor([0.5, -1.25, 3.0, 2.0**-10], dtype=torch.bfloat16)
    case = {**METHODS, **FORWARD}[method]
    count = len(case.points) or case.q
    bad = rng.randrange(count)
    p, calls = nn.Parameter(theta.clone()), []
    opt = build(method, [p], restore=restore, weight_decay=0.5, capturable=capturable, eps=2.0**-12)

    def closure():
        calls.append(None)
        return p.float().sum() * (float("nan") if len(calls) == bad + 1 else 1.0)

    opt.step(closure)
    assert int(opt.skipped_steps) == 1
    if restore == "exact":
        assert same_bits([p.detach()], [theta])
    else:  # the roundings of the ways there and back
        assert (p.detach().float() - theta.float()).abs().max() <= 2.0**-4
    opt.step(closure)
    assert p.isfinite().all()
    assert int(opt.skipped_steps) == 1
    assert opt.step_count == 2


@CASES
def test_clip_bounds_each_coefficient(method, restore, rng):
    seed, logs, bound = rng.getrandbits(64), [], 2.0**-10
    for clip in (None, bound):
        p = nn.Parameter(torch.linspace(-1, 1, 30))
        opt = build(method, [p], restore=restore, seed=seed, clip=clip)
        opt.step(lambda p=p: (p * torch.arange(30)).sum())
        logs.append(opt.last_projected_gradient)
    expected = logs[0].clamp(-bound, bound)
    assert torch.equal(logs[1], expected) or method == "conservative"
    assert not torch.equal(logs[0], expected)


def run(model, opt, steps, data):
    losses = []
    for _ in range(steps):
        torch.manual_seed(100 + opt.step_count)
        losses.append(opt.step(lambda: loss_of(model, *data)))
    return torch.stack(losses)


@CASES
def test_resume_is_bit_exact(method, restore):
    data = batch()
    model = mlp(torch.bfloat16, dropout=0.2)
    opt = build(method, model.named_parameters(), restore=restore, weight_decay=0.01, seed=11)
    run(model, opt, 2, data)
    file = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), file)
    run(model, opt, 2, data)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model2 = mlp(torch.bfloat16, dropout=0.2)
    opt2 = build(method, model2.named_parameters(), restore=restore, lr=0.7)
    model2.load_state_dict(saved[0])
    opt2.load_state_dict(saved[1])
    run(model2, opt2, 2, data)
    assert same_bits(weights(model), weights(model2))
    assert opt.state_dict() == opt2.state_dict()


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capturable_equals_the_ordinary_step(method, restore, dtype):
    data, results = batch(), []
    for capturable in (False, True):
        model = mlp(dtype, dropout=0.2)
        opt = build(method, model.named_parameters(), lr=torch.tensor(0.05), restore=restore,
            weight_decay=0.1,
                    seed=2**63 + 9, capturable=capturable)  # fmt: skip
        results.append((run(model, opt, 3, data), weights(model), opt.last_projected_gradient))
    (l1, w1, g1), (l2, w2, g2) = results
    assert torch.equal(l1, l2)
    assert torch.equal(g1, g2)
    assert same_bits(w1, w2)
    assert not same_bits(w1, weights(mlp(dtype)))


@CASES
def test_nothing_is_read_back(method, restore):
    model, data = mlp(), batch()
    opt = build(method, model.named_parameters(), restore=restore, capturable=True, clip=1.0)
    with NoReads():
        opt.step(lambda: loss_of(model, *data))
        opt.step(lambda: loss_of(model, *data) * float("nan"))
    assert opt.step_count == 2
    with NoReads(), pytest.raises(AssertionError):
        assert int(opt.skipped_steps)


@pytest.mark.gpu
@CASES
def test_replays_equal_eager_steps(method, restore):
    """Four steps in a CUDA graph, and nothing that waits, whatever the method."""
    data, results = [t.cuda() for t in batch()], []
    for captured in (False, True):
        model = mlp(torch.bfloat16, dropout=0.25).cuda()
        lr = torch.tensor(0.05, device="cuda")
        opt = build(
            method, model.named_parameters(), lr=lr, restore=restore, seed=3, capturable=True, clip=3.0
        )
        closure = lambda: loss_of(model, *data)
        torch.manual_seed(7)
        for _ in range(2):
            with side_stream():
                opt.step(closure)
        if captured:
            with no_waiting():
                graph, loss = capture(opt, closure)
        for _ in range(4):
            if captured:
                graph.replay()
            else:
                with no_waiting(), side_stream():
                    loss = opt.step(closure)
        results.append(([loss.clone(), opt.last_projected_gradient.clone()], weights(model)))
        assert opt.step_count == 6
    (a, w1), (b, w2) = results
    assert all(map(torch.equal, a, b))
    assert same_bits(w1, w2)


@CASES
def test_all_forwards_draw_the_same_masks(method, restore):
    p, masks = nn.Parameter(torch.ones(64)), []

    def closure():
        masks.append(F.dropout(torch.ones(64), 0.5) != 0)
        return p.sum()

    opt = build(method, [p], restore=restore)
    torch.manual_seed(7)
    opt.step(closure)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    F.dropout(torch.ones(64), 0.5)
    assert torch.equal(after, torch.get_rng_state())
    assert len(masks) >= 3
    assert all(torch.equal(m, masks[0]) for m in masks)


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        ("two-sided", [1, 1, 2, 1, 2, 1, 3]),
        ("one-sided", [1, 2, 2]),
        ("fzoo", [1, 2, 2, 2, 4]),
        ("ranking", [1, 2, 2, 2, 4]),
        ("conservative", [1, 1, 2, 1, 1, 2, 2, 2]),
    ],
)
def test_passes_in_place(method, sizes):
    """There is one combine from each point to the next, and one that restores and updates."""
    p, calls = nn.Parameter(torch.ones(5)), []
    with watched("combine_", lambda params, seeds, *rest: calls.append(seeds.numel())):
        build(method, [p], restore="inplace").step(lambda: p.square().sum())
    assert calls == sizes


# --- conservative ---


@BOTH
@pytest.mark.parametrize(("trials", "kept"), [((0, 1, 2), 0), ((1, 0, 2), 1), ((2, 1, 0), -1), ((1, 1, 1), 0),
                                              ((1, float("nan"), 0), -1), ((float("nan"), 0, 0),
                                              0)])  # fmt: skip
def test_conservative_keeps_the_best(trials, kept, restore):
    theta = torch.linspace(-2, 2, 40)
    p, answers = nn.Parameter(theta.clone()), iter((3.0, 1.0, *map(float, trials)))
    opt = ZOConservative([p], lr=0.25, eps=0.5, restore=restore)
    seen = []
    opt.step(lambda: (seen.append(p.clone()), next(answers))[1])
    assert opt.last_projected_gradient == 2.0 * kept
    z = zk.noise(40, seed=zk.derive_seed(0, 0, 0), stream=0)
    moved = {m: combined(theta, z, -0.5 * m) for m in (0, 1, -1)}
    if restore == "exact":
        assert all(map(torch.equal, seen[2:], (moved[0], moved[1], moved[-1])))
        assert torch.equal(p, moved[kept])
    else:
        torch.testing.assert_close(p.detach(), moved[kept])
    assert int(opt.skipped_steps) == 0


# --- ranking by an oracle ---


class Result:
    def __init__(self, score):
        self.score = score


@BOTH
def test_rank_of_any_objects(restore):
    """An oracle that sees objects gives the weights that losses of the same order give."""
    moved, lowest, x = [], [], torch.linspace(-1, 1, 12)
    for oracle in (False, True):
        p = nn.Parameter(torch.ones(12))
        opt = ZORankSGD([p], lr=0.1, eps=0.1, candidates=5, top=2, restore=restore)
        for _ in range(3):
            score = lambda: (p * x).square().sum().item()
            if oracle:
                rank = lambda results: torch.tensor([r.score for r in results]).argsort()[:2]
                best = opt.step(lambda: Result(score()), rank=rank)
                assert isinstance(best, Result)
                assert best.score == lowest.pop(0)
                assert sorted(map(float, opt.last_losses)) == [0, 1, 5, 5, 5]
            else:
                lowest.append(opt.step(score).item())
        moved.append(p.detach().clone())
    assert torch.equal(*moved)
    assert not torch.equal(moved[0], torch.ones(12))


@BOTH
@pytest.mark.parametrize("order", [[0], [0, 0, 1], [0, 4], [-1, 2], [0, 1.5]])
def test_bad_ranks_leave_the_weights(order, restore):
    p = nn.Parameter(torch.ones(12))
    opt = ZORankSGD([p], lr=0.1, candidates=4, top=2, restore=restore)
    with pytest.raises((ValueError, TypeError), match=r"ZORankSGD: rank: expected 2 or more|integer"):
        opt.step(lambda: p.sum(), rank=lambda results: order)
    torch.testing.assert_close(p.detach(), torch.ones(12), rtol=0, atol=1e-6 if restore == "inplace" else 0)
    assert opt.step_count == 0


# --- forward mode ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_gradient_is_the_derivative_along_z(dtype, rng):
    x, y = batch()
    seed = rng.getrandbits(64)
    model, plain = mlp(dtype), mlp(dtype).double()
    theta = trained(model)
    opt = ForwardGradient([*model.named_parameters()], lr=0.1, directions=2, seed=seed)
    result = opt.step(lambda: F.cross_entropy(model(x.to(dtype)).float(), y))
    loss = F.cross_entropy(plain(x.to(dtype).double()), y)
    loss.backward()
    g = opt.last_projected_gradient.tolist()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    z = {
        n: tuple(zk.noise(p.shape, seed=s, stream=zk.stream_of(n)) for s in seeds_of(seed, 0, 2))
        for n, p in theta.items()
    }
    for k in range(2):
        along = sum((p.grad * z[n][k].to(dtype).double()).sum() for n, p in plain.named_parameters())
        assert g[k] == pytest.approx(along.item() / 2, rel=tolerance, abs=tolerance)
        assert opt.last_losses[k][1] / 2 == pytest.approx(g[k])
    assert result.item() == pytest.approx(loss.item(), rel=tolerance)
    s = seeds_of(seed, 0, 2)[0]
    for n, p in model.named_parameters():
        expected = combined(
            theta[n], z[n], tuple(-0.1 * v for v in g), stochastic_seed=s, stream=zk.stream_of(n)
        )
        assert same_bits([p.detach()], [expected])


def test_forward_gradient_trains_attention_and_embeddings():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(5, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), nn.Linear(8, 5)
    )
    tokens = torch.arange(40).view(8, 5) % 5
    opt = ForwardGradient(model.named_parameters(), lr=0.01, directions=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no parameter goes unseen
        losses = [
            opt.step(lambda: F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))
            for _ in range(40)
        ]
    assert losses[-1] < 0.8 * losses[0]


def test_forward_gradient_stores_one_call():
    from zokernels.step.scratch import arena_numel

    model = nn.Sequential(nn.Linear(16, 128), nn.Tanh(), nn.Linear(128, 4), nn.LayerNorm(4))
    opt = ForwardGradient(model.named_parameters(), lr=0.1, scratch=0)
    opt.step(lambda: model(torch.ones(2, 16)).square().sum())
    assert opt.scratch.nbytes() == 2 * 4 * arena_numel([*model[0].parameters()])


def test_forward_gradient_refuses():
    p = nn.Parameter(torch.ones(3))
    opt = ForwardGradient([p], lr=0.1)
    for loss in (lambda: 1.0, lambda: p.data.sum(), lambda: (p.sum(), torch.ones(()))[1]):
        with pytest.raises(
            TypeError, match="ForwardGradient: closure: expected a loss with a forward-mode derivative"
        ):
            opt.step(loss)
    with pytest.raises(RuntimeError, match="does not write to its parameters"):
        opt.step(lambda: p.mul_(2).sum())
    with pytest.raises(ValueError, match="ForwardGradient: restore: expected 'exact'"):
        ForwardGradient([p], lr=0.1, restore="inplace")
    assert torch.equal(p, torch.ones(3))
    assert opt.step_count == 0


# --- arguments ---


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (ZOSGD, {"directions": 0}, "ZOSGD: directions: expected an integer >= 1, got 0"),
        (ZOSGD, {"directions": True}, "directions: expected an integer >= 1, got True"),
        (
            ZOSGD,
            {"estimator": "three-sided"},
            "ZOSGD: estimator: expected 'two-sided' or 'one-sided', got 'three-sided'",
        ),
        (FZOO, {"directions": 1}, "FZOO: directions: expected an integer >= 2, got 1"),
        (FZOO, {"std_eps": -1.0}, "FZOO: std_eps: expected a number >= 0, got -1.0"),
        (FZOO, {"eps": 0}, "FZOO: eps: expected a finite number > 0, got 0"),
        (ZORankSGD, {"candidates": 1}, "ZORankSGD: candidates: expected an integer >= 2, got 1"),
        (ZORankSGD, {"candidates": 3, "top": 4}, "ZORankSGD: top: expected an integer in [1, 3], got 4"),
        (ZOConservative, {"lr": -1.0}, "ZOConservative: lr: expected a finite number >= 0, got -1.0"),
    ],
)
def test_bad_arguments(make, options, message):
    with pytest.raises(ValueError, match="expected") as error:
        make([nn.Parameter(torch.ones(2))], **{"lr": 0.1, **options})
    assert message in str(error.value)


def test_two_pass_is_for_one_direction_two_sided():
    model = mlp()
    for method in METHODS:
        opt = build(method, model.named_parameters(), restore="inplace")
        with pytest.raises(
            ValueError, match="two_pass: expected the two-sided estimator with one direction and SGD"
        ):
            opt.two_pass(model).__enter__()


def test_a_rank_is_not_for_graphs():
    p = nn.Parameter(torch.ones(2))
    opt = ZORankSGD([p], lr=0.1, capturable=True)
    with pytest.raises(ValueError, match="ZORankSGD: rank: expected capturable=False"):
        opt.step(lambda: p.sum(), rank=lambda results: range(8))


# --- a rule with state ---


class Momentum(Rule):
    """m <- beta m + sum_k g_k z_k, theta <- theta - lr m, with m in the optimizer's state."""

    def update(self, optimizer, bucket, seeds, g, finite):
        assert not bucket.at  # restored before
        assert seeds.numel() == g.numel() == optimizer.estimator.directions
        for p, stream in zip(bucket.params, bucket.streams, strict=True):
            z = torch.stack([zk.noise(p.shape, seed=s, stream=stream, dist=bucket.dist) for s in seeds])
            state = optimizer.state[p]
            state["m"] = 0.5 * state.get("m", torch.zeros_like(p)) + torch.tensordot(g, z, 1)
            p.sub_(bucket.group["lr"] * state["m"])


@BOTH
def test_a_rule_may_keep_state(restore, rng):
    """It gets restored weights, seeds and g; its state is saved, and not touched by a skipped step."""
    data, seed = batch(), rng.getrandbits(64)
    make = lambda m: ZerothOrder(m.named_parameters(), 0.05, seed=seed, restore=restore,
        estimator=TwoSided(2),
                                 rule=Momentum())  # fmt: skip
    model, plain = mlp(), mlp()
    opt, sgd = make(model), ZOSGD(plain.named_parameters(), 0.05, seed=seed, restore=restore, directions=2)
    for m, o in ((model, opt), (plain, sgd)):
        run(m, o, 1, data)
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-5, atol=1e-6)
    run(model, opt, 1, data)
    held = {p: s["m"].clone() for p, s in opt.state.items()}
    with pytest.warns(UserWarning, match="ZerothOrder: 1 step"):
        opt.step(lambda: loss_of(model, *data) * float("nan"))
    assert all(torch.equal(opt.state[p]["m"], m) for p, m in held.items())
    file = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = mlp()
    opt2 = make(again)
    again.load_state_dict(saved[0])
    opt2.load_state_dict(saved[1])
    for m, o in ((model, opt), (again, opt2)):
        run(m, o, 2, data)
    assert same_bits(weights(model), weights(again))
    assert len(opt2.state) == len(weights(model))
