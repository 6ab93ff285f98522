"""Published systems as examples: their parts against the papers' formulas, and the claims that they make."""

from __future__ import annotations

import argparse
import itertools
import math
import pathlib
import re
import shlex

import pytest
import torch

import zokernels
from zokernels import Span
from zokernels.examples import defence, digits, fzoos, pde, ranking, zoodip

pytest.importorskip("sklearn")

# --- ZOODiP -----------------------------------------------------------------------------------------------


def test_still_directions_are_the_last_principal_components(rng):
    """The authors' code: StandardScaler, PCA, and the components after the first sum above 1 - nu."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    torch.manual_seed(rng.getrandbits(32))
    history = torch.randn(12, 30, dtype=torch.float64).cumsum(0) * torch.rand(30) + torch.randn(30)
    for nu in (0.2, 0.01):
        pca = PCA(n_components=12).fit(StandardScaler().fit_transform(history.numpy()))
        sums = pca.explained_variance_ratio_.cumsum()
        first = next(i for i, total in enumerate(sums) if total > 1 - nu)
        # The twelfth component of twelve points less their mean is none.
        want, got = (
            torch.from_numpy(pca.components_[first + 1 : 11].copy()),
            zoodip.still_directions(history, nu),
        )
        assert len(got) == len(want)
        torch.testing.assert_close(got.T @ got, want.T @ want, rtol=0, atol=1e-6)
    assert len(got) > 0


def test_a_step_of_a_token_is_the_papers(rng):
    """Every estimate: one-sided, over sqrt((d + n - 1) / n) n, less its part along the still directions."""
    torch.manual_seed(rng.getrandbits(32))
    start, goal = torch.randn(20), torch.randn(20)
    token = zoodip.Token(start, seed=rng.getrandbits(60), nu=0.05, tau=6, lr=0.3)
    loss = lambda points: (points - goal).square().mean(-1)
    w, m, v, still, history = start.double(), 0.0, 0.0, torch.zeros(0, 20).double(), []
    for t in range(1, 15):
        z = torch.stack([
            zokernels.noise((20,), seed=zokernels.derive_seed(token.seed, t - 1, k), stream=zoodip.STREAM)
            for k in range(2)
        ])  # fmt: skip
        losses = loss(token.points())
        slopes = (losses[1:] - losses[0]).double() / 0.05
        g = slopes @ z.double() / (2 * math.sqrt((20 - len(still) + 1) / 2))
        g -= still.T @ (still @ g)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        w = w - 0.3 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-3)
        token.update(losses)
        # fp32 beside float64: the slopes are those of the token's own points.
        torch.testing.assert_close(token.vector.double(), w, rtol=0, atol=1e-4)
        w = token.vector.double()
        history.append(token.vector.clone())
        if t % 6 == 0:
            still = zoodip.still_directions(torch.stack(history[-6:]), 0.05).double()
            assert torch.equal(still.float(), token.still)
    assert len(still) > 0


def test_the_subspace_is_not_worse_and_late_timesteps_are_better(capsys):
    """Over three seeds with equal images and noise: the error falls by at least 0.9 of what it falls without
    the subspace, and further than with all timesteps.
    """
    errors = zoodip.main(["--steps", "250", "--seeds", "3"])
    (start,) = errors["start"]
    gains = {form: start - sum(own) / 3 for form, own in errors.items() if form != "start"}
    assert gains["plain"] > 0.02 * start
    assert gains["subspace"] > 0.9 * gains["plain"]
    assert gains["subspace"] > gains["all timesteps"]
    assert "directions removed" in capsys.readouterr().out


# --- FZooS ------------------------------------------------------------------------------------------------


def test_correction_and_surrogates_at_equal_queries():
    """Two seeds: the corrected clients end lower than uncorrected ones on average, and those than FedZO."""
    options = {"seeds": 16, "rounds": 12, "sorted": True}
    ends = {}
    for name in fzoos.METHODS:
        runs = [fzoos.train(name, seed=seed, **options) for seed in (3, 4)]
        assert all(run["curve"][-1][0] == 12 * 3 * 8 for run in runs)
        ends[name] = sum(run["curve"][-1][1] for run in runs) / 2
        if name == "fzoos":
            assert all(run["history_bytes"] * 10 < run["vector_bytes"] for run in runs)
    assert ends["fzoos"] < ends["uncorrected"] < runs[0]["curve"][0][1]
    assert ends["fzoos"] < ends["fedzo"]


def small_client(queries: int, features: int = 0):
    """A surrogate of a smooth function over the span of four directions, from queries at random points."""
    span = Span(list(digits.network().named_parameters()), range(4))
    surrogate = fzoos.Surrogate(span, length=80.0, keep=100)
    generator = torch.Generator().manual_seed(5)
    for a in torch.randn(queries, 4, generator=generator, dtype=torch.float64):
        surrogate.add(a, torch.sin(a.sum()).item() + a[0].item())
    return span, surrogate


def test_random_features_have_the_surrogates_gradient():
    span, surrogate = small_client(40)
    features = fzoos.Features(span, surrogate.length, 4000)
    gradient, weights = features.gradient(features.weights(surrogate)), surrogate.fit()
    for a in 0.5 * torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64):
        want, got = surrogate.gradient(a, weights), gradient(a)
        assert span.norm(got - want) < 0.3 * span.norm(want)
        # The gradient is that of the regression itself, by differences.
        value = lambda a: (features.of(a[None]) @ features.weights(surrogate))[0]
        b = torch.tensor([0.3, -0.2, 0.5, 0.1]).double()
        slope = (value(a + 1e-4 * b) - value(a - 1e-4 * b)) / 2e-4
        torch.testing.assert_close(span.dot(got, b), slope, rtol=1e-4, atol=1e-8)


def test_uncertainty_is_the_posteriors(rng):
    """Up to the prior's constant: the trace of the gradient's covariance by differences of the kernel."""
    span, surrogate = small_client(9)
    root = torch.linalg.cholesky(span.gram)
    u = surrogate.points @ root
    kernel = lambda x, y: torch.exp(-0.5 * (torch.cdist(x, y) / surrogate.length).square())
    inverse = (kernel(u, u) + surrogate.noise * torch.eye(9, dtype=torch.float64)).inverse()
    candidates = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = 1e-3 * torch.eye(4, dtype=torch.float64) * surrogate.length
    want = []
    for x in candidates @ root:
        slopes = torch.stack([(kernel(u, (x + e)[None]) - kernel(u, (x - e)[None]))[:, 0] for e in step])
        slopes /= 2e-3 * surrogate.length
        want.append(-(slopes @ inverse @ slopes.T).trace())
    torch.testing.assert_close(surrogate.uncertainty(candidates), torch.stack(want), rtol=1e-4, atol=0)


def test_the_length_is_refitted_towards_the_functions():
    _, surrogate = small_client(60)
    surrogate.length = 10.0
    for _ in range(3):
        surrogate.refit_length()
    assert surrogate.length > 10.0


def test_fzoos_draws_its_runs(tmp_path):
    fzoos.main(
        [
            "--seeds",
            "6",
            "--rounds",
            "2",
            "--runs",
            "1",
            "--features",
            "50",
            "--plot",
            str(tmp_path / "a.png"),
        ]
    )
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# --- ZO-RankSGD -------------------------------------------------------------------------------------------


def test_a_picture_is_found_by_ranking_alone(monkeypatch, capsys):
    likings = ranking.main(["--steps", "3"])
    # No step makes it worse, whatever the judge likes: theta is among what is ranked.
    assert all(after >= before - 1e-5 for before, after in itertools.pairwise(likings))
    assert likings[-1] > likings[0]
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "0 1 2")
    ranking.main(["--steps", "1", "--ask"])
    assert len(asked) in (2, 4)
    assert "log-probability" in capsys.readouterr().out


# --- DeepZero, ZO-AE-DS -----------------------------------------------------------------------------------


def test_the_bound_is_clopper_and_pearsons():
    """P(at least k of n | p) = alpha at the bound p, by the sum of the binomial's terms."""
    for hits, draws, alpha in ((90, 100, 0.001), (1, 7, 0.05), (300, 300, 0.01)):
        p = defence.lower_bound(hits, draws, alpha)
        terms = (math.comb(draws, k) * p**k * (1 - p) ** (draws - k) for k in range(hits, draws + 1))
        assert sum(terms) == pytest.approx(alpha, rel=1e-6)
    assert defence.lower_bound(0, 9, 0.01) == 0


def test_certificates_of_a_classifier_whose_radii_are_known(rng):
    """A half-space's smoothed classifier has the distance to the plane as its radius; certificates are below
    it, but not by much, and what lies near the plane is not certified.
    """
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    answer = lambda x: (x[:, 0] > 0).long()
    for distance in (0.3, 0.6):
        x = torch.zeros(5)
        x[0] = distance
        found, radius = defence.certify(answer, x, 0.5, 200, 20_000, 1e-9, generator)
        # The bound's distance to the truth is about 6 standard errors each way at most.
        assert found == 1
        assert 0.85 * distance < radius <= distance
    assert defence.certify(answer, torch.zeros(5), 0.5, 50, 200, 1e-9, generator) == (-1, 0.0)


def test_defences_are_trained_by_queries_alone(capsys):
    options = ["--steps", "4", "--batch", "32", "--images", "4", "--draws", "50", "--coordinates", "8"]
    results = defence.main(options)
    assert set(results) == set(defence.METHODS)
    assert all(later <= earlier for own in results.values() for earlier, later in itertools.pairwise(own))
    queries = [int(row.split()[-1].replace(",", "")) for row in capsys.readouterr().out.splitlines()[2:]]
    # Beside each image itself: 24 directions; two sides of 12 coordinates; one side of 8 coordinates.
    assert queries == [0, 4 * 32 * 25, 4 * 32 * 25, 4 * 32 * 9]


def test_a_denoiser_trained_by_queries_makes_more_certain():
    """The certified accuracy, on average over the radii, with the defence and without."""
    options = ["--steps", "150", "--images", "30", "--draws", "150", "--method", "none", "ae-ds"]
    results = defence.main(options)
    assert sum(results["ae-ds"]) > sum(results["none"]) + 0.2


def test_the_coarse_solver_is_corrected_in_the_loop():
    results = pde.main(["--steps", "12", "--length", "6"])
    assert results["non-interactive"] < results["source"]
    assert results["in the loop"] < results["non-interactive"]


def test_the_solvers_converge():
    """Both are consistent: a wave that hardly moves decays as the heat equation says, and mass is kept."""
    x = torch.arange(pde.FINE).double().numpy() / pde.FINE
    wave = (1e-4 * torch.from_numpy(x * 2 * math.pi).sin()).numpy()[None]
    moved = pde.solve(wave)
    assert abs(moved.sum()) < 1e-12
    decay = math.exp(-pde.VISCOSITY * (2 * math.pi) ** 2 * pde.STEP)
    assert abs(moved).max() == pytest.approx(1e-4 * decay, rel=1e-3)
    assert pde.coarsened(wave).shape == (1, pde.COARSE)


# --- docs/systems.md --------------------------------------------------------------------------------------

#: The programs that tests of this file run, with smaller settings.
PROGRAMS = {"defence": defence, "fzoos": fzoos, "pde": pde, "ranking": ranking, "zoodip": zoodip}
PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "systems.md"


def test_every_claim_says_what_shows_it_or_why_it_is_not_here(monkeypatch):
    rows = [line.strip("|\n ").split(" | ") for line in PAGE.open() if line.startswith("| ")]
    claims = [[cell.strip(" |") for cell in row] for row in rows if row[0] != "claim"]
    assert len(claims) > 35
    for claim, here, *shown in claims:
        assert here.startswith(("works", "not here", "not measured", "on paper", "refused", "by hand")), claim
        assert (shown and shown[0]) or "not here" in here or "not measured" in here, claim
    text = PAGE.read_text()
    for name in re.findall(r"`(tests/\w+\.py)`", text):
        assert (PAGE.parent.parent / name).exists(), name
    commands = re.findall(r"`python examples/(\w+)\.py([^`]*)`", text)
    assert {name for name, _ in commands} == set(PROGRAMS)

    class Parsed(Exception):
        pass

    for name, options in commands:  # each program takes the options that stand there
        parse = argparse.ArgumentParser.parse_args

        def only_parse(self, argv, parse=parse):
            parse(self, argv)
            raise Parsed

        with monkeypatch.context() as patched:
            patched.setattr(argparse.ArgumentParser, "parse_args", only_parse)
            with pytest.raises(Parsed):
                PROGRAMS[name].main(shlex.split(options))
