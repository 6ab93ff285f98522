"""The PTX that nvcc makes of csrc/cuda, executed: its bits, and what it moves.  And the interpreter for it."""

from __future__ import annotations

import os
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
import test_spread
import torch
from helpers import DISTS, DTYPES, check_backend, random_call, random_values
from ptx.arithmetic import RULES, fma32, rsqrt
from ptx.device import Device
from ptx.machine import Machine
from ptx.memory import Memory
from ptx.parser import PtxError, entries, parse

import zokernels
from zokernels.backends.reference.combine import fma

# --- the interpreter --------------------------------------------------------------------------------------------------

_MODULE = """
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


def run(body: str, *, written: bool = True, writable: bool = True) -> tuple[torch.Tensor, torch.Tensor, Memory]:
    """64 threads over an int32 tensor, 0 to 63, at %rd4 and another at %rd5, each thread at its own element."""
    kernel = parse(_MODULE.format(body=body))["sample"]
    memory = Memory(4096, 2)
    source = memory.place(torch.arange(64, dtype=torch.int32), written=written, writable=False)
    target = memory.place(torch.zeros(64, dtype=torch.int32), written=False, writable=writable)
    arguments = [t.data_ptr().to_bytes(8, "little") for t in (source, target)]
    Machine(kernel).run(1, arguments, memory)
    return source, target, memory


def test_a_kernel_runs():
    source, target, memory = run("ld.global.u32 %r2, [%rd4]; add.s32 %r3, %r2, -5; st.global.u32 [%rd5], %r3;")
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


# --- the kernels ------------------------------------------------------------------------------------------------------

#: Files of csrc/cuda whose kernels are run, the slowest to compile first.
MODULES = ["combine", "spread", "low_rank"]

#: Their entries that no test runs: patterns of names, and why.
NOT_RUN: dict[str, str] = {}


@pytest.fixture(scope="session")
def modules(tmp_path_factory):
    """The PTX of ``MODULES`` for sm_90, by name."""
    nvcc = disassembly.find_tool("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("ptx")
    command = [nvcc, "-ptx", "-arch=sm_90", "-std=c++20", *cuda_on_host.TORCH]

    def compile_module(name: str) -> None:
        source = cuda_on_host.ROOT / f"csrc/cuda/{name}.cu"
        subprocess.run([*command, source, "-o", folder / f"{name}.ptx"], check=True)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_module, MODULES))
    return {name: (folder / f"{name}.ptx").read_text() for name in MODULES}


@pytest.fixture(scope="session")
def device(modules, tmp_path_factory):
    path = cuda_on_host.build(tmp_path_factory.mktemp("cuda_on_host"), "-O0")
    module_of = {entry: text for text in modules.values() for entry in entries(text)}
    return Device(path, lambda name: parse(module_of[name], name)[name])


@pytest.fixture
def on_ptx(device, monkeypatch):
    """The operations on CPU tensors through the CUDA backend, its kernels executed as PTX."""
    cuda_on_host.use(device, monkeypatch)
    device.launches.clear()
    device.rsqrt_ulps = 0
    return device


def many_call(rng, dist: str, **fixed) -> dict:
    """Arguments of ``combine_`` for more tensors than a small kernel argument holds; all but one are empty."""
    buffers, parts, kwargs = random_call(rng, sizes=[1 + rng.randrange(700), *[0] * 68], dist=dist, **fixed)
    return {"buffers": buffers, "parts": parts, **kwargs}


def chunk_of(dist: str) -> int:
    return 16384 if dist == "normal" else 32768


def mixed_call(rng, dist: str, **fixed) -> dict:
    """Arguments of ``combine_`` for three tensors: an aligned one of which the first chunk takes the fast path and the
    next, where the counter's low word wraps, does not (normals); one that nothing aligns; and one element."""
    sizes = [2 * 16384 + 8 * rng.randrange(2048), 1 + rng.randrange(700), 1]
    offsets = [8 * 2**32 - 16384 - 8 * rng.randrange(2048), rng.randrange(2**62), rng.randrange(2**40)]
    buffers, parts, kwargs = random_call(rng, sizes=sizes, dist=dist, aligned=True, offsets=offsets, **fixed)
    begin = 1 + rng.randrange(7)
    parts[1] = slice(begin, begin + sizes[1])
    return {"buffers": buffers, "parts": parts, **kwargs}


def combine_kernels(dist: str, dtype: torch.dtype, *, fan_out: bool) -> str:
    """A pattern of names; the last template argument is whether they fan out."""
    return rf"combine_{dist}_kernelILNS0_5DTypeE{DTYPES.index(dtype)}E.*ELb{fan_out:d}EEEv"


def spread_kernel(dist: str, dtype: torch.dtype) -> str:
    return rf"spread_kernelILNS0_5DTypeE{DTYPES.index(dtype)}ELNS_6DomainE{1 + DISTS.index(dist)}EEEv"


def low_rank_kernel(dtype: torch.dtype) -> str:
    return rf"low_rank_kernelILNS0_5DTypeE{DTYPES.index(dtype)}EEEv"


def matching(modules, pattern: str) -> set[str]:
    return {e for text in modules.values() for e in entries(text) if re.search(pattern, e)}


def roundings(dtype: torch.dtype) -> list[str]:
    return ["nearest"] if dtype is torch.float32 else ["nearest", "stochastic"]


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_equals_reference(on_ptx, modules, rng, dtype, dist):
    """Each instantiation."""
    for rounding in roundings(dtype):
        for count, decay in ((1, None), (1, 0.97), (2, None), (3, 0.97)):
            for call in (mixed_call, many_call):
                args = call(rng, dist, dtype=dtype, count=count, decay=decay, rounding=rounding)
                check_backend(test_combine.run, args)
    assert on_ptx.launches.keys() == matching(modules, combine_kernels(dist, dtype, fan_out=False))


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fan_out_equals_reference(on_ptx, modules, rng, dtype, dist):
    """Each instantiation."""
    for rounding in roundings(dtype):
        for count, decay in ((1, None), (2, 0.97)):
            for call in (mixed_call, many_call):
                args = call(rng, dist, dtype=dtype, count=count, decay=decay, rounding=rounding)
                test_fan_out.check(args.pop("buffers"), args.pop("parts"), args, rng)
    assert on_ptx.launches.keys() == matching(modules, combine_kernels(dist, dtype, fan_out=True))


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spread_equals_reference(on_ptx, modules, rng, dtype, dist):
    check_backend(test_spread.run, test_spread.random_spread(rng, dtype=dtype, dist=dist, count=2))
    n = chunk_of(dist) + 8 * rng.randrange(1000)
    args = test_spread.random_spread(rng, sizes=[n], aligned=True, dtype=dtype, dist=dist, count=3)
    args["offset"] = 2**32 + 8 * rng.randrange(2**30)
    check_backend(test_spread.run, args)
    assert on_ptx.launches.keys() == matching(modules, spread_kernel(dist, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_equals_reference(on_ptx, modules, rng, dtype):
    for _ in range(3):
        check_backend(test_low_rank.run, test_low_rank.random_low_rank(rng, dtype=dtype))
    # Rows of whole vectors, the last few of them one by one; factors read by four or by one.
    for rank in (1, 8):
        shape = 64 + rng.randrange(20), 256 + 8 * rng.randrange(8)
        args = test_low_rank.random_low_rank(rng, shapes=[shape], dtype=dtype, count=2)
        args |= {"offsets": [8 * rng.randrange(2**40)]}
        args |= {"left": [torch.randn(2, shape[0], rank)], "right": [torch.randn(2, shape[1], rank)]}
        check_backend(test_low_rank.run, args)
    assert on_ptx.launches.keys() == matching(modules, low_rank_kernel(dtype))


def test_every_kernel_is_run(modules):
    """By the tests above, which hold their launches against these patterns."""
    run = [low_rank_kernel(dtype) for dtype in DTYPES]
    for dist in DISTS:
        for dtype in DTYPES:
            run += [combine_kernels(dist, dtype, fan_out=False), combine_kernels(dist, dtype, fan_out=True)]
            run.append(spread_kernel(dist, dtype))
    for pattern in (*run, *NOT_RUN):
        assert matching(modules, pattern), pattern
    assert matching(modules, "") == matching(modules, "|".join((*run, *NOT_RUN)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_square_root_instruction_may_err(on_ptx, rng, dtype):
    """The last bit of rsqrt.approx is not documented: one unit either way changes nothing."""
    args = mixed_call(rng, "normal", dtype=dtype, count=1, decay=None, rounding="nearest")
    for on_ptx.rsqrt_ulps in (-1, 1):
        check_backend(test_combine.run, args)


#: Bytes of a Philox key's seed and of a coefficient, which each thread reads.
SMALL = 8 + 4


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_moves_what_a_copy_does(on_ptx, dtype, dist):
    """In place, over whole chunks: each element is read once and written once, by accesses of 16 bytes a thread."""
    chunks = 3
    theta = torch.zeros(chunks * chunk_of(dist), dtype=dtype)
    zokernels.combine_(theta, 5, 1e-3, streams=2, dist=dist)
    assert theta.count_nonzero() == theta.numel()
    size, threads = theta.numel() * theta.itemsize, 256 * chunks
    loads, stores = on_ptx.traffic["ld"], on_ptx.traffic["st"]
    assert stores.bytes == stores.distinct == size
    assert loads.bytes == size + threads * SMALL
    assert loads.distinct == size + 2 * 32  # a sector for the seed and one for the coefficient
    # A warp's access is 512 bytes: 16 sectors, or where a thread's eight elements are two accesses, half of each of 32.
    sectors = 16 if dtype.itemsize == 2 else 32
    warps = threads // 32
    small = 2 * warps  # the seed and the coefficient, one sector each
    assert loads.requests - small == size // 512
    assert loads.sectors - small == size // 512 * sectors
    # nvcc may cut the store of a thread's first vector into four; ptxas joins them again, as test_cuda.py counts.
    assert size // 512 <= stores.requests <= size // 512 + 3 * warps
    assert stores.sectors == stores.requests * sectors
