"""The README's Python runs as it stands there."""

from __future__ import annotations

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.splitlines()[-1][:30])
def test_block_runs(code):
    exec(compile(code, "README.md", "exec"), {})


def test_there_are_blocks():
    assert len(BLOCKS) == 2
