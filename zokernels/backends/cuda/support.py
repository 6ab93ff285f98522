"""Whether ``libzokernels_cuda.so`` can run here: what it was built for, against the driver and each device.

The rules are NVIDIA's (CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility"; CUDA
Compatibility, "Minor Version Compatibility"):

* The CUDA runtime is inside the library.  It needs a driver of its own major version, or a later one.
* Machine code for compute capability X.y runs on devices X.z with z >= y.  On a system on a chip (Orin,
  Thor) it runs on X.y alone.
* The driver compiles PTX for X.y for every device from X.y on.  For that it must be as new as the compiler
  that wrote the PTX.
* With the suffix "a" machine code and PTX are for X.y alone.  With "f" PTX is for devices X.z alone, too.
"""

from __future__ import annotations

import ctypes
import json
from typing import NamedTuple

import torch

from ..library import BUILD, path_of
from ..registry import BackendUnavailable

Capability = tuple[int, int]

#: The systems on a chip that run machine code of their own architecture alone: Orin and Thor.
_TEGRA = frozenset(((8, 7), (11, 0)))


class Target(NamedTuple):
    """An architecture that the library was built for."""

    capability: Capability
    suffix: str  #: "a": for this capability alone; "f": for devices of its major version; or none
    machine_code: bool  #: whether the library has machine code for it
    ptx: bool  #: whether the library has PTX for it

    @classmethod
    def parse(cls, text: str) -> Target:
        """Reads CMake's form: "90-real" is machine code, "90-virtual" is PTX, and "90" is both.

        The last digit is the minor version, and a suffix may follow it.
        """
        number, _, kind = text.partition("-")
        digits = number.rstrip("af")
        suffix = number[len(digits) :]
        return cls((int(digits[:-1]), int(digits[-1])), suffix, kind != "virtual", kind != "real")

    def runs_binary(self, device: Capability) -> bool:
        if not self.machine_code or self.suffix == "a" or device in _TEGRA:
            return self.machine_code and self.capability == device
        return self.capability[0] == device[0] and self.capability[1] <= device[1]

    def runs_ptx(self, device: Capability) -> bool:
        if not self.ptx or self.suffix == "a":
            return self.ptx and self.capability == device
        return self.capability <= device and (not self.suffix or self.capability[0] == device[0])

    def __str__(self) -> str:
        what = {(True, False): "", (False, True): " as PTX", (True, True): " and its PTX"}
        return f"{version_text(*self.capability)}{self.suffix}{what[self.machine_code, self.ptx]}"


class Build(NamedTuple):
    """What the library was built for."""

    runtime: int  #: version of the CUDA runtime inside: 1000 major + 10 minor
    compiler: int  #: version of nvcc, in the same form
    targets: tuple[Target, ...]

    @classmethod
    def read(cls) -> Build:
        """Asks the library, which has been loaded."""
        try:
            function = _library().zokernels_cuda_build
        except AttributeError as error:
            text = f"backend 'cuda' is built from other sources; rebuild it with: {BUILD['cuda']}"
            raise BackendUnavailable(text) from error
        function.restype = ctypes.c_char_p
        found = json.loads(function())
        major, minor = found["compiler"]
        targets = tuple(Target.parse(text) for text in found["targets"].split(","))
        return cls(found["runtime"], 1000 * major + 10 * minor, targets)

    def __str__(self) -> str:
        return f"CUDA {cuda_text(self.runtime)} for {', '.join(map(str, self.targets))}"


class Machine(NamedTuple):
    """What torch and the driver say of this machine; tests make other ones."""

    torch: str | None  #: the CUDA version that torch was built for; None: it has no CUDA
    driver: int  #: the newest CUDA version that the driver runs: 1000 major + 10 minor; 0: there is no driver
    capabilities: tuple[Capability, ...]  #: of each device

    @classmethod
    def here(cls) -> Machine:
        function = _library().zokernels_cuda_driver
        function.restype = ctypes.c_int
        driver = int(function())
        count = torch.cuda.device_count() if driver and torch.version.cuda else 0
        return cls(
            torch.version.cuda, driver, tuple(torch.cuda.get_device_capability(i) for i in range(count))
        )


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(path_of("cuda")))


def version_text(major: int, minor: int) -> str:
    return f"{major}.{minor}"


def cuda_text(version: int) -> str:
    return version_text(version // 1000, version % 1000 // 10)


def machine_problem(build: Build, machine: Machine) -> str | None:
    """Why no device at all can run the library's code, as the end of a sentence; None where one may."""
    driver = machine.driver
    if machine.torch is None:
        return f"is built, but torch {torch.__version__} has no CUDA; install a CUDA build of torch"
    if not driver:
        return "is built, but this machine has no NVIDIA driver"
    if not machine.capabilities:
        return "is built, but torch sees no NVIDIA GPU (is it hidden by CUDA_VISIBLE_DEVICES?)"
    if driver // 1000 < build.runtime // 1000:
        major = build.runtime // 1000
        return (
            f"is built with CUDA {cuda_text(build.runtime)}, which needs a driver for CUDA {major}.0 "
            "or later, got one "
            f"for {cuda_text(driver)}; update the driver, or rebuild with its toolkit: {BUILD['cuda']}"
        )
    return None


def device_problem(build: Build, driver: int, capability: Capability) -> str | None:
    """Why a device cannot run the library's code, as the end of a sentence; None where it can."""
    too_old = None
    for target in build.targets:
        if target.runs_binary(capability) or (target.runs_ptx(capability) and driver >= build.compiler):
            return None
        if target.runs_ptx(capability):
            too_old = target
    if too_old is not None:
        return (
            f"has PTX of {version_text(*too_old.capability)} for compute capability "
            f"{version_text(*capability)}, "
            f"which needs a driver for CUDA {cuda_text(build.compiler)} or later, got one for "
            f"{cuda_text(driver)}; "
            f"update the driver, or rebuild: TORCH_CUDA_ARCH_LIST={version_text(*capability)} {BUILD['cuda']}"
        )
    return (
        f"is built for {', '.join(map(str, build.targets))}, got a device of compute capability "
        f"{version_text(*capability)}; rebuild it: TORCH_CUDA_ARCH_LIST={version_text(*capability)} "
        f"{BUILD['cuda']}"
    )
