"""Pages that are made and not written: the README as the first one, changes, the API, and every error
message.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import re
from typing import Any

from mkdocs.structure.files import File, Files

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]


def _load(name: str, path: pathlib.Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    __import__("sys").modules[name] = module
    spec.loader.exec_module(module)
    return module


messages = _load("zokernels_messages", HERE / "messages.py")

#: Written pages in their order; what is in docs/ and not here comes under "More".
NAV = [
    {
        "Start": [
            "index.md",
            "choosing.md",
            "first-hour.md",
            "tutorial.md",
            "howto.md",
            "examples.md",
            "demo.md",
            "llm.md",
            "packaging.md",
        ]
    },
    {
        "Training": [
            "methods.md",
            "optimizer.md",
            "lora.md",
            "trajectory.md",
            "populations.md",
            "quantized.md",
            "blackbox.md",
        ]
    },
    {"Published systems": ["systems.md"]},
    {"At scale": ["transformers.md", "engines.md", "offload.md", "distributed.md", "scaling.md"]},
    {"Reference": ["contract.md", "api.md", "api-optim.md", "api-more.md", "troubleshooting.md"]},
    {"Figures": ["performance.md", "gpu-check.md"]},
    {"Inside": ["design.md", "contributing.md", "changelog.md"]},
]

_API = {
    "api.md": (
        "Operations",
        "zokernels",
        "Typed wrappers over `torch.ops.zokernels`, for plain numbers or tensors.",
    ),
    "api-optim.md": ("Optimizers and their parts", "zokernels.optim", "Named classes are choices of parts."),
}
#: Further public modules: those of them that this tree has.
_MORE = ("trajectory", "quantize", "distributed", "offload", "integrations.transformers")


def public_names(module: str) -> list[str]:
    """``__all__`` of a module, read and not imported; without one, its classes and functions without an
    underscore.
    """
    import ast

    base = ROOT.joinpath(*module.split("."))
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    if not path.exists():
        return []
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return [n for n in ast.literal_eval(node.value) if not n.startswith("__")]
    kinds = (ast.ClassDef, ast.FunctionDef)
    return [n.name for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]


#: Its methods are those of the step, which has no page of its own.
_WITH_INHERITED = "\n    options:\n      inherited_members: true"


def _api(title: str, modules: list[str], words: str) -> str:
    out = [f"# {title}", words]
    for module in modules:
        if len(modules) > 1:
            out.append(f"# {module}")
        out += [
            f"::: {module}.{name}" + _WITH_INHERITED * (name == "ZerothOrder")
            for name in public_names(module)
        ]
    return "\n\n".join(out) + "\n"


def _errors() -> str:
    """Tables of all messages, by the file that raises them."""
    out, of_file = [], {}
    for m in messages.messages():
        of_file.setdefault(m.file, []).append(m)
    for file, found in of_file.items():
        out += [f"### `{file}`", "", "| message | class |", "|---|---|"]
        escape = lambda text: text.replace("|", "\\|").replace("\n", " ").replace("`", "'")
        out += [f"| `{escape(m.text)}` | {m.error} |" for m in found]
        out.append("")
    return "\n".join(out)


def _notebook() -> str:
    """The notebook as a page: its texts, its code, and what the cells printed."""
    out = []
    for cell in json.loads((ROOT / "examples" / "first_hour.ipynb").read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            out.append(text.replace("](../docs/", "]("))
            continue
        out.append(f"```python\n{text}\n```")
        printed = "".join("".join(o.get("text", ())) for o in cell["outputs"])
        if printed:
            out.append(f'<div class="printed" markdown>\n\n```text\n{printed.rstrip()}\n```\n\n</div>')
    out.append("All of it as a file for Jupyter: [first_hour.ipynb](examples/first_hour.ipynb).")
    return "\n\n".join(out) + "\n"


def _from_root(name: str) -> str:
    """A file of the repository's root as a page: its links into docs/ become links to pages."""
    text = (ROOT / name).read_text()
    text = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
    text = text.replace("](examples/first_hour.ipynb)", "](first-hour.md)")
    return re.sub(r"\]\((CONTRIBUTING|CHANGELOG)\.md\)", lambda m: f"]({m.group(1).lower()}.md)", text)


def on_config(config: Any) -> Any:
    """The navigation, with what was written since under its own heading."""
    made = {"index.md", "contributing.md", "changelog.md", "first-hour.md", *_API, "api-more.md"}
    written = {p.name for p in (ROOT / "docs").glob("*.md")} | made
    nav = [
        {title: [page for page in pages if page in written]} for part in NAV for title, pages in part.items()
    ]
    known = {page for part in NAV for pages in part.values() for page in pages}
    if more := sorted(written - known):
        nav.insert(2, {"More": more})
    config.nav = nav
    return config


def on_files(files: Files, config: Any) -> Files:
    pages = {name: _api(title, [module], words) for name, (title, module, words) in _API.items()}
    more = [f"zokernels.{name}" for name in _MORE if public_names(f"zokernels.{name}")]
    pages["api-more.md"] = _api("Other modules", more, "Logs, integer weights, several processes.")
    pages |= {f"{name.lower()}.md": _from_root(f"{name}.md") for name in ("CONTRIBUTING", "CHANGELOG")}
    pages |= {"index.md": _from_root("README.md"), "first-hour.md": _notebook()}
    for path in sorted((ROOT / "examples").iterdir()):  # beside the pages, which link them
        if path.suffix in (".py", ".ipynb"):
            pages[f"examples/{path.name}"] = path.read_text()
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    if page.file.src_uri == "troubleshooting.md":
        markdown = markdown.replace("<!-- every message -->", _errors())
    return markdown.replace("](../examples/", "](examples/")


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Docstrings name things as Sphinx does."""
    return re.sub(r":(?:func|class|meth|mod|attr):<code>~?([^<]*)</code>", r"<code>\1</code>", html)
