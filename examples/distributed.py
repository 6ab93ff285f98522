"""Fine-tunes the demo's model on several processes, with every mesh, and compares each run with one
process's.

``torchrun --nproc-per-node 2 examples/distributed.py`` runs data parallel, perturbation parallel, weights
sharded by FSDP2, and two pipeline stages.  With four processes it also runs data x perturbation, shards x
perturbation, and two pipelines.  Each line shows the bytes that a rank sends in a step and the digest of the
weights, which equals that of one process over the same shards of each batch.  The last run is asynchronous;
its digest equals that of its merged log, replayed.

``--mesh NAME --log FILE`` runs one mesh and records it.  If it is started again it goes on from FILE, also by
torchrun itself (``torchrun --max-restarts 3 ...``) after a rank has died.  docs/distributed.md explains it.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import pathlib
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from zokernels.distributed import AsyncExchange, mean_of
from zokernels.examples import reviews
from zokernels.examples.encoder import Classifier
from zokernels.optim import ZOSGD
from zokernels.step.shard import whole_of
from zokernels.trajectory import replay_
from zokernels.trajectory.digests import digest


def meshes(ranks: int) -> dict[str, dict[str, int]]:
    """The meshes to run, each with the sizes of its dimensions by name."""
    found = {"data": {"data": ranks}, "perturbation": {"perturbation": 2}, "sharded": {"data": ranks}}
    if ranks % 4 == 0:
        both = {"data": ranks // 2, "perturbation": 2}
        found |= {"data x perturbation": both, "sharded x perturbation": both}
    found["pipeline"] = {"data": ranks // 2, "pipeline": 2}
    return {name: sizes for name, sizes in found.items() if name != "perturbation" or ranks == 2}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="sentences a step and data rank")
    parser.add_argument("--mesh", help="one of the meshes alone")
    parser.add_argument("--log", type=pathlib.Path, help="a trajectory, to go on with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--alone", action="store_true", help="the run of --mesh in one process, for its digest"
    )
    parser.add_argument(
        "--kill", metavar="RANK:STEP", help="that rank dies there, once (a file beside --log says so)"
    )
    return parser.parse_args()


class Batches:
    """The batch of a step and a data rank.  It is a function of both, so that any process can make it."""

    def __init__(self, tokenizer, args: argparse.Namespace) -> None:
        self._sentences, _ = reviews.split(reviews.load(), 1000)
        self._tokenizer, self._size = tokenizer, args.batch

    def __call__(self, step: int, shard: int) -> reviews.Batch:
        chosen = torch.randperm(len(self._sentences), generator=torch.Generator().manual_seed(step))
        mine = [self._sentences[i] for i in chosen[shard * self._size : (shard + 1) * self._size]]
        tokens = self._tokenizer([r.text for r in mine], padding=True, truncation=True, return_tensors="pt")
        return reviews.Batch(
            tokens["input_ids"], tokens["attention_mask"], torch.tensor([r.label for r in mine])
        )


def loss_of(model: nn.Module, batch: reviews.Batch) -> Tensor:
    return F.cross_entropy(model(batch.ids, batch.mask).float(), batch.labels)


def optimizer_for(model: nn.Module, args: argparse.Namespace, **options: object) -> ZOSGD:
    head = [(n, p) for n, p in trained(model) if n.startswith("head.")]
    encoder = [(n, p) for n, p in trained(model) if not n.startswith("head.")]
    groups = [{"params": encoder, "lr": 3e-6, "eps": 1e-3}, {"params": head, "lr": 0.15, "eps": 0.3}]
    return ZOSGD(groups, lr=3e-6, seed=args.seed, **options)


class Hop(nn.Module):
    """Stands in the place of a layer that another stage has."""

    def __init__(self, act: Callable[[Tensor], Tensor] = lambda hidden: hidden) -> None:
        super().__init__()
        self.act = act

    def forward(self, hidden: Tensor, *_: object, **__: object) -> Tensor:
        return self.act(hidden)


def leave_stage(model: Classifier, mesh: DeviceMesh) -> None:
    """Leaves this stage the first half of the encoder's layers, or the second.  The names stay the same."""
    layers, group = model.encoder.encoder.layer, mesh.get_group("pipeline")
    half = len(layers) // 2

    def send(hidden: Tensor) -> Tensor:
        dist.send(hidden, group=group, group_dst=1)
        return hidden

    def receive(hidden: Tensor) -> Tensor:
        dist.recv(received := torch.empty_like(hidden), group=group, group_src=0)
        return received

    first = mesh.get_local_rank("pipeline") == 0
    model.not_here = "head." if first else "encoder.embeddings."
    for i in range(half, len(layers)) if first else range(half):
        layers[i] = Hop()
    layers[half if first else half - 1] = Hop(send if first else receive)


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of the model, without those that another stage has."""
    return [
        (n, p) for n, p in model.named_parameters() if not n.startswith(getattr(model, "not_here", "nothing"))
    ]


def digest_of(model: nn.Module, mesh: DeviceMesh | None = None) -> str:
    """The SHA-256 of the digests of all weights.

    All ranks call it together, and gather the weights that are sharded and the digests of other stages.
    """
    found = [digest(whole_of(p)) for _, p in trained(model)]
    if mesh is not None and "pipeline" in mesh.mesh_dim_names:
        stages: list = [None, None]
        dist.all_gather_object(stages, found, group=mesh.get_group("pipeline"))
        found = stages[0] + stages[1]
    return hashlib.sha256("".join(found).encode()).hexdigest()[:16]


def fresh(args: argparse.Namespace) -> Classifier:
    torch.manual_seed(args.seed)
    return Classifier()


def alone(args: argparse.Namespace, shards: int, log: pathlib.Path | None = None) -> tuple[str, float]:
    """The digest and the last loss of one process, which takes the mean over the batches of all data
    ranks.
    """
    model, loss = fresh(args), 0.0
    batches = Batches(model.tokenizer, args)
    optimizer = optimizer_for(model, args, trajectory=log)
    for step in range(args.steps):
        parts = [batches(step, shard) for shard in range(shards)]
        loss = optimizer.step(lambda: mean_of([loss_of(model, part) for part in parts]))  # noqa: B023
    return digest_of(model), float(loss)


def together(name: str, mesh: DeviceMesh, args: argparse.Namespace) -> tuple[str, float, int, float]:
    """The digest, the last loss, the bytes sent in a step, and the seconds of a step."""
    model, loss = fresh(args), 0.0
    batches = Batches(model.tokenizer, args)
    if name.startswith("sharded"):
        for layer in model.encoder.encoder.layer:
            fully_shard(layer, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    if "pipeline" in mesh.mesh_dim_names:
        leave_stage(model, mesh)
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
    return digest_of(model, mesh), float(loss), optimizer.bytes_sent, seconds


def asynchronous(args: argparse.Namespace) -> bool:
    """A run in which each rank has batches of its own and none waits; whether it ended as its log does.

    It has as many records as all ranks together would take steps.
    """
    rank, ranks, model = dist.get_rank(), dist.get_world_size(), fresh(args)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = [store.port if store else None]
    dist.broadcast_object_list(port, src=0)
    store = store or dist.TCPStore("127.0.0.1", port[0], is_master=False)
    batches, exchange = (
        Batches(model.tokenizer, args),
        AsyncExchange(optimizer_for(model, args), store, args.steps * ranks),
    )
    for step in itertools.count():
        batch = batches(step, rank)
        if exchange.step(lambda: loss_of(model, batch)) is None:  # noqa: B023
            break
    same = True
    if rank == 0:
        with tempfile.TemporaryDirectory() as place:
            exchange.save(log := pathlib.Path(place) / "merged.zk")
            replay_(alone := fresh(args), log)
        found, stale = digest_of(model), max(exchange.stalenesses())
        same = found == digest_of(alone)
        print(
            f"{'asynchronous':<24} {ranks} ranks, {exchange.steps} records, stale by {stale} at "
            f"most, digest {found} "
            f"({'equal to' if same else 'NOT'} its log's, replayed)",
            flush=True,
        )
    dist.barrier()
    return same


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
    torch.set_num_threads(1)  # with one thread, the products of a batch have one order of summation
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
                f"{name:<24} {ranks} ranks, {sent:>2} bytes a step and rank, {1000 * seconds:5.0f} "
                "ms a step, "
                f"loss {loss:.6f}, digest {found} ({'equal to' if same else 'NOT'} one process's)",
                flush=True,
            )
        dist.barrier()
    if args.mesh in (None, "asynchronous"):
        good = asynchronous(args) and good
    dist.destroy_process_group()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
