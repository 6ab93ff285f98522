"""The Triton kernels compile for sm_80, sm_90 and sm_100 without a GPU, and their SASS stays under the ceilings.

Ceilings are instructions per element as disassembly.py defines them; ``ZOKERNELS_SHOW_SASS=1 pytest -s`` prints each.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import disassembly

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: there is no compiler in this process", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from zokernels.backends.terms import Terms  # noqa: E402
from zokernels.backends.triton import combine, launch, seeds, tile  # noqa: E402
from zokernels.contract import DISTS  # noqa: E402

DTYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "i8": tl.int8, "u8": tl.uint8}
ELEMENTS = tile.PROGRAM // (32 * tile.NUM_WARPS)  # of one thread
OPTIONS = launch.OPTIONS


#: Arguments of every kernel that are not pointers to tensors.
KINDS = {
    **dict.fromkeys(("numel", "offset", "stream", "m", "n", "rank"), "i64"),
    **dict.fromkeys(("seeds", "rounding_seed", "mask_seed", "table", "total"), "*i64"),
    **dict.fromkeys(("coeffs", "decay", "hyper"), "*fp32"),
    **dict.fromkeys(("num_k", "mask_keep", "each"), "i32"),
    "owner": "*i32",
}
#: Optional arguments: what is not asked for is None.
OPTIONAL = ("decay", "rounding_seed", "mask_seed")


def build(function, arch, tensors, present=(), **constants):
    """Compiles for sm_``arch``: ``tensors`` are the types of the kernel's tensors by name, None where there is none."""
    kinds = {**KINDS, **{name: kind and f"*{kind}" for name, kind in tensors.items()}}
    constants = {**dict.fromkeys(set(OPTIONAL) - set(present)), **constants}
    constants.update({name: None for name, kind in tensors.items() if kind is None})
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {name: "constexpr" if name in constants else kinds[name] for name in function.arg_names}
    source = ASTSource(function, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=OPTIONS)


def build_table(function, arch, tensors, present=(), *, columns=5, each=False, **constants):
    dtypes = tuple(DTYPES.get(kind) for kind in tensors.values())
    width = columns + len(dtypes)
    return build(function, arch, {}, present, DTYPES=dtypes, WIDTH=width, EACH=each, **constants)


@cache
def compiled(
    arch, dtype, dist, k, *, rounding=False, decay=False, table=False, aligned=True, mask=None, random=False,
    curvature=None, bounds=(None, None), each=False,
):  # fmt: skip
    asked = {"decay": decay, "rounding_seed": rounding, "mask_seed": random}
    present = [name for name in OPTIONAL if asked[name]]
    tensors = {"out": dtype, "theta": dtype, "mask": mask, "curvature": curvature}
    constants = {"DOMAIN": DISTS[dist], "K": k, "ALIGNED": aligned, "LOW": bounds[0], "HIGH": bounds[1]}
    if table:
        return build_table(combine.combine_table_kernel, arch, tensors, present, each=each, **constants)
    return build(combine.combine_kernel, arch, tensors, present, **constants)


def sass(kernel) -> disassembly.Function:
    return disassembly.select(disassembly.disassemble(kernel.asm["cubin"]), "_kernel$")


def per_element(kernel, dist) -> float:
    function = sass(kernel)
    # Normals: four passes of a loop, unless the compiler unrolled it; Rademacher: straight code.
    stores = function.hot_count(disassembly.WIDE_STORE)
    trips = 4 if dist == "normal" and stores < ELEMENTS // 8 else 1
    figure = function.executed(trips) / ELEMENTS
    if os.environ.get("ZOKERNELS_SHOW_SASS"):
        print(f"\n{figure:.2f} instructions per element; {function.mix().most_common(12)}")
    return figure


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
    kernel = compiled(arch, dtype, dist, k, **extra)
    function = sass(kernel)
    assert function.count(disassembly.LOCAL) == 0
    assert function.hot_count("LDS|STS|LDSM|BAR|SHFL") == 0
    bytes_each = 16 * ELEMENTS // (4 if dtype == "fp32" else 8)
    assert (wide := function.hot_count(disassembly.WIDE_STORE)) in (bytes_each // 16, bytes_each // 64)
    assert function.hot_count(disassembly.WIDE_LOAD) == wide
    assert function.hot_count(r"STG") == wide
    ftz = [line for line in kernel.asm["ptx"].splitlines() if ".ftz" in line and "rsqrt.approx.ftz.f32" not in line]
    assert ftz == []


@pytest.mark.parametrize("aligned", [True, False])
def test_unaligned_variant_has_no_wide_access(aligned):
    """Off 16 bytes a wide access would fault; this also shows that the counts above can fail."""
    function = sass(compiled(90, "bf16", "rademacher", 1, table=True, aligned=aligned))
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
        ("bf16", "rademacher", 1, {"table": True}, 6.0),
    ],
)
def test_instructions_per_element(dtype, dist, k, extra, ceiling):
    figure = per_element(compiled(90, dtype, dist, k, **extra), dist)
    floor = 14 if dist == "normal" else 3  # fewer would mean that the count lost the kernel
    assert floor < figure <= ceiling


@pytest.mark.parametrize("dist", ["normal", "rademacher"])
def test_no_product_and_sum_are_contracted(dist):
    """The fmas of the contract and no others: 14 a pair and one an element, 32 elements a loop; Rademacher has none."""
    function = sass(compiled(90, "fp32", dist, 1, decay=True))
    assert function.hot_count("FFMA") == (32 * 7 + 32 if dist == "normal" else 0)
    assert function.hot_count("FADD") == (0 if dist == "normal" else ELEMENTS)


def test_directions_known_at_run_time_cost_one_loop_each():
    assert 18 < sass(compiled(90, "bf16", "normal", None)).loop_size() / 32 <= 23


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_derive_seed_compiles(arch):
    pointers = dict.fromkeys(("out_ptr", "run_seed_ptr", "step_ptr", "k_ptr"), "*i64")
    signature = {**pointers, "numel": "i64", "BLOCK": "constexpr"}
    source = ASTSource(seeds.derive_seed_kernel, signature=signature, constexprs={"BLOCK": 128})
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})
    assert sass(kernel).count(disassembly.LOCAL) == 0


class FakeDriver:
    """Enough of a driver for Triton to compile what a launch asks for, without launching it."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def test_launch_binds_and_values_do_not_recompile(monkeypatch):
    """The launcher's own calls compile, and numel, offset, stream and K > UNROLLED are not specialised by value."""
    driver = triton.runtime.driver
    monkeypatch.setattr(type(driver), "active", property(lambda self: FakeDriver()))
    asked = []

    class Compiled:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch_one(*args, **options):
                asked.append((self.kernel.__name__, grid, self.kernel.warmup(*args, grid=grid, **options).hash))

            return launch_one

    for kernel in ("combine_kernel", "combine_table_kernel"):
        monkeypatch.setattr(combine, kernel, Compiled(getattr(combine, kernel)))
    coeffs = lambda k: (torch.zeros(k, dtype=torch.int64), torch.zeros(k))
    theta = torch.zeros(70000, dtype=torch.bfloat16)
    for numel, offset, stream, k in ((70000, 0, 1, 3), (1, 8, 2**32 - 1, 5), (16, 2**40, 0, 16), (17, 2**33, 16, 4)):
        piece = [theta[:numel]]
        combine.combine(piece, piece, Terms(*coeffs(k), [stream], [offset], "rademacher", None, None))
    assert len(asked) == 4
    assert len({key for _, _, key in asked}) == 1, asked
    assert [grid for _, grid, _ in asked] == [(5,), (1,), (1,), (1,)]
    asked.clear()
    pieces = [theta[:5], theta[8:70], theta[80:80], theta[81:90]]
    combine.combine(
        pieces, pieces, Terms(*coeffs(1), [0] * 4, [0] * 4, "rademacher", torch.ones(1), torch.zeros(1).long())
    )
    assert [(name, grid) for name, grid, _ in asked] == [("combine_table_kernel", (2,)), ("combine_kernel", (1,))]
