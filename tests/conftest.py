"""Seeds, devices and backends for every test; what a machine lacks is skipped visibly.

A randomised test is one that takes the fixture ``rng``.  It draws from a seed of its own, made of the run's
seed and the test's id, so that what it draws depends neither on the tests that run before it nor on which are
selected. The run's seed is 0 unless ``--seed`` gives another.  All other tests draw the same values in every
run."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import random
import signal
import time

import pytest
import torch
from helpers import CPU_KERNELS, poisoned

import zokernels

pytest_plugins = ["pytester"]  # for test_seeds.py


#: The files that take longest, the longest first, so that no process is left with one at the end.
LONGEST = [
    "triton_versions",
    "writes",
    "cuda",
    "triton_compile",
    "bench_gpu_check",
    "ptx_triton",
    "triton",
    "distributed",
    "ptx",  # behind cuda: both want one compilation, which the first of them makes
    "triton_amd",
    "examples",
    "packaging",
    "offload_disk",
    "trajectory_file",
    "transformers_runs",
    "trajectory",
    "demo",
    "docs",
    "transformers_processes",
    "bench_methods",
]


def _seed(text: str) -> int:
    """The value of ``--seed``."""
    return int.from_bytes(os.urandom(6), "little") if text == "random" else int(text)


def pytest_addoption(parser):
    parser.addoption(
        "--large",
        action="store_true",
        help="also run tests that need more than 8 GiB of memory, or files of 4 GB",
    )
    parser.addoption(
        "--seed",
        type=_seed,
        metavar="N|random",
        help="the seed of the run, from which randomised tests draw: a number (default: 0) or a fresh one",
    )
    parser.addoption(
        "--fuzz",
        type=float,
        metavar="SECONDS",
        help="run the randomised tests (those with the fixture rng) in a random order, from a fresh "
        "seed unless "
        "--seed gives one, and again from the next seed, until so many seconds have passed",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """A run of all tests takes as many processes as there are cores, up to four; any other takes one."""
    option, cores = config.option, len(os.sched_getaffinity(0))
    one = option.fuzz is not None or option.usepdb or option.collectonly or option.keyword or option.markexpr
    one = one or option.capture == "no" or torch.cuda.is_available() or cores == 1
    one = one or config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    if one or hasattr(config, "workerinput") or getattr(option, "numprocesses", 0) is not None:
        return  # that is: also without pytest-xdist, in one of its processes, and where -n says how many
    option.numprocesses, option.dist, option.loadscopereorder = min(4, cores), "loadfile", False
    # A process that dies takes the tests that it still had with it, and with another in its place the run
    # would wait for them for ever.
    option.maxworkerrestart = "0"


def pytest_configure(config):
    if config.option.seed is None:
        config.option.seed = 0 if config.option.fuzz is None else _seed("random")
    # Most tensors of tests are so small that threads would only wait for each other.  Tests of threads ask
    # for some.
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a script's background jobs have it
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_make_parametrize_id(val, argname):
    """A dict, list or tuple is named by what is in it where that is short.  pytest would number them."""
    if isinstance(val, dict):
        text = ",".join(f"{key}={value}" for key, value in val.items())
    elif isinstance(val, (list, tuple)):
        text = ",".join(map(str, val))
    else:
        return None
    return (
        text
        if 0 < len(text) <= 40 and text.isascii() and text.isprintable() and " at 0x" not in text
        else None
    )


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        place = {f"test_{name}": i for i, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    for item in items:
        # Markers, not item.keywords: these hold the names of folders too, and a clone in a folder "gpu" ran
        # no test.
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if item.get_closest_marker("large") and not config.getoption("--large"):
            item.add_marker(pytest.mark.skip(reason="needs much memory or disk: run with --large"))
    if config.option.fuzz is not None:
        left_out = [item for item in items if not _is_fuzzed(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _is_fuzzed(item)]
        random.Random(config.option.seed).shuffle(items)


def pytest_collection_finish():
    """What is there before the first test stays: a collection that went through it would take a second, and
    transformers asks for many of them.
    """
    gc.collect()
    gc.freeze()


def _is_fuzzed(item) -> bool:
    skipped = any(mark.name == "skip" for mark in item.iter_markers())
    return "rng" in item.fixturenames and item.get_closest_marker("slow") is None and not skipped


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """``--fuzz``: the tests in turn, and again from the next seed, until the time is over."""
    option = session.config.option
    if option.fuzz is None or option.collectonly or session.testsfailed:
        return None  # pytest's own loop
    session.config.get_terminal_writer().line(f"fuzz: seed {option.seed}, {option.fuzz:g} seconds")
    end = time.monotonic() + option.fuzz
    while session.items and time.monotonic() < end:
        for i, item in enumerate(session.items):
            following = session.items[i + 1] if i + 1 < len(session.items) else None
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
            if time.monotonic() >= end:
                break
        option.seed += 1
    return True


@pytest.fixture(autouse=True)
def _seeded(request) -> int:
    """The seed of this test, from which torch's default generator begins, too."""
    run = request.config.option.seed if "rng" in request.fixturenames else 0
    request.node.user_properties.append(("seed", run))  # for pytest_terminal_summary
    seed = int.from_bytes(hashlib.sha256(f"{run} {request.node.nodeid}".encode()).digest()[:6], "little")
    torch.manual_seed(seed)
    return seed


@pytest.fixture(autouse=True)
def _poisoned(request):
    """Fresh memory is poisoned, in tests on a GPU where kernels are compared with the reference
    (check_backend).
    """
    with contextlib.nullcontext() if request.node.get_closest_marker("gpu") else poisoned():
        yield


@pytest.fixture
def rng(_seeded) -> random.Random:
    """A generator from the seed of this test, which must be right for every seed."""
    return random.Random(_seeded)


def pytest_terminal_summary(terminalreporter):
    """How to repeat each failure."""
    failed = [report for kind in ("failed", "error") for report in terminalreporter.stats.get(kind, ())]
    lines = [
        f"pytest '{report.nodeid}' --seed {dict(report.user_properties)['seed']}"
        for report in failed
        if "seed" in dict(getattr(report, "user_properties", ()))
    ]
    if lines:
        terminalreporter.section("run again")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(params=["reference", *CPU_KERNELS])
def cpu_backend(request, monkeypatch):
    """Every way to compute on CPU tensors: the reference and each instruction set of the compiled library."""
    use_kernel(request.param, monkeypatch)
    name = "reference" if request.param == "reference" else "cpu"
    with zokernels.backend(name):
        yield request.param


@pytest.fixture(params=CPU_KERNELS)
def cpu_kernel(request, monkeypatch):
    """Each instruction set of the compiled library."""
    use_kernel(request.param, monkeypatch)
    with zokernels.backend("cpu"):
        yield request.param


def use_kernel(name: str, monkeypatch) -> None:
    import importlib

    if name == "reference":
        return
    from zokernels import _host

    isa = name.removeprefix("cpu-")
    if isa not in _host.instruction_sets():
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setattr(importlib.import_module("zokernels.backends.cpu.isa"), "isa", isa)
