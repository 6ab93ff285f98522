"""A rank of a run that torchrun restarts (test_distributed.py): ``elastic_worker.py FOLDER STEPS RANK:STEP
...``.

Each of the ranks named kills itself with SIGKILL at its step, once: a file in FOLDER says that it did.
"""

from __future__ import annotations

import os
import pathlib
import random
import signal
import sys

import torch
import torch.distributed as dist
from distributed_cases import loss_of, whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trajectory_cases import Model

from zokernels.optim import ZOSGD


def main(folder: str, steps: str, *kills: str) -> None:
    torch.set_num_threads(1)
    place = pathlib.Path(folder)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("data",))
    model = Model(torch.bfloat16, random.Random(5))
    fully_shard(model, mesh=mesh)
    optimizer = ZOSGD(
        model.named_parameters(),
        lr=0.05,
        momentum=0.9,
        seed=6,
        mesh=mesh,
        trajectory=place / "run.zk",
        resume=True,
    )
    if dist.get_rank() == 0:
        print(f"begins at step {optimizer.step_count}", flush=True)
    while (step := optimizer.step_count) < int(steps):
        for kill in kills:
            mark = place / f"killed {kill}"
            if kill == f"{dist.get_rank()}:{step}" and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step(lambda: loss_of(model, step, dist.get_rank()))
    optimizer.trajectory.close()
    weights = whole(model)
    if dist.get_rank() == 0:
        torch.save(weights, place / "weights.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
