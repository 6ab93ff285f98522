"""Runs a kernel: the threads of many blocks at once, those at the lowest instruction first.

Each thread has a place in the code.  Threads at the same place run together, and where branches part them those that
are behind go first, so that they meet again where the branches do.  A barrier holds threads until all that have not
returned are held.  Threads therefore run in one order of many: a race between them would not show.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from .arithmetic import DTYPES, RULES, rsqrt
from .memory import Memory
from .parser import SIZES, Instruction, Kernel, PtxError

#: Threads at once: enough that Python's share of the time is small.
LANES = 8192

_UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
_SPECIAL = {"%tid.x", "%ctaid.x", "%ntid.x", "%nctaid.x", "%laneid"}
_ADDRESS = re.compile(r"\[\s*([%$\w@]+)\s*(?:\+\s*(-?\d+))?\s*\]")
_MEMORY = re.compile(r"(ld|st)\.(param|global)(?:\.(v2|v4))?\.(\w+)")
_ATOMIC = re.compile(r"atom\.global\.add\.(u32|u64)")

Lanes = np.ndarray
Step = Callable[["_Batch", Lanes | slice], None]


def _parts(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{}").split(",")]


class Machine:
    """A kernel with its instructions decoded.  ``rsqrt_ulps``: by how much ``rsqrt.approx`` errs."""

    def __init__(self, kernel: Kernel, *, rsqrt_ulps: int = 0) -> None:
        self.kernel = kernel
        self.rsqrt_ulps = rsqrt_ulps
        self.steps: list[Step | None] = [self._decode(instruction) for instruction in kernel.instructions]

    def run(self, blocks: int, arguments: Sequence[bytes], memory: Memory) -> None:
        """A grid of ``blocks``; ``arguments`` are the bytes of the kernel's parameters, in order."""
        parameters = self._space(arguments)
        at_once = max(1, LANES // self.kernel.threads)
        with np.errstate(all="ignore"):
            for first in range(0, blocks, at_once):
                count = min(at_once, blocks - first)
                _Batch(self, parameters, memory, first, count, blocks).run()

    def _space(self, arguments: Sequence[bytes]) -> np.ndarray:
        places = self.kernel.parameters.values()
        if len(places) != len(arguments) or any(len(a) != size for a, (_, size) in zip(arguments, places, strict=True)):
            sizes = [len(a) for a in arguments]
            raise PtxError(f"{self.kernel.name}: expected arguments of {[s for _, s in places]} bytes, got {sizes}")
        space = np.zeros(max((begin + size for begin, size in places), default=0), np.uint8)
        for argument, (begin, size) in zip(arguments, places, strict=True):
            space[begin : begin + size] = np.frombuffer(argument, np.uint8)
        return space

    # --- operands -----------------------------------------------------------------------------------------------------

    def _reader(self, operand: str, kind: str) -> Callable[[_Batch, Lanes | slice], np.ndarray]:
        """Of the operand as ``kind``: of a wider register the low bits."""
        dtype = DTYPES[kind]
        if operand in self.kernel.registers:
            own = self.kernel.registers[operand]
            if (own == "pred") != (kind == "pred") or SIZES[own] < SIZES[kind]:
                raise PtxError(f"{self.kernel.name}: {operand} of .{own} as .{kind}")
            if SIZES[own] == SIZES[kind]:
                return lambda batch, lanes: batch.register(operand)[lanes].view(dtype)
            low = _UNSIGNED[dtype.itemsize]
            return lambda batch, lanes: batch.register(operand)[lanes].astype(low).view(dtype)
        if operand in _SPECIAL:
            return lambda batch, lanes: batch.special[operand][lanes].astype(dtype)
        if operand in self.kernel.parameters:
            value = dtype.type(self.kernel.parameters[operand][0])
        elif match := re.fullmatch(r"0([fd])([0-9A-Fa-f]{8}|[0-9A-Fa-f]{16})", operand):
            value = _UNSIGNED[4 if match[1] == "f" else 8].type(int(match[2], 16)).view(dtype)
        else:
            try:
                number = int(operand.removesuffix("U"), 0)
            except ValueError:
                raise PtxError(f"{self.kernel.name}: operand {operand!r}") from None
            if kind == "pred":
                value = np.bool_(number)
            else:
                unsigned = _UNSIGNED[dtype.itemsize]
                value = unsigned.type(number & (256**dtype.itemsize - 1)).view(dtype)
        return lambda batch, lanes: value

    def _writer(self, operand: str, kind: str) -> Callable[[_Batch, Lanes | slice, np.ndarray], None]:
        """Into a register; a wider one is filled by zeros, or by the sign of signed types."""
        own = self.kernel.registers.get(operand)
        if own is None or (own == "pred") != (kind == "pred") or SIZES[own] < SIZES[kind]:
            raise PtxError(f"{self.kernel.name}: {operand} of .{own} for .{kind}")
        if own == "pred":

            def write(batch: _Batch, lanes: Lanes | slice, value: np.ndarray) -> None:
                batch.register(operand, new=True)[lanes] = value
        else:
            dtype, wide = DTYPES[kind], np.dtype(f"{'i' if kind[0] == 's' else 'u'}{SIZES[own]}")
            unsigned = _UNSIGNED[SIZES[own]]
            widens = SIZES[own] > SIZES[kind]

            def write(batch: _Batch, lanes: Lanes | slice, value: np.ndarray) -> None:
                value = np.asarray(value)
                if value.dtype.itemsize != dtype.itemsize:
                    raise PtxError(f"{self.kernel.name}: {operand}: {value.dtype} for .{kind}")
                value = value.view(dtype).astype(wide) if widens else value
                batch.register(operand, new=True)[lanes] = value.view(unsigned)

        return write

    # --- instructions -------------------------------------------------------------------------------------------------

    def _decode(self, instruction: Instruction) -> Step | None:
        """None: an instruction of control, which ``_Batch`` has."""
        opcode, operands = instruction.opcode, instruction.operands
        if opcode in ("bra", "bra.uni", "ret", "exit", "bar.sync"):
            if opcode.startswith("bra") and operands[0] not in self.kernel.labels:
                raise PtxError(f"{self.kernel.name}: label {operands[0]}")
            return None
        if opcode.startswith("mov."):
            return self._move(opcode.removeprefix("mov."), *operands)
        if match := _MEMORY.fullmatch(opcode):
            return self._access(instruction, *match.groups())
        if match := _ATOMIC.fullmatch(opcode):
            return self._atomic(instruction, match[1])
        if opcode == "rsqrt.approx.ftz.f32":
            # Flushed are subnormals, which no radius is: they would show as a difference.
            read, write = self._reader(operands[1], "f32"), self._writer(operands[0], "f32")
            return lambda batch, lanes: write(batch, lanes, rsqrt(read(batch, lanes), self.rsqrt_ulps))
        rule = RULES.get(opcode)
        if rule is None or len(operands) != 1 + len(rule.sources):
            raise PtxError(f"{self.kernel.name}: unknown opcode: {instruction}")
        write = self._writer(operands[0], rule.result)
        reads = [self._reader(o, kind) for o, kind in zip(operands[1:], rule.sources, strict=True)]
        function = rule.function
        if len(reads) == 1:
            (one,) = reads
            return lambda batch, lanes: write(batch, lanes, function(one(batch, lanes)))
        if len(reads) == 2:
            one, two = reads
            return lambda batch, lanes: write(batch, lanes, function(one(batch, lanes), two(batch, lanes)))
        one, two, three, *four = reads
        return lambda batch, lanes: write(
            batch,
            lanes,
            function(one(batch, lanes), two(batch, lanes), three(batch, lanes), *(f(batch, lanes) for f in four)),
        )

    def _move(self, kind: str, to: str, source: str) -> Step:
        half = {"b32": "b16", "b64": "b32"}.get(kind, "")
        if to.startswith("{"):
            read, low = self._reader(source, kind), _UNSIGNED[SIZES[half]]
            writes = [self._writer(part, half) for part in _parts(to)]

            def split(batch: _Batch, lanes: Lanes | slice) -> None:
                values = np.ascontiguousarray(read(batch, lanes)).view(low).reshape(-1, 2)
                for i, write in enumerate(writes):
                    write(batch, lanes, values[:, i])

            return split
        write = self._writer(to, kind)
        if source.startswith("{"):
            low, high = (self._reader(part, half) for part in _parts(source))
            dtype, shift = DTYPES[kind], DTYPES[kind].type(8 * SIZES[half])
            return lambda batch, lanes: write(
                batch, lanes, low(batch, lanes).astype(dtype) | high(batch, lanes).astype(dtype) << shift
            )
        read = self._reader(source, kind)
        return lambda batch, lanes: write(batch, lanes, read(batch, lanes))

    def _address(self, operand: str) -> Callable[[_Batch, Lanes], np.ndarray]:
        match = _ADDRESS.fullmatch(operand)
        if match is None:
            raise PtxError(f"{self.kernel.name}: address {operand!r}")
        read, offset = self._reader(match[1], "u64"), np.int64(int(match[2] or 0)).view(np.uint64)
        return lambda batch, lanes: np.broadcast_to(read(batch, lanes) + offset, lanes.shape)

    def _access(self, instruction: Instruction, name: str, space: str, vector: str | None, kind: str) -> Step:
        pointer, values = instruction.operands if name == "st" else instruction.operands[::-1]
        address, parts = self._address(pointer), _parts(values)
        if kind not in DTYPES or len(parts) != int((vector or "v1")[1]):
            raise PtxError(f"{self.kernel.name}: unknown opcode: {instruction}")
        dtype = DTYPES[kind]
        size = dtype.itemsize * len(parts)
        if name == "st":
            if space != "global":
                raise PtxError(f"{self.kernel.name}: unknown opcode: {instruction}")
            reads = [self._reader(part, kind) for part in parts]

            def store(batch: _Batch, lanes: Lanes | slice) -> None:
                numbers = batch.numbers(lanes)
                stored = np.empty((len(numbers), len(parts)), dtype)
                for i, read in enumerate(reads):
                    stored[:, i] = read(batch, lanes)
                batch.memory.store(instruction, address(batch, numbers), stored.view(np.uint8), batch.threads(numbers))

            return store
        writes = [self._writer(part, kind) for part in parts]

        def load(batch: _Batch, lanes: Lanes | slice) -> None:
            numbers = batch.numbers(lanes)
            at = address(batch, numbers)
            if space == "param":
                loaded = batch.load_parameters(instruction, at, size)
            else:
                loaded = batch.memory.load(instruction, at, size, batch.threads(numbers))
            loaded = np.ascontiguousarray(loaded).view(dtype)
            for i, write in enumerate(writes):
                write(batch, lanes, np.ascontiguousarray(loaded[:, i]))

        return load

    def _atomic(self, instruction: Instruction, kind: str) -> Step:
        """Integer addition, whose order does not matter; what was there is not given, for no kernel asks."""
        unused, pointer, value = instruction.operands
        if any(unused in other.operands for other in self.kernel.instructions if other is not instruction):
            raise PtxError(f"{self.kernel.name}: the result of {instruction} is used")
        address, read = self._address(pointer), self._reader(value, kind)

        def add(batch: _Batch, lanes: Lanes | slice) -> None:
            numbers = batch.numbers(lanes)
            values = np.ascontiguousarray(np.broadcast_to(read(batch, lanes), numbers.shape))
            batch.memory.add(instruction, address(batch, numbers), values, batch.threads(numbers))

        return add


class _Batch:
    """Blocks [first, first + count) of a grid, all at once."""

    def __init__(
        self, machine: Machine, parameters: np.ndarray, memory: Memory, first: int, count: int, blocks: int
    ) -> None:
        self.machine, self.kernel, self.memory = machine, machine.kernel, memory
        self._parameters = parameters
        threads = self.kernel.threads
        self.size = count * threads
        self._all = np.arange(self.size)
        self._first = first * threads
        self._registers: dict[str, np.ndarray] = {}
        block, thread = np.divmod(self._all.astype(np.uint32), np.uint32(threads))
        same = np.ones_like(block)
        self.special = {
            "%tid.x": thread,
            "%ctaid.x": block + np.uint32(first),
            "%ntid.x": same * np.uint32(threads),
            "%nctaid.x": same * np.uint32(blocks),
            "%laneid": thread % np.uint32(32),
        }

    def register(self, name: str, *, new: bool = False) -> np.ndarray:
        found = self._registers.get(name)
        if found is None:
            if not new:
                raise PtxError(f"{self.kernel.name}: read of {name}, which nobody wrote")
            kind = self.kernel.registers[name]
            dtype = np.dtype(bool) if kind == "pred" else _UNSIGNED[SIZES[kind]]
            found = self._registers[name] = np.zeros(self.size, dtype)
        return found

    def numbers(self, lanes: Lanes | slice) -> Lanes:
        return self._all if isinstance(lanes, slice) else lanes

    def threads(self, numbers: Lanes) -> Lanes:
        """Their numbers in the whole grid."""
        return numbers + self._first

    def load_parameters(self, what: object, addresses: np.ndarray, size: int) -> np.ndarray:
        at = addresses.astype(np.int64)
        if (at % size).any() or at.min() < 0 or at.max() + size > len(self._parameters):
            raise PtxError(f"{self.kernel.name}: parameter access out of bounds or misaligned: {what}")
        return self._parameters[at[:, None] + np.arange(size)]

    def _guard(self, instruction: Instruction, lanes: Lanes) -> np.ndarray:
        return self.register(instruction.predicate)[lanes] ^ instruction.negated

    def run(self) -> None:
        waiting = {0: self._all}
        held: dict[int, Lanes] = {}
        while waiting or held:
            if not waiting:
                waiting = self._release(held)
                held = {}
            at = min(waiting)
            lanes = waiting.pop(at)
            for place, those in self._advance(at, lanes, min(waiting, default=len(self.kernel.instructions)), held):
                if len(those):
                    waiting[place] = np.union1d(waiting[place], those) if place in waiting else those

    def _release(self, held: dict[int, Lanes]) -> dict[int, Lanes]:
        """Of barriers.  All threads of a block that have not returned must be held at one of them."""
        threads = self.kernel.threads
        seen: set[int] = set()
        for lanes in held.values():
            blocks = set((lanes // threads).tolist())
            if blocks & seen:
                raise PtxError(f"{self.kernel.name}: threads of a block wait at different barriers")
            seen |= blocks
        return {place + 1: lanes for place, lanes in held.items()}

    def _advance(self, at: int, lanes: Lanes, limit: int, held: dict[int, Lanes]) -> list[tuple[int, Lanes]]:
        """Runs ``lanes`` from ``at`` until they part, meet others at ``limit``, or are done."""
        instructions, steps, labels = self.kernel.instructions, self.machine.steps, self.kernel.labels
        selected: Lanes | slice = slice(None) if len(lanes) == self.size else lanes
        while at < limit:
            instruction, step = instructions[at], steps[at]
            guard = None if instruction.predicate is None else self._guard(instruction, lanes)
            if step is not None:
                if guard is None or guard.all():
                    step(self, selected)
                elif guard.any():
                    step(self, lanes[guard])
                at += 1
                continue
            taken, others = (lanes, lanes[:0]) if guard is None else (lanes[guard], lanes[~guard])
            if instruction.opcode == "bar.sync":
                if guard is not None or instruction.operands != ("0",):
                    raise PtxError(f"{self.kernel.name}: unknown opcode: {instruction}")
                held[at] = np.union1d(held[at], lanes) if at in held else lanes
                return []
            if not instruction.opcode.startswith("bra"):
                return [(at + 1, others)]
            target = labels[instruction.operands[0]]
            if len(taken) and len(others):
                return [(target, taken), (at + 1, others)]
            at = target if len(taken) else at + 1
        if at >= len(instructions):
            raise PtxError(f"{self.kernel.name}: the code ends without ret")
        return [(at, lanes)]
