"""The stages of gpu-check that find faults: libraries, agreement of the backends, tests, arithmetic, memory
accesses.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import shutil
import sysconfig

from .. import machine
from . import prebuilt
from .stage import ROOT, Context, Failure, Skip, must, python, run

#: setup.py with pybind11 hidden.  This is the second attempt, for a machine where the host module does not
#: compile.
_WITHOUT_HOST = (
    "import runpy, sys; sys.modules['pybind11'] = None; sys.argv = ['setup.py', 'build_ext', '--inplace']; "
    "runpy.run_path('setup.py', run_name='__main__')"
)

#: The CPU tests that a new Python or torch could break.  All others take minutes on two cores.
QUICK = ("test_contract", "test_rounding", "test_ops")

#: Processes for Triton's compilations and for the tests: each holds a CUDA context of about half a gigabyte.
JOBS = 12


def _jobs() -> int:
    return max(1, min(JOBS, machine.cores()))


def libraries(ctx: Context) -> str:
    """Compiled libraries in the tree: those that were carried, where they fit, else built for the GPU at
    hand.
    """
    note = ""
    if ctx.prebuilt is not None:
        try:
            note = prebuilt.install(ctx.prebuilt, ROOT, None if ctx.rehearse else ctx.arch)
            backend = "cpu" if ctx.rehearse else "cuda"
            must(python("-c", f"from zokernels.backends import get; get({backend!r})"))
            return note
        except (prebuilt.Unusable, Failure) as reason:
            note = f"what was carried cannot be used ({reason}); "
            print(note, flush=True)
    if ctx.rehearse:
        if note:
            raise Failure(note)
        raise Skip("a rehearsal uses what is built")
    for tool in ("nvcc", "cmake", "ninja"):
        if shutil.which(tool) is None:
            raise Failure(f"{note}no {tool} to build with")
    build = {"TORCH_CUDA_ARCH_LIST": ctx.arch, "ZOKERNELS_CUDA": "1"}
    code, _ = run(python("setup.py", "build_ext", "--inplace"), **build)
    if code:
        must(python("-c", _WITHOUT_HOST), **build)
        return f"{note}built at the second attempt, without the host module"
    return f"{note}built"


def report(ctx: Context) -> str:
    """Prints what the tools say of this machine, and fails unless the backend to be tested is ready."""
    tools = ("nvidia-smi", "nvcc --version", "ncu --version", "cmake --version", "c++ --version")
    for tool in tools:
        run(tool.split())
    log = must(python("-m", "zokernels"))
    backends = [line for line in log.splitlines() if line.startswith("backend ")]
    ready = [line.split()[1] for line in backends if "ready for" in line]
    note = f"ready: {', '.join(ready) or 'none'}"
    if not ctx.rehearse and "cuda" not in ready:
        raise Failure(note)
    return note


def _agreement(ctx: Context, backend: str, calls: int, jobs: int, **env: str) -> str:
    size = 200 if ctx.rehearse else 60000
    amount = ("--calls", str(calls), "--max-size", str(size), "--jobs", str(jobs))
    if jobs > 1:
        env["OMP_NUM_THREADS"] = "1"  # else each process would take all cores for the reference backend
    where = ("--device", ctx.device, "--backend", backend)
    code, log = run(python("tests/gpu/agreement.py", *where, *amount), **env)
    said = [line for line in log.splitlines() if line.startswith(f"{backend}: ")]
    if code:
        raise Failure(said[0][:300] if said else f"exit status {code}")
    return said[-1]


def agreement_cuda(ctx: Context) -> str:
    if ctx.rehearse:
        return _agreement(ctx, "cpu", 4, 1)
    return _agreement(ctx, "cuda", 90, 1)


def agreement_triton(ctx: Context) -> str:
    """Compares Triton with the reference, in as many processes as there are cores.

    Nearly every call compiles a kernel of its own, which takes 1.4 s.
    """
    if importlib.util.find_spec("triton") is None:
        raise Skip("no triton")
    if ctx.rehearse:
        return _agreement(ctx, "triton", 2, 2, TRITON_INTERPRET="1")
    return _agreement(ctx, "triton", 90, _jobs())


_ENDED = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def count_tests(log: str) -> dict[str, int]:
    """Tests by outcome, from the lines of ``pytest -v``: these stand in the log also where pytest was
    stopped.
    """
    found: dict[str, int] = {}
    for line in log.splitlines():
        # "tests/test_a.py::test PASSED [ 10%]", of xdist "[gw1] [ 10%] PASSED tests/test_a.py::test"
        if "::" not in line or line.startswith(("FAILED", "ERROR", "SKIPPED")):  # pytest's summary
            continue
        if ended := _ENDED.search(line):
            found[ended[1].lower()] = found.get(ended[1].lower(), 0) + 1
    return found


def in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))


def _tests(ctx: Context, marks: str, files: list[str]) -> str:
    if importlib.util.find_spec("pytest") is None:
        raise Failure("no pytest")
    options = ["-m", marks, "-v", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    env = {}
    if importlib.util.find_spec("xdist") is not None and _jobs() > 1:
        options += ["-n", str(_jobs()), "--dist", "worksteal"]
        env["OMP_NUM_THREADS"] = "1"
    code, log = run(python("-m", "pytest", *options, *files), **env)
    found = count_tests(log)
    note = in_words(found)
    if code not in (0, 5):
        broken = [line for line in log.splitlines() if re.match(r"(FAILED|ERROR) \S", line)]
        raise Failure(f"{note or f'exit status {code}'}{': ' + broken[0][:200] if broken else ''}")
    if not found.get("passed"):
        raise (Skip if ctx.rehearse else Failure)(f"no test ran: {note}")
    return note


def gpu_tests(ctx: Context) -> str:
    files = sorted(p for p in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in p.read_text())
    return _tests(ctx, "gpu and not large", [str(p.relative_to(ROOT)) for p in files])


def two_gpus(ctx: Context) -> str:
    """Launches for a GPU that is not the current one, and both in turns."""
    import torch

    if not ctx.rehearse and torch.cuda.device_count() < 2:
        raise Skip(f"needs two GPUs, found {torch.cuda.device_count()}")
    return _tests(ctx, "not gpu" if ctx.rehearse else "gpu", ["tests/test_two_gpus.py"])


def cpu_tests(ctx: Context) -> str:
    # The module must be for this Python: a copied tree may hold that of another one.
    if not (ROOT / "zokernels" / f"_host{sysconfig.get_config_var('EXT_SUFFIX')}").exists():
        raise Skip("the host module, which these tests read, is not built for this Python")
    files = [f"tests/{name}.py" for name in (QUICK[:1] if ctx.rehearse else QUICK)]
    return _tests(ctx, "not gpu and not large and not slow", files)


def math(ctx: Context) -> str:
    """Runs tests/gpu/check_math.cu, as it was carried here or compiled here."""
    program, compiled = ctx.scratch / "check_math", "carried"
    if (folder := prebuilt.carried(ctx)) is not None:
        shutil.copy(folder / "check_math", program)
        program.chmod(0o755)  # a file that was copied between machines may have lost this mode
    elif shutil.which("nvcc") is None:
        raise (Skip if ctx.rehearse else Failure)("no nvcc, and none was carried")
    else:
        must(prebuilt.math_command(program, ctx.sm))
        compiled = "compiled"
    if ctx.rehearse:
        code, _ = run([str(program)])
        if code != 2:  # no usable GPU
            raise Failure(f"{compiled}; expected exit status 2 where there is no GPU, got {code}")
        raise Skip(f"{compiled}; no GPU to run it on")
    return must([str(program)]).strip().splitlines()[-1][:400]


def sanitizer(ctx: Context) -> str:
    tool = machine.find_tool("compute-sanitizer")
    if tool is None:
        raise Skip("no compute-sanitizer")
    if ctx.rehearse:
        raise Skip("needs an NVIDIA GPU")
    # Each tensor its own cudaMalloc, so that an access past its end is one past the allocation.  torch probes
    # the device with calls that may fail: API errors are not what is looked for.
    watch = [tool, "--tool", "memcheck", "--error-exitcode", "9", "--report-api-errors", "no"]
    calls = python("tests/gpu/agreement.py", "--backend", "cuda", "--calls", "12", "--max-size", "3000")
    code, log = run(watch + calls, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return sanitizer_says(code, log)


def sanitizer_says(code: int, log: str) -> str:
    """Its summary; Skip where it cannot work on this machine, Failure where it found something."""
    summary = [line.strip("= ") for line in log.splitlines() if "ERROR SUMMARY" in line]
    if code and "not supported" in log and "ERROR SUMMARY: 0" not in log and "Invalid __" not in log:
        raise Skip("compute-sanitizer does not support this device or system")
    if code or not summary:
        raise Failure((summary or [f"exit status {code} and no summary"])[-1])
    return summary[-1]


def distributed(ctx: Context) -> str:
    """The cases of tests/test_distributed.py, over NCCL, each rank on a GPU; a rehearsal: a few over gloo."""
    import torch

    count = 2 if ctx.rehearse else torch.cuda.device_count()
    if not torch.distributed.is_available() or not (ctx.rehearse or torch.distributed.is_nccl_available()):
        raise Skip("a torch without NCCL")
    if count < 2:
        raise Skip(f"needs two GPUs or four, found {count}")
    env = {"ZOKERNELS_CASES": "of two"} if ctx.rehearse else {}
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])))
    env |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    notes, good = [], True
    for ranks in (2, 4):
        if ranks > count:
            continue
        # a new folder, since the ranks would meet in the store of an earlier run
        folder = ctx.scratch / f"ranks{ranks}"
        folder.mkdir()
        seed = str(int.from_bytes(os.urandom(6), "little"))
        worker = python("tests/distributed_worker.py", str(folder), str(ranks), seed)
        code, _ = run(worker if ctx.rehearse else [*worker, "cuda"], **env)
        note, well = ranks_say(folder, ranks)
        notes.append(note)
        good = good and well and code == 0
    if not good:
        raise Failure("; ".join(notes))
    return "; ".join(notes)


def ranks_say(folder: pathlib.Path, ranks: int) -> tuple[str, bool]:
    """A summary of the ranks' files, and whether each rank has passed every case."""
    said = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
    bad = sorted({name for cases in said for name, end in cases.items() if end != "ok"})
    note = f"{ranks} ranks: {min(map(len, said), default=0)} cases" + (f", not {bad[0]}" if bad else "")
    return note, len(said) == ranks and all(said) and not bad
