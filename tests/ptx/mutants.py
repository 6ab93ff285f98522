"""PTX with one fault put into it: what a compiler could get wrong, or a kernel's author."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np

from .arithmetic import Array, bf16_of, fma32

_OPPOSITE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
_NEXT = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}
_COMPARISON = re.compile(r"\bsetp\.(lt|le|gt|ge|eq|ne)(?=\.\w+\s+(%p\d+),)")
_PREDICATE = re.compile(r"@!?%p\d+\s+(?=\w)")
_ACCESS = re.compile(r"\b(?:ld|st)\.(?:global|param)[^;\[]*\[\s*%?\w+(\s*\+\s*(\d+))?(?=\s*\])")
_SUM = re.compile(r"\badd\.rn\.f32(\s+%[fr]\d+,\s*)(%[fr]\d+)(,\s*%[fr]\d+)")
_ROUNDING = {
    "rounding": re.compile(r"\b(?:fma|mul|add)\.rn(?=\.f32)"),
    "conversion": re.compile(r"\bcvt\.rn(?=\.b?f16)"),
}


def _guards_a_branch(text: str, predicate: str) -> bool:
    """Alone, or with another."""
    either = re.search(rf"\b(?:and|or)\.pred\s+(%p\d+),[^;]*{predicate}\b", text)
    names = [predicate, *([either[1]] if either else [])]
    return any(re.search(rf"@!?{name}\s+bra\b", text) for name in names)


def mutants(text: str) -> Iterator[tuple[str, str, str]]:
    """Kind of the fault, the line that has it, and the text with it."""

    def changed(kind: str, begin: int, end: int, new: str) -> tuple[str, str, str]:
        after = text[:begin] + new + text[end:]
        return kind, after[text.rfind("\n", 0, begin) + 1 : after.find("\n", begin)].strip(), after

    for match in _COMPARISON.finditer(text):
        yield changed("comparison", *match.span(1), _OPPOSITE[match[1]])
        if match[1] in _NEXT and _guards_a_branch(text, match[2]):
            yield changed("bound", *match.span(1), _NEXT[match[1]])
    for match in _PREDICATE.finditer(text):
        yield changed("predicate", *match.span(), "")
    for match in _ACCESS.finditer(text):
        place = match.span(1) if match[1] else (match.end(), match.end())
        yield changed("offset", *place, f"+{int(match[2] or 0) + 4}")
    for match in _SUM.finditer(text):
        product = re.search(rf"\bmul\.rn\.f32\s+{match[2]},\s*(%[fr]\d+,\s*%[fr]\d+);", text)
        if product:
            yield changed("fused", *match.span(), f"fma.rn.f32{match[1]}{product[1]}{match[3]}")
    for kind, pattern in _ROUNDING.items():
        for match in pattern.finditer(text):
            yield changed(kind, match.end() - 1, match.end(), "z")


#: How many of the faults that are tried must be noticed, where not all change something.
ENOUGH = {
    "bound": 1,  # most are never met: no chunk begins where its tensor ends
    "rounding": 2,  # the square root corrects a last bit that is wrong on the way, and some sums are exact
}


def some(text: str, kind: str) -> dict[str, str]:
    """Four faults of one kind, evenly over the text: what is changed, and the text.  Of bounds the first six,
    among which is that of whole chunks."""
    found = [(line, mutant) for its, line, mutant in mutants(text) if its == kind]
    return dict(found[:6] if kind == "bound" else [found[i * len(found) // 4] for i in range(4) if found])


def check(text: str, kind: str, notices: Callable[[str], bool]) -> None:
    """That ``notices`` is true of faulty texts."""
    found = {line: notices(mutant) for line, mutant in some(text, kind).items()}
    missed = [line for line, noticed in found.items() if not noticed]
    assert found
    assert len(found) - len(missed) >= min(len(found), ENOUGH.get(kind, len(found))), f"not noticed: {missed}"


def _toward_zero(nearest: Array, a: Array, b: Array, c: Array) -> Array:
    """From a b + c to nearest to the fp32 below it in magnitude, where that is not exact."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), np.asarray(c, np.float64)
    total = product + addend
    back = total - product
    over = (nearest - total) - ((product - (total - back)) + (addend - back))
    return np.where(over * np.sign(nearest) > 0, np.nextafter(nearest, np.float32(0)), nearest)


def _pair(low: Array, high: Array) -> Array:
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


def _bf16(x: Array) -> Array:
    return np.where(np.isnan(x), bf16_of(x), (np.asarray(x).view(np.uint32) >> 16).astype(np.uint16))


#: What the kernels do not use: opcode, the opcode that it stands for, its function.
TOWARD_ZERO = {
    "fma.rz.f32": ("fma.rn.f32", lambda a, b, c: _toward_zero(fma32(a, b, c), a, b, c)),
    "mul.rz.f32": ("mul.rn.f32", lambda a, b: _toward_zero(a * b, a, b, np.float32(0))),
    "add.rz.f32": ("add.rn.f32", lambda a, b: _toward_zero(a + b, a, np.float32(1), b)),
    "cvt.rz.bf16.f32": ("cvt.rn.bf16.f32", _bf16),
    "cvt.rz.bf16x2.f32": ("cvt.rn.bf16x2.f32", lambda high, low: _pair(_bf16(low), _bf16(high))),
}
