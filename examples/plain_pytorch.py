"""Fine-tunes the demo's sentence encoder in a plain PyTorch loop, forward passes only.

``python examples/plain_pytorch.py FOLDER [STEPS]``.  Killed and started again, it takes the steps of its log,
in seconds, goes on, and ends with the same bits.  docs/trajectory.md"""

import itertools
import pathlib
import sys

import torch
import torch.nn.functional as F

from zokernels.examples.encoder import Classifier
from zokernels.examples.reviews import Batcher, load, split
from zokernels.optim import ZOSGD

folder, steps = pathlib.Path(sys.argv[1]), int((*sys.argv, 300)[2])
folder.mkdir(parents=True, exist_ok=True)
model = Classifier()
batches = Batcher(split(load(), 100)[0], model.tokenizer, min(24, steps), torch.device("cpu")).forever(seed=0)
part = lambda head: [(n, p) for n, p in model.named_parameters() if n.startswith("head.") == head]
groups = [{"params": part(False), "lr": 3e-6}, {"params": part(True), "lr": 0.15, "eps": 0.3}]
optimizer = ZOSGD(groups, lr=0.0, seed=0, trajectory=folder / "run.zk", resume=True)
for batch in itertools.islice(batches, optimizer.step_count, steps):
    loss = optimizer.step(lambda: F.cross_entropy(model(batch.ids, batch.mask), batch.labels))  # noqa: B023
    print(
        f"step {optimizer.step_count}  loss {loss:.4f}  g {optimizer.last_projected_gradient:.3f}", flush=True
    )
torch.save(model.state_dict(), folder / "model.pt")
