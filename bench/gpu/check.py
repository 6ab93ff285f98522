"""gpu-check: one command, offline, that says in minutes what holds on the GPU at hand."""

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

from .. import machine
from . import summary
from .plan import MINUTES, REPORT, STAGES
from .results import Results
from .runner import follow
from .stage import ROOT, Context, environment

#: Prints the header of the machine.  It runs in a process of its own, so that this one holds no memory of the
#: GPU.
_PROBE = """
import json, sys, torch
from bench import machine
from bench.gpu import prebuilt
device = sys.argv[1]
if device == "cuda" and not torch.cuda.is_available():
    sys.exit(f"no NVIDIA GPU that torch {torch.__version__} can use (--rehearse runs what needs none)")
print(json.dumps({**machine.describe(device), "nvcc": prebuilt.nvcc_version()}))
"""


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "unknown"


def folder_name(header: dict, rehearse: bool) -> str:
    """A name of GPU, versions and commit, so that a check never overwrites the results of others."""
    if rehearse:
        return "rehearsal"
    return slug(f"{header['gpu']} torch {header['torch']} {header['commit'] or 'no commit'}")


def probe(device: str) -> dict | str:
    """The machine's header, or why there is none."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, device], cwd=ROOT, env=environment(), capture_output=True,
            text=True, timeout=120,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "the machine cannot be read: torch did not answer in 120 s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["the machine cannot be read"])[-1][:500]
    return json.loads(done.stdout.splitlines()[-1])


class Stopped:
    """Remembers the first signal that asks this process to end."""

    def __init__(self) -> None:
        self.by: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.by = self.by or signal.Signals(number).name

    def __call__(self) -> str | None:
        return self.by


def add_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--out", "--output", dest="output", type=pathlib.Path,
        help="folder for a folder named after GPU, torch and commit (bench/results)",
    )  # fmt: skip
    minutes = f"for everything; what does not fit is skipped ({MINUTES:g})"
    sub.add_argument("--minutes", type=float, default=MINUTES, help=minutes)
    sub.add_argument("--prebuilt", type=pathlib.Path, help="folder of make gpu-prebuilt: nothing is compiled")
    names = [s.name for s in STAGES]
    sub.add_argument("--only", nargs="+", metavar="STAGE", choices=names, help="these stages alone")
    sub.add_argument("--commit", help="name of the commit, where the tree came without its git directory")
    sub.add_argument("--rehearse", action="store_true", help="every stage that can, tiny, on the CPU")
    sub.set_defaults(call=main)


def main(args: argparse.Namespace) -> int:
    """Exit status: 0 passed, 1 not, 2 no GPU."""
    start = time.monotonic()
    if not (ROOT / "tests" / "gpu").exists():
        raise SystemExit("gpu-check: expected a source tree, which has the tests, got an installed package")
    if args.prebuilt is not None and not args.prebuilt.is_dir():
        raise SystemExit(f"gpu-check: --prebuilt: expected a folder, got {args.prebuilt}")
    if args.commit:
        os.environ["ZOKERNELS_COMMIT"] = args.commit
    stopped = Stopped()
    header = probe("cpu" if args.rehearse else "cuda")
    if isinstance(header, str):
        print(f"gpu-check: {header}")
        return 2
    with tempfile.TemporaryDirectory(prefix="zokernels-gpu-check-") as scratch:
        base = args.output or (pathlib.Path(tempfile.mkdtemp()) if args.rehearse else ROOT / "bench/results")
        output = base.resolve() / folder_name(header, args.rehearse)
        plan = [s for s in STAGES if not args.only or s.name in args.only]
        results = Results(output, header, args.minutes, args.rehearse, plan)
        ctx = Context(
            output, pathlib.Path(scratch), header.get("capability", "9.0"), args.rehearse,
            args.prebuilt and args.prebuilt.resolve(),
        )  # fmt: skip
        # A rehearsal shows what runs, not how long it takes on a CPU.
        deadline = start + (3600 if args.rehearse else 60 * args.minutes - REPORT)
        print(f"{machine.title(header)}\n{output}", flush=True)
        for outcome in follow(plan, ctx, deadline, stopped, results.starting):
            results.add(outcome)
            at = time.monotonic() - start
            o = outcome
            print(f"{at:5.0f} s  {o.name:18} {o.status:8} {o.seconds:6.1f} s  {o.note}", flush=True)
        files = results.finish(stopped.by)
    print("\n".join(["", *summary.terminal(results.result), "", *(f"wrote {path}" for path in files)]))
    print("gpu-check: " + ("passed" if results.passed else "NOT PASSED: see the stages above"))
    return 0 if results.passed else 1
