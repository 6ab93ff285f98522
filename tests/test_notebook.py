"""The notebook examples/first_hour.ipynb: its cells run in order, each of them twice."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "first_hour.ipynb"
#: Runs the cells in one namespace, as a kernel does, and each twice, as somebody does who goes back.
RUN = """
import json, pathlib, sys, tempfile, torch
torch.set_num_threads(1)
tempfile.tempdir = sys.argv[2]
scope = {"__name__": "__main__"}
for cell in json.loads(pathlib.Path(sys.argv[1]).read_text())["cells"]:
    if cell["cell_type"] == "code":
        for time in range(2):
            exec(compile("".join(cell["source"]), cell["id"], "exec"), scope)
        print("ran", cell["id"])
"""


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def test_every_cell_runs_twice(tmp_path):
    for package in ("transformers", "peft", "sklearn"):
        pytest.importorskip(package)
    command = [sys.executable, "-c", RUN, str(NOTEBOOK), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("ran cell-") == sum(cell["cell_type"] == "code" for cell in cells())
    assert "bit for bit (8 tensors)" in done.stdout
    written = [p.name for p in tmp_path.iterdir()]
    assert all(name.startswith("tmp") for name in written), written  # the folder of its own, made twice


def test_its_links_lead_to_files_and_its_outputs_are_no_errors():
    text = "".join("".join(cell["source"]) for cell in cells() if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert len(links) > 4
    for link in links:
        assert (NOTEBOOK.parent / link).exists(), link
    outputs = [o for cell in cells() if cell["cell_type"] == "code" for o in cell["outputs"]]
    assert outputs
    assert {o["output_type"] for o in outputs} == {"stream"}
