"""A streamed run on disk that is killed again and again (test_offload_disk.py): ``FOLDER KILLS SEED WIRE
METHOD RANKS``.  WIRE is a wire format, "none", or "master" for fp32 weights whose blocks are kept in bf16.

One process forks a child for each rank of an attempt, kills one of them with SIGKILL after a random time,
each rank in turn, and the others, which find themselves without it, a random time later.  It lets the last
attempt finish.  Prints the number of attempts that were killed: as many as were asked for, and more until
they have left enough different states.
"""

from __future__ import annotations

import functools
import os
import pathlib
import random
import signal
import sys
import time

import forked
import torch
import torch.distributed as dist
from offload_cases import tower, train
from torch.distributed.device_mesh import init_device_mesh

from zokernels import offload
from zokernels.optim import ZOSGD, SparseMeZO, ZOAdam

#: Steps of a run, times its ranks, which share the cores.
STEPS = 60
#: What trains: the optimizer, and its arguments.
METHODS = {
    "SGD": (ZOSGD, {}),
    "Adam": (ZOAdam, {"lr": 1e-3, "weight_decay": 0.0}),
    "Sparse-MeZO": (SparseMeZO, {"refresh": 7}),
}


def training(model: torch.nn.Module, steps: int, method: str, **more: object) -> None:
    kind, own = METHODS[method]
    train(model, steps, lambda params, **options: kind(params, **{**options, **own, **more}))


def run(
    folder: pathlib.Path,
    base: pathlib.Path,
    steps: int,
    wire: str | None,
    method: str,
    rank: int = 0,
    ranks: int = 1,
    meet: str = "",
) -> None:
    """``meet``: the file by which the ranks find each other."""
    slices, mesh = {}, {}
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=ranks)
        slices["mesh"] = init_device_mesh("cpu", (ranks,), mesh_dim_names=("slices",))
        # of two ranks each computes a loss, of four each computes both
        name = "perturbation" if ranks == 2 else "copies"
        mesh["mesh"] = init_device_mesh("cpu", (ranks,), mesh_dim_names=(name,))
    with offload.empty_weights():
        model = tower_on_meta()
    options = {"master": torch.bfloat16} if wire == "master" else {"wire": wire}
    if wire == "master":  # the base is read in place, and what stays on the device is widened
        model.float()
    with offload.stream(
        model, "layers", "disk", weights=base, path=folder, resume=True, slots=2, **options, **slices
    ) as engine:
        training(model, steps, method, **mesh)
        engine.save(folder / "saved" if rank == 0 else folder.parent / f"saved-{rank}")
    if ranks > 1:
        dist.barrier()  # no rank goes while another still needs it


def tower_on_meta() -> torch.nn.Module:
    from offload_cases import Tower

    return Tower().bfloat16()


def state_of(folder: pathlib.Path) -> tuple:
    """Names of blocks that are there, and the length of the log."""
    blocks = tuple(sorted(p.name for p in folder.glob("*.safetensors")))
    log = folder / "run.zk"
    return blocks, log.stat().st_size if log.exists() else 0


def attempt(
    folder: pathlib.Path,
    base: pathlib.Path,
    wire: str | None,
    method: str,
    ranks: int,
    wait: tuple[float, int, float] | None,
) -> bool:
    """Whether it was killed.

    ``wait``: the seconds until a rank is killed, its number, and the seconds from then until the others are.
    """
    children = []
    (meet := folder.parent / "meet").unlink(missing_ok=True)
    for rank in range(ranks):
        args = folder, base, STEPS // ranks, wire, method, rank, ranks, os.fspath(meet)
        children.append(forked.fork(functools.partial(run, *args)))
    ended = lambda: [end for child in children if (end := forked.end_of(child)) is not None]
    until = float("inf") if wait is None else time.monotonic() + wait[0]
    while time.monotonic() < until and len(ended()) < (ranks if wait is None else 1):
        time.sleep(1e-3)
        if any(end.si_status for end in ended()):
            break
    failed = any(end.si_status for end in ended())
    if wait is not None and not failed:
        os.kill(children[wait[1]], signal.SIGKILL)
        time.sleep(wait[2])
    for child in children if failed or wait is not None else ():
        os.kill(child, signal.SIGKILL)
    killed = [os.WIFSIGNALED(os.waitpid(child, 0)[1]) for child in children]
    if failed:
        raise SystemExit(1)
    return any(killed)


def main(place: str, kills: str, seed: str, format: str, method: str, of: str) -> None:
    from safetensors.torch import load_file, save_model

    torch.set_num_threads(1)  # a thread pool does not survive a fork
    rng, folder, wire = (
        random.Random(int(seed)),
        pathlib.Path(place) / "run",
        None if format == "none" else format,
    )
    base = pathlib.Path(place) / "base.safetensors"
    model = tower(torch.bfloat16)
    save_model(model, base)
    start = time.monotonic()
    run(
        pathlib.Path(place) / "first", base, 4, wire, method
    )  # what is imported and loaded now, no child waits for
    once = time.monotonic() - start
    if wire is None:
        training(model, STEPS // int(of), method)
        whole = model.state_dict()
    else:  # which is what test_offload_wire.py writes out
        run(pathlib.Path(place) / "whole", base, STEPS // int(of), wire, method)
        whole = load_file(pathlib.Path(place) / "whole" / "saved")
    torch.save(whole, pathlib.Path(place) / "whole.pt")
    killed, longest, states, ranks = 0, once, set(), int(of)
    while killed < int(kills) or len(states) <= int(kills) // 6:
        # Most attempts get some steps further, however fast the machine is; after one that got to the end,
        # anew.
        before = state_of(folder)
        wait = rng.random() * longest, killed % ranks, rng.random() * 0.1 * longest * (ranks > 1)
        if attempt(folder, base, wire, method, ranks, wait):
            killed += 1
            states.add(state_of(folder))
            longest *= 1.2 if state_of(folder) == before else 0.95
        else:
            check(folder, place)
            for file in folder.iterdir():
                file.unlink()
    attempt(folder, base, wire, method, ranks, None)
    check(folder, place)
    print(killed)


def check(folder: pathlib.Path, place: str) -> None:
    """The weights of a finished run are those of the whole one."""
    from safetensors.torch import load_file

    saved, whole = (
        load_file(folder / "saved"),
        torch.load(pathlib.Path(place) / "whole.pt", weights_only=True),
    )
    for name, value in saved.items():
        if not torch.equal(value.view(torch.int16), whole[name].view(torch.int16)):
            raise SystemExit(f"{name} differs")


if __name__ == "__main__":
    main(*sys.argv[1:])
