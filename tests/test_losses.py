"""What closures return: taken, or refused in one sentence with the weights as they were."""

from __future__ import annotations

import fractions

import pytest
import torch

from zokernels.optim import ZOSGD


@pytest.mark.parametrize("restore", ["exact", "inplace"])
def test_numbers_of_other_libraries_are_taken(restore):
    numpy = pytest.importorskip("numpy")
    kinds = [
        float,
        numpy.float64,
        lambda x: numpy.array(x),
        lambda x: numpy.array(x, dtype=numpy.float64).reshape(()),
    ]
    results = []
    for kind in (lambda x: torch.tensor(x, dtype=torch.float64), *kinds):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 5).double().float())
        optimizer = ZOSGD([("w", p)], lr=0.1, restore=restore)
        for _ in range(3):
            optimizer.step(lambda: kind(p.double().sin().sum().item()))  # noqa: B023
        results.append(p.detach().clone())
    assert all(torch.equal(result, results[0]) for result in results)
    assert float(optimizer.step(lambda: p.sum() is None or numpy.float32(0.5))) == 0.5
    assert float(optimizer.step(lambda: p.sum() is None or fractions.Fraction(1, 3))) == 1 / 3


REFUSED = {
    "meta": (
        lambda: torch.zeros((), device="meta"),
        "closure: expected a dense tensor with a value, got one on meta",
    ),
    "sparse": (
        lambda: torch.zeros(1, 1).to_sparse(),
        "a dense tensor with a value, got one in the layout torch.sparse",
    ),
    "endless": (lambda: 10**400, "a loss in the range of float64, got a number of 1329 bits"),
    "very long": (lambda: 10**5000, "a loss in the range of float64"),
    "negative": (lambda: -(10**400), "a loss in the range of float64"),
    "text": (lambda: "0.5", "a scalar loss"),
    "bool": (lambda: True, "a scalar loss"),
    "complex": (lambda: torch.tensor(1j), "a real scalar loss"),
}


@pytest.mark.parametrize("restore", ["exact", "inplace"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_loss_is_refused_in_one_sentence(case, restore):
    value, message = REFUSED[case]
    p = torch.nn.Parameter(torch.linspace(-1, 1, 5))
    before = p.detach().clone()
    # moves that round nothing
    optimizer = ZOSGD([("w", p)], lr=0.1, eps=0.25, dist="rademacher", restore=restore)
    with pytest.raises((TypeError, ValueError), match=message) as told:
        optimizer.step(value)
    assert "\n" not in str(told.value)
    assert optimizer.step_count == 0
    assert torch.allclose(p, before, atol=1e-7) if restore == "inplace" else torch.equal(p, before)


def test_an_array_of_numpy_is_refused():
    numpy = pytest.importorskip("numpy")
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="a scalar loss"):
        ZOSGD([("w", p)], lr=0.1).step(lambda: numpy.ones(3))
