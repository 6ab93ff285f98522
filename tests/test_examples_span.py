"""The small examples learn what they say, in tiny settings."""

from __future__ import annotations

import math

import pytest
import torch

import zokernels
from zokernels import Span
from zokernels.examples import compress, digits, fedkseed, fzoos, population

pytest.importorskip("sklearn")


def test_fedkseed_sends_coefficients_and_learns():
    result = fedkseed.train(pool=512, rounds=3, steps=40, participants=3)
    assert result["bytes_down"] == 4 * 512
    assert result["bytes_up"] == 40 * (2 + 4)
    assert result["bytes_down"] + result["bytes_up"] < 18_000
    assert result["loss_last"] < result["loss_first"] - 0.02


def test_a_round_of_the_full_pool_stays_below_18_kb():
    result = fedkseed.train(rounds=1, steps=100, participants=1)
    assert 16_000 < result["bytes_down"] + result["bytes_up"] < 18_000


def test_fedkseed_pro_draws_directions_by_their_derivatives():
    sums, counts = torch.tensor([6.0, 0.0, 2.0, 3.0]), torch.tensor([3.0, 0.0, 1.0, 1.0])
    scaled = [2 / 3, 0.0, 2 / 3, 1.0]  # means 2, 0, 2, 3
    want = torch.tensor([math.exp(x) for x in scaled], dtype=torch.float64)
    torch.testing.assert_close(fedkseed.probabilities(sums, counts), want / want.sum())
    equal = fedkseed.probabilities(torch.zeros(4), torch.zeros(4))
    assert torch.equal(equal, torch.full((4,), 0.25, dtype=torch.float64))
    data, generator = digits.load()[0], torch.Generator().manual_seed(0)
    model = digits.network()
    span = zokernels.Span(list(model.named_parameters()), range(4), "rademacher")
    only = torch.tensor([0.0, 0.0, 1.0, 0.0])
    with torch.no_grad():
        numbers, values = fedkseed.local_steps(model, span, data, 6, 0.01, generator, only)
        assert numbers.tolist() == [2] * 6
        assert values.count_nonzero() == 6
        _, none = fedkseed.local_steps(model, span, data, 6, 0.01, generator, only, clip=0.0)
    assert none.count_nonzero() == 0
    result = fedkseed.train(pool=64, rounds=3, steps=40, participants=3, pro=True, clip=1.0)
    assert result["loss_last"] < result["loss_first"]


def test_fedkseed_client_sends_what_it_has_done():
    """The pairs that a client sends make its model, up to the order of fp32 additions."""
    training, _ = digits.load()
    model, again = digits.network(), digits.network()
    span = Span(list(model.named_parameters()), range(64), "rademacher")
    with torch.no_grad():
        numbers, values = fedkseed.local_steps(
            model, span, training, 30, 1e-2, torch.Generator().manual_seed(1)
        )
    coeffs = torch.zeros(64).index_add_(0, numbers.long(), values)
    span.add_(list(again.parameters()), coeffs)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
    assert not torch.equal(model[0].weight, digits.network()[0].weight)


def test_compression_keeps_the_share_of_a_projection():
    whole = compress.train(directions=None, rounds=8)
    result = compress.train(directions=256, rounds=8)
    assert result["bytes"] == 1024
    assert abs(result["kept"] - result["expected"]) < 0.03  # of a random subspace of 256 of 2,410 dimensions
    start = digits.loss(digits.network(), digits.load()[1])
    assert whole["loss"] < start
    assert result["loss"] < start


def test_surrogate_gradient_is_that_of_the_mean():
    """The gradient equals differences of the process's mean over vectors that are stored."""
    model = digits.network()
    span = Span(list(model.named_parameters()), range(6))
    surrogate = fzoos.Surrogate(span, length=40.0, keep=20)
    generator = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    for point in draw(9, 6):
        surrogate.add(point, point.square().sum().item())
    weights, a = surrogate.fit(), draw(6)
    mean = lambda a: (weights * surrogate.kernel(a[None], surrogate.points)[0]).sum()
    gradient = surrogate.gradient(a, weights)
    for _ in range(3):
        b = draw(6)
        slope = (mean(a + 1e-5 * b) - mean(a - 1e-5 * b)) / 2e-5
        torch.testing.assert_close(span.dot(gradient, b), slope, rtol=1e-4, atol=1e-9)


def test_programs_print_their_results(capsys):
    fedkseed.main(["--pool", "64", "--rounds", "1", "--steps", "5"])
    compress.main(["--directions", "16", "--rounds", "1"])
    fzoos.main(["--seeds", "8", "--rounds", "2", "--runs", "1"])
    out = capsys.readouterr().out
    for text in ("256 bytes down, 30 up", "kept of the square", "bytes as coefficients"):
        assert text in out


def test_a_population_learns_digits_by_a_count(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    points = population.train(tmp_path, 20)
    assert [generation for generation, _, _ in points] == list(range(21))
    first, last = points[0][2], points[-1][2]
    assert last > first + 0.2  # of about 0.1 before
    assert (tmp_path / "population.png").read_bytes().startswith(b"\x89PNG")
    assert "20 generations of 256 members" in capsys.readouterr().out
