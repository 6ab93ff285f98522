"""Ceilings on the pipe that decides, of each kernel and architecture in docs/performance.md's table.

No GPU needed.
"""

from __future__ import annotations

import subprocess
from collections import Counter

import disassembly
import gpu_pipes
import pytest
from gpu_pipes import CARDS, CUDA, TRITON, Kernel, Row, cycles, pipe_of, warps_resident

# --- the table's own arithmetic ---------------------------------------------------------------------------


def test_cycles_by_hand():
    """64 single fmas and 8 wide products: 64 x 2 and 8 x 4 cycles, of two pipes that share the fmas or of
    one.
    """
    opcodes = Counter(
        {"FFMA": 64, "IMAD.WIDE.U32": 8, "LOP3.LUT": 10, "MUFU.RSQ": 4, "LDG.E.128": 1, "UIADD3": 5}
    )
    hopper, ampere = cycles(opcodes, 90, 8), cycles(opcodes, 80, 8)
    assert (hopper.issue, hopper.alu, hopper.fma, hopper.xu) == (92 / 8, 20 / 8, (128 + 32) / 2 / 8, 32 / 8)
    assert (ampere.issue, ampere.alu, ampere.fma, ampere.xu) == (92 / 8, 20 / 8, (128 + 32) / 8, 32 / 8)
    assert (hopper.decides, hopper.bound) == ("issue", 92 / 8)
    assert (ampere.decides, ampere.bound) == ("FMA", 160 / 8)


def test_what_only_one_half_of_the_pipe_takes():
    """Six wide products leave the lite half idle; a packed fma takes both."""
    opcodes = Counter({"IMAD.WIDE.U32": 6, "FFMA": 2, "FFMA2": 3})
    assert cycles(opcodes, 100, 1).fma == 24 + 6


def test_pipes_of_opcodes():
    opcodes = ("FFMA2", "IMAD.MOV.U32", "F2FP.BF16.F32.PACK_AB", "UIADD3.X", "I2F.S16", "HFMA2.MMA")
    assert [pipe_of(op) for op in opcodes] == ["both", "heavy", "alu", "uniform", "xu", "control"]
    with pytest.raises(KeyError, match="HMMA"):
        pipe_of("HMMA.16816.F32")


def test_warps_by_registers():
    assert [warps_resident(n, 8) for n in (32, 33, 64, 65, 73, 128, 255)] == [64, 48, 32, 24, 24, 16, 8]
    assert warps_resident(50, 4) == 36


SAMPLE = """
.text.sample:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E.128 R8, desc[UR4][R2.64+0x1000] ;
        /*0020*/                   FADD R5, R20, R7 ;
        /*0030*/                   LDG.E.128 R12, desc[UR4][R2.64+0x2000] ;
        /*0040*/                   FADD R8, R8, R15 ;
        /*0050*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0060*/                   EXIT ;
"""


def test_loads_in_flight_by_hand():
    """R7 ends the wait for the first load before the third is issued."""
    assert disassembly.select(disassembly.parse(SAMPLE), "sample").loads_in_flight() == 2


def test_share_of_a_copy():
    row = Row(Kernel("", ("", ""), 1, 1, 4), 90, gpu_pipes.Cycles(20, 1, 1, 1), 32, 64, 0, 0, Counter())
    h200 = next(card for card in CARDS if card.name == "H200")
    assert h200.bound(row) == pytest.approx(132 * 4 * 32 * 1.755e9 / 20 * 4 / 1e12)
    assert h200.share(row) == 1
    assert h200.copy == pytest.approx(4.3)


# --- the kernels ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def found() -> dict[tuple[Kernel, int], Row]:
    """Every row, by kernel and architecture."""
    pytest.importorskip("triton")
    if disassembly.find_tool("nvcc") is None:
        pytest.skip("no nvcc")
    return {(row.kernel, row.architecture): row for row in gpu_pipes.everything()}


#: Cycles an element on the pipe that decides, with nvcc 13.0 or Triton 3.7.1: sm_80, sm_90, sm_100.  nvcc's
#: vary by 0.5 with what else is compiled in the same file.
CEILINGS = {
    "combine, bf16, normal": (31.5, 23.4, 20.6),
    "combine, fp32, normal": (31.5, 22.2, 19.5),
    "combine, fp16, normal": (33.5, 23.4, 20.6),
    "combine, bf16, normal, stochastic": (40.0, 31.5, 28.5),
    "combine, fp16, normal, stochastic": (47.5, 41.3, 37.9),
    "combine, bf16, normal, K = 2": (62.1, 43.9, 38.9),
    "combine, bf16, normal, K = 2, stochastic": (70.8, 51.5, 46.9),
    "combine, bf16, rademacher": (6.1, 6.0, 6.0),
    "combine, fp32, rademacher": (4.8, 4.8, 4.8),
    "combine, bf16, rademacher, stochastic": (17.1, 15.8, 15.4),
    "fan_out, bf16, normal, one pending": (64.7, 48.5, 43.9),
    "fan_out, fp32, normal, any number pending, one direction of them": (68.4, 55.8, 52.0),
    "decode_fan_out, fp8 to bf16, normal": (41.5, 30.2, 27.1),
    "project, bf16, normal, K = 4": (124.5, 90.2, 76.5),
    "project, bf16, rademacher, K = 4": (26.3, 26.3, 25.8),
    "low_rank_linear, bf16, rank 4: sums over 4096 columns": (11.3, 10.4, 10.9),
    "low_rank_linear, bf16, rank 4: out": (22.7, 20.7, 20.6),
}
TRITON_CEILINGS = {
    "combine, bf16, normal": (31.6, 23.1, 20.8),
    "combine, bf16, normal, stochastic": (40.0, 30.4, 28.1),
    "combine, bf16, normal, K = 2, stochastic": (71.0, 50.3, 45.7),
    "combine, bf16, rademacher": (6.1, 5.9, 5.4),
    "combine, bf16, rademacher, stochastic": (16.6, 15.5, 15.1),
}


@pytest.mark.parametrize("architecture", gpu_pipes.ARCHITECTURES)
@pytest.mark.parametrize("kernel", [*CUDA, *TRITON], ids=lambda k: f"{k.backend}: {k.name}")
def test_the_pipe_that_decides(found, kernel, architecture):
    row = found[kernel, architecture]
    ceilings = (CEILINGS if kernel.backend == "CUDA" else TRITON_CEILINGS)[kernel.name]
    ceiling = ceilings[gpu_pipes.ARCHITECTURES.index(architecture)]
    assert 0.9 * ceiling < row.cycles.bound <= ceiling, (row.cycles, row.opcodes.most_common(12))


@pytest.mark.parametrize("architecture", gpu_pipes.ARCHITECTURES)
@pytest.mark.parametrize("kernel", TRITON, ids=lambda k: k.name)
def test_triton_is_within_five_percent_of_cuda(found, kernel, architecture):
    same = next(k for k in CUDA if k.name == kernel.name)
    bounds = (found[k, architecture].cycles.bound for k in (kernel, same))
    assert next(bounds) <= 1.05 * next(bounds)


@pytest.mark.parametrize("architecture", gpu_pipes.ARCHITECTURES)
@pytest.mark.parametrize("kernel", [*CUDA, *TRITON], ids=lambda k: f"{k.backend}: {k.name}")
def test_nothing_is_spilled(found, kernel, architecture):
    assert found[kernel, architecture].stack == 0


#: What the instructions alone must leave of a copy's bandwidth.
GOALS = [("combine, bf16, normal, stochastic", "H200", 0.85), ("combine, bf16, normal", "B200", 0.85)]


@pytest.mark.parametrize(("name", "card", "goal"), GOALS)
def test_goals(found, name, card, goal):
    card = next(c for c in CARDS if c.name == card)
    kernel = next(k for k in CUDA if k.name == name)
    assert goal <= card.share(found[kernel, card.architecture])


def test_the_page_has_this_table(found):
    """``python tests/gpu_pipes.py --write`` puts it there."""
    import triton

    nvcc = subprocess.run(
        [disassembly.find_tool("nvcc"), "--version"], capture_output=True, text=True, check=True
    )
    if "release 13.0" not in nvcc.stdout or triton.__version__ != "3.7.1":
        pytest.skip("the page is of nvcc 13.0 and Triton 3.7.1")
    begin, end = gpu_pipes.MARKS
    text = gpu_pipes.PAGE.read_text().split(begin)[1].split(end)[0]
    assert text.strip() == gpu_pipes.table(found.values()).strip()
