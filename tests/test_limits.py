"""Memory and time in proportion to the size of a file, and one clear error before anything changes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from case_process import TESTS, environment

from zokernels.optim import EGGROLL
from zokernels.step.directions.low_rank import FreshFactors
from zokernels.trajectory import replay_


def test_small_files_take_little_whatever_they_say(rng):
    """In a process with a limit of memory: every entry of a header and of a state_dict with odd values, and
    documents that are nested without end, or that say that they are huge.
    """
    command = [sys.executable, TESTS / "limits_worker.py", str(rng.getrandbits(31))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["faults"], "\n".join(found["faults"])
    assert found["tried"] > 500


def test_a_rank_beyond_every_matrix_is_the_caller_s_to_confirm(tmp_path):
    """Factors of a rank from a log could be much larger than the weights."""
    w = torch.nn.Parameter(torch.linspace(-1, 1, 40).view(20, 2))
    base = w.detach().clone()
    optimizer = EGGROLL([("w", w)], lr=0.1, rank=17, directions=2, trajectory=tmp_path / "log")
    optimizer.step(lambda: w.square().sum())
    optimizer.trajectory.close()
    replayed = base.clone()
    with pytest.raises(ValueError, match=r"direction\.rank: expected at most 16, .* got 17"):
        replay_({"w": replayed}, tmp_path / "log")
    assert torch.equal(replayed, base)
    replay_({"w": replayed}, tmp_path / "log", direction=FreshFactors(17))
    assert torch.equal(replayed, w.detach())
