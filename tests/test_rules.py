# ruff: noqa: B023  closures of a loop run inside it
"""Every update rule: its formula with materialised z, torch's own optimizers, skipped steps, checkpoints,
graphs.
"""

import copy
import io
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from test_zosgd_capturable import NoReads
from torch import nn
from zosgd_cases import BOTH, batch, combined, loss_of, mlp, same_bits, weights

import zokernels as zk
from zokernels.backends.reference.combine import divide, fma, sqrt
from zokernels.backends.reference.noise import uniform16
from zokernels.backends.reference.rounding import round_stochastic
from zokernels.contract import DOMAIN_ROUNDING, DOMAIN_STATE, seed_to_int64
from zokernels.optim import (
    ZOSGD,
    Blocks,
    GivenMask,
    HiZOO,
    RandomMask,
    ZerothOrder,
    ZOAdam,
    ZOAdamW,
    ZOConservative,
    ZOSignSGD,
)
from zokernels.step.estimators import TwoSided
from zokernels.step.rules.stateful import Curvature

pytestmark = pytest.mark.filterwarnings("ignore:[A-Za-z]+. . step:UserWarning")

LR, EPS = 0.03125, 2.0**-6


@dataclass
class Case:
    make: type
    options: dict = field(default_factory=dict)
    q: int = 1
    states: tuple = ()

    def __call__(self, params, **options):
        return self.make(params, **{"lr": LR, "eps": EPS, **self.options, **options})

    @property
    def alpha(self):
        return self.options.get("alpha")


RULES = {
    "momentum": Case(
        ZOSGD, {"momentum": 0.75, "dampening": 0.25, "l2": 0.125, "directions": 2}, 2, ("momentum_buffer",)
    ),
    "adam": Case(ZOAdam, {"betas": (0.75, 0.9), "adam_eps": 1e-3}, 1, ("exp_avg", "exp_avg_sq")),
    "adamw": Case(ZOAdamW, {"betas": (0.75, 0.9), "directions": 3}, 3, ("exp_avg", "exp_avg_sq")),
    "sign": Case(ZOSignSGD, {"l2": 0.125, "directions": 2}, 2),
    "hizoo": Case(HiZOO, {"alpha": 2.0**-10}, 1, ("curvature",)),
    "momentum-window": Case(ZOSGD, {"momentum": 0.75, "dampening": 0.25, "window": 3, "directions": 2}, 2),
    "adam-window": Case(ZOAdamW, {"betas": (0.75, 0.9), "window": 3, "directions": 2}, 2),
}
EACH = pytest.mark.parametrize("rule", RULES)
STATEFUL = pytest.mark.parametrize("rule", [name for name, case in RULES.items() if case.states])


def seeds_of(seed, step, q):
    return [seed_to_int64(zk.derive_seed(seed, step, k)) for k in range(q)]


# --- one step in plain arithmetic, of one tensor ---


class Float64:
    """The operations of a formula, in float64 and without any rounding to speak of."""

    number = staticmethod(lambda x: torch.tensor(float(x), dtype=torch.float64))
    fma = staticmethod(lambda a, b, c: a * b + c)
    sqrt, divide = staticmethod(torch.sqrt), staticmethod(torch.div)
    load = staticmethod(lambda x: x.double())
    store = staticmethod(lambda x, dtype, seed, stream, domain: x)


class Exact:
    """The same as the contract has them: fp32, each rounded once, and stored with the bits of ``domain``."""

    number = staticmethod(lambda x: torch.tensor(float(x), dtype=torch.float64).float())
    fma = staticmethod(lambda a, b, c: fma(*torch.broadcast_tensors(a, b, c)))
    sqrt, divide, load = staticmethod(sqrt), staticmethod(divide), staticmethod(lambda x: x.float())

    @staticmethod
    def store(x, dtype, seed, stream, domain):
        if seed is None:
            return x.to(dtype)
        u16 = uniform16(torch.tensor(seed), stream, domain, 0, x.numel()).view_as(x)
        return round_stochastic(x, u16, dtype)


class Plain:
    """A parameter and its history in arithmetic ``ops``; :meth:`step` takes the log of g and the losses."""

    def __init__(self, ops, rule, theta, stream, *, seed, rounding, state_dtype, weight_decay):
        self.ops, self.rule, self.case, self.theta, self.stream = ops, rule, RULES[rule], theta, stream
        self.dtype, self.seed, self.rounding, self.state_dtype = theta.dtype, seed, rounding, state_dtype
        self.weight_decay, self.t, self.past = weight_decay, 0, []
        self.doubtful = torch.zeros(theta.shape, dtype=torch.bool)  # the sign may depend on rounding here
        first = torch.ones_like(theta) if rule == "hizoo" else torch.zeros_like(theta)
        self.states = [first.to(state_dtype), torch.zeros_like(theta).to(state_dtype)]
        self.products = [1.0, 1.0]

    def step(self, at, g, losses):
        ops, options, n = self.ops, self.case.options, self.ops.number
        seeds = seeds_of(self.seed, at, self.case.q)
        z = [ops.load(zk.noise(self.theta.shape, seed=s, stream=self.stream)) for s in seeds]
        rounding = seeds[0] if self.rounding == "stochastic" else None
        keep = lambda x, dtype, domain: ops.store(x, dtype, rounding, self.stream, domain)
        theta, old = ops.load(self.theta), [ops.load(s) for s in self.states]
        decay = n(1 - LR * self.weight_decay)
        decayed = decay * theta if self.weight_decay and self.rule != "adam" else theta
        total = torch.zeros_like(theta)
        for c, noise in zip(g, z, strict=True):
            total = ops.fma(n(c), noise, total)
        if self.rule == "momentum":
            m = ops.fma(n(0.75), old[0], n(0.75) * ops.fma(n(options["l2"]), theta, total))
            new, states = ops.fma(n(-LR), m, decayed), [m]
        elif self.rule in ("adam", "adamw"):
            total = ops.fma(n(self.weight_decay if self.rule == "adam" else 0.0), theta, total)
            b1, b2 = options["betas"]
            self.products = [self.products[0] * b1, self.products[1] * b2]
            m = ops.fma(n(b1), old[0], n(1 - b1) * total)
            v = ops.fma(n(b2), old[1], n(1 - b2) * total * total)
            scale = n((1 / torch.tensor(1 - self.products[1], dtype=torch.float64).sqrt()).item())
            root = ops.fma(ops.sqrt(v), scale, n(options.get("adam_eps", 1e-8)))
            new, states = ops.fma(n(-LR / (1 - self.products[0])), ops.divide(m, root), decayed), [m, v]
        elif self.rule == "sign":
            argument = ops.fma(n(options["l2"]), theta, total)
            self.doubtful |= argument.abs() < 1e-6
            new, states = ops.fma(n(-LR), torch.sign(argument), decayed), []
        elif self.rule == "hizoo":
            l0, plus, minus = (float(x) for x in losses)
            gain = self.case.alpha / 2 * (abs(plus + minus - 2 * l0) / EPS**2)
            h = ops.fma(n(gain), old[0] * (z[0] * z[0]), n(1 - self.case.alpha) * old[0])
            new, states = ops.fma(n(-LR * g[0]), ops.divide(z[0], ops.sqrt(h)), decayed), [h]
        else:
            new, states = self.windowed(g, z, decayed), []
        self.theta = keep(new, self.dtype, DOMAIN_ROUNDING)
        self.states = [keep(s, self.state_dtype, DOMAIN_STATE + i) for i, s in enumerate(states)]

    def windowed(self, g, z, decayed):
        """Of the last three updates, each with its own (g, z, weights), the newest first."""
        ops, n, adam = self.ops, self.ops.number, self.rule == "adam-window"
        b1, b2 = self.case.options["betas"] if adam else (0.75, 0.0)
        older = [
            ([b1 * a for a in first], [b2 * b for b in second], noise) for first, second, noise in self.past
        ]
        gain = 1 - b1 if adam else 0.75
        self.past = [([gain * c for c in g], [(1 - b2) * (c * c) for c in g], z), *older][:3]
        self.t = min(self.t + 1, 3)
        left1 = left2 = 1.0
        for _ in range(self.t):
            left1, left2 = b1 * left1, b2 * left2
        firsts = [a for first, _, _ in self.past for a in first]
        noises = [noise for _, _, noise in self.past for noise in noise]
        if not adam:
            new = decayed
            for a, noise in zip(firsts, noises, strict=True):
                new = ops.fma(n(-LR * a), noise, new)
            return new
        m = v = torch.zeros_like(decayed)
        for a, b, noise in zip(firsts, [b for _, s, _ in self.past for b in s], noises, strict=True):
            m = ops.fma(n(a / (1 - left1)), noise, m)
            v = ops.fma(n(b / (1 - left2)), noise * noise, v)
        return ops.fma(n(-LR), ops.divide(m, ops.sqrt(v) + n(1e-8)), decayed)


def stream_and_theta(model):
    return [(zk.stream_of(n), p.detach().clone()) for n, p in model.named_parameters()]


def log_of(opt):
    return opt.last_projected_gradient.reshape(-1).tolist()


@BOTH
@EACH
@pytest.mark.parametrize(
    ("dtype", "state_dtype", "rounding"),
    [
        (torch.float32, torch.float32, "nearest"),
        (torch.bfloat16, torch.float32, "stochastic"),
        (torch.bfloat16, torch.bfloat16, "stochastic"),
        (torch.float16, torch.bfloat16, "nearest"),
    ],
)
def test_steps_equal_the_formula_bit_for_bit(rule, dtype, state_dtype, rounding, restore, rng):
    """Five steps, the third of them skipped, from the log of g; in place from the weights as they were
    restored.
    """
    case, seed, decay = RULES[rule], rng.getrandbits(64), 0.0 if rule == "adam-window" else 0.25
    model, data = mlp(dtype), batch()
    kind = {"state_dtype": state_dtype} if case.states else {}
    opt = case(
        model.named_parameters(), seed=seed, rounding=rounding, restore=restore, weight_decay=decay, **kind
    )
    make = lambda theta, stream: Plain(
        Exact, rule, theta, stream, seed=seed, rounding=rounding, state_dtype=state_dtype, weight_decay=decay
    )
    plain = [make(theta, stream) for stream, theta in stream_and_theta(model)]
    restored = []
    begin = opt.rule.begin

    def spy(*args):
        restored[:] = weights(model)
        begin(*args)

    opt.rule.begin = spy
    for step in range(5):
        before = weights(model)
        opt.step(lambda: loss_of(model, *data) * (float("nan") if step == 2 else 1.0))
        if restore == "exact":
            assert same_bits(restored, before)
        for one, theta in zip(plain, restored, strict=True):
            one.theta = theta
            if step != 2:
                one.step(step, log_of(opt), opt.last_losses)
        assert same_bits(weights(model), [one.theta for one in plain])
        for name_at, name in enumerate(case.states):
            got = [opt.state[p][name] for p in model.parameters()]
            assert all(s.dtype is state_dtype and s.is_contiguous() for s in got)
            assert same_bits(got, [one.states[name_at] for one in plain])
    assert not same_bits(weights(model), weights(mlp(dtype)))
    assert int(opt.skipped_steps) == 1


@EACH
def test_steps_follow_the_formula_in_float64(rule, rng):
    case, seed = RULES[rule], rng.getrandbits(64)
    model, data = mlp(), batch()
    decay = 0.25
    opt = case(model.named_parameters(), seed=seed, weight_decay=decay)
    plain = [
        Plain(Float64, rule, theta.double(), stream, seed=seed, rounding="nearest", state_dtype=torch.float64,
              weight_decay=decay)
        for stream, theta in stream_and_theta(model)
    ]  # fmt: skip
    for step in range(6):
        opt.step(lambda: loss_of(model, *data))
        for one in plain:
            one.step(step, log_of(opt), opt.last_losses)
    for p, one in zip(model.parameters(), plain, strict=True):
        sure = ~one.doubtful
        torch.testing.assert_close(p.detach().double()[sure], one.theta[sure], rtol=1e-5, atol=2e-6)


# --- torch's own optimizers, fed with the same gradient ---


@pytest.mark.parametrize("decay", [0.0, 0.25])
@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_equals_torch(name, q, decay, rng):
    """The weights, and the states up to what rounding can change in sums of such terms."""
    seed, lr = rng.getrandbits(64), 0.01
    model, plain, data = mlp(), mlp(), batch()
    named = model.named_parameters
    beta, gain, beta2 = (0.9, 1.0, 0.0) if name == "sgd" else (0.8, 0.2, 0.99)
    # the states of |gradients|
    first, second = ({n: torch.zeros_like(p) for n, p in named()} for _ in range(2))
    if name == "sgd":
        opt = ZOSGD(named(), lr, momentum=0.9, l2=decay, directions=q, seed=seed)
        other = torch.optim.SGD(plain.parameters(), lr, momentum=0.9, weight_decay=decay)
    else:
        mine, theirs = (ZOAdam, torch.optim.Adam) if name == "adam" else (ZOAdamW, torch.optim.AdamW)
        opt = mine(named(), lr, betas=(0.8, 0.99), weight_decay=decay, directions=q, seed=seed)
        other = theirs(plain.parameters(), lr, betas=(0.8, 0.99), weight_decay=decay)
    for step in range(8):
        bad = step == 3  # torch sees no gradient: neither t nor the moments may move
        opt.step(lambda: loss_of(model, *data) * (float("nan") if bad else 1.0))
        if bad:
            continue
        for n, p in plain.named_parameters():
            z = tuple(zk.noise(p.shape, seed=s, stream=zk.stream_of(n)) for s in seeds_of(seed, step, q))
            p.grad = combined(torch.zeros(p.shape), z, tuple(log_of(opt)))  # as ours rounds: the same sign
            terms = [decay * p.detach(), *(c * noise for c, noise in zip(log_of(opt), z, strict=True))]
            size = sum(term.abs() for term in terms)
            first[n], second[n] = (
                beta * first[n] + gain * size,
                beta2 * second[n] + (1 - beta2) * size.square(),
            )
        other.step()
    for (n, p), w in zip(named(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, w, rtol=1e-5, atol=1e-6)
        for key in opt.state[p]:  # in each of seven steps a few roundings, of a square twice as many
            bound = 7 * 8 * 2.0**-24 * (2 * second[n] if key == "exp_avg_sq" else first[n]) + 1e-12
            assert ((opt.state[p][key] - other.state[w][key]).abs() <= bound).all(), key


# --- windows ---


@pytest.mark.parametrize("q", [1, 2])
def test_a_window_as_long_as_the_run_is_the_state(q, rng):
    """Momentum for any q; Adam for one direction, whose square has no cross terms.  The losses are given."""
    pairs = [(ZOSGD, {"momentum": 0.8, "dampening": 0.5})]
    if q == 1:
        pairs.append((ZOAdamW, {"betas": (0.8, 0.9), "adam_eps": 1e-4}))
    seed, (x, _) = rng.getrandbits(64), batch()
    losses = [
        float("nan") if step == 1 else rng.uniform(-1e-3, 1e-3) for step in range(6) for _ in range(2 * q)
    ]
    for kind, options in pairs:
        ends = []
        for window in ({}, {"window": 6}):
            model, answers = mlp(), iter(losses)
            opt = kind(
                model.named_parameters(), 0.01, seed=seed, directions=q, weight_decay=0.1, **options, **window
            )
            for _ in range(6):
                opt.step(lambda: (model(x), next(answers))[1])
            assert bool(opt.state) is not bool(window)
            ends.append(weights(model))
        torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_a_window_forgets_what_is_older(rng):
    """window=1 is a plain step times (1 - dampening)."""
    seed, data, ends = rng.getrandbits(64), batch(), []
    for lr, options in ((0.02, {"momentum": 0.9, "dampening": 0.5, "window": 1}), (0.01, {})):
        model = mlp()
        opt = ZOSGD(model.named_parameters(), lr, seed=seed, **options)
        for _ in range(4):
            opt.step(lambda: loss_of(model, *data))
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


# --- what a rule must leave alone, checkpoints, copies, graphs ---


def run(model, opt, steps, data, bad=()):
    losses = []
    for _ in range(steps):
        at = opt.step_count
        torch.manual_seed(100 + at)
        losses.append(opt.step(lambda: loss_of(model, *data) * (float("nan") if at in bad else 1.0)))
    return torch.stack(losses).nan_to_num()


def snapshot(opt):
    """States by name, and what the rule keeps of groups."""
    held = [{k: v.clone() for k, v in s.items()} for s in opt.state.values()]
    return held, copy.deepcopy(opt.rule.state_dict())


@EACH
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("first", [True, False])
def test_a_loss_that_is_not_finite_leaves_everything(rule, capturable, first, rng):
    """Also as the very first step, where v = 0 and adam_eps = 0 would be 0 / 0."""
    case, data = RULES[rule], batch()
    model = mlp(torch.bfloat16)
    extra = {"adam_eps": 0.0} if rule.startswith("adam") else {}
    opt = case(model.named_parameters(), weight_decay=0.25, capturable=capturable, seed=rng.getrandbits(64),
        **extra)\
        if rule != "adam-window" else case(model.named_parameters(), capturable=capturable,
        **extra)  # fmt: skip
    if not first:
        run(model, opt, 2, data)
    before, (states, kept) = weights(model), snapshot(opt)
    answers = iter([1.0, float("inf"), 0.5] * 9)
    points = len(opt.estimator.points())
    opt.step(lambda: loss_of(model, *data) * next(answers) if points > 1 else None)
    assert int(opt.skipped_steps) == 1
    assert same_bits(weights(model), before)
    for p, old in zip(opt.state.values(), states, strict=False):
        assert all(torch.equal(p[k], v) for k, v in old.items())
    if not first:
        assert opt.rule.state_dict() == kept
    for s in opt.state.values():
        assert all(v.isfinite().all() for v in s.values())
    run(model, opt, 2, data)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not same_bits(weights(model), before)


@BOTH
@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capturable_equals_the_ordinary_step(rule, restore, dtype):
    data, results = batch(), []
    for capturable in (False, True):
        model = mlp(dtype, dropout=0.2)
        lr = torch.tensor(0.05)
        opt = RULES[rule](model.named_parameters(), lr=lr, restore=restore,
            weight_decay=0.0 if rule == "adam" else 0.1,
                          seed=2**63 + 9, capturable=capturable)  # fmt: skip
        schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.8)
        losses = []
        for _ in range(7):
            losses.append(run(model, opt, 1, data, bad=(0, 4)))
            schedule.step()
        states = [t for s in opt.state.values() for t in s.values()]
        results.append((weights(model), states, losses, opt.rule.state_dict()))
    (w1, s1, l1, r1), (w2, s2, l2, r2) = results
    assert same_bits(w1, w2)
    assert same_bits(s1, s2)
    assert torch.equal(torch.stack(l1), torch.stack(l2))
    assert r1 == r2
    assert not same_bits(w1, weights(mlp(dtype)))


@BOTH
@EACH
def test_nothing_is_read_back(rule, restore):
    model, data = mlp(), batch()
    opt = RULES[rule](model.named_parameters(), restore=restore, capturable=True, clip=1.0)
    with NoReads():
        opt.step(lambda: loss_of(model, *data))
        opt.step(lambda: loss_of(model, *data) * float("nan"))
    assert int(opt.skipped_steps) == 1


def addresses(opt):
    tensors = [t for s in opt.state.values() for t in s.values()]
    return [
        t.data_ptr()
        for t in (*tensors, *(t for kept in opt.rule._by_place().values() for t in kept.values()))
    ]


@EACH
def test_a_graph_may_hold_the_addresses(rule):
    """States and what groups keep are written in place: by steps, and by load_state_dict, of a fresh run
    too.
    """
    model, data = mlp(), batch()
    opt = RULES[rule](model.named_parameters(), capturable=True)
    fresh, start = copy.deepcopy(opt.state_dict()), weights(model)
    run(model, opt, 2, data)
    held, saved, middle = addresses(opt), copy.deepcopy(opt.state_dict()), weights(model)
    run(model, opt, 2, data)
    end = weights(model)
    for state, before, steps in ((saved, middle, 2), (fresh, start, 4)):
        opt.load_state_dict(state)
        for p, w in zip(model.parameters(), before, strict=True):
            p.data.copy_(w)
        run(model, opt, steps, data)
        assert addresses(opt) == held
        assert same_bits(weights(model), end)


@BOTH
@EACH
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact(rule, restore, state_dtype):
    """Through a file, from one kind of step to the other; fp32 states of bf16 weights keep their bits."""
    data, case = batch(), RULES[rule]
    options = {"restore": restore, "weight_decay": 0.0 if rule == "adam" else 0.01}
    options |= {"state_dtype": state_dtype} if case.states else {}
    model = mlp(torch.bfloat16, dropout=0.2)
    opt = case(model.named_parameters(), seed=11, **options)
    run(model, opt, 3, data, bad=(1,))
    file = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), file)
    run(model, opt, 3, data)
    for capturable in (False, True):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        model2 = mlp(torch.bfloat16, dropout=0.2)
        opt2 = case(model2.named_parameters(), lr=0.7, capturable=capturable, **options)
        model2.load_state_dict(saved[0])
        opt2.load_state_dict(saved[1])
        run(model2, opt2, 3, data)
        assert same_bits(weights(model), weights(model2))
        for a, b in zip(opt.state.values(), opt2.state.values(), strict=True):
            assert a.keys() == b.keys() == set(case.states)
            assert all(a[k].dtype is b[k].dtype is state_dtype for k in a)
            assert same_bits([*a.values()], [*b.values()])
        assert opt.state_dict()["zo"] == opt2.state_dict()["zo"]


@EACH
def test_copies_go_on_alike(rule):
    data = batch()
    model = mlp()
    opt = RULES[rule](model.named_parameters())
    run(model, opt, 2, data)
    pairs = [copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))]
    run(model, opt, 2, data)
    for model2, opt2 in pairs:
        run(model2, opt2, 2, data)
        assert same_bits(weights(model), weights(model2))


@EACH
def test_perturbation_and_update_have_one_z(rule, rng):
    """z as the closure sees it (theta = 0, eps = 1), scaled as the rule scales it, is the first update."""
    case, p, seen = RULES[rule], nn.Parameter(torch.zeros(41)), []
    a = torch.linspace(-1, 1, 41)

    def closure():
        seen.append(p.detach() * 1)
        return (p * a).sum() + (p * p * a).sum()

    opt = case([p], eps=1.0, seed=rng.getrandbits(64))
    opt.step(closure)
    z = [seen[i] for i, (_, sign) in enumerate(opt.estimator.points()) if sign == 1]
    assert all(v.std() > 0.5 for v in z)
    total = sum(c * v for c, v in zip(log_of(opt), z, strict=True))
    if rule.startswith("momentum"):
        expected = -LR * 0.75 * total
    elif rule == "hizoo":
        l0, plus, minus = (float(x) for x in opt.last_losses)
        h = 1 - case.alpha + case.alpha * abs(plus + minus - 2 * l0) / 2 * z[0] ** 2
        expected = -LR * total / h.sqrt()
    elif rule == "adam-window":
        squares = sum((c * v) ** 2 for c, v in zip(log_of(opt), z, strict=True))
        expected = -LR * total / squares.sqrt()
    elif rule == "adam":
        expected = -LR * total / (total.abs() + 1e-3)
    elif rule == "adamw":
        expected = -LR * total / (total.abs() + 1e-8)
    else:
        chain = combined(torch.zeros(41), tuple(z), tuple(log_of(opt)))  # as the rule rounds: the same sign
        expected = -LR * chain.sign()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-6)


# --- groups, frozen parameters, other parts ---


def test_groups_have_their_own_hyper_parameters(rng):
    """Each group is as if it were alone, where g is one and the same; empty groups and other dtypes among
    them.
    """
    seed = rng.getrandbits(64)
    theta = [torch.randn(17), torch.randn(3, 5).bfloat16()]
    kinds = [
        (
            ZOAdamW,
            [
                {"betas": (0.5, 0.75), "adam_eps": 1e-2},
                {"betas": (0.9, 0.99), "lr": 0.1, "weight_decay": 0.2},
            ],
        ),
        (ZOSGD, [{"momentum": 0.5}, {"momentum": 0.9, "dampening": 0.5, "l2": 0.25}]),
        (ZOSGD, [{"momentum": 0.5, "window": 2}, {"momentum": 0.25, "lr": 0.1}]),
    ]
    answers = [0.5, 0.25, 1.0, -1.0, 0.0, 0.75]
    for kind, options in kinds:
        shared = {"window": 2} if "window" in options[0] else {}
        options = [{k: v for k, v in o.items() if k != "window"} for o in options]
        together = [nn.Parameter(t.clone()) for t in theta]
        alone = [nn.Parameter(t.clone()) for t in theta]
        base = {"momentum": 0.1} if kind is ZOSGD else {}
        one, *many = (
            kind([{"params": [(str(i), p)], **options[i]} for i, p in group] + [{"params": [],
            "param_names": []}],
                 **{"lr": 0.05, "seed": seed, **base, **shared})
            for group in ([*enumerate(together)], [(0, alone[0])], [(1, alone[1])])
        )  # fmt: skip
        for opt, params in ((one, together), (many[0], alone[:1]), (many[1], alone[1:])):
            values = iter(answers)
            for _ in range(3):
                opt.step(lambda: (sum(p.float().sum() for p in params), next(values))[1])
        assert same_bits([p.detach() for p in together], [p.detach() for p in alone])
        assert not torch.equal(together[0], theta[0])


@STATEFUL
def test_frozen_parameters_keep_their_state(rule):
    data = batch()
    model = mlp()
    opt = RULES[rule](model.named_parameters())
    frozen = model[0].weight.requires_grad_(False)
    run(model, opt, 1, data)
    assert frozen not in opt.state or not opt.state[frozen]
    frozen.requires_grad_(True)
    run(model, opt, 1, data)
    frozen.requires_grad_(False)
    held, value = {k: v.clone() for k, v in opt.state[frozen].items()}, frozen.clone()
    assert set(held) == set(RULES[rule].states)
    run(model, opt, 2, data)
    assert torch.equal(frozen, value)
    assert all(torch.equal(opt.state[frozen][k], v) for k, v in held.items())


@pytest.mark.parametrize("rule", ["momentum", "adamw", "sign", "momentum-window", "adam-window"])
def test_masked_weights_and_their_states_do_not_move(rule, rng):
    p = nn.Parameter(torch.randn(300))
    keep = torch.rand(300) < 0.5
    for direction in (GivenMask({p: keep}), RandomMask(0.5)):
        start = p.detach().clone()
        opt = RULES[rule]([p], direction=direction, seed=rng.getrandbits(64))
        for _ in range(3):
            opt.step(lambda: (p * p).sum())
        moved = p != start
        assert 80 < moved.sum() < 220
        if isinstance(direction, GivenMask):
            assert torch.equal(moved, keep)
        for name in RULES[rule].states:
            assert torch.equal(opt.state[p][name] != 0, moved)


def test_the_curvature_shrinks_steps_where_the_loss_bends(rng):
    """A steep and a flat half: h grows in the steep one, and the loss falls."""
    p = nn.Parameter(torch.ones(64))
    scale = torch.cat((torch.full((32,), 100.0), torch.full((32,), 0.01)))
    opt = HiZOO([p], 1e-4, alpha=1e-5, seed=rng.getrandbits(64))
    losses = [float(opt.step(lambda: (scale * p * p).sum() / 2)) for _ in range(200)]
    assert losses[-1] < 0.5 * losses[0]
    h = opt.state[p]["curvature"]
    assert (h > 0).all()
    assert h.mean() > 1.5


def test_several_rules_share_nothing():
    """An optimizer is as if it were alone."""
    data = batch()
    a, b = mlp(), mlp()
    first, second = ZOAdam(a.named_parameters(), 0.1), ZOAdam(b.named_parameters(), 0.1)
    for _ in range(3):
        run(a, first, 1, data)
        run(b, second, 1, data)
    assert same_bits(weights(a), weights(b))
    assert first.rule is not second.rule


# --- errors ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: ZOSGD(p, 0.1, momentum=1.0), r"ZOSGD: momentum: expected a number in \[0, 1\), got 1.0"),
        (lambda p: ZOSGD(p, 0.1, momentum=0.9, dampening=-1), "dampening: expected a finite number >= 0"),
        (lambda p: ZOSGD(p, 0.1, l2=0.1), "l2: expected 0 without momentum"),
        (
            lambda p: ZOSGD(p, 0.1, momentum=0.9, l2=0.1, window=2),
            "l2: expected 0 without momentum .* with a window",
        ),
        (lambda p: ZOSGD(p, 0.1, window=2), "dampening, window: expected momentum > 0"),
        (lambda p: ZOSGD(p, 0.1, momentum=0.9, window=0), "window: expected an integer >= 1"),
        (
            lambda p: ZOSGD(p, 0.1, momentum=0.9, state_dtype=torch.float16),
            "state_dtype: expected torch.float32 or",
        ),
        (
            lambda p: ZOSGD(p, 0.1, momentum=0.9, window=2, subset=Blocks()),
            "window: expected a direction that is not",
        ),
        (
            lambda p: ZOAdam(p, 0.1, window=2, direction=RandomMask(0.5, 3)),
            "window: expected a direction that is not",
        ),
        (lambda p: ZOAdam(p, 0.1, weight_decay=0.1, window=2), "weight_decay: expected 0 with a window"),
        (lambda p: ZOAdam(p, 0.1, betas=(0.9, 1.0)), r"betas\[1\]: expected a number in \[0, 1\)"),
        (lambda p: ZOAdam(p, 0.1, betas=0.9), "betas: expected two numbers"),
        (lambda p: ZOAdam(p, 0.1, adam_eps=-1.0), "adam_eps: expected a finite number >= 0"),
        (
            lambda p: ZOAdam([{"params": p, "betas": (2, 0)}], 0.1),
            r"betas\[0\]: expected a number in \[0, 1\)",
        ),
        (lambda p: ZOSignSGD(p, 0.1, l2=float("nan")), "l2: expected a finite number >= 0"),
        (lambda p: HiZOO(p, 0.1, alpha=1.0), r"alpha: expected a number in \[0, 1\)"),
        (
            lambda p: ZerothOrder(p, 0.1, estimator=TwoSided(), rule=Curvature()),
            "estimator, direction: expected Three",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make([nn.Parameter(torch.ones(3))])


def test_another_rules_state_is_refused():
    model, data = mlp(), batch()
    make = [
        lambda p: ZOSGD(p, 0.1),
        lambda p: ZOSGD(p, 0.1, momentum=0.5),
        lambda p: ZOSGD(p, 0.1, momentum=0.5, window=2),
        lambda p: ZOSGD(p, 0.1, momentum=0.5, window=3),
        lambda p: ZOAdam(p, 0.1),
        lambda p: ZOConservative(p, 0.1),
        lambda p: HiZOO(p, 0.1),
    ]
    optimizers = [m(model.named_parameters()) for m in make]
    for opt in optimizers:
        run(model, opt, 1, data)
    saved = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
    for i, opt in enumerate(optimizers):
        for j, state in enumerate(saved):
            if i == j:
                opt.load_state_dict(state)
            else:
                with pytest.raises(ValueError, match=r"(param_groups|state_dict): expected"):
                    opt.load_state_dict(state)
        assert opt.state_dict()["zo"] == saved[i]["zo"]
