"""``python -m bench engines``: a generation's weight work in an engine, against es-at-scale's worker.

``--peer PATH`` names es-at-scale's file ``es_at_scale/utils/worker_extension.py``, or another with the same
class and methods; nothing of it is copied here.  Its worker and ours get the same weights, in one process, in
turns.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import math
import pathlib
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zokernels.integrations.engine import Piece, Weights, whole

from . import machine

SCHEMA = 1
SIGMA, ALPHA = 1e-3, 5e-4

Tensors = dict[str, Tensor]


def model(size: int, layers: int) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: (torch.randn(size, size, generator=generator) * 0.02).bfloat16()
    return {f"layers.{i}.weight": draw() for i in range(layers)}


def copied(tensors: Tensors) -> Tensors:
    return {name: t.clone() for name, t in tensors.items()}


class _Module(nn.Module):
    """Parameters by name, as vLLM's model has them."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self._named = {name: nn.Parameter(t, requires_grad=False) for name, t in tensors.items()}

    def named_parameters(self, *args: Any, **options: Any) -> Any:
        return iter(self._named.items())


class Peer:
    """A worker of es-at-scale over ``tensors``, which change in place."""

    def __init__(self, path: pathlib.Path, tensors: Tensors) -> None:
        spec = importlib.util.spec_from_file_location("peer_worker", path)
        if spec is None or spec.loader is None:
            raise SystemExit(f"--peer: expected a Python file, got {path}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._worker = module.WorkerExtension()
        self._worker.model_runner = types.SimpleNamespace(model=_Module(tensors))

    def perturb(self, seed: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it reports each call
            self._worker.perturb_self_weights(seed, SIGMA)

    def restore(self, seed: int) -> None:
        self._worker.restore_self_weights(seed, SIGMA)

    def update(self, seeds: list[int], coeffs: list[float]) -> None:
        self._worker.update_weights_from_seeds(seeds, coeffs, ALPHA, len(seeds))

    def generation(self, seeds: list[int], coeffs: list[float]) -> None:
        for seed in seeds:
            self.perturb(seed)
            self.restore(seed)
        self.update(seeds, coeffs)


class Ours:
    """The calls of :class:`Peer` on our weights.

    A member needs no restore, because the next one begins at theta.
    """

    def __init__(self, tensors: Tensors, dist: str, pieces: list[Piece] | None = None) -> None:
        self._weights = Weights(pieces or whole(tensors), tensors, dist=dist)

    def perturb(self, seed: int) -> None:
        self._weights.perturb([seed], [SIGMA])

    def restore(self, seed: int) -> None:
        self._weights.restore()

    def update(self, seeds: list[int], coeffs: list[float]) -> None:
        self._weights.update(seeds, [c * ALPHA / len(seeds) for c in coeffs])

    def generation(self, seeds: list[int], coeffs: list[float]) -> None:
        for seed in seeds:
            self.perturb(seed)
        self.update(seeds, coeffs)


Make = Callable[[Tensors], Any]


def _halves(tensors: Tensors, rank: int) -> Tensors:
    """The rows that rank ``rank`` of two has."""
    return {name: t.chunk(2)[rank].clone() for name, t in tensors.items()}


def half_pieces(tensors: Tensors, rank: int) -> list[Piece]:
    return [
        Piece(name, tuple(t.shape), name, 0, t.numel() // 2, rank * (t.numel() // 2), None)
        for name, t in tensors.items()
    ]


def changed(base: Tensors, after: Tensors) -> tuple[float, float]:
    """The share of weights that differ, and the root of their mean squared difference."""
    total = sum(t.numel() for t in base.values())
    count = sum(int((after[name] != t).sum()) for name, t in base.items())
    summed = sum(float((after[name].double() - t.double()).square().sum()) for name, t in base.items())
    return count / total, math.sqrt(summed / total)


def facts(
    base: Tensors, make: Make, of_rank: Callable[[Tensors, int], Any], seeds: list[int]
) -> dict[str, Any]:
    """What does not depend on the machine: drift, shared noise, and whether two ranks agree with one."""
    tensors = copied(base)
    worker = make(tensors)
    for seed in seeds:
        worker.perturb(seed)
        worker.restore(seed)
    share, rms = changed(base, tensors)
    zeros = {name: torch.zeros_like(t) for name, t in base.items()}
    make(zeros).perturb(seeds[0])
    pairs = list(itertools.combinations(zeros.values(), 2))
    alike = sum(torch.equal(a, b) for a, b in pairs)
    one, parts = copied(base), []
    make(one).perturb(seeds[0])
    for rank in range(2):
        half = _halves(base, rank)
        of_rank(half, rank).perturb(seeds[0])
        parts.append(half)
    two = {name: torch.cat([part[name] for part in parts]) for name in base}
    ranks = 1 - changed(one, two)[0]
    return {"changed": share, "rms": rms, "pairs": len(pairs), "pairs_alike": alike, "ranks_agree": ranks}


def measure(workers: dict[str, Any], seeds: list[int], rounds: int) -> dict[str, tuple[float, float]]:
    """The seconds of a generation's weight work of each worker, the best of ``rounds`` turns.

    They are those of the processor, which other programs on the machine do not lengthen, and by the clock."""
    coeffs = torch.linspace(-1, 1, len(seeds)).tolist()
    best = {name: (math.inf, math.inf) for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            cpu, clock = time.process_time(), time.perf_counter()
            worker.generation(seeds, coeffs)
            found = time.process_time() - cpu, time.perf_counter() - clock
            best[name] = min(best[name][0], found[0]), min(best[name][1], found[1])
    return best


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    base = model(args.size, args.layers)
    seeds = [1000 + k for k in range(args.population)]
    makes: dict[str, tuple[Make, Callable[[Tensors, int], Any]]] = {}
    if args.peer is not None:
        peer = lambda tensors, rank=0: Peer(args.peer, tensors)
        makes["peer"] = peer, peer
    for dist in ("normal", "rademacher"):
        makes[dist] = (
            lambda tensors, dist=dist: Ours(tensors, dist),
            lambda tensors, rank, dist=dist: Ours(tensors, dist, half_pieces(base, rank)),
        )
    seconds = measure({name: make(copied(base)) for name, (make, _) in makes.items()}, seeds, args.rounds)
    return [
        {"worker": name, "cpu_seconds": seconds[name][0], "seconds": seconds[name][1]}
        | facts(base, make, of_rank, seeds)
        | ({"speedup": seconds["peer"][0] / seconds[name][0]} if "peer" in seconds else {})
        for name, (make, of_rank) in makes.items()
    ]


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| worker | generation, CPU s | by the clock, s | against the peer |"
        " weights changed by perturb and restore | rms |"
        " pairs of layers with one noise | weights alike on 1 and 2 ranks |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    names = {"peer": "es-at-scale", "normal": "ours, normal", "rademacher": "ours, Rademacher"}
    for row in found:
        speedup = f"{row['speedup']:.1f}x" if "speedup" in row else ""
        lines.append(
            f"| {names[row['worker']]} | {row['cpu_seconds']:.2f} | {row['seconds']:.2f} | {speedup} |"
            f" {100 * row['changed']:.1f} % |"
            f" {row['rms']:.1e} | {row['pairs_alike']} of {row['pairs']} | {100 * row['ranks_agree']:.1f} % |"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peer", type=pathlib.Path, help="es-at-scale's worker_extension.py")
    parser.add_argument("--population", type=int, default=30, help="members of a generation (default 30)")
    parser.add_argument("--size", type=int, default=1024, help="rows and columns of a matrix (default 1024)")
    parser.add_argument("--layers", type=int, default=8, help="matrices (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="turns, of which the best counts (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="of torch and ours (default 1)")
    parser.add_argument("--tiny", action="store_true", help="small and short: whether it runs, not how fast")
    parser.add_argument("--json", type=pathlib.Path, help="write everything to this file")
    parser.set_defaults(call=run)


def run(args: argparse.Namespace) -> int:
    if args.tiny:
        args.population, args.size, args.layers, args.rounds = 4, 64, 3, 1
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        found = rows(args)
    finally:
        torch.set_num_threads(before)
    print(f"{args.layers} matrices of {args.size} x {args.size}, bf16, population {args.population}, "
          f"sigma {SIGMA}, {args.threads} threads\n")  # fmt: skip
    print(table(found))
    if args.json:
        options = {k: v for k, v in vars(args).items() if k not in ("call", "json", "peer")}
        result = {"schema": SCHEMA, "machine": machine.describe("cpu"), "options": options, "rows": found}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0
