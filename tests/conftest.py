"""Fresh seeds, devices and backends for every test; what a machine lacks is skipped visibly."""

from __future__ import annotations

import os
import random

import pytest
import torch
from helpers import CPU_KERNELS

import zokernels


def pytest_addoption(parser):
    parser.addoption("--large", action="store_true", help="also run tests that need more than 8 GiB of memory")
    parser.addoption("--seed", type=int, help="repeat a run: every test draws from this seed")


def pytest_collection_modifyitems(config, items):
    for item in items:
        # Markers, not item.keywords: these hold the names of folders too, and a clone in a folder "gpu" ran no test.
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if item.get_closest_marker("large") and not config.getoption("--large"):
            item.add_marker(pytest.mark.skip(reason="needs more than 8 GiB of memory: run with --large"))


@pytest.fixture
def rng(request) -> random.Random:
    """A generator from a fresh seed, which a failure prints."""
    seed = request.config.getoption("--seed")
    if seed is None:
        seed = int.from_bytes(os.urandom(6), "little")
    print(f"repeat with --seed {seed}")
    return random.Random(seed)


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
