"""Runs the cases of distributed_cases.py on several processes: ``distributed_worker.py FOLDER RANKS SEED [cuda]``.

Torch is imported once; each rank is a fork.  What came of each case is in ``FOLDER/<rank>.json``: "ok" or a traceback.
A rank that fails ends all, because the others would wait for it.
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import signal
import sys
import traceback

import distributed_cases
import torch
import torch.distributed as dist


def run(folder: pathlib.Path, rank: int, ranks: int, seed: int) -> int:
    if distributed_cases.DEVICE == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo" if distributed_cases.DEVICE == "cpu" else "cpu:gloo,cuda:nccl",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    results: dict[str, str] = {}
    only = os.environ.get("ZOKERNELS_CASES", "")
    for name, case in distributed_cases.CASES[ranks].items():
        if only not in name or (distributed_cases.DEVICE == "cuda" and name in distributed_cases.FORKS):
            continue
        try:
            case(distributed_cases.World(folder / name, rank, ranks, seed))
            results[name] = "ok"
        except BaseException:
            results[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(results))
        if results[name] != "ok":
            return 1
    dist.barrier()
    return 0


def main(folder: str, ranks: str, seed: str, device: str = "cpu") -> int:
    distributed_cases.DEVICE = device
    torch.set_num_threads(1)  # a thread pool does not survive a fork
    children = {}
    for rank in range(int(ranks)):
        if (child := os.fork()) == 0:
            code = 1
            try:
                code = run(pathlib.Path(folder), rank, int(ranks), int(seed))
            finally:
                os._exit(code)
        children[child] = rank
    failed = False
    while children:
        child, status = os.wait()
        del children[child]
        if status:
            failed = True
            for other in children:
                os.kill(other, signal.SIGKILL)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
