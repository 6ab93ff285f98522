"""The Triton kernels compile for AMD's GPUs without one: CDNA3 (gfx942, MI300) and RDNA3 (gfx1100, RX 7900).

Nothing has run there.  What can be read in the assembly: no subnormal is flushed, no product and sum are
contracted, nothing is spilled, and how many instructions an element takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import amdgcn

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: there is no compiler in this process", allow_module_level=True)

from triton_amd_worker import COUNTED, TARGETS, kernels_of  # noqa: E402
from triton_kernels import EVERY  # noqa: E402

WORKER = Path(__file__).parent / "triton_amd_worker.py"


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Of each target the folder with the assembly of every kernel, by one process for all."""
    found = {target: tmp_path_factory.mktemp(target) for target in TARGETS}
    path = os.pathsep.join(
        filter(None, (str(WORKER.parent), str(WORKER.parents[1]), os.environ.get("PYTHONPATH")))
    )
    environment = {**os.environ, "PYTHONPATH": path}
    arguments = [word for pair in found.items() for word in pair]
    subprocess.run([sys.executable, WORKER, *arguments], env=environment, check=True)
    return found


@pytest.fixture
def kernel(folders):
    """target, name, dtypes -> the compiled kernel."""

    def read(target: str, name: str, dtypes: str) -> amdgcn.Kernel:
        path = folders[target] / f"{name}, {dtypes}"
        if (error := path.with_suffix(".error")).exists():
            pytest.fail(error.read_text(), pytrace=False)
        return amdgcn.Kernel(path.with_suffix(".s").read_text())

    return read


def test_every_kernel_and_dtype_has_a_target():
    compiled = [kernel for target in TARGETS for kernel in kernels_of(target)]
    assert set(compiled) == {(name, dtypes) for name in EVERY for dtypes in EVERY[name]}
    assert len(compiled) == len(set(compiled)) + len(COUNTED) * (len(TARGETS) - 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "name", "dtypes"), [(t, *kernel) for t in TARGETS for kernel in kernels_of(t)]
)
def test_every_kernel_compiles(kernel, target, name, dtypes):
    found = kernel(target, name, dtypes)
    assert len(found.lines) > 20
    # 3: subnormals are neither flushed when read nor when written.  0: to nearest, ties to even.
    assert [found.directive(f"float_denorm_mode_{bits}") for bits in ("32", "16_64")] == [3, 3]
    assert [found.directive(f"float_round_mode_{bits}") for bits in ("32", "16_64")] == [0, 0]
    assert found.directive("private_segment_fixed_size") == 0
    assert found.count(amdgcn.SCRATCH) == 0


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_product_and_sum_are_contracted(kernel, target):
    """The fmas of the contract, 12 a pair and one an element in a loop of 32 elements; and two of each square
    root.

    Rademacher noise has sums alone in whole programs; the eight fmas are those of the edges.
    """
    loop = kernel(target, "combine_kernel", "fp32").hot_loop()
    assert loop.count(r"v_sqrt_f32") == 16
    assert loop.count(amdgcn.FMA) == 12 * 16 + 32 + 2 * 16
    assert loop.count(amdgcn.WIDE_LOAD) == loop.count(amdgcn.WIDE_STORE) == 8
    rademacher = kernel(target, "combine_table_kernel", "fp32")
    assert rademacher.count(amdgcn.FMA) == 8
    assert (
        rademacher.count(r"v_(dual_|pk_)?add_f32|v_(dual_)?sub_f32") >= 64
    )  # half of its elements: two passes


#: Instructions an element in whole tiles: kernel, dtypes, elements of a loop, and the ceilings for the two
#: targets.
CEILINGS = [
    ("combine_kernel", "fp32", 32, (30, 28.5)),
    ("combine_kernel", "bf16", 32, (39.5, 36.3)),
]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "dtypes", "elements", "ceilings"), CEILINGS)
def test_instructions_per_element(kernel, target, name, dtypes, elements, ceilings):
    loop = kernel(target, name, dtypes).hot_loop()
    figure = len(loop.lines) / elements
    if os.environ.get("ZOKERNELS_SHOW_SASS"):
        print(f"\n{figure:.2f} instructions per element; {target}: {name}, {dtypes}")
    assert 20 < figure <= dict(zip(TARGETS, ceilings, strict=True))[target]
    assert loop.count(r"ds_|s_barrier") == 0


SAMPLE = """
sample_kernel:
	.loc 1 2 3
	v_mov_b32_e32 v0, 0 ; a comment
.LBB0_1:
	global_load_dwordx4 v[0:3], v4, s[0:1]
	v_dual_fmac_f32 v0, v1, v2 :: v_dual_add_f32 v3, v4, v5
	v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]
	v_fmaak_f32 v0, v1, v2, 0x3f800000
	global_store_dwordx4 v4, v[0:3], s[0:1]
	s_cbranch_scc1 .LBB0_1
	s_cbranch_execz .LBB0_3
	v_fma_f32 v0, v1, v2, v3
.LBB0_3:
	s_endpgm
.Lfunc_end0:
	.amdhsa_private_segment_fixed_size 16
"""


def test_counts_by_hand():
    found = amdgcn.Kernel(SAMPLE)
    assert len(found.lines) == 10
    assert (found.count(amdgcn.FMA), found.count(r"v_dual_add")) == (5, 1)
    (loop,) = found.loops
    assert loop.lines[0].startswith("global_load")
    assert len(loop.lines) == 6
    assert loop.count(amdgcn.FMA) == 4
    assert found.directive("private_segment_fixed_size") == 16


def test_the_backend_says_that_nothing_has_run():
    code = (
        "import torch; torch.version.hip = 'pretended'\n"
        "from zokernels.backends import registry; print(registry.get('triton').note)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(WORKER.parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "on AMD GPUs: compiled, never run"
