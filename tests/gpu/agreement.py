"""Every backend of a device against the reference, bit for bit, on random calls: without pytest, so that it runs
anywhere and under compute-sanitizer.

    python tests/gpu/agreement.py [--device cuda] [--calls 40] [--max-size 5000] [--seed N] [--backend cuda triton]

Sizes from 0, any alignment, offsets, counts and roundings; memory around each parameter is compared too.  Exit: 0 all
equal, 1 a difference.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import assert_same_bits, random_call, reference_result  # noqa: E402

import zokernels  # noqa: E402
from zokernels.backends.registry import NAMES  # noqa: E402


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
    for name, got, expected in zip(("theta", "plus", "minus"), (theta, plus, minus), (want, *sides), strict=True):
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--backend", nargs="+", choices=NAMES, help="default: all of the device; each must then load")
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--max-size", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(6), "little"))
    args = parser.parse_args()
    print(f"repeat with --seed {args.seed}", flush=True)
    names = args.backend or backends_of(args.device)
    if not names:
        print(f"no compiled backend for {args.device}")
        return 1
    for backend in names:
        rng = random.Random(args.seed)
        for call in range(args.calls):
            try:
                (fan_out if call % 3 == 2 else combine)(rng, backend, args.device, args.max_size)
            except AssertionError as error:
                print(f"{backend}: call {call}: {error}")
                return 1
        if args.device == "cuda":
            torch.cuda.synchronize()
        print(f"{backend}: {args.calls} calls equal the reference bit for bit", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
