"""``python -m bench population``: members of a population in one forward, against plain inference of the same
batch and against the dense form; and steps whose two forwards make no perturbed weights.

The model has the shapes of SmolLM2-135M, with weights drawn at random.  What is compared runs in turns, one
call each a round, and a row states the ratios of the rounds: their median, and the 20th and 80th percentile.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokernels.optim import EGGROLL, LOZO, Cohort, SubZero, TeZO

from . import machine
from .gpu.stage import replace
from .timing import quantiles

#: (width, MLP, heads, key and value heads, vocabulary) of SmolLM2-135M, which has 30 layers.
_SHAPES = (576, 1536, 9, 3, 49152)
_TINY = (32, 48, 2, 1, 96)
#: So small that no weight moves away from where it began.
_RATE = 1e-12
#: What a ratio should be at least, by rank; of the other rows below.
_GOALS = {1: 0.91, 4: 0.88, 16: 0.80}


def _model(shapes: tuple[int, ...], layers: int, device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, mlp, heads, kv_heads, vocabulary = shapes
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(device, torch.bfloat16).eval()


def _ratios(rounds: int, calls: dict[str, Callable[[], object]], device: str) -> dict[str, list[float]]:
    """The seconds of each call in each round."""

    def seconds(call: Callable[[], object]) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for call in calls.values():
        call()  # what is made once
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(seconds(call))
    return found


class _Still:
    """A step without its update."""

    def update(self, probe: object, estimate: object) -> None:
        pass


#: Methods whose steps are timed with their updates.
_METHODS = (
    ("LOZO, r = 4", LOZO, {"rank": 4}),
    ("SubZero, r = 8", SubZero, {"rank": 8}),
    ("TeZO, r = 8", TeZO, {"rank": 8}),
    ("EGGROLL, N = 8, r = 1", EGGROLL, {"rank": 1, "directions": 4}),
)


class _StillEGGROLL(_Still, EGGROLL): ...  # type: ignore[misc]


class _StillLOZO(_Still, LOZO): ...  # type: ignore[misc]


class _Forward:
    """One forward of a model, as a closure of each kind."""

    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        self.model, self.tokens = model, tokens

    def losses(self, tokens: Tensor) -> Tensor:
        """The mean loss of each row."""
        logits = self.model(input_ids=tokens).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        return losses.view(len(tokens), -1).mean(1)

    def one(self) -> Tensor:
        return self.losses(self.tokens).mean()

    def batched(self, cohort: Cohort) -> Tensor:
        return cohort.mean(self.losses(cohort.repeat(self.tokens)))

    @torch.no_grad()
    def plain(self, rows: int) -> Tensor:
        return self.losses(self.tokens.repeat(rows, 1))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    shapes, layers = (_TINY, 2) if args.tiny else (_SHAPES, args.layers)
    model, rows = _model(shapes, layers, args.device), []
    named = lambda: model.named_parameters()
    tokens = torch.randint(0, shapes[-1], (1, args.tokens), device=args.device)
    forward = _Forward(model, tokens)

    def add(name: str, times: list[float], base: list[float], goal: float | None, at_least: bool) -> None:
        values = [b / t if at_least else t / b for t, b in zip(times, base, strict=True)]
        low, middle, high = quantiles(values)
        row = {"row": name, "ratio": middle, "p20": low, "p80": high, "goal": goal, "at_least": at_least}
        rows.append({**row, "seconds": quantiles(times)[1]})
        asked = "" if goal is None else f"{'at least' if at_least else 'at most'} {goal}"
        print(f"| {name} | {middle:.3f} ({low:.3f} to {high:.3f}) | {asked} |", flush=True)

    print("| | ratio (20th to 80th percentile) | goal |\n|---|--:|--:|")
    members = args.members
    for rank in args.ranks:
        options = {"rank": rank, "directions": members // 2}
        batched = _StillEGGROLL(named(), _RATE, 1e-3, restore="products", **options)
        calls: dict[str, Callable[[], object]] = {
            "plain": lambda: forward.plain(members),
            "population": lambda o=batched: _forwards(o, forward.batched, True),
        }
        if rank == args.ranks[0]:
            dense = _StillEGGROLL(named(), _RATE, 1e-3, **options)
            calls["dense"] = lambda o=dense: _forwards(o, forward.one, False)
        times = _ratios(args.rounds, calls, args.device)
        name = f"{members} members, {args.tokens} tokens each, rank {rank}: tokens/s in units"
        add(f"{name} of plain inference", times["population"], times["plain"], _GOALS.get(rank), True)
        if "dense" in calls:
            add(f"{name} of the dense form", times["population"], times["dense"], 5.0, True)
    sample = _Forward(model, torch.randint(0, shapes[-1], (4, args.tokens * 4), device=args.device))
    for restore in ("products", "exact"):
        lozo = _StillLOZO(named(), _RATE, 1e-3, rank=4, restore=restore)
        calls = {
            "plain": lambda: (sample.plain(1), sample.plain(1)),
            "step": lambda o=lozo: _forwards(o, sample.one, False),
        }
        times = _ratios(args.rounds, calls, args.device)
        add(
            f"LOZO, r = 4, {restore!r}: forwards of a step / two forwards",
            times["step"],
            times["plain"],
            1.08 if restore == "products" else None,
            False,
        )
    for name, method, options in _METHODS:
        calls = {}
        for restore in ("products", "exact"):
            optimizer = method(named(), _RATE, 1e-3, restore=restore, **options)
            calls[restore] = lambda o=optimizer: _forwards(o, sample.one, False)
        times = _ratios(args.rounds, calls, args.device)
        add(f"{name}: 'exact' / 'products', whole steps", times["products"], times["exact"], None, True)
    hidden, mlp = shapes[:2]
    factors = 4 * members * (hidden + mlp) * max(args.ranks)
    print(f"\nfactors of the largest matrix, all members, rank {max(args.ranks)}: {factors / 1e6:.1f} MB")
    return rows


def _forwards(optimizer: Any, closure: Any, batched: bool) -> None:
    optimizer.step(closure, batched=True) if batched else optimizer.step(closure)


def add_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--members", type=int, default=32, help="of the population (32)")
    sub.add_argument("--tokens", type=int, default=16, help="of each member (16)")
    sub.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 16], help="1 4 16")
    sub.add_argument("--layers", type=int, default=30, help="of the model (30)")
    sub.add_argument("--rounds", type=int, default=5, help="calls of each form (5)")
    sub.add_argument("--threads", type=int, default=2, help="on the CPU (2)")
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    sub.add_argument("--tiny", action="store_true", help="whether it runs, not how fast")
    sub.add_argument("--json", type=pathlib.Path, help="write everything to this file")
    sub.set_defaults(call=run)


def run(args: argparse.Namespace) -> int:
    if args.members < 2 or args.members % 2:
        raise SystemExit(f"--members: expected an even number, got {args.members}")
    torch.set_num_threads(args.threads)
    header = machine.describe(args.device)
    print(f"`{args.command_line}` on {machine.title(header)}\n")
    rows = measure(args)
    if args.json is not None:
        result = {"kind": "population", "command": args.command_line, "machine": header, "rows": rows}
        replace(args.json, json.dumps(result, indent=1) + "\n")
    return 0
