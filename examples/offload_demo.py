"""Fine-tunes a model from disk within a memory limit that the same training in memory does not keep.

``python examples/offload_demo.py`` (or ``make offload-demo``) writes a wide MiniLM-L6 to a file: the weights
of the demo, with more neurons that have no effect at first.  Then it starts two processes with the same limit
on their private memory (``ulimit -d``).  One trains in memory and fails; the other streams the blocks from
the file and trains on movie reviews. It leaves the weights, a picture of the overlap and ``report.json`` in
``build/offload-demo``.  The exit status is 1 if the loss did not improve, a limit was not kept, or a check
failed.  docs/offload.md explains it."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import threading
import time

import torch
import torch.nn.functional as F

from zokernels import offload
from zokernels.bench import machine
from zokernels.examples import reviews
from zokernels.examples.wide import WideClassifier, widen
from zokernels.optim import ZOSGD

VALIDATION = 200
LENGTH = 32  #: the most tokens of a sentence, which bounds the activations


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="offload-demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=12, help="sentences a step")
    parser.add_argument(
        "--width", type=int, default=24576, help="neurons of a feed-forward layer (MiniLM has 1,536)"
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="MiB of private memory (default: what is measured to do)"
    )
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-6, help="of the encoder")
    parser.add_argument("--head-lr", type=float, default=0.1, help="of the head")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default=reviews.WORK / "offload-demo")
    parser.add_argument(
        "--tiny", action="store_true", help="a few steps of a narrower model: whether it runs"
    )
    parser.add_argument(
        "--role", choices=("parent", "memory", "streamed"), default="parent", help=argparse.SUPPRESS
    )
    args = parser.parse_args(argv)
    if args.tiny:
        args.steps, args.batch, args.width, args.slots = min(args.steps, 3), 4, min(args.width, 16384), 1
    return args


def base_of(args: argparse.Namespace) -> pathlib.Path:
    return args.output / f"wide-{args.width}.safetensors"


def data_for(model: WideClassifier, args: argparse.Namespace) -> tuple:
    sentences = reviews.load()
    training, held_out = reviews.split(sentences, VALIDATION)
    if args.tiny:
        training, held_out = training[:64], held_out[:8]
    batcher = lambda rows: reviews.Batcher(
        rows, model.tokenizer, args.batch, torch.device("cpu"), max_length=LENGTH
    )
    return batcher(training), batcher(held_out).ordered()


def loss_of(model: WideClassifier, batch: reviews.Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch.ids, batch.mask), batch.labels)


@torch.inference_mode()
def evaluate(model: WideClassifier, batches: list[reviews.Batch]) -> tuple[float, float]:
    """The mean loss and the accuracy."""
    loss, right, count = 0.0, 0, 0
    for b in batches:
        logits = model(b.ids, b.mask)
        loss += F.cross_entropy(logits, b.labels, reduction="sum").item()
        right += (logits.argmax(1) == b.labels).sum().item()
        count += len(b.labels)
    return loss / count, right / count


def optimizer_for(model: WideClassifier, args: argparse.Namespace) -> ZOSGD:
    """An optimizer with the groups of the demo (docs/demo.md)."""
    head = [(n, p) for n, p in model.named_parameters() if n.startswith("head.")]
    rest = [(n, p) for n, p in model.named_parameters() if not n.startswith("head.")]
    groups = [{"params": rest, "lr": args.lr, "eps": 1e-3}, {"params": head, "lr": args.head_lr, "eps": 0.3}]
    return ZOSGD(groups, lr=args.lr, seed=args.seed)


class Watched:
    """The most memory of this process, in MiB: private, as the limit counts it (looked at every few
    milliseconds, for the kernel keeps no maximum), and resident."""

    def __init__(self) -> None:
        self._most, self._end = self._now()["VmData"], threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @staticmethod
    def _now() -> dict[str, int]:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return {line.split(":")[0]: int(line.split()[1]) >> 10 for line in lines if line.endswith(" kB")}

    def _watch(self) -> None:
        while not self._end.wait(5e-3):
            self._most = max(self._most, self._now()["VmData"])

    def stop(self) -> dict[str, int]:
        self._end.set()
        self._thread.join()
        return {"private": self._most, "peak_resident": self._now()["VmHWM"]}


def digest_of(losses: list[float]) -> list[str]:
    return [float.hex(v) for v in losses]


# In the limit -------------------------------------------------------------------------------------


def keep_to(limit: int) -> None:
    # starts the threads of torch now: libgomp ends the process if it cannot start them later
    torch.ones(1 << 20).add_(1)
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit << 20, limit << 20))


def in_memory(args: argparse.Namespace) -> dict:
    """A few steps with all weights in memory, once: the tensors of the file become the parameters.  The last
    one is of the longest sentences, which a whole run meets, too."""
    from safetensors.torch import load_file

    watched = Watched()
    with offload.empty_weights():
        model = WideClassifier(args.width)
    model.load_state_dict(load_file(base_of(args)), assign=True)
    data, _ = data_for(model, args)
    optimizer, losses = optimizer_for(model, args), []
    for _, batch in zip(range(3), data.forever(args.seed), strict=False):
        losses.append(float(optimizer.step(lambda batch=batch: loss_of(model, batch))))
    optimizer.step(lambda: loss_of(model, data.ordered()[-1]))
    return {"losses": digest_of(losses), **watched.stop()}


def streamed(args: argparse.Namespace) -> dict:
    from tqdm import tqdm

    watched = Watched()
    with offload.empty_weights():
        model = WideClassifier(args.width)
    data, validation = data_for(model, args)
    options = {"weights": base_of(args), "path": args.output / "run", "slots": args.slots, "scratch": 1}
    # A block can be any module.  Here these are the word embeddings, and the three parts of each layer.
    blocks = [
        model.encoder.embeddings,
        *(part for layer in model.encoder.encoder.layer for part in layer.children()),
    ]
    with offload.stream(model, blocks, "disk", **options) as engine:
        before = evaluate(model, validation)
        print(f"before    validation loss {before[0]:.4f}, accuracy {100 * before[1]:.1f} %", flush=True)
        optimizer, losses, spans, start = optimizer_for(model, args), [], [], time.perf_counter()
        interval = 0.1 if sys.stderr.isatty() else 10
        with tqdm(total=args.steps, desc="training", unit="step", ncols=100, mininterval=interval) as bar:
            for step, batch in zip(range(args.steps), data.forever(args.seed), strict=False):
                if step == 1:  # records the second and the third step, when everything is under way
                    engine.timeline.start()
                losses.append(float(optimizer.step(lambda batch=batch: loss_of(model, batch))))
                if step == min(2, args.steps - 1):
                    spans = engine.timeline.stop()
                bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}", refresh=False)
                bar.update()
        seconds = time.perf_counter() - start
        after = evaluate(model, validation)
        print(f"after     validation loss {after[0]:.4f}, accuracy {100 * after[1]:.1f} %", flush=True)
        engine.save(args.output / "model.safetensors")
    return {
        "loss_before": before[0],
        "loss_after": after[0],
        "accuracy_before": before[1],
        "accuracy_after": after[1],
        "seconds_per_step": seconds / args.steps,
        "losses": digest_of(losses),
        "spans": spans,
        **watched.stop(),
    }


def child(args: argparse.Namespace, work) -> int:
    result = args.output / f"{args.role}.json"
    try:
        keep_to(args.limit)
        found = work(args)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        found = {"error": str(error).splitlines()[0][:200] or type(error).__name__}
    result.write_text(json.dumps(found))
    return 0


# Around it ----------------------------------------------------------------------------------------


def spawn(role: str, args: argparse.Namespace, limit: int) -> dict:
    """Runs ``role`` in a process with a limit of ``limit`` MiB, and returns what it found."""
    result = args.output / f"{role}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "zokernels.examples.offload_demo", "--role", role, "--limit", str(limit)]
    for key in ("steps", "batch", "width", "slots", "lr", "head_lr", "seed", "output"):
        command += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
    if args.tiny:
        command.append("--tiny")
    # Arenas of malloc, OpenMP's threads and MKL's buffers would take memory for each core of the machine.  A
    # heap of activations of many sizes would have holes.
    settings = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    settings["MKL_DISABLE_FAST_MM"] = "1"
    settings["OMP_NUM_THREADS"] = str(min(4, machine.cores()))
    done = subprocess.run(command, env={**os.environ, **settings}, check=False)
    if not result.exists():
        return {"error": f"exit status {done.returncode}"}
    found = json.loads(result.read_text())
    result.unlink()
    return found


def main(argv: list[str] | None = None) -> int:
    begin, args = time.perf_counter(), arguments(argv)
    if args.role != "parent":
        return child(args, in_memory if args.role == "memory" else streamed)
    import shutil

    shutil.rmtree(args.output / "run", ignore_errors=True)
    sentences, _ = reviews.split(reviews.load(), VALIDATION)
    base = base_of(args)
    narrow = WideClassifier(8)  # it is made for its tokenizer
    some = reviews.Batcher(sentences[:500], narrow.tokenizer, 50, torch.device("cpu")).ordered()
    weights = widen(args.width, ((b.ids, b.mask) for b in some), base, args.seed)
    size = base.stat().st_size
    print(
        f"model     MiniLM-L6 with {args.width:,} neurons a layer: {weights / 1e6:.0f} M weights, "
        f"{size >> 20} MiB on disk"
    )
    free = spawn("memory", args, 0)
    if "error" in free:
        raise SystemExit(f"offload-demo: without a limit: {free['error']}")
    limit = args.limit or free["private"] - (size >> 20) // 3
    print(f"limit     {limit} MiB of private memory; training in memory takes {free['private']} MiB")
    refused = spawn("memory", args, limit)
    print(f"in memory {refused.get('error', 'NO ERROR')}", flush=True)
    found = spawn("streamed", args, limit)
    if "error" in found:
        print(f"FAILED: streamed: {found['error']}", file=sys.stderr)
        return 1
    spans = [offload.Span(*span) for span in found["spans"]]
    words = f"Two steps of a wide MiniLM from disk, {args.slots} slot{'s' * (args.slots > 1)}"
    offload.plot(spans, args.output / "timeline.png", words)
    same = found["losses"][: len(free["losses"])] == free["losses"][: len(found["losses"])]
    print(f"streamed  {found['seconds_per_step']:.2f} s a step, {found['private']} MiB private, "
          f"{found['peak_resident']} MiB resident at most")  # fmt: skip
    print(f"losses    of the first steps equal those in memory, bit for bit: {str(same).lower()}")
    report = {
        "weights": weights,
        "bytes": size,
        "limit_mib": limit,
        "in_memory": free,
        "in_memory_limited": refused,
        "streamed": found,
        "same_losses": same,
        "machine": machine.describe("cpu"),
        "arguments": {k: str(v) for k, v in vars(args).items()},
        "wall_seconds": time.perf_counter() - begin,
    }
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"wrote     {args.output}/report.json, timeline.png, model.safetensors; "
        f"{report['wall_seconds']:.0f} s in all"
    )
    checks = {
        "training in memory kept the limit": "error" in refused,
        "the losses differ from those in memory": same,
        "the validation loss did not fall": args.tiny or found["loss_after"] < found["loss_before"],
    }
    for failure in (text for text, ok in checks.items() if not ok):
        print(f"FAILED: {failure}", file=sys.stderr)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
