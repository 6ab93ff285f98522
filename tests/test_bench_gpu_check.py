"""gpu-check rehearsed without a GPU: every stage that can runs, and what it writes says what was measured."""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

from bench import fan_out, gpu_check, stages, summary, workloads
from bench.gpu_check import Outcome
from bench.stages import Plan, Stage

ROOT = pathlib.Path(__file__).resolve().parent.parent
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("check")
    command = [sys.executable, "-m", "bench", "gpu-check", "--rehearse", "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    logs = "\n".join(p.read_text()[-1500:] for p in folder.rglob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    found = json.loads((folder / "rehearsal/result.json").read_text())
    return {"folder": folder / "rehearsal", "stdout": done.stdout, **found}


def test_every_stage_ran_or_says_why_not(rehearsal):
    outcomes = {s["name"]: s for s in rehearsal["stages"]}
    assert list(outcomes) == ["environment", *(s.name for s in stages.STAGES)]
    for outcome in outcomes.values():
        assert outcome["status"] in ("passed", "skipped")
        assert outcome["status"] == "passed" or outcome["note"]
    for name in ("report", "agreement", "bench-combine", "bench-step", "bench-many", "bench-fan-out"):
        assert outcomes[name]["status"] == "passed"
    assert outcomes["distributed"]["note"] == "2 ranks: 2 cases"
    if shutil.which("nvcc"):
        assert outcomes["math"]["note"] == "compiled; no GPU to run it on"
    assert "equal the reference bit for bit" in (rehearsal["folder"] / "agreement.log").read_text()


def test_report_shows_goals_and_rows(rehearsal):
    text = (rehearsal["folder"] / "README.md").read_text()
    assert "no figure below means anything" in text
    assert (rehearsal["folder"] / "result.png").read_bytes().startswith(b"\x89PNG")
    assert text.count("\n| step ") == 0
    assert text.count("\n| opt-1.3b |") == len([r for r in rehearsal["rows"] if r.get("workload") == "opt-1.3b"])
    assert rehearsal["schema"] == 1
    assert {"contract", "commit", "torch", "date"} <= set(rehearsal["machine"])
    verdicts = {g["what"]: g["verdict"] for g in rehearsal["goals"]}
    assert verdicts["Triton against CUDA C++, worst dtype and distribution"] == "not measured"
    assert "baseline curand, normal" in rehearsal["skipped"]


@pytest.fixture(scope="module")
def rows(rehearsal) -> dict[str, list[dict]]:
    """Rows of the tiny runs, by op."""
    found: dict[str, list[dict]] = {}
    for row in rehearsal["rows"]:
        found.setdefault(row["op"], []).append(row)
    return found


def test_step_rows(rows):
    ours = [r for r in rows["step"] if r["form"] != "eager"]
    assert {(r["workload"], r["form"]) for r in ours} == {
        (w, f) for w in ("opt-1.3b", "qwen3-1.7b", "opt-13b") for f in ("exact", "inplace", "two-pass", "fan-out")
    }
    each = {"exact": 12, "inplace": 12, "two-pass": 8, "fan-out": 8}
    for row in ours:
        assert row["bytes_per_parameter"] == each[row["form"]]
        assert row["bytes"] == each[row["form"]] * row["numel"]
        assert row["ratio"]["mezo"] == pytest.approx(row["baselines"]["mezo"]["p50"] / row["p50"])
        copies = each[row["form"]] / 4 * row["copy"]["p50"] * row["numel"] / row["copy"]["numel"]
        assert row["copy_fraction"] == pytest.approx(copies / row["p50"])
        assert row["numel"] == workloads.total(workloads.shapes(row["workload"], row["scale"]))
    mezo = [r for r in rows["step"] if r["backend"] == "mezo"]
    assert {r["bytes_per_parameter"] for r in mezo} == {74}


def test_fan_out_rows(rows):
    assert {(r["form"], r["dtype"], r["dist"]) for r in rows["fan_out_"]} == {
        (f, t, d) for f in fan_out.ACCESSES for t in ("bf16",) for d in ("normal", "rademacher")
    }
    for row in rows["fan_out_"]:
        assert row["bytes"] == fan_out.ACCESSES[row["form"]] * 2 * row["numel"]
        assert row["ratio"]["composed"] == pytest.approx(row["baselines"]["composed"]["p50"] / row["p50"])
        assert row["baselines"]["mezo"]["passes"] == 3


def test_streamed_rows(rehearsal):
    assert [r["storage"] for r in rehearsal["offload"]] == ["host"] * 3
    fits, *large = rehearsal["offload"]
    assert fits["of_in_memory"] == pytest.approx(fits["in_memory"] / fits["step"])
    assert not any("of_in_memory" in r for r in large)
    for row in rehearsal["offload"]:
        assert row["ratio"] == pytest.approx(row["step"] / row["bound"])
        assert row["of_plain_copy"] == pytest.approx(row["plain_copy"] / row["read"])
    assert (rehearsal["folder"] / "README.md").read_text().count("\n| tiny, 6 layers, bf16 | host |") == 3


def test_goals_of_streamed_models():
    row = {"shape": "opt-1.3b", "of_in_memory": 0.98, "of_plain_copy": 0.96, "ratio": 1.01}
    large = {"shape": "opt-13b", "of_plain_copy": 0.9, "ratio": 1.06, "device_memory": 3.4e9}
    found = {g.what: g for g in summary.offload_goals([row, large, {**large, "device_memory": 3.6e9}])}
    verdicts = [(round(g.measured, 3) if g.measured else None, g.verdict) for g in found.values()]
    assert verdicts == [
        (0.98, "reached"), (0.9, "missed"), (3.6, "missed"), (1.06, "missed"), (None, "not measured"),
        (None, "not measured"),
    ]  # fmt: skip
    assert summary.offload_goals([large])[2].verdict == "reached"


def test_many_rows(rows):
    assert {(r["k"], r["dtype"], r["dist"]) for r in rows["many"]} == {
        (64, t, d) for t in ("bf16",) for d in ("normal", "rademacher")
    }
    for row in rows["many"]:
        assert row["noise_per_s"] == pytest.approx(64 * row["numel"] / row["p50"])


# --- the orchestration ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    args = argparse.Namespace(output=tmp_path, minutes=1, commit=None, rehearse=False)
    assert gpu_check.main(args) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def ctx(tmp_path) -> stages.Context:
    return stages.Context(tmp_path, "9.0")


def stage(*commands: str, kind="required", limit=30, **options) -> Stage:
    return Stage("it", kind, limit, lambda ctx: Plan([[sys.executable, "-c", c] for c in commands], **options))


def test_a_stage_ends_as_its_commands_do(ctx):
    good = gpu_check.run_stage(stage("print('one')", "print('two')"), ctx, 60)
    assert (good.status, good.note) == ("passed", "")
    assert (ctx.output / "it.log").read_text().count("\none\n") == 1
    bad = gpu_check.run_stage(stage("import sys; sys.exit('broken')", "open('never', 'w')"), ctx, 60)
    assert bad.status == "failed"
    assert "broken" in bad.note
    missing = gpu_check.run_stage(Stage("it", "required", 9, lambda ctx: Plan([["no-such-program"]])), ctx, 60)
    assert missing.status == "failed"
    assert "127" in missing.note


def test_a_second_attempt_counts(ctx):
    again = [sys.executable, "-c", "print('again')"]
    outcome = gpu_check.run_stage(stage("import sys; sys.exit(3)", instead=again), ctx, 60)
    assert (outcome.status, outcome.note) == ("passed", "at the second attempt: see the log")


def test_time_limits(ctx):
    """A stage's own limit fails what is required; the end of the whole check's time only leaves stages out."""
    slow = "import time; time.sleep(60)"
    assert gpu_check.run_stage(stage(slow, limit=1), ctx, 60).status == "failed"
    assert gpu_check.run_stage(stage(slow, kind="measure", limit=1), ctx, 60).status == "skipped"
    late = gpu_check.run_stage(stage(slow), ctx, 2)
    assert late.status == "failed" or late.note == "out of time"


def test_distributed_cases_need_two_gpus(ctx, monkeypatch):
    plan = next(s.plan for s in stages.STAGES if s.name == "distributed")
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    for count in (0, 1):
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)  # noqa: B023
        assert plan(ctx) == f"needs two GPUs or four, found {count}"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    made = plan(ctx)
    assert [(command[3], command[-1]) for command in made.commands] == [("2", "cuda"), ("4", "cuda")]
    for ranks in (2, 4):
        for rank in range(ranks):
            (ctx.output / f"ranks{ranks}" / f"{rank}.json").write_text('{"a": "ok", "b": "ok"}')
    assert made.judge(0, "") == ("passed", "2 ranks: 2 cases; 4 ranks: 2 cases")
    assert made.judge(1, "")[0] == "failed"
    (ctx.output / "ranks4/3.json").write_text('{"a": "ok", "b": "a traceback"}')
    assert made.judge(0, "") == ("failed", "2 ranks: 2 cases; 4 ranks: 2 cases, not b")
    (ctx.output / "ranks2/1.json").unlink()
    assert made.judge(0, "")[0] == "failed"


def test_a_plan_that_raises_fails_its_stage_alone(ctx):
    outcome = gpu_check.run_stage(Stage("it", "required", 9, lambda ctx: 1 / 0), ctx, 60)
    assert (outcome.status, outcome.note) == ("failed", "ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("kind", "status", "check", "rehearsal"),
    [
        ("required", "passed", 0, 0),
        ("required", "failed", 1, 1),
        ("required", "skipped", 1, 0),
        ("optional", "skipped", 0, 0),
        ("optional", "failed", 1, 1),
        ("measure", "failed", 0, 1),
    ],
)
def test_verdict(kind, status, check, rehearsal):
    outcomes = [Outcome("a", "required", "passed", "", 1.0), Outcome("b", kind, status, "", 1.0)]
    assert gpu_check.verdict(outcomes, rehearse=False) == check
    assert gpu_check.verdict(outcomes, rehearse=True) == rehearsal


def test_slug():
    assert gpu_check.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_junit_counts(tmp_path):
    path = tmp_path / "r.xml"
    path.write_text('<testsuites><testsuite tests="9" failures="1" errors="2" skipped="3"/></testsuites>')
    assert stages.counts(path) == {"tests": 9, "failures": 1, "errors": 2, "skipped": 3, "passed": 3}


def test_goals_take_the_worst_row():
    one = {"op": "combine_", "backend": "cuda", "k": 1, "rounding": "nearest", "dtype": "bf16", "dist": "normal"}
    one["ratio"] = {}
    rows = [{**one, "copy_fraction": f, "p50": 1.0} for f in (0.97, 0.93)]
    rows.append({**one, "backend": "triton", "copy_fraction": 0.9, "p50": 1.25})
    rows.append({**one, "op": "many", "k": 64, "noise_per_s": 1.5e12})
    found = {g.what: g for g in summary.goals(rows, "cuda")}
    bf16 = found["normal bf16 in place, of the copy bandwidth"]
    assert (bf16.measured, bf16.verdict) == (0.93, "missed")
    assert found["Triton against CUDA C++, worst dtype and distribution"].measured == 0.8
    assert found["normal bf16, K = 64 in one pass, elements a second"].verdict == "reached"
    assert sum(g.verdict == "not measured" for g in found.values()) == len(found) - 3
    assert "| 0.95 | 0.93 | 0.98 | missed |" in summary.goals_table([bf16])


# --- what only a compiler can check here ------------------------------------------------------------------------------


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "90"])
def test_curand_baseline_compiles(tmp_path, arch):
    from bench import curand

    curand.compile_library(tmp_path / "lib.so", arch)
    assert b"curand_perturb" in (tmp_path / "lib.so").read_bytes()


@needs_nvcc
def test_check_of_the_arithmetic_compiles(tmp_path):
    done = subprocess.run(stages.math_command(tmp_path / "check", "90"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    if not torch.cuda.is_available():  # it says that it cannot run, and claims nothing
        run = subprocess.run([tmp_path / "check"], capture_output=True, text=True)
        assert run.returncode == 2
        assert run.stdout == ""


def test_triton_baselines_compile():
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: there is no compiler in this process")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bench import triton_randn

    types = {"c": "fp32", "seed": "i32", "numel": "i64", "BLOCK": "constexpr"}
    for kernel in (triton_randn.randn_kernel, triton_randn.randn4x_kernel):
        signature = {"theta": "*bf16", **types}
        source = ASTSource(kernel, signature=signature, constexprs={"BLOCK": triton_randn.BLOCK})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        assert compiled.asm["cubin"]
