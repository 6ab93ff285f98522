"""An operation is one file in each of five places, and nothing else names it (CONTRIBUTING.md).

A file *names* an operation if it has its name as a word of code, alone or as a part of an identifier between
underscores: ``squares``, ``squares_kernel``.  Comments and docstrings do not count.
"""

from __future__ import annotations

import ast
import functools
import io
import pathlib
import re
import tokenize

import pytest

from zokernels.backends import registry
from zokernels.ops.define import OPERATIONS

ROOT = pathlib.Path(__file__).parent.parent

#: One operation's files, by their stem.
PLACES = (
    *("zokernels/ops/{}.py", "zokernels/backends/reference/{}.py", "zokernels/backends/triton/{}.py"),
    *("csrc/cpu/{}.cpp", "csrc/cuda/{}.cu"),
)
#: What an operation is called in the public list of names, which is counted apart, as tests and documentation
#: are.
PUBLIC = "zokernels/functional.py"
#: Files that serve all operations: whoever adds one edits none of them.
GENERAL = (
    *("CMakeLists.txt", "setup.py", "zokernels/ops/__init__.py", "zokernels/ops/define.py"),
    *("zokernels/ops/arguments.py", "zokernels/backends/__init__.py", "zokernels/backends/registry.py"),
    *("zokernels/backends/library.py", "zokernels/backends/terms.py"),
    *(f"zokernels/backends/{name}/__init__.py" for name in registry.NAMES),
    *("csrc/cpu/op.h", "csrc/cpu/isa.h", "csrc/cpu/kernels.h", "csrc/cuda/op.cuh", "csrc/cuda/launch.cuh"),
    *("csrc/cuda/table.h", "tests/cuda_on_host/library.cpp"),
)
#: Operations by the file that defines them.
STEMS: dict[str, list[str]] = {}
for _operation, _module in OPERATIONS.items():
    STEMS.setdefault(_module.rpartition(".")[2], []).append(_operation)
#: Of noise, which is combine over -0.0, backends have no part.
WITH_KERNELS = sorted(set(STEMS) - {"noise"})
KERNELS = sorted({name.removesuffix("_") for name in OPERATIONS} - {"noise"})


def python_words(text: str) -> set[str]:
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            docstrings.add(node.value.lineno)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {
        word
        for token in tokens
        if token.type == tokenize.NAME or (token.type == tokenize.STRING and token.start[0] not in docstrings)
        for word in re.findall(r"\w+", token.string)
    }


@functools.cache
def words(path: pathlib.Path) -> set[str]:
    """The words of a file's code."""
    text = path.read_text()
    if path.suffix == ".py":
        return python_words(text)
    if path.suffix == ".txt":
        text = text.replace("project(", "")  # a command of CMake
    comments = r"#[^\n]*" if path.suffix == ".txt" else r"//[^\n]*|/\*.*?\*/"
    return set(re.findall(r"\w+", re.sub(comments, "", text, flags=re.S)))


def names(path: pathlib.Path, operation: str) -> bool:
    form = re.compile(rf"(\w+_)?{operation}(_\w*)?")
    return any(form.fullmatch(word) for word in words(path))


def sources() -> list[pathlib.Path]:
    """All files of the package and its build; neither tests, nor benchmarks, nor examples."""
    package = (ROOT / "zokernels").rglob("*.py")
    native = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    return [*package, *native, *(ROOT / name for name in ("CMakeLists.txt", "setup.py", "pyproject.toml"))]


def test_words_of_code():
    assert python_words('"""squares"""\n# squares\nx = "a squares b"\ndef f():\n    "squares_"\n') == {
        *("x", "a", "squares", "b", "def", "f")
    }


def test_squares_is_five_files():
    """The operation that CONTRIBUTING.md walks through."""
    found = {str(path.relative_to(ROOT)) for path in sources() if names(path, "squares")}
    assert found - {PUBLIC} == {place.format("squares") for place in PLACES}


def test_the_public_list_holds_names_alone():
    body = ast.parse((ROOT / PUBLIC).read_text()).body
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[-1], ast.Assign)
    assert all(isinstance(statement, ast.ImportFrom) for statement in body[1:-1])


@pytest.mark.parametrize("stem", WITH_KERNELS)
def test_one_stem_everywhere(stem):
    assert [place for place in PLACES if not (ROOT / place.format(stem)).exists()] == []


@pytest.mark.parametrize("path", GENERAL)
def test_no_general_file_names_an_operation(path):
    assert [kernel for kernel in KERNELS if names(ROOT / path, kernel)] == []


@pytest.mark.parametrize("stem", WITH_KERNELS)
@pytest.mark.parametrize("backend", ["reference", "triton", "cpu", "cuda"])
def test_each_file_registers_its_kernels_itself(backend, stem):
    place = {"reference": 1, "triton": 2, "cpu": 3, "cuda": 4}[backend]
    text = (ROOT / PLACES[place].format(stem)).read_text()
    marked = re.findall(r"^ZK_REGISTER\(\s*(\w+),|^@implements\ndef (\w+)\(", text, re.M)
    found = {one or other for one, other in marked} - {"project_columns"}
    assert found == {name.removesuffix("_") for name in STEMS[stem]}


def test_every_kernel_of_the_reference_is_found():
    backend = registry.get("reference")
    assert all(callable(getattr(backend, kernel)) for kernel in KERNELS)
    with pytest.raises(AttributeError, match="backend 'reference' has no kernel 'combin'"):
        _ = backend.combin


def test_compiled_backends_have_the_same_schemas():
    """But for the instruction set, which only the CPU's kernels take; so one binding serves both."""
    found: dict[str, list[str]] = {}
    for backend, suffix in (("cpu", "cpp"), ("cuda", "cu")):
        for path in sorted((ROOT / f"csrc/{backend}").glob(f"*.{suffix}")):
            for name, schema in re.findall(
                r"^ZK_REGISTER(?:_CONSTANT)?\(\s*(\w+),(.*?)\)$", path.read_text(), re.S | re.M
            ):
                text = " ".join(re.sub(r'"\s*"|^\s*"|"$', "", schema.strip()).split())
                found.setdefault(name, []).append(text.replace(", str isa", ""))
    assert sorted(found) == sorted([*KERNELS, "project_columns"])
    assert [name for name, schemas in found.items() if len(schemas) != 2 or schemas[0] != schemas[1]] == []


#: Functions of csrc/cuda through which a file launches the kernel of another.
SHARED = {"run_plain": "combine", "run_update": "update", "launch_rule": "update"}


def kernels_in(stem: str) -> tuple[str, str, str]:
    """Which kernels a stem's files launch: on the CPU, in Triton and in CUDA."""
    cpu = re.findall(r"ZK_KERNEL_OF\((\w+),", (ROOT / f"csrc/cpu/{stem}.cpp").read_text())
    triton = re.findall(
        r"\b(\w+?)(?:_table|_rows)?_kernel\b", (ROOT / f"zokernels/backends/triton/{stem}.py").read_text()
    )
    text = (ROOT / f"csrc/cuda/{stem}.cu").read_text()
    cuda = re.findall(r"^(?:template[^\n]*\n)?ZK_GLOBAL (\w+)_kernel\(", text, re.M)
    cuda += [kernel for function, kernel in SHARED.items() if re.search(rf"^ .*\b{function}\b", text, re.M)]
    return tuple(", ".join(sorted(set(found))) or "none" for found in (cpu, triton, cuda))


def table() -> list[str]:
    lines = []
    for stem in sorted(STEMS):
        kernels = kernels_in(stem) if stem in WITH_KERNELS else ("combine",) * 3
        lines.append(
            f"| {', '.join(f'`{name}`' for name in STEMS[stem])} | `{stem}` | {' | '.join(kernels)} |"
        )
    return lines


def test_the_table_of_kernels_is_what_the_code_says():
    """docs/design.md: which operation is which kernel."""
    text = (ROOT / "docs/design.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `") and line.count("|") == 6]
    assert rows == table(), "\n".join(table())
