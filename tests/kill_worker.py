"""A training run that is killed again and again (test_trajectory_file.py): ``kill_worker.py FOLDER KILLS
SEED``.

One process forks a child for each attempt, kills it with SIGKILL once the log has grown by a random number of
bytes and a random time has passed, and lets the last one finish.  After one that came to the end the log
begins anew."""

from __future__ import annotations

import pathlib
import random
import sys
import time

import forked
import torch

from zokernels.optim import ZOSGD

STEPS = 500


def train(log: pathlib.Path | None, out: pathlib.Path) -> None:
    torch.manual_seed(3)
    model = torch.nn.Linear(40, 3).bfloat16()
    options = {"trajectory": log, "resume": True} if log else {}
    optimizer = ZOSGD(model.named_parameters(), lr=1e-2, weight_decay=0.01, seed=9, **options)
    while (step := optimizer.step_count) < STEPS:
        x = torch.randn(2, 40, generator=torch.Generator().manual_seed(step)).bfloat16()
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step % 7)
        optimizer.step(lambda: model(x).float().square().sum())  # noqa: B023
    torch.save(model.state_dict(), out)


def attempt(log: pathlib.Path, out: pathlib.Path, rng: random.Random | None) -> bool:
    """Whether the child was killed."""
    size = lambda: log.stat().st_size if log.exists() else 0
    begin = size()

    def wait(child: int) -> None:
        target = begin + rng.randrange(60)
        while size() < target and forked.end_of(child) is None:
            pass
        time.sleep(rng.random() * 2e-3)

    return forked.attempt(lambda: train(log, out), None if rng is None else wait)


def main(folder: str, kills: str, seed: str) -> None:
    torch.set_num_threads(1)  # a thread pool does not survive a fork
    rng, place = random.Random(int(seed)), pathlib.Path(folder)
    train(None, place / "whole.pt")
    train(place / "recorded.zk", place / "recorded.pt")  # what is imported and loaded now, no child waits for
    log, killed = place / "run.zk", 0
    while killed < int(kills):
        if attempt(log, place / "killed.pt", rng):
            killed += 1
        else:  # on a fast machine it gets to the end sooner: that was a whole run, and the next begins anew
            same(place)
            log.unlink()
    attempt(log, place / "killed.pt", None)
    same(place)
    print(killed)


def same(place: pathlib.Path) -> None:
    """The weights at the end are those of the run that nobody killed."""
    killed, whole = (torch.load(place / f"{name}.pt", weights_only=True) for name in ("killed", "whole"))
    for name in whole:
        if not torch.equal(killed[name].view(torch.int16), whole[name].view(torch.int16)):
            raise SystemExit(f"{name} differs")


if __name__ == "__main__":
    main(*sys.argv[1:])
