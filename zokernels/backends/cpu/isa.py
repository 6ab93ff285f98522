"""Which instruction set the host kernels use: ``ZOKERNELS_CPU_ISA``, for tests and measurements."""

from __future__ import annotations

import os

#: auto, portable, avx2, avx512, vnni, amx or neon.  vnni and amx are avx512 with more instructions for
#: products of integers.  auto takes all that the machine has.
isa = os.environ.get("ZOKERNELS_CPU_ISA", "auto")


def current_isa() -> str:
    return isa
