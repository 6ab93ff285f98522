"""``python -m bench list``, ``run``, ``compare``, ``methods``, ``offload``, ``report``, ``gpu-check`` and so
on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch

from zokernels import BackendUnavailable
from zokernels.backends.registry import NAMES

from . import machine, table
from .gpu.stage import replace
from .registry import NAMES as OPS
from .registry import SKIPPED, Settings, op
from .workloads import WORKLOADS

SCHEMA = 1
DTYPES, DISTS = ("fp32", "bf16", "fp16"), ("normal", "rademacher")


def _threads(text: str, device: str) -> tuple[int, ...]:
    """The thread counts of a text such as ``"1,all"``, each once.

    On a GPU they do not matter, so there is one.
    """
    if device == "cuda":
        return (1,)
    counts = [machine.cores() if part == "all" else int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise SystemExit(f"--threads: expected counts of at least 1 or 'all', got {text!r}")
    return tuple(dict.fromkeys(counts))


def _default_numel(device: str) -> int:
    """How many elements a tensor has if nothing else is asked for.

    On the CPU these are 2^24, so that four buffers of the smallest dtype take 128 MiB.  On a GPU they are
    2^29, 1 GiB of bf16 and 2 GiB of fp32, or as many as fit.  A run needs at most five buffers and four
    temporaries of fp32, and still holds the five buffers of the dtype before."""
    if device == "cpu":
        return 1 << 24
    numel = 1 << 29
    while numel > 1 << 20 and 14 * 4 * numel > 0.9 * machine.free_memory(device):
        numel //= 2
    return numel


def _settings(args: argparse.Namespace) -> Settings:
    cpu = args.device == "cpu"
    if args.tiny:
        sizes = dict(
            numel=args.numel or 1 << 14, baseline_numel=1 << 14, seconds=0.0, min_rounds=3, tiny=True
        )
    else:
        numel = args.numel or _default_numel(args.device)
        # Eager passes cost about ten times as much as ours, so on the CPU they get a quarter of the elements.
        sizes = dict(numel=numel, baseline_numel=numel // 4 if cpu else numel, seconds=args.seconds)
    return Settings(
        device=args.device,
        backends=tuple(args.backend or ()),
        dtypes=tuple(args.dtype or ()),
        dists=tuple(args.dist or ()),
        threads=_threads(args.threads, args.device),
        workloads=tuple(args.workload),
        scale=args.scale or (0.02 if args.tiny else 0.3 if cpu else 1.0),
        **sizes,
    )


def run(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device")
    if args.numel is not None and (args.numel < 16 or args.numel % 16):
        raise SystemExit(f"--numel: expected a positive multiple of 16, got {args.numel}")
    if args.scale is not None and not 0 < args.scale <= 1:
        raise SystemExit(f"--scale: expected a number in (0, 1], got {args.scale}")
    settings, header = _settings(args), machine.describe(args.device)
    print(f"{machine.title(header)}\n{settings.numel:,} elements, {settings.buffers} buffers in turn\n")
    printer, rows, start = table.Printer(), [], time.perf_counter()

    def save(complete: bool) -> None:
        if args.json:
            result = {"schema": SCHEMA, "command": args.command_line, "complete": complete, "machine": header}
            result |= {"settings": asdict(settings), "skipped": SKIPPED, "rows": rows}
            args.json.parent.mkdir(parents=True, exist_ok=True)
            replace(args.json, json.dumps(result, indent=1) + "\n")

    for name in [args.op] if args.op else OPS:
        for row in op(name).run(settings):
            rows.append(row)
            if head := printer.head(row):
                print(head)
            print(printer.row(row), flush=True)
            save(complete=False)  # so that the rows are kept if a time limit ends the run
        if settings.device == "cuda":
            torch.cuda.empty_cache()
    print(f"\n{table.LEGEND}\n{len(rows)} rows in {time.perf_counter() - start:.0f} s")
    for what, why in SKIPPED.items():
        print(f"skipped: {what}: {why}")
    save(complete=True)
    if args.json:
        print(f"wrote {args.json}")
    return 0


def list_ops(args: argparse.Namespace) -> int:
    for name in OPS:
        print(f"{name:12} {op(name).summary}")
    return 0


def draw(args: argparse.Namespace) -> int:
    from . import page, report

    files = args.files or sorted((pathlib.Path(__file__).resolve().parent / "results").glob("*/*.json"))
    if not files:
        raise SystemExit("bench report: expected JSON files of bench run, methods or gpu-check, got none")
    for path in (page if args.output.suffix == ".html" else report).write(files, args.output):
        print(f"wrote {path}")
    return 0


#: Commands of modules of their own: where each is, and what it does.
COMMANDS = {
    "compare": (".compare", "this tree against another commit, in turns; 1 where a row is slower"),
    "methods": (".methods.run", "every method against its eager form, and its loss after equal forwards"),
    "offload": (".offload", "a streamed step against its transfers and its computation, each alone"),
    "host": (".whole_steps", "whole steps of small models against their forwards: the host's share"),
    "trajectory": (".trajectory", "replaying and recording a run, project and gram, on 22 M weights"),
    "learn": (".learn.run", "what methods learn in equal forwards, after the same search of step sizes"),
    "population": (".population", "a population in one forward against plain inference of the same batch"),
    "quantized": (
        ".quantized",
        "layers of integer weights against the bf16 layer, and the memory of their forwards",
    ),
    "engines": (".engines", "weight work of evolution strategies, against es-at-scale"),
    "race": (".race", "the loss of a language model against time, beside MeZO's eager loop"),
    "zollm": (".zollm", "language models fine-tuned with and without backpropagation"),
    "scaling": (".scaling", "on paper: a step of 175 G and 1,000 G weights on 8 to 1,024 GPUs"),
    "gpu-check": (".gpu.check", "what holds on the GPU at hand, in seven minutes; offline"),
    "gpu-prebuilt": (".gpu.prebuilt", "compile here what gpu-check needs there, into one folder"),
}


def parse(argv: Sequence[str], program: str = "python -m bench") -> argparse.Namespace:
    """The arguments of a command, whose module alone is imported.

    So a command needs what it uses and no more: ``bench compare`` runs this file with packages of older
    commits."""
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("list", help="ops that can be measured")
    sub.set_defaults(call=list_ops)
    sub = commands.add_parser("run", help="measure and print a table")
    sub.add_argument("--op", choices=OPS, help="default: all")
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    sub.add_argument(
        "--backend", nargs="+", choices=NAMES, help="default: all compiled ones that load for the device"
    )
    sub.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: those of the op")
    sub.add_argument("--dist", nargs="+", choices=DISTS, help="default: those of the op")
    sub.add_argument("--threads", default="1,all", help="thread counts, e.g. 1,2,all (CPU; default 1,all)")
    sub.add_argument("--numel", type=int, help="elements of one tensor (default 2^24, on a GPU 2^29)")
    sub.add_argument(
        "--workload", nargs="+", choices=sorted(WORKLOADS), default=["opt-1.3b"], help="for op step"
    )
    sub.add_argument(
        "--scale", type=float, help="layers and widths of the workload (default 1, on the CPU 0.3)"
    )
    sub.add_argument("--seconds", type=float, default=2.0, help="time for each dtype, dist and thread count")
    sub.add_argument("--tiny", action="store_true", help="small and short: whether it runs, not how fast")
    sub.add_argument("--json", type=pathlib.Path, help="write everything to this file")
    sub.set_defaults(call=run)
    sub = commands.add_parser(
        "report", help="JSON files into one HTML page, or into docs/performance.md and a PNG"
    )
    sub.add_argument(
        "files", nargs="*", type=pathlib.Path, help="of run, methods, gpu-check (default: the committed)"
    )
    default = pathlib.Path("zokernels-bench.html")
    sub.add_argument(
        "-o", "--output", type=pathlib.Path, default=default, help=f"FILE.html or FILE.md ({default})"
    )
    sub.set_defaults(call=draw)
    for name, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary)
        if [name] == list(argv[:1]):
            importlib.import_module(module, __package__).add_arguments(sub)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, program: str = "python -m bench") -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse(argv, program)
    args.command_line = f"{program} {shlex.join(argv)}"
    try:
        return args.call(args)
    except BackendUnavailable as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
