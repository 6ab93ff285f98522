"""Runs a kernel: the threads of many blocks at once, those at the lowest instruction first.

Each thread has a place in the code.  Threads at the same place run together, and where branches part them
those that are behind go first, so that they meet again where the branches do.  A barrier holds threads until
all that have not returned are held.  Threads therefore run in one order of many; that another order gives the
same is what the checks of memory are for (``memory._Users``)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from .arithmetic import DTYPES, RULES, rsqrt
from .memory import Memory, Shared, Threads
from .parser import SIZES, Instruction, Kernel, PtxError

#: Threads at once: enough that Python's share of the time is small.
LANES = 8192

_UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
_SPECIAL = {"%tid.x", "%ctaid.x", "%ctaid.y", "%ntid.x", "%nctaid.x", "%laneid"}
_ADDRESS = re.compile(r"\[\s*([%$\w@]+)\s*(?:\+\s*(-?\d+))?\s*\]")
_MEMORY = re.compile(r"(ld|st)\.(param|global|shared)(?:\.(v2|v4))?\.(\w+)")
_ATOMIC = re.compile(r"(?:atom|red)\.global(?:\.gpu\.relaxed)?\.add\.(u32|u64)")
_SHUFFLES, _WHOLE_WARP = {"shfl.sync.bfly.b32", "shfl.sync.idx.b32"}, {"-1", "0xffffffff"}
_REDUCTION = re.compile(r"redux\.sync\.(add|min|max)\.(s32|u32)")
_MATRIX = re.compile(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16")
#: Instructions after which a batch of blocks is held to run forever: ten times what the longest takes.
_FOREVER = 1 << 18
#: Byte of poison: what a register holds where no thread wrote it.
_POISON = 0xCD
#: What threads do next.
_CONTROL = {"bra", "bra.uni", "ret", "exit", "bar.sync"}

Lanes = np.ndarray
Step = Callable[["_Batch", Lanes | slice], None]


def _parts(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{}").split(",")]


class Machine:
    """A kernel with its instructions decoded.

    ``rsqrt_ulps``: by how much ``rsqrt.approx`` errs; ``shared``: bytes of shared memory that a block is
    launched with."""

    def __init__(self, kernel: Kernel, *, rsqrt_ulps: int = 0, shared: int = 0) -> None:
        self.kernel = kernel
        self.rsqrt_ulps, self.shared = rsqrt_ulps, shared
        self.steps: list[Step | None] = [None] * len(kernel.instructions)
        # of every opcode one instruction is decoded now, so that none is unknown
        seen: set[tuple[str, int]] = set()
        for at, instruction in enumerate(kernel.instructions):
            kind = instruction.opcode, len(instruction.operands)
            if instruction.opcode.startswith("bra") and instruction.operands[0] not in kernel.labels:
                raise PtxError(f"{kernel.name}: label {instruction.operands[0]}")
            if kind not in seen and instruction.opcode not in _CONTROL:
                self.step(at)
            seen.add(kind)

    def step(self, at: int) -> Step:
        """Instruction ``at``, which is not one of control, decoded."""
        found = self.steps[at]
        if found is None:
            found = self.steps[at] = self._decode(self.kernel.instructions[at])
        return found

    def run(self, grid: int | tuple[int, int], arguments: Sequence[bytes], memory: Memory) -> None:
        """``grid``: blocks in x, or in x and y; ``arguments``: the bytes of the kernel's parameters, in
        order.
        """
        parameters = self._space(arguments)
        memory.launch()
        across, down = grid if isinstance(grid, tuple) else (grid, 1)
        at_once, blocks = max(1, LANES // self.kernel.threads), across * down
        with np.errstate(all="ignore"):
            for first in range(0, blocks, at_once):
                count = min(at_once, blocks - first)
                _Batch(self, parameters, memory, first, count, across).run()

    def _space(self, arguments: Sequence[bytes]) -> np.ndarray:
        places = self.kernel.parameters.values()
        if len(places) != len(arguments) or any(
            len(a) != size for a, (_, size) in zip(arguments, places, strict=True)
        ):
            sizes = [len(a) for a in arguments]
            raise PtxError(
                f"{self.kernel.name}: expected arguments of {[s for _, s in places]} bytes, got {sizes}"
            )
        space = np.zeros(max((begin + size for begin, size in places), default=0), np.uint8)
        for argument, (begin, size) in zip(arguments, places, strict=True):
            space[begin : begin + size] = np.frombuffer(argument, np.uint8)
        return space

    # --- operands -----------------------------------------------------------------------------------------

    def _reader(
        self, operand: str, kind: str, *, undefined: bool = False
    ) -> Callable[[_Batch, Lanes | slice], np.ndarray]:
        """Of the operand as ``kind``: of a wider register the low bits.

        ``undefined``: nobody need have written it.
        """
        dtype = DTYPES[kind]
        if operand in self.kernel.registers:
            own = self.kernel.registers[operand]
            if (own == "pred") != (kind == "pred") or SIZES[own] < SIZES[kind]:
                raise PtxError(f"{self.kernel.name}: {operand} of .{own} as .{kind}")
            if undefined:
                return lambda batch, lanes: batch.register(operand)[lanes].view(dtype)
            if SIZES[own] == SIZES[kind]:
                return lambda batch, lanes: batch.written[operand][lanes].view(dtype)
            low = _UNSIGNED[dtype.itemsize]
            return lambda batch, lanes: batch.written[operand][lanes].astype(low).view(dtype)
        if operand in _SPECIAL:
            return lambda batch, lanes: batch.special[operand][lanes].astype(dtype)
        if operand in self.kernel.parameters:
            value = dtype.type(self.kernel.parameters[operand][0])
        elif operand == self.kernel.shared:
            value = dtype.type(Shared.BASE)
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
        if operand == "_":
            return lambda batch, lanes, value: None
        own = self.kernel.registers.get(operand)
        if own is None or (own == "pred") != (kind == "pred") or SIZES[own] < SIZES[kind]:
            raise PtxError(f"{self.kernel.name}: {operand} of .{own} for .{kind}")
        if own == "pred":

            def write(batch: _Batch, lanes: Lanes | slice, value: np.ndarray) -> None:
                batch.register(operand)[lanes] = value
        else:
            dtype, wide = DTYPES[kind], np.dtype(f"{'i' if kind[0] == 's' else 'u'}{SIZES[own]}")
            unsigned, size = _UNSIGNED[SIZES[own]], dtype.itemsize
            widens = SIZES[own] > SIZES[kind]

            def write(batch: _Batch, lanes: Lanes | slice, value: np.ndarray | np.generic) -> None:
                if value.dtype.itemsize != size:
                    raise PtxError(f"{self.kernel.name}: {operand}: {value.dtype} for .{kind}")
                value = value.view(dtype).astype(wide) if widens else value
                register = batch.written.get(operand)
                if register is None:
                    register = batch.register(operand)
                register[lanes] = value.view(unsigned)

        return write

    # --- instructions -------------------------------------------------------------------------------------

    def _decode(self, instruction: Instruction) -> Step:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode.startswith("mov."):
            return self._move(opcode.removeprefix("mov."), *operands)
        if match := _MEMORY.fullmatch(opcode):
            return self._access(instruction, *match.groups())
        if match := _ATOMIC.fullmatch(opcode):
            return self._atomic(instruction, match[1])
        if match := _MATRIX.fullmatch(opcode):
            return self._matrix(instruction, match[1], int(match[2]), match[3] is not None)
        if (match := _REDUCTION.fullmatch(opcode)) or opcode in _SHUFFLES:
            return self._exchange(instruction, match)
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
            function(
                one(batch, lanes), two(batch, lanes), three(batch, lanes), *(f(batch, lanes) for f in four)
            ),
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
            # LLVM leaves a half undefined where it computes two numbers to use one.
            low, high = (self._reader(part, half, undefined=True) for part in _parts(source))
            dtype, shift = DTYPES[kind], DTYPES[kind].type(8 * SIZES[half])
            return lambda batch, lanes: write(
                batch, lanes, low(batch, lanes).astype(dtype) | high(batch, lanes).astype(dtype) << shift
            )
        read = self._reader(source, kind, undefined=True)  # nvcc copies what it does not use after
        return lambda batch, lanes: write(batch, lanes, read(batch, lanes))

    def _address(self, operand: str, space: str) -> Callable[[_Batch, Lanes], np.ndarray]:
        match = _ADDRESS.fullmatch(operand)
        if match is None:
            raise PtxError(f"{self.kernel.name}: address {operand!r}")
        kind = "u32" if space == "shared" else "u64"
        read, offset = self._reader(match[1], kind), np.int64(int(match[2] or 0)).astype(DTYPES[kind])
        return lambda batch, lanes: np.broadcast_to(read(batch, lanes) + offset, lanes.shape)

    def _access(self, instruction: Instruction, name: str, space: str, vector: str | None, kind: str) -> Step:
        pointer, values = instruction.operands if name == "st" else instruction.operands[::-1]
        address, parts = self._address(pointer, space), _parts(values)
        if kind not in DTYPES or len(parts) != int((vector or "v1")[1]) or (name, space) == ("st", "param"):
            raise PtxError(f"{self.kernel.name}: unknown opcode: {instruction}")
        dtype = DTYPES[kind]
        size = dtype.itemsize * len(parts)
        if name == "st":
            reads = [self._reader(part, kind) for part in parts]

            def store(batch: _Batch, lanes: Lanes | slice) -> None:
                numbers = batch.numbers(lanes)
                stored = np.empty((len(numbers), len(parts)), dtype)
                for i, read in enumerate(reads):
                    stored[:, i] = read(batch, lanes)
                batch.store(space, instruction, address(batch, numbers), stored.view(np.uint8), numbers)

            return store
        writes = [self._writer(part, kind) for part in parts]

        def load(batch: _Batch, lanes: Lanes | slice) -> None:
            numbers = batch.numbers(lanes)
            loaded = batch.load(space, instruction, address(batch, numbers), size, numbers)
            loaded = np.ascontiguousarray(loaded).view(dtype)
            for i, write in enumerate(writes):
                write(batch, lanes, np.ascontiguousarray(loaded[:, i]))

        return load

    def _matrix(self, instruction: Instruction, name: str, count: int, transposed: bool) -> Step:
        """``count`` matrices of 8 x 8 16-bit numbers between shared memory and the registers of whole warps.

        Thread 8 j + i has the address of row i of matrix j, and in its register j thread t has row t / 4 of
        it, the columns 2 (t % 4) and the next; of a transposed matrix its columns for its rows."""
        pointer, values = instruction.operands if name == "st" else instruction.operands[::-1]
        address, parts = self._address(pointer, "shared"), _parts(values)
        if len(parts) != count:
            raise PtxError(f"{self.kernel.name}: unknown opcode: {instruction}")
        reads = [self._reader(part, "b32") for part in parts] if name == "st" else []
        writes = [self._writer(part, "b32") for part in parts] if name == "ld" else []

        def rows(batch: _Batch, warps: Lanes) -> np.ndarray:
            """Addresses [warps, matrices, 8]."""
            return address(batch, warps.ravel()).reshape(warps.shape)[:, : 8 * count].reshape(-1, count, 8)

        def load(batch: _Batch, lanes: Lanes | slice) -> None:
            warps = batch.warps(lanes, instruction)
            at, numbers = rows(batch, warps), np.broadcast_to(warps[:, None, ::4], (len(warps), count, 8))
            # Each row is read by the four threads that get it; two of them are enough to tell it from one
            # thread's own.
            for other in (0, 1):
                found = batch.load("shared", instruction, at.ravel(), 16, numbers.ravel() + other)
            found = found.view(np.uint16).reshape(-1, count, 8, 8)
            found = np.ascontiguousarray(found.swapaxes(2, 3) if transposed else found).view(np.uint32)
            for j, write in enumerate(writes):
                write(batch, lanes, found[:, j].reshape(-1))

        def store(batch: _Batch, lanes: Lanes | slice) -> None:
            warps = batch.warps(lanes, instruction)
            numbers = batch.numbers(lanes)
            held = np.empty((len(warps), count, 32), np.uint32)
            for j, read in enumerate(reads):
                held[:, j] = np.broadcast_to(read(batch, lanes), numbers.shape).reshape(-1, 32)
            matrices = held.view(np.uint16).reshape(-1, count, 8, 8)
            if transposed:
                matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
            numbers = np.broadcast_to(warps[:, None, ::4], (len(warps), count, 8)).ravel()
            stored = matrices.view(np.uint8).reshape(-1, 16)
            batch.store("shared", instruction, rows(batch, warps).ravel(), stored, numbers)

        return store if name == "st" else load

    def _exchange(self, instruction: Instruction, reduction: re.Match | None) -> Step:
        """Among the threads of whole warps: a shuffle by exclusive or or by number, or a reduction."""
        to, source, *rest = instruction.operands
        if rest[-1] not in _WHOLE_WARP and not self._is_constant(rest[-1], -1):
            raise PtxError(f"{self.kernel.name}: expected all threads of a warp: {instruction}")
        kind = "b32" if reduction is None else reduction[2]
        read, write = self._reader(source, kind), self._writer(to, kind)
        if reduction is not None:
            combine = {"add": np.add, "min": np.minimum, "max": np.maximum}[reduction[1]]
        elif rest[1] != "31":
            raise PtxError(f"{self.kernel.name}: unknown opcode: {instruction}")
        else:
            asked = self._reader(rest[0], "b32")
            by_number = instruction.opcode == "shfl.sync.idx.b32"

        def exchange(batch: _Batch, lanes: Lanes | slice) -> None:
            warps = batch.warps(lanes, instruction)
            values = np.broadcast_to(read(batch, lanes), warps.size).reshape(-1, 32)
            if reduction is None:
                other = np.broadcast_to(asked(batch, lanes), warps.size).reshape(-1, 32) & 31
                other = other if by_number else np.arange(32) ^ other
                got = np.take_along_axis(values, other.astype(np.intp), axis=1)
            else:
                got = np.broadcast_to(
                    combine.reduce(values, axis=1, dtype=values.dtype)[:, None], warps.shape
                )
            write(batch, lanes, np.ascontiguousarray(got).reshape(-1))

        return exchange

    def _is_constant(self, register: str, value: int) -> bool:
        """Whether all that is ever put into ``register`` is ``value``."""
        puts = [i for i in self.kernel.instructions if i.operands and register in _parts(i.operands[0])]
        return bool(puts) and all(
            i.opcode in ("mov.b32", "mov.u32") and i.operands[1] in (str(value), hex(value & 0xFFFFFFFF))
            for i in puts
        )

    def _atomic(self, instruction: Instruction, kind: str) -> Step:
        """Integer addition, whose order does not matter; what was there is not given, for no kernel asks."""
        *unused, pointer, value = instruction.operands
        for other in self.kernel.instructions:
            begin = 0 if other.opcode.startswith(("st", "red")) else 1
            if other is not instruction and set(unused) & set(
                re.findall(r"[%\w]+", " ".join(other.operands[begin:]))
            ):
                raise PtxError(f"{self.kernel.name}: the result of {instruction} is used")
        address, read = self._address(pointer, "global"), self._reader(value, kind)

        def add(batch: _Batch, lanes: Lanes | slice) -> None:
            numbers = batch.numbers(lanes)
            values = np.ascontiguousarray(np.broadcast_to(read(batch, lanes), numbers.shape))
            batch.memory.add(instruction, address(batch, numbers), values, batch.threads(numbers))

        return add


class _Written(dict[str, np.ndarray]):
    """A kernel's registers that some thread has written, by name."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel = kernel

    def __missing__(self, name: str) -> np.ndarray:
        raise PtxError(f"{self.kernel}: read of {name}, which nobody wrote")


class _Batch:
    """Blocks [first, first + count) of a grid, all at once."""

    def __init__(
        self, machine: Machine, parameters: np.ndarray, memory: Memory, first: int, count: int, across: int
    ) -> None:
        self.machine, self.kernel, self.memory = machine, machine.kernel, memory
        self._parameters = parameters
        threads = self.kernel.threads
        self.size = count * threads
        self._all = np.arange(self.size)
        self._first = first * threads
        self.written = _Written(self.kernel.name)
        self._shared = Shared(count, machine.shared)
        self._executed = 0
        self._barriers = np.zeros(count, np.int64)  #: that each block has passed
        block, thread = np.divmod(self._all.astype(np.uint32), np.uint32(threads))
        same = np.ones_like(block)
        self.special = {
            "%tid.x": thread,
            "%ctaid.x": (block + np.uint32(first)) % np.uint32(across),
            "%ctaid.y": (block + np.uint32(first)) // np.uint32(across),
            "%ntid.x": same * np.uint32(threads),
            "%nctaid.x": same * np.uint32(across),
            "%laneid": thread % np.uint32(32),
        }

    def register(self, name: str) -> np.ndarray:
        """To be written, or read by who does not mind that nobody wrote it."""
        found = self.written.get(name)
        if found is None:
            kind = self.kernel.registers[name]
            dtype = np.dtype(bool) if kind == "pred" else _UNSIGNED[SIZES[kind]]
            found = self.written[name] = np.empty(self.size, dtype)
            found.view(np.uint8)[:] = _POISON if kind != "pred" else 1
        return found

    def numbers(self, lanes: Lanes | slice) -> Lanes:
        return self._all if isinstance(lanes, slice) else lanes

    def threads(self, numbers: Lanes) -> Threads:
        return Threads(
            numbers + self._first, self.kernel.threads, self._barriers[numbers // self.kernel.threads]
        )

    def warps(self, lanes: Lanes | slice, what: object) -> Lanes:
        """[warps, 32] of threads that must be whole warps, which have not parted."""
        numbers = self.numbers(lanes)
        first = numbers[::32]
        if len(numbers) % 32 or not np.array_equal(numbers.reshape(-1, 32), first[:, None] + np.arange(32)):
            raise PtxError(f"{self.kernel.name}: threads of a warp have parted: {what}")
        return numbers.reshape(-1, 32)

    def load(self, space: str, what: object, addresses: np.ndarray, size: int, numbers: Lanes) -> np.ndarray:
        if space == "global":
            return self.memory.load(what, addresses, size, self.threads(numbers))
        if space == "shared":
            return self._shared.load(
                what, addresses, size, numbers // self.kernel.threads, self.threads(numbers)
            )
        at = addresses.astype(np.int64)
        if (at % size).any() or at.min() < 0 or at.max() + size > len(self._parameters):
            raise PtxError(f"{self.kernel.name}: parameter access out of bounds or misaligned: {what}")
        return self._parameters[at[:, None] + np.arange(size)]

    def store(
        self, space: str, what: object, addresses: np.ndarray, values: np.ndarray, numbers: Lanes
    ) -> None:
        if space == "global":
            self.memory.store(what, addresses, values, self.threads(numbers))
        else:
            self._shared.store(what, addresses, values, numbers // self.kernel.threads, self.threads(numbers))

    def _guard(self, instruction: Instruction, lanes: Lanes) -> np.ndarray:
        return self.written[instruction.predicate][lanes] ^ instruction.negated

    def run(self) -> None:
        waiting = {0: self._all}
        held: dict[int, Lanes] = {}
        while waiting or held:
            if not waiting:
                waiting = self._release(held)
                held = {}
            at = min(waiting)
            lanes = waiting.pop(at)
            for place, those in self._advance(
                at, lanes, min(waiting, default=len(self.kernel.instructions)), held
            ):
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
        self._barriers[sorted(seen)] += 1
        return {place + 1: lanes for place, lanes in held.items()}

    def _advance(self, at: int, lanes: Lanes, limit: int, held: dict[int, Lanes]) -> list[tuple[int, Lanes]]:
        """Runs ``lanes`` from ``at`` until they part, meet others at ``limit``, or are done."""
        instructions, labels, steps = self.kernel.instructions, self.kernel.labels, self.machine.steps
        selected: Lanes | slice = slice(None) if len(lanes) == self.size else lanes
        while at < limit:
            self._executed += 1
            if self._executed > _FOREVER:
                raise PtxError(f"{self.kernel.name}: does not end")
            instruction = instructions[at]
            guard = None if instruction.predicate is None else self._guard(instruction, lanes)
            if instruction.opcode not in _CONTROL:
                step = steps[at] or self.machine.step(at)
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
