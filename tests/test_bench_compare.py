"""bench compare: the decision, by answers worked out by hand; the trees, and one real run."""

from __future__ import annotations

import argparse
import math
import pathlib
import subprocess
import sys

import pytest

from bench import compare

ROOT = pathlib.Path(__file__).resolve().parent.parent

needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")


@pytest.mark.parametrize(
    ("count", "k"),
    [
        (6, 1),  # 2 / 64 = 3.1 % outside
        (8, 1),  # 2 (1 + 8) / 256 = 7.0 %: the second smallest is too far in
        (9, 2),  # 2 (1 + 9) / 512 = 3.9 %
        (11, 2),  # 2 (1 + 11 + 55) / 2048 = 6.5 %
        (12, 3),  # 2 (1 + 12 + 66) / 4096 = 3.9 %
        (20, 6),  # 2 (1 + 20 + 190 + 1140 + 4845 + 15504) / 2^20 = 4.1 %
    ],
)
def test_the_interval_is_from_the_kth_smallest_to_the_kth_largest(count, k):
    values = [float(v) for v in range(count)]
    assert compare.interval(values[::-1]) == (k - 1, count - k)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_turns_say_nothing(count):
    """Five values: 2 / 32 = 6.3 % would be outside even of all of them."""
    assert compare.interval([2.0] * count) == (-math.inf, math.inf)
    verdict = compare.Verdict.of([2.0] * count, [1.0] * count)
    assert verdict.ratio == 2
    assert not verdict.is_slower(2)


def test_the_threshold_is_compared_with_the_lower_end():
    """Six pairs: the interval is from the least to the greatest ratio, here 1.03 to 1.08; the median
    1.055.
    """
    other = [1.0, 2.0, 4.0, 1.0, 2.0, 4.0]
    ratios = [1.08, 1.03, 1.04, 1.05, 1.06, 1.07]
    verdict = compare.Verdict.of([r * t for r, t in zip(ratios, other, strict=True)], other)
    assert (verdict.ratio, verdict.low, verdict.high) == pytest.approx((1.055, 1.03, 1.08))
    assert verdict.other == 2
    assert verdict.is_slower(2)
    assert verdict.is_slower(2.9)
    assert not verdict.is_slower(3.1)


def test_baselines_are_no_rows_of_ours():
    rows = [
        {"op": "combine_", "k": 1, "dtype": "bf16", "backend": "cpu", "threads": 1, "p50": 3.0, "p20": 9.0},
        {"op": "perturb_", "k": 1, "dtype": "bf16", "backend": "mezo", "threads": 1, "p50": 4.0},
        {
            "op": "step",
            "form": "exact",
            "launch": "eager",
            "backend": "cuda",
            "threads": 1,
            "p50": 5.0,
            "host": 6.0,
        },
        {"op": "step", "form": "eager", "launch": "eager", "backend": "mezo", "threads": 1, "p50": 7.0},
    ]
    assert compare.figures(rows) == {
        "combine_ 1 bf16 cpu 1": 3.0,
        "step exact eager cuda 1": 5.0,
        "step exact eager cuda 1, host": 6.0,
    }


class Machine:
    """Times of two rows of an op in each turn: ``factor(run, row)`` times slower in this tree, and noise
    of 1 %.
    """

    def __init__(self, factor, turns):
        self.factor, self.turns, self.calls = factor, turns, []

    def __call__(self, side, op):
        turn = sum(1 for s, o in self.calls if (s, o) == (side, op))
        self.calls.append((side, op))
        noise = 1 + 0.01 * (turn % 3 - 1)
        slow = lambda row: self.factor(turn // self.turns, row) if side == "this" else 1.0
        return {f"{op} {row}": noise * slow(row) for row in "ab"} | {f"{op} only {side}": 1.0}


def decide(factor, ops=("x", "y"), turns=6):
    machine, said = Machine(factor, turns), []
    return compare.run_twice(ops, turns, 2.0, machine, said.append), machine.calls, said


def test_slower_in_both_runs_is_slower():
    found, calls, said = decide(lambda run, row: 1.05 if row == "b" else 1.0, ops=("x",))
    assert found == ["x b"]
    assert calls == [("this", "x"), ("other", "x")] * 12  # in turns, twice six pairs
    assert sum("slower" in text and "x b" in text for text in said) == 2
    assert not any("only" in text for text in said)  # rows that one tree alone has


def test_slower_once_is_a_disturbance():
    found, calls, _ = decide(lambda run, row: 1.05 if run == 0 else 1.0, ops=("x",))
    assert found == []
    assert len(calls) == 24


def test_another_row_in_the_second_run_is_not_slower_twice():
    found, _, _ = decide(lambda run, row: 1.05 if "ab"[run] == row else 1.0, ops=("x",))
    assert found == []


def test_equal_and_faster_trees_run_once():
    found, calls, _ = decide(lambda run, row: 1.0 if row == "a" else 0.5)
    assert found == []
    assert len(calls) == 2 * 2 * 6


def test_only_ops_with_a_slower_row_run_again():
    machine = Machine(lambda run, row: 1.05, 6)
    turn = lambda side, op: machine(side, op) if op == "x" else {f"{op} a": 1.0}
    assert compare.run_twice(["x", "y"], 6, 2.0, turn, lambda text: None) == ["x a", "x b"]
    assert len(machine.calls) == 24


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_errors_name_what_was_expected():
    done = bench("compare", "no-such-commit", "--tiny")
    assert done.returncode == 1
    assert "expected a commit of the repository" in done.stderr
    assert "got 'no-such-commit'" in done.stderr
    done = bench("compare", "HEAD", "--turns", "5")
    assert "--turns: expected at least 6, got 5" in done.stderr


@needs_git
def test_an_export_has_the_commit_s_package_and_this_tree_s_libraries(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "NATIVE", ("LICENSE",))  # unchanged, whatever is being worked on
    package = compare.export(compare.resolve("HEAD"), tmp_path, "cpu")
    shown = subprocess.run(
        ["git", "show", "HEAD:zokernels/version.py"], cwd=ROOT, capture_output=True, check=True
    )
    assert (package / "version.py").read_bytes() == shown.stdout
    for pattern in ("lib/*", "_host*.so"):
        here, there = (
            {p.name: p.read_bytes() for p in f.glob(pattern)} for f in (ROOT / "zokernels", package)
        )
        assert here == there


def test_both_sides_get_the_same_options():
    args = argparse.Namespace(device="cpu", seconds=0.5, threads="1", backend=None, tiny=False)
    run = compare.options_of(args, "combine")
    assert run == ["--seconds", "0.5", "--device", "cpu", "--threads", "1"]
    args.backend, args.tiny = ["cpu", "reference"], True
    assert compare.options_of(args, "combine")[2:3] == ["--tiny"]
    assert compare.options_of(args, "combine")[7:] == ["--backend", "cpu", "reference"]
    assert compare.options_of(args, "host") == ["--seconds", "0.5", "--tiny"]


@needs_git
def test_a_tiny_run_against_the_last_commit(monkeypatch, capsys):
    """Real turns of both packages; the libraries of this tree for both, so that nothing is compiled."""
    monkeypatch.setattr(compare, "NATIVE", ("LICENSE",))
    from bench.__main__ import main

    assert main(["compare", "HEAD", "--op", "host", "--tiny"]) == 0
    out = capsys.readouterr().out
    for form in ("calls plan", "calls list", "calls one tensor", "mlp exact", "mlp inplace"):
        assert f"host {form} 1\n" in out
    assert "MeZO" not in out
    assert out.count("[too few turns]") == 5
    assert "slower by more than 2 % in two runs: 0 rows" in out


@needs_git
def test_a_turn_refuses_another_package(tmp_path):
    """An installed package must not stand in for the tree's: the turn says so instead of measuring it."""
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    (tmp_path / "zokernels").mkdir()
    (tmp_path / "zokernels" / "__init__.py").write_text("__file__ = '/elsewhere/zokernels/__init__.py'\n")
    with pytest.raises(SystemExit, match=r"expected the package .*, got /elsewhere/zokernels"):
        compare.measure_turn(tmp_path, "host", ["--tiny"])


def test_rows_of_host_are_seconds():
    rows = [
        {"model": "calls", "form": "plan", "threads": 1, "microseconds": 65.0},
        {"model": "mlp", "form": "exact", "threads": 1, "seconds": 3e-4, "forwards_seconds": 1e-4},
        {"model": "mlp", "form": "MeZO", "threads": 1, "seconds": 5e-4, "forwards_seconds": 1e-4},
    ]
    assert compare.figures(rows) == pytest.approx({"host calls plan 1": 65e-6, "host mlp exact 1": 3e-4})


def test_an_op_needs_no_more_than_it_measures():
    """Packages of older commits lack what other commands import."""
    code = """if True:
        import sys
        lacking = ("optim", "step", "trajectory", "offload", "distributed")
        sys.modules.update(dict.fromkeys(f"zokernels.{name}" for name in lacking))
        from bench.__main__ import main
        options = ["--op", "combine", "--tiny", "--backend", "reference", "--dtype", "fp32", "--threads", "1"]
        sys.exit(main(["run", *options]))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "combine_" in done.stdout
