"""The CUDA library: its kernels' code run on the CPU, its machine code read, its symbols checked. No GPU needed."""

from __future__ import annotations

import ctypes
import pathlib
import re
import shutil
import subprocess

import disassembly
import pytest
import test_fan_out
import torch
from helpers import DISTS, DTYPES, assert_same_bits, random_call, reference_result

import zokernels
from zokernels import _host
from zokernels.backends import library
from zokernels.contract import DISTS as DOMAIN
from zokernels.contract import seed_to_int64

ROOT = pathlib.Path(__file__).parent.parent
needs_library = pytest.mark.skipif(
    not library.path_of("cuda").exists(), reason="the CUDA library is not built (no nvcc)"
)

# --- the kernels on the host ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def on_host(tmp_path_factory):
    """The kernels of csrc/cuda compiled by the host compiler, each thread run in turn."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("cuda_on_host") / "libcuda_on_host.so"
    source = ROOT / "tests/cuda_on_host/combine.cpp"
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-shared",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-I",
        str(ROOT),
    ]
    if "avx2" in _host.instruction_sets():
        flags.append("-mfma")
    subprocess.run([compiler, *flags, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target)).combine_on_host


def pointers(values) -> ctypes.Array:
    return (ctypes.c_void_p * len(values))(*values)


def run_on_host(
    function, params, sides=None, probe=None, *, seeds, coeffs, streams, offsets, dist, decay, rounding, rounding_seed
) -> int:
    n = len(params)
    pointer = pointers([p.data_ptr() for p in params])
    plus, minus = (pointers([t.data_ptr() for t in side]) for side in sides) if sides else (None, None)
    probe_seed, probe_coeff = probe or (None, None)
    factor = None if decay is None else ctypes.byref(ctypes.c_float(decay))
    seed = ctypes.byref(ctypes.c_int64(seed_to_int64(rounding_seed))) if rounding == "stochastic" else None
    return function(
        ctypes.c_int64(n),
        pointer,
        pointer,
        plus,
        minus,
        None if probe is None else ctypes.byref(ctypes.c_int64(seed_to_int64(probe_seed))),
        None if probe is None else ctypes.byref(ctypes.c_float(probe_coeff)),
        (ctypes.c_int64 * n)(*[p.numel() for p in params]),
        (ctypes.c_uint64 * n)(*offsets),
        (ctypes.c_uint32 * n)(*streams),
        ctypes.c_int64(seeds.numel()),
        ctypes.c_void_p(seeds.data_ptr()),
        ctypes.c_void_p(coeffs.data_ptr()),
        factor,
        seed,
        DTYPES.index(params[0].dtype),
        DOMAIN[dist],
    )


@pytest.mark.parametrize("repeat", range(10))
def test_kernels_on_host_equal_reference(on_host, rng, repeat):
    for _ in range(4):
        buffers, parts, kwargs = random_call(rng)
        want = reference_result(buffers, parts, kwargs)
        got = [b.clone() for b in buffers]
        run_on_host(on_host, [b[p] for b, p in zip(got, parts, strict=True)], **kwargs)
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a, b, f"{a.dtype} {kwargs}")


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_fast_path_on_host_equals_reference(on_host, rng, dtype, dist, count):
    """Aligned tensors of several chunks take the vector path for the middle, the edge path for the ends."""
    chunk = 16384 if dist == "normal" else 32768
    sizes = [2 * chunk + rng.randrange(chunk), chunk]
    offset = 8 * 2**32 - chunk - 8 * rng.randrange(chunk // 8)  # the counter wraps inside the second or third chunk
    buffers, _, kwargs = random_call(rng, sizes=sizes, dtype=dtype, dist=dist, count=count)
    kwargs["offsets"] = [offset, 8 * rng.randrange(1 << 20)]
    parts = [slice(0, n) for n in sizes]
    want = reference_result(buffers, parts, kwargs)
    run_on_host(on_host, [b[p] for b, p in zip(buffers, parts, strict=True)], **kwargs)
    for a, b in zip(buffers, want, strict=True):
        assert_same_bits(a, b, f"{kwargs}")


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_fan_out_on_host_equals_reference(on_host, rng, dtype, dist, count):
    chunk = 16384 if dist == "normal" else 32768
    sizes = [chunk + rng.randrange(chunk), rng.randrange(4100)]
    buffers, parts, kwargs = random_call(rng, sizes=sizes, dtype=dtype, dist=dist, count=count)
    parts[0], kwargs["offsets"][0] = slice(0, sizes[0]), 8 * rng.randrange(2**40)
    params, (seed, coeff) = [b[p] for b, p in zip(buffers, parts, strict=True)], (rng.getrandbits(64), 0.125)
    want = test_fan_out.composed(params, seed, coeff, kwargs)
    sides = [[torch.empty_like(p) for p in params] for _ in range(2)]
    run_on_host(on_host, params, sides, (seed, coeff), **kwargs)
    for name, got, expected in zip(("theta", "plus", "minus"), (params, *sides), want, strict=True):
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b, f"{name} {kwargs}")


def test_many_tensors_take_few_launches(on_host, rng):
    """70 tensors a launch: their table is a kernel argument of at most 4 KiB."""
    for n in (1, 70, 71, 250):
        sizes = [rng.randrange(0, 40) if i % 7 else 0 for i in range(n - 1)] + [17000]
        buffers, parts, kwargs = random_call(rng, sizes=sizes, count=1, dtype=torch.bfloat16)
        want = reference_result(buffers, parts, kwargs)
        launches = run_on_host(on_host, [b[p] for b, p in zip(buffers, parts, strict=True)], **kwargs)
        assert launches == -(-sum(size > 0 for size in sizes) // 70)
        for a, b in zip(buffers, want, strict=True):
            assert_same_bits(a, b)


def test_square_root_without_range_check_is_exact():
    """From 1 / sqrt(s) rounded to nearest, the two corrections give IEEE's root for every radius tried.

    The device starts from rsqrt.approx instead; that the instructions are the compiler's own is tested below, and that
    the device's noise equals the reference's, on a GPU.
    """
    found = _host.check_sqrt(stride=101)
    assert found["tried"] > 2e7
    assert found["wrong"] == 0
    assert found["smallest"] > 2.0**-100  # below it sqrt.rn would leave the fast path
    assert found["largest"] < 43


# --- the library ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=needs_library)])
def test_only_stable_symbols_are_used(name):
    """One binary serves torch 2.10 and later: no C++ symbol of torch, only functions of its C shim."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    done = subprocess.run(
        [nm, "-DC", "--undefined-only", library.path_of(name)], capture_output=True, text=True, check=True
    )
    symbols = [line.split(maxsplit=1)[-1].strip() for line in done.stdout.splitlines()]
    assert any("torch_library_impl" in s for s in symbols)
    unstable = [s for s in symbols if re.search(r"\b(at|c10|torch|caffe2|pybind11)::", s)]
    assert unstable == []
    assert [s for s in symbols if re.search(r"\b_?Py[A-Z_]", s)] == []  # nor of Python


@needs_library
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_library_loads_on_a_cpu_build_of_torch():
    with pytest.raises(zokernels.BackendUnavailable, match="has no CUDA; install a CUDA build of torch"):
        zokernels.backends.get("cuda")
    assert "combine" in str(torch.ops.zokernels_cuda.combine)


@pytest.fixture(scope="session")
def sm90(tmp_path_factory):
    """The functions of the library's sm_90 machine code."""
    tool = disassembly.find_tool("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump")
    folder = tmp_path_factory.mktemp("cubins")
    subprocess.run([tool, "-xelf", "sm_90", library.path_of("cuda")], cwd=folder, check=True, capture_output=True)
    functions = {}
    for cubin in folder.glob("*.cubin"):
        functions.update(disassembly.disassemble(cubin.read_bytes()))
    if not functions:
        pytest.skip("the CUDA library was built without sm_90 code")
    return functions


def kernel(functions, dist, dtype, count=1, decay=0, stochastic=0) -> disassembly.Function:
    name = rf"combine_{dist}_kernelILNS0_5DTypeE{DTYPES.index(dtype)}ELi{count}ELb{decay}ELb{stochastic}ELb0E"
    return disassembly.select(functions, name)


# Measured on nvcc 13.0: what each may cost, prologue and table look-up included.
CEILINGS = [
    ("normal", torch.bfloat16, 1, 0, 0, 24.0),
    ("normal", torch.float16, 1, 0, 0, 24.0),
    ("normal", torch.float32, 1, 0, 0, 22.5),
    ("normal", torch.bfloat16, 2, 0, 0, 46.0),
    ("normal", torch.bfloat16, 1, 0, 1, 36.0),
    ("rademacher", torch.bfloat16, 1, 0, 0, 6.0),
    ("rademacher", torch.float16, 1, 0, 0, 6.0),
    ("rademacher", torch.float32, 1, 0, 0, 5.0),
]


@needs_library
@pytest.mark.parametrize(("dist", "dtype", "count", "decay", "stochastic", "ceiling"), CEILINGS, ids=str)
def test_instructions_per_element(sm90, dist, dtype, count, decay, stochastic, ceiling):
    function = kernel(sm90, dist, dtype, count, decay, stochastic)
    elements = 64 if dist == "normal" else 128
    figure = function.executed() / elements
    print(f"{dist} {dtype} K={count} stochastic={stochastic}: {figure:.2f} instructions per element")
    assert figure <= ceiling, function.mix().most_common(12)
    width = 1 if dtype is not torch.float32 else 2
    assert (
        function.hot_count(disassembly.WIDE_LOAD) == function.hot_count(disassembly.WIDE_STORE) == elements // 8 * width
    )


@needs_library
def test_no_kernel_uses_local_memory(sm90):
    spilling = {name: f.count(disassembly.LOCAL) for name, f in sm90.items() if f.count(disassembly.LOCAL)}
    assert spilling == {}


@needs_library
def test_square_root_is_the_compilers_own_fast_path(sm90):
    """MUFU.RSQ and FMUL, FMUL, FFMA, FFMA: as many as radii, no comparison and no subroutine."""
    function = kernel(sm90, "normal", torch.bfloat16)
    assert function.hot_count(r"MUFU\.RSQ") == 32
    assert function.hot_count(r"FSETP") == 0
    assert function.hot_count(r"CALL") == 0
