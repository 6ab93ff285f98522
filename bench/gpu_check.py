"""gpu-check: one command, offline, that builds, tests and measures on the GPU at hand and leaves a report.

A stage that fails, runs too long or cannot run does not stop the others.  What is decided where: stages.py.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass

import torch

from . import machine
from .stages import ROOT, STAGES, Context, Plan, Stage, environment_of

#: Seconds kept back for the report.
_REPORT = 10


@dataclass(frozen=True)
class Outcome:
    name: str
    kind: str
    status: str  # passed, failed or skipped
    note: str
    seconds: float


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def _run(command: list[str], env: dict[str, str], log: pathlib.Path, limit: float) -> int | None:
    """Exit status, or None where ``limit`` seconds were not enough.  Output is appended to ``log``."""
    with log.open("a") as out:
        out.write("$ " + " ".join(command) + "\n")
        out.flush()
        try:
            # A session of its own, so that all that a stage started ends with it
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            out.write(f"{error}\n")
            return 127
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def _show(o: Outcome) -> None:
    print(f"{o.name:15} {o.status:8} {o.seconds:6.1f} s  {o.note}", flush=True)


def run_stage(stage: Stage, ctx: Context, seconds_left: float) -> Outcome:
    start = time.monotonic()
    end = lambda status, note: Outcome(stage.name, stage.kind, status, note, round(time.monotonic() - start, 1))
    if seconds_left < 5:
        return end("skipped", "out of time")
    try:
        plan = stage.plan(ctx)
    except Exception as error:  # a stage that cannot even be planned must not end the check
        return end("failed", f"{type(error).__name__}: {error}")
    if isinstance(plan, str):
        return end("skipped", plan)
    limit = min(stage.limit, seconds_left)
    status, note = _follow(plan, ctx.output / f"{stage.name}.log", start + limit)
    if status == "late":
        short = limit < stage.limit or stage.kind != "required"
        return end("skipped" if short else "failed", f"stopped after {limit:.0f} s")
    return end(status, note)


def _follow(plan: Plan, log: pathlib.Path, deadline: float) -> tuple[str, str]:
    env, note = environment_of(plan), ""
    log.unlink(missing_ok=True)
    log.touch()
    for command in plan.commands:
        code = _run(command, env, log, deadline - time.monotonic())
        if code and plan.instead is not None:
            note = "at the second attempt: see the log"
            code = _run(plan.instead, env, log, deadline - time.monotonic())
        if code is None:
            return "late", ""
        if code:
            break
    text = log.read_text(errors="replace")
    if plan.judge is not None:
        return plan.judge(code, text)
    if code:
        last = [line for line in text.splitlines() if line.strip()][-1:]
        return "failed", f"exit status {code}: {''.join(last)[:200]}"
    return "passed", note


_PROBE = "import json, sys; from bench import machine; print(json.dumps(machine.describe(sys.argv[1])))"


def probe(device: str) -> dict:
    """The machine's header, read in a process of its own: this one keeps no memory of the GPU."""
    env = environment_of(Plan([]))
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, device], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        raise SystemExit(f"gpu-check: cannot read the machine: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _environment(ctx: Context) -> Outcome:
    """What was there, in words of the tools themselves.  Nothing here can fail the check."""
    start, log = time.monotonic(), ctx.output / "environment.log"
    log.unlink(missing_ok=True)
    commands = [["nvidia-smi"], ["nvcc", "--version"], ["cmake", "--version"], ["c++", "--version"]]
    if not ctx.rehearse:
        commands.append([sys.executable, "-m", "pip", "list", "--disable-pip-version-check"])
    for command in commands:
        _run(command, dict(os.environ), log, 20)
    return Outcome("environment", "required", "passed", "", round(time.monotonic() - start, 1))


def verdict(outcomes: list[Outcome], rehearse: bool) -> int:
    """0 where every stage that decides has passed.  A rehearsal may skip; a check may skip only what is optional."""
    bad = [o for o in outcomes if o.kind != "measure" and o.status == "failed"]
    bad += [o for o in outcomes if o.kind == "required" and o.status == "skipped" and not rehearse]
    if rehearse:  # figures mean nothing there, but every stage must run
        bad += [o for o in outcomes if o.kind == "measure" and o.status != "passed"]
    return 1 if bad else 0


def main(args: argparse.Namespace) -> int:
    if not (ROOT / "tests" / "gpu").exists():
        raise SystemExit("gpu-check: expected a source tree, which has the tests, got an installed package")
    deadline = time.monotonic() + 60 * args.minutes - _REPORT
    if args.commit:
        os.environ["ZOKERNELS_COMMIT"] = args.commit
    if not args.rehearse and not torch.cuda.is_available():
        print(f"gpu-check: no NVIDIA GPU that torch {torch.__version__} can use (--rehearse runs what needs none)")
        return 2
    header = probe("cpu" if args.rehearse else "cuda")
    base = args.output or (pathlib.Path(tempfile.mkdtemp()) if args.rehearse else ROOT / "bench/results")
    output = base.resolve() / ("rehearsal" if args.rehearse else slug(header["gpu"]))
    output.mkdir(parents=True, exist_ok=True)
    for stale in (*output.glob("*.json"), *output.glob("*.xml"), *output.glob("*.log")):
        stale.unlink()  # of an earlier check: a stage that does not run now must not show its figures
    ctx = Context(output, header.get("capability", "9.0"), args.rehearse)
    print(machine.title(header), flush=True)
    outcomes = [_environment(ctx)]
    _show(outcomes[0])
    for stage in STAGES:
        outcomes.append(run_stage(stage, ctx, deadline - time.monotonic()))
        _show(outcomes[-1])
    if not args.rehearse:
        header |= {"host_library": probe(ctx.device)["host_library"]}  # as built by now
    code = verdict(outcomes, args.rehearse)
    from .summary import write

    result = {"schema": 1, "machine": header, "minutes": args.minutes, "rehearsal": args.rehearse}
    result |= {"passed": code == 0, "stages": [asdict(o) for o in outcomes]}
    for path in write(result, ctx):
        print(f"wrote {path}")
    print("gpu-check: " + ("passed" if code == 0 else "NOT PASSED: see the stages above"))
    return code
