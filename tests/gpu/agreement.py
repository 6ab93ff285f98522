"""Every backend of a device against the reference, bit for bit, on random calls: without pytest, so that it
runs anywhere and under compute-sanitizer.

    python tests/gpu/agreement.py [--device cuda] [--calls 40] [--max-size 5000] [--seed N] [--backend cuda
    triton]
                                  [--jobs 8]

Sizes from 0, any alignment, offsets, counts and roundings; memory around each parameter is compared too.
Exit: 0 all equal, 1 a difference.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import assert_same_bits, random_call, reference_result  # noqa: E402

import zokernels  # noqa: E402
from zokernels.backends.registry import NAMES  # noqa: E402

#: Faults after which a process gives up.
WRONG_AT_MOST = 3


def to_device(value, device: str):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def combine(rng: random.Random, backend: str, device: str, max_size: int) -> None:
    """combine_ in place, and combine out of place, which leaves theta alone."""
    buffers, parts, kwargs = random_call(rng, max_size=max_size)
    want = reference_result(buffers, parts, kwargs)
    moved = {k: to_device(v, device) for k, v in kwargs.items()}
    got, kept = ([b.to(device, copy=True) for b in buffers] for _ in range(2))
    outs = [b.clone() for b in kept]
    cut = lambda tensors: [t[p] for t, p in zip(tensors, parts, strict=True)]
    with zokernels.backend(backend):
        zokernels.combine_(cut(got), **moved)
        zokernels.combine(cut(outs), cut(kept), **moved)
    for a, b, c, d, e in zip(got, outs, want, kept, buffers, strict=True):
        assert_same_bits(a, c, f"combine_ {kwargs}")
        assert_same_bits(b, c, f"combine {kwargs}")
        assert_same_bits(d, e, f"combine wrote to theta {kwargs}")


def fan_out(rng: random.Random, backend: str, device: str, max_size: int) -> None:
    """fan_out_ against combine_ and two calls of combine by the reference."""
    buffers, parts, kwargs = random_call(rng, max_size=max_size)
    seed, coeff = rng.getrandbits(64), rng.gauss(0, 1)
    cut = lambda tensors: [t[p] for t, p in zip(tensors, parts, strict=True)]
    if not kwargs["seeds"].numel() and kwargs["decay"] is None:
        want = [b.clone() for b in buffers]
    else:
        want = reference_result(buffers, parts, kwargs)
    same = {k: kwargs[k] for k in ("streams", "offsets", "dist")}
    sides = [[b.clone() for b in buffers] for _ in range(2)]
    with zokernels.backend("reference"):
        for side, sign in zip(sides, (1.0, -1.0), strict=True):
            zokernels.combine(cut(side), cut(want), seed, sign * coeff, **same)
    theta, plus, minus = ([b.to(device, copy=True) for b in buffers] for _ in range(3))
    moved = {k: to_device(v, device) for k, v in kwargs.items()}
    with zokernels.backend(backend):
        zokernels.fan_out_(cut(theta), cut(plus), cut(minus), seed, coeff, **moved)
    all_three = zip(("theta", "plus", "minus"), (theta, plus, minus), (want, *sides), strict=True)
    for name, got, expected in all_three:
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b, f"fan_out_ {name} {kwargs}")


def backends_of(device: str) -> list[str]:
    found = []
    for name in NAMES:
        try:
            if name != "reference" and device in zokernels.backends.get(name).devices:
                found.append(name)
        except zokernels.BackendUnavailable as error:
            print(f"skipped: {error}")
    return found


def check(backend: str, args: argparse.Namespace) -> int:
    """The calls of this process, one in ``args.jobs``; returns how many went wrong.  Every exception is
    reported, and the next call tried: after a fault of the device itself all that follow fail, so a few are
    enough.
    """
    wrong, calls = 0, range(args.part, args.calls, args.jobs)
    for call in calls:
        try:
            # Of its own seed, so that a call is the same in whichever process it runs
            rng = random.Random(f"{args.seed} {call}")
            (fan_out if call % 3 == 2 else combine)(rng, backend, args.device, args.max_size)
            if args.device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            wrong += 1
            print(f"{backend}: call {call}: {type(error).__name__}: {str(error)[:2000]}")
            if not isinstance(error, AssertionError):
                traceback.print_exc(file=sys.stdout)
            if wrong == WRONG_AT_MOST:
                break
    if not wrong:
        print(f"{backend}: {len(calls)} calls equal the reference bit for bit", flush=True)
    return wrong


def in_processes(backend: str, args: argparse.Namespace) -> int:
    """The same calls in ``args.jobs`` processes: what takes the time is a compilation for each call."""
    command = [
        sys.executable,
        __file__,
        "--device",
        args.device,
        "--backend",
        backend,
        "--seed",
        str(args.seed),
    ]
    command += ["--calls", str(args.calls), "--max-size", str(args.max_size), "--jobs", str(args.jobs)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    jobs = [subprocess.Popen([*command, "--part", str(part)], **pipes) for part in range(args.jobs)]
    wrong = 0
    with ThreadPoolExecutor(args.jobs) as pool:  # so that none waits with a full pipe for those before it
        for part, text in enumerate(pool.map(lambda job: job.communicate()[0], jobs)):
            if code := jobs[part].returncode:
                wrong += 1
                print(f"{text}\n{backend}: process {part} of {args.jobs} ended with {code}", flush=True)
    if not wrong:
        print(
            f"{backend}: {args.calls} calls equal the reference bit for bit, in {args.jobs} processes",
            flush=True,
        )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--backend", nargs="+", choices=NAMES, help="default: all; each must then load")
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--max-size", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(6), "little"))
    parser.add_argument("--jobs", type=int, default=1, help="processes for each backend")
    parser.add_argument("--part", type=int, help="be one of these processes, from 0")
    args = parser.parse_args()
    print(f"repeat with --seed {args.seed}", flush=True)
    names = args.backend or backends_of(args.device)
    if not names:
        print(f"no compiled backend for {args.device}")
        return 1
    split = args.jobs > 1 and args.part is None
    args.part = args.part or 0
    # All of them, also after one has failed: cuda first, since the last names are the compiled ones
    return int(any([(in_processes if split else check)(name, args) for name in reversed(names)]))


if __name__ == "__main__":
    sys.exit(main())
