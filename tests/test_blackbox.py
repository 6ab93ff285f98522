"""Black boxes in a torch graph: estimates against materialised z in float64, and training around one."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits, random_values
from torch import nn

import zokernels as zk
from zokernels.blackbox import BlackBox
from zokernels.contract import seed_to_int64
from zokernels.difference import stepped

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOTH = pytest.mark.parametrize("estimator", ["rge", "cge"])
SIDES = pytest.mark.parametrize("two_sided", [False, True])


def generator(rng):
    return torch.Generator().manual_seed(rng.getrandbits(60))


def outputs(weight, vector):
    """f of [N, 3, 4]: [N, 5], or [N]; in float64 from numpy arrays, out of reach of autograd."""

    def f(x):
        assert not x.requires_grad
        y = torch.tanh(x.double().flatten(1) @ weight).numpy()
        return y if vector else y.sum(1)

    return f


@SIDES
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("dist", ["normal", "rademacher"])
@pytest.mark.parametrize(
    ("dtype", "max_batch"), [(torch.float32, 1000), (torch.float32, 4), (torch.bfloat16, 17)]
)
def test_random_directions_are_the_formula(two_sided, vector, dist, dtype, max_batch, rng):
    g, seed, q, mu = generator(rng), rng.getrandbits(64), 7, 0.125
    x = torch.randn(5, 3, 4, generator=g).to(dtype).requires_grad_()
    f = outputs(torch.randn(12, 5, generator=g).double(), vector)
    box = BlackBox(f, queries=q, mu=mu, two_sided=two_sided, dist=dist, seed=seed, max_batch=max_batch)
    for call in range(2):
        y = box(x)
        weight = torch.randn(y.shape, generator=g).double()
        (grad,) = torch.autograd.grad(y, x, weight)
        want = torch.zeros(x.shape).double()
        for k in range(q):
            z = zk.noise(x.shape, seed=seed_to_int64(zk.derive_seed(seed, call, k)), dist=dist)
            at = lambda c, z=z: torch.as_tensor(f((x.detach().float() + c * z).to(dtype)))
            change = (at(mu) - at(-mu)) / 2 if two_sided else at(mu) - torch.as_tensor(f(x.detach()))
            directional = (weight * change).reshape(5, -1).sum(1) / mu
            want += directional[:, None, None] * z.double() / q
        assert grad.dtype is dtype
        torch.testing.assert_close(
            grad.double(), want, rtol=2**-7 if dtype is torch.bfloat16 else 1e-5, atol=1e-5
        )
    assert box.calls == 2


@SIDES
@pytest.mark.parametrize(("dist", "max_batch"), [("normal", 1000), ("normal", 4), ("rademacher", 17)])
def test_unit_sphere_is_the_authors_formula(two_sided, dist, max_batch, rng):
    """Black-Box-Defense: u = z / |z| for each sample, gradient d / q sum (f(x + mu u) - f(x)) / mu * u."""
    g, seed, q, mu, d = generator(rng), rng.getrandbits(64), 7, 0.125, 12
    x = torch.randn(5, 3, 4, generator=g).requires_grad_()
    f = outputs(torch.randn(12, 5, generator=g).double(), vector=True)
    options = {
        "queries": q,
        "mu": mu,
        "two_sided": two_sided,
        "dist": dist,
        "seed": seed,
        "max_batch": max_batch,
    }
    weight = torch.randn(5, 5, generator=g).double()
    (grad,) = torch.autograd.grad(BlackBox(f, sphere=True, **options)(x), x, weight)
    (other,) = torch.autograd.grad(BlackBox(f, **options)(x), x, weight)
    want, point = torch.zeros(5, 3, 4).double(), x.detach().double()
    for k in range(q):
        z = zk.noise(x.shape, seed=seed_to_int64(zk.derive_seed(seed, 0, k)), dist=dist).double()
        u = z / z.flatten(1).norm(dim=1)[:, None, None]
        at = lambda c, u=u: torch.as_tensor(f(point + c * u))
        change = (at(mu) - at(-mu)) / 2 if two_sided else at(mu) - torch.as_tensor(f(point))
        want += d / q * ((weight * change).sum(1) / mu)[:, None, None] * u
    torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=2e-5)
    assert (grad - other).abs().max() > 1e-3


def test_sphere_is_of_random_directions():
    with pytest.raises(ValueError, match="BlackBox: sphere: expected False but for 'rge'"):
        BlackBox(lambda x: x.sum(1), estimator="cge", sphere=True)


@SIDES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_batch", [1000, 7])
def test_coordinates_of_a_linear_function_are_its_gradient(two_sided, dtype, max_batch, rng):
    """Of small integers, so that float64 has every value, difference and quotient exactly."""
    g = generator(rng)
    x = (3 * torch.randn(4, 11, generator=g)).to(dtype).requires_grad_()
    matrix = torch.randint(-99, 100, (11, 3), generator=g).double()
    box = BlackBox(
        lambda x: x.double() @ matrix, estimator="cge", mu=1e-3, two_sided=two_sided, max_batch=max_batch
    )
    weight = torch.randint(-99, 100, (4, 3), generator=g).double()
    (grad,) = torch.autograd.grad(box(x), x, weight)
    assert_same_bits(grad, (weight @ matrix.T).to(dtype))


def test_random_directions_converge(rng):
    g = generator(rng)
    x, a = torch.randn(1, 6, generator=g).requires_grad_(), torch.randn(6, generator=g)
    box = BlackBox(
        lambda x: x.double() @ a.double(), queries=20000, mu=0.1, seed=rng.getrandbits(64), max_batch=4000
    )
    (grad,) = torch.autograd.grad(box(x).sum(), x)
    # The variance of a coordinate is |a|^2 + a_i^2 over q: 6 standard deviations.
    assert (grad[0] - a).abs().max() < 6 * (2 * a.square().sum() / 20000).sqrt()
    assert (grad[0] - a).abs().max() > 0


@BOTH
def test_calls_of_the_function(estimator, rng):
    """Rows and calls are as few as documented, and none without a gradient."""
    sizes, x = [], torch.randn(3, 4)
    f = lambda x: sizes.append(len(x)) or x.sum(1)
    box = BlackBox(f, estimator=estimator, queries=4, two_sided=True)
    box(x)
    with torch.no_grad():
        box(x.requires_grad_())
    assert (sizes, box.calls) == ([3, 3], 0)
    box(x).sum().backward()
    assert (sizes[2:], box.calls) == ([3, 2 * 4 * 3], 1)
    sizes.clear()
    box.max_batch = 7  # one direction, of two sides and three rows each, at a time
    box(x).sum().backward()
    assert sizes == [3, *[6] * 4]
    sizes.clear()
    box.max_batch = 2
    box(x).sum().backward()
    assert sizes == [2, 1, *[2] * 12]


@BOTH
@pytest.mark.parametrize("max_batch", [1000, 3, 2])
def test_extras_go_with_their_samples(estimator, max_batch, rng):
    x, y = torch.randn(5, 4).requires_grad_(), torch.arange(5)
    f = lambda x, y: (x * (1 + y[:, None])).sum(1)
    box = BlackBox(f, estimator=estimator, queries=3, max_batch=max_batch)
    box(x, y).sum().backward()
    if estimator == "cge":
        torch.testing.assert_close(x.grad, (1.0 + y[:, None]).expand(5, 4), rtol=1e-3, atol=0)
    else:
        alone = BlackBox(lambda x: f(x, y.repeat(len(x) // 5)), queries=3)
        assert_same_bits(x.grad, torch.autograd.grad(alone(x).sum(), x)[0])


def test_chunks_do_not_change_the_estimate(rng):
    x, seed = torch.randn(6, 9).requires_grad_(), rng.getrandbits(64)
    grads = []
    for max_batch in (1, 13, 1000):
        box = BlackBox(lambda x: x.double().square().sum(1), queries=5, seed=seed, max_batch=max_batch)
        grads.append(torch.autograd.grad(box(x).sum(), x)[0])
    assert_same_bits(grads[0], grads[2])
    assert_same_bits(grads[1], grads[2])


def test_a_saved_run_goes_on(rng):
    x = torch.randn(2, 5).requires_grad_()
    make = lambda seed: BlackBox(lambda x: x.square().sum(1), seed=seed)
    a, b = make(rng.getrandbits(64)), make(1)
    a(x).sum().backward()
    b.load_state_dict(a.state_dict())
    grads = [torch.autograd.grad(box(x).sum(), x)[0] for box in (a, b)]
    assert_same_bits(*grads)
    assert not torch.equal(grads[0], x.grad)


@pytest.mark.parametrize("step", [1e-3, -1e-3, 1e-9, -0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_step_is_lost(dtype, step, rng):
    x = random_values(4000, dtype, rng)
    x = x[x.isfinite() & (x.abs() < torch.finfo(dtype).max / 2)]
    x = torch.cat((x, torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, abs(step)]).to(dtype)))
    way = (stepped(x, step).double() - x.double()) * (1 if step > 0 else -1)
    unit = torch.finfo(dtype).eps * (x.double().abs() + abs(step)).clamp(
        min=torch.finfo(dtype).smallest_normal
    )
    assert (way >= abs(step)).all()
    assert (way <= abs(step) + 2 * unit).all()


@BOTH
def test_training_around_a_classifier(estimator, rng):
    """ZO-AE-DS in small: a trainable decoder's images go into a model that is numpy, and Adam trains it."""
    datasets = pytest.importorskip("sklearn.datasets")
    linear_model = pytest.importorskip("sklearn.linear_model")
    images, labels = datasets.load_digits(return_X_y=True)
    images = images / 16
    classifier = linear_model.LogisticRegression(max_iter=200).fit(images[:1000], labels[:1000])
    clean, y = torch.tensor(images[1000:1256]).float(), torch.tensor(labels[1000:1256])
    torch.manual_seed(rng.getrandbits(32))
    noisy = clean + 0.7 * torch.randn(clean.shape)
    encoder, decoder = nn.Linear(64, 8), nn.Linear(8, 64)
    f = lambda x: classifier.predict_log_proba(x.numpy())
    box = BlackBox(lambda z: f(decoder(z)), estimator=estimator, queries=8, mu=1e-2, seed=rng.getrandbits(64))
    # the decoder too is trained, from its output
    through = BlackBox(f, estimator="rge", queries=16, mu=1e-2, seed=1)
    opt = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=0.02)
    losses = []
    for _ in range(40):
        opt.zero_grad()
        loss = F.nll_loss(box(encoder(noisy)), y)
        (loss + F.nll_loss(through(decoder(encoder(noisy).detach())), y)).backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"function": 3}, "BlackBox: function: expected a function"),
        ({"estimator": "spsa"}, "BlackBox: estimator: expected 'rge' or 'cge', got 'spsa'"),
        ({"queries": 0}, "BlackBox: queries: expected an integer >= 1, got 0"),
        ({"max_batch": 1.5}, "BlackBox: max_batch: expected an integer >= 1, got 1.5"),
        ({"mu": 0.0}, "BlackBox: mu: expected a finite number > 0, got 0.0"),
        ({"mu": float("inf")}, "BlackBox: mu: expected a finite number > 0, got inf"),
        ({"dist": "cauchy"}, "BlackBox: dist: expected"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_arguments(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        BlackBox(**{"function": torch.sum, **options})


def test_inputs_and_results():
    x = torch.randn(3, 4)
    for f, args, message in (
        (
            lambda x: x.sum(1),
            (x.double(),),
            "x: expected dtype float32, bfloat16 or float16, got torch.float64",
        ),
        (lambda x: x.sum(1), (x[:0],), r"x: expected a batch \[B, ...\] with an element, got shape \(0, 4\)"),
        (lambda x: x.sum(1), (x, x[:2]), r"extras\[0\]: expected a tensor with 3 rows, as x, got \(2, 4\)"),
        (lambda x: x.sum(), (x,), r"function: expected 3 rows, as it was given, got shape \(\)"),
        (lambda x: x.argmax(1), (x,), "function: expected floating-point values, got torch.int64"),
    ):
        with pytest.raises((TypeError, ValueError), match="BlackBox: " + message):
            BlackBox(f)(*args)
