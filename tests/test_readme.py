"""The Python in the README and in the guides runs as it stands there."""

from __future__ import annotations

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {"README.md": 3, "docs/methods.md": 1, "docs/blackbox.md": 2, "docs/quantized.md": 2, "docs/transformers.md": 3}
PYTHON = re.compile(r"```python\n(.*?)```", re.S)
BLOCKS = [(page, code) for page in PAGES for code in PYTHON.findall((ROOT / page).read_text())]


@pytest.mark.parametrize(("page", "code"), BLOCKS, ids=lambda text: text.splitlines()[-1][:30])
def test_block_runs(page, code, monkeypatch, tmp_path):
    if "transformers" in code:
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)  # what a block writes
    exec(compile(code, page, "exec"), {})


def test_there_are_blocks():
    assert {page: sum(at == page for at, _ in BLOCKS) for page in PAGES} == PAGES
