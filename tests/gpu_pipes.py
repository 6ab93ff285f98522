"""What each kernel costs an NVIDIA GPU on each of its pipes, from its machine code: a bound, and not a
measurement.

    python tests/gpu_pipes.py            prints the table of docs/performance.md
    python tests/gpu_pipes.py --write    puts it there

A multiprocessor is four sub-partitions.  Each issues one instruction of a warp (32 threads) in a cycle, and
has pipes of its own that take an instruction for several cycles: ``ALU`` 2, ``FMA`` 2 (from sm_90 on it is
two pipes, a heavy and a lite one; integer products are the heavy one's alone, an ``IMAD.WIDE`` 4 cycles of
it), ``XU`` 8.  Cycles an element are those of a sub-partition for 32 elements, which a warp's threads handle
side by side; so they compare with instructions an element, which are the cycles of the issue slot.  The
largest of a kernel's figures is its bound:

    elements a second = multiprocessors x 4 x 32 x clock / cycles

No kernel reaches its bound: instructions wait for operands, for registers' ports and for each other.
Latency, the caches and the order of instructions are not part of this.

Where the figures come from:

* results a clock and multiprocessor of each kind of instruction: CUDA C++ Programming Guide, "Throughput of
  Native Arithmetic Instructions" (fp32 64 on 8.0 and 128 on 9.0 and 10.0; integer, logic, comparison, shift
  64; special functions 16).  A warp's 32 results at 64 a clock and multiprocessor are 2 cycles of a
  sub-partition.
* which pipe takes which instruction: Nsight Compute's documentation ("Pipelines") names the kinds; for single
  opcodes the counters of Nsight Compute, read by others: for 8.0 and 9.0
      github.com/cicuvc/nvidia-sass-document (A100
  and H100: IMAD.WIDE 4 cycles, IDP 2 of the pipe that multiplies, F2FP and VIMNMX of the ALU), for 10.x
  github.com/ademeure/QuickRunCUDA (B300: FFMA2 takes heavy and lite together for 2 cycles, I2FP the ALU), and
  NVIDIA's answer at forums.developer.nvidia.com/t/302018/7 (heavy: IMAD, IDP and fp32; lite: fp32).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import disassembly

ROOT = Path(__file__).parent.parent
ARCHITECTURES = (80, 90, 100)

#: Pipe of an opcode by its part before the first dot.  "fp32": heavy or lite, whichever is free; "both": the
#: two together.
_OPCODES = {
    "alu": """
        BMSK CSEL F2FP F2IP FMNMX FMNMX3 FSEL FSET FSETP I2FP I2IP IABS IADD IADD3 IMNMX ISETP LEA LOP3 MOV
        P2R PLOP3 PRMT R2P SEL SGXT SHF VABSDIFF VIADD VIADDMNMX VIMNMX VIMNMX3 VOTE
    """,
    "fp32": "FADD FFMA FMUL",
    "heavy": "HADD2 IDP IMAD IMUL",
    "both": "FADD2 FFMA2 FMUL2 HFMA2 HMUL2",
    "xu": "BREV F2F F2I FLO I2F MUFU POPC",
    "fp64": "DADD DFMA DMUL DSETP",
    "memory": """
        ATOM ATOMG CCTL CS2R CS2UR LD LDC LDCU LDG LDL LDS LDSM RED REDG REDUX S2R S2UR SHFL ST STG STL STS
        STSM
    """,
    "control": """
        ACQBULK BAR BMOV BRA BREAK BRX BSSY BSYNC CALL DEPBAR ERRBAR EXIT JMP LEPC MEMBAR NANOSLEEP NOP
        PREEXIT RET WARPSYNC YIELD
    """,
}
PIPE_OF = {name: pipe for pipe, names in _OPCODES.items() for name in names.split()}


def pipe_of(opcode: str) -> str:
    """The pipe of an opcode; ``uniform`` for those of a warp as a whole, which take an issue slot alone.

    Raises ``KeyError`` for one that is not listed: a wrong guess would be a wrong bound.
    """
    name = opcode.split(".")[0]
    if opcode.startswith("HFMA2.MMA"):  # nvcc's way to make two constants
        return "control"
    if name in PIPE_OF:
        return PIPE_OF[name]
    if name.startswith(("U", "R2U")):
        return "uniform"
    raise KeyError(f"{opcode}: expected an opcode whose pipe tests/gpu_pipes.py knows")


@dataclass(frozen=True)
class Cycles:
    """Cycles of a sub-partition: of a pipe, or of its issue slot."""

    issue: float
    alu: float
    fma: float
    xu: float

    @property
    def bound(self) -> float:
        return max(self.issue, self.alu, self.fma, self.xu)

    @property
    def decides(self) -> str:
        names = {"issue": "issue", "alu": "ALU", "fma": "FMA", "xu": "XU"}
        return max(names.items(), key=lambda item: getattr(self, item[0]))[1]


def cycles(opcodes: Counter[str], architecture: int, elements: float) -> Cycles:
    """Cycles an element of ``opcodes``, which one thread executes for ``elements`` elements."""
    on: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        pipe = pipe_of(opcode)
        wide = pipe == "heavy" and re.search(r"\.(WIDE|HI)\b", opcode) is not None
        on[pipe] += count * {"alu": 2, "fp32": 2, "heavy": 4 if wide else 2, "both": 2, "xu": 8}.get(pipe, 1)
    if architecture < 86:  # one pipe; packed fp16 has its own
        fma = on["heavy"] + on["fp32"]
    else:
        fma = on["both"] + max(on["heavy"], (on["heavy"] + on["fp32"]) / 2)
    figures = (opcodes.total(), on["alu"], fma, on["xu"])
    return Cycles(*(figure / elements for figure in figures))


# --- residence --------------------------------------------------------------------------------------------

#: Registers and warps of a multiprocessor; registers are given to a warp by 256, that is eight a thread.
REGISTERS, WARPS = 65536, 64


def warps_resident(registers: int, warps_of_block: int) -> int:
    """Warps that a multiprocessor of sm_80, sm_90 or sm_100 holds, by registers of a thread alone."""
    rounded = -(-registers // 8) * 8
    return min(REGISTERS // (rounded * 32 * warps_of_block), WARPS // warps_of_block) * warps_of_block


# --- kernels ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """A kernel of the table, and what one of its threads does where nothing is masked."""

    name: str
    #: An instantiation of a template of csrc/cuda, in namespace zk::cuda, with the type of its argument; or a
    #: function that compiles a kernel of Triton's for an architecture.
    source: tuple[str, str] | Callable[[int], bytes]
    elements: int
    accesses: int  # of 16 bytes: the stores, or where ``access`` says so the loads
    bytes: (
        float  # that a plain pass over the same data moves for an element: what is read and what is written
    )
    warps: int = 8  # of a thread block
    access: str = disassembly.WIDE_STORE  # where most of these are is the loop that counts
    load: int = 4  # words of 4 bytes of an access that reads

    @property
    def backend(self) -> str:
        return "CUDA" if isinstance(self.source, tuple) else "Triton"


#: In C++, and 16-byte accesses of eight elements.
_DTYPES = {"fp32": ("f32", 2), "bf16": ("bf16", 1), "fp16": ("f16", 1)}

#: The kernel's argument for a few tensors.
_BYTES = "kMaxArgument"
_LAUNCH = f"CombineLaunch<{_BYTES}>"


def _combine(
    dist: str, dtype: str, count: int = 1, *, decay: bool = False, stochastic: bool = False
) -> Kernel:
    cpp, accesses = _DTYPES[dtype]
    arguments = f"DType::{cpp}, {count}, {decay:d}, {stochastic:d}, {_BYTES}, false"
    name = f"combine, {dtype}, {dist}" + f", K = {count}" * (count > 1) + ", stochastic" * stochastic
    source = (f"combine_{dist}_kernel<{arguments}>", _LAUNCH)
    return Kernel(name, source, 128, 16 * accesses, 4 * accesses)


def _fan_out(dist: str, dtype: str, count: int) -> Kernel:
    """One pending update, or (0) any number of them."""
    cpp, accesses = _DTYPES[dtype]
    arguments = f"DType::{cpp}, {count}, {count == 0:d}, false, {_BYTES}, true"
    source = (f"combine_{dist}_kernel<{arguments}>", _LAUNCH)
    name = (
        f"fan_out, {dtype}, {dist}, {'one pending' if count else 'any number pending, one direction of them'}"
    )
    return Kernel(name, source, 128, 3 * 16 * accesses, 8 * accesses)


def _project(dist: str, dtype: str, count: int = 4) -> Kernel:
    """As many directions as a thread block takes at once.  A thread reads an eighth of a tile of 4096."""
    cpp, accesses = _DTYPES[dtype]
    domain = {"normal": "kNormal", "rademacher": "kRademacher"}[dist]
    source = (f"project_kernel<DType::{cpp}, {domain}>", "ProjectLaunch")
    return Kernel(
        f"project, {dtype}, {dist}, K = {count}",
        source,
        512,
        64 * accesses,
        2 * accesses,
        access=disassembly.WIDE_LOAD,
    )


def _decode_fan_out(dist: str, dtype: str, wire: str) -> Kernel:
    """Nothing pending; a code of eight bits is read and two sides are written."""
    cpp, accesses = _DTYPES[dtype]
    domain = {"normal": "kNormal", "rademacher": "kRademacher"}[dist]
    code = {"fp8": "e4m3", "int8": "i8"}[wire]
    source = (f"decode_kernel<DType::{cpp}, DType::{code}, {domain}, true, false>", "DecodeLaunch")
    name = f"decode_fan_out, {wire} to {dtype}, {dist}"
    return Kernel(name, source, 128, 2 * 16 * accesses, 1 + 1 / 32 + 4 * accesses, load=2)


def _triton(dist: str, dtype: str, count: int = 1, *, stochastic: bool = False) -> Kernel:
    def compile_for(architecture: int) -> bytes:
        import triton_kernels

        return triton_kernels.combine_kernel(architecture, dtype, dist, count, rounding=stochastic).asm[
            "cubin"
        ]

    name = f"combine, {dtype}, {dist}" + f", K = {count}" * (count > 1) + ", stochastic" * stochastic
    return Kernel(name, compile_for, 128, 16 * _DTYPES[dtype][1], 4 * _DTYPES[dtype][1], warps=4)


CUDA = [
    _combine("normal", "bf16"),
    _combine("normal", "fp32"),
    _combine("normal", "fp16"),
    _combine("normal", "bf16", stochastic=True),
    _combine("normal", "fp16", stochastic=True),
    _combine("normal", "bf16", 2),
    _combine("normal", "bf16", 2, stochastic=True),
    _combine("rademacher", "bf16"),
    _combine("rademacher", "fp32"),
    _combine("rademacher", "bf16", stochastic=True),
    _fan_out("normal", "bf16", 1),
    _fan_out("normal", "fp32", 0),
    _decode_fan_out("normal", "bf16", "fp8"),
    _project("normal", "bf16"),
    _project("rademacher", "bf16"),
]
TRITON = [
    _triton("normal", "bf16"),
    _triton("normal", "bf16", stochastic=True),
    _triton("normal", "bf16", 2, stochastic=True),
    _triton("rademacher", "bf16"),
    _triton("rademacher", "bf16", stochastic=True),
]


#: Files of csrc/cuda whose kernels are in the table and stand before their entries, which are left out: an
#: entry compiles every instantiation.
FILES = ("project", "wire")


def kernels_of(file: str) -> str:
    """The part of ``csrc/cuda/<file>.cu`` before its entry, with what it includes."""
    text = (ROOT / "csrc/cuda" / f"{file}.cu").read_text()
    head, found, _ = text.partition("// --- the entry ")
    if not found:
        raise ValueError(f"{file}.cu: expected a section of kernels and then one of the entry")
    return re.sub(r'#include "(\.\./)?', lambda m: f'#include "csrc/{"" if m[1] else "cuda/"}', head) + "}\n"


def compile_cuda(kernels: Iterable[Kernel], architecture: int) -> bytes:
    """A cubin with the instantiations of ``kernels`` alone.  Raises ``FileNotFoundError`` without nvcc."""
    import cuda_on_host

    nvcc = disassembly.find_tool("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc: expected on PATH or in /usr/local/cuda/bin")
    lines = ['#include "csrc/cuda/combine_kernel.cuh"', *map(kernels_of, FILES), "namespace zk::cuda {"]
    for kernel in kernels:
        name, argument = kernel.source
        lines.append(f"template __global__ void {name}(const __grid_constant__ {argument});")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernels.cu"), Path(folder, "kernels.cubin")
        source.write_text("\n".join([*lines, "}", ""]))
        command = [nvcc, "-cubin", f"-arch=sm_{architecture}", "-std=c++20", *cuda_on_host.TORCH]
        subprocess.run([*command, source, "-o", cubin], check=True)
        return cubin.read_bytes()


@dataclass(frozen=True)
class Row:
    """What a kernel costs an architecture."""

    kernel: Kernel
    architecture: int
    cycles: Cycles  # an element
    registers: int  # of a thread
    warps: int  # that a multiprocessor holds
    in_flight: int  # bytes that loads of a multiprocessor wait for, at most
    stack: int  # bytes of local memory of a thread: what is spilled
    opcodes: Counter[str] = field(repr=False)


def row_of(
    kernel: Kernel, architecture: int, function: disassembly.Function, usage: disassembly.Usage
) -> Row:
    trips, rest = divmod(kernel.accesses, function.hot_count(kernel.access, kernel.access))
    if rest:
        raise ValueError(f"{kernel.name}: expected a loop of some of {kernel.accesses} accesses")
    opcodes = function.opcodes(trips, kernel.access)
    warps = warps_resident(usage.registers, kernel.warps)
    load = {4: disassembly.WIDE_LOAD, 2: disassembly.HALF_WIDE_LOAD}[kernel.load]
    waiting = function.loads_in_flight(load, kernel.access, kernel.load)
    in_flight = warps * 32 * 4 * kernel.load * waiting
    found = cycles(opcodes, architecture, kernel.elements)
    return Row(kernel, architecture, found, usage.registers, warps, in_flight, usage.stack, opcodes)


def _mangled(kernel: Kernel) -> str:
    """A pattern of the mangled name of an instantiation."""
    assert isinstance(kernel.source, tuple)
    stem, arguments = kernel.source[0].rstrip(">").split("<")
    return f"{stem}I{''.join(map(_mangled_argument, arguments.split(', ')))}E"


def _mangled_argument(argument: str) -> str:
    kind, _, value = argument.rpartition("::")
    if kind == "DType":  # the second time its name is an abbreviation
        return rf"L(NS0_5DTypeE|S\d_){['f32', 'bf16', 'f16', 'i8', 'e4m3'].index(value)}E"
    if value in ("kNormal", "kRademacher"):
        return rf"LNS_6DomainE{1 + (value == 'kRademacher')}E"
    if value in ("true", "false"):
        return f"Lb{value == 'true':d}E"
    return r"Li\d+E" if value == _BYTES else f"L[ib]{value}E"


def rows(kernels: Iterable[Kernel], architecture: int) -> list[Row]:
    """Compiles ``kernels`` for an architecture and reads them."""
    kernels = list(kernels)
    found = {}
    cuda = [kernel for kernel in kernels if kernel.backend == "CUDA"]
    if cuda:
        cubin = compile_cuda(cuda, architecture)
        functions, usages = disassembly.disassemble(cubin), disassembly.usages(cubin)
        for kernel in cuda:
            function = disassembly.select(functions, _mangled(kernel))
            found[kernel] = row_of(kernel, architecture, function, usages[function.name])
    for kernel in kernels:
        if callable(kernel.source):
            cubin = kernel.source(architecture)
            function = disassembly.select(disassembly.disassemble(cubin), "_kernel$")
            found[kernel] = row_of(kernel, architecture, function, disassembly.usages(cubin)[function.name])
    return [found[kernel] for kernel in kernels]


# --- cards ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """Assumed, not measured, but for the H200's copy: 4.3 of its data sheet's 4.8 TB/s.

    The others take that share.
    """

    name: str
    architecture: int
    multiprocessors: int
    clock: float  # GHz that it holds under load
    sheet: float  # TB/s of the data sheet

    @property
    def copy(self) -> float:
        """TB/s that a plain pass moves, reads and writes together."""
        return self.sheet * 4.3 / 4.8

    def bound(self, row: Row) -> float:
        """TB/s that the instructions alone would allow."""
        elements = self.multiprocessors * 4 * 32 * self.clock * 1e9 / row.cycles.bound
        return elements * row.kernel.bytes / 1e12

    def share(self, row: Row) -> float:
        """Of a copy's bandwidth, where the slower of memory and instructions decides."""
        return min(1.0, self.bound(row) / self.copy)


CARDS = [
    Card("A100", 80, 108, 1.41, 2.04),
    Card("H100", 90, 132, 1.755, 3.35),
    Card("H200", 90, 132, 1.755, 4.8),
    Card("B200", 100, 148, 1.85, 8.0),
]

MARKS = "<!-- pipes: begin -->", "<!-- pipes: end -->"
PAGE = ROOT / "docs/performance.md"


def table(found: Iterable[Row]) -> str:
    """Markdown: a line for each kernel and architecture, with the bound and the share of a copy on its
    cards.
    """
    lines = [
        "| kernel | | registers | warps | KB in flight | issue | ALU | FMA | XU | predicted: bound, "
        "share of copy |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in found:
        figures = [f"{getattr(row.cycles, pipe):.1f}" for pipe in ("issue", "alu", "fma", "xu")]
        decides = ["issue", "ALU", "FMA", "XU"].index(row.cycles.decides)
        figures[decides] = f"**{figures[decides]}**"
        cards = [card for card in CARDS if card.architecture == row.architecture]
        shares = "; ".join(f"{card.name} {card.bound(row):.1f} TB/s, {card.share(row):.2f}" for card in cards)
        kernel = row.kernel.name + ", Triton" * (row.kernel.backend == "Triton")
        where = (
            f"| {kernel} | sm_{row.architecture} | {row.registers} | {row.warps} | {row.in_flight >> 10} |"
        )
        lines.append(f"{where} {' | '.join(figures)} | {shares} |")
    return "\n".join(lines)


def everything() -> list[Row]:
    found = {(row.kernel, row.architecture): row for a in ARCHITECTURES for row in rows([*CUDA, *TRITON], a)}
    return [found[kernel, architecture] for kernel in (*CUDA, *TRITON) for architecture in ARCHITECTURES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    write = parser.parse_args().write
    text = table(everything())
    if not write:
        print(text)
        return
    begin, end = MARKS
    head, rest = PAGE.read_text().split(begin)
    PAGE.write_text(f"{head}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
