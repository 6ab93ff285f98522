"""AMD's assembly as Triton's compiler writes it: directives, basic blocks, loops, and counts of operations.

Operations, not lines: gfx11 issues two as one instruction (``v_dual_a ... :: v_dual_b ...``), and a packed
one (``v_pk_``) does two at once."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_LABEL = re.compile(r"^(\.LBB\d+_\d+):")
_BRANCH = re.compile(r"^s_c?branch\w*\s+(\.LBB\d+_\d+)")
_OPERATION = re.compile(r"(?:^|:: )(\w+)")
#: fmas of fp32, in all encodings; the mixed ones convert an fp16 operand, which is exact.
FMA = r"v_((dual_|pk_)?fm(a|ac|aak|amk)_f32|fma_mix_f32)"
WIDE_LOAD, WIDE_STORE = r"global_load_(dwordx4|b128)", r"global_store_(dwordx4|b128)"
SCRATCH = "scratch_"


@dataclass
class Code:
    """Instructions, a line each."""

    lines: list[str]

    def count(self, pattern: str) -> int:
        names = Counter(name for line in self.lines for name in _OPERATION.findall(line))
        return sum(n * (2 if "_pk_" in name else 1) for name, n in names.items() if re.match(pattern, name))


class Kernel(Code):
    def __init__(self, text: str) -> None:
        self.text = text
        body = text[text.index("_kernel:") : text.index(".Lfunc_end")]
        blocks, places = [[]], {}
        for line in body.splitlines()[1:]:
            line = line.split(";")[0].strip()
            if label := _LABEL.match(line):
                places[label[1]] = len(blocks)
                blocks.append([])
            elif re.match(r"[a-z]\w+(\s|$)", line):
                blocks[-1].append(line)
                if _BRANCH.match(line):
                    blocks.append([])
        super().__init__([line for block in blocks for line in block])
        #: What lies between a branch back and its target.
        self.loops = [
            Code([line for block in blocks[places[branch[1]] : at + 1] for line in block])
            for at, block in enumerate(blocks)
            for line in block
            if (branch := _BRANCH.match(line)) and places[branch[1]] <= at
        ]

    def directive(self, name: str) -> int:
        """The value of ``.amdhsa_<name>``."""
        found = re.search(rf"\.amdhsa_{name}\s+(\d+)", self.text)
        assert found, name
        return int(found[1])

    def hot_loop(self) -> Code:
        """The smallest loop with the most 16-byte stores: whole tiles of an element-wise kernel."""
        most = max(loop.count(WIDE_STORE) for loop in self.loops)
        return min(
            (loop for loop in self.loops if loop.count(WIDE_STORE) == most), key=lambda loop: len(loop.lines)
        )
