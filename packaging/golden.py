"""The known answers of the contract (tests/golden.json), asked of a package that is loaded already."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent


def check(package: Any) -> int:
    """Compares ``package.combine_`` with every known answer.  Returns how many values were compared."""
    answers = json.loads((ROOT / "tests" / "golden.json").read_text())
    checked = 0
    for dist in ("normal", "rademacher"):
        for case in answers[dist]:
            values = list(case["z"])
            theta = torch.full((case["n"],), -0.0)
            package.combine_(
                theta, int(case["seed"], 16), 1.0, streams=case["stream"], offsets=case["offset"], dist=dist
            )
            if dist == "normal":
                got = [f"{b & 0xFFFFFFFF:08x}" for b in theta.view(torch.int32).tolist()]
            else:
                got = ["+" if x == 1 else "-" for x in theta.tolist()]
            assert got == values, case
            checked += len(values)
    return checked
