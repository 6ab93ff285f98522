"""``python -m bench host``: whole steps in units of their own forwards, of models so small that the host is
the limit.

The least that a step can cost is its forwards.  What it takes beyond them is the passes over the weights,
which are short here, and work of the host: Python, checks, launches.  Each group of rows has one model and
one yardstick, in most cases two plain forwards.  The yardstick and the forms run in turns, one call each a
round, and a row states the ratios of the rounds: their median, and the 20th and 80th percentile.

* ``opt-host``: an OPT of 24 layers and 388 tensors, of width 16, on one sequence of 8 tokens.
* ``calls``: ``combine_`` of 388 tensors of one element each, and of one of them, in microseconds.
* ``mlp``, ``cnn``, ``gpt2``: the first models that a user tries (64-64-10; a network for the digits; GPT-2 of
  0.11 M), beside MeZO's eager loop, and once more as torch.compile makes them, against compiled forwards.
* ``minilm``, ``smollm2-fp32``, ``smollm2-bf16``: shapes of MiniLM-L6 and SmolLM2-135M, 4 x 64 tokens, where
  the weights' passes count; only where asked for.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zokernels
from zokernels.optim import ZOSGD

from . import machine
from .gpu.stage import replace
from .methods.eager import Eager
from .timing import quantiles, sample

Closure = Callable[[], Tensor]
Call = Callable[[], object]

#: Learning rates are so small that no model moves away from where it began.
STEP = {"lr": 1e-9, "eps": 1e-3, "seed": 20240229}


@dataclass(frozen=True)
class Case:
    """A model with its data, and the forms of a step to measure of it.

    ``forms``: names of :data:`FORMS`; ``goals``: the ratio that each should not exceed.
    """

    make: Callable[[], tuple[nn.Module, Closure]]
    forms: tuple[str, ...]
    goals: dict[str, float] = field(default_factory=dict)
    threads: int = 1
    forwards: int = 2
    compiled: bool = False
    asked: bool = False  #: measured only where it is named
    summary: str = ""


# --- models -----------------------------------------------------------------------------------------------


def _tokens(vocabulary: int, rows: int, length: int) -> Tensor:
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def _language_model(model: nn.Module, vocabulary: int, rows: int, length: int) -> tuple[nn.Module, Closure]:
    model, tokens = model.eval(), _tokens(vocabulary, rows, length)
    return model, lambda: model(input_ids=tokens, labels=tokens).loss


def opt_host() -> tuple[nn.Module, Closure]:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = dict(
        hidden_size=16, ffn_dim=64, num_hidden_layers=24, num_attention_heads=2, word_embed_proj_dim=16
    )
    config = OPTConfig(vocab_size=128, max_position_embeddings=64, dropout=0.0, **sizes)
    return _language_model(OPTForCausalLM(config), 128, 1, 8)


def gpt2() -> tuple[nn.Module, Closure]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    return _language_model(GPT2LMHeadModel(config), 128, 4, 64)


def minilm() -> tuple[nn.Module, Closure]:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)
    model, tokens = BertForSequenceClassification(BertConfig(**sizes)).eval(), _tokens(30522, 4, 64)
    return model, lambda: model(input_ids=tokens, labels=tokens[:, 0] % 2).loss


def smollm2(dtype: torch.dtype) -> tuple[nn.Module, Closure]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
    config = LlamaConfig(vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True, **sizes)
    return _language_model(LlamaForCausalLM(config).to(dtype), 49152, 4, 64)


def _classifier(model: nn.Module, *shape: int) -> tuple[nn.Module, Closure]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(*shape, generator=generator), torch.randint(0, 10, shape[:1], generator=generator)
    return model, lambda: F.cross_entropy(model(x), y)


def mlp() -> tuple[nn.Module, Closure]:
    return _classifier(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), 64, 64)


def cnn() -> tuple[nn.Module, Closure]:
    layers = (
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
    )
    return _classifier(nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)), 64, 1, 8, 8)


# --- forms of a step --------------------------------------------------------------------------------------


def _step(model: nn.Module, closure: Closure, **options: Any) -> Call:
    optimizer = ZOSGD(model.named_parameters(), **STEP, **options)
    return lambda: optimizer.step(closure)


# What one form alone needs is imported by it: `bench compare` runs this with older packages, too.
def _streamed(model: nn.Module, closure: Closure) -> Call:
    from zokernels import offload

    offload.stream(model, storage="device")
    return _step(model, closure)


def _lozo(model: nn.Module, closure: Closure) -> Call:
    from zokernels.optim import LOZO

    optimizer = LOZO(model.named_parameters(), **STEP)
    return lambda: optimizer.step(closure)


def _mezo(model: nn.Module, closure: Closure) -> Call:
    loop = Eager(list(model.named_parameters()), lr=STEP["lr"], eps=STEP["eps"])
    return lambda: loop.step(closure)


FORMS: dict[str, Callable[[nn.Module, Closure], Call]] = {
    "exact": lambda model, closure: _step(model, closure, restore="exact"),
    "inplace": lambda model, closure: _step(model, closure, restore="inplace"),
    "device": _streamed,
    "exact q=8": lambda model, closure: _step(model, closure, restore="exact", directions=8),
    "inplace q=8": lambda model, closure: _step(model, closure, restore="inplace", directions=8),
    "LOZO": _lozo,
    "MeZO": _mezo,
}

_SMALL = ("exact", "inplace", "MeZO")
_REAL = ("exact", "inplace", "LOZO", "MeZO")
_COMPILED = ("exact", "inplace")

CASES: dict[str, Case] = {
    "opt-host": Case(
        opt_host, ("exact", "inplace", "device"), {"exact": 1.2, "inplace": 1.1, "device": 1.25}
    ),
    "opt-host-q8": Case(opt_host, ("exact q=8", "inplace q=8"), {"exact q=8": 1.1}, forwards=16),
    "mlp": Case(mlp, _SMALL),
    "cnn": Case(cnn, _SMALL, {"exact": 1.3}),
    "gpt2": Case(gpt2, _SMALL, {"exact": 1.3}),
    "mlp-compiled": Case(mlp, _COMPILED, {"exact": 1.1}, compiled=True),
    "cnn-compiled": Case(cnn, _COMPILED, {"exact": 1.1}, compiled=True),
    "gpt2-compiled": Case(gpt2, _COMPILED, {"exact": 1.1}, compiled=True),
    "minilm": Case(minilm, _SMALL, asked=True),
    "smollm2-fp32": Case(lambda: smollm2(torch.float32), _REAL, {"exact": 1.15}, threads=2, asked=True),
    "smollm2-bf16": Case(lambda: smollm2(torch.bfloat16), _REAL, {"exact": 1.06}, threads=2, asked=True),
}

#: In a tiny run: what shows that everything runs.
TINY = ("opt-host", "mlp", "cnn", "gpt2", "mlp-compiled")

#: Microseconds that a call of combine_ on 388 tensors should not exceed.
CALL_GOAL = 60.0


# --- measuring --------------------------------------------------------------------------------------------


def _forwards(closure: Closure, count: int) -> Call:
    @torch.no_grad()
    def run() -> None:
        for _ in range(count):
            closure()

    return run


def _compile(model: nn.Module, tiny: bool) -> None:
    torch._dynamo.reset()
    model.compile(backend="eager" if tiny else "inductor")


def candidates(case: Case, tiny: bool = False) -> dict[str, Call]:
    """The yardstick, and each form with a model of its own, all of which begin with the same weights."""
    found: dict[str, Call] = {}
    for name in ("forwards", *case.forms):
        torch.manual_seed(0)
        model, closure = case.make()
        if case.compiled:
            _compile(model, tiny)
        found[name] = _forwards(closure, case.forwards) if name == "forwards" else FORMS[name](model, closure)
    return found


def rows_of(
    name: str, case: Case, seconds: float, least: int, tiny: bool = False
) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(case.threads)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a compiled model that runs uncompiled says so once
        samples = sample(candidates(case, tiny), "cpu", seconds, least)
    base = samples.pop("forwards")
    for form, times in samples.items():
        low, ratio, high = quantiles([t / b for t, b in zip(times, base, strict=True)])
        yield {
            "model": name, "form": form, "threads": case.threads, "forwards": case.forwards, "ratio": ratio,
            "low": low,
            "high": high, "goal": case.goals.get(form), "rounds": len(base),
            "seconds": quantiles(times)[1], "forwards_seconds": quantiles(base)[1],
        }  # fmt: skip


def calls(seconds: float, least: int) -> Iterator[dict[str, Any]]:
    """combine_ of 388 tensors, with a plan and without, and of one, in microseconds a call; a sample is
    several calls.
    """
    count, times = 388, 20
    torch.set_num_threads(1)
    tensors = [nn.Parameter(torch.ones(1)) for _ in range(count)]
    seeds, coeffs = torch.tensor([STEP["seed"]]), torch.tensor([1e-3])
    streams = list(range(count))
    forms: dict[str, Call] = {
        "list": lambda: zokernels.combine_(tensors, seeds, coeffs, streams=streams),
        "one tensor": lambda: zokernels.combine_(tensors[:1], seeds, coeffs, streams=[0]),
    }
    if hasattr(zokernels, "plan"):  # which packages of older commits lack
        kept = zokernels.plan(tensors, range(count))
        forms = {"plan": lambda: zokernels.combine_(kept, seeds, coeffs), **forms}

    def repeated(call: Call) -> Call:
        return lambda: [call() for _ in range(times)]

    samples = sample({name: repeated(call) for name, call in forms.items()}, "cpu", seconds, least)
    for form, found in samples.items():
        low, middle, high = (1e6 * value / times for value in quantiles(found))
        yield {
            "model": "calls", "form": form, "threads": 1, "microseconds": middle, "low": low, "high": high,
            "goal": CALL_GOAL if form == "plan" else None, "rounds": len(found),
        }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    goal = f"{row['goal']:7.2f}" if row["goal"] else f"{'':7}"
    if "microseconds" in row:
        spread = f"[{row['low']:.1f}, {row['high']:.1f}]"
        return f"{row['model']:14} {row['form']:12} {row['microseconds']:7.1f} us {spread:16} {goal}"
    spread = f"[{row['low']:.3f}, {row['high']:.3f}]"
    unit = f"x {row['forwards']} forwards of {1e3 * row['forwards_seconds'] / row['forwards']:.3g} ms"
    return f"{row['model']:14} {row['form']:12} {row['ratio']:7.3f}    {spread:16} {goal}  {unit}"


HEAD = f"{'model':14} {'form':12} {'ratio':>7}    {'20 to 80 %':16} {'goal':>7}"


def run(args: argparse.Namespace) -> int:
    names = args.model or (
        "calls",
        *(TINY if args.tiny else [name for name, c in CASES.items() if not c.asked]),
    )
    seconds, least = (0.0, 2) if args.tiny else (args.seconds, 7)
    print(f"{machine.title(machine.describe('cpu'))}\n\n{HEAD}\n{'-' * len(HEAD)}", flush=True)
    threads, rows = torch.get_num_threads(), []
    try:
        for name in names:
            if name == "calls":
                found = calls(min(seconds, 1.0), least)
            else:
                found = rows_of(name, CASES[name], seconds, least, args.tiny)
            for row in found:
                rows.append(row)
                print(line(row), flush=True)
    finally:
        torch.set_num_threads(threads)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"command": args.command_line, "machine": machine.describe("cpu"), "rows": rows}
        replace(args.json, json.dumps(result, indent=1) + "\n")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", nargs="+", choices=["calls", *CASES], help="default: all but minilm and smollm2"
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="of each model (default 6)")
    parser.add_argument(
        "--tiny", action="store_true", help="short, and nothing compiled: whether it runs, not how fast"
    )
    parser.add_argument("--json", type=pathlib.Path, help="write everything to this file")
    parser.set_defaults(call=run)
