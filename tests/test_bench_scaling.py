"""The page on scaling has the tables that the script prints, and the script the quotients that the page
says.
"""

from __future__ import annotations

import importlib.util
import pathlib
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from bench import scaling
from bench.__main__ import main
from bench.scaling import MODELS, Machine

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "scaling.md"


def test_page_has_what_the_script_prints(capsys):
    assert main(["scaling"]) == 0
    made = PAGE.read_text().partition(scaling.BEGIN)[2].partition(scaling.END)[0]
    assert made == capsys.readouterr().out
    assert made.count("GB in bf16") == len(MODELS)


def test_page_is_made_anew(tmp_path):
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("needs matplotlib")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{scaling.BEGIN}old\n{scaling.END}after\n")
    # In a process of its own: other tests hide matplotlib, which must not be there already.
    subprocess.run([sys.executable, "-m", "bench", "scaling", "--write", str(page)], cwd=ROOT, check=True)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_instructions_are_those_of_the_readme():
    counted = re.search(r"CUDA normal ([\d.]+) and Rademacher ([\d.]+)", (ROOT / "README.md").read_text())
    assert float(counted[1]) == MODELS["OPT-175B"].instructions
    assert f"instructions={counted[2]}" in pathlib.Path(scaling.__file__).read_text()


def test_steps_by_hand():
    """OPT-175B on one server: 16 points of 64 sequences by 8 stages, and 348 GB over one link."""
    m, w = Machine(), MODELS["OPT-175B"]
    weights = 12 * 96 * 12288**2
    one = 512 * (2 * weights + 2 * 96 * 512 * 12288) / (0.4 * 989.4e12) / 8
    step = scaling.pipeline(m, w, 8, "data")
    noise = 16 * 4 * weights / 8 / 3.015e12 + 8 * 23.1 * weights / 8 / (132 * 128 * 1.755e9)
    assert step.total == pytest.approx((1024 + 7) * one + noise + 3 * 15e-6 + 7 * 15e-6)
    assert step.parts["bubble"] == pytest.approx(7 * one)
    assert scaling.streamed(m, w, 1024, False).total == pytest.approx(2 * weights / 54.4e9 + 10 * 15e-6)
    assert scaling.pipeline(m, w, 4, "data") is None  # 348 GB on four GPUs
    # A rate that is infinite is no bound.
    assert scaling.streamed(replace(m, host=float("inf")), w, 1024, False).bound != "host link"


@pytest.mark.parametrize("first", ["data", "perturbation"])
@pytest.mark.parametrize("replicas", [1, 2, 8, 16, 64, 128, 1024])
def test_shares_leave_nothing_out(first, replicas):
    w = MODELS["1T"]
    sequences, points = scaling.shares(w, replicas, first)
    assert sequences * points * replicas == w.sequences * w.points
