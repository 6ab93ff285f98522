"""PTX text as kernels of instructions: entries, parameters, registers, labels.

Debug directives are dropped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

SIZES = {"pred": 0, **{f"{kind}{bits}": bits // 8 for kind in "bsuf" for bits in (8, 16, 32, 64)}}

_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)\s*((?:\.\w+\s+[\d, ]+\s*)*)\{", re.DOTALL)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+((?:\.\w+\s+|\d+\s+)*)(\w+)(?:\[(\d+)\])?\s*$"
)
_SHARED = re.compile(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\]\s*;")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)$")
_STATEMENT = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_OPERAND = re.compile(r"\s*(\[[^\]]*\]|\{[^}]*\}|[^,\s][^,]*)\s*(?:,|$)")


class PtxError(Exception):
    """What the interpreter cannot read, or a kernel may not do."""


@dataclass(frozen=True)
class Instruction:
    predicate: str | None
    negated: bool  # of the predicate
    opcode: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.predicate} " if self.predicate else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}"


@dataclass
class Kernel:
    name: str
    parameters: dict[str, tuple[int, int]]  #: name -> (offset, bytes) in the parameter space
    threads: int  #: of a block, the most that it was compiled for
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  #: name -> number of the instruction that follows
    registers: dict[str, str] = field(default_factory=dict)  #: name -> type
    shared: str | None = None  #: the name of shared memory whose size the launch says


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _parameters(text: str) -> dict[str, tuple[int, int]]:
    found, end = {}, 0
    for item in filter(None, (part.strip() for part in text.split(","))):
        match = _PARAMETER.match(item)
        if match is None:
            raise PtxError(f"parameter: {item!r}")
        align, kind, _, name, count = match.groups()
        size = SIZES[kind]
        begin = _round_up(end, int(align or size))
        end = begin + size * int(count or 1)
        found[name] = (begin, end - begin)
    return found


def _block(text: str, begin: int) -> tuple[str, int]:
    """The text up to the brace that closes the one before ``begin``, and where it ends."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, begin):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[begin : match.start()], match.end()
    raise PtxError("a block without end")


def _names(declared: str) -> list[str]:
    names = []
    for name in declared.split(","):
        match = re.fullmatch(r"\s*([%$\w]+?)(?:<(\d+)>)?\s*", name)
        if match is None:
            raise PtxError(f"registers: {declared!r}")
        names += [f"{match[1]}{i}" for i in range(int(match[2]))] if match[2] else [match[1]]
    return names


_TOKEN = re.compile(
    r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<line>\.(?:loc|file)\b[^\n]*)|(?P<label>[$\w]+):(?!:)"
    r"|(?P<statement>[^;]+);)"
)


def _fill(kernel: Kernel, text: str) -> None:
    """Statements end at semicolons; braces around them open a scope, whose registers get names of their
    own.
    """
    scopes: list[dict[str, str]] = []
    opened = at = 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise PtxError(f"{kernel.name}: {text[at : at + 80]!r}")
        at = match.end()
        if match["open"]:
            opened += 1
            scopes.append({})
        elif match["close"]:
            scopes.pop()
        elif match["label"]:
            kernel.labels[match["label"]] = len(kernel.instructions)
        elif match["statement"] and not match["statement"].startswith(".pragma"):
            _add(kernel, " ".join(match["statement"].split()), scopes, opened)


def _add(kernel: Kernel, statement: str, scopes: list[dict[str, str]], opened: int) -> None:
    if match := _REGISTERS.match(statement):
        for name in _names(match[2]):
            own = f"{name}@{opened}" if scopes else name
            if scopes:
                scopes[-1][name] = own
            kernel.registers[own] = match[1]
        return
    match = _STATEMENT.match(statement)
    if match is None:
        raise PtxError(f"{kernel.name}: {statement!r}")

    def resolved(operand: str) -> str:
        for scope in scopes:
            operand = re.sub(r"[%$\w]+", lambda m, scope=scope: scope.get(m[0], m[0]), operand)
        return operand

    operands = tuple(resolved(operand.strip()) for operand in _OPERAND.findall(match[4]))
    guard = match[2] and resolved(match[2])
    kernel.instructions.append(Instruction(guard, match[1] == "!", match[3], operands))


def entries(text: str) -> dict[str, str]:
    """The text of each of a module's kernels, by their (mangled) names."""
    found = list(_ENTRY.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    # A module may have none; there is an end then all the same.
    return {match[1]: text[match.start() : end] for match, end in zip(found, ends, strict=False)}


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a module by (mangled) name."""
    shared = _SHARED.search(text)
    text = re.sub(r"//[^\n]*", "", text)
    kernels, at = {}, 0
    while match := _ENTRY.search(text, at):
        threads = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)", match[3])
        if threads is None:
            raise PtxError(f"{match[1]}: expected .maxntid or .reqntid")
        kernel = Kernel(match[1], _parameters(match[2]), int(threads[1]), shared=shared and shared[1])
        body, at = _block(text, match.end())
        _fill(kernel, body)
        kernels[kernel.name] = kernel
    return kernels
