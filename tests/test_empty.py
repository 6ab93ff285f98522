"""Empty tensors and empty lists, in every operation on the CPU's kernels and the reference.

Triton's interpreter and the CUDA source on the host make the same calls (triton_cases, test_cuda)."""

from __future__ import annotations

import re

import empty_cases
import pytest

from zokernels.ops.define import OPERATIONS


@pytest.mark.parametrize("name", empty_cases.CASES)
def test_empty_tensors(name, cpu_backend):
    empty_cases.CASES[name]("cpu")


def test_every_operation_has_a_case():
    named = {word for name in empty_cases.CASES for word in re.findall(r"\w+", name)}
    assert set(OPERATIONS) <= named
