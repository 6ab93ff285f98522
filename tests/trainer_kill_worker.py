"""A ZOTrainer run from disk, with Adam, that is killed again and again (test_transformers_runs.py).

Arguments: FOLDER KILLS SEED.

One process forks a child for each attempt, kills it with SIGKILL after a random time, and lets the last one
finish.  Each child goes on from the last whole checkpoint, which the folder of the run has often passed.
Prints the number of children that were killed.
"""

from __future__ import annotations

import pathlib
import random
import shutil
import sys
import time

import forked
import torch
import transformers
from hf_cases import opt, rows, same, trainer, weights

from zokernels.optim import ZOAdamW

STEPS = 12


def train(place: pathlib.Path, offload: dict | None, **options: object) -> None:
    """Trains, from the last checkpoint on where there is one."""
    own = {"optimizer_cls_and_kwargs": (ZOAdamW, {}), "offload": offload}
    options = {
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 3,
        "learning_rate": 1e-3,
        **options,
    }
    made = trainer(place, opt(), rows(12), own=own, **options)
    begun = offload is not None and any(place.glob("checkpoint-*/trainer_state.json"))
    if offload is not None and not begun:
        shutil.rmtree(offload["path"], ignore_errors=True)
    made.train(resume_from_checkpoint=begun)
    if made.engine is not None:
        made.engine.close()


def attempt(place: pathlib.Path, offload: dict, seconds: float | None) -> bool:
    """Whether the child was killed."""

    def wait(child: int) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and forked.end_of(child) is None:
            time.sleep(1e-3)

    return forked.attempt(lambda: train(place, offload), None if seconds is None else wait)


def main(folder: str, kills: str, seed: str) -> None:
    torch.set_num_threads(1)  # a thread pool does not survive a fork
    rng, place = random.Random(int(seed)), pathlib.Path(folder)
    opt().save_pretrained(place / "base")
    begin = time.monotonic()
    train(place / "memory", None)
    longest = time.monotonic() - begin
    final = f"checkpoint-{STEPS}"
    of = lambda name: weights(transformers.OPTForCausalLM.from_pretrained(place / name / final))
    expected, killed, passed = of("memory"), 0, 0
    offload = {"storage": "disk", "weights": place / "base", "path": place / "run", "slots": 2}
    ours = place / "ours"
    ours.mkdir()
    while killed < int(kills) or not passed:
        before = sum(1 for _ in ours.glob("checkpoint-*"))
        if attempt(ours, offload, longest * rng.uniform(0.2, 1)):
            killed += 1
            # A later attempt begins behind a checkpoint, or the run was killed before its first.
            passed += bool(before)
            longest *= 1.3 if sum(1 for _ in ours.glob("checkpoint-*")) == before else 0.95
        else:
            longest *= 0.8
            assert same(of("ours"), expected)
            for path in ours.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    attempt(ours, offload, None)
    assert same(of("ours"), expected)
    print(killed)


if __name__ == "__main__":
    main(*sys.argv[1:])
