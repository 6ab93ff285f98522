"""The CUDA library: its kernels' code run on the CPU, its machine code read, its symbols checked.

No GPU needed.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess

import cuda_on_host
import disassembly
import empty_cases
import largest_cases
import pytest
import stream_cases
import test_combine
import test_fan_out
import test_low_rank
import test_low_rank_linear
import test_plan
import test_project
import test_quantized_linear
import test_requantize
import test_rows
import test_spread
import test_squares
import test_update
import test_wire
import torch
from helpers import DISTS, DTYPES, add_extras, check_backend, random_call

import zokernels
from zokernels import _host
from zokernels.backends import library
from zokernels.contract import seed_to_int64
from zokernels.ops.update import RULES

needs_library = pytest.mark.skipif(
    not library.path_of("cuda").exists(), reason="the CUDA library is not built (no nvcc)"
)

# --- the kernels on the host ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def library_on_host():
    """csrc/cuda, compiled for the host as torch.ops.zokernels_cuda_on_host, which runs one thread after
    the other.
    """
    return ctypes.CDLL(str(cuda_on_host.build()))


@pytest.fixture
def on_host(library_on_host, monkeypatch):
    """The operations on CPU tensors through the CUDA backend.  Gives the number of launches so far."""
    cuda_on_host.use(torch.ops.zokernels_cuda_on_host, monkeypatch)
    return library_on_host.launches_on_host


def random_combine(rng, **fixed):
    buffers, parts, kwargs = random_call(rng, **fixed)
    return {"buffers": buffers, "parts": parts, **add_extras(rng, parts, kwargs)}


#: What each operation runs, and its random arguments.
CASES = {
    "combine": (test_combine.run, random_combine),
    "requantize": (test_requantize.run, test_requantize.random_requantize),
    "project": (test_project.run, test_project.random_project),
    "squares": (test_squares.run, test_squares.random_squares),
    **test_wire.CASES,
    **{
        f"update {rule}": (test_update.run, functools.partial(test_update.random_update, rule=rule))
        for rule in RULES
    },
}


def chunk_of(dist: str) -> int:
    return 32768


@pytest.mark.parametrize("repeat", range(10))
def test_plain_combine_on_host_equals_reference(on_host, rng, repeat):
    for _ in range(4):
        buffers, parts, kwargs = random_call(rng)
        check_backend(test_combine.run, {"buffers": buffers, "parts": parts, **kwargs})


@pytest.mark.parametrize("repeat", range(4))
@pytest.mark.parametrize("case", CASES)
def test_kernels_on_host_equal_reference(on_host, rng, case, repeat):
    run, random_arguments = CASES[case]
    for _ in range(4):
        check_backend(run, random_arguments(rng))


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("case", CASES)
def test_fast_path_on_host_equals_reference(on_host, rng, case, dist):
    """Aligned tensors of several chunks take the vector path in the middle and the edge path at the ends."""
    run, random_arguments = CASES[case]
    chunk = chunk_of(dist)
    sizes = [2 * chunk + rng.randrange(chunk), chunk]
    # The counter wraps inside the second or third chunk.
    offsets = [8 * 2**32 - chunk - 8 * rng.randrange(chunk // 8), 8 * rng.randrange(1 << 20)]
    check_backend(run, random_arguments(rng, sizes=sizes, dist=dist, aligned=True, offsets=offsets))


@pytest.mark.parametrize("name", stream_cases.RUNS)
def test_upper_bits_of_streams_on_host(on_host, name):
    stream_cases.check(name)


@pytest.mark.parametrize("name", empty_cases.CASES)
def test_empty_tensors_on_host(on_host, name):
    empty_cases.CASES[name]("cpu")


def test_stochastic_rounding_at_the_largest_finite_values_on_host(on_host):
    largest_cases.check()


@pytest.mark.parametrize("dist", DISTS)
def test_rows_on_host_equal_reference(on_host, rng, dist):
    for rule in (None, None, *RULES):
        check_backend(test_rows.run, test_rows.random_rows(rng, rule, dist=dist))


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("width", test_rows.WIDTHS)
def test_chunks_of_rows_on_host_equal_reference(on_host, rng, width, dist):
    """Whole chunks of aligned rows, edges, and rows that are not aligned."""
    large = functools.partial(test_rows.large_rows, rng, chunk=32768, dist=dist)
    check_backend(test_rows.run, large(width, plain=True, count=rng.choice([1, 1, 2])))
    if width > 500:  # the reference runs row by row
        check_backend(test_rows.run, large(width, rule=rng.choice([None, *RULES])))
        check_backend(test_rows.run, large(width + rng.randrange(1, 8)))


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_fast_path_of_plain_combine_on_host(on_host, rng, dtype, dist, count):
    chunk = chunk_of(dist)
    sizes = [2 * chunk + rng.randrange(chunk), chunk]
    offsets = [8 * 2**32 - chunk - 8 * rng.randrange(chunk // 8), 8 * rng.randrange(1 << 20)]
    buffers, parts, kwargs = random_call(
        rng, sizes=sizes, dtype=dtype, dist=dist, count=count, aligned=True, offsets=offsets
    )
    check_backend(test_combine.run, {"buffers": buffers, "parts": parts, **kwargs})


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_fan_out_on_host_equals_reference(on_host, rng, dtype, dist, count):
    chunk = chunk_of(dist)
    sizes = [chunk + rng.randrange(chunk), rng.randrange(4100)]
    offsets = [8 * rng.randrange(2**40), rng.randrange(2**40)]
    buffers, parts, kwargs = random_call(
        rng, sizes=sizes, dtype=dtype, dist=dist, count=count, offsets=offsets
    )
    parts[0] = slice(0, sizes[0])
    test_fan_out.check(buffers, parts, kwargs, rng)


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("case", ["decode", "decode_fan_out"])
@pytest.mark.parametrize("wire", test_wire.WIRES)
def test_wire_with_nothing_pending_on_host(on_host, rng, wire, case, dist):
    run, random_arguments = test_wire.CASES[case]
    fixed = {"sizes": [chunk_of(dist) + rng.randrange(4000), rng.randrange(100)], "count": 0, "decay": None}
    check_backend(run, random_arguments(rng, wire=wire, dist=dist, rounding="nearest", aligned=True, **fixed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_on_host_equals_reference(on_host, rng, dtype):
    for _ in range(8):
        check_backend(test_low_rank.run, test_low_rank.random_low_rank(rng, dtype=dtype))
    # Rows of whole vectors, the last few of them one by one; factors read by four or by one.
    for rank in (1, 4, 6, 8):
        shape = 64 + rng.randrange(70), 256 + 8 * rng.randrange(40)
        args = test_low_rank.random_low_rank(rng, shapes=[shape], dtype=dtype, count=2)
        args |= {"offsets": [8 * rng.randrange(2**40)]}
        args |= {"left": [torch.randn(2, shape[0], rank)], "right": [torch.randn(2, shape[1], rank)]}
        check_backend(test_low_rank.run, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_linear_on_host_equals_reference(on_host, rng, dtype):
    """Rows of whole vectors and others, and more members than a launch takes."""
    for options in (
        {},
        {},
        {},
        {"shape": (72, 136), "rank": 5},
        {"shape": (72, 136), "rank": 8},
        {"shape": (8, 9), "rank": 2, "rows": [1] * 150},
    ):
        args = test_low_rank_linear.random_linear(rng, dtype=dtype, **options)
        check_backend(test_low_rank_linear.run, args)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantized_linear_on_host_equals_reference(on_host, rng, dtype, packed):
    """Groups of whole words and others, runs of words, more rows than are held, and sums of some outputs."""
    for options in (
        {},
        {},
        {"shape": (20, 3), "size": 136, "x_bits": 24},
        {"shape": (20, 3), "size": 41, "x_bits": 24},
        {"shape": (3, 1), "size": 700, "x_bits": 8, "rows": 70},
        {"shape": (300, 150), "size": 1, "x_bits": 24, "rows": 65},
    ):
        args = test_quantized_linear.random_product(rng, dtype, packed=packed, **options)
        check_backend(test_quantized_linear.run, args)


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spread_on_host_equals_reference(on_host, rng, dtype, dist):
    for _ in range(4):
        check_backend(test_spread.run, test_spread.random_spread(rng, dtype=dtype, dist=dist))
    n = chunk_of(dist) + 8 * rng.randrange(5000)
    args = test_spread.random_spread(rng, sizes=[n], aligned=True, dtype=dtype, dist=dist, count=3)
    args["offset"] = 8 * rng.randrange(2**30)
    check_backend(test_spread.run, args)


#: The tests of plans, each with the arguments that pytest gives it.
PLANS = {
    **{f"in place {i}": lambda rng, i=i: test_plan.test_combine_in_place("cuda", i, rng) for i in range(6)},
    **{
        f"out of place {i}": lambda rng, i=i: test_plan.test_combine_out_of_place("cuda", i, rng)
        for i in range(3)
    },
    "fan-out": lambda rng: test_plan.test_fan_out("cuda", False, rng),
    "fan-out with an update": lambda rng: test_plan.test_fan_out("cuda", True, rng),
    **{f"update {rule}": lambda rng, rule=rule: test_plan.test_update("cuda", rule, rng) for rule in RULES},
    "rows": lambda rng: test_plan.test_rows("cuda", False, rng),
    "masked rows": lambda rng: test_plan.test_rows("cuda", True, rng),
    "hundreds": lambda rng: test_plan.test_hundreds_of_tensors_with_empty_ones("cuda", rng),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans(on_host, case, rng):
    PLANS[case](rng)


def test_plans_take_tables(on_host):
    test_plan.check_tables_are_taken("zokernels_cuda_on_host")


def test_derive_seed_on_host_equals_reference(on_host, rng):
    run_seed, step = (
        torch.tensor([seed_to_int64(rng.getrandbits(64)) for _ in range(700)]) for _ in range(2)
    )
    k = torch.tensor([rng.getrandbits(32) for _ in range(700)])
    with zokernels.backend("reference"):
        want = zokernels.derive_seed(run_seed, step, k)
    assert torch.equal(zokernels.derive_seed(run_seed, step, k), want)


#: Tensors of one launch: their table is a kernel argument of at most 4 KiB, or of 32,764 bytes where there is
#: a second number and the device takes it.
CAPACITY = {
    "plain": (67, 544),
    "combine": (52, 430),
    "update adam": (52, 430),
    "encode": (91,),
    "decode": (67,),
    "squares": (143,),
    "project": (91,),
}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(("case", "capacities"), CAPACITY.items())
def test_many_tensors_take_few_launches(on_host, library_on_host, rng, case, capacities, large):
    library_on_host.take_large_arguments(large)
    try:
        check_launches(on_host, rng, case, capacities[0], capacities[-1] if large else capacities[0])
    finally:
        library_on_host.take_large_arguments(True)


def check_launches(on_host, rng, case, small, capacity):
    for n in (1, small, small + 1, 250, capacity + capacity // 5 + 2):
        sizes = [rng.randrange(0, 40) if i % 7 else 0 for i in range(n - 1)] + [17000]
        if case == "plain":
            buffers, parts, kwargs = random_call(rng, sizes=sizes, count=1, dtype=torch.bfloat16)
            run, args = test_combine.run, {"buffers": buffers, "parts": parts, **kwargs}
        else:
            run, args = CASES[case][0], CASES[case][1](rng, sizes=sizes, count=1, dist="normal")
            if case == "combine":
                args["mask_seed"], args["density"] = 3, 0.5
        before = on_host()
        check_backend(run, args)
        assert on_host() - before == -(-sum(size > 0 for size in sizes) // capacity)


def test_square_root_without_range_check_is_exact():
    """From 1 / sqrt(s) rounded to nearest, the two corrections give IEEE's root for every radius tried.

    The device starts from rsqrt.approx instead; that the instructions are the compiler's own is tested below,
    and that the device's noise equals the reference's, on a GPU."""
    found = _host.check_sqrt(stride=101)
    assert found["tried"] > 2e7
    assert found["wrong"] == 0
    assert found["smallest"] > 2.0**-100  # below it sqrt.rn would leave the fast path
    assert found["largest"] < 43


# --- the library ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=needs_library)])
def test_only_stable_symbols_are_used(name):
    """One binary serves torch 2.10 and later, since it uses no C++ symbol of torch but only its C shim."""
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
    """The functions in the library's machine code for sm_90, of the sources whose kernels the tests read."""
    tool = disassembly.find_tool("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump")
    folder = tmp_path_factory.mktemp("cubins")
    subprocess.run(
        [tool, "-xelf", "sm_90", library.path_of("cuda")], cwd=folder, check=True, capture_output=True
    )
    functions = {}
    for cubin in (path.read_bytes() for path in folder.glob("*.cubin")):
        if re.search(rb"combine_(normal|rademacher|rows)_kernel|decode_kernel", cubin):
            functions.update(disassembly.disassemble(cubin))
    if not functions:
        pytest.skip("the CUDA library was built without sm_90 code")
    return functions


def kernel(functions, dist, dtype, count=1, decay=0, stochastic=0) -> disassembly.Function:
    options = rf"{DTYPES.index(dtype)}ELi{count}ELb{decay}ELb{stochastic}ELi4096ELb0E"
    return disassembly.select(functions, rf"combine_{dist}_kernelILNS0_5DTypeE{options}")


# Measured on nvcc 13.0: what each may cost, prologue and table look-up included.
CEILINGS = [
    ("normal", torch.bfloat16, 1, 0, 0, 23.4),
    ("normal", torch.float16, 1, 0, 0, 23.4),
    ("normal", torch.float32, 1, 0, 0, 22.2),
    ("normal", torch.bfloat16, 2, 0, 0, 43.9),
    ("normal", torch.bfloat16, 1, 0, 1, 31.5),
    ("rademacher", torch.bfloat16, 1, 0, 0, 6.0),
    ("rademacher", torch.float16, 1, 0, 0, 6.0),
    ("rademacher", torch.float32, 1, 0, 0, 5.0),
]


@needs_library
@pytest.mark.parametrize(("dist", "dtype", "count", "decay", "stochastic", "ceiling"), CEILINGS, ids=str)
def test_instructions_per_element(sm90, dist, dtype, count, decay, stochastic, ceiling):
    function = kernel(sm90, dist, dtype, count, decay, stochastic)
    trips = 4 if dist == "normal" else 1
    figure = function.executed(trips) / 128
    print(f"{dist} {dtype} K={count} stochastic={stochastic}: {figure:.2f} instructions per element")
    assert 0.9 * ceiling < figure <= ceiling, function.mix().most_common(12)
    width = 1 if dtype is not torch.float32 else 2
    stores = 16 * width // trips
    assert function.hot_count(disassembly.WIDE_LOAD) == function.hot_count(disassembly.WIDE_STORE) == stores


def rows_kernel(functions, dist, dtype, stochastic=0) -> disassembly.Function:
    """One direction, no decay."""
    number, domain = DTYPES.index(dtype), 1 + DISTS.index(dist)
    name = rf"combine_rows_kernelILNS0_5DTypeE{number}ELNS_6DomainE{domain}ELi1ELb0ELb{stochastic}E"
    return disassembly.select(functions, name)


ROW_CEILINGS = [
    ("normal", torch.bfloat16, 0, 24.5),
    ("normal", torch.float16, 0, 24.5),
    ("normal", torch.float32, 0, 23.5),
    ("normal", torch.bfloat16, 1, 31.9),
    ("rademacher", torch.bfloat16, 0, 18.0),
]


@needs_library
@pytest.mark.parametrize(("dist", "dtype", "stochastic", "ceiling"), ROW_CEILINGS, ids=str)
def test_instructions_per_element_of_rows(sm90, dist, dtype, stochastic, ceiling):
    """A thread computes 16 blocks of eight elements, eight blocks at a time, without a division."""
    function = rows_kernel(sm90, dist, dtype, stochastic)
    figure = function.executed(2) / 128
    print(f"rows: {dist} {dtype} stochastic={stochastic}: {figure:.2f} instructions per element")
    assert ceiling * 0.85 < figure <= ceiling, function.mix().most_common(12)
    width = 1 if dtype is not torch.float32 else 2
    assert (
        function.hot_count(disassembly.WIDE_LOAD) == function.hot_count(disassembly.WIDE_STORE) == 8 * width
    )


@needs_library
def test_instructions_of_rademacher_rows_in_whole_tiles(sm90):
    """A thread's 16 blocks of eight then have one Philox block, where the longest path draws one for each."""
    function = rows_kernel(sm90, "rademacher", torch.bfloat16)
    blocks = [function.blocks[i] for i in function.hot_path()]
    draws = [len(block) for block in blocks if block.count(r"IMAD\.WIDE") >= 17]
    figure = (function.executed(2) - 15 / 8 * sum(draws)) / 128
    print(f"rows: rademacher, whole tiles: {figure:.2f} instructions per element")
    assert len(draws) == 8
    assert 8 < figure <= 11.0


#: Wire formats by their dtype's number, and what a fan-out of bf16 from each may cost, normal and Rademacher.
WIRE_CEILINGS = {
    "bf16": (1, 28.0, 11.5),
    "fp16": (2, 28.0, 11.5),
    "fp8": (4, 31.5, 15.0),
    "int8": (3, 31.5, 15.5),
}


@needs_library
@pytest.mark.parametrize("wire", WIRE_CEILINGS)
def test_instructions_of_a_fan_out_from_wire_bytes(sm90, wire):
    """With nothing pending; 16-byte stores, and no loop over anything but groups of four accesses."""
    number, *ceilings = WIRE_CEILINGS[wire]
    for domain, elements, ceiling in ((1, 64, ceilings[0]), (2, 128, ceilings[1])):
        name = rf"decode_kernelILNS0_5DTypeE1ELS\d_{number}ELNS_6DomainE{domain}ELb1ELb0E"
        function = disassembly.select(sm90, name)
        figure = function.executed(elements // 32) / elements
        print(f"{wire}, domain {domain}: {figure:.2f} instructions per element")
        assert ceiling * 0.8 < figure <= ceiling, function.mix().most_common(12)
        assert function.hot_count(disassembly.WIDE_STORE) == 8


@needs_library
def test_no_kernel_uses_local_memory():
    """On none of the architectures that the library was built for."""
    if disassembly.find_tool("cuobjdump") is None:
        pytest.skip("no cuobjdump")
    usages = disassembly.usages(library.path_of("cuda"))
    assert len(usages) > 100
    assert {name: usage.stack for name, usage in usages.items() if usage.stack} == {}


@needs_library
def test_square_root_is_the_compilers_own_fast_path(sm90):
    """MUFU.RSQ and FMUL, FMUL, FFMA, FFMA: as many as radii, no comparison and no subroutine."""
    function = kernel(sm90, "normal", torch.bfloat16)
    assert function.hot_count(r"MUFU\.RSQ") == 16  # four blocks of eight in a pass of the loop
    assert function.hot_count(r"FSETP") == 0
    assert function.hot_count(r"CALL") == 0
