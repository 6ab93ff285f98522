"""A process of a ZOTrainer run under torchrun (test_transformers_processes.py): ``hf_worker.py FOLDER``."""

from __future__ import annotations

import pathlib
import sys

import pytest
import torch
import torch.distributed as dist
from hf_cases import opt, rows, same, trainer, weights

from zokernels.integrations.transformers import ZOTrainer
from zokernels.optim import ZOSGD


class Watched(ZOTrainer):
    """Keeps the batches that it is given."""

    def _keep(self, model, inputs, *args, **kwargs):
        self.kept = [*getattr(self, "kept", []), (inputs, *args)]
        return super()._keep(model, inputs, *args, **kwargs)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    place = pathlib.Path(folder)
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    kind = (ZOSGD, {"momentum": 0.9, "weight_decay": 0.01})
    own = {"optimizer_cls_and_kwargs": kind, "trajectory": place / "run.zk"}
    whole = trainer(place / "out", opt(), rows(48), Watched, own=own, **options)
    rank, world = whole.args.process_index, whole.args.world_size
    whole.train()
    assert not isinstance(whole.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    assert whole.zo_optimizer.bytes_sent == 64
    everyone: list = [None] * world
    dist.all_gather_object(
        everyone, (weights(whole.model), whole.kept, [e.get("loss") for e in whole.state.log_history])
    )
    assert all(same(everyone[0][0], other) for other, _, _ in everyone)
    assert all(everyone[0][2] == losses for _, _, losses in everyone)
    batches = [kept for _, kept, _ in everyone]
    ids = [{tuple(row) for inputs, *_ in kept for row in inputs["input_ids"].tolist()} for kept in batches]
    assert not ids[0] & ids[1]  # each has its own
    again = trainer(
        place / f"again{rank}", opt(), rows(48), own={"optimizer_cls_and_kwargs": kind}, **options
    )
    again.train(resume_from_checkpoint=str(place / "out/checkpoint-3"))
    assert same(weights(again.model), weights(whole.model))
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,), mesh_dim_names=("perturbation",))
    with pytest.raises(ValueError, match="mesh: expected the dimension 'data' of 2 processes"):
        trainer(place, opt(), rows(8), own={"mesh": mesh})
    if rank == 0:
        torch.save((weights(whole.model), batches), place / "run.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
