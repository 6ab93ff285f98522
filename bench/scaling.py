"""``python -m bench scaling``: a simulation on paper of a step's time on 8 to 1,024 GPUs.  Nothing is
measured here.

A step of a model of N parameters: q directions, two sides each, so 2 q points, and a batch of sequences.  A
layout puts S GPUs on one copy of the weights; N / S replicas share out the sequences ("data") or the points
("perturbation"). Every term is a quotient of an amount by a rate of :class:`Machine`; docs/scaling.md says
where each comes from."""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from . import charts

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
BEGIN, END = "<!-- made by: python -m bench scaling -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Machine:
    """The rates that are assumed, those of an H100 SXM server.  All are per second and for each GPU."""

    flops: float = 989.4e12  # bf16, dense: NVIDIA's data sheet
    efficiency: float = 0.4  # the share of these that a forward reaches
    memory: float = 3.35e12 * 0.9  # bytes: the data sheet, times the share that copies commonly reach
    usable: float = 72e9  # bytes of the 80 GB that are left beside activations and scratch
    lanes: float = 132 * 128 * 1.755e9  # instructions of one thread: multiprocessors, lanes, clock
    host: float = 64e9 * 0.85  # bytes over PCIe 5 x16, in each direction
    fast: float = 450e9 * 0.8  # bytes over NVLink, in each direction
    net: float = 50e9 * 0.9  # bytes over 400 Gb/s InfiniBand
    node: int = 8
    hop: float = 15e-6  # seconds of one of the log2(ranks) hops of a small all-gather, with its launch


@dataclass(frozen=True)
class Workload:
    layers: int
    hidden: int
    sequences: int = 64
    tokens: int = 512
    directions: int = 8
    #: Instructions for each element and direction of a bf16 pass in place with normal noise, counted in the
    #: machine code
    #: for sm_90 (docs/design.md).
    instructions: float = 23.1

    @property
    def weights(self) -> float:
        return 12.0 * self.layers * self.hidden**2

    @property
    def points(self) -> int:
        return 2 * self.directions

    def forward(self) -> float:
        """The operations of one sequence at one point: 2 for each weight and token, and causal attention."""
        return self.tokens * (2 * self.weights + 2 * self.layers * self.tokens * self.hidden)


# 1T is the model of Narayanan et al., arXiv 2104.04473
MODELS = {"OPT-175B": Workload(96, 12288), "1T": Workload(128, 25600)}


@dataclass(frozen=True)
class Step:
    """The parts of a step in seconds; ``bound`` names the longest of them."""

    parts: dict[str, float]
    total: float

    @property
    def bound(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])


def shares(w: Workload, replicas: int, first: str) -> tuple[int, int]:
    """The sequences and points of a replica.

    The dimension ``first`` is shared out as far as possible, then the other one.
    """
    data = min(replicas, w.sequences) if first == "data" else -(-replicas // min(replicas, w.points))
    data = min(data, w.sequences)
    return -(-w.sequences // data), -(-w.points // max(1, min(w.points, replicas // data)))


def passes(m: Machine, w: Workload, weights: float, points: int) -> float:
    """The seconds of perturbing ``weights`` for each point, and of one update with all directions."""
    one = lambda k: max(4 * weights / m.memory, k * w.instructions * weights / m.lanes)
    return points * one(1) + one(w.directions)


def _forwards(m: Machine, w: Workload, ranks: int, sequences: int) -> float:
    """The seconds that a replica's sequences take at one point on ``ranks`` GPUs.

    They are those of the arithmetic or those of reading the weights, whichever are more.
    """
    return max(sequences * w.forward() / (m.flops * m.efficiency), 2 * w.weights / m.memory) / ranks


def _smallest(m: Machine, w: Workload, gpus: int) -> int | None:
    """The smallest power of two of GPUs whose memories hold the weights."""
    ranks = 1 << max(0, math.ceil(math.log2(2 * w.weights / m.usable)))
    return ranks if ranks <= gpus else None


def _gathering(m: Machine, w: Workload, ranks: int) -> float:
    """The seconds in which each of ``ranks`` GPUs, which hold a part each, gets all weights.

    A byte is sent to each server once, and all network adapters of a server share that work.
    """
    servers = max(1, ranks // m.node)
    across = (servers - 1) / servers / (m.node * m.net)
    return 2 * w.weights * max((ranks - 1) / ranks / m.fast, across)


def _agreeing(m: Machine, gpus: int) -> float:
    return m.hop * math.log2(gpus)


def sharded(m: Machine, w: Workload, gpus: int, first: str) -> Step | None:
    """FSDP.  A GPU holds 1 / S of the weights and has sequences of its own.

    Each forward gathers the weights of a layer while the layer before computes.
    """
    if (ranks := _smallest(m, w, gpus)) is None:
        return None
    # The S ranks of a shard group are data ranks, too, so they must have the same points.
    replicas = gpus // ranks
    groups = max(1, min(w.sequences // ranks, replicas)) if first == "data" else max(1, replicas // w.points)
    sequences = -(-w.sequences // (ranks * groups))
    points = -(-w.points // min(w.points, max(1, replicas // groups)))
    compute, link = points * _forwards(m, w, 1, sequences), points * _gathering(m, w, ranks)
    noise = passes(m, w, w.weights / ranks, points)
    latency = _agreeing(m, gpus)
    parts = {"compute": compute, "link": link, "passes": noise, "latency": latency}
    return Step(parts, max(compute, link) + noise + latency)


def pipeline(m: Machine, w: Workload, gpus: int, first: str) -> Step | None:
    """A pipeline of S stages.

    The sequences of all points pass through them in one row, so that only S - 1 slots stay empty.
    """
    if (ranks := _smallest(m, w, gpus)) is None:
        return None
    sequences, points = shares(w, gpus // ranks, first)
    slot, count = _forwards(m, w, ranks, 1), sequences * points
    send = 2 * w.tokens * w.hidden / (m.fast if ranks <= m.node else m.net)
    noise = passes(m, w, w.weights / ranks, points)
    latency = _agreeing(m, gpus) + (ranks - 1) * m.hop
    parts = {"compute": count * slot, "bubble": (ranks - 1) * slot, "link": count * send, "passes": noise}
    parts["latency"] = latency
    return Step(parts, (count + ranks - 1) * max(slot, send) + noise + latency)


def streamed(m: Machine, w: Workload, gpus: int, gathered: bool) -> Step:
    """Each block comes over the link of the host once a step, serves all points of the step, and goes back
    updated.

    With ``gathered`` each of the eight GPUs of a server reads an eighth, and they exchange the parts over the
    fast link."""
    sequences, points = shares(w, gpus, "data")
    ranks = min(m.node, gpus) if gathered else 1
    compute = points * _forwards(m, w, 1, sequences)
    # it runs on the same GPU between the forwards, so its time adds to theirs
    noise = passes(m, w, w.weights, points)
    host, link = 2 * w.weights / ranks / m.host, _gathering(m, w, ranks) if gathered else 0.0
    latency = _agreeing(m, gpus)
    parts = {"compute": compute, "passes": noise, "host link": host, "link": link, "latency": latency}
    return Step(parts, max(compute + noise, host, link) + latency)


LAYOUTS: dict[str, Callable[[Machine, Workload, int], Step | None]] = {
    "sharded x data": lambda m, w, n: sharded(m, w, n, "data"),
    "sharded x perturbation": lambda m, w, n: sharded(m, w, n, "perturbation"),
    "pipeline x data": lambda m, w, n: pipeline(m, w, n, "data"),
    "pipeline x perturbation": lambda m, w, n: pipeline(m, w, n, "perturbation"),
    "streamed": lambda m, w, n: streamed(m, w, n, False),
    "streamed, gathered": lambda m, w, n: streamed(m, w, n, True),
    "the same, Rademacher": lambda m, w, n: streamed(m, replace(w, instructions=5.9), n, True),
}


def _time(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.3g}"


def tables(m: Machine = Machine()) -> Iterator[str]:
    """The lines of the tables, in Markdown."""
    for name, w in MODELS.items():
        held = _smallest(m, w, GPUS[-1])
        gigabytes = 2 * w.weights / 1e9
        yield f"**{name}**: {w.weights / 1e9:,.0f} G weights, {gigabytes:,.0f} GB in bf16, on {held} GPUs"
        yield "at least where they are resident. Seconds a step, and what takes the longest:"
        yield ""
        yield "| | " + " | ".join(f"{n:,} GPUs" for n in GPUS) + " |"
        yield "|---" * (len(GPUS) + 1) + "|"
        for title, layout in LAYOUTS.items():
            steps = [layout(m, w, n) for n in GPUS]
            cells = ["does not fit" if s is None else f"{_time(s.total)} {s.bound}" for s in steps]
            yield f"| {title} | " + " | ".join(cells) + " |"
        yield ""


@charts.style()
def draw(path: pathlib.Path, m: Machine = Machine()) -> None:
    figure, axes = charts.figure(1, len(MODELS), 11, 4.6, sharey=True)
    for axis, (name, w) in zip(axes.flat, MODELS.items(), strict=True):
        for i, (title, layout) in enumerate(LAYOUTS.items()):
            found = [(n, s.total) for n in GPUS if (s := layout(m, w, n))]
            style = "--" if title.endswith("perturbation") else ":" if i > 3 else "-"
            axis.plot(*zip(*found, strict=True), style, marker="osD^vx+"[i], markersize=5, label=title)
        axis.set(xscale="log", yscale="log", xticks=GPUS, title=name, xlabel="GPUs")
        axis.set_xticks(GPUS, [str(n) for n in GPUS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("seconds a step (simulated)")
    axes[0, 0].legend(fontsize=8)
    charts.png(path, figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--write", type=pathlib.Path, help="a page whose table, and the plot beside it, are made anew"
    )
    parser.set_defaults(call=run)


def run(args: argparse.Namespace) -> int:
    text = "\n".join(tables())
    print(text)
    if args.write:
        page = args.write.read_text()
        head, _, rest = page.partition(BEGIN)
        args.write.write_text(f"{head}{BEGIN}{text}\n{END}{rest.partition(END)[2]}")
        draw(args.write.with_suffix(".png"))
    return 0
