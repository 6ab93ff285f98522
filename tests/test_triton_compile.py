"""The Triton kernels compile for sm_80, sm_90 and sm_100 without a GPU, and their SASS stays under the
ceilings.

Ceilings are instructions per element as disassembly.py defines them; ``ZOKERNELS_SHOW_SASS=1 pytest -s``
prints each."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import disassembly

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: there is no compiler in this process", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton_kernels import (  # noqa: E402
    ELEMENTS,
    EVERY,
    FakeDriver,
    combine_kernel,
    decode_kernel,
    encode_kernel,
    fan_out_kernel,
    kernel_names,
    low_rank_kernel,
    project_kernel,
    rows_kernel,
    spread_kernel,
    squares_kernel,
    update_kernel,
    update_rows_kernel,
)

from zokernels.backends.terms import Terms  # noqa: E402
from zokernels.backends.triton import (  # noqa: E402
    combine,
    fan_out,
    launch,
    low_rank,
    requantize,
    spread,
    squares,
    update,
)

#: Bytes of spilled registers: none.  But with some versions of Triton one value of a whole tile is put aside,
#: once for all directions, in two kernels: ``combine`` of K directions on sm_100, ``spread`` on sm_80.
SPILLED = 8 if triton.__version__.startswith(("3.6.", "3.9.")) else 0


def sass(kernel) -> disassembly.Function:
    return disassembly.select(disassembly.disassemble(kernel.asm["cubin"]), "_kernel$")


def stack(kernel) -> int:
    """Bytes that a thread keeps in local memory: spilled registers."""
    (usage,) = disassembly.usages(kernel.asm["cubin"]).values()
    return usage.stack


def check(kernel, spilled=0) -> None:
    """What holds of every kernel: nothing spilled, nothing flushed to zero, and no product that may be fused
    with a sum.
    """
    assert stack(kernel) <= spilled, kernel.name
    assert ftz_of(kernel) == []
    assert fusible(kernel) == []


def ftz_of(kernel) -> list[str]:
    """Lines that flush subnormals, but for the square root's."""
    return [
        line
        for line in kernel.asm["ptx"].splitlines()
        if ".ftz" in line and "rsqrt.approx.ftz.f32" not in line
    ]


def fusible(kernel) -> list[str]:
    """Lines with a product or sum of floats that ptxas may make an fma of: those that name no rounding."""
    return re.findall(r"\b(?:mul|add|sub|mad)\.(?:f16|bf16|f16x2|bf16x2|f32|f64)\b.*", kernel.asm["ptx"])


def test_a_product_without_rounding_is_found():
    class Kernel:
        asm: ClassVar = {
            "ptx": "mul.f32 %r1, %r2, %r3;\nadd.rn.f32 %r1, %r1, %r4;\n{ add.f64 %d1, %d2, %d3; }"
        }

    assert fusible(Kernel) == ["mul.f32 %r1, %r2, %r3;", "add.f64 %d1, %d2, %d3; }"]


def per_element(kernel, dtype) -> float:
    """A thread writes all of its elements in one or several passes of a loop."""
    function = sass(kernel)
    accesses = ELEMENTS * (4 if dtype == "fp32" else 2) // 16
    figure = function.executed(accesses // function.hot_count(disassembly.WIDE_STORE)) / ELEMENTS
    show(function.mix().most_common(12), figure)
    return figure


def show(what, figure) -> None:
    if os.environ.get("ZOKERNELS_SHOW_SASS"):
        print(f"\n{figure:.2f} instructions per element; {what}")


def test_every_kernel_is_listed():
    assert set(EVERY) == kernel_names()


@pytest.mark.parametrize(("name", "dtypes"), [(name, dtypes) for name in EVERY for dtypes in EVERY[name]])
def test_every_kernel_compiles(name, dtypes):
    """For sm_90, with each dtype."""
    kernel = EVERY[name][dtypes](90)
    assert kernel.name == name
    check(kernel)


#: Kernels whose other forms are compiled for all architectures below.
_IN_ALL_FORMS = {"combine_kernel", "decode_kernel", "low_rank_kernel"}


@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize("name", sorted(EVERY.keys() - _IN_ALL_FORMS))
def test_every_kernel_compiles_for_other_architectures(name, arch):
    """With one of its dtypes; tests below compile other forms of those three for all architectures."""
    dtypes = max(EVERY[name], key=lambda dtypes: "bf16" in dtypes)
    kernel = EVERY[name][dtypes](arch)
    assert kernel.name == name
    check(kernel, SPILLED * ((name, arch) == ("spread_kernel", 80)))


def test_a_spill_is_found():
    """A kernel that is held to so few registers that it must."""
    cubin = triton.compile(
        combine_kernel(90, "fp32", "normal", 1).src,
        target=GPUTarget("cuda", 90, 32),
        options={**launch.compile_options(), "maxnreg": 24},
    )
    assert stack(cubin) > 0
    assert sass(cubin).count(disassembly.LOCAL) > 0


VARIANTS = [
    ("bf16", "normal", 1, {}),
    ("bf16", "normal", 2, {"rounding": True, "decay": True, "table": True}),
    ("bf16", "normal", None, {}),
    ("bf16", "rademacher", 1, {"table": True}),
    ("bf16", "rademacher", None, {"rounding": True}),
    ("fp16", "normal", 1, {"rounding": True}),
    ("fp16", "rademacher", 0, {"rounding": True, "decay": True}),
    ("fp32", "normal", 1, {"table": True, "decay": True}),
    ("fp32", "rademacher", 2, {}),
]


def name_of(variant):
    dtype, dist, k, extra = variant
    return "-".join([dtype, dist, f"K{'n' if k is None else k}", *extra])


# Every variant for sm_90, a third of them for the others.
@pytest.mark.parametrize(
    ("arch", "variant"),
    [(arch, v) for arch in (80, 90, 100) for v in (VARIANTS if arch == 90 else VARIANTS[:5:2])],
    ids=lambda x: f"sm_{x}" if isinstance(x, int) else name_of(x),
)
def test_variant_compiles_to_what_it_should(arch, variant):
    """16-byte accesses only, nothing in local or shared memory, no flush to zero."""
    dtype, dist, k, extra = variant
    kernel = combine_kernel(arch, dtype, dist, k, **extra)
    function = sass(kernel)
    check(kernel, SPILLED * (arch == 100))
    assert function.hot_count("LDS|STS|LDSM|BAR|SHFL") == 0
    bytes_each = 16 * ELEMENTS // (4 if dtype == "fp32" else 8)
    wide = function.hot_count(disassembly.WIDE_STORE)
    assert wide in (bytes_each // 16, bytes_each // 32, bytes_each // 64)  # of one, two or four passes
    assert function.hot_count(disassembly.WIDE_LOAD) == wide
    assert function.hot_count(r"STG") == wide


@pytest.mark.parametrize("aligned", [True, False])
def test_unaligned_variant_has_no_wide_access(aligned):
    """Off 16 bytes a wide access would fault; this also shows that the counts above can fail."""
    function = sass(combine_kernel(90, "bf16", "rademacher", 1, table=True, aligned=aligned))
    assert (function.count(disassembly.WIDE_STORE) > 0) == aligned
    assert (function.count(disassembly.WIDE_LOAD) > 0) == aligned


SAMPLE = """
.text.sample:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, [R2.64] ;
        /*0030*/                   FFMA R4, R4, R4, R4 ;
        /*0040*/                   STG.E.128 [R2.64], R4 ;
        /*0050*/               @P1 EXIT ;
        /*0060*/                   BRA `(.L_x_1) ;
.L_x_0:
        /*0070*/                   STG.E.U16 [R2.64], R4 ;
        /*0080*/                   NOP ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
        /*00b0*/                   NOP;
"""


def test_count_by_hand():
    """Two of prologue and four up to EXIT; each further trip adds the branch back: 3 + 1 + 1."""
    function = disassembly.select(disassembly.parse(SAMPLE), "sample")
    assert function.loops == [(1, 2)]
    assert [function.executed(trips) for trips in (1, 2, 4)] == [6, 11, 21]
    assert function.executed(store=r"STG\.E\.U16") == 4
    assert function.hot_count("STG") == 1
    with pytest.raises(ValueError, match="no instruction matches"):
        function.executed(store="LDL")


@pytest.mark.parametrize(
    ("dtype", "dist", "k", "extra", "ceiling"),
    [
        ("bf16", "normal", 1, {}, 24.0),
        ("bf16", "normal", 1, {"table": True}, 24.0),
        ("fp32", "normal", 1, {"table": True, "decay": True}, 24.0),
        ("fp16", "normal", 1, {"rounding": True}, 40.0),
        ("bf16", "rademacher", 1, {"table": True}, 6.1),
    ],
)
def test_instructions_per_element(dtype, dist, k, extra, ceiling):
    figure = per_element(combine_kernel(90, dtype, dist, k, **extra), dtype)
    floor = 14 if dist == "normal" else 3  # fewer would mean that the count lost the kernel
    assert floor < figure <= ceiling


@pytest.mark.parametrize("dist", ["normal", "rademacher"])
def test_no_product_and_sum_are_contracted(dist):
    """The fmas of the contract and no others: 14 a pair and one an element, 32 elements a loop;
    Rademacher has none, and 64 elements a loop.
    """
    function = sass(combine_kernel(90, "fp32", dist, 1, decay=True))
    assert function.hot_count("FFMA") == (32 * 7 + 32 if dist == "normal" else 0)
    assert function.hot_count("FADD") == (0 if dist == "normal" else 64)


def test_directions_known_at_run_time_cost_one_loop_each():
    assert 18 < sass(combine_kernel(90, "bf16", "normal", None)).loop_size() / 32 <= 23


WIDE, HALF, ATOMIC = disassembly.WIDE_STORE, r"STG\.E\.64", r"RED|ATOM"
#: Of kernels of normal noise, bf16 unless said otherwise: the kernel, its passes over a whole program,
#: ceiling, store.
WHOLE = {
    "combine, masks, table": (lambda: combine_kernel(90, "bf16", "normal", 1, mask="u8", table=True), 4,
    25.5, WIDE),
    "combine, density": (lambda: combine_kernel(90, "bf16", "normal", 1, random=True), 4, 31.5, WIDE),
    "combine, own coefficients": (
        lambda: combine_kernel(90, "bf16", "normal", 1, each=True, table=True), 4, 24.5, WIDE,
    ),
    "requantize": (lambda: combine_kernel(90, "i8", "normal", 1, bounds=(-127, 127)), 4, 29.5, HALF),
    "requantize, stochastic": (
        lambda: combine_kernel(90, "i8", "normal", 1, bounds=(-127, 127), rounding=True), 4, 42.0, HALF,
    ),
    "momentum, fp32 state": (lambda: update_kernel(90, "momentum", ("bf16", "fp32", None, None)), 16, 31.5,
    WIDE),
    "momentum, K at run time": (
        lambda: update_kernel(90, "momentum", ("bf16", "fp32", None, None), k=None), 16, 37.0, WIDE,
    ),
    "adam, fp32 states": (lambda: update_kernel(90, "adam", ("bf16", "fp32", "fp32", None)), 16, 64.0, WIDE),
    "adam, all bf16, stochastic, masks, table": (
        lambda: update_kernel(
            90, "adam", ("bf16", "bf16", "bf16", "u8"), present=("rounding_seed",), table=True
        ), 16, 102.0, WIDE,
    ),
    "fan_out": (lambda: fan_out_kernel(90), 4, 26.5, WIDE),
    "fan_out from bf16": (lambda: decode_kernel(90, "bf16", None), 4, 27.5, WIDE),
    "fan_out from fp8": (lambda: decode_kernel(90, "i8", 8), 4, 37.5, WIDE),
    "fan_out from int8": (lambda: decode_kernel(90, "i8", 0), 4, 31.0, WIDE),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_instructions_of_other_kernels(name):
    """Per element, with the longest path through square roots and quotients."""
    make, passes, ceiling, store = WHOLE[name]
    function = sass(kernel := make())
    figure = function.executed(passes, store) / ELEMENTS
    show(name, figure)
    assert 20 < figure <= ceiling
    check(kernel)
    assert function.hot_count("LDS|STS|BAR|SHFL", store) == 0


#: Of rows, which take the same passes as one piece.
ROWS = {
    "combine": (lambda: rows_kernel(90), 4, 24.5),
    "combine, fp32": (lambda: rows_kernel(90, dtype="fp32"), 4, 23.5),
    "combine, stochastic": (lambda: rows_kernel(90, present=("rounding_seed",)), 4, 32.5),
    "combine, Rademacher": (lambda: rows_kernel(90, "rademacher"), 4, 17.5),
    "adam, fp32 states": (lambda: update_rows_kernel(90), 16, 64.0),
}


@pytest.mark.parametrize("name", ROWS)
def test_instructions_of_rows(name):
    make, passes, ceiling = ROWS[name]
    function = sass(kernel := make())
    figure = function.executed(passes) / ELEMENTS
    show(f"rows: {name}", figure)
    assert ceiling * 0.9 < figure <= ceiling
    check(kernel)
    assert function.hot_count("LDS|STS|BAR|SHFL") == 0


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_of_rows_compile(arch):
    """What test_every_kernel_compiles does not compile for it."""
    check(rows_kernel(arch, "rademacher", aligned=False))


#: Kernels whose inner loop counts: the kernel, its store, elements that a pass of the loop adds to, floor and
#: ceiling.
LOOPS = {
    "spread: a direction": (lambda: spread_kernel(90), WIDE, 32, 18, 23.0),
    "spread: a Rademacher direction": (lambda: spread_kernel(90, "rademacher"), WIDE, 32, 5, 10.0),
    "low_rank: four ranks": (lambda: low_rank_kernel(90), WIDE, 32, 4.5, 7.0),
    "squares: a direction": (lambda: squares_kernel(90), ATOMIC, 8, 20, 34.0),
}


@pytest.mark.parametrize("name", LOOPS)
def test_instructions_of_inner_loops(name):
    make, store, elements, floor, ceiling = LOOPS[name]
    figure = sass(kernel := make()).loop_size(store) / elements
    show(name, figure)
    assert floor < figure <= ceiling
    check(kernel)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_other_kernels_compile_without_spills(arch):
    for kernel in (
        update_kernel(arch, "hizoo", ("bf16", "bf16", None, None)),
        update_kernel(arch, "adam_window", ("fp16", None, None, None), k=None),
        low_rank_kernel(arch, "rounding_seed"),
        spread_kernel(arch),
        squares_kernel(arch),
    ):
        check(kernel, SPILLED * ((kernel.name, arch) == ("spread_kernel", 80)))
        if "squares" not in kernel.name:
            function = sass(kernel)
            assert function.count(disassembly.WIDE_LOAD) > 0, function.name
            assert function.count(disassembly.WIDE_STORE) > 0, function.name


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_wire_kernels_compile_without_spills(arch):
    for kernel, load in (
        (decode_kernel(arch, "i8", 8, "rademacher", None), r"LDG\.E.*\.64"),
        (decode_kernel(arch, "fp16", None), disassembly.WIDE_LOAD),
        (encode_kernel(arch, "i8", 8), "LDG"),
        (encode_kernel(arch, "i8", 0, "fp32"), "LDG"),
        (encode_kernel(arch, "fp16", None, "fp32"), "LDG"),
    ):
        check(kernel)
        assert sass(kernel).count(load) > 0, kernel.name


#: Architecture, distribution, dtype and instructions an element and direction.
PROJECT = [
    (90, "normal", "bf16", 22.5),
    (90, "rademacher", "bf16", 6.0),
    (90, "rademacher", "fp32", 6.5),
    (100, "normal", "fp16", 22.5),
    (80, "rademacher", "fp32", 6.5),
]


@pytest.mark.parametrize(("arch", "dist", "dtype", "ceiling"), PROJECT)
def test_project_reads_a_whole_tile_in_one_loop(arch, dist, dtype, ceiling):
    """Of four blocks, 32 elements: 16-byte loads, the fmas of the contract and no others, nothing but
    registers.
    """
    function = sass(kernel := project_kernel(arch, dist, dtype))
    loops = [function.blocks[a] for a, b in function.loops if a == b]
    loop = next(block for block in loops if block.count(disassembly.WIDE_LOAD))
    show(f"project {dist} {dtype}", len(loop) / 32)
    assert 3 < len(loop) / 32 <= ceiling
    assert loop.count(disassembly.WIDE_LOAD) == (8 if dtype == "fp32" else 4)
    assert loop.count(disassembly.LOCAL + "|LDS|STS|BAR|SHFL|STG") == 0
    assert loop.count("DADD") == 4
    if arch == 90:
        assert loop.count("FFMA") == (32 * 7 + 32 if dist == "normal" else 0)
    check(kernel)


@pytest.fixture
def asked(monkeypatch):
    """(kernel, grid, hash of what was compiled) of every launch, which takes place no further than the
    compiler.
    """
    driver = triton.runtime.driver
    monkeypatch.setattr(type(driver), "active", FakeDriver.active(GPUTarget("cuda", 90, 32)))
    asked, run = [], triton.JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        if not warmup:
            asked.append((kernel.__name__, grid, compiled.hash))
        return compiled

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    return asked


def coeffs(k):
    return torch.zeros(k, dtype=torch.int64), torch.zeros(k)


def test_launch_binds_and_values_do_not_recompile(asked):
    """The launcher's own calls compile, and numel, offset, stream and K > UNROLLED are not specialised by
    value.
    """
    theta = torch.zeros(70000, dtype=torch.bfloat16)
    for numel, offset, stream, k in (
        (70000, 0, 1, 3),
        (1, 8, 2**56 - 1, 5),
        (16, 2**40, 0, 16),
        (17, 2**33, 16, 4),
    ):
        piece = [theta[:numel]]
        combine.combine(piece, piece, Terms(*coeffs(k), [stream], [offset], "rademacher", None, None))
    assert len(asked) == 4
    assert len({key for _, _, key in asked}) == 1, asked
    assert [grid for _, grid, _ in asked] == [(5,), (1,), (1,), (1,)]
    asked.clear()
    pieces = [theta[:5], theta[8:70], theta[80:80], theta[81:90]]
    combine.combine(
        pieces,
        pieces,
        Terms(*coeffs(1), [0] * 4, [0] * 4, "rademacher", torch.ones(1), torch.zeros(1).long()),
    )
    assert [(name, grid) for name, grid, _ in asked] == [
        ("combine_table_kernel", (2,)),
        ("combine_kernel", (1,)),
    ]


def test_launches_of_rows_bind_and_values_do_not_recompile(asked):
    theta = torch.zeros(96 * 1024, dtype=torch.bfloat16)
    for width, length, offset in ((8, 8, 0), (512, 4096, 2**36), (1536, 2**33, 16), (2**15, 2**20, 8)):
        terms = Terms(
            *coeffs(1), [2**56 - 1], [offset], "normal", None, None, widths=[width], lengths=[length]
        )
        combine.combine([theta], [theta], terms)
        update.update([theta], [theta.float()], [], "momentum", torch.zeros(4), terms)
    names = "combine_rows_kernel", "update_rows_kernel"
    assert [(name, grid) for name, grid, _ in asked] == [(name, (6,)) for name in names] * 4
    assert len({key for _, _, key in asked}) == 2, asked


def test_every_launcher_binds(asked):
    """One tensor, then two in a table, with every optional argument; a row of coefficients does not
    recompile.
    """
    bf16 = lambda: torch.zeros(16, 8, dtype=torch.bfloat16)
    state = lambda: torch.zeros(16, 8)
    for count in (1, 2):
        params, first, second = ([make() for _ in range(count)] for make in (bf16, state, state))
        seeds, one = coeffs(1)
        places = ([3] * count, [8] * count, "rademacher", one, seeds)
        masks = [torch.zeros(16, dtype=torch.uint8) for _ in range(count)]
        terms = Terms(seeds, torch.zeros(count, 1), *places, masks, seeds, 5)
        side = Terms(seeds, one, *places)
        combine.combine(params, params, terms._replace(curvature=first))
        requantize.requantize([t.char() for t in params], [t.char() for t in params], -8, 7, terms)
        update.update(params, first, second, "adam", torch.zeros(8), terms)
        fan_out.fan_out(params, [bf16() for _ in params], [bf16() for _ in params], seeds, one, side)
        low_rank.low_rank(
            params, params, [torch.zeros(1, 16, 2)] * count, [torch.zeros(1, 8, 2)] * count, terms
        )
        squares.squares(seeds, [128] * count, [3] * count, [8] * count, "normal")
    assert [name for name, _, _ in asked] == [
        f"{stem}_{kind}"
        for kind in ("kernel", "table_kernel")
        for stem in ("combine", "combine", "update", "fan_out", "low_rank", "squares")
    ]
    asked.clear()
    for k in (1, 3, 2000):
        spread.spread(torch.zeros(k, 16), torch.zeros(16), Terms(*coeffs(k), [3], [8], "normal", None, None))
    assert [grid for _, grid, _ in asked] == [(1, 1), (1, 3), (1, 1000)]
    assert len({key for _, _, key in asked}) == 1, asked
    asked.clear()
    params = [bf16(), torch.zeros(20, dtype=torch.bfloat16)[4:]]  # on 16 bytes, and off: no table
    combine.combine(
        params, params, Terms(coeffs(3)[0], torch.zeros(2, 3), [0, 1], [0, 0], "normal", None, None)
    )
    assert [name for name, _, _ in asked] == ["combine_kernel"] * 2
