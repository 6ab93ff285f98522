"""The command ``zokernels``: a report, the tools of a recorded run (docs/trajectory.md), the demo, and
measurements.

Exit status: 0 where all is well, 1 where something failed or does not match, 2 where the arguments are wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from . import commands
from .version import __version__

if TYPE_CHECKING:
    from .trajectory import Log
    from .trajectory.replay import Progress


_EPILOG = """example:
  {}

exit status: 0 all is well, 1 something failed or does not match, 2 wrong arguments"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zokernels",
        description="Fused kernels for zeroth-order training.  Without a command: info.",
        epilog="zokernels COMMAND --help shows an example of each.",
    )
    parser.add_argument("--version", action="version", version=f"zokernels {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    base = "base weights: a .safetensors file or a Hugging Face folder"

    def command(name: str, text: str, example: str) -> argparse.ArgumentParser:
        style = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(
            name, help=text, description=text, epilog=_EPILOG.format(example), formatter_class=style
        )

    info = command("info", "what is built and present, for a bug report", "zokernels info --json")
    command("demo", "fine-tune a sentence encoder with forward passes only", "zokernels demo --steps 400")
    command(
        "bench", "measure this machine, and draw what was measured", "zokernels bench run --op combine --tiny"
    )

    example = "zokernels replay base.safetensors run.zk -o final.safetensors"
    replay = command("replay", "make the weights of a run from its base and its log", example)
    replay.add_argument("base", help=base)
    replay.add_argument("log", help="the run's log")
    replay.add_argument("-o", "--output", required=True, help="the .safetensors file to write")
    replay.add_argument(
        "--mode", choices=("exact", "fp32"), default="exact", help="the run's bits, or an fp32 sum"
    )

    example = "zokernels verify run.zk base.safetensors final.safetensors"
    verify = command("verify", "check a log, its base weights and its final weights", example)
    verify.add_argument("log", help="the run's log")
    verify.add_argument("base", nargs="?", help=base)
    verify.add_argument("final", nargs="?", help="weights that the run should have ended with")

    log = command("log", "what a log holds", "zokernels log run.zk --json")
    log.add_argument("log", help="the run's log")
    log.add_argument("--plot", metavar="FILE", help="draw loss and projected gradient (needs matplotlib)")

    for sub in (info, replay, verify, log):
        sub.add_argument("--json", action="store_true", help="print JSON")
    for sub in (replay, verify, log):
        sub.add_argument(
            "--recover", action="store_true", help="use a damaged log up to its last good record"
        )
    for sub in (replay, verify):
        sub.add_argument(
            "--upto", type=int, metavar="STEP", help="the weights after STEP steps (default: after all)"
        )
    return parser


@contextmanager
def _progress(log: Log, text: str) -> Iterator[Progress]:
    """A bar of elements times steps, on a terminal that has tqdm."""
    bar = None
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            print("no progress bar: pip install zokernels[cli]", file=sys.stderr)
        else:
            sizes = [math.prod(p["shape"]) for g in log.header["groups"] for p in g["params"] if p["sha256"]]
            bar = tqdm(total=sum(sizes) * log.steps, desc=text, unit="w", unit_scale=True)
    try:
        yield bar.update if bar is not None else lambda elements: None
    finally:
        if bar is not None:
            bar.close()


def _read(args: argparse.Namespace) -> Log:
    from .checks import fail
    from .trajectory import read
    from .trajectory.format import is_log

    if not is_log(args.log) and (base := getattr(args, "base", None)) and is_log(base):
        order = "LOG BASE FINAL" if args.command == "verify" else "BASE LOG -o OUTPUT"
        fail(
            args.command, "LOG, BASE", f"zokernels {args.command} {order}", f"them swapped: {base} is the log"
        )
    if os.path.isdir(args.log):
        fail(args.command, "LOG", "the log of a run, which is a file", f"the folder {args.log}")
    log = read(args.log, args.recover)
    if log.broken:
        print(f"{args.log}: damaged at {log.broken}; {log.steps} records before it are used", file=sys.stderr)
    return log


def _say(args: argparse.Namespace, found: dict[str, Any], lines: Sequence[str]) -> None:
    print(json.dumps(found, indent=1) if args.json else "\n".join(lines))


def _replay(args: argparse.Namespace) -> None:
    from .checks import fail
    from .files.safetensors import Checkpoint
    from .trajectory.checkpoint import replay_file

    log, output = _read(args), pathlib.Path(args.output)
    if output.is_dir():
        fail("replay", "--output", "a .safetensors file to write", f"the folder {output}")
    output.parent.mkdir(parents=True, exist_ok=True)
    with _progress(log, "replay") as progress:
        steps = replay_file(
            Checkpoint(args.base), log, args.output, args.upto, mode=args.mode, progress=progress
        )
    found = {"output": args.output, "base": args.base, "log": args.log, "steps": steps, "mode": args.mode}
    _say(args, found, [f"{args.output}: {steps} steps on {args.base}"])


def _verify(args: argparse.Namespace) -> None:
    """Raises at the first thing that does not match; JSON has what was checked."""
    from .checks import fail

    log = _read(args)
    found: dict[str, Any] = {"records": log.steps, "base": None, "final": None, "tensors": None}
    lines = [f"log    {log.steps} records, every checksum right"]
    if args.base is not None:
        try:
            found["tensors"] = _verify_weights(args, log)
        except ValueError:
            if args.final is not None and _is_base(args.final, log) and not _is_base(args.base, log):
                got = f"the last two swapped: {args.final} is what the run began with"
                fail("verify", "BASE, FINAL", "zokernels verify LOG BASE FINAL", got)
            raise
        found["base"], lines = True, [*lines, "base   the weights that the run began with"]
    if args.final is not None:
        found["final"] = True
        lines.append(f"final  the weights of the run, bit for bit ({found['tensors']} tensors)")
    _say(args, found, lines)


def _verify_weights(args: argparse.Namespace, log: Log) -> int | None:
    """How many tensors of the final weights are those of the run; None where no final weights are given."""
    from .files.safetensors import Checkpoint
    from .trajectory.checkpoint import checked, compare, replay_file

    base = Checkpoint(args.base)
    if args.final is None:
        checked(base, log)
        return None
    final = Checkpoint(args.final)
    with tempfile.TemporaryDirectory() as folder, _progress(log, "verify") as progress:
        replayed = pathlib.Path(folder) / "replayed.safetensors"
        replay_file(base, log, replayed, args.upto, progress=progress)
        return compare(log, Checkpoint(replayed), final)


def _is_base(path: str, log: Log) -> bool:
    """Whether the weights in ``path`` are those that the run of ``log`` began with."""
    from .files.safetensors import Checkpoint
    from .trajectory.checkpoint import checked

    try:
        checked(Checkpoint(path), log)
    except (ValueError, OSError):
        return False
    return True


def summary(log: Log) -> dict[str, Any]:
    """Plain numbers and texts; null where a number is not finite or there is none."""
    header, losses, sizes, skipped, first, last = log.header, [], [], 0, None, None
    for record in log.records():
        first, last = first or record, record
        skipped += not record.finite
        if record.finite:
            losses.append(record.loss)
            sizes.append(max(abs(g) for of_group in record.gradients for g in of_group))
    tenth = max(1, len(losses) // 10)
    finite = lambda value: value if math.isfinite(value) else None
    mean = lambda values: finite(sum(values) / len(values)) if values else None
    params = [p for g in header["groups"] for p in g["params"]]
    return {
        "file": log.path,
        "created_by": header["created_by"],
        "contract": header["contract"],
        "optimizer": header["optimizer"],
        **{part: header[part] for part in ("estimator", "rule", "direction", "subset")},
        "restore": header["restore"],
        "part": "part" in header,
        "seed": header["seed"],
        "groups": [group["options"] for group in header["groups"]],
        "parameters": sum(p["sha256"] is not None for p in params),
        "weights": sum(math.prod(p["shape"]) for p in params if p["sha256"] is not None),
        "frozen_parameters": sum(p["sha256"] is None for p in params),
        "start": log.start,
        "steps": log.steps,
        "skipped_steps": skipped,
        "bytes_per_step": log.layout.size,
        "lr_first": first and list(first.rates),
        "lr_last": last and list(last.rates),
        "loss_first_tenth": mean(losses[:tenth]),
        "loss_last_tenth": mean(losses[-tenth:]),
        "largest_gradient": finite(max(sizes)) if sizes else None,
        "mean_gradient": mean(sizes),
        "broken": log.broken,
    }


def _plot(log: Log, path: str) -> None:
    """The loss, with its mean over the last twentieth of the steps, and the projected gradient of each
    group.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise RuntimeError(
            "log: --plot: expected matplotlib, got none; pip install zokernels[cli]"
        ) from error
    figure = matplotlib.figure.Figure(figsize=(9, 3 + 1.8 * log.layout.groups), layout="constrained")
    records = [record for record in log.records() if record.finite]
    steps, losses, groups = [r.step for r in records], [r.loss for r in records], log.layout.groups
    top, *rows = figure.subplots(1 + groups, 1, sharex=True, height_ratios=[2.4, *[1.6] * groups])
    window = max(1, len(losses) // 20)
    sums = list(itertools.accumulate(losses, initial=0.0))
    means = [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]
    top.plot(steps, losses, linewidth=0.6, color="#94a3b8", label="each step")
    top.plot(steps, means, linewidth=1.6, color="#0f766e", label=f"mean of {window}")
    top.set_ylabel("loss")
    top.legend(loc="upper right", frameon=False)
    top.set_title(f"{log.header['optimizer']}, {log.steps} steps", loc="left")
    one = log.layout.directions == 1
    for i, axes in enumerate(rows):  # a scale each: groups differ by their eps and sizes
        of = [r.gradients[i] for r in records]
        axes.plot(steps, [g[0] if one else math.hypot(*g) for g in of], linewidth=0.6, color="#4f46e5")
        axes.set_ylabel(("g" if one else "|g|") + (f", group {i}" if groups > 1 else ""))
    rows[-1].set_xlabel(
        "step" + ("; g: projected gradient" if one else "; |g|: norm of the projected gradients")
    )
    for axes in (top, *rows):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e2e8f0", linewidth=0.6)
    figure.savefig(path, dpi=120)


def _words(value: Any) -> str:
    """A part, the settings of a group, numbers or a text, as people read them."""
    from .trajectory.parts import spoken

    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    if isinstance(value, dict) and "class" not in value:
        plain = {key: each for key, each in value.items() if each is not None and each is not False}
        return ", ".join(f"{key}={_words(each)}" for key, each in plain.items())
    return spoken(value)


def _log(args: argparse.Namespace) -> None:
    log = _read(args)
    found = summary(log)
    if args.plot:
        _plot(log, args.plot)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for key, value in found.items():
        if value is None or value is False:
            continue
        several = key == "groups" and len(value) > 1
        for number, each in enumerate(value) if key == "groups" else [(0, value)]:
            label = (f"group {number}" if several else "group") if key == "groups" else key
            print(f"{label:<18} {_words(each)}")


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    whole = {"bench": commands.bench, "demo": commands.demo}.get(argv[0] if argv else "")
    args = argparse.Namespace(command=argv[0]) if whole else _parser().parse_args(argv or ["info"])
    try:
        status = 0
        if whole is not None:  # these have arguments of their own
            status = whole(argv[1:])
        else:
            {"info": commands.info, "replay": _replay, "verify": _verify, "log": _log}[args.command](args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # of `zokernels log run.zk | head`: whoever reads has seen enough
        commands.no_more_output()
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"zokernels {args.command}: {error}", file=sys.stderr)
        return 1
    return 0
