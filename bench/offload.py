"""``python -m bench offload``: a streamed step against what bounds it, each measured alone in the same run.

The bound of a step is the longest of its transfers, its computation, and the CPU time of both, divided among
the cores.  Transfers are read (and written)
block by block without a forward; the computation is a step of the same optimizer whose blocks stay on the
device.  A form is what is trained and how: plain SGD, Adam with its moments, masks, low rank, quantised
layers, a cache in front of the disk."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokernels import noise, offload, stream_of
from zokernels.optim import LOZO, QZO, ZOSGD, QuZO, RandomMask, SparseMeZO, ZOAdamW
from zokernels.quantize import QuantizedLinear, named_integers, named_scales
from zokernels.step.step import StepOptimizer

from . import machine
from .gpu.stage import replace
from .registry import Row

SCHEMA = 1
#: Layers, width and vocabulary of each model.  A layer has 12 width^2 weights.
SHAPES = {
    "tiny": (6, 64, 512),
    "256m": (20, 1024, 4096),
    "opt-1.3b": (24, 2048, 50272),
    "opt-13b": (40, 5120, 50272),
    "opt-30b": (48, 7168, 50272),
    "opt-66b": (64, 9216, 50272),
    "opt-175b": (96, 12288, 50272),
}
_TOKENS = 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


_STEP = {"lr": 1e-7, "eps": 1e-3}
_STORED = ("host", "disk, written")


class Form(NamedTuple):
    """What is trained, and how."""

    #: Makes the optimizer of a model, given the arguments that all of them take.
    optimizer: Callable[..., StepOptimizer]
    storages: tuple[str, ...] = _STORED  #: where it is measured
    linear: type[nn.Module] = nn.Linear  #: of which layers are made
    cached: float = 0.0  #: share of the blocks of which host memory holds copies
    master: torch.dtype | None = None  #: the dtype in which fp32 weights are kept


def _named(kind: Callable[..., StepOptimizer], **fixed: Any) -> Callable[..., StepOptimizer]:
    """An optimizer of all parameters."""
    return lambda model, **options: kind(model.named_parameters(), **(_STEP | fixed | options))


#: By name.  Storage that is only read begins with states at their first values and takes every update again,
#: so forms with states are not measured there.
FORMS = {
    "sgd": Form(_named(ZOSGD), ("device", "host", "disk", "disk, written")),
    "adam": Form(_named(ZOAdamW)),
    "adam, bf16 states": Form(_named(ZOAdamW, state_dtype=torch.bfloat16)),
    "sparse-mezo": Form(_named(SparseMeZO)),
    "random mask": Form(_named(ZOSGD, direction=RandomMask(0.25))),
    "lozo": Form(_named(LOZO)),
    "qzo": Form(
        lambda model, **options: QZO(named_scales(model), **_STEP, **options), linear=QuantizedLinear
    ),
    "quzo": Form(
        lambda model, **options: QuZO(named_integers(model), lr=1e-3, eps=1.0, **options),
        linear=QuantizedLinear,
    ),
    "bf16 master": Form(_named(ZOSGD), master=torch.bfloat16),
    "cache": Form(_named(ZOSGD), ("disk", "disk, written"), cached=0.5),
}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, linear: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )


class FeedForward(nn.Module):
    def __init__(self, width: int, linear: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            linear(width, 4 * width),
            linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu_())


class Layer(nn.Module):
    """A decoder block of OPT's shape."""

    def __init__(self, width: int, heads: int, linear: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(width, heads, linear), FeedForward(width, linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(self.attention(x))


class Decoder(nn.Module):
    def __init__(self, layers: int, width: int, vocabulary: int, linear: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, max(1, width // 128), linear) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.norm(x)[:, :-1].flatten(0, 1), self.embed.weight)
        pieces = zip(logits.split(_TOKENS), ids[:, 1:].flatten().split(_TOKENS), strict=True)
        # The loss is computed in pieces, because the fp32 logits of 2,048 tokens and 50,272 words are 412 MB,
        # and their softmax is as much again.
        return sum(F.cross_entropy(a.float(), b, reduction="sum") for a, b in pieces) / len(logits)

    def blocks(self, halves: bool) -> list[nn.Module]:
        """The layers, or the two halves of each, for which smaller slots are enough."""
        return [m for layer in self.layers for m in (layer.children() if halves else [layer])]


def fill(name: str, p: Tensor) -> None:
    """Fills a weight with 0.02 times the noise of its own stream, repeated as often as needed.

    Norms get 1 more.  Integers get 30 times the noise, and their scales are such that they stand for the
    same weights.
    """
    with torch.no_grad():
        flat = p.view(-1)
        if name.endswith("scale"):
            flat.fill_(0.02 / 30)
            return
        part = 0.02 * noise(min(flat.numel(), 1 << 22), seed=1, stream=stream_of(name))
        if p.dtype is torch.int8:
            part = (30 / 0.02 * part).round_().clamp_(-127, 127)
        part = (part + 1 if "norm" in name and name.endswith("weight") else part).to(p.dtype)
        for to in flat.split(len(part)):
            to.copy_(part[: len(to)])


def build(
    shape: str, dtype: torch.dtype, layers: int | None = None, linear: type[nn.Module] = nn.Linear
) -> Decoder:
    """A model of at most ``layers`` layers, without memory for its weights."""
    count, *rest = SHAPES[shape]
    with offload.empty_weights():
        return Decoder(min(count, layers or count), *rest, linear).to(dtype)


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _in_memory(args: argparse.Namespace) -> Decoder:
    """The plain model on the device."""
    model = build(args.shape, DTYPES[args.dtype], args.layers)
    for prefix, module in model.named_modules():
        for key, p in module._parameters.items():
            fill(f"{prefix}.{key}", value := torch.empty(p.shape, dtype=p.dtype))
            module._parameters[key] = nn.Parameter(value.to(args.device))
    return model


def _bytes_of(args: argparse.Namespace) -> tuple[int, int]:
    """The bytes of the weights of one layer, and of all that is no layer."""
    model = build(args.shape, DTYPES[args.dtype], 1)
    size = lambda module: sum(p.numel() * p.element_size() for p in module.parameters())
    return size(model.layers[0]), size(model) - size(model.layers[0])


def _layers_that_fit(args: argparse.Namespace) -> int:
    """How many layers fit into six tenths of the host's free memory."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(SHAPES[args.shape][0], int(0.6 * free) // _bytes_of(args)[0]))


def _fits(args: argparse.Namespace) -> bool:
    """Whether the device can hold all weights and has room for a forward."""
    if args.device == "cpu":
        return True
    layer, rest = _bytes_of(args)
    needed = layer * min(SHAPES[args.shape][0], args.layers) + 4 * rest + 4 * layer
    return needed < 0.8 * torch.cuda.mem_get_info()[0]


class Cost(NamedTuple):
    """The time that something takes, or a point of time."""

    seconds: float
    cpu: float  #: seconds of all threads of this process

    @classmethod
    def now(cls) -> Cost:
        return cls(time.perf_counter(), time.process_time())

    def since(self, begin: Cost) -> Cost:
        return Cost(*(after - before for after, before in zip(self, begin, strict=True)))


def _median(costs: Iterable[Cost]) -> Cost:
    return Cost(*map(statistics.median, zip(*costs, strict=True)))


def _times(model: nn.Module, args: argparse.Namespace, form: Form) -> Iterator[Cost]:
    """The time of each step."""
    device = torch.device(args.device)
    ids = torch.randint(SHAPES[args.shape][2], (args.batch, args.length), device=device)
    optimizer = form.optimizer(model, dist=args.dist)
    for _ in range(args.steps + 2):
        start = Cost.now()
        loss = optimizer.step(lambda: model(ids))
        _sync(device)
        yield Cost.now().since(start)
    if not loss.isfinite():
        raise SystemExit("bench offload: the loss is not finite")


def _steps(model: nn.Module, args: argparse.Namespace, form: Form) -> Cost:
    """The median of a step, without the first two."""
    return _median(list(_times(model, args, form))[2:])


def _transfers(engine: offload.Engine, work: Callable) -> Cost:
    """What ``work`` takes for all blocks, of the faster of two rounds."""
    times = []
    for _ in range(2):
        start = Cost.now()
        for i, block in enumerate(engine.blocks):
            work(block, engine.buffers[i % len(engine.buffers)])
        _sync(engine.device)
        times.append(Cost.now().since(start))
    return min(times)


def _alone(base: pathlib.Path | None, args: argparse.Namespace, form: Form) -> Cost:
    """A step whose blocks stay on the device; nothing where they do not fit there.

    Also writes the checkpoint ``base``.  Of weights that are kept in another dtype, the step is that of
    their fp32 copies alone.
    """
    make = lambda dtype: build(args.shape, dtype, args.layers, form.linear)
    dtype, given = DTYPES[args.dtype], {"device": args.device, "weights": fill}
    if base is not None:
        with offload.stream(make(form.master or dtype), "layers", "host", **given) as engine:
            engine.save(base)
    if not _fits(args):
        return Cost(0.0, 0.0)
    with offload.stream(model := make(dtype), "layers", "device", **given):
        return _steps(model, args, form)


def _plain_copy(nbytes: int, device: torch.device) -> float:
    """Seconds in which plain copies move ``nbytes`` to the device, from pinned memory for a GPU: the best of
    four.
    """
    size = min(nbytes, 1 << 30)
    source = torch.ones(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target, times = torch.empty(size, dtype=torch.uint8, device=device), []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        _sync(device)
        times.append(time.perf_counter() - start)
    return min(times[1:]) * nbytes / size


def _measure(
    name: str,
    storage: str,
    base: pathlib.Path,
    folder: pathlib.Path,
    args: argparse.Namespace,
    compute: Cost,
) -> Row:
    """One row: the form of that name in ``storage``."""
    dtype, device, form = DTYPES[args.dtype], torch.device(args.device), FORMS[name]
    disk, written = storage.startswith("disk"), storage == "disk, written"
    model = build(args.shape, dtype, args.layers, form.linear)
    blocks = model.blocks(args.halves)
    options: dict[str, Any] = {"slots": args.slots, "scratch": args.scratch, "device": args.device}
    options["master"] = form.master
    if disk:
        options |= {"storage": "disk", "weights": base, "path": folder if written else None}
        options["cache"] = int(form.cached * sum(p.nbytes for p in model.layers.parameters()))
    else:
        options |= {"storage": storage, "weights": fill}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    sizes: dict[str, Any] = {"slots": args.slots, "scratch": args.scratch, "master": form.master}
    planned = offload.footprint(model, blocks, **sizes).total
    with offload.stream(model, blocks, **options) as engine:
        step = _steps(model, args, form) if written or not disk else _read_only(engine, model, args, form)
        row: Row = {"form": name, "storage": storage, "shape": args.shape, "dtype": args.dtype}
        row |= {"layers": len(model.layers), "step": step.seconds, "compute": compute.seconds}
        row |= {"read": 0.0, "write": 0.0}
        alone = compute.cpu  # CPU seconds of all that a step does, each alone
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        if storage != "device":
            engine.flush()
            moved = read = _transfers(engine, engine.mover.copy_in)
            if written or storage == "host":
                moved = _transfers(engine, engine.mover.copy_out)  # which reads as well
            row |= {"read": read.seconds, "write": moved.seconds - read.seconds}
            alone += moved.cpu
        nbytes = sum(b.nbytes for b in engine.blocks)
    row["gib"] = nbytes / 2**30
    if storage == "host":
        row["plain_copy"] = _plain_copy(nbytes, device)
        row["of_plain_copy"] = row["plain_copy"] / row["read"]
    # The link of a GPU carries data in both directions at once.  A disk and the memory of this machine do
    # not.
    transfer = (
        max(row["read"], row["write"]) if device.type == "cuda" and not disk else row["read"] + row["write"]
    )
    row["bound"] = max(transfer, compute.seconds)  # compute is 0 where the model does not fit the device
    if device.type == "cpu":
        row["bound"] = max(row["bound"], alone / len(os.sched_getaffinity(0)))
        row["cpu"], row["of_cpu"] = step.cpu, step.cpu / alone
    row["ratio"] = step.seconds / row["bound"]
    row["tokens_per_second"] = args.batch * args.length / step.seconds
    if storage != "device" and not engine.has_states:
        row["planned_memory"] = planned  # activations are not counted
    if device.type == "cuda":
        row["device_memory"] = peak
    return row


def _read_only(engine: offload.Engine, model: nn.Module, args: argparse.Namespace, form: Form) -> Cost:
    """Steps with a log of one update at a time: what a run's log adds to each step is measured by ``bench
    run``.
    """
    times = []
    for cost in _times(model, args, form):
        times.append(cost)
        engine.history.restart(engine.history.end)
        for block in engine.blocks:
            block.stored = block.kept = engine.history.end
    return _median(times[2:])


def _number(row: Row, key: str, form: str, scale: float = 1.0) -> str:
    return format(row[key] * scale, form) if row.get(key) else "-"


#: The columns of the table: the head of each, and what of a row stands below it.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "storage": lambda r: r["storage"],
    "form": lambda r: r.get("form", "sgd"),
    "step s": lambda r: _number(r, "step", ".3f"),
    "compute": lambda r: _number(r, "compute", ".3f"),
    "read": lambda r: _number(r, "read", ".3f"),
    "write": lambda r: _number(r, "write", ".3f"),
    "bound": lambda r: _number(r, "bound", ".3f"),
    "ratio": lambda r: _number(r, "ratio", ".2f"),
    "of CPU": lambda r: _number(r, "of_cpu", ".2f"),
    "tokens/s": lambda r: _number(r, "tokens_per_second", ".0f"),
    "of copy": lambda r: _number(r, "of_plain_copy", ".2f"),
    "of memory": lambda r: _number(r, "of_in_memory", ".2f"),
    "device GB": lambda r: _number(r, "device_memory", ".2f", 1e-9),
}
LEGEND = (
    "ratio: step over bound, the longer of transfers and computation, each alone; of CPU: CPU time of the "
    "step against that of both alone; of copy: rate of "
    "the read against "
    "plain copies of the same bytes; of memory: tokens a second against the same model in memory."
)


def _width(head: str) -> int:
    return {"storage": 13, "form": 17}.get(head, max(8, len(head)))


def heading(row: Row) -> str:
    """What a row is of.  (Form and storage are columns.)"""
    return f"{row['shape']}, {row['layers']} layers, {row['dtype']}"


def run(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device")
    if args.tiny:
        args.shape, args.length, args.steps = "tiny", 16, 2
        torch.set_num_threads(1)  # products this small only wait for one another
    if args.device == "cuda" and args.layers is None:
        args.layers = _layers_that_fit(args)
    torch.manual_seed(0)
    header, start, rows = machine.describe(args.device), time.perf_counter(), []
    settings = {k: v for k, v in vars(args).items() if isinstance(v, (int, str, float, list))}

    def save() -> None:
        if args.json:
            result = {"schema": SCHEMA, "kind": "offload", "command": args.command_line, "machine": header}
            result |= {"settings": settings, "rows": rows}
            args.json.parent.mkdir(parents=True, exist_ok=True)
            replace(args.json, json.dumps(result, indent=1) + "\n")

    print(
        f"{machine.title(header)}\n{args.shape}, {args.dtype}, {args.batch} x {args.length} tokens, "
        f"{args.slots} slots\n"
    )
    print(" ".join(f"{head:>{_width(head)}}" for head in COLUMNS))
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        base = pathlib.Path(place) / "base.safetensors"
        for name in FORMS if "all" in args.form else args.form:
            form, in_memory = FORMS[name], None
            storages = [s for s in args.storage if s in form.storages]
            if name == "sgd" and "memory" in args.storage:
                in_memory = _steps(_in_memory(args), args, form).seconds
            files = any(s.startswith("disk") for s in storages)
            compute = _alone(base if files else None, args, form) if storages else Cost(0.0, 0.0)
            for storage in storages:
                folder = pathlib.Path(place) / "run"
                row = _measure(name, storage, base, folder, args, compute)
                shutil.rmtree(folder, ignore_errors=True)
                if in_memory is not None:
                    row |= {"in_memory": in_memory, "of_in_memory": in_memory / row["step"]}
                rows.append(row)
                print(" ".join(f"{show(row):>{_width(head)}}" for head, show in COLUMNS.items()), flush=True)
                save()  # so that the rows are kept if a time limit ends the run
    print(f"\n{LEGEND}\n{time.perf_counter() - start:.0f} s")
    save()
    if args.json:
        print(f"wrote {args.json}")
    return 0


def add_arguments(sub: argparse.ArgumentParser) -> None:
    storages = ("memory", "device", "host", "disk", "disk, written")
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    sub.add_argument("--shape", choices=SHAPES, default="256m")
    sub.add_argument("--storage", nargs="+", choices=storages, default=["host", "disk", "disk, written"])
    forms = (*FORMS, "all")
    sub.add_argument("--form", nargs="+", choices=forms, default=["sgd"], help="what is trained, and how")
    sub.add_argument("--dtype", choices=DTYPES, default="fp32")
    sub.add_argument("--dist", choices=("normal", "rademacher"), default="normal")
    sub.add_argument("--batch", type=int, default=1)
    sub.add_argument("--length", type=int, default=256)
    sub.add_argument("--slots", type=int, default=3)
    sub.add_argument("--scratch", type=int, choices=(1, 2), default=2)
    sub.add_argument("--halves", action="store_true", help="blocks are the halves of layers: smaller slots")
    sub.add_argument(
        "--layers", type=int, help="at most (default: all; on a GPU those that fit into host memory)"
    )
    sub.add_argument("--steps", type=int, default=5)
    sub.add_argument(
        "--folder", type=pathlib.Path, help="of the files (default: the system's for temporary ones)"
    )
    sub.add_argument("--tiny", action="store_true", help="small and short: whether it runs, not how fast")
    sub.add_argument("--json", type=pathlib.Path, help="write everything to this file")
    sub.set_defaults(call=run)
