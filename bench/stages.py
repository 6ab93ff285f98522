"""The stages of gpu-check: what each runs, how long it may take and what its end means.  gpu_check.py runs them."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import shutil
import sys
import sysconfig
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent

#: setup.py with pybind11 hidden: the second attempt, for a pybind11 or Python without what the host module needs.
_WITHOUT_HOST = (
    "import runpy, sys; sys.modules['pybind11'] = None; sys.argv = ['setup.py', 'build_ext', '--inplace']; "
    "runpy.run_path('setup.py', run_name='__main__')"
)

#: CPU tests that a new Python or torch could break; the others take minutes on two cores.
QUICK = ("test_contract", "test_rounding", "test_ops")


@dataclass(frozen=True)
class Context:
    output: pathlib.Path
    arch: str  # "9.0"
    rehearse: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def sm(self) -> str:
        return self.arch.replace(".", "")


@dataclass(frozen=True)
class Plan:
    """Commands, one after the other.  Where one fails, ``instead`` is run; ``judge`` may read the log and files."""

    commands: list[list[str]]
    env: dict[str, str] = field(default_factory=dict)
    instead: list[str] | None = None
    judge: Callable[[int, str], tuple[str, str]] | None = None  # (exit status, log) -> (status, note)


@dataclass(frozen=True)
class Stage:
    """``kind``: "required" must pass, "optional" may be skipped but not fail, "measure" does not decide."""

    name: str
    kind: str
    limit: int  # seconds
    plan: Callable[[Context], Plan | str]  # a string is the reason why it is skipped


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _build(ctx: Context) -> Plan | str:
    if ctx.rehearse:
        return "a rehearsal uses what is built"
    if shutil.which("nvcc") is None:
        return "no nvcc"
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if missing:
        return f"no {' and no '.join(missing)}"
    env = {"TORCH_CUDA_ARCH_LIST": ctx.arch, "ZOKERNELS_CUDA": "1"}
    return Plan([_python("setup.py", "build_ext", "--inplace")], env, instead=_python("-c", _WITHOUT_HOST))


def _report(ctx: Context) -> Plan:
    def judge(code: int, log: str) -> tuple[str, str]:
        ready = [line.split()[1] for line in log.splitlines() if line.startswith("backend ") and "ready for" in line]
        chosen = "cpu" if ctx.rehearse else "cuda"
        good = code == 0 and (ctx.rehearse or chosen in ready)
        return "passed" if good else "failed", f"ready: {', '.join(ready) or 'none'}"

    return Plan([_python("-m", "zokernels")], judge=judge)


def _agreement(ctx: Context) -> Plan:
    amount = ["--calls", "2", "--max-size", "500"] if ctx.rehearse else ["--calls", "90", "--max-size", "60000"]
    return Plan([_python("tests/gpu/agreement.py", "--device", ctx.device, *amount)])


def counts(junit: pathlib.Path) -> dict[str, int]:
    """Tests by outcome, as junit's file has them."""
    suites = list(ElementTree.parse(junit).getroot().iter("testsuite"))
    total = {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")}
    return {**total, "passed": total["tests"] - total["failures"] - total["errors"] - total["skipped"]}


def _tests(ctx: Context, name: str, marks: str, files: list[str]) -> Plan | str:
    if importlib.util.find_spec("pytest") is None:
        return "no pytest"
    if not files:
        return "no such test in this tree"
    junit = ctx.output / f"{name}.xml"

    def judge(code: int, log: str) -> tuple[str, str]:
        if not junit.exists():
            return "failed", f"pytest ended with {code} and no result"
        found = counts(junit)
        note = ", ".join(f"{found[k]} {k}" for k in ("passed", "failures", "errors", "skipped") if found[k])
        if code == 0 and found["passed"] == 0:
            return "skipped" if ctx.rehearse else "failed", f"no test ran: {note}"
        return "passed" if code == 0 else "failed", note

    options = ["-m", marks, "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--junitxml={junit}"]
    return Plan([_python("-m", "pytest", *options, *files)], judge=judge)


def _gpu_tests(ctx: Context) -> Plan | str:
    files = sorted(p for p in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in p.read_text())
    return _tests(ctx, "gpu-tests", "gpu and not large", [str(p.relative_to(ROOT)) for p in files])


def _cpu_tests(ctx: Context) -> Plan | str:
    # Of this Python: a copied tree may hold another's
    if not (ROOT / "zokernels" / f"_host{sysconfig.get_config_var('EXT_SUFFIX')}").exists():
        return "the host module, which these tests read, is not built"
    files = [f"tests/{name}.py" for name in (QUICK[:1] if ctx.rehearse else QUICK)]
    return _tests(ctx, "cpu-tests", "not gpu and not large and not slow", files)


def math_command(target: pathlib.Path, sm: str) -> list[str]:
    arch = f"-gencode=arch=compute_{sm},code=sm_{sm}"
    flags = ["-std=c++20", "-O3", "-I", str(ROOT), arch, "-Xcompiler", "-ffp-contract=off", "-cudart", "static"]
    return ["nvcc", *flags, str(ROOT / "tests/gpu/check_math.cu"), "-o", str(target)]


def _math(ctx: Context) -> Plan | str:
    if shutil.which("nvcc") is None:
        return "no nvcc"
    program = ctx.output / "check_math"
    build = math_command(program, ctx.sm)

    def judge(code: int, log: str) -> tuple[str, str]:
        program.unlink(missing_ok=True)
        if code == 0 and ctx.rehearse:
            return "skipped", "compiled; no GPU to run it on"
        last = log.strip().splitlines()[-1:] or [""]
        return "passed" if code == 0 else "failed", last[0][:400]

    return Plan([build] if ctx.rehearse else [build, [str(program)]], judge=judge)


def _distributed(ctx: Context) -> Plan | str:
    """The cases of tests/test_distributed.py, over NCCL, each rank on a GPU; in a rehearsal a few over gloo."""
    count = 2 if ctx.rehearse else torch.cuda.device_count()
    if not torch.distributed.is_available() or not (ctx.rehearse or torch.distributed.is_nccl_available()):
        return "a torch without NCCL"
    if count < 2:
        return f"needs two GPUs or four, found {count}"
    folders = {ranks: ctx.output / f"ranks{ranks}" for ranks in (2, 4) if ranks <= count}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)  # a store of an earlier run would be taken for this one's
        folder.mkdir(parents=True)

    def judge(code: int, log: str) -> tuple[str, str]:
        notes, good = [], code == 0
        for ranks, folder in folders.items():
            said = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
            bad = sorted({name for cases in said for name, end in cases.items() if end != "ok"})
            good = good and len(said) == ranks and bool(said[0]) and not bad
            notes.append(f"{ranks} ranks: {min(map(len, said), default=0)} cases" + (f", not {bad[0]}" if bad else ""))
        return "passed" if good else "failed", "; ".join(notes)

    worker = lambda ranks: _python(
        "tests/distributed_worker.py", str(folders[ranks]), str(ranks), str(int.from_bytes(os.urandom(6), "little"))
    )
    env = {"ZOKERNELS_CASES": "of two"} if ctx.rehearse else {}
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])))
    commands = [[*worker(ranks), *([] if ctx.rehearse else ["cuda"])] for ranks in folders]
    return Plan(commands, {**env, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, judge=judge)


def _sanitizer(ctx: Context) -> Plan | str:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        beside = pathlib.Path(shutil.which("nvcc") or "nvcc").resolve().with_name("compute-sanitizer")
        tool = str(beside) if beside.exists() else None
    if tool is None:
        return "no compute-sanitizer"
    if ctx.rehearse:
        return "needs an NVIDIA GPU"

    def judge(code: int, log: str) -> tuple[str, str]:
        if code and "not supported" in log and "ERROR SUMMARY: 0" not in log and "Invalid __" not in log:
            return "skipped", "compute-sanitizer does not support this device or system"
        summary = [line for line in log.splitlines() if "ERROR SUMMARY" in line]
        return "passed" if code == 0 and summary else "failed", (summary or ["no summary"])[-1].strip("= ")

    # Each tensor its own cudaMalloc, so that an access past its end is one past the allocation.  torch probes the
    # device with calls that may fail: API errors are not what is looked for.
    watch = [tool, "--tool", "memcheck", "--error-exitcode", "9", "--report-api-errors", "no"]
    calls = _python("tests/gpu/agreement.py", "--backend", "cuda", "--calls", "12", "--max-size", "3000")
    return Plan([watch + calls], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, judge=judge)


def _bench(name: str, *arguments: str) -> Callable[[Context], Plan]:
    def plan(ctx: Context) -> Plan:
        command = _python("-m", "bench", "run", "--device", ctx.device, "--json", str(ctx.output / f"{name}.json"))
        tiny = ["--tiny", "--threads", "1", "--dtype", "bf16"] if ctx.rehearse else []
        return Plan([[*command, *arguments, *tiny]])

    return plan


def _offload(name: str, *arguments: str) -> Callable[[Context], Plan]:
    """Streamed from host memory.  In a rehearsal a tiny model; on a GPU as many layers as the host's memory takes."""

    def plan(ctx: Context) -> Plan:
        command = _python("-m", "bench", "offload", "--device", ctx.device, "--dtype", "bf16")
        command += ["--json", str(ctx.output / f"{name}.json"), *arguments]
        return Plan([command + (["--tiny"] if ctx.rehearse else [])])

    return plan


#: Slots and scratch of large models: what tests/test_offload_families.py adds up.
_SMALL = ("--storage", "host", "--halves", "--slots", "2", "--scratch", "1", "--length", "2048", "--steps", "3")

#: In order of worth: where the time runs out, the last are left out.
STAGES = [
    Stage("build", "required", 240, _build),
    Stage("report", "required", 60, _report),
    Stage("agreement", "required", 90, _agreement),
    Stage("gpu-tests", "required", 180, _gpu_tests),
    Stage("math", "required", 90, _math),
    Stage("bench-combine", "measure", 170, _bench("bench-combine", "--op", "combine", "--seconds", "1.2")),
    Stage("bench-step", "measure", 100, _bench("bench-step", "--op", "step", "--workload", "opt-1.3b", "qwen3-1.7b")),
    Stage("bench-many", "measure", 60, _bench("bench-many", "--op", "many", "--seconds", "1")),
    Stage("sanitizer", "optional", 100, _sanitizer),
    Stage("distributed", "optional", 180, _distributed),
    Stage("bench-fan-out", "measure", 60, _bench("bench-fan-out", "--op", "fan_out", "--seconds", "1")),
    Stage("bench-step-13b", "measure", 90, _bench("bench-step-13b", "--op", "step", "--workload", "opt-13b")),
    Stage("cpu-tests", "optional", 120, _cpu_tests),
    Stage(
        "offload-fits",
        "measure",
        90,
        _offload(
            "offload-fits", "--shape", "opt-1.3b", "--storage", "memory", "host", "--batch", "8", "--length", "2048"
        ),
    ),
    Stage("offload-13b", "measure", 120, _offload("offload-13b", "--shape", "opt-13b", *_SMALL)),
    Stage("offload-30b", "measure", 150, _offload("offload-30b", "--shape", "opt-30b", *_SMALL)),
]


def environment_of(plan: Plan) -> dict[str, str]:
    """The variables of a stage: this tree first on Python's path, so that no installed copy is tested instead."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **plan.env}
