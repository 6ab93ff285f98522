"""Seeds of tests and ``--fuzz`` (conftest.py), on a test file of their own."""

from __future__ import annotations

import itertools
import pathlib
import re
import time

import pytest

CONFTEST = pathlib.Path(__file__).with_name("conftest.py")
FILE = """
    import pytest
    import torch

    @pytest.mark.parametrize("case", range(3))
    def test_random(rng, case):
        print("\\ndrawn", case, rng.random(), torch.rand(()).item())

    def test_other():
        print("\\ndrawn other", torch.rand(()).item())

    def test_right_for_most_seeds(rng):
        assert rng.random() < 0.8

    @pytest.mark.slow
    def test_slow(rng):
        pass
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """pytest in this process, on the file above and our conftest.py."""
    monkeypatch.syspath_prepend(CONFTEST.parent)  # which imports helpers.py
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makeini("[pytest]\nmarkers = slow\n")
    pytester.makepyfile(test_file=FILE)
    return lambda *arguments: pytester.runpytest_inprocess("-p", "no:cacheprovider", *arguments)


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a millisecond whenever it is read, so that a busy machine runs as many
    tests.
    """
    ticks = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks) / 1000)


def drawn(result) -> dict[str, str]:
    return dict(re.findall(r"^drawn (\w+) (.*)$", result.stdout.str(), re.M))


def test_a_test_draws_the_same_in_any_company(run):
    whole = drawn(run("-s"))
    assert len(set(whole.values())) == 4
    assert drawn(run("-s", "-k", "other or 2")) == {name: whole[name] for name in ("2", "other")}


def test_another_seed_is_for_randomised_tests(run):
    first, other = drawn(run("-s")), drawn(run("-s", "--seed", "1"))
    assert first["other"] == other["other"]
    assert all(first[str(case)] != other[str(case)] for case in range(3))
    assert drawn(run("-s", "--seed", "random"))["0"] != first["0"]


def test_fuzz_finds_a_seed_and_says_how_to_run_it_again(run, clock):
    result = run("--fuzz", "1")
    assert result.ret == 1
    assert re.search(r"^fuzz: seed \d+, 1 seconds$", result.stdout.str(), re.M)
    outcomes = result.parseoutcomes()
    assert outcomes["passed"] > 20
    assert outcomes["failed"] > 1
    assert outcomes["deselected"] == 2  # what draws nothing, and what is slow
    again = re.findall(r"^pytest '(.*)' --seed (\d+)$", result.stdout.str(), re.M)
    assert len(again) == outcomes["failed"]
    name, seed = again[-1]
    run(name, "--seed", seed).assert_outcomes(failed=1)


def test_fuzz_from_a_seed_runs_the_same_tests(run, clock):
    told = [
        re.findall(r"^drawn .*", run("--fuzz", "0.2", "--seed", "3", "-s").stdout.str(), re.M)
        for _ in range(2)
    ]
    count = min(map(len, told))
    assert count > 3
    assert told[0][:count] == told[1][:count]
