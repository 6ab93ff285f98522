# ruff: noqa: B023  closures of a loop run inside it
"""Integer layers, and the two ways to train them: their scales (QZO) and their integers (QuZO)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import Live, watched
from torch import nn
from zosgd_cases import combined, same_bits

import zokernels as zk
from zokernels import quantize
from zokernels.backends.reference.combine import fma
from zokernels.backends.reference.noise import uniform16
from zokernels.contract import DOMAIN_ROUNDING, seed_to_int64
from zokernels.optim import QES, ZOSGD, QuZO
from zokernels.quantize import (
    QuantizedConv,
    QuantizedLinear,
    limit_of,
    named_integers,
    named_scales,
    pack_int4,
    quantize_,
    unpack_int4,
)
from zokernels.trajectory import replay_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = pytest.mark.parametrize("bits", [8, 4])


def model(rng, dtype=torch.float32):
    torch.manual_seed(rng.getrandbits(32))
    return nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 3)).to(dtype)


def batch():
    return torch.randn(16, 7), torch.randint(3, (16,))


@pytest.mark.parametrize("n", [0, 1, 2, 7, 16])
def test_packing(n, rng):
    torch.manual_seed(rng.getrandbits(32))
    q = torch.randint(-8, 8, (3, 5, n), dtype=torch.int8)
    packed = pack_int4(q)
    assert (packed.dtype, packed.shape) == (torch.uint8, (3, 5, (n + 1) // 2))
    assert torch.equal(unpack_int4(packed, n), q)
    every = torch.arange(-8, 8, dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(every), 16), every)
    assert pack_int4(torch.tensor([1, -2], dtype=torch.int8)).tolist() == [0xE1]


@BITS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "group_size"), [(7, None), (12, 4), (9, 1)])
@pytest.mark.parametrize("scale_dtype", [None, torch.float32])
def test_weights_are_rounded_to_the_nearest_step(bits, dtype, inputs, group_size, scale_dtype, rng):
    torch.manual_seed(rng.getrandbits(32))
    linear = nn.Linear(inputs, 5, bias=rng.random() < 0.5).to(dtype)
    with torch.no_grad():
        linear.weight[2] = 0
    layer = QuantizedLinear.from_linear(linear, bits, group_size, scale_dtype=scale_dtype)
    assert layer.packed == (bits == 4)
    assert layer.scale.dtype is (scale_dtype or dtype)
    size, limit = group_size or inputs, limit_of(bits)
    assert layer.scale.shape == (5, inputs // size)
    assert layer.integers.abs().max() == limit
    step = layer.scale.double().repeat_interleave(size, 1)
    error = (linear.weight.double() - layer.integers.double() * step).abs()
    # Half a step.  And the step itself is rounded, by up to half the distance to the next number: limit times
    # that.
    above = torch.nextafter(layer.scale, torch.full_like(layer.scale, float("inf"))).double()
    spacing = above.repeat_interleave(size, 1) - step
    assert (error <= (step / 2 + limit * spacing / 2) * (1 + 1e-5)).all()
    x = torch.randn(4, inputs).to(dtype)
    dense = (layer.integers.to(layer.scale.dtype) * layer.scale.repeat_interleave(size, 1)).to(dtype)
    assert torch.equal(layer(x), F.linear(x, dense, linear.bias))


def test_gradients_of_scales(rng):
    layer = QuantizedLinear.from_linear(model(rng)[0], 4)
    x = torch.randn(5, 7)
    layer(x).square().sum().backward()
    assert layer.scale.grad.abs().min() > 0
    assert not layer.weight.requires_grad


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"c": nn.Linear(4, 6), "d": nn.Linear(4, 6)})
        self.attention = nn.MultiheadAttention(4, 2)
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight


def test_which_layers_are_replaced():
    model = Shared()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match="quantize_: skip: expected 'head', whose weight 'embedding' holds as well"
    ):
        quantize_(model)
    assert type(model.a) is nn.Linear
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert quantize_(model, 4, skip=["head", "inner"]) == ["a"]
    assert type(model.a) is QuantizedLinear
    assert model.b is model.a
    assert type(model.inner["c"]) is type(model.head) is nn.Linear
    assert type(model.attention.out_proj) is not QuantizedLinear
    assert quantize_(model, skip=["head", "inner.d"]) == ["inner.c"]


@BITS
def test_state_dict(bits, rng):
    a, b = model(rng), model(rng)
    x, _ = batch()
    for m in (a, b):
        quantize_(m, bits)
    assert not torch.equal(a(x), b(x))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x))
    assert sorted(a.state_dict()) == sorted(
        f"{i}.{name}" for i in (0, 2) for name in ("weight", "scale", "bias")
    )


# --- QZO ---


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qzo_is_zosgd_over_the_scales(bits, dtype, rng):
    m, lr, eps, seed = model(rng), 1e-3, 2.0**-9, rng.getrandbits(63)
    quantize_(m, bits, scale_dtype=dtype)
    x, y = batch()
    loss = lambda values: F.cross_entropy(torch.func.functional_call(m, values, (x,)), y)
    others = {k: v.clone() for k, v in m.state_dict().items() if "scale" not in k}
    opt = ZOSGD(named_scales(m), lr=lr, eps=eps, seed=seed)
    for step, clip in enumerate((1e3, 1e-3, 1e3)):
        opt.param_groups[0]["clip"] = clip
        theta = {n: p.detach().clone() for n, p in named_scales(m)}
        own = seed_to_int64(zk.derive_seed(seed, step))
        z = {n: zk.noise(p.shape, seed=own, stream=zk.stream_of(n)) for n, p in theta.items()}
        opt.step(lambda: F.cross_entropy(m(x), y))
        with torch.no_grad():
            plus, minus = (loss({n: combined(p, z[n], s * eps) for n, p in theta.items()}) for s in (1, -1))
        assert torch.equal(torch.stack(opt.last_losses), torch.stack([plus, minus]))
        g = float(((plus.double() - minus.double()) / (2 * eps)).float().clamp(-clip, clip))
        assert g != 0
        assert float(opt.last_projected_gradient) == g
        want = [
            combined(p, z[n], -lr * g, stochastic_seed=own, stream=zk.stream_of(n)) for n, p in theta.items()
        ]
        assert same_bits([p.detach() for _, p in named_scales(m)], want)
        assert not same_bits([*theta.values()], want) or dtype is torch.bfloat16
    assert all(torch.equal(m.state_dict()[k], v) for k, v in others.items())


# --- QuZO ---


def requantized(q, z, c, seed, stream, limit):
    acc = fma(torch.tensor(c, dtype=torch.float32).expand(q.shape), z, q.float()).double()
    u = uniform16(torch.tensor(seed), stream, DOMAIN_ROUNDING, 0, q.numel()).view_as(q)
    return (acc + u.double() / 65536).float().floor().clamp(-limit, limit).to(torch.int8)


@BITS
@pytest.mark.parametrize(("dist", "weight_decay"), [("normal", 0.0), ("rademacher", 0.0), ("normal", 1e-4)])
def test_quzo_steps_equal_plain_pytorch(bits, dist, weight_decay, rng):
    m, lr, eps, seed = model(rng), 2000.0, 0.75, rng.getrandbits(63)
    quantize_(m, bits, packed=False)
    x, y = batch()
    layers = {"0.weight": m[0], "2.weight": m[2]}
    scales = [p.detach().clone() for p in m.parameters()]
    call = lambda w: F.cross_entropy(torch.func.functional_call(m, w, (x,)), y)
    opt = QuZO(named_integers(m), lr=lr, eps=eps, seed=seed, dist=dist, weight_decay=weight_decay)
    moved = 0
    for step in range(3):
        q = {n: layer.weight.clone() for n, layer in layers.items()}
        own = seed_to_int64(zk.derive_seed(seed, step))
        side = seed_to_int64(zk.derive_seed(own, 0))
        z = {n: zk.noise(w.shape, seed=own, stream=zk.stream_of(n), dist=dist) for n, w in q.items()}
        copies = lambda c, of: {
            n: requantized(w, z[n], c, of, zk.stream_of(n), limit_of(bits)) for n, w in q.items()
        }
        with torch.no_grad():
            plus, minus = (call(copies(s * eps, side)) for s in (1, -1))
        opt.step(lambda: F.cross_entropy(m(x), y))
        assert torch.equal(torch.stack(opt.last_losses), torch.stack([plus, minus]))
        g = float(((plus.double() - minus.double()) / (2 * eps)).float())
        assert float(opt.last_projected_gradient) == g
        if weight_decay:
            decay = torch.tensor(1 - lr * weight_decay, dtype=torch.float32)
            q = {n: decay * w.float() for n, w in q.items()}
        for n, want in copies(-lr * g, own).items():
            assert torch.equal(layers[n].weight, want)
            moved += int((want != q[n].round()).sum())
    assert moved
    assert same_bits([p.detach() for p in m.parameters()], scales)


def test_rounding_is_unbiased_and_the_updates_is_its_own(rng):
    """The mean of S(q + c z) over elements is q + c z, and S' of the same numbers errs independently of S."""
    n, c, q = 200_000, 0.4, torch.randint(-100, 100, (200_000,), dtype=torch.int8)
    seed = seed_to_int64(rng.getrandbits(64))
    exact = q.double() + c * zk.noise(n, seed=seed, stream=5).double()
    errors = []
    for rounding_seed in (zk.derive_seed(seed, 0), seed):
        out = torch.empty_like(q)
        zk.requantize(out, q, seed, c, streams=5, rounding_seed=rounding_seed)
        errors.append(out.double() - exact)
        assert errors[-1].abs().max() < 1 + 1e-4
        assert errors[-1].mean().abs() < 6 * errors[-1].std() / n**0.5
    assert torch.corrcoef(torch.stack(errors))[0, 1].abs() < 6 / n**0.5
    assert errors[0].std() > 0.3


@BITS
def test_range(bits, rng):
    limit = limit_of(bits)
    weight = (torch.randint(0, 2, (4001,)) * 2 - 1).mul(limit).to(torch.int8)
    before, seen, losses = weight.clone(), [], iter((60.0, 0.0))  # g = 60 / (2 eps) = 10
    opt = QuZO([("w", weight)], lr=1.0, eps=3.0, bits=bits, seed=rng.getrandbits(64))
    opt.step(lambda: seen.append(weight.float() * 1) or next(losses))
    for values in (*seen, weight):
        assert (values.min(), values.max()) == (-limit, limit)
        assert (values != before).any()


def test_integers_are_written_once(rng):
    m = model(rng)
    quantize_(m)
    before, (x, y) = [layer.weight.clone() for layer in (m[0], m[2])], batch()
    memory = [layer.weight.detach() for layer in (m[0], m[2])]  # in a forward the layers have that of copies
    opt = QuZO(named_integers(m), lr=1e5, seed=rng.getrandbits(64))

    def closure(error=None):
        assert all(map(torch.equal, memory, before))
        loss = F.cross_entropy(m(x), y)
        if error:
            raise error
        return loss

    with pytest.raises(KeyError):
        opt.step(lambda: closure(KeyError()))
    assert opt.step_count == 0
    opt.step(closure)
    assert any(not torch.equal(layer.weight, w) for layer, w in zip((m[0], m[2]), before, strict=True))
    before[:] = [layer.weight.clone() for layer in (m[0], m[2])]
    with pytest.warns(UserWarning, match="loss not finite"):
        opt.step(lambda: closure() * float("nan"))
    assert all(torch.equal(layer.weight, w) for layer, w in zip((m[0], m[2]), before, strict=True))


@pytest.mark.parametrize("capturable", [False, True])
def test_a_saved_run_goes_on(capturable, rng):
    a, seed, (x, y) = model(rng), rng.getrandbits(64), batch()
    quantize_(a, packed=False)
    b = copy.deepcopy(a)
    make = lambda m, **options: QuZO(named_integers(m), lr=20.0, directions=2, **options)
    run = lambda opt, m: [opt.step(lambda: F.cross_entropy(m(x), y)) for _ in range(2)]
    first = make(a, seed=seed)
    run(first, a)
    b.load_state_dict(a.state_dict())
    second = make(b, capturable=capturable)
    second.load_state_dict(first.state_dict())
    assert torch.equal(torch.stack(run(first, a)), torch.stack(run(second, b)))
    assert torch.equal(a[0].weight, b[0].weight)


def trained(opt, m, x, y, steps=3):
    for _ in range(steps):
        opt.step(lambda: F.cross_entropy(m(x[:, :6]), y))
    return [layer.integers.clone() for layer in (m[0], m[2])]


TRAINS = {
    "QuZO": lambda m, **o: QuZO(named_integers(m), lr=1e3, eps=2.0, directions=2, weight_decay=1e-4, **o),
    "QuZO, quantized noise": lambda m, **o: QuZO(
        named_integers(m), lr=1e3, eps=2.0, quantized_noise=True, **o
    ),
    "QES": lambda m, **o: QES(named_integers(m), lr=20.0, eps=1.0, population=4, maximize=False, **o),
    "QES, window": lambda m, **o: QES(
        named_integers(m), lr=20.0, eps=1.0, population=4, window=3, mirrored=True, maximize=False, **o
    ),
}


@pytest.mark.parametrize("method", TRAINS)
def test_packed_integers_train_as_those_of_a_byte(method, rng, tmp_path):
    torch.manual_seed(rng.getrandbits(32))
    one = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    two, seed, path = copy.deepcopy(one), rng.getrandbits(62), tmp_path / "run.zk"
    quantize_(one, 4, packed=False)
    quantize_(two, 4)
    assert [layer.packed for layer in (one[0], two[0], two[2])] == [False, True, True]
    (x, y), start, base = batch(), one[0].weight.clone(), copy.deepcopy(two)
    want = trained(TRAINS[method](one, seed=seed), one, x, y)
    opt = TRAINS[method](two, seed=seed, trajectory=path)
    assert all(map(torch.equal, trained(opt, two, x, y), want))
    assert not torch.equal(want[0], start)
    opt.trajectory.close()
    assert replay_(base, path) == 3
    assert all(torch.equal(base[i].weight, two[i].weight) for i in (0, 2))


@pytest.mark.parametrize("bits", [4, 8])
def test_quzo_with_quantized_noise(bits, rng):
    """d = S(eps z) once for both sides: clamp(q +- d); q <- clamp(floor(q - lr g d / eps + u))."""
    lr, eps, seed, limit = 0.6, 1.7, rng.getrandbits(62), limit_of(bits)
    q = torch.randint(-limit, limit + 1, (40, 10)).to(torch.int8)
    target, params = torch.randn(40, 10).double(), q.clone()
    loss_of = lambda w: ((w.double() - target) ** 2).mean()
    opt = QuZO([("w", params)], lr, eps, bits=bits, quantized_noise=True, seed=seed)
    stream, reach = zk.stream_of("w"), min(127, (1 << bits) - 1)
    for step in range(4):
        s = zk.derive_seed(seed, step)
        d = torch.zeros(40, 10, dtype=torch.int8)
        zk.requantize_(d, s, eps, streams=stream, low=-reach, high=reach, rounding_seed=zk.derive_seed(s, 0))
        d = d.int()
        sides = [loss_of((q + sign * d).clamp(-limit, limit)) for sign in (1, -1)]
        g = ((sides[0] - sides[1]) / (2 * eps)).float().double()
        opt.step(lambda: loss_of(params))
        torch.testing.assert_close(opt.last_projected_gradient.double(), g, rtol=0, atol=0)
        exact = q.double() - (lr * g / eps) * d.double()
        low, high = (f(exact).clamp(-limit, limit) for f in (torch.floor, torch.ceil))
        # Rounded to one of its neighbours, and (as d is the same for many) not all of them to the same one.
        near = (params.double() - low).abs() < 1e-9
        assert (near | ((params.double() - high).abs() < 1e-9) | ((exact - exact.round()).abs() < 1e-4)).all()
        apart = (high > low) & ((exact - exact.round()).abs() > 0.2)
        if apart.sum() > 60:  # a share of 0.2 to 0.8 each: all alike once in 1e6 at most
            assert 0 < near[apart].float().mean() < 1
        q = params.clone()
    still = params.clone()
    with pytest.warns(UserWarning, match="loss not finite"):
        opt.step(lambda: loss_of(params) * float("nan"))
    assert torch.equal(params, still)


def test_the_rounding_of_quantized_noise_is_unbiased(rng):
    """Every weight is 0 and d is 0 or +-1: the mean update along d is c, whatever fraction of a step c is."""
    n, c = 100_000, 0.3
    q = torch.zeros(n, dtype=torch.int8)
    opt = QuZO([("w", q)], 1.0, 1.0, quantized_noise=True, seed=rng.getrandbits(62))
    losses = iter((-c, c))  # g = -c
    opt.step(lambda: next(losses) + 0 * q.double().sum())
    s = zk.derive_seed(opt.seed, 0)
    d = torch.zeros(n, dtype=torch.int8)
    zk.requantize_(d, s, 1.0, streams=zk.stream_of("w"), rounding_seed=zk.derive_seed(s, 0))
    error = q.double() - c * d.double()
    assert error.abs().max() < 1
    assert error.mean().abs() < 6 * error.std() / n**0.5
    assert (error * d).mean().abs() < 6 * (error * d).std() / n**0.5
    assert (q[d == 0] == 0).all()


def test_the_window_of_qes_is_its_kept_error(rng):
    """In mid-range and from e = 0 both are the same, as long as the window is longer than the run."""
    start, seed = torch.zeros(60, dtype=torch.int8), rng.getrandbits(62)
    reward = lambda w: -((w.double() - 5) ** 2).sum()

    def run(steps=5, **options):
        w = start.clone()
        opt = QES([("w", w)], 0.9, 0.8, population=4, seed=seed, **options)
        for _ in range(steps):
            opt.step(lambda: reward(w))
        assert w.abs().max() < 100
        return w, opt

    want, _ = run(spread=False)
    found, opt = run(window=5)
    assert torch.equal(found, want)
    assert not torch.equal(want, start)
    assert not opt.state
    short, _ = run(window=1)
    assert not torch.equal(short, want)  # without any error of the steps before
    none, _ = run(window=5, error_decay=0.0)
    assert torch.equal(none, short)


def test_qes_with_mirrored_members():
    w = torch.zeros(50, dtype=torch.int8)
    opt, seen = QES([("w", w)], 0.0, 1.0, population=4, mirrored=True), []
    opt.step(lambda: seen.append(w.clone().int()) or w.double().sum())
    assert len(seen) == 4
    assert torch.equal(seen[0], -seen[1])
    assert torch.equal(seen[2], -seen[3])
    assert seen[0].any()
    assert not torch.equal(seen[0], seen[2])
    with pytest.raises(
        ValueError, match="QES: population: expected an even number >= 2 with mirrored, got 5"
    ):
        QES([("w", w)], 0.1, population=5, mirrored=True)


def test_mixed_bits(rng):
    m = model(rng)
    quantize_(m, 4, skip=["2"], packed=False)
    quantize_(m, 8)
    opt = QuZO(named_integers(m), lr=1e4, eps=2.0, seed=rng.getrandbits(64))
    x, y = batch()
    for _ in range(3):
        opt.step(lambda: F.cross_entropy(m(x), y))
    assert m[0].weight.abs().max() == 7
    assert m[2].weight.abs().max() > 7


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    return torch.tensor(x / 16).float(), torch.tensor(y)


def pretrained(x, y):
    """First-order training on other labels: digits above 6 have the next one's."""
    m = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    opt = torch.optim.Adam(m.parameters(), lr=1e-2)
    for _ in range(30):
        opt.zero_grad()
        F.cross_entropy(m(x), (y + (y > 6)) % 10).backward()
        opt.step()
    return m


@pytest.mark.parametrize(
    ("bits", "method", "options"),
    [
        (8, "qzo", {"lr": 1e-6, "eps": 1e-4, "clip": 1000.0}),
        (4, "qzo", {"lr": 5e-5, "eps": 1e-4, "clip": 1000.0}),
        (8, "quzo", {"lr": 300.0, "eps": 1.0, "directions": 4}),
        (4, "quzo", {"lr": 3.0, "eps": 0.25, "directions": 4}),
    ],
)
def test_training_on_digits(bits, method, options, digits, rng):
    x, y = digits
    torch.manual_seed(rng.getrandbits(32))
    m = pretrained(x[:512], y[:512])
    quantize_(m, bits, packed=False, scale_dtype=torch.float32)
    x, y, seed = x[512:1024], y[512:1024], rng.getrandbits(64)
    loss = lambda: F.cross_entropy(m(x), y)
    opt = (
        ZOSGD(named_scales(m), seed=seed, **options)
        if method == "qzo"
        else QuZO(named_integers(m), seed=seed, **options)
    )
    before = loss().item()
    for _ in range(120):
        opt.step(loss)
    assert loss().item() < 0.85 * before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QuantizedLinear(8, 8, bits=3), "QuantizedLinear: bits: expected 8 or 4, got 3"),
        (
            lambda: QuantizedLinear(8, 8, group_size=3),
            "QuantizedLinear: group_size: expected a divisor of 8 inputs, got 3",
        ),
        (
            lambda: QuantizedLinear(8, 8, packed=True),
            "QuantizedLinear: packed: expected False with 8 bits, got True",
        ),
        (lambda: QuantizedLinear(8, 8, dtype=torch.float64), "QuantizedLinear: dtype: expected float32"),
        (lambda: quantize_(nn.Linear(2, 2)), "quantize_: module: expected a module that holds layers"),
        (
            lambda: quantize_(nn.Sequential(nn.Linear(2, 2)), skip=["1"]),
            "quantize_: skip: expected names of modules, got '1'",
        ),
        (
            lambda: named_integers(QuantizedLinear(5, 4, bits=4)),
            "expected an even number of inputs, or packed=False, got packed rows of 5",
        ),
        (
            lambda: QuZO([torch.zeros(3)], 1.0),
            r"QuZO: params\[0\]: expected dtype int8, or uint8 .*, got torch.float32",
        ),
        (
            lambda: QuZO([torch.zeros(3, dtype=torch.uint8)], 1.0),
            r"QuZO: params\[0\]: expected dtype int8, or uint8 that packs two integers of 4 bits",
        ),
        (
            lambda: QuZO([torch.zeros(3, dtype=torch.int8)], 1.0, bits=9),
            r"QuZO: bits: expected an integer in \[2, 8\], got 9",
        ),
        (
            lambda: QuZO([torch.zeros(3, dtype=torch.int8)], 1.0, restore="inplace"),
            "QuZO: restore: expected 'exact'",
        ),
    ],
)
def test_arguments(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_frozen_integers_of_other_optimizers_stay_out():
    """int8 weights among a model's parameters are frozen ones to an optimizer of floats."""
    frozen = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    p = nn.Parameter(torch.ones(3))
    ZOSGD([("frozen", frozen), ("p", p)], lr=0.1).step(lambda: p.sum())
    assert torch.equal(frozen, torch.ones(3, dtype=torch.int8))
    assert not torch.equal(p, torch.ones(3))


EVERY = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def steps_of(layer, rows):
    """W as scale times integers, each group of neighbours in a row with its scale: float64 [rows, in]."""
    scale = layer.scale.detach().double().repeat_interleave(layer.group_size, 1)
    return layer.integers.double() * scale[:rows]


@BITS
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_convolution_is_that_of_its_rounded_weights(bits, kind, rng):
    torch.manual_seed(rng.getrandbits(32))
    dims, mode = int(kind.__name__[4]), rng.choice(["zeros", "circular", "reflect"])
    conv = kind(
        6, 4, 3, stride=2, padding=1, dilation=1, groups=2, bias=rng.random() < 0.5, padding_mode=mode
    )
    inner = nn.Sequential(conv)
    assert quantize_(inner, bits, group_size=9, layers=EVERY) == ["0"]
    layer, x = inner[0], torch.randn(2, 6, *[5] * dims)
    assert quantize_(inner, bits, layers=EVERY) == []  # nothing in it is found a second time
    weight = steps_of(layer, 4).float().view_as(conv.weight)
    assert (weight - conv.weight).abs().max() <= layer.scale.max() * 0.5001
    # Integers of 7 bits times a scale of 24 are one rounding in fp32, as from float64.
    assert torch.equal(layer(x), conv._conv_forward(x, weight, conv.bias))
    again = quantized_like(conv, bits)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(copy.deepcopy(again)(x), layer(x))


def quantized_like(conv, bits):
    from zokernels.quantize import QuantizedConv

    layer = QuantizedConv(conv, bits=bits, group_size=9)
    assert layer.integers.count_nonzero() == 0  # made for a state_dict
    return layer


@BITS
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_embedding_gives_rows_of_its_rounded_table(bits, dtype, rng):
    torch.manual_seed(rng.getrandbits(32))
    table = nn.Embedding(11, 6, padding_idx=3).to(dtype)
    holder = nn.Sequential(table)
    assert quantize_(holder, bits, group_size=3, layers=[nn.Embedding]) == ["0"]
    ids = torch.randint(11, (4, 5))
    assert torch.equal(holder(ids), steps_of(holder[0], 11).to(dtype)[ids])
    assert holder[0].padding_idx == 3


def test_all_quantised_layers_are_trained_alike(rng):
    torch.manual_seed(rng.getrandbits(32))
    net = nn.Sequential(nn.Embedding(9, 4), nn.Conv1d(5, 3, 2), nn.Flatten(), nn.Linear(9, 2))
    assert quantize_(net, 8, layers=EVERY) == ["0", "1", "3"]
    assert [name for name, _ in named_scales(net)] == ["0.scale", "1.scale", "3.scale"]
    optimizer = QuZO(named_integers(net), lr=50.0, eps=2.0)
    ids, y = torch.randint(9, (16, 5)), torch.randint(2, (16,))
    before = [m.integers.clone() for m in net if hasattr(m, "integers")]
    for _ in range(5):
        assert optimizer.step(lambda: F.cross_entropy(net(ids), y)).isfinite()
    after = [m.integers for m in net if hasattr(m, "integers")]
    assert all((a != b).any() for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(
    ("layers", "net", "message"),
    [
        ([nn.Bilinear], nn.Sequential(), "layers: expected kinds of layers among Linear, Conv1d, .*Bilinear"),
        ([nn.Conv2d], nn.Conv2d(1, 1, 1), r"module: .* use QuantizedConv.from_conv"),
        ([nn.Embedding], nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)), "max_norm: expected None"),
        ([nn.Linear, nn.Conv2d], nn.Sequential(nn.Linear(4, 1), nn.Conv2d(3, 2, 3)), "group_size"),
    ],
)
def test_layers_that_cannot_be_quantised(layers, net, message):
    kinds = [type(m) for m in net.modules()]
    with pytest.raises((ValueError, TypeError), match=message):
        quantize_(net, group_size=4, layers=layers)
    assert [type(m) for m in net.modules()] == kinds


def layer_of_tiles(kind, dtype, rng):
    """A layer whose W is several tiles, its formula in float64, and an input."""
    bits, group_size = rng.choice(((8, None), (8, 16), (4, None), (4, 16)))
    bias = rng.random() < 0.5
    if kind is nn.Linear:
        plain, x = nn.Linear(192, 150, bias), torch.randn(2, rng.choice((1, 3, 20, 40)), 192)
        function, shape, options = F.linear, (150, 192), {}
        layer = QuantizedLinear.from_linear(plain.to(dtype), bits, group_size)
    else:
        dims = int(kind.__name__[4])
        channels = {1: 64, 2: 32, 3: 16}[dims]
        plain, x = kind(channels, 90, 3, 2, 1, bias=bias), torch.randn(2, channels, 5, *[4] * (dims - 1))
        function, shape = getattr(F, f"conv{dims}d"), (90, channels, *[3] * dims)
        options = {"stride": 2, "padding": 1}
        layer = QuantizedConv.from_conv(plain.to(dtype), bits, group_size)
    weight = steps_of(layer, None).view(shape)
    b = None if layer.bias is None else layer.bias.detach().double()
    return layer, lambda x: function(x.double(), weight, b, **options), x.to(dtype)


KINDS = pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d])


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_products_of_tiles(kind, dtype, rng, monkeypatch):
    torch.manual_seed(rng.getrandbits(32))
    monkeypatch.setitem(quantize._TILE, "cpu", 10_000)
    layer, formula, x = layer_of_tiles(kind, dtype, rng)
    assert len(list(layer._tiles(dtype))) > 1
    expected, y = formula(x), layer(x)
    error = (y.double() - expected).abs().max() / expected.abs().max()
    # W and y are rounded to the dtype once each, and a bias is added in it.
    assert error <= 6 * torch.finfo(dtype).eps
    layer.product = "whole"
    assert y.shape == layer(x).shape
    assert (layer(x).double() - y.double()).abs().max() <= 6 * torch.finfo(dtype).eps * expected.abs().max()
    layer.product = "half"
    with pytest.raises(
        ValueError, match=f"{type(layer).__name__}: product: expected 'tiled', 'whole' or 'int8'"
    ):
        layer(x)


@KINDS
@pytest.mark.parametrize("product", ["tiled", "whole"])
@torch.no_grad()
def test_memory_of_a_product(kind, product, rng, monkeypatch):
    """What the layer gives, the part of it that a tile gives, and tiles; "whole" takes all of W."""
    torch.manual_seed(rng.getrandbits(32))
    monkeypatch.setitem(quantize._TILE, "cpu", tile := 2 << 10)
    dtype = rng.choice(DTYPES)
    layer, _, x = layer_of_tiles(kind, dtype, rng)
    layer.product = product
    with Live("cpu") as live:
        y = layer(x)
    whole = layer.integers.numel() * dtype.itemsize
    assert whole > 12 * tile
    if product == "whole":
        assert live.most >= whole
    else:
        assert y.nbytes <= live.most <= 2 * y.nbytes + 6 * tile


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_few_rows_are_multiplied_by_the_integers(dtype, rng):
    torch.manual_seed(rng.getrandbits(32))
    bits, group_size = rng.choice(((8, None), (8, 16), (4, None), (4, 16)))
    layer, calls = QuantizedLinear.from_linear(nn.Linear(64, 48).to(dtype), bits, group_size), []
    weight = steps_of(layer, None)
    with watched("quantized_linear", lambda x, *rest: calls.append((len(x), *rest[3:]))):
        for rows in (0, 1, 64, 65):
            x = torch.randn(rows, 64).to(dtype)
            expected, y = F.linear(x.double(), weight, layer.bias.double()), layer(x)
            assert torch.allclose(y.double(), expected, rtol=2e-2, atol=2e-2)
        layer(torch.randn(2, 64).to(dtype).t().contiguous().t())  # of other strides
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        layer.product = "int8"
        layer(x)
    # Torch leaves out an argument that is its default.
    assert calls == [(0,), (1,), (64,), (2,), (65, 8)]


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@torch.no_grad()
def test_convolutions_that_are_products(kind, rng):
    torch.manual_seed(rng.getrandbits(32))
    dims, calls = int(kind.__name__[4]), []
    layer = QuantizedConv.from_conv(kind(6, 5, 1, padding=rng.choice([0, "same", "valid"])), 8, 3)
    weight = steps_of(layer, None).float().view(5, 6, *[1] * dims)
    with watched("quantized_linear", lambda x, *rest: calls.append(len(x))):
        for shape in ((2, 6, *[3] * dims), (6, *[2] * dims), (2, 6, 33, *[1] * (dims - 1))):
            x = torch.randn(shape)
            y, expected = layer(x), layer._like[0]._conv_forward(x, weight, layer.bias)
            assert y.shape == expected.shape
            assert y.is_contiguous()
            assert torch.allclose(y, expected, atol=1e-5)
    assert calls == [2 * 3**dims, 2**dims]
    calls.clear()
    for options in ({"stride": 2}, {"padding": 1}, {"groups": 2}, {"kernel_size": 2}):
        conv = QuantizedConv.from_conv(kind(6, 4, **{"kernel_size": 1} | options))
        with watched("quantized_linear", lambda x, *rest: calls.append(len(x))):
            conv(torch.randn(6, *[2] * dims))
    assert calls == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("matrices", [False, True])
@torch.no_grad()
def test_int8_activations(matrices, dtype, rng, monkeypatch):
    """The bits are those of the formula, whose integer sums are exact, with any number of threads.  So are
    those of products of matrices of integers, which many rows on a GPU take."""
    torch.manual_seed(rng.getrandbits(32))
    monkeypatch.setitem(quantize._TILE, "cpu", 5_000)
    inputs, out, bits = rng.choice((33, 192, 2_100)), rng.choice((1, 37)), rng.choice((4, 8))
    group_size, bias = rng.choice((None, 3)), rng.random() < 0.5
    layer = QuantizedLinear.from_linear(nn.Linear(inputs, out, bias).to(dtype), bits, group_size)
    layer.product = "int8"
    x = torch.randn(2, rng.choice((1, 3, 20)), inputs).to(dtype) * torch.rand(2, 1, 1).to(dtype) * 8
    x[0, 0] = 0
    rows = x.float().flatten(0, 1)
    if (
        matrices
        and not (torch._int_mm(*[torch.full((66, 66), 127, dtype=torch.int8)] * 2) == 127**2 * 66).all()
    ):
        pytest.skip("torch's product of int8 matrices saturates on this CPU")
    y = layer._product_of_integers(x.flatten(0, 1)).view(2, -1, out) if matrices else layer(x)
    step = rows.abs().amax(1, keepdim=True) / 127
    step[step == 0] = 1
    q, size = (rows / step).round().long(), layer.group_size
    expected = torch.zeros(len(rows), out)
    for g in range(inputs // size):
        at = slice(g * size, (g + 1) * size)
        sums = q[:, at] @ layer.integers[:, at].long().t()
        expected = expected + sums.float() * layer.scale[:, g].float()
    expected = expected * step + (layer.bias.float() if bias else 0)
    assert torch.equal(y, expected.to(dtype).view(y.shape))
    # Each x is off by half a step at most.
    weight = steps_of(layer, None)
    error = (y.double() - F.linear(x.double(), weight, layer.bias.double() if bias else None)).abs()
    most = (
        0.5 * step.double() * weight.abs().sum(1)
        + 4 * torch.finfo(dtype).eps * y.abs().flatten(0, 1).double()
    )
    assert (error.flatten(0, 1) <= most + 1e-6).all()


@torch.no_grad()
def test_int8_activations_that_are_no_numbers(rng):
    """A NaN or an infinity is not rounded away; the least numbers do not overflow."""
    torch.manual_seed(rng.getrandbits(32))
    layer = QuantizedLinear.from_linear(nn.Linear(32, 5, bias=False))
    layer.product = "int8"
    x = torch.randn(5, 32)
    x[0, 3], x[1, 4], x[2] = float("nan"), float("-inf"), 190 * 2.0**-149
    y = layer(x)
    assert y[:2].isnan().all()
    assert y[2:].isfinite().all()
    assert y[2].abs().max() < 1e-40
    assert layer(x[:0]).shape == (0, 5)
    conv = QuantizedConv.from_conv(nn.Conv1d(4, 6, 3))
    x = torch.randn(1, 4, 9)
    expected = conv(x)
    conv.product = "int8"
    assert torch.equal(conv(x), expected)  # as with "tiled"


@pytest.mark.parametrize("product", ["tiled", "whole"])
@torch.no_grad()
def test_tiles_of_groups(product, rng, monkeypatch):
    """A convolution in groups takes some groups at a time, with their channels, and no copy of W."""
    torch.manual_seed(rng.getrandbits(32))
    monkeypatch.setitem(quantize._TILE, "cpu", tile := 2 << 10)
    groups, mode = rng.choice((6, 12, 60)), rng.choice(("zeros", "circular"))
    plain = nn.Conv2d(60, 120, 3, 1, 1, groups=groups, padding_mode=mode)
    layer, x = QuantizedConv.from_conv(plain), torch.randn(2, 60, 3, 3)
    layer.product = product
    plain.weight.copy_(steps_of(layer, None).view(plain.weight.shape))
    assert torch.allclose(layer(x), plain(x), atol=1e-5)
    assert torch.allclose(layer(x[0]), plain(x[0]), atol=1e-5)  # without a batch
    layer, x = QuantizedConv.from_conv(nn.Conv2d(60, 120, 3, 1, 1, groups=12)), torch.randn(2, 60, 1, 1)
    layer.product = product
    with Live("cpu") as live:
        y = layer(x)
    whole, tiles = 4 * layer.integers.numel(), 2 * y.nbytes + 2 * x.nbytes + 6 * tile
    assert tiles < 0.8 * whole
    assert live.most <= tiles if product == "tiled" else live.most >= whole


def test_products_that_need_w_as_a_whole(rng):
    """Gradients, dual numbers and transforms see the same function."""
    from torch.autograd import forward_ad

    torch.manual_seed(rng.getrandbits(32))
    layer = QuantizedLinear.from_linear(nn.Linear(16, 8), 4, 4)
    x, weight = torch.randn(5, 16), steps_of(layer, None).float()
    layer(x).sum().backward()
    assert layer.scale.grad.abs().sum() > 0
    with torch.no_grad(), forward_ad.dual_level():
        t = torch.randn(5, 16)
        y = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, t)))
        assert torch.allclose(y.tangent, t @ weight.t(), atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(torch.func.vmap(layer)(x), layer(x), atol=1e-6)
