"""The public names with their signatures stand in public_names.txt, so that a review sees every change of
them.

``python tests/test_public_names.py`` writes the file anew.
"""

from __future__ import annotations

import importlib
import inspect
import pathlib
import re
from collections.abc import Iterator

import pytest
import torch

from zokernels.optim.arguments import Described

FILE = pathlib.Path(__file__).with_suffix("").with_name("public_names.txt")
MODULES = (
    *("zokernels", "zokernels.optim", "zokernels.trajectory", "zokernels.offload", "zokernels.distributed"),
    *("zokernels.quantize", "zokernels.integrations.transformers", "zokernels.integrations.engine"),
    "zokernels.es",
)
OPERATIONS = "torch.ops.zokernels"
HEAD = "Public names and signatures: `python tests/test_public_names.py` writes this file anew.\n\n"


def signature(value: object, before: str = "") -> str:
    """As it is written in the sources, whose annotations are texts; one parameter a line where it is long."""
    try:
        # Of an optimizer as it is written, with the table of the arguments that all share by its name.
        found = inspect.signature(value.__init__ if isinstance(value, Described) else value)
    except ValueError:  # an exception's
        return before
    if isinstance(value, Described):
        found = found.replace(parameters=list(found.parameters.values())[1:])
    none, out, star = inspect.Parameter.empty, [], False
    for p in found.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not star and not any(o.startswith("*") for o in out):
            out.append("*")
        star = star or p.kind is p.KEYWORD_ONLY
        mark = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        kind = (
            ""
            if p.annotation is none
            else f": {p.annotation if isinstance(p.annotation, str) else kind_name(p)}"
        )
        default = "" if p.default is none else f" = {re.sub(r' at 0x[0-9a-f]+', '', repr(p.default))}"
        out.append(f"{mark}{p.name}{kind}{default}")
    back = found.return_annotation
    back = (
        ""
        if back is none or inspect.isclass(value)
        else f" -> {back if isinstance(back, str) else back.__name__}"
    )
    line = f"{before}({', '.join(out)}){back}"
    indent = " " * (len(before) - len(before.lstrip()))
    within = "".join(f"{indent}    {o},\n" for o in out)
    return line if len(line) <= 120 else f"{before}(\n{within}{indent}){back}"


def kind_name(parameter: inspect.Parameter) -> str:
    return inspect.formatannotation(parameter.annotation)


def hidden_bases(kind: type, public: set[type]) -> list[type]:
    """The bases of a class that are the package's and no public class has: their members are its own to a
    user.
    """
    bases = kind.__mro__[1:]
    shown = {base for other in bases if other in public for base in other.__mro__}
    return [base for base in bases if base.__module__.startswith("zokernels.") and base not in shown]


def members(kind: type, public: set[type]) -> Iterator[str]:
    """What a class and its hidden bases add to its public ones."""
    own = {}
    for base in (*reversed(hidden_bases(kind, public)), kind):
        for name, value in vars(base).items():
            # torch wraps the step of an optimizer's class when the first one is made, and the class then has
            # it.
            if getattr(value, "__qualname__", base.__qualname__).startswith(base.__qualname__):
                own[name] = value
    for name, value in sorted(own.items()):
        if name.startswith("_") and name != "__call__":
            continue
        if isinstance(value, (staticmethod, classmethod)):
            yield signature(value.__func__, f"    {type(value).__name__} {name}")
        elif inspect.isfunction(value):
            yield signature(value, f"    {name}")
        elif isinstance(value, property) or type(value).__name__ == "cached_property":
            yield f"    {name}: property"


def of_module(module: str) -> list[str]:
    found, lines = importlib.import_module(module), []
    own = [n for n, v in vars(found).items() if n[0] != "_" and getattr(v, "__module__", "") == module]
    names = getattr(found, "__all__", own)
    public = {value for name in names if inspect.isclass(value := getattr(found, name))}
    for name in sorted(names):
        value = getattr(found, name)
        if inspect.isclass(value):
            lines.append(
                f"{signature(value, f'class {name}')}  # "
                f"{', '.join(base.__name__ for base in value.__bases__)}"
            )
            lines += members(value, public)
        elif callable(value):
            lines.append(signature(value, name))
        else:
            lines.append(name)
    return lines


def of_operations() -> list[str]:
    import zokernels  # noqa: F401

    schemas = torch._C._jit_get_all_schemas()
    return sorted(str(s).removeprefix("zokernels::") for s in schemas if s.name.startswith("zokernels::"))


def section(name: str) -> str:
    lines = of_operations() if name == OPERATIONS else of_module(name)
    return "\n".join([f"# {name}", "", *lines, ""])


@pytest.mark.parametrize("name", [*MODULES, OPERATIONS])
def test_public_names(name):
    if name.endswith("transformers"):
        pytest.importorskip("transformers")
    written = re.search(rf"^# {re.escape(name)}\n.*?(?=^# |\Z)", FILE.read_text(), re.M | re.S)
    assert written is not None, f"no section: python {pathlib.Path(__file__).name}"
    assert section(name).split("\n") == f"{written[0].rstrip()}\n".split("\n"), (
        "wanted? python tests/test_public_names.py"
    )


if __name__ == "__main__":
    FILE.write_text(HEAD + "\n".join(section(name) for name in (*MODULES, OPERATIONS)))
