"""The PTX that nvcc makes of csrc/cuda, executed: its bits, and what it moves.

And the interpreter for it.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import cuda_on_host
import disassembly
import numpy as np
import pytest
import test_combine
import test_fan_out
import test_low_rank
import test_low_rank_linear
import test_plan
import test_quantized_linear
import test_rows
import test_spread
import torch
from helpers import DISTS, DTYPES, check_backend, random_call, random_values
from ptx import mutants
from ptx.arithmetic import RULES, fma32, rsqrt
from ptx.device import Device
from ptx.machine import Machine
from ptx.memory import Memory
from ptx.parser import PtxError, entries, parse
from ptx_cases import FAULTS, OPERATIONS, arguments, chunk_of, derive_seeds, faulty_arguments, random_combine

import zokernels
from zokernels.backends import library
from zokernels.backends.reference.combine import fma
from zokernels.ops.update import RULES as UPDATES
from zokernels.wire import FORMATS

# --- the interpreter --------------------------------------------------------------------------------------

_MODULE = """
.extern .shared .align 16 .b8 smem[];
.visible .entry sample(.param .u64 sample_param_0, .param .u64 sample_param_1)
.maxntid 64, 1, 1
{{
    .reg .pred %p<4>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    ld.param.u64 %rd1, [sample_param_0];
    ld.param.u64 %rd2, [sample_param_1];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    {body}
    ret;
}}
"""


def run(
    body: str, *, written: bool = True, writable: bool = True
) -> tuple[torch.Tensor, torch.Tensor, Memory]:
    """64 threads over an int32 tensor, 0 to 63, at %rd4 and another at %rd5, each thread at its own
    element.
    """
    kernel = parse(_MODULE.format(body=body))["sample"]
    memory = Memory(4096, 2)
    source = memory.place(torch.arange(64, dtype=torch.int32), written=written, writable=False)
    target = memory.place(torch.zeros(64, dtype=torch.int32), written=False, writable=writable)
    arguments = [t.data_ptr().to_bytes(8, "little") for t in (source, target)]
    Machine(kernel, shared=2048).run(1, arguments, memory)
    return source, target, memory


def test_a_kernel_runs():
    source, target, memory = run(
        "ld.global.u32 %r2, [%rd4]; add.s32 %r3, %r2, -5; st.global.u32 [%rd5], %r3;"
    )
    assert torch.equal(target, source - 5)
    for kind in ("ld", "st"):  # two warps, 128 bytes each
        assert vars(memory.traffic[kind]) == {"requests": 2, "sectors": 8, "bytes": 256, "distinct": 256}


def test_threads_that_part_meet_again():
    """A loop of as many turns as the thread's number, behind a branch that a third of the threads take."""
    body = """
    rem.u32 %r2, %r1, 3;
    setp.ne.s32 %p1, %r2, 0;
    mov.u32 %r3, 0;
    @%p1 bra $L_store;
    mov.u32 %r4, 0;
$L_loop:
    setp.ge.u32 %p2, %r4, %r1;
    @%p2 bra $L_store;
    add.s32 %r3, %r3, 2;
    add.s32 %r4, %r4, 1;
    bra.uni $L_loop;
$L_store:
    bar.sync 0;
    @!%p1 add.s32 %r3, %r3, 1;
    st.global.u32 [%rd5], %r3;
    """
    _, target, memory = run(body)
    i = torch.arange(64, dtype=torch.int32)
    assert torch.equal(target, torch.where(i % 3 == 0, 2 * i + 1, 0))
    assert memory.traffic["st"].requests == 2  # of two whole warps


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("vabsdiff.u32.u32.u32 %r2, %r1, %r1, %r1;", "unknown opcode: vabsdiff"),
        ("mul.f32 %r2, %r1, %r1;", "unknown opcode: mul.f32"),  # may be fused with an addition
        ("ld.global.volatile.u32 %r2, [%rd4];", "unknown opcode"),
        ("add.s32 %r2, %r1, %rd1x;", "operand '%rd1x'"),
        ("add.s64 %r2, %rd1, 1;", "%r2 of .b32 for .s64"),
        ("ld.global.u32 %r2, [%rd4+4];", "out of bounds: ld.global.u32"),
        ("ld.global.u32 %r2, [%rd4+-4];", "out of bounds"),
        ("mov.u64 %rd6, 4096; ld.global.u32 %r2, [%rd6];", "out of bounds"),
        ("ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd4];", "misaligned"),
        ("ld.global.u16 %r2, [%rd4+1];", "misaligned"),
        ("ld.global.u32 %r2, [%rd5];", "nobody wrote"),
        ("st.global.u32 [%rd4], %r1;", "only read"),
        ("add.s32 %r2, %r3, 1;", "read of %r3, which nobody wrote"),
        ("ld.param.u64 %rd6, [sample_param_1+8];", "parameter access out of bounds"),
        (
            "setp.lt.u32 %p1, %r1, 8; @%p1 bra $L_a; bar.sync 0; bra.uni $L_b;\n$L_a: bar.sync 0;\n$L_b:",
            "different barr",
        ),
        ("bra.uni $L_nowhere;", "label"),
        ("$L_here: bra.uni $L_here;", "does not end"),
        ("mov.b32 %r2, smem; ld.shared.u32 %r3, [%r2];", "nobody wrote"),
        ("mov.b32 %r2, smem; st.shared.u32 [%r2+2048], %r1;", "out of bounds: st.shared"),
        ("mov.b32 %r2, smem; st.shared.u32 [%r2+2], %r1;", "misaligned"),
        ("setp.lt.u32 %p1, %r1, 8; @%p1 shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;", "parted"),
        ("shfl.sync.bfly.b32 %r2, %r1, 1, 31, 255;", "all threads of a warp"),
        ("shfl.sync.up.b32 %r2, %r1, 1, 31, -1;", "unknown opcode: shfl.sync.up"),
        ("shfl.sync.idx.b32 %r2, %r1, 1, 15, -1;", "unknown opcode: shfl.sync.idx"),
    ],
)
def test_what_the_interpreter_refuses(body, wrong):
    with pytest.raises(PtxError, match=wrong.replace("$", r"\$").replace("+", r"\+")):
        run(body)


def test_memory_that_nobody_wrote_and_memory_that_is_only_read():
    with pytest.raises(PtxError, match="nobody wrote"):
        run("ld.global.u32 %r2, [%rd4];", written=False)
    with pytest.raises(PtxError, match="only read"):
        run("st.global.u32 [%rd5], %r1;", writable=False)
    run("st.global.u32 [%rd5], %r1; ld.global.u32 %r2, [%rd5];")  # but what it wrote it may read


#: Each thread's number in its place in shared memory, whose address is in %r2.
_OWN_PLACE = "mov.b32 %r2, smem; shl.b32 %r3, %r1, 2; add.s32 %r2, %r2, %r3; st.shared.b32 [%r2], %r1;"


def test_threads_exchange_through_shared_memory():
    """Thread i reads what thread 63 - i wrote, behind a barrier."""
    other = (
        "mov.b32 %r4, smem; sub.s32 %r4, %r4, %r3; ld.shared.b32 %r5, [%r4+252]; st.global.u32 [%rd5], %r5;"
    )
    _, target, _ = run(f"{_OWN_PLACE} bar.sync 0; {other}")
    assert torch.equal(target, torch.arange(64, dtype=torch.int32).flip(0))
    with pytest.raises(PtxError, match=r"race: ld\.shared"):
        run(f"{_OWN_PLACE} {other}")


@pytest.mark.parametrize(
    "body",
    [
        "st.global.u32 [%rd2], %r1;",
        "st.global.u32 [%rd5], %r1; ld.global.u32 %r2, [%rd2];",
        "mov.b32 %r2, smem; st.shared.u32 [%r2], %r1;",
        f"{_OWN_PLACE} bar.sync 0; mov.b32 %r4, smem; ld.shared.u32 %r5, [%r4]; st.shared.u32 [%r2], %r1;",
        "st.global.u32 [%rd5], %r1; red.global.gpu.relaxed.add.u32 [%rd5], %r1;",
    ],
)
def test_races_are_found(body):
    """Two threads at one place, of which one writes: at once, one after the other, and beside an atomic
    access.
    """
    with pytest.raises(PtxError, match="race"):
        run(body)


def test_exchanges_within_a_warp():
    i = torch.arange(64, dtype=torch.int32)
    put = "st.global.u32 [%rd5], %r2;"
    assert torch.equal(run(f"shfl.sync.bfly.b32 %r2, %r1, 8, 31, -1; {put}")[1], i ^ 8)
    assert torch.equal(run(f"sub.s32 %r3, 70, %r1; shfl.sync.idx.b32 %r2, %r1, %r3, 31, -1; {put}")[1],
                       i // 32 * 32 + (70 - i) % 32)  # fmt: skip
    sums = i.view(2, 32).sum(1).int().repeat_interleave(32)
    assert torch.equal(run(f"mov.b32 %r3, -1; redux.sync.add.s32 %r2, %r1, %r3; {put}")[1], sums)
    assert torch.equal(run(f"redux.sync.max.s32 %r2, %r1, -1; {put}")[1], i | 31)


#: Each thread's row of a matrix: sixteen bytes, of which word j is 4 times its number and j.  Their address
#: is in %r2.
_ROWS = """
    mov.b32 %r2, smem; shl.b32 %r3, %r1, 4; add.s32 %r2, %r2, %r3; shl.b32 %r4, %r1, 2;
    add.s32 %r5, %r4, 1; add.s32 %r6, %r4, 2; add.s32 %r7, %r4, 3;
    st.shared.v4.b32 [%r2], {%r4, %r5, %r6, %r7}; bar.sync 0;
"""


@pytest.mark.parametrize("j", range(4))
def test_matrices_in_shared_memory(j):
    """Thread t has of matrix j row t / 4, columns 2 (t % 4) and the next: a word.

    Row r of it is thread 8 j + r's.
    """
    registers = "{%r4, %r5, %r6, %r7}"
    put = f"st.global.u32 [%rd5], %r{4 + j};"
    load = f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {registers}, [%r2];"
    t = torch.arange(64, dtype=torch.int32)
    row = t // 32 * 32 + 8 * j + t % 32 // 4
    assert torch.equal(run(f"{_ROWS} {load} {put}")[1], 4 * row + t % 4)
    # What is stored as it was loaded stands there as it stood.
    store = f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r2+1024], {registers}; bar.sync 0;"
    assert torch.equal(
        run(f"{_ROWS} {load} {store} ld.shared.v4.b32 {registers}, [%r2+1024]; {put}")[1], 4 * t + j
    )
    # Transposed: the low halves of two neighbouring rows' words; the high ones are zero.
    column, words = t % 32 // 4, 4 * (t // 32 * 32 + 8 * j + 2 * (t % 4))
    want = torch.where(column % 2 == 0, words + column // 2 + (words + 4 + column // 2 << 16), 0)
    transposed = load.replace("x4.", "x4.trans.")
    assert torch.equal(run(f"{_ROWS} {transposed} {put}")[1], want)


def test_fma_rounds_once(rng):
    """As the reference's, which test_combine holds against rational arithmetic."""
    a, b, c = (random_values(20000, torch.float32, rng) for _ in range(3))
    c[:10000] = -(a * b)[:10000]  # cancellation leaves what the product lost
    with np.errstate(all="ignore"):
        got = torch.from_numpy(fma32(a.numpy(), b.numpy(), c.numpy()))
    want = fma(a, b, c)
    same = (got.view(torch.int32) == want.view(torch.int32)) | (got.isnan() & want.isnan())
    assert same.all()


def test_conversions_equal_torchs(rng):
    x = random_values(20000, torch.float32, rng)
    x = x[~x.isnan()]
    with np.errstate(all="ignore"):
        for opcode, dtype in (("cvt.rn.bf16.f32", torch.bfloat16), ("cvt.rn.f16.f32", torch.float16)):
            got = RULES[opcode].function(x.numpy())
            assert np.array_equal(got, x.to(dtype).view(torch.int16).numpy().view(np.uint16))
        codes = np.arange(65536, dtype=np.uint16)
        pairs = RULES["cvt.rn.f16x2.e4m3x2"].function(codes)
    values = torch.from_numpy(np.ascontiguousarray(pairs).view(np.float16).copy())
    want = torch.from_numpy(codes.view(np.uint8).copy()).view(torch.float8_e4m3fn).to(torch.float16)
    assert torch.equal(values.nan_to_num(500.0), want.nan_to_num(500.0))


def test_selected_instructions_by_hand():
    u32 = lambda *values: [np.array([v], np.uint32) for v in values]
    assert RULES["prmt.b32"].function(*u32(0x33221100, 0x77665544, 0x7531)) == 0x77553311
    assert RULES["prmt.b32"].function(*u32(0x80, 0, 0x8888)) == 0xFFFFFFFF  # the sign of byte 0
    assert RULES["bfi.b32"].function(*u32(0xFF, 0x12345678, 8, 8)) == 0x1234FF78
    assert RULES["dp2a.lo.u32.u32"].function(*u32(0x12345678, 0x01, 0xFFFF0000)) == 0xFFFF5678
    assert RULES["dp2a.lo.u32.u32"].function(*u32(0x12345678, 0xFF0302, 7)) == 7 + 2 * 0x5678 + 3 * 0x1234
    assert RULES["shr.s32"].function(np.array([-8], np.int32), np.array([40], np.uint32)) == -1
    assert RULES["shl.b32"].function(*u32(1, 32)) == 0
    assert RULES["div.s64"].function(np.array([-7]), np.array([2])) == -3
    assert RULES["rem.s64"].function(np.array([-7]), np.array([2])) == -1
    assert RULES["cvt.rni.s32.f32"].function(np.array([2.5, np.nan, 1e20], np.float32)).tolist() == [
        2,
        0,
        2**31 - 1,
    ]
    assert rsqrt(np.array([0.25], np.float32), 1) == np.nextafter(np.float32(2), np.float32(3))


# --- the kernels ------------------------------------------------------------------------------------------

#: Files of csrc/cuda that hold kernels, the slowest to compile first.
MODULES = [
    "rows",
    "update",
    "wire",
    "combine",
    "project",
    "requantize",
    "spread",
    "low_rank",
    "low_rank_linear",
    "quantized_linear",
    "squares",
    "seeds",
]


def compiled_here(folder: pathlib.Path) -> list[str]:
    """The PTX of each module, by nvcc: minutes."""
    nvcc = disassembly.find_tool("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    command = [nvcc, "-ptx", "-arch=sm_90", "-std=c++20", *cuda_on_host.TORCH]

    def compile_module(name: str) -> str:
        source = cuda_on_host.ROOT / f"csrc/cuda/{name}.cu"
        subprocess.run([*command, source, "-o", folder / f"{name}.ptx"], check=True)
        return (folder / f"{name}.ptx").read_text()

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(compile_module, MODULES))


def built_from_these_sources(path: pathlib.Path) -> bool:
    """Whether no source of the CUDA library was changed after it was built."""
    sources = [p for name in ("cuda", "noise") for p in (cuda_on_host.ROOT / "csrc" / name).rglob("*.*")]
    sources += (cuda_on_host.ROOT / "csrc").glob("*.*")
    return path.exists() and path.stat().st_mtime > max(p.stat().st_mtime for p in sources)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """The PTX of every kernel for sm_90, by its name: the library's own, which ``make test`` builds with it.

    Where the library is older than its sources, or was built for other architectures, nvcc makes it.
    """
    built, texts = library.path_of("cuda"), []
    if built_from_these_sources(built):
        texts = disassembly.ptx_of(built, 90)
    texts = texts or compiled_here(tmp_path_factory.mktemp("ptx"))
    return {name: text for module in texts for name, text in entries(module).items()}


@pytest.fixture(scope="session")
def host_library():
    return cuda_on_host.build()


@pytest.fixture(scope="session")
def device(kernels, host_library):
    return Device(host_library, lambda name: parse(kernels[name])[name])


@pytest.fixture
def on_ptx(device, monkeypatch):
    """The operations on CPU tensors through the CUDA backend, its kernels executed as PTX."""
    cuda_on_host.use(device, monkeypatch)
    device.begin()
    return device


# Patterns of the kernels' mangled names.


def number(dtype: torch.dtype) -> str:
    return rf"5DTypeE{DTYPES.index(dtype)}E"


def domain(dist: str) -> str:
    return rf"6DomainE{1 + DISTS.index(dist)}E"


def combine_kernels(dist: str, dtype: torch.dtype, *, fan_out: bool) -> str:
    """The last template argument is whether they fan out."""
    return rf"combine_{dist}_kernelILNS0_{number(dtype)}.*ELb{fan_out:d}EEEv"


def update_kernels(dist: str, dtype: torch.dtype, entry: str) -> str:
    return rf"update_kernelILNS0_{number(dtype)}LNS_{domain(dist)}.*\d{entry}"


def linear_kernels(dtype: torch.dtype) -> str:
    return rf"linear_sums_kernel|linear_(chains|out)_kernelILNS0_{number(dtype)}"


def quantized_kernels(dtype: torch.dtype) -> str:
    kinds = rf"quantized_(most|words|out)_kernelILNS0_{number(dtype)}"
    return rf"quantized_sums_kernel|{kinds}"


def rows_kernels(dist: str, dtype: torch.dtype) -> str:
    plain = rf"combine_rows_kernelILNS0_{number(dtype)}LNS_{domain(dist)}"
    return rf"{plain}|{update_kernels(dist, dtype, 'RowsEntry')}"


def wire_kernels(wire: str, dtype: torch.dtype) -> str:
    code = {"bf16": 1, "fp16": 2, "int8": 3, "fp8": 4}[wire]
    return rf"(encode|decode)_kernelILNS0_{number(dtype)}LS\d_{code}E"


REQUANTIZE = r"update_kernelILNS0_5DTypeE3E"


def matching(kernels, pattern: str) -> set[str]:
    return {name for name in kernels if re.search(pattern, name)}


def roundings(dtype: torch.dtype) -> list[str]:
    return ["nearest"] if dtype is torch.float32 else ["nearest", "stochastic"]


def check(operation: str, rng, dist: str, **fixed: object) -> None:
    run, make = OPERATIONS[operation]
    check_backend(run, arguments(make, rng, dist, **fixed))


def sizes_of_many(rng) -> list[int]:
    """Sizes of more tensors than a small kernel argument holds; all but one are empty."""
    return [1 + rng.randrange(700), *[0] * 68]


EACH_KERNEL = pytest.mark.parametrize(("dtype", "dist"), [(t, d) for t in DTYPES for d in DISTS], ids=str)


@EACH_KERNEL
def test_combine_equals_reference(on_ptx, kernels, rng, dtype, dist):
    for rounding in roundings(dtype):
        for count, decay in ((1, None), (1, 0.97), (2, None), (3, 0.97)):
            fixed = {"dtype": dtype, "count": count, "decay": decay, "rounding": rounding}
            check("combine", rng, dist, **fixed)
            buffers, parts, kwargs = random_call(rng, sizes=sizes_of_many(rng), dist=dist, **fixed)
            check_backend(test_combine.run, {"buffers": buffers, "parts": parts, **kwargs})
    assert on_ptx.launches.keys() == matching(kernels, combine_kernels(dist, dtype, fan_out=False))


@EACH_KERNEL
def test_fan_out_equals_reference(on_ptx, kernels, rng, dtype, dist):
    for rounding in roundings(dtype):
        for count, decay in ((1, None), (2, 0.97)):
            fixed = {"dtype": dtype, "count": count, "decay": decay, "rounding": rounding}
            args = arguments(random_combine, rng, dist, **fixed)
            test_fan_out.check(args.pop("buffers"), args.pop("parts"), args, rng)
            test_fan_out.check(*random_call(rng, sizes=sizes_of_many(rng), dist=dist, **fixed), rng)
    assert on_ptx.launches.keys() == matching(kernels, combine_kernels(dist, dtype, fan_out=True))


@EACH_KERNEL
def test_update_equals_reference(on_ptx, kernels, rng, dtype, dist):
    """And combine where it is not plain."""
    some = {"dtype": dtype, "rounding": roundings(dtype)[-1], "decay": 0.97}
    check("combine", rng, dist, **some, count=2, extras=("each", "masks", "density"))
    check("combine", rng, dist, **some, count=1, extras=("masks", "curvature"))
    for rule in UPDATES:
        check(
            f"update {rule}",
            rng,
            dist,
            **some,
            count=2,
            extras=rng.choice([("masks",), ("each", "density"), ()]),
        )
    many = {**some, "dist": dist, "count": 1}
    for operation, extras in (
        ("combine", ("masks",)),
        ("combine", ("curvature",)),
        *((f"update {r}", ()) for r in UPDATES),
    ):
        run_it, make = OPERATIONS[operation]
        check_backend(run_it, make(rng, sizes=sizes_of_many(rng), extras=extras, **many))
    assert on_ptx.launches.keys() == matching(kernels, update_kernels(dist, dtype, "UpdateEntry"))


@EACH_KERNEL
def test_rows_equal_reference(on_ptx, kernels, rng, dtype, dist):
    """Whole chunks of rows, of which one begins at each place of a chunk, and edges; and rows that
    nothing aligns.
    """
    fixed = {"chunk": 32768, "dtype": dtype, "dist": dist}
    for rounding in roundings(dtype):
        for count, decay in ((1, None), (1, 0.97), (2, None)):
            own = {**fixed, "rounding": rounding, "count": count, "decay": decay, "plain": True}
            check_backend(test_rows.run, test_rows.large_rows(rng, 4096, **own))
    check_backend(test_rows.run, test_rows.random_rows(rng, dtype=dtype, dist=dist, count=2, plain=True))
    fixed |= {"plain": True, "count": 2, "rounding": roundings(dtype)[-1]}
    check_backend(
        test_rows.run, test_rows.large_rows(rng, 1376, **fixed, mask_seed=rng.getrandbits(64), density=0.5)
    )
    args = test_rows.large_rows(rng, 4099, **fixed)
    args["curvature"] = [random_values(p.stop - p.start, torch.bfloat16, rng) for p in args["parts"]]
    check_backend(test_rows.run, args)
    for rule in UPDATES:
        check_backend(test_rows.run, test_rows.large_rows(rng, 4096, rule=rule, **fixed))
    assert {name for name in on_ptx.launches if "Rows" in name} == matching(
        kernels, rows_kernels(dist, dtype)
    )


@pytest.mark.parametrize("dist", DISTS)
def test_requantize_equals_reference(on_ptx, kernels, rng, dist):
    for rounding in ("nearest", "stochastic"):
        check("requantize", rng, dist, rounding=rounding, count=2, extras=("masks", "density"))
    assert on_ptx.launches.keys() == matching(kernels, rf"{REQUANTIZE}LNS_{domain(dist)}")


@EACH_KERNEL
def test_project_equals_reference(on_ptx, kernels, rng, dtype, dist):
    """Five directions: four at a time and one alone."""
    check("project", rng, dist, dtype=dtype, count=5)
    assert on_ptx.launches.keys() == matching(
        kernels, rf"project_kernelILNS0_{number(dtype)}LNS_{domain(dist)}"
    )


def test_squares_equal_reference(on_ptx, rng):
    check("squares", rng, "normal", count=3)
    assert len(on_ptx.launches) == 1


def test_derive_seed_equals_reference(on_ptx, rng):
    check_backend(derive_seeds, {"rng": rng.getrandbits(32)})
    assert len(on_ptx.launches) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wire", FORMATS)
def test_wire_equals_reference(on_ptx, kernels, rng, wire, dtype):
    check("encode", rng, "normal", wire=wire, dtype=dtype)
    for dist in DISTS:
        for operation in ("decode", "decode_fan_out"):
            fixed = {"wire": wire, "dtype": dtype}
            check(operation, rng, dist, **fixed, count=0, decay=None, rounding="nearest")
            check(operation, rng, dist, **fixed, count=2, decay=0.97, rounding=roundings(dtype)[-1])
    assert on_ptx.launches.keys() == matching(kernels, wire_kernels(wire, dtype))


@EACH_KERNEL
def test_spread_equals_reference(on_ptx, kernels, rng, dtype, dist):
    check_backend(test_spread.run, test_spread.random_spread(rng, dtype=dtype, dist=dist, count=2))
    n = 2 * chunk_of(dist) + 8 * rng.randrange(1000)
    args = test_spread.random_spread(rng, sizes=[n], aligned=True, dtype=dtype, dist=dist, count=3)
    args["offset"] = 8 * 2**32 - chunk_of(dist)
    check_backend(test_spread.run, args)
    assert on_ptx.launches.keys() == matching(
        kernels, rf"spread_kernelILNS0_{number(dtype)}LNS_{domain(dist)}"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_equals_reference(on_ptx, kernels, rng, dtype):
    for _ in range(3):
        check_backend(test_low_rank.run, test_low_rank.random_low_rank(rng, dtype=dtype))
    # Rows of whole vectors, the last few of them one by one; factors read by four or by one.
    for rank in (1, 8):
        shape = 64 + rng.randrange(20), 256 + 8 * rng.randrange(8)
        args = test_low_rank.random_low_rank(rng, shapes=[shape], dtype=dtype, count=2)
        args |= {"offsets": [8 * rng.randrange(2**40)]}
        args |= {"left": [torch.randn(2, shape[0], rank)], "right": [torch.randn(2, shape[1], rank)]}
        check_backend(test_low_rank.run, args)
    assert on_ptx.launches.keys() == matching(kernels, rf"low_rank_kernelILNS0_{number(dtype)}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_linear_equals_reference(on_ptx, kernels, rng, dtype):
    for shape, rank, rows in (((17, 70), 5, [3, 0, 6]), ((24, 136), 1, [2, 5])):
        args = test_low_rank_linear.random_linear(rng, dtype=dtype, shape=shape, rank=rank, rows=rows)
        check_backend(test_low_rank_linear.run, args)
    # Whole vectors of rows, of the factor or not, and as many rows as a thread takes.
    for rank in (4, 6):
        args = test_low_rank_linear.random_linear(rng, dtype=dtype, shape=(24, 136), rank=rank, rows=[1, 5])
        aligned = {name: args[name].clone() for name in ("y", "x", "right")}
        check_backend(test_low_rank_linear.run, args | aligned)
    assert on_ptx.launches.keys() == matching(kernels, linear_kernels(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantized_linear_equals_reference(on_ptx, kernels, rng, dtype):
    for size, packed, rows, x_bits in (
        (41, False, 6, 24),
        (41, True, 3, 8),
        (136, True, 5, 24),
        (16, False, 1, 8),
    ):
        args = test_quantized_linear.random_product(rng, dtype, rows, (5, 2), size, packed, x_bits)
        aligned = {name: args[name].clone() for name in ("x", "weight")} if size % 8 == 0 else {}
        check_backend(test_quantized_linear.run, args | aligned)
    assert on_ptx.launches.keys() == matching(kernels, quantized_kernels(dtype))


#: Tests of test_plan.py, whose plain calls the tests above hold against the reference: a table must give the
#: same bits, and name all memory that the kernels access.
PLANNED = {
    "combine": [
        lambda rng: test_plan.test_combine_in_place(None, 0, rng),
        lambda rng: test_plan.test_combine_out_of_place(None, 0, rng),
        functools.partial(test_plan.test_rows, None, False),
        functools.partial(test_plan.test_rows, None, True),
    ],
    "fan_out": [functools.partial(test_plan.test_fan_out, None, pending) for pending in (False, True)],
    "update": [functools.partial(test_plan.test_update, None, rule) for rule in UPDATES],
}


@pytest.mark.parametrize("operation", PLANNED)
def test_a_table_in_the_place_of_tensors(on_ptx, rng, operation):
    on_ptx.operations.clear()
    for run in PLANNED[operation]:
        run(rng)
    # Each has three calls with a plan, of which the first makes the table, and as many without one.
    count = len(PLANNED[operation])
    assert on_ptx.operations[f"{operation}_planned"] == 2 * count
    assert on_ptx.operations[operation] == 4 * count
    assert on_ptx.launches


def test_every_kernel_is_run(kernels):
    """By the tests above, which hold their launches against these patterns."""
    run = [
        REQUANTIZE,
        "low_rank_kernel",
        "linear_sums_kernel",
        "spread_kernel",
        "project_kernel",
        "squares_kernel",
        "derive_seed_kernel",
    ]
    for dtype in DTYPES:
        run += [linear_kernels(dtype), quantized_kernels(dtype)]
        run += [wire_kernels(wire, dtype) for wire in FORMATS]
        for dist in DISTS:
            run += [combine_kernels(dist, dtype, fan_out=False), combine_kernels(dist, dtype, fan_out=True)]
            run += [update_kernels(dist, dtype, "UpdateEntry"), rows_kernels(dist, dtype)]
    for pattern in run:
        assert matching(kernels, pattern), pattern
    assert set(kernels) == matching(kernels, "|".join(run))


def test_every_file_with_kernels_is_compiled():
    sources = [path for path in (cuda_on_host.ROOT / "csrc/cuda").glob("*.cu") if path.stem not in MODULES]
    launching = [path.stem for path in sources if re.search(r"ZK_GLOBAL|\blaunch\(", path.read_text())]
    assert launching == []


@pytest.mark.parametrize("operation", ["combine", "update adam", "decode_fan_out", "project", "squares"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_square_root_instruction_may_err(on_ptx, rng, operation, dtype):
    """The last bit of rsqrt.approx is not documented: one unit either way changes nothing."""
    if operation != "combine" and dtype is not torch.bfloat16:
        pytest.skip("the noise is the same")
    for on_ptx.rsqrt_ulps in (-1, 1):
        check(operation, rng, "normal", dtype=dtype, count=1, decay=None, rounding="nearest")


@pytest.mark.parametrize(("name", "kind"), FAULTS)
def test_a_fault_in_the_ptx_is_noticed(on_ptx, kernels, host_library, monkeypatch, rng, name, kind):
    """By an access that is wrong, by bits that are not the reference's, or by what is moved."""
    for opcode, (like, function) in mutants.TOWARD_ZERO.items():
        monkeypatch.setitem(RULES, opcode, RULES[like]._replace(function=function))
    args = faulty_arguments(rng, name)
    check_backend(test_combine.run, args)
    (kernel,) = on_ptx.launches

    def notices(text: str) -> bool:
        faulty = Device(host_library, lambda name: parse(text)[name])
        cuda_on_host.use(faulty, monkeypatch)
        try:
            check_backend(test_combine.run, args)
        except (PtxError, AssertionError):
            return True
        return faulty.traffic != on_ptx.traffic

    mutants.check(kernels[kernel], kind, notices)


#: Bytes of a Philox key's seed and of a coefficient, which each thread reads.
SMALL = 8 + 4


@EACH_KERNEL
def test_combine_moves_what_a_copy_does(on_ptx, dtype, dist):
    """In place, over whole chunks: each element is read once and written once, by accesses of 16 bytes a
    thread.
    """
    chunks = 3
    theta = torch.zeros(chunks * chunk_of(dist), dtype=dtype)
    zokernels.combine_(theta, 5, 1.0, streams=2, dist=dist)
    assert theta.count_nonzero() == theta.numel()
    size, threads = theta.numel() * theta.itemsize, 256 * chunks
    loads, stores = on_ptx.traffic["ld"], on_ptx.traffic["st"]
    assert stores.bytes == stores.distinct == size
    assert loads.bytes == size + threads * SMALL
    assert loads.distinct == size + 2 * 32  # a sector for the seed and one for the coefficient
    # A warp's access is 512 bytes: 16 sectors, or where a thread's eight elements are two accesses, half of
    # each of 32.
    sectors = 16 if dtype.itemsize == 2 else 32
    warps = threads // 32
    small = 2 * warps  # the seed and the coefficient, one sector each
    assert loads.requests - small == size // 512
    assert loads.sectors - small == size // 512 * sectors
    # nvcc may cut the store of a thread's first vector into four; ptxas joins them again, as test_cuda.py
    # counts.
    assert size // 512 <= stores.requests <= size // 512 + 3 * warps
    assert stores.sectors == stores.requests * sectors
