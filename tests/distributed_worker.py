"""Runs the cases of distributed_cases.py on several processes, one case after the other.

``distributed_worker.py FOLDER RANKS`` reads questions from standard input, each a line of JSON with the
arguments of :meth:`Ranks.run`, and answers with a line of JSON: for each rank "ok" or what went wrong there.
``distributed_worker.py FOLDER RANKS SEED [cuda]`` runs every case, or those with ``ZOKERNELS_CASES`` in their
name. ``FOLDER/<rank>.json`` then has what came of each case on that rank.  Exit: 0 if all is "ok".

Torch is imported once; each rank is a fork.  The ranks stay for the next case, unless a case fails or does
not end on one of them: the others may then wait for it, so all are killed, and the next case gets new ones.
Every case has a process group of its own, which ends with it: the meshes of a case leave threads that ask for
work 100 times a second."""

from __future__ import annotations

import datetime
import gc
import json
import os
import pathlib
import sys
import time
import traceback
from multiprocessing import connection, get_context

import distributed_cases
import torch
import torch.distributed as dist
from helpers import poisoned

#: Seconds for a case, also on a busy machine, and for the other ranks after one has failed: they may fail
#: themselves.
LIMIT, GRACE = 600, 5


class Ranks:
    """Processes that run cases together."""

    def __init__(self, folder: pathlib.Path, count: int) -> None:
        self.folder, self.count, self.runs = folder, count, 0
        self.processes, self.links = [], []

    def start(self) -> None:
        fork = get_context("fork")
        pairs = [fork.Pipe() for _ in range(self.count)]
        for rank, (_, theirs) in enumerate(pairs):
            others = [end for pair in pairs for end in pair if end is not theirs]
            process = fork.Process(target=work, args=(theirs, others, rank, self.count))
            process.start()
            self.processes.append(process)
        for _, theirs in pairs:  # so that the end of a process is the end of its link
            theirs.close()
        self.links = [ours for ours, _ in pairs]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for link in self.links:
            link.close()
        self.processes, self.links = [], []

    def run(self, name: str, seed: int, limit: float = LIMIT) -> list[str]:
        """What each rank says of the case."""
        if not self.processes:
            self.start()
        self.runs += 1
        folder = self.folder / str(self.runs)
        folder.mkdir()
        said: dict[int, str] = {}
        until = time.monotonic() + limit
        for rank, link in enumerate(self.links):
            try:
                link.send((name, seed, folder))
            except OSError:
                said[rank] = "ended before the case began"
        while len(said) < self.count and (left := until - time.monotonic()) > 0:
            waiting = {link: rank for rank, link in enumerate(self.links) if rank not in said}
            for link in connection.wait(waiting, left):
                rank = waiting[link]
                try:
                    said[rank] = link.recv()
                except EOFError:
                    self.processes[rank].join(1)
                    said[rank] = f"the process ended with {self.processes[rank].exitcode}"
                if said[rank] != "ok":
                    until = min(until, time.monotonic() + GRACE)
        results = [said.get(rank, "did not come to an end") for rank in range(self.count)]
        if any(result != "ok" for result in results):
            self.end()
        return results


def work(link: connection.Connection, others: list, rank: int, ranks: int) -> None:
    """What a rank does until its link ends."""
    for end in others:
        end.close()
    os.dup2(2, 1)  # the standard output is for answers
    if distributed_cases.DEVICE == "cuda":
        torch.cuda.set_device(rank)
    while True:
        try:
            name, seed, folder = link.recv()
        except EOFError:
            os._exit(0)
        try:
            more = {**distributed_cases.FAULTS, **distributed_cases.SWEEPS}
            case = distributed_cases.CASES[ranks].get(name) or more[name]
            dist.init_process_group(
                "gloo" if distributed_cases.DEVICE == "cpu" else "cpu:gloo,cuda:nccl",
                init_method=f"file://{folder}/process_group",
                rank=rank,
                world_size=ranks,
                timeout=datetime.timedelta(seconds=300),
            )
            with poisoned():
                case(distributed_cases.World(folder / name, rank, ranks, seed))
            dist.barrier()  # no rank goes while another still needs it
            dist.destroy_process_group()
            gc.collect()  # of what refers to the groups in circles
            link.send("ok")
        except BaseException:
            link.send(traceback.format_exc())


def serve(ranks: Ranks) -> None:
    for line in sys.stdin:
        print(json.dumps(ranks.run(**json.loads(line))), flush=True)


def run_all(ranks: Ranks, seed: int, only: str) -> int:
    found: list[dict[str, str]] = [{} for _ in range(ranks.count)]
    for name in distributed_cases.CASES[ranks.count]:
        if only not in name or (distributed_cases.DEVICE == "cuda" and name in distributed_cases.FORKS):
            continue
        for rank, result in enumerate(ranks.run(name, seed)):
            found[rank][name] = result
            (ranks.folder / f"{rank}.json").write_text(json.dumps(found[rank]))
    return int(any(result != "ok" for cases in found for result in cases.values()))


def main(folder: str, count: str, seed: str | None = None, device: str = "cpu") -> int:
    distributed_cases.DEVICE = device
    torch.set_num_threads(1)  # a thread pool does not survive a fork
    # what is imported is left out when the ranks collect garbage, which would take longer than a case
    gc.freeze()
    ranks = Ranks(pathlib.Path(folder), int(count))
    try:
        if seed is None:
            serve(ranks)
            return 0
        return run_all(ranks, int(seed), os.environ.get("ZOKERNELS_CASES", ""))
    finally:
        ranks.end()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
