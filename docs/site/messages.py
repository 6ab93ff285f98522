"""Every error message of the package, read from its sources: nothing is imported, so nothing can be
forgotten.
"""

from __future__ import annotations

import ast
import math
import pathlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Message:
    """``text`` has <names> where the program puts values; ``file`` is relative to the repository."""

    file: str
    line: int
    text: str
    error: str


#: What a name may stand for and still be shown as its text.
_TEXTS = (ast.Constant, ast.JoinedStr, ast.IfExp, ast.BinOp)


def _show(node: ast.expr, scope: dict[str, ast.expr], depth: int = 0) -> str:
    """The text of an expression that makes a string."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_show(part, scope, depth) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"<{_words(node.value)}>"
    if isinstance(node, ast.IfExp):
        both = [_show(side, scope, depth) for side in (node.body, node.orelse)]
        return " / ".join(dict.fromkeys(text for text in both if text))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _show(node.left, scope, depth) + _show(node.right, scope, depth)
    if isinstance(node, ast.Name) and depth < 3 and isinstance(scope.get(node.id), _TEXTS):
        return _show(scope[node.id], scope, depth + 1)
    return f"<{_words(node)}>"


def _words(node: ast.expr) -> str:
    """A placeholder's name: short, and without what Markdown or HTML would take for its own."""
    text = ast.unparse(node)
    if call := re.fullmatch(r"(?:repr|str|tuple|sorted|len|type)\((.*)\)(?:\.__name__)?", text):
        text = call.group(1)
    text = re.sub(r"^self\._?", "", text)
    return re.sub(r"[`|<>]", "", text)[:40]


def _in_function(function: ast.AST, before: float = math.inf) -> dict[str, ast.expr]:
    """What names stand for in a function: the value that was assigned last above line ``before``."""
    assigned = [n for n in ast.walk(function) if isinstance(n, ast.Assign) and len(n.targets) == 1]
    found: dict[str, ast.expr] = {}
    for node in sorted(assigned, key=lambda node: node.lineno):
        target = node.targets[0]
        if isinstance(target, ast.Name) and (target.id not in found or node.lineno < before):
            found[target.id] = node.value
    return found


def _raised(node: ast.Raise, scope: dict[str, ast.expr]) -> tuple[str, str] | None:
    """(text, class) of ``raise Class("...")``; nothing for a bare one and for abstract methods."""
    if not isinstance(node.exc, ast.Call) or not node.exc.args or not isinstance(node.exc.func, ast.Name):
        return None
    kind = node.exc.func.id
    return None if kind in ("error", "SystemExit") else (_show(node.exc.args[0], scope), kind)


def _python(path: pathlib.Path) -> Iterator[Message]:
    tree, file = ast.parse(path.read_text()), str(path.relative_to(ROOT))
    whole = {k: v for k, v in _in_function(tree).items() if k.isupper()}
    functions = [f for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))]

    def scope_of(node: ast.AST) -> dict[str, ast.expr]:
        inside = [f for f in functions if f.lineno <= node.lineno <= (f.end_lineno or f.lineno)]
        return {**whole, **(_in_function(inside[-1], node.lineno) if inside else {})}

    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "fail":
            named = {k.arg: k.value for k in node.keywords}
            op, argument, expected, got = (
                node.args[i] if i < len(node.args) else named[name]
                for i, name in enumerate(("op", "argument", "expected", "got"))
            )
            kind = node.args[4] if len(node.args) > 4 else named.get("error")
            shown = [_show(part, scope_of(node)) for part in (op, argument, expected)]
            text = f"{shown[0]}: {shown[1]}: expected {shown[2]}, got {_show(got, scope_of(node))}"
            yield Message(file, node.lineno, text, ast.unparse(kind) if kind is not None else "ValueError")
        elif isinstance(node, ast.Raise) and (found := _raised(node, scope_of(node))):
            yield Message(file, node.lineno, *found)
    for function in functions:
        scope = _in_function(function)
        # says what is wrong with a backend: the rest of a message about it
        if function.name.endswith("_problem"):
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and isinstance(node.value, _TEXTS):
                    text = _show(node.value, scope)
                    if text != "None":
                        yield Message(
                            file, node.lineno, f"backend {path.parent.name!r} {text}", "BackendUnavailable"
                        )


_CHECK = re.compile(r"STD_TORCH_CHECK\(\s*.*?,\s*((?:\"(?:[^\"\\]|\\.)*\"[\s,]*)+)", re.S)
_THROW = re.compile(r"throw std::\w+\(\s*((?:\"(?:[^\"\\]|\\.)*\"\s*)+)", re.S)
_QUOTED = re.compile(r"\"((?:[^\"\\]|\\.)*)\"")


def _native(path: pathlib.Path) -> Iterator[Message]:
    text = path.read_text()
    for pattern in (_CHECK, _THROW):
        for match in pattern.finditer(text):
            words = "".join(_QUOTED.findall(match.group(1)))
            words = f"<op>{words}" if words.startswith(":") else words
            yield Message(
                str(path.relative_to(ROOT)), text.count("\n", 0, match.start()) + 1, words, "RuntimeError"
            )


def python_files() -> list[pathlib.Path]:
    return sorted((ROOT / "zokernels").rglob("*.py"))


def native_files() -> list[pathlib.Path]:
    return [p for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in (".h", ".cpp", ".cu", ".cuh")]


def messages() -> list[Message]:
    found = [m for path in python_files() for m in _python(path)]
    return found + [m for path in native_files() for m in _native(path)]
