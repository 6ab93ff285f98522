"""Fine-tunes the demo's model on several processes, with every mesh, and compares each run with one process's.

``torchrun --nproc-per-node 2 examples/distributed.py`` runs data parallel, perturbation parallel and weights sharded by
FSDP2; with four processes also data x perturbation and two shards x two of data.  Each line has the bytes that a rank
sends in a step, and the digest of the weights, which equals that of one process over the same shards of each batch.

``--mesh NAME --log FILE`` runs one mesh and records it; started again, also by torchrun itself
(``torchrun --max-restarts 3 ...``) after a rank has died, it goes on from FILE.  docs/distributed.md.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pathlib
import signal
import sys
import time
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))

import reviews  # noqa: E402
from encoder import Classifier  # noqa: E402

from zokernels.distributed import mean_of  # noqa: E402
from zokernels.optim import ZOSGD  # noqa: E402
from zokernels.optim.shard import whole_of  # noqa: E402
from zokernels.trajectory.settings import digest  # noqa: E402


def meshes(ranks: int) -> dict[str, dict[str, int]]:
    """Dimensions by name."""
    found = {"data": {"data": ranks}, "perturbation": {"perturbation": 2}, "sharded": {"data": ranks}}
    if ranks % 4 == 0:
        both = {"data": ranks // 2, "perturbation": 2}
        found |= {"data x perturbation": both, "sharded x perturbation": both}
    return {name: sizes for name, sizes in found.items() if name != "perturbation" or ranks == 2}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="sentences a step and data rank")
    parser.add_argument("--mesh", help="one of the meshes alone")
    parser.add_argument("--log", type=pathlib.Path, help="a trajectory, to go on with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", action="store_true", help="the run of --mesh in one process, for its digest")
    parser.add_argument("--kill", metavar="RANK:STEP", help="that rank dies there, once (a file beside --log says so)")
    return parser.parse_args()


class Batches:
    """The batch of a step and a data rank: a function of both, so that any process can make it."""

    def __init__(self, tokenizer, args: argparse.Namespace) -> None:
        self._sentences, _ = reviews.split(reviews.load(), 1000)
        self._tokenizer, self._size = tokenizer, args.batch

    def __call__(self, step: int, shard: int) -> reviews.Batch:
        chosen = torch.randperm(len(self._sentences), generator=torch.Generator().manual_seed(step))
        mine = [self._sentences[i] for i in chosen[shard * self._size : (shard + 1) * self._size]]
        tokens = self._tokenizer([r.text for r in mine], padding=True, truncation=True, return_tensors="pt")
        return reviews.Batch(tokens["input_ids"], tokens["attention_mask"], torch.tensor([r.label for r in mine]))


def loss_of(model: nn.Module, batch: reviews.Batch) -> Tensor:
    return F.cross_entropy(model(batch.ids, batch.mask).float(), batch.labels)


def optimizer_for(model: nn.Module, args: argparse.Namespace, **options: object) -> ZOSGD:
    head = [(n, p) for n, p in model.named_parameters() if n.startswith("head.")]
    encoder = [(n, p) for n, p in model.named_parameters() if not n.startswith("head.")]
    groups = [{"params": encoder, "lr": 3e-6, "eps": 1e-3}, {"params": head, "lr": 0.15, "eps": 0.3}]
    return ZOSGD(groups, lr=3e-6, seed=args.seed, **options)


def digest_of(model: nn.Module) -> str:
    """SHA-256 of all weights' own; all ranks together gather what is sharded."""
    return hashlib.sha256("".join(digest(whole_of(p)) for p in model.parameters()).encode()).hexdigest()[:16]


def fresh(args: argparse.Namespace) -> Classifier:
    torch.manual_seed(args.seed)
    return Classifier()


def alone(args: argparse.Namespace, shards: int, log: pathlib.Path | None = None) -> tuple[str, float]:
    """Digest and last loss of one process that takes the mean over the data ranks' batches itself."""
    model, loss = fresh(args), 0.0
    batches = Batches(model.tokenizer, args)
    optimizer = optimizer_for(model, args, trajectory=log)
    for step in range(args.steps):
        parts = [batches(step, shard) for shard in range(shards)]
        loss = optimizer.step(lambda: mean_of([loss_of(model, part) for part in parts]))  # noqa: B023
    return digest_of(model), float(loss)


def together(name: str, mesh: DeviceMesh, args: argparse.Namespace) -> tuple[str, float, int, float]:
    """Digest, last loss, bytes sent in a step, seconds a step."""
    model, loss = fresh(args), 0.0
    batches = Batches(model.tokenizer, args)
    if name.startswith("sharded"):
        for layer in model.encoder.encoder.layer:
            fully_shard(layer, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    shard = mesh.get_local_rank("data") if "data" in mesh.mesh_dim_names else 0
    optimizer = optimizer_for(model, args, mesh=mesh, trajectory=args.log, resume=args.log is not None)
    first, begin = optimizer.step_count, time.perf_counter()
    if first and dist.get_rank() == 0:
        print(f"{name}: goes on at step {first}", flush=True)
    while (step := optimizer.step_count) < args.steps:
        die(args, step)
        batch = batches(step, shard)
        loss = optimizer.step(lambda: loss_of(model, batch))  # noqa: B023
    seconds = (time.perf_counter() - begin) / max(1, args.steps - first)
    if optimizer.trajectory:
        optimizer.trajectory.close()
    return digest_of(model), float(loss), optimizer.bytes_sent, seconds


def die(args: argparse.Namespace, step: int) -> None:
    if not args.kill:
        return
    rank, at = map(int, args.kill.split(":"))
    mark = pathlib.Path(f"{args.log}.killed")
    if rank == dist.get_rank() and step >= at and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    args = arguments()
    torch.set_num_threads(1)  # products of one batch have one order of summation, whatever else runs
    warnings.filterwarnings("ignore", message=".*were taken by no torch function")
    if args.alone:
        sizes = meshes(int(os.environ.get("WORLD_SIZE", "2")))[args.mesh or "data"]
        print("one process: digest {}, loss {:.6f}".format(*alone(args, sizes.get("data", 1), args.log)))
        return 0
    dist.init_process_group("gloo")
    ranks, good, expected = dist.get_world_size(), True, {}
    for name, sizes in meshes(ranks).items():
        if args.mesh not in (None, name):
            continue
        mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        found, loss, sent, seconds = together(name, mesh, args)
        if dist.get_rank() == 0:
            shards = sizes.get("data", 1)
            if shards not in expected:
                expected[shards] = alone(args, shards)[0]
            same = found == expected[shards]
            good = good and same
            print(
                f"{name:<24} {ranks} ranks, {sent:>2} bytes a step and rank, {1000 * seconds:5.0f} ms a step, "
                f"loss {loss:.6f}, digest {found} ({'equal to' if same else 'NOT'} one process's)",
                flush=True,
            )
        dist.barrier()
    dist.destroy_process_group()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
