"""What goes wrong without an error is told once, at the user's own line, with the way out."""

from __future__ import annotations

import random
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import zokernels
from zokernels.optim import FZOO, ZOSGD, ForwardGradient, ZOAdam, ZOAdamW
from zokernels.step.watch import moved_share, moved_shares


@pytest.fixture
def model(rng):
    torch.manual_seed(rng.getrandbits(60))
    return nn.Linear(8, 4)


X = torch.linspace(-1, 1, 128).view(16, 8)


def told(run, steps=8):
    """The texts of all warnings of some steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            run()
    caught = [w for w in caught if re.match(r"(ZO|FZOO|Forward)\w*: ", str(w.message))]
    assert all(w.filename == __file__ for w in caught), "not at the user's line"
    return [str(w.message) for w in caught]


def test_nothing_is_told_of_a_run_that_is_right(model):
    """Fixed data, data and dropout from torch's random numbers, several directions, integers, a plateau."""
    optimizer = ZOSGD(model.named_parameters(), 1e-3, directions=2)
    drawn = lambda: nn.functional.dropout(model(X[torch.randint(16, (4,))])).square().mean()
    assert told(lambda: optimizer.step(lambda: model(X).square().mean())) == []
    assert told(lambda: optimizer.step(drawn)) == []
    plateau = iter([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0] * 4)
    some = ZOSGD(model.named_parameters(), 1e-3)
    assert told(lambda: some.step(lambda: model(X).sum() * 0 + next(plateau))) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_in_half_precision(model, dtype):
    optimizer = ZOSGD(model.named_parameters(), 1e-3)
    (text,) = told(lambda: optimizer.step(lambda: model(X).square().mean().to(dtype)), steps=3)
    assert text.startswith(f"ZOSGD: the loss is in {str(dtype)[6:]}, ")
    assert "in fp32" in text


@pytest.mark.parametrize("make", [ZOSGD, FZOO, ForwardGradient])
def test_g_is_zero(model, make):
    optimizer = make(model.named_parameters(), lr=1e-3)
    closure = lambda: (model(X) * 0).sum() + 1
    assert told(lambda: optimizer.step(closure), steps=4) == []
    (text,) = told(lambda: optimizer.step(closure), steps=20)
    assert "g was exactly 0 in 5 steps in a row" in text
    assert "optimizer.diagnose(closure)" in text


class OnDevice(torch.Tensor):
    """A tensor of the CPU that says that it is on a device."""

    is_cpu = property(lambda self: False)


def test_zeros_that_lie_on_a_device_are_told_when_they_are_asked_for(model):
    """As on a GPU, whose g no step reads."""
    optimizer = ZOSGD(model.named_parameters(), lr=1e-3)
    run = lambda: optimizer.watch.gradients([torch.zeros(1).as_subclass(OnDevice)])
    assert told(run, steps=6) == []
    (text,) = told(lambda: optimizer.state_dict(), steps=2)
    assert "g was exactly 0" in text


@pytest.mark.parametrize("draw", [random.random, lambda: np.random.rand()], ids=["python", "numpy"])
def test_random_numbers_of_others(model, draw):
    optimizer = ZOSGD(model.named_parameters(), 1e-3)
    (text,) = told(lambda: optimizer.step(lambda: model(X).mean() * draw()))
    assert "different data" in text
    assert "Draw the batch before the step" in text
    before = ZOSGD(model.named_parameters(), 1e-3)

    def step():
        scale = draw()
        before.step(lambda: model(X).mean() * scale)

    assert told(step) == []


def test_random_numbers_that_repeat(model):
    def step(inside):
        if not inside:
            torch.manual_seed(0)

        def closure():
            if inside:
                torch.manual_seed(0)
            return model(X[torch.randint(16, (4,))]).square().mean()

        optimizer.step(closure)

    for inside in (True, False):
        torch.manual_seed(77)
        optimizer = ZOSGD(model.named_parameters(), 1e-3)
        (text,) = told(lambda inside=inside: step(inside))
        assert "repeats in every step" in text
        assert "torch.manual_seed once" in text
    optimizer = ZOSGD(model.named_parameters(), 1e-3)
    fixed = lambda: optimizer.step(lambda: model(X).square().mean())
    assert told(lambda: (torch.manual_seed(0), fixed())) == [], "a closure that draws nothing"


# eps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "eps"), [(torch.bfloat16, 1e-3), (torch.float16, 3e-5), (torch.float32, 1e-7)]
)
@pytest.mark.parametrize("dist", ["normal", "rademacher"])
def test_the_share_that_eps_moves(rng, dtype, eps, dist):
    """The formula against perturbed weights, each of which moves or not: a binomial's bound of 1e-8."""
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    n = 20000
    for scale in (1.0, 0.02, 0.0):  # LoRA's B begins at 0, which any eps moves
        theta = (torch.randn(n, generator=generator) * scale).to(dtype)
        moved = theta.clone()
        zokernels.combine_(moved, rng.getrandbits(60), eps, dist=dist, streams=0)
        share = moved_share(theta, eps, dist).double()
        bound = 6 * float((share * (1 - share)).sum().sqrt()) + n / 500 + 20  # ties, tails of z beyond 6.5
        assert abs(int((moved != theta).sum()) - float(share.sum())) < bound


def test_the_shares_of_usual_weights():
    """22 to 25 % of N(0, 1), 2.6 % at 1, 96.5 % of N(0, 0.02): bf16, eps 1e-3."""
    n = torch.distributions.Normal(0, 1).icdf(torch.linspace(1e-4, 1 - 1e-4, 1024))
    tensors = [n.bfloat16(), torch.ones(100).bfloat16(), (0.02 * n).bfloat16(), torch.zeros(100).bfloat16()]
    wide, one, narrow, zero = moved_shares(tensors, 1e-3, "normal")
    assert zero > 0.999
    assert 0.22 < wide < 0.25
    assert 0.024 < one < 0.028
    assert 0.95 < narrow < 0.975


def test_eps_below_the_weights_resolution():
    params = {"wide": nn.Parameter(torch.randn(4000).bfloat16()), "w": nn.Parameter(torch.randn(4000) * 0.02)}
    (text,) = told(lambda: ZOSGD(params.items(), 1e-3, eps=1e-3), steps=1)
    assert "bfloat16" in text
    assert "'wide'" in text
    assert "'w'" not in text
    assert "keep them in fp32" in text
    assert told(lambda: ZOSGD(params.items(), 1e-3, eps=1e-1), steps=1) == []
    assert told(lambda: ZOSGD([("w", params["w"])], 1e-3, eps=1e-3), steps=1) == []
    few = {"norm": nn.Parameter(torch.ones(8).bfloat16()), "w": params["w"]}
    assert told(lambda: ZOSGD(few.items(), 1e-3), steps=1) == [], "a thousandth of the weights"
    frozen = nn.Parameter(torch.randn(4000).bfloat16(), requires_grad=False)
    assert told(lambda: ZOSGD([("f", frozen), ("w", params["w"])], 1e-3), steps=1) == []


@pytest.mark.parametrize("make", [ZOAdam, ZOAdamW])
def test_the_eps_of_adam(model, make):
    with torch.no_grad():
        model.weight.add_(10.0)  # so that an eps of 1e-8 moves none of them
    (text,) = told(lambda: make(model.named_parameters(), lr=1e-3, eps=1e-8), steps=1)
    assert text.startswith(f"{make.__name__}: eps=1e-08")
    assert "adam_eps" in text
    (text,) = told(lambda: ZOSGD(model.named_parameters(), lr=1e-3, eps=1e-8), steps=1)
    assert "stand still" in text
    assert "fp32" not in text
    assert told(lambda: make(model.named_parameters(), lr=1e-3, adam_eps=1e-8), steps=1) == []
