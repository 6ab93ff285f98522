"""compare: this tree against another commit of it, in turns, and whether some row has become slower.

Each turn is a process that measures the same rows, first with this tree's package and then with the other
one's. Both are measured by this tree's ``bench``, so that only the package differs.  A pair of turns gives
one ratio (this / other) for each row.  The answer is the median of the ratios and an interval that holds
their true median with 95 % certainty.  The interval comes from order statistics (:func:`interval`), so that
it assumes nothing of how the disturbances of a machine are distributed.

A row is slower if the lower end of its interval lies above ``1 + threshold / 100`` in two runs.  The second
run measures again only the ops in which the first one found such a row."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from . import machine
from .registry import NAMES, Row

ROOT = pathlib.Path(__file__).resolve().parent.parent

#: What the compiled libraries are made of.
NATIVE = ("csrc", "CMakeLists.txt", "setup.py")

#: The least number of pairs for which order statistics give an interval of 95 %.
LEAST_TURNS = 6

#: The parts of a row that say what was measured; all others are figures.
_LABELS = ("op", "workload", "form", "launch", "k", "dtype", "dist", "rounding", "backend", "threads")

#: One turn.  The check comes first: an installed package must not be measured in place of the tree's.
_TURN = """
import pathlib, sys, zokernels
found = pathlib.Path(zokernels.__file__).resolve().parent
if found != pathlib.Path(sys.argv[1]):
    sys.exit(f"expected the package {sys.argv[1]}, got {found}")
from bench.__main__ import main
sys.exit(main(sys.argv[2:]))
"""

#: ``bench host`` is measured beside the ops: of models that need no other package, and on the CPU.
HOST = "host"
_HOST_MODELS = ("calls", "mlp")

#: Seconds of each row, by its labels.
Figures = dict[str, float]


# --- the decision ---------------------------------------------------------------------------------


def interval(values: Sequence[float], certainty: float = 0.95) -> tuple[float, float]:
    """An interval that holds the median of the distribution of ``values`` with at least this certainty.

    Of n independent values, the number below the true median is binomial (n, 1/2).  So the interval from the
    k-th smallest to the k-th largest misses it with probability 2 P(B < k), whatever the distribution; k is
    the largest for which that is at most 1 - certainty.  Fewer than 6 values say nothing at 95 %: all numbers
    are in it."""
    ordered, n = sorted(values), len(values)
    missed, k = 0.0, 0
    while k < n // 2:
        missed += 2 * math.comb(n, k) / 2**n
        if missed > 1 - certainty:
            break
        k += 1
    return (ordered[k - 1], ordered[-k]) if k else (-math.inf, math.inf)


@dataclass(frozen=True)
class Verdict:
    """What one run says of a row: the median of the ratios this / other, its interval, and both median times.

    The times are in seconds.
    """

    ratio: float
    low: float
    high: float
    this: float
    other: float

    @classmethod
    def of(cls, this: Sequence[float], other: Sequence[float]) -> Verdict:
        ratios = [a / b for a, b in zip(this, other, strict=True)]
        return cls(
            statistics.median(ratios), *interval(ratios), statistics.median(this), statistics.median(other)
        )

    def is_slower(self, percent: float) -> bool:
        return self.low > 1 + percent / 100


def figures(rows: Sequence[Row]) -> Figures:
    """The times of our own rows; those of the baselines do not depend on the commit.

    On a GPU a row also has the time until the call returns on the host; it is a figure of its own.
    """
    found: Figures = {}
    for row in rows:
        if "model" in row:  # of bench host
            if row["form"] == "MeZO":
                continue
            seconds = row["seconds"] if "seconds" in row else row["microseconds"] * 1e-6
            found[f"{HOST} {row['model']} {row['form']} {row['threads']}"] = seconds
            continue
        if row["op"] == "perturb_" or row.get("form") == "eager":
            continue
        label = " ".join(f"{row[name]}" for name in _LABELS if name in row)
        found[label] = row["p50"]
        if row.get("host"):
            found[f"{label}, host"] = row["host"]
    return found


def judge(pairs: Sequence[tuple[Figures, Figures]]) -> dict[str, Verdict]:
    """The rows that every turn of both sides has."""
    common = [label for label in pairs[0][0] if all(label in side for pair in pairs for side in pair)]
    return {label: Verdict.of([p[0][label] for p in pairs], [p[1][label] for p in pairs]) for label in common}


def run_twice(
    ops: Sequence[str],
    turns: int,
    percent: float,
    turn: Callable[[str, str], Figures],
    say: Callable[[str], None],
) -> list[str]:
    """The rows that are slower in two runs; ``turn(side, op)`` measures an op of "this" or of the "other"
    tree.
    """
    suspects: set[str] | None = None
    for number in (1, 2):
        slower: set[str] = set()
        again = []
        for op in ops:
            verdicts = judge([(turn("this", op), turn("other", op)) for _ in range(turns)])
            if not verdicts:
                raise SystemExit(f"bench compare: expected rows of {op!r} that both trees have, got none")
            mine = {label for label, verdict in verdicts.items() if verdict.is_slower(percent)}
            for label, verdict in verdicts.items():
                say(line(label, verdict, label in mine))
            slower |= mine
            again += [op] * bool(mine)
        suspects = slower if suspects is None else suspects & slower
        if not suspects:
            break
        if number == 1:
            say(f"\n{len(suspects)} rows look slower; once more: {', '.join(again)}")
            ops = again
    return sorted(suspects or ())


def line(label: str, verdict: Verdict, slower: bool) -> str:
    spread = f"[{verdict.low:.3f}, {verdict.high:.3f}]" if math.isfinite(verdict.low) else "[too few turns]"
    times = f"{verdict.this * 1e6:11.2f} {verdict.other * 1e6:11.2f}"
    return f"{verdict.ratio:6.3f} {spread:16} {times}  {label}{'  slower' * slower}"


# --- the two trees --------------------------------------------------------------------------------


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False)


def resolve(revision: str) -> str:
    """The commit that ``revision`` names."""
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found.returncode or not (ROOT / ".git").exists():
        raise SystemExit(f"bench compare: expected a commit of the repository at {ROOT}, got {revision!r}")
    return found.stdout.decode().strip()


def native_differs(commit: str) -> bool:
    """Whether the sources of the compiled libraries differ; files that git does not know yet count."""
    changed = _git("diff", "--quiet", commit, "--", *NATIVE).returncode != 0
    return changed or bool(_git("ls-files", "--others", "--exclude-standard", "--", *NATIVE).stdout)


def export(commit: str, folder: pathlib.Path, device: str) -> pathlib.Path:
    """``commit``'s package in ``folder``, with its compiled libraries: built there only where their sources
    differ.
    """
    archived = _git("archive", "--format=tar", commit)
    if archived.returncode:
        raise SystemExit(f"bench compare: git archive: {archived.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archived.stdout)) as archive:
        archive.extractall(folder, filter="tar") if hasattr(tarfile, "tar_filter") else archive.extractall(
            folder
        )
    package = folder / "zokernels"
    if native_differs(commit):
        print("building its libraries, whose sources differ", flush=True)
        environment = os.environ | ({"ZOKERNELS_CUDA": "0"} if device == "cpu" else {})
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        built = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        if built.returncode:
            raise SystemExit(
                f"bench compare: the other tree cannot be built:\n{(built.stdout + built.stderr)[-3000:]}"
            )
    else:
        if (libraries := ROOT / "zokernels" / "lib").exists():
            shutil.copytree(libraries, package / "lib")
        for module in (ROOT / "zokernels").glob("_host*.so"):
            shutil.copy(module, package)
    return package


@contextmanager
def sides(commit: str, device: str) -> Iterator[dict[str, pathlib.Path]]:
    """A folder for each side, with this tree's ``bench`` and the side's package: what a turn finds first."""
    with tempfile.TemporaryDirectory(prefix="zokernels-compare-") as name:
        folder = pathlib.Path(name).resolve()
        packages = {"this": ROOT / "zokernels", "other": export(commit, folder / "tree", device)}
        for side, package in packages.items():
            (folder / side).mkdir()
            (folder / side / "bench").symlink_to(ROOT / "bench")
            (folder / side / "zokernels").symlink_to(package)
        yield {side: folder / side for side in packages}


def measure_turn(folder: pathlib.Path, op: str, options: Sequence[str]) -> Figures:
    """One turn: the rows of ``op``, measured by a process of its own."""
    output = folder / "rows.json"
    command = [sys.executable, "-c", _TURN, str((folder / "zokernels").resolve())]
    what = ["host", "--model", *_HOST_MODELS] if op == HOST else ["run", "--op", op]
    command += [*what, "--json", str(output), *options]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench compare: {folder.name} tree, {op}: no rows:\n{done.stderr[-3000:]}")
    return figures(json.loads(output.read_text())["rows"])


# --- the command ----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("revision", help="the commit to compare with, as git names it")
    parser.add_argument(
        "--op",
        nargs="+",
        choices=[*NAMES, HOST],
        default=["combine", "step", HOST],
        help="of bench run, or host: bench host (default: combine step host)",
    )
    parser.add_argument(
        "--threshold", type=float, default=2.0, help="percent from which a row is slower (default 2)"
    )
    parser.add_argument(
        "--turns", type=int, default=10, help="pairs of turns in a run (default 10, at least 6)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="of a turn, as bench run takes them (default 0.5)"
    )
    parser.add_argument("--threads", default="1", help="as bench run takes them (default 1)")
    parser.add_argument("--backend", nargs="+", help="as bench run takes them")
    parser.add_argument("--tiny", action="store_true", help="two turns, small: whether it runs, not how fast")
    parser.set_defaults(call=compare)


def options_of(args: argparse.Namespace, op: str) -> list[str]:
    """What both sides give to ``bench run``, or to ``bench host``, which has less to choose."""
    options = ["--seconds", str(args.seconds)] + ["--tiny"] * args.tiny
    if op == HOST:
        return options
    options += ["--device", args.device, "--threads", args.threads]
    return [*options, "--backend", *args.backend] if args.backend else options


def compare(args: argparse.Namespace) -> int:
    """0: no row is slower; 1: those named last are, in two runs."""
    turns = 2 if args.tiny else args.turns
    if turns < LEAST_TURNS and not args.tiny:
        raise SystemExit(f"bench compare: --turns: expected at least {LEAST_TURNS}, got {turns}")
    if not args.threshold >= 0:
        raise SystemExit(f"bench compare: --threshold: expected percent of at least 0, got {args.threshold}")
    commit = resolve(args.revision)
    print(
        f"{machine.cpu_model()}, {machine.cores()} cores: this tree ({machine.commit()}) / "
        f"{commit[:12]}, in turns"
    )
    with sides(commit, args.device) as folders:
        print(f"{'ratio':>6} {'95 % interval':16} {'this us':>11} {'other us':>11}  row")
        turn = lambda side, op: measure_turn(folders[side], op, options_of(args, op))
        slower = run_twice(args.op, turns, args.threshold, turn, lambda text: print(text, flush=True))
    print(f"\nslower by more than {args.threshold:g} % in two runs: {len(slower)} rows")
    for label in slower:
        print(f"  {label}")
    return 1 if slower else 0
