"""Which drivers and devices the CUDA library runs on: the answers of a driver are given, so no GPU is
needed.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import subprocess
import sys

import pytest
import torch
from disassembly import find_tool

import zokernels
from zokernels import report
from zokernels.backends import BackendUnavailable, library, registry
from zokernels.backends.cuda.support import Build, Machine, Target, device_problem, machine_problem

needs_library = pytest.mark.skipif(
    not library.path_of("cuda").exists(), reason="the CUDA library is not built (no nvcc)"
)


def build(targets: str, runtime: int = 13000, compiler: int = 13000) -> Build:
    return Build(runtime, compiler, tuple(Target.parse(text) for text in targets.split(",")))


#: What setup.py builds by default.
DEFAULT = build("80-real,90-real,100-real,120")
A100, L4, ORIN, H100, B200, B300, THOR = (8, 0), (8, 9), (8, 7), (9, 0), (10, 0), (10, 3), (11, 0)
RTX_50, SPARK, LATER = (12, 0), (12, 1), (13, 0)


@pytest.mark.parametrize(
    ("built", "driver", "capability", "problem"),
    [
        # Machine code: the same major version, the same minor one or a later one.
        (DEFAULT, 13000, A100, None),
        (DEFAULT, 13000, L4, None),
        (DEFAULT, 13000, H100, None),
        (DEFAULT, 13000, B300, None),
        (DEFAULT, 13000, SPARK, None),
        (
            DEFAULT,
            13000,
            (7, 5),
            "is built for 8.0, 9.0, 10.0, 12.0 and its PTX, got a device of compute capability 7.5",
        ),
        (DEFAULT, 13000, ORIN, "got a device of compute capability 8.7"),
        (build("87-real"), 13000, ORIN, None),
        (build("87-real"), 13000, L4, None),
        (build("89-real"), 13000, A100, "is built for 8.9, got a device of compute capability 8.0"),
        (
            build("90-real"),
            13000,
            A100,
            "is built for 9.0, got .* 8.0; rebuild it: TORCH_CUDA_ARCH_LIST=8.0 ZOKER",
        ),
        (build("90-real"), 13000, B200, "got a device of compute capability 10.0"),
        # Of one device, or of its family.
        (build("90a-real"), 13000, H100, None),
        (build("100a-real"), 13000, B300, "is built for 10.0a, got a device of compute capability 10.3"),
        (build("100f-real"), 13000, B300, None),
        (build("90a"), 13000, B200, "is built for 9.0a and its PTX, got"),
        (build("100f"), 13000, RTX_50, "is built for 10.0f and its PTX, got"),
        (build("100f-virtual"), 13000, B300, None),
        # PTX: every later device, with a driver as new as the compiler.
        (DEFAULT, 13000, LATER, None),
        (build("80"), 13000, H100, None),
        (build("80"), 13000, ORIN, None),
        (build("80-virtual"), 13000, A100, None),
        (
            build("80-virtual", compiler=13010),
            13000,
            A100,
            "has PTX of 8.0 for .* 8.0, .* CUDA 13.1 or later, got .* 13.0",
        ),
        (build("80", compiler=13010), 13000, A100, None),
        (
            build("80", compiler=13010),
            13000,
            THOR,
            "has PTX of 8.0 for compute capability 11.0, which needs a driver",
        ),
        (build("80-real,90-virtual"), 13000, A100, None),
        (build("90-virtual"), 13000, A100, "is built for 9.0 as PTX, got a device of compute capability 8.0"),
    ],
)
def test_devices(built, driver, capability, problem):
    found = device_problem(built, driver, capability)
    assert found is None if problem is None else re.search(problem, found), found


@pytest.mark.parametrize(
    ("machine", "problem"),
    [
        (Machine("13.0", 13000, (H100,)), None),
        (Machine("12.8", 13020, (H100,)), None),
        (Machine("13.1", 14000, (H100,)), None),
        (Machine(None, 13000, ()), "is built, but torch .* has no CUDA; install a CUDA build of torch"),
        (Machine("13.0", 0, ()), "is built, but this machine has no NVIDIA driver"),
        (Machine("13.0", 13000, ()), "is built, but torch sees no NVIDIA GPU"),
        (
            Machine("12.8", 12080, (H100,)),
            "is built with CUDA 13.0, which needs a driver for CUDA 13.0 .* got one for 12.8",
        ),
    ],
)
def test_drivers(machine, problem):
    found = machine_problem(DEFAULT, machine)
    assert found is None if problem is None else re.search(problem, found), found


def test_a_driver_of_the_same_major_version_runs_machine_code():
    """Any driver of the same major version runs the machine code, but none of the major version before
    does.
    """
    twelve = build("90-real", runtime=12080, compiler=12080)
    assert machine_problem(twelve, Machine("12.8", 12000, (H100,))) is None
    assert machine_problem(twelve, Machine("12.8", 11080, (H100,))) is not None


def load(*arguments) -> registry.Backend:
    return importlib.import_module("zokernels.backends.cuda").load(*arguments)


@needs_library
def test_load_decides_for_each_device():
    backend = load(build("90-real"), Machine("13.0", 13000, (A100, H100)))
    assert list(backend.refused) == [torch.device("cuda", 0)]
    with pytest.raises(
        BackendUnavailable, match=r"backend 'cuda' is built for 9.0, got a device .* 8.0; rebuild"
    ):
        load(build("90-real"), Machine("13.0", 13000, (A100, A100)))
    with pytest.raises(BackendUnavailable, match=r"needs a driver for CUDA 13.0 or later, got one for 12.8"):
        load(DEFAULT, Machine("12.8", 12080, (H100,)))
    with pytest.raises(BackendUnavailable, match="torch sees no NVIDIA GPU"):
        load(DEFAULT, Machine("13.0", 13000, ()))


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with an A100 and an H100, and a library for the H100 alone."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") or not library.path_of("cuda").exists():
        pytest.skip("needs the CUDA library and no interpreter")
    backend = load(build("90-real"), Machine("13.0", 13000, (A100, H100)))
    monkeypatch.setitem(registry.LOADED, "cuda", backend)


def test_another_backend_serves_the_devices_that_are_refused(two_gpus):
    assert registry.select("cuda:1").name == "cuda"
    assert registry.select("cuda:0").name == "triton"
    assert registry.select(torch.device("cuda", 0)).name == "triton"
    with zokernels.backend("cuda"):
        assert registry.select("cuda:1").name == "cuda"
        with pytest.raises(
            BackendUnavailable, match=r"backend 'cuda' is built for 9.0, got a device of .* 8.0"
        ):
            registry.select("cuda:0")


def test_the_report_says_why(two_gpus, monkeypatch):
    found = report.facts()
    assert found["backends"]["cuda"]["ready"]
    assert list(found["backends"]["cuda"]["refused"]) == ["cuda:0"]
    lines = report.text(found).splitlines()
    assert any(line.split()[:5] == ["backend", "cuda", "not", "for", "cuda:0:"] for line in lines)
    assert all(len(line) < 240 for line in lines)
    noted = dataclasses.replace(registry.get("triton"), note="compiled, never run")
    monkeypatch.setitem(registry.LOADED, "triton", noted)
    assert any(line.endswith("(compiled, never run)") for line in report.text(report.facts()).splitlines())


@needs_library
def test_the_library_says_what_it_was_built_for():
    """What the library says of itself equals what is in the binary.

    A new process asks the driver of this machine, before torch has touched it.
    """
    library.load("cuda")
    built = Build.read()
    assert all(10000 < version < 20000 for version in (built.runtime, built.compiler))
    assert built.targets
    if tool := find_tool("cuobjdump"):
        list_of = lambda kind: (
            subprocess.run(
                [tool, f"--list-{kind}", str(library.path_of("cuda"))],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        named = lambda kind: {int(number) for number in re.findall(r"\.sm_(\d+)[af]?\.", list_of(kind))}
        number = lambda target: 10 * target.capability[0] + target.capability[1]
        assert named("elf") == {number(target) for target in built.targets if target.machine_code}
        assert named("ptx") == {number(target) for target in built.targets if target.ptx}
    code = "from zokernels.backends import library; library.load('cuda')\n"
    code += "from zokernels.backends.cuda.support import Machine; print(Machine.here())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Machine(torch=")


@needs_library
def test_a_library_of_other_sources_is_named(monkeypatch, tmp_path):
    """One without the functions, as earlier releases have it: the CPU library has none of them either."""
    (tmp_path / "libzokernels_cuda.so").symlink_to(library.path_of("cpu"))
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    with pytest.raises(
        BackendUnavailable, match="backend 'cuda' is built from other sources; rebuild it with: ZOKER"
    ):
        load()
