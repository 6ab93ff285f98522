"""The triton backend equals the reference bit for bit in Triton's interpreter (see triton_cases); its
sqrt is exact.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import case_process
import numpy as np
import pytest
import triton_cases
from case_process import CaseProcess

from zokernels import contract
from zokernels.backends import BackendUnavailable, get

triton = pytest.importorskip("triton")


def version(module) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@pytest.fixture(scope="session")
def interpreted():
    """A process with the interpreter, which runs one case after the other."""
    if version(triton) < (3, 7) and version(np) >= (2, 4):
        pytest.skip(
            "the interpreter of Triton 3.6 cannot read scalars with NumPy 2.4; pip install 'numpy<2.4'"
        )
    process = CaseProcess("triton_cases.py", limit=300, TRITON_INTERPRET="1")
    yield process
    process.stop()


@pytest.mark.parametrize("name", triton_cases.CASES)
def test_interpreter(interpreted, name, rng):
    if wrong := interpreted.ask(name=name, seed=rng.getrandbits(32)):
        pytest.fail(wrong, pytrace=False)


def test_a_case_can_fail():
    """A difference reaches the report: here the worker compares against a reference with doubled
    coefficients.
    """
    code = (
        "import triton_cases as t, dataclasses, json\n"
        "from zokernels.backends import registry\n"
        "r = registry.get('reference')\n"
        "doubled = lambda o, p, t: r.combine(o, p, t._replace(coeffs=2 * t.coeffs))\n"
        "bad = dataclasses.replace(r, find=lambda name: doubled if name == 'combine' else r.find(name))\n"
        "registry.LOADED['reference'] = bad\n"
        "print(json.dumps([t.run(f'directions: normal K={k}', 0) for k in (1, 0)]))\n"
    )
    environment = case_process.environment(TRITON_INTERPRET="1")
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    wrong, right = json.loads(done.stdout)
    assert "of 130 elements of tensor 0" in wrong
    assert right == ""


def test_devices():
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("the interpreter is on in this process")
    assert get("triton").devices == {"cuda"}


def test_missing_triton_names_the_command():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from zokernels.backends import get\n"
        "try: get('triton')\n"
        "except Exception as e: print(type(e).__name__, e)\n"
    )
    environment = case_process.environment()
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(BackendUnavailable.__name__)
    assert "pip install triton" in done.stdout


def _f32(bits: int) -> np.float32:
    return np.uint32(bits).view(np.float32)


def _fma(a, b, c) -> np.ndarray:
    """fp32 fma: the float64 sum is rounded to odd."""
    p, c = np.float64(a) * np.float64(b), np.float64(c)
    s = p + c
    t = s - p
    error = (p - (s - t)) + (c - t)
    bits = s.view(np.int64)
    away = np.where((error > 0) == (s > 0), 1, -1)
    return np.where((error != 0) & (bits & 1 == 0), bits + away, bits).view(np.float64).astype(np.float32)


def _radius_squared(n: np.ndarray) -> np.ndarray:
    """s of the contract for n = float(int32(v))."""
    bits = n.view(np.uint32)
    m = (bits & np.uint32(0x7FFFFF) | np.uint32(0x3F800000)).view(np.float32)
    ef = (bits & np.uint32(0x7F800000)).view(np.int32).astype(np.float32)
    q = np.full_like(m, _f32(contract.NORMAL_R[4]))
    for c in reversed(contract.NORMAL_R[:4]):
        q = _fma(q, m, _f32(c))
    return _fma(q, m, _fma(ef, _f32(contract.NORMAL_NC2), _f32(contract.NORMAL_LK)))


def test_sqrt_fast_path_is_exact(rng):
    """The hand-written sqrt equals IEEE for every rsqrt that the hardware may return, on the s that occur.

    rsqrt.approx.ftz.f32 is within 2^-22.9 relative (PTX ISA): every fp32 value that near must lead to the
    same root."""
    draw = np.random.default_rng(rng.getrandbits(32))
    top = np.arange(2**24 - 2**19, 2**24, dtype=np.float64) * 2**7  # the largest |n|: the smallest s
    wide = draw.integers(0, 2**32, 2**19, dtype=np.uint32) >> draw.integers(1, 32, 2**19, dtype=np.uint32) | 1
    s = _radius_squared(np.concatenate((top, [2.0**31, 1.0], wide.astype(np.float64))).astype(np.float32))
    assert s.min() > 2.0**-100, s.min()
    assert s.max() < 2.0**100, s.max()
    exact = np.sqrt(s)
    inverse = 1 / np.sqrt(s.astype(np.float64))
    tried = 0
    for ulp in range(-2, 3):
        r = (inverse.astype(np.float32).view(np.int32) + ulp).view(np.float32)
        possible = np.abs(r - inverse) <= 2**-22.9 * inverse
        tried += possible.sum()
        g, h = s * r, np.float32(0.5) * r
        root = _fma(_fma(-g, g, s), h, g)
        wrong = np.flatnonzero(possible & (root != exact))
        assert wrong.size == 0, f"rsqrt {ulp:+} ulp: {wrong.size} wrong, first s = {s[wrong[0]]!r}"
    assert tried > 2 * s.size
