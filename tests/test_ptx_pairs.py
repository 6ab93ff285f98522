"""Normals two at a time, as sm_100 makes them: the PTX executed, its bits held against the reference."""

from __future__ import annotations

import subprocess

import cuda_on_host
import disassembly
import pytest
import torch
from ptx.machine import Machine
from ptx.memory import Memory
from ptx.parser import parse

from zokernels.backends.reference.noise import normal_from_words

SOURCE = """
#include "csrc/cuda/pair.cuh"

extern "C" __global__ void __launch_bounds__(256)
    normals(const uint32_t* words, float* z, uint32_t mantissa) {
  const uint32_t block = blockIdx.x * 256 + threadIdx.x;
  zk::Words<uint32_t> own;
  for (int p = 0; p < 4; ++p) own.w[p] = words[4 * block + p];
  float out[8];
  zk::cuda::normals(own, out, mantissa);
  for (int e = 0; e < 8; ++e) z[8 * block + e] = out[e];
}
"""


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    """By architecture."""
    nvcc = disassembly.find_tool("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "normals.cu").write_text(SOURCE)
    command = [nvcc, "-ptx", "-std=c++20", *cuda_on_host.TORCH, folder / "normals.cu"]
    for architecture in (90, 100):
        subprocess.run(
            [*command, f"-arch=sm_{architecture}", "-o", folder / f"{architecture}.ptx"], check=True
        )
    return {architecture: (folder / f"{architecture}.ptx").read_text() for architecture in (90, 100)}


@pytest.mark.parametrize("ulps", [-1, 0, 1])
@pytest.mark.parametrize("architecture", [90, 100])
def test_normals_equal_the_references(ptx, rng, architecture, ulps):
    """Also where rsqrt.approx errs by one unit.

    Words of zeros and ones give the largest and the smallest radius.
    """
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    words = torch.randint(-(2**31), 2**31, (2048, 4), generator=generator)
    words[:4] = torch.tensor([0, -1, 2**31 - 1, -(2**31)])[:, None]
    memory = Memory(1 << 18, 2)
    source = memory.place(words.int(), written=True, writable=False)
    z = memory.place(torch.zeros(2048, 8), written=False, writable=True)
    arguments = [t.data_ptr().to_bytes(8, "little") for t in (source, z)] + [0x007FFFFF.to_bytes(4, "little")]
    Machine(parse(ptx[architecture])["normals"], rsqrt_ulps=ulps).run(8, arguments, memory)
    assert torch.equal(z, normal_from_words(words & 0xFFFFFFFF).view(2048, 8))


def test_only_sm_100_has_pairs(ptx):
    """For two radii: the square of the angle, three fmas a polynomial, three products.

    A block has four radii.
    """
    packed = {architecture: text.count(".rn.f32x2") for architecture, text in ptx.items()}
    assert packed == {90: 0, 100: 2 * 10}
