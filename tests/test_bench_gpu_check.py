"""gpu-check rehearsed without a GPU: every stage that can runs, what ends it is reported, and what is known
stays.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch

from bench import combine, fan_out, step, workloads
from bench.gpu import check, measures, plan, prebuilt, runner, stages, summary
from bench.gpu.results import Results
from bench.gpu.runner import Outcome
from bench.gpu.stage import Context, Failure, Skip, Stage, execute
from bench.timing import Times

ROOT = pathlib.Path(__file__).resolve().parent.parent
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
BENCHES = (
    "bench-combine",
    "bench-published",
    "bench-step",
    "bench-many",
    "bench-fan-out",
    "bench-combine-fp16",
)


def command(folder: pathlib.Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "bench", "gpu-check", "--rehearse", "--out", str(folder), *arguments]


# --- the whole of it
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("check")
    done = subprocess.run(command(folder), cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "rehearsal/result.json").read_text())
    return {"folder": folder / "rehearsal", "stdout": done.stdout, **found}


def test_every_stage_ran_or_says_why_not(rehearsal):
    outcomes = {s["name"]: s for s in rehearsal["stages"]}
    assert sorted(outcomes) == sorted(s.name for s in plan.STAGES)
    for name, outcome in outcomes.items():
        assert outcome["status"] in ("passed", "skipped"), name
        assert outcome["note"], name
    for name in ("report", "agreement-cuda", "offload-fits", "two-gpus", "distributed", *BENCHES):
        assert outcomes[name]["status"] == "passed", name
    assert outcomes["agreement-cuda"]["note"] == "cpu: 4 calls equal the reference bit for bit"
    if importlib.util.find_spec("triton"):
        wanted = "triton: 2 calls equal the reference bit for bit, in 2 processes"
        assert outcomes["agreement-triton"]["note"] == wanted
    assert outcomes["distributed"]["note"] == "2 ranks: 2 cases"
    assert re.fullmatch(r"no test ran: \d+ skipped", outcomes["gpu-tests"]["note"])
    assert "its kernels ran on the CPU" in outcomes["ncu"]["note"]
    if shutil.which("nvcc"):
        assert outcomes["math"]["note"] == "compiled; no GPU to run it on"


def test_few_files_hold_everything(rehearsal):
    """Some machines hand back at most eight files, so all logs are in one file and all rows in the result."""
    assert {p.name for p in rehearsal["folder"].iterdir()} == {
        "README.md",
        "log.txt",
        "result.json",
        "result.png",
    }
    log = (rehearsal["folder"] / "log.txt").read_text()
    for stage in rehearsal["stages"]:
        assert log.count(f"=== {stage['name']}: {stage['status']}, ") == 1, stage["name"]
    assert "4 kernels over 16,384 elements" in log


def test_report_shows_goals_and_rows(rehearsal):
    text = (rehearsal["folder"] / "README.md").read_text()
    assert "no figure below means anything" in text
    assert "Passed: **yes**" in text
    assert (rehearsal["folder"] / "result.png").read_bytes().startswith(b"\x89PNG")
    steps = [r for r in rehearsal["rows"] if r.get("workload") == "opt-1.3b"]
    assert text.count("\n| opt-1.3b |") == len(steps) > 0
    assert rehearsal["schema"] == 1
    assert rehearsal["finished"]
    assert {"contract", "commit", "torch", "triton", "nvcc", "date"} <= set(rehearsal["machine"])
    verdicts = {g["what"]: g["verdict"] for g in rehearsal["goals"]}
    assert verdicts["Triton against CUDA C++, worst dtype and distribution"] == "not measured"
    assert "baseline curand, normal" in rehearsal["skipped"]
    assert "of copy" in rehearsal["stdout"]
    assert len(rehearsal["stdout"]) < 12_000  # a machine shows only the end of the output


@pytest.fixture(scope="module")
def rows(rehearsal) -> dict[str, list[dict]]:
    """The rows of the tiny runs by op."""
    found: dict[str, list[dict]] = {}
    for row in rehearsal["rows"]:
        found.setdefault(row["op"], []).append(row)
    return found


def test_combine_rows(rows):
    """Both roundings, one direction and two; fp32 has nothing to round."""
    found = {(r["dtype"], r["rounding"], r["k"]) for r in rows["combine_"]}
    half = {(d, r, k) for d in ("bf16", "fp16") for r in ("nearest", "stochastic") for k in (1, 2)}
    assert found == half | {("fp32", "nearest", 1), ("fp32", "nearest", 2)}


def test_step_rows(rows):
    ours = [r for r in rows["step"] if r["form"] != "eager"]
    assert {(r["workload"], r["form"], r["rounding"], r["launch"]) for r in ours} == {
        (w, f, r, "eager")
        for w in ("opt-1.3b", "qwen3-1.7b", "opt-13b")
        for f in ("exact", "inplace", "two-pass", "fan-out")
        for r in ("nearest", "stochastic")
    }
    assert {(r["form"], r["bytes_per_parameter"]) for r in ours} == {
        ("exact", 12), ("inplace", 12), ("two-pass", 8), ("fan-out", 8)
    }  # fmt: skip
    assert {r["bytes_per_parameter"] for r in rows["step"] if r["backend"] == "mezo"} == {74}


def test_a_graph_needs_a_gpu(rehearsal):
    assert rehearsal["skipped"]["step opt-1.3b bf16 normal: in a CUDA graph"] == "needs an NVIDIA GPU"


def test_published_rows(rows):
    found = {(r["workload"], r["rounding"]): r for r in rows["published"]}
    sizes = ("flashopt-50m", "flashopt-200m")
    assert set(found) == {(w, r) for w in sizes for r in ("nearest", "stochastic")}
    for row in found.values():
        assert (row["dtype"], row["dist"]) == ("bf16", "rademacher")
        assert row["of_peak"] is None  # nobody knows it of the memory of a CPU


def test_fan_out_rows(rows):
    assert {(r["form"], r["dtype"], r["dist"]) for r in rows["fan_out_"]} == {
        (f, t, d) for f in fan_out.ACCESSES for t in ("bf16",) for d in ("normal", "rademacher")
    }
    for row in rows["fan_out_"]:
        assert row["baselines"]["mezo"]["passes"] == 3
    assert {r["ratio"]["composed"] for r in rows["fan_out_"] if r["form"] == "composed"} == {1.0}


def test_many_rows(rows):
    assert {(r["k"], r["dtype"], r["dist"]) for r in rows["many"]} == {
        (64, t, d) for t in ("bf16",) for d in ("normal", "rademacher")
    }


def test_streamed_rows(rehearsal):
    assert [r["storage"] for r in rehearsal["offload"]] == ["host"] * 3
    fits, *large = rehearsal["offload"]
    assert fits["of_in_memory"] == pytest.approx(fits["in_memory"] / fits["step"])
    assert not any("of_in_memory" in r for r in large)
    assert (rehearsal["folder"] / "README.md").read_text().count("\n| tiny, 6 layers, bf16 | host |") == 3


def test_population_rows(rehearsal):
    pytest.importorskip("transformers")
    names = [r["row"] for r in rehearsal["population"]]
    # ranks 1, 4 and 16, the dense form, LOZO's forwards in both forms, and four methods' steps
    assert len(names) == len(set(names)) == 10
    assert all(r["ratio"] > 0 for r in rehearsal["population"])
    text = (rehearsal["folder"] / "README.md").read_text()
    assert all(text.count(f"\n| {name} |") == 1 + (r["goal"] is not None)
               for name, r in zip(names, rehearsal["population"], strict=True))  # fmt: skip


# --- figures
# ----------------------------------------------------------------------------------------------------------


def times(milliseconds: float) -> Times:
    return Times(milliseconds * 1e-3, milliseconds * 1e-3, milliseconds * 1e-3, 5)


def test_a_row_by_hand():
    """A copy of 2,000 elements takes 4 ms, so 1,000 elements take 2 ms for a read and a write, and 6 ms for
    three.
    """
    compared = combine.Compared({"mezo": (1000, times(45))}, 2000, {"copy_inplace": times(4)})
    row = combine.row({"op": "step", "dtype": "bf16", "k": 1}, times(9), 1000, True, compared, accesses=6)
    assert row["copy_fraction"] == pytest.approx(6 / 9)
    assert row["ratio"] == {"mezo": pytest.approx(5.0)}
    assert row["bytes"] == 12_000
    assert row["ns_per_element"] == pytest.approx(9000.0)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_accesses_of_a_step_are_those_of_its_calls(monkeypatch, rounding):
    """The accesses that a form states are those of its calls: one read, and a write of each list that it
    writes.
    """
    shapes = workloads.shapes("qwen3-1.7b", 0.02)
    _, views = step.arena(shapes, torch.float32, "cpu")
    moved = []

    def count(lists, kwargs):
        moved.extend(t.numel() for tensors in lists for t in tensors)
        moved.extend(t.numel() for t in lists[0])
        seen.append((kwargs.get("rounding", "nearest"), "rounding_seed" in kwargs))

    monkeypatch.setattr(step.zokernels, "combine_", lambda params, *a, **k: count([params], k))
    monkeypatch.setattr(step.zokernels, "combine", lambda out, params, *a, **k: count([out], k))
    fan = lambda params, plus, minus, *a, **k: count([params, plus, minus], k)
    monkeypatch.setattr(step.zokernels, "fan_out_", fan)
    for form, (accesses, call) in step.forms(views, "normal", rounding).items():
        moved.clear()
        seen: list = []
        call()
        assert sum(moved) == accesses * workloads.total(shapes), form
        updates = len([s for s in seen if s == ("stochastic", True)])
        assert bool(updates) == (rounding == "stochastic"), form
        if form != "fan-out":  # in which every layer's call holds an update
            assert updates <= 1


def test_published_shares():
    """231 GB/s and 77 % of 300, as FlashOpt states them for 200M elements."""
    large = workloads.PUBLISHED["flashopt-200m"]
    assert round(4 * large.numel / large.seconds / 1e9) == 231
    assert round(large.of_peak, 2) == 0.77
    assert round(workloads.PUBLISHED["flashopt-50m"].of_peak, 2) == 0.73


def test_goals_of_published_sizes():
    one = {
        "op": "published",
        "workload": "flashopt-200m",
        "backend": "cuda",
        "rounding": "nearest",
        "ratio": {},
    }
    found = {g.what: g for g in summary.goals([{**one, "of_peak": 0.9}, {**one, "of_peak": 0.8}], "cuda")}
    ours = found["flashopt-200m, of the bandwidth of the card (theirs: on NVIDIA L4)"]
    assert (ours.measured, ours.verdict) == (0.8, "reached")
    other = found["flashopt-50m, of the bandwidth of the card (theirs: on NVIDIA L4)"]
    assert other.verdict == "not measured"


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


def test_goals_of_populations():
    row = {"row": "a", "ratio": 0.9, "goal": 0.91, "at_least": True}
    most = {"row": "b", "ratio": 1.05, "goal": 1.08, "at_least": False}
    found = summary.population_goals([row, most, {**row, "goal": None}])
    assert [(g.what, g.verdict) for g in found] == [("a", "missed"), ("b", "reached")]
    assert [g.verdict for g in summary.population_goals([])] == ["not measured"]


def test_goals_take_the_worst_row():
    one = {
        "op": "combine_",
        "backend": "cuda",
        "k": 1,
        "rounding": "nearest",
        "dtype": "bf16",
        "dist": "normal",
    }
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


def test_a_captured_call_runs_once_before_and_never_in_a_replay(monkeypatch):
    """Stand-ins for torch note the order of the calls: the side stream first, then the capture."""
    order = []

    @contextmanager
    def within(name):
        order.append(f"begin {name}")
        yield
        order.append(f"end {name}")

    class Stream:
        def wait_stream(self, other):
            order.append("wait")

    class Graph:
        def replay(self):
            order.append("replay")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: within("stream"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: within("capture"))
    replay = step.captured(lambda: order.append("call"))
    assert order == [
        *("wait", "begin stream", "call", "end stream", "wait"),
        *("begin capture", "call", "end capture"),
    ]
    replay()
    assert order[-1] == "replay"


# --- the plan
# ---------------------------------------------------------------------------------------------------------

#: The second at which each stage of the first seven minutes starts.
STARTS = {
    "libraries": 0, "report": 10, "agreement-cuda": 20, "math": 20, "agreement-triton": 20, "gpu-tests": 60,
    "bench-combine": 120, "bench-published": 205, "ncu": 220, "bench-step": 270, "sanitizer": 330,
    "offload-fits": 370,
}  # fmt: skip


@pytest.fixture
def ctx(tmp_path) -> Context:
    (tmp_path / "out").mkdir()
    (tmp_path / "scratch").mkdir()
    return Context(tmp_path / "out", tmp_path / "scratch")


def simulated(monkeypatch, ctx, minutes: float) -> dict[str, tuple[float, str]]:
    """When each stage starts and ends if every stage takes as long as the plan says."""
    now, began = [0.0], {}
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])

    def run_together(group, ctx, left, stop, command):
        began.update({s.name: now[0] for s in group})
        now[0] += max(s.seconds for s in group)
        return [Outcome(s.name, s.kind, "passed", "") for s in group]

    monkeypatch.setattr(runner, "run_together", run_together)
    ends = {o.name: o.status for o in runner.follow(plan.STAGES, ctx, 60 * minutes - plan.REPORT)}
    return {name: (began.get(name), status) for name, status in ends.items()}


def test_seven_minutes(monkeypatch, ctx):
    found = simulated(monkeypatch, ctx, 7)
    assert {name: at for name, (at, status) in found.items() if status == "passed"} == STARTS
    assert {status for name, (_, status) in found.items() if name not in STARTS} == {"skipped"}
    assert list(found)[: len(STARTS)] == list(STARTS)


def test_all_of_it_takes_less_than_fourteen(monkeypatch, ctx):
    assert {status for _, status in simulated(monkeypatch, ctx, 14).values()} == {"passed"}


def test_a_limit_is_no_less_than_what_is_expected():
    assert not [s.name for s in plan.STAGES if s.limit < s.seconds]
    assert plan.STAGES[0].name == "libraries"  # nothing else can run without it
    assert [s.name for s in plan.STAGES if s.kind == "required"] == list(STARTS)[:6]


def test_the_document_lists_the_plan():
    lines = (ROOT / "docs/gpu-check.md").read_text().splitlines()
    stages = [line for line in lines if re.match(r"\| `[a-z0-9-]+` \| \d", line)]
    table = [re.split(r" *\| *", line.strip("| ")) for line in stages]
    assert [(row[0].strip("`"), int(row[1]), int(row[2]), row[3]) for row in table] == [
        (s.name, s.seconds, s.limit, s.kind) for s in plan.STAGES
    ]


def it(name="it", kind="required", seconds=1, limit=600, **options) -> Stage:
    return Stage(name, kind, seconds, limit, lambda ctx: "", "", **options)


def running(**codes: str):
    """The commands of stages by name.

    They are Python code in which ``end(status, note)`` writes the outcome.
    """
    head = (
        "import json, os, pathlib, signal, sys, time\n"
        "def end(status, note):\n"
        "    pathlib.Path({!r}, {!r} + '.outcome').write_text(json.dumps([status, note]))\n"
    )
    return lambda stage, ctx: [
        sys.executable, "-c", head.format(str(ctx.scratch), stage.name) + codes[stage.name.replace("-", "_")]
    ]  # fmt: skip


def ended(ctx, stage, code, left=600.0) -> Outcome:
    (outcome,) = runner.run_together([stage], ctx, left, command=running(**{stage.name: code}))
    return outcome


@pytest.mark.parametrize(
    ("code", "status", "note"),
    [
        ("end('passed', 'well')", "passed", "well"),
        ("end('failed', 'two bits differ'); sys.exit(1)", "failed", "two bits differ"),
        ("sys.exit(3)", "failed", "its process ended without a word: exit status 3"),
        (
            "os.kill(os.getpid(), signal.SIGSEGV)",
            "failed",
            "its process ended without a word: signal SIGSEGV",
        ),
        ("raise MemoryError", "failed", "its process ended without a word: exit status 1"),
    ],
)
def test_however_a_process_ends_it_is_reported(ctx, code, status, note):
    outcome = ended(ctx, it(), f"print('said', flush=True); {code}")
    assert (outcome.status, outcome.note) == (status, note)
    assert (ctx.output / "it.log").read_text().startswith("said\n")


def test_a_process_that_hangs_is_ended(ctx):
    hang = "time.sleep(600)"
    outcome = ended(ctx, it(limit=1), hang)
    assert (outcome.status, outcome.note) == ("stopped", "after 1 s")
    assert outcome.seconds >= 1
    assert ended(ctx, it(limit=600), hang, left=2.0).note == "after 2 s"


def test_what_a_stage_started_ends_with_it(ctx):
    child = "import subprocess; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); "
    log = ctx.output / "it.log"
    stop = lambda: "SIGTERM" if log.exists() and log.read_text().endswith("\n") else None
    command = running(it=child + "time.sleep(600)")
    (outcome,) = runner.run_together([it()], ctx, 600, stop, command)
    assert (outcome.status, outcome.note) == ("stopped", "by SIGTERM")
    pid = int(log.read_text())
    until(lambda: state(pid) == b"Z")


def state(pid: int) -> bytes:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")")[-1].split()[0]
    except OSError:
        return b"Z"


def until(condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def test_a_fault_does_not_end_what_runs_beside_it(ctx):
    """Each of the two waits for the other's file, so they can only end if both run at once."""
    meet = (
        "pathlib.Path({0!r}, '{1}').touch()\n"
        "while not pathlib.Path({0!r}, '{2}').exists(): time.sleep(0.01)\n"
    ).format  # fmt: skip
    folder = str(ctx.scratch)
    codes = {"a": meet(folder, "a", "b") + "sys.exit(5)", "b": meet(folder, "b", "a") + "end('passed', '')"}
    ends = runner.run_together([it("a"), it("b")], ctx, 600, command=running(**codes))
    assert {o.name: o.status for o in ends} == {"a": "failed", "b": "passed"}


def test_what_no_longer_fits_is_left_out_and_what_is_shorter_still_runs(ctx):
    codes = {name: "end('passed', '')" for name in ("long", "short", "beside")}
    chain = [it("long", seconds=500), it("short", seconds=5), it("beside", seconds=400, beside=True)]
    started = []
    found = list(
        runner.follow(chain, ctx, time.monotonic() + 300, starting=started.append, command=running(**codes))
    )  # fmt: skip
    assert {o.name: o.status for o in found} == {"long": "skipped", "short": "passed", "beside": "skipped"}
    assert re.fullmatch(r"takes about 500 s, (299|300) s are left", found[0].note)
    assert [[s.name for s in group] for group in started] == [["short"]]


def test_groups_are_stages_beside_each_other():
    chain = [it("a"), it("b"), it("c", beside=True), it("d", beside=True), it("e")]
    assert [[s.name for s in group] for group in runner.groups(chain)] == [["a"], ["b", "c", "d"], ["e"]]


def test_a_stop_ends_what_runs_and_what_would_follow(ctx):
    codes = {
        "a": f"pathlib.Path({str(ctx.scratch)!r}, 'up').touch(); time.sleep(600)",
        "b": "end('passed', '')",
    }
    stop = lambda: "SIGTERM" if (ctx.scratch / "up").exists() else None
    chain, deadline = [it("a"), it("b")], time.monotonic() + 600
    found = list(runner.follow(chain, ctx, deadline, stop, command=running(**codes)))
    assert [(o.name, o.status, o.note) for o in found] == [
        ("a", "stopped", "by SIGTERM"), ("b", "skipped", "SIGTERM ended the check")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "status", "passes", "rehearsal"),
    [
        ("required", "passed", True, True),
        ("required", "failed", False, False),
        ("required", "stopped", False, False),
        ("required", "skipped", False, True),
        ("optional", "skipped", True, True),
        ("optional", "failed", False, False),
        ("optional", "stopped", True, False),
        ("measure", "failed", True, False),
        ("measure", "stopped", True, False),
    ],
)
def test_verdict(kind, status, passes, rehearsal):
    outcomes = [Outcome("a", "required", "passed", ""), Outcome("b", kind, status, "")]
    assert runner.verdict(outcomes, rehearse=False) is passes
    assert runner.verdict(outcomes, rehearse=True) is rehearsal


def test_whatever_a_stage_raises_is_its_end(ctx, capsys):
    def raises(error):
        def run(ctx):
            raise error

        return Stage("it", "required", 1, 1, run, "")

    assert execute(it(), ctx) == ("passed", "")
    assert execute(raises(Skip("no tool")), ctx) == ("skipped", "no tool")
    assert execute(raises(Failure("bits differ")), ctx) == ("failed", "bits differ")
    assert execute(raises(ZeroDivisionError("by zero")), ctx) == ("failed", "ZeroDivisionError: by zero")
    assert "Traceback" in capsys.readouterr().err


def test_a_context_survives_the_way_to_its_process(ctx, tmp_path):
    for found in (ctx, Context(tmp_path, tmp_path, "8.6", True, tmp_path / "prebuilt")):
        assert Context.loads(found.dumps()) == found


# --- what is known stays
# ----------------------------------------------------------------------------------------------

HEADER = {
    "cpu": "a CPU",
    "gpu": "NVIDIA H100 80GB HBM3",
    "cores": 2,
    "torch": "2.11.0+cu130",
    "zokernels": "0.1.0",
}
HEADER |= {
    "commit": "0123456789ab",
    "contract": "zk1",
    "python": "3.12.3",
    "triton": "3.6.0",
    "date": "2026-11-28",
}


def test_the_folder_names_gpu_torch_and_commit():
    assert check.folder_name(HEADER, False) == "nvidia-h100-80gb-hbm3-torch-2.11.0-cu130-0123456789ab"
    assert check.folder_name({**HEADER, "commit": None}, False).endswith("-no-commit")


def test_results_after_each_stage(tmp_path):
    one = it("bench-it", kind="measure")
    results = Results(tmp_path, HEADER, 7, False, [one])
    results.starting([one])
    assert "when this was written, bench-it was running" in (tmp_path / "README.md").read_text()
    (tmp_path / "bench-it.log").write_text("a line\nthe last line\n")
    row = {
        "op": "combine_",
        "dtype": "bf16",
        "dist": "normal",
        "rounding": "nearest",
        "k": 1,
        "backend": "cuda",
    }
    row |= {
        "copy_fraction": 0.5,
        "p20": 1.0,
        "p50": 1.0,
        "p80": 1.0,
        "threads": 1,
        "gb_per_s": 1.0,
        "ratio": {},
    }
    row |= {"ns_per_element": 1.0}
    kept = {
        "rows": [row, row],
        "skipped": {"baseline x": "no x"},
        "clock_mhz": {"least": 1, "median": 2, "most": 3},
    }
    (tmp_path / "bench-it.json").write_text(json.dumps(kept))
    results.add(Outcome("bench-it", "measure", "stopped", "after 9 s", 9.0))
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["stages"][0]["note"] == "after 9 s; before that: 2 rows"
    assert found["stages"][0]["tail"] == ["a line", "the last line"]
    assert found["rows"] == [row, row]
    assert found["skipped"] == {"baseline x": "no x"}
    goals = {g["what"]: g["measured"] for g in found["goals"]}
    assert goals["normal bf16 in place, of the copy bandwidth"] == 0.5
    text = (tmp_path / "README.md").read_text()
    assert "Clock of the multiprocessors during bench-it: 1 to 3 MHz, median 2." in text
    assert "the last line" in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "bench-it.json").exists()
    assert not list(tmp_path.glob("*.new"))


def test_tests_that_ended_before_a_stop_are_counted(tmp_path):
    results = Results(tmp_path, HEADER, 7, False, [it("gpu-tests")])
    log = "[gw0] [ 1%] PASSED a.py::b\n[gw1] [ 2%] FAILED a.py::c\na.py::d "
    (tmp_path / "gpu-tests.log").write_text(log)
    results.add(Outcome("gpu-tests", "required", "stopped", "after 110 s", 110.0))
    assert results.result["stages"][0]["note"] == "after 110 s; before that: 1 failed, 1 passed"


def test_rows_cut_in_the_middle_do_not_end_the_check(tmp_path):
    results = Results(tmp_path, HEADER, 7, False, [it("ncu")])
    (tmp_path / "ncu.json").write_text('{"kind": "ncu", "rows": [{"ker')
    results.add(Outcome("ncu", "measure", "failed", "signal SIGKILL", 1.0))
    assert json.loads((tmp_path / "result.json").read_text())["ncu"] == []


def test_an_earlier_check_does_not_show_in_a_later_one(tmp_path):
    (tmp_path / "bench-step.json").write_text('{"rows": [1]}')
    (tmp_path / "log.txt").write_text("old")
    Results(tmp_path, HEADER, 7, False, [])
    assert list(tmp_path.iterdir()) == []


def test_a_stage_whose_check_is_gone_before_it_has_begun_ends_at_once(ctx):
    """This process, its parent, is not the one that it was told, as if that one had been killed meanwhile."""
    command = stages.python("-m", "bench.gpu", "agreement-triton", ctx.dumps(), "1")
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    assert process.wait(300) == -signal.SIGKILL


def processes(mark: str) -> list[int]:
    """The processes whose command line contains ``mark``, without zombies."""
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in entry.read_bytes() and state(int(entry.parent.name)) != b"Z":
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_check_that_is_cut_off_says_what_it_knows(tmp_path, number):
    """A check that is killed in its second stage has the end of the first on disk, and leaves nothing
    running.
    """
    process = subprocess.Popen(
        command(tmp_path, "--only", "math", "agreement-cuda", "cpu-tests"), cwd=ROOT,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    result = tmp_path / "rehearsal/result.json"
    read = lambda: json.loads(result.read_text()) if result.exists() else {"running": []}
    until(lambda: "agreement-cuda" in read()["running"])
    until(lambda: len(processes(f'"{tmp_path}/rehearsal"')) > 1)
    process.send_signal(number)
    out, _ = process.communicate(timeout=300)
    found, text = read(), (tmp_path / "rehearsal/README.md").read_text()
    if number == signal.SIGTERM:
        assert process.returncode == 1
        outcomes = {s["name"]: (s["status"], s["note"]) for s in found["stages"]}
        assert outcomes["agreement-cuda"] == ("stopped", "by SIGTERM")
        assert outcomes["cpu-tests"] == ("skipped", "SIGTERM ended the check")
        assert "Ended early by SIGTERM" in text
        assert "NOT PASSED" in out
    else:
        assert process.returncode == -9
        assert not found["finished"]
        assert "**Not finished: when this was written, agreement-cuda" in text
    until(lambda: not processes(f"{tmp_path}/rehearsal"))


# --- single stages
# ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    args = argparse.Namespace(output=tmp_path, minutes=1, rehearse=False)
    args.commit = args.prebuilt = args.only = None
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        assert check.main(args) == 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert "no NVIDIA GPU" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


#: Code by which torch says that there is a GPU, in every process that has its folder on the path.
PRETENDED = """
import importlib.abc, importlib.util, sys, types
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        load = spec.loader.exec_module
        def exec_module(torch):
            load(torch)
            memory = dict(total_memory=1, L2_cache_size=1, memory_clock_rate=2619000, memory_bus_width=5120)
            chip = dict(name="NVIDIA Nothing", major=9, minor=0, multi_processor_count=1)
            gpu = types.SimpleNamespace(**chip, **memory)
            torch.cuda.is_available = lambda: True
            torch.cuda.get_device_properties = lambda device: gpu
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_on_a_gpu_that_does_not_work_every_stage_says_so(tmp_path):
    """Not a rehearsal, but a whole check up to its exit status, with a GPU that is only pretended."""
    (tmp_path / "sitecustomize.py").write_text(PRETENDED)
    arguments = command(tmp_path, "--only", "agreement-cuda", "bench-combine")
    arguments.remove("--rehearse")
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    env = {**os.environ, "PYTHONPATH": path, "ZOKERNELS_COMMIT": "abc"}
    done = subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    if "torch did not answer" in done.stdout:
        pytest.skip("this machine is too busy for the limits of a check")
    assert done.returncode == 1, done.stdout + done.stderr
    (folder,) = tmp_path.glob("nvidia-nothing-torch-*-abc")
    result = json.loads((folder / "result.json").read_text())
    assert result["machine"]["peak_bandwidth"] == pytest.approx(3.352e12, rel=1e-3)  # that of an H100
    notes = {s["name"]: (s["status"], s["note"]) for s in result["stages"]}
    statuses = {status for status, _ in notes.values()}
    if "stopped" in statuses:
        pytest.skip("this machine is too busy for the limits of a check")
    assert statuses == {"failed"}
    assert notes["agreement-cuda"][1].startswith("cuda: call 0: ")
    assert re.match(r"exit status 1: [\w.]+: ", notes["bench-combine"][1])
    assert "agreement-cuda: failed: cuda: call 0: " in done.stdout
    assert done.stdout.endswith("NOT PASSED: see the stages above\n")


def test_pytest_outcomes_are_counted_with_and_without_xdist():
    plain = (
        "tests/a.py::one PASSED [ 50%]\ntests/a.py::two[x y] SKIPPED (needs ...) [100%]\n"
        "SKIPPED [1] tests/a.py:3: needs\n"
    )
    assert stages.count_tests(plain) == {"passed": 1, "skipped": 1}
    spread = "[gw0] [ 33%] PASSED tests/a.py::one \ntests/a.py::two \n[gw1] [ 66%] FAILED tests/a.py::two \n"
    assert stages.count_tests(spread + "FAILED tests/a.py::two - assert 1 == 2\n") == {
        "passed": 1,
        "failed": 1,
    }


def test_tests_that_fail_are_named(ctx, tmp_path):
    file = tmp_path / "test_some.py"
    cases = ("def test_a(): pass", "def test_b(): assert 0", "def test_c(): pytest.skip('why')")
    file.write_text("\n".join(("import pytest", *cases)))
    with pytest.raises(Failure, match=r"1 failed, 1 passed, 1 skipped: FAILED .*test_b"):
        stages._tests(ctx, "not gpu", [str(file)])


def test_pytest_runs_in_processes_where_xdist_is(ctx, monkeypatch):
    seen = []
    monkeypatch.setattr(stages.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(stages.machine, "cores", lambda: 16)
    pytest_run = lambda arguments, **env: (seen.append(arguments), (0, "a::b PASSED"))[1]
    monkeypatch.setattr(stages, "run", pytest_run)
    assert stages._tests(ctx, "gpu", ["tests/test_it.py"]) == "1 passed"
    assert seen[0][seen[0].index("-n") + 1] == "12"
    monkeypatch.setattr(stages.importlib.util, "find_spec", lambda name: None if name == "xdist" else name)
    stages._tests(ctx, "gpu", ["tests/test_it.py"])
    assert "-n" not in seen[1]


def test_agreement_reports_every_exception(tmp_path):
    """A backend that raises, and one whose bits differ: both are reported, call by call, and the exit status
    is 1.
    """
    script = tmp_path / "broken.py"
    script.write_text(
        "import runpy, sys, zokernels\n"
        "whole = zokernels.combine_\n"
        "def broken(params, *args, **kwargs):\n"
        "    from zokernels.backends.registry import forced\n"
        "    if forced() == 'cpu': raise RuntimeError('an illegal address')\n"
        "    return whole(params, *args, **kwargs)\n"
        "zokernels.combine_ = broken\n"
        "sys.argv = 'agreement.py --device cpu --backend cpu --calls 6 --max-size 50'.split()\n"
        f"runpy.run_path({str(ROOT / 'tests/gpu/agreement.py')!r}, run_name='__main__')\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env)
    assert done.returncode == 1, done.stderr
    for call in (0, 1, 3):
        assert f"cpu: call {call}: RuntimeError: an illegal address" in done.stdout
    assert done.stdout.count("Traceback") == 3


@pytest.mark.parametrize(
    ("code", "log", "kind"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", str),
        (9, "========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 1 error", Failure),
        (0, "nothing", Failure),
        (1, "========= Error: Device not supported. Please refer to the docs", Skip),
    ],
)
def test_what_the_sanitizer_says(code, log, kind):
    if kind is str:
        assert stages.sanitizer_says(code, log) == "ERROR SUMMARY: 0 errors"
    else:
        with pytest.raises(kind):
            stages.sanitizer_says(code, log)


def test_launches_for_another_gpu_need_two(ctx, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(Skip, match="needs two GPUs, found 1"):
        stages.two_gpus(ctx)
    asked = []

    def passes(arguments, **env):
        asked.append(arguments)
        return 0, "a::b PASSED"

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(stages, "run", passes)
    assert stages.two_gpus(ctx) == "1 passed"
    assert asked[0][asked[0].index("-m", 2) + 1] == "gpu"
    assert asked[0][-1] == "tests/test_two_gpus.py"


def test_distributed_cases_need_two_gpus(ctx, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    for count in (0, 1):
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)  # noqa: B023
        with pytest.raises(Skip, match=f"needs two GPUs or four, found {count}"):
            stages.distributed(ctx)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    asked = []

    def ranks_run(arguments, **env):
        folder, ranks = pathlib.Path(arguments[2]), int(arguments[3])
        asked.append((ranks, arguments[-1]))
        for rank in range(ranks):
            (folder / f"{rank}.json").write_text('{"a": "ok", "b": "ok"}')
        return 0, ""

    monkeypatch.setattr(stages, "run", ranks_run)
    assert stages.distributed(ctx) == "2 ranks: 2 cases; 4 ranks: 2 cases"
    assert asked == [(2, "cuda"), (4, "cuda")]
    folder = ctx.scratch / "ranks4"
    (folder / "3.json").write_text('{"a": "ok", "b": "a traceback"}')
    assert stages.ranks_say(folder, 4) == ("4 ranks: 2 cases, not b", False)
    (folder / "3.json").unlink()
    assert stages.ranks_say(folder, 4) == ("4 ranks: 2 cases", False)


def test_clocks_are_read_while_a_stage_runs(ctx, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 1980; echo 1755; echo '[N/A]'; touch $OUT; sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("OUT", str(tmp_path / "read"))
    with measures.clocks(ctx) as seen:
        until((tmp_path / "read").exists)
    assert seen == [1980, 1755]


def test_slug():
    assert check.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# --- what only a compiler can check here
# ------------------------------------------------------------------------------


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "90"])
def test_curand_baseline_compiles(tmp_path, arch):
    from bench import curand

    curand.compile_library(tmp_path / "lib.so", arch)
    assert b"curand_perturb" in (tmp_path / "lib.so").read_bytes()


@needs_nvcc
def test_check_of_the_arithmetic_compiles(tmp_path):
    command = prebuilt.math_command(tmp_path / "check", "80", "90")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    if not torch.cuda.is_available():  # it must say that it cannot run
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


def test_the_cases_of_several_gpus_need_no_further_package():
    """Torch, NumPy and pytest are what a machine with GPUs surely has."""
    others = ("accelerate", "peft", "safetensors", "sklearn", "tqdm", "transformers", "trl")
    code = f"import sys; sys.modules.update(dict.fromkeys({others!r})); import distributed_cases"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
