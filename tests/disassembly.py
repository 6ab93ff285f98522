"""SASS of a cubin, and the instructions per element of its hot path.

    figure = (instructions on the path + (trips - 1) * instructions of the path's loop) / elements a thread
    handles

The path is what one thread executes where nothing is masked: it starts at the entry, so the whole prologue
counts, runs through the basic block with the most 16-byte global stores (of several the one in the longest
loop), and ends at EXIT.  Where branches leave a choice it is the longest of those with the most wide
accesses, so the figure is an upper bound.  The loop (backward branch) around the stores runs ``trips`` times.
Predicated instructions count whether or not they take effect; a called subroutine counts as the one CALL.
NOPs and code that no path reaches (the padding behind EXIT) do not count.  Every instruction counts once,
also those that a pipe issues at half rate.

Works on Triton's and nvcc's cubins alike.  nvdisasm is looked for in Triton's package, on PATH and in
/usr/local/cuda."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)([^;]*);")
_LABEL = re.compile(r"^(\.L_\w+):")
_TEXT = re.compile(r"^\.text\.(\S+):", re.MULTILINE)
_TARGET = re.compile(r"`\((\.L_\w+)\)")

WIDE_LOAD, WIDE_STORE, HALF_WIDE_LOAD = r"LDG\.E.*\.128", r"STG\.E.*\.128", r"LDG\.E.*\.64"
WIDE = "|".join((WIDE_LOAD, WIDE_STORE, HALF_WIDE_LOAD))
LOCAL = r"LDL|STL"


def find_tool(name: str) -> str | None:
    """Path of a CUDA binary utility, or None."""
    places = []
    if spec := importlib.util.find_spec("triton"):
        places += [Path(root) / "backends/nvidia/bin" for root in spec.submodule_search_locations or ()]
    for place in places:
        if (place / name).exists():
            return str(place / name)
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str | None
    opcode: str
    operands: str

    @property
    def target(self) -> str | None:
        """Label that a branch may go to.

        On sm_80 a CALL.REL to a label of the function serves as a far branch.
        """
        found = _TARGET.search(self.operands)
        return found[1] if found and self.opcode.split(".")[0] in ("BRA", "JMP", "CALL") else None

    @property
    def falls_through(self) -> bool:
        conditional = self.predicate is not None or re.match(r"\s*U?P\d|\s*!U?P\d", self.operands) is not None
        return conditional or self.opcode.split(".")[0] not in ("BRA", "JMP", "EXIT", "RET", "BRX")


@dataclass
class Block:
    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)  # indices into Function.blocks

    def __len__(self) -> int:
        return len(self.instructions)

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, i.opcode) is not None for i in self.instructions)


class Function:
    """A kernel, whose ``text`` is read when something is asked of it: a library has hundreds of them."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text

    @cached_property
    def _read(self) -> tuple[list[Instruction], dict[str, int]]:
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        pending: list[str] = []
        for line in self.text.splitlines():
            if found := _LABEL.match(line):
                pending.append(found[1])
            # A branch to a NOP is a branch to what follows it.
            elif (found := _LINE.search(line)) and found[3] != "NOP":
                address = int(found[1], 16)
                labels.update(dict.fromkeys(pending, address))
                pending = []
                instructions.append(Instruction(address, found[2], found[3], found[4]))
        return instructions, labels

    @property
    def instructions(self) -> list[Instruction]:
        return self._read[0]

    @property
    def labels(self) -> dict[str, int]:
        """Address by label."""
        return self._read[1]

    def count(self, pattern: str) -> int:
        """Instructions of the whole function whose opcode begins with ``pattern`` (a regular expression)."""
        return sum(re.match(pattern, i.opcode) is not None for i in self.instructions)

    @cached_property
    def blocks(self) -> list[Block]:
        """Basic blocks in the order of their addresses."""
        leaders = {self.instructions[0].address}
        for here, after in zip(self.instructions, [*self.instructions[1:], None], strict=True):
            if here.target is not None:
                leaders.add(self.labels[here.target])
            if after and (here.target is not None or not here.falls_through or here.opcode == "EXIT"):
                leaders.add(after.address)
        blocks: list[Block] = []
        for instruction in self.instructions:
            if instruction.address in leaders:
                blocks.append(Block([]))
            blocks[-1].instructions.append(instruction)
        at = {block.instructions[0].address: i for i, block in enumerate(blocks)}
        for i, block in enumerate(blocks):
            last = block.instructions[-1]
            if last.target is not None:
                block.successors.append(at[self.labels[last.target]])
            if last.falls_through and i + 1 < len(blocks):
                block.successors.append(i + 1)
        return blocks

    @cached_property
    def loops(self) -> list[tuple[int, int]]:
        """(first, last) block of each loop that is not padding: the spans of the backward branches."""
        return [
            (s, i)
            for i, b in enumerate(self.blocks)
            for s in b.successors
            if s <= i and (s < i or len(b) > 1)
        ]

    def _longest(self, start: int, goal: int | None) -> list[int] | None:
        """Path of forward branches from block ``start`` to block ``goal``, or to an EXIT.

        It is the longest of those with the most wide accesses.
        """
        best: dict[int, tuple[tuple[int, int], list[int]] | None] = {}
        for i in reversed(range(start, len(self.blocks))):
            block = self.blocks[i]
            tails = [best[s] for s in block.successors if s > i and best[s] is not None]
            if i == goal or (goal is None and any(x.opcode == "EXIT" for x in block.instructions)):
                tails.append(((0, 0), []))
            (wide, size), tail = max(tails, default=((0, 0), None), key=lambda t: t[0])
            best[i] = None if tail is None else ((wide + block.count(WIDE), size + len(block)), [i, *tail])
        found = best.get(start)
        return None if found is None else found[1]

    def _through(self, start: int, hot: int, goal: int | None) -> list[int]:
        head, tail = self._longest(start, hot), self._longest(hot, goal)
        if head is None or tail is None:
            raise ValueError(
                f"{self.name}: no path of forward branches from block {start} through block {hot}"
            )
        return head + tail[1:]

    def _hot(self, store: str) -> int:
        """The block with the most ``store``; of several the one in the longest innermost loop."""

        def instructions_around(i: int) -> int:
            spans = (span for span in self.loops if span[0] <= i <= span[1])
            first, last = min(spans, default=(i, i), key=lambda span: span[1] - span[0])
            return sum(map(len, self.blocks[first : last + 1]))

        hot = max(
            range(len(self.blocks)), key=lambda i: (self.blocks[i].count(store), instructions_around(i))
        )
        if not self.blocks[hot].count(store):
            raise ValueError(f"{self.name}: no instruction matches {store!r}")
        return hot

    def hot_path(self, store: str = WIDE_STORE) -> list[int]:
        """Blocks from entry to EXIT through the block with the most ``store``."""
        return self._through(0, self._hot(store), None)

    def times(self, trips: int = 1, store: str = WIDE_STORE) -> Counter[int]:
        """How often one thread runs each block on the hot path, with ``trips`` iterations of the loop
        around it.
        """
        hot = self._hot(store)
        around = [span for span in self.loops if span[0] <= hot <= span[1]]
        if trips > 1 and not around:
            raise ValueError(f"{self.name}: expected a loop around the hot path for {trips} trips, got none")
        found: Counter[int] = Counter(self.hot_path(store))
        if around:
            header, latch = max(around, key=lambda span: span[1] - span[0])
            found.update({i: trips - 1 for i in self._through(header, hot, latch)})
        return found

    def executed(self, trips: int = 1, store: str = WIDE_STORE) -> int:
        """Instructions that one thread executes on the hot path, with ``trips`` iterations of the loop
        around it.
        """
        return sum(n * len(self.blocks[i]) for i, n in self.times(trips, store).items())

    def opcodes(self, trips: int = 1, store: str = WIDE_STORE, inner: int = 1) -> Counter[str]:
        """The opcodes of ``executed``, with ``inner`` turns of the longest innermost loop on the path."""
        times = self.times(trips, store)
        if inner > 1:
            turned = self._inner_loop(store)
            if turned is None:
                raise ValueError(f"{self.name}: expected an inner loop of {inner} turns, got none")
            times[turned] *= inner
        found: Counter[str] = Counter()
        for i, n in times.items():
            for instruction in self.blocks[i].instructions:
                found[instruction.opcode] += n
        return found

    def loads_in_flight(self, load: str = WIDE_LOAD, store: str = WIDE_STORE, words: int = 4) -> int:
        """The most ``load`` on the hot path that wait at one time: issued, and none of their ``words``
        registers read yet.
        """
        waiting: set[int] = set()  # the first register of each
        most = 0
        for i in self.hot_path(store):
            for x in self.blocks[i].instructions:
                registers = [int(n) for n in re.findall(r"\bR(\d+)\b", x.operands)]
                wide = re.match(load, x.opcode) is not None
                read = registers[1:] if wide else registers  # a write of one of them would wait, too
                waiting = {first for first in waiting if not any(first <= r < first + words for r in read)}
                if wide:
                    waiting.add(registers[0])
                    most = max(most, len(waiting))
        return most

    def loop_size(self, store: str = WIDE_STORE) -> int:
        """Instructions of the longest innermost loop on the hot path: one direction where K is known at
        run time.
        """
        found = self._inner_loop(store)
        return 0 if found is None else len(self.blocks[found])

    def _inner_loop(self, store: str) -> int | None:
        """The block that is the longest innermost loop on the hot path."""
        path = self.hot_path(store)
        own = [i for first, i in self.loops if first == i and i in path]
        return max(own, key=lambda i: len(self.blocks[i]), default=None)

    def hot_count(self, pattern: str, store: str = WIDE_STORE) -> int:
        """Instructions of the hot path, each loop once, whose opcode begins with ``pattern``."""
        return sum(self.blocks[i].count(pattern) for i in self.hot_path(store))

    def mix(self, store: str = WIDE_STORE) -> Counter[str]:
        """Opcodes of the hot path, each loop once: what to look at when a ceiling breaks."""
        return Counter(x.opcode for i in self.hot_path(store) for x in self.blocks[i].instructions)


def parse(sass: str) -> dict[str, Function]:
    """The functions of ``nvdisasm -c`` output by (mangled) name."""
    _, *parts = _TEXT.split(sass)
    return {name: Function(name, text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


@contextmanager
def _file_of(cubin: bytes) -> Iterator[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        yield file.name


@cache  # the tool takes a quarter of a second to start, and a kernel has several tests
def disassemble(cubin: bytes) -> dict[str, Function]:
    """The functions of a cubin by (mangled) name.  Raises ``FileNotFoundError`` without nvdisasm."""
    tool = find_tool("nvdisasm")
    if tool is None:
        raise FileNotFoundError("nvdisasm: expected in Triton's package, on PATH or in /usr/local/cuda/bin")
    with _file_of(cubin) as name:  # -ndf: without the analysis that annotates branches through registers
        command = [tool, "-c", "-ndf", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"nvdisasm: {done.stderr.strip()}")
    return parse(done.stdout)


class Usage(NamedTuple):
    """What a kernel asks of a multiprocessor, as the assembler wrote it into the cubin."""

    registers: int  #: of a thread
    stack: int  #: bytes of local memory of a thread: spilled registers and arrays that are indexed


def usages(cubin: bytes | Path) -> dict[str, Usage]:
    """By (mangled) name, of a cubin or of a library with cubins in it: two milliseconds, where
    :func:`disassemble` takes a quarter of a second.  Raises ``FileNotFoundError`` without cuobjdump.

    A library for several architectures has a kernel for each; the largest figures count."""
    tool = find_tool("cuobjdump")
    if tool is None:
        raise FileNotFoundError("cuobjdump: expected in Triton's package, on PATH or in /usr/local/cuda/bin")
    with nullcontext(str(cubin)) if isinstance(cubin, Path) else _file_of(cubin) as name:
        done = subprocess.run([tool, "-res-usage", name], capture_output=True, text=True, check=True)
    found: dict[str, Usage] = {}
    for name, *figures in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", done.stdout):
        found[name] = Usage(*map(max, found.get(name, (0, 0)), map(int, figures)))
    return found


def ptx_of(library: Path, architecture: int) -> list[str]:
    """The PTX for ``architecture`` in a library: a text of each of its sources, or none."""
    tool = find_tool("cuobjdump")
    if tool is None:
        raise FileNotFoundError("cuobjdump: expected in Triton's package, on PATH or in /usr/local/cuda/bin")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([tool, "-xptx", "all", library], cwd=folder, capture_output=True, check=False)
        return [path.read_text() for path in Path(folder).glob(f"*.sm_{architecture}.ptx")]


def select(functions: dict[str, Function], pattern: str) -> Function:
    """The one function whose name matches ``pattern`` (a regular expression)."""
    found = [f for name, f in functions.items() if re.search(pattern, name)]
    if len(found) != 1:
        raise ValueError(
            f"{pattern!r}: expected one function, got {[f.name for f in found] or list(functions)}"
        )
    return found[0]
