"""ZOTrainer in two processes: the weights of one process that sees the batches of both."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from case_process import TESTS, environment
from hf_cases import opt, same, weights

from zokernels.distributed import mean_of
from zokernels.optim import ZOSGD
from zokernels.trajectory import replay_

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def test_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(TESTS / "hf_worker.py"), str(tmp_path)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment(OMP_NUM_THREADS="1")
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found, batches = torch.load(tmp_path / "run.pt", weights_only=False)

    replayed = opt()
    assert replay_(replayed, tmp_path / "run.zk") == 6
    assert same(weights(replayed), found)

    alone = opt()
    alone.train()
    optimizer = ZOSGD(alone.named_parameters(), lr=1e-2, seed=7, momentum=0.9, weight_decay=0.01)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for step in range(6):
            # The Trainer divides by the tokens of all processes, and multiplies by their number.
            def loss(kept: list) -> torch.Tensor:
                parts = [2 * alone(**inputs, num_items_in_batch=count).loss for inputs, count in kept]
                return parts[0] + parts[1]

            optimizer.param_groups[0]["lr"] = 1e-2 * (6 - step) / 6
            optimizer.step(lambda: mean_of([loss(kept[2 * step : 2 * step + 2]) for kept in batches]))  # noqa: B023
    finally:
        torch.set_num_threads(threads)
    assert same(weights(alone), found)
