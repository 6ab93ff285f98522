"""Which instruction set the host kernels use: ``ZOKERNELS_CPU_ISA``, for tests and measurements."""

from __future__ import annotations

import os

#: auto, portable, avx2, avx512, vnni, amx or neon.  The kernels of vnni and amx are those of avx512, of which one
#: has more instructions: products of integers.  auto has all that the machine has.
isa = os.environ.get("ZOKERNELS_CPU_ISA", "auto")


def current_isa() -> str:
    return isa
