"""The documentation: every Python block runs, every command parses, every message is listed, and the site
builds.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import zokernels
import zokernels.optim
from zokernels import cli

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>[^>]+) -->\n)?```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)


def blocks() -> list:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            if match["kind"] == "python":
                line = text.count("\n", 0, match.start("code"))
                name = f"{page.name}:{line}"
                marks = [pytest.mark.skip(reason=match["why"])] if match["why"] else []
                found.append(pytest.param(page, line, match["code"], id=name, marks=marks))
    return found


def given() -> dict:
    """What the fragments in the guides rely on: a model, data, and names that their page has introduced."""
    from zokernels.optim import ZOSGD

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    data = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
    return {
        "torch": torch,
        "F": F,
        "zokernels": zokernels,
        "ZOSGD": ZOSGD,
        "model": model,
        "data": data,
        "micro_batches": data,
        "x": data[0][0],
        "y": data[0][1],
        "loss": F.cross_entropy,
        "base": {n: t.clone() for n, t in model.state_dict().items()},
        "opt": ZOSGD(model.named_parameters(), lr=1e-6),
        "dtype": torch.bfloat16,
        "rounding": "nearest",
    }


@pytest.mark.parametrize(("page", "line", "code"), blocks())
def test_block_runs(page, line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Pages to be copied from stand alone; in the guides a block goes on where the text is.
    alone = page.name in ("README.md", "tutorial.md", "howto.md", "methods.md", "blackbox.md", "quantized.md")
    alone |= page.name in ("transformers.md", "lora.md")
    for package in ("transformers", "peft"):
        if package in code:
            pytest.importorskip(package)
    exec(compile("\n" * line + code, str(page), "exec"), {} if alone else given())


def test_a_script_is_shown_as_it_is():
    code = (ROOT / "examples" / "transformers_trainer.py").read_text().split('"""', 2)[2].strip()
    assert f"```python\n{code}\n```" in (ROOT / "docs" / "transformers.md").read_text()


def test_there_are_blocks():
    assert len(blocks()) >= 30
    assert len([b for b in blocks() if b.marks]) < len(blocks()) / 4


# --- commands ---------------------------------------------------------------------------------------------


def commands() -> list[tuple[str, str]]:
    """(page, command) for every command in a code block and in a span of code."""
    found = []
    for page in PAGES:
        text = page.read_text()
        indented = re.findall(r"^ {4}(\S.*)$", text, re.M)
        fenced = [
            line for m in FENCE.finditer(text) if m["kind"] != "python" for line in m["code"].splitlines()
        ]
        spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
        found += [(page.name, line.strip()) for line in (*indented, *fenced, *spans)]
    return found


def _refuses(parse, words: list[str]) -> str | None:
    try:
        parse(words)
    except SystemExit as end:
        return f"exit status {end.code}" if end.code else None
    return None


def test_commands_parse(capsys):
    from bench.__main__ import parse

    checked = 0
    for page, line in commands():
        if not re.match(r"([A-Z_]+=\S+ )*(zokernels|python) ", line):
            continue
        words = shlex.split(re.split(r"#|   ", line)[0])
        words = [w for w in words if not re.match(r"^[A-Z_]+=", w)]  # variables in front
        if words[:3] == ["python", "-m", "bench"]:
            words = ["zokernels", "bench", *words[3:]]
        if words[:3] == ["python", "-m", "zokernels"]:
            words = ["zokernels", *words[3:]]
        if words[:1] != ["zokernels"] or any(w in ("|", "...", "COMMAND") for w in words) or "[" in line:
            continue
        if words[1:2] == ["bench"]:
            found = _refuses(parse, words[2:]) if words[2:] else None
        elif words[1:2] == ["demo"]:
            found = (
                None if all(w.startswith("-") or w.isdigit() for w in words[2:]) else "arguments of the demo"
            )
        else:
            found = _refuses(cli._parser().parse_args, words[1:])
        assert found is None, (page, line, capsys.readouterr().err)
        checked += 1
    assert checked > 20


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    used = {words[1] for _, line in commands() if (words := line.split())[:1] == ["make"] and len(words) > 1}
    assert used
    assert used <= targets, used - targets


def test_files_that_are_named_exist():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            made = ("index.md", "api.md", "api-optim.md", "api-more.md", "contributing.md", "changelog.md")
            made += ("first-hour.md",)
            if not link.startswith("http") and link not in made:
                assert (page.parent / link).exists(), (page.name, link)


def test_tests_that_are_named_exist():
    """A promise whose test has another name, or is gone, is no longer tested."""
    found = {page.name: re.findall(r"\btest_\w+\.py\b", page.read_text()) for page in PAGES}
    named = {(page, name) for page, names in found.items() for name in names}
    assert ("reliability.md", "test_interrupts.py") in named
    named.discard(("CONTRIBUTING.md", "test_x.py"))  # stands for any
    assert [(page, name) for page, name in sorted(named) if not (ROOT / "tests" / name).exists()] == []


def test_every_example_is_listed():
    """What is run, and not what others import: that has no command in its first lines."""
    page = (ROOT / "docs" / "examples.md").read_text()
    scripts = [*(ROOT / "examples").glob("*.ipynb")]
    scripts += [p for p in (ROOT / "examples").glob("*.py") if "__main__" in p.read_text()]
    assert len(scripts) > 12
    for path in scripts:
        assert f"](../examples/{path.name})" in page, path.name


# --- messages ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def messages():
    spec = importlib.util.spec_from_file_location("zokernels_messages", ROOT / "docs/site/messages.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_message_is_found(messages):
    """Against a plain count of the words in the sources, file by file."""
    found = messages.messages()
    for path in messages.python_files():
        text = path.read_text()
        name = str(path.relative_to(ROOT))
        mine = [m for m in found if m.file == name]
        calls = len(re.findall(r"(?<![\w.])fail\(", text)) - len(re.findall(r"def fail\(", text))
        raises = re.findall(r"^\s*raise (?!NotImplementedError|SystemExit|error\b)\w+\((?!\))", text, re.M)
        assert len(mine) >= calls + len(raises), (name, len(mine), calls, raises)
    native = "\n".join(p.read_text() for p in messages.native_files())
    assert len([m for m in found if m.file.startswith("csrc")]) >= native.count("STD_TORCH_CHECK(")
    assert len(found) > 200
    assert all(m.text.strip() for m in found)


def test_messages_that_are_explained_exist(messages):
    texts = [m.text for m in messages.messages()]
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r"\*\*`([^`]+)`", page)
    assert len(quoted) > 15
    elsewhere = (ROOT / "CMakeLists.txt").read_text()
    pattern = lambda words: re.compile(re.sub(r"'[a-z]+'", "(?:'[a-z]+'|<[^>]+>)", re.escape(words)))
    for words in quoted:
        assert any(pattern(words).search(text) for text in texts) or words in elsewhere, words


def test_a_real_error_is_listed(messages):
    """A message as a user sees it fits one in the list."""
    cases = [
        lambda: zokernels.combine_(torch.zeros(3, dtype=torch.float64), 1, 1.0, streams=0),
        lambda: zokernels.combine_(torch.zeros(3), 1, 1.0, streams=0, rounding="up"),
        lambda: zokernels.combine_([torch.zeros(3)] * 2, 1, 1.0, streams=[0, 1]),
        lambda: zokernels.noise(3, seed=2**65),
        lambda: zokernels.optim.ZOSGD(torch.nn.Linear(2, 2).parameters(), lr=1.0, directions=0),
        lambda: zokernels.optim.ZOSGD(torch.nn.Linear(2, 2).parameters(), lr=1.0).step(lambda: None),
        lambda: zokernels.optim.ZOSGD(torch.nn.Linear(2, 2).parameters(), lr=1.0).step(
            lambda: torch.zeros(2)
        ),
    ]
    as_pattern = lambda text: re.compile(re.sub(r"<[^>]*>", ".*", re.escape(text)), re.S)
    patterns = [
        as_pattern(m.text) for m in messages.messages() if re.sub(r"<[^>]*>|[:, ]|expected|got", "", m.text)
    ]
    for case in cases:
        with pytest.raises((TypeError, ValueError)) as caught:
            case()
        assert any(p.fullmatch(str(caught.value)) for p in patterns), str(caught.value)


# --- the site ---------------------------------------------------------------------------------------------


def test_site_builds_without_a_warning(tmp_path, messages):
    for package in ("mkdocs", "material", "mkdocstrings", "griffe"):
        pytest.importorskip(package)
    environment = {**os.environ, "DISABLE_MKDOCS_2_WARNING": "true", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr, done.stderr[-3000:]
    text = lambda name: (tmp_path / name).read_text()
    for name in zokernels.__all__:
        assert f'id="zokernels.{name}"' in text("api.html") or name.startswith("__"), name
    for name in zokernels.optim.__all__:
        assert f'id="zokernels.optim.{name}"' in text("api-optim.html"), name
    assert "====" not in text("api.html")
    shown = re.sub(r"<[^>]+>", "", text("troubleshooting.html"))
    for m in messages.messages():
        assert m.file in shown
    assert 'src="architecture.svg"' in text("design.html")
    assert "unpkg.com" not in text("index.html")  # nothing is fetched from elsewhere
    _finds(tmp_path)


def _finds(site: pathlib.Path) -> None:
    """Where a browser is, it opens a page as a file, whose address holds a query for the search."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={site}/profile"]
    command += ["--virtual-time-budget=20000", "--dump-dom", f"{(site / 'index.html').as_uri()}?q=stochastic"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert re.search(r"md-search-result__meta[^>]*>\s*\d+ matching documents", done.stdout), done.stderr[
        -1000:
    ]


def test_parsers_have_the_commands_of_the_readme():
    subparsers = next(a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    readme = (ROOT / "README.md").read_text()
    for name in subparsers.choices:
        assert re.search(rf"zokernels .*\b{name}\b", readme), name
