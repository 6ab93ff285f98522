"""Fine-tunes every weight of a pretrained sentence encoder on movie reviews, with forward passes only.

``python examples/demo.py`` (or ``make demo``, or ``zokernels demo`` from an installed package) trains
MiniLM-L6 and a zero-shot head with ZOSGD.  Then it times the hot path of a step beside MeZO's eager loop, and
checks that the weights are restored bit for bit and that the log of the run gives them again.  It leaves the
weights before and after, the log, the loss curve and ``report.json`` in ``build/demo`` (of an installed
package: ``zokernels-demo/demo``).  The exit status is 1 if loss or accuracy did not improve, or if a check
failed.  docs/demo.md says what was tried."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokernels.bench import machine
from zokernels.examples import curve, hotpath, reviews
from zokernels.examples.encoder import Classifier
from zokernels.optim import ZOSGD
from zokernels.trajectory import replay_

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VALIDATION, EVALUATIONS = 1000, 4
LOG, BASE = "run.zk", "base.safetensors"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=None if argv is None else "zokernels demo", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=24, help="sentences a step")
    parser.add_argument("--lr", type=float, default=3e-6, help="of the encoder")
    parser.add_argument("--head-lr", type=float, default=0.15, help="of the head")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default=reviews.WORK / "demo")
    parser.add_argument("--tiny", action="store_true", help="a few steps on few sentences: whether it runs")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.tiny:
        args.steps, args.batch = min(args.steps, 4), min(args.batch, 4)
    if args.steps < 1 or args.batch < 1:
        parser.error("--steps and --batch: expected at least 1")
    return args


def loss_of(model: nn.Module, batch: reviews.Batch) -> Tensor:
    return F.cross_entropy(model(batch.ids, batch.mask).float(), batch.labels)


@torch.inference_mode()
def evaluate(model: nn.Module, batches: list[reviews.Batch]) -> tuple[float, float]:
    """The mean loss and the accuracy over all sentences of ``batches``."""
    loss, right, count = 0.0, 0, 0
    for batch in batches:
        logits = model(batch.ids, batch.mask).float()
        loss += F.cross_entropy(logits, batch.labels, reduction="sum").item()
        right += (logits.argmax(1) == batch.labels).sum().item()
        count += len(batch.labels)
    return loss / count, right / count


def optimizer_for(model: Classifier, args: argparse.Namespace) -> ZOSGD:
    """An optimizer with one z for all weights and two sizes of perturbation.

    The head's eps is 300 times the encoder's.  The loss difference is one number for both, and in a training
    this short the encoder's part of it is mostly noise of the batch.  docs/demo.md has the figures."""
    head = [(n, p) for n, p in model.named_parameters() if n.startswith("head.")]
    encoder = [(n, p) for n, p in model.named_parameters() if not n.startswith("head.")]
    groups = [
        {"params": encoder, "lr": args.lr, "eps": 1e-3},
        {"params": head, "lr": args.head_lr, "eps": 0.3},
    ]
    log = args.output / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    return ZOSGD(groups, lr=args.lr, seed=args.seed, trajectory=log)


def train(
    model: Classifier, data: reviews.Batcher, validation: list[reviews.Batch], args: argparse.Namespace
) -> tuple[list[float], list[tuple[int, float, float]], float]:
    """Trains, and returns the losses, the points of the validation, and the seconds of the training alone.

    A point is (step, loss, accuracy) on the validation sentences.
    """
    from tqdm import tqdm

    optimizer = optimizer_for(model, args)
    every = max(1, -(-args.steps // EVALUATIONS))
    points, losses, seconds = [(0, *evaluate(model, validation))], [], 0.0
    print(f"before    validation loss {points[0][1]:.4f}, accuracy {100 * points[0][2]:.1f} %", flush=True)
    interval = 0.1 if sys.stderr.isatty() else 10  # a log file gets a line every ten seconds
    with tqdm(total=args.steps, desc="training", unit="step", ncols=100, mininterval=interval) as bar:
        for step, batch in zip(range(1, args.steps + 1), data.forever(args.seed), strict=False):
            start = time.perf_counter()
            losses.append(optimizer.step(lambda batch=batch: loss_of(model, batch)))
            if step % 10 == 0 or step == args.steps:  # reading a loss waits for the GPU
                losses[-10:] = [float(loss) for loss in losses[-10:]]
                recent = losses[-50:]
                bar.set_postfix(loss=f"{sum(map(float, recent)) / len(recent):.3f}", refresh=False)
            seconds += time.perf_counter() - start
            bar.update()
            if step % every == 0 or step == args.steps:
                points.append((step, *evaluate(model, validation)))
    optimizer.trajectory.close()
    print(f"after     validation loss {points[-1][1]:.4f}, accuracy {100 * points[-1][2]:.1f} %", flush=True)
    return [float(loss) for loss in losses], points, seconds


def replayed(model: nn.Module, base: dict[str, Tensor], log: pathlib.Path) -> tuple[bool, float]:
    """Whether the log turns ``base`` into the model's weights, bit for bit, and the seconds that it takes."""
    start = time.perf_counter()
    replay_(base, log)
    seconds = time.perf_counter() - start
    same = all(torch.equal(hotpath.bits(p), hotpath.bits(base[n])) for n, p in model.named_parameters())
    return same, seconds


def main(argv: list[str] | None = None) -> int:
    begin, args = time.perf_counter(), arguments(argv)
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    model = Classifier()
    sentences = reviews.load()
    if args.tiny:
        sentences = sentences[:12] + sentences[-12:]
    training, held_out = reviews.split(sentences, min(VALIDATION, len(sentences) // 3))
    model.to(device, DTYPES[args.dtype])
    data = reviews.Batcher(training, model.tokenizer, args.batch, device)
    validation = reviews.Batcher(held_out, model.tokenizer, 50, device).ordered()
    weights = sum(p.numel() for p in model.parameters())
    print(f"model     MiniLM-L6, {weights / 1e6:.1f} M weights, all trained, {args.dtype} on {args.device}")
    print(f"data      {len(training):,} movie-review sentences, {len(held_out):,} more to validate")
    some = reviews.Batcher(training[:VALIDATION], model.tokenizer, 50, device).ordered()
    model.set_centre((b.ids, b.mask) for b in some)

    write_weights(model, args.output / BASE)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses, points, seconds = train(model, data, validation, args)
    log = args.output / LOG
    same, replay_seconds = replayed(model, base, log)
    print(
        f"replayed  {args.steps} steps of {log.name} ({log.stat().st_size:,} bytes) in "
        f"{replay_seconds:.1f} s: {same}"
    )
    check = lambda dtype: hotpath.restored_exactly(model, lambda m: loss_of(m, validation[0]), dtype)
    restored = {name: check(DTYPES[name]) for name in ("fp32", "bf16")}
    print(f"restored  bit for bit: {', '.join(f'{n} {str(ok).lower()}' for n, ok in restored.items())}")
    hot = hotpath.measure(model, rounds=1 if args.tiny else 7)
    print(
        f"hot path  {hot.combines:.0f} ms a step ({hot.optimizer:.0f} with the optimizer's Python), "
        f"MeZO's eager loop {hot.eager:.0f} ms: {hot.speedup:.1f}x"
    )

    tenth = max(1, len(losses) // 10)
    report = {
        "loss_first": points[0][1],
        "loss_last": points[-1][1],
        "acc_before": points[0][2],
        "acc_after": points[-1][2],
        "steps": args.steps,
        "ms_per_step_hot_path": hot.combines,
        "ms_per_step_hot_path_eager": hot.eager,
        "ms_per_step_optimizer_without_forwards": hot.optimizer,
        "hot_path_speedup": hot.speedup,
        "hot_path_definition": "the combine calls of a step; eager: 3 perturbations, 1 update; 1 thread each",
        "replayed_exactly": same,
        "replay_seconds": replay_seconds,
        "log_bytes": log.stat().st_size,
        "restored_exactly": all(restored.values()),
        "restored_exactly_by_dtype": restored,
        "loss_definition": "cross entropy on the validation sentences, before the first and after "
        "the last step",
        "train_loss_first_tenth": sum(losses[:tenth]) / tenth,
        "train_loss_last_tenth": sum(losses[-tenth:]) / tenth,
        "validation": [dict(zip(("step", "loss", "accuracy"), point, strict=True)) for point in points],
        "steps_per_second": args.steps / seconds,
        "seed": args.seed,
        "batch": args.batch,
        "lr": args.lr,
        "head_lr": args.head_lr,
        "dtype": args.dtype,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "training_sentences": len(training),
        "validation_sentences": len(held_out),
        "weights": weights,
        "machine": machine.describe(args.device),
    }
    save(args.output, model, losses, points, report, begin)
    return 0 if args.tiny else verdict(report)


def write_weights(model: nn.Module, path: pathlib.Path) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: t.detach().cpu().contiguous() for n, t in model.state_dict().items()}, path)


def save(
    folder: pathlib.Path, model: nn.Module, losses: list[float], points: list, report: dict, begin: float
) -> None:
    write_weights(model, folder / "model.safetensors")
    weights = f"{report['weights'] / 1e6:.1f} M"
    title = f"Every weight of MiniLM-L6 ({weights}) trained on movie reviews without gradients"
    curve.draw(folder / "loss.png", losses, points, title)
    report["wall_seconds"] = time.perf_counter() - begin
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"wrote     {folder}/report.json, loss.png, model.safetensors, {LOG}; "
        f"{report['wall_seconds']:.0f} s in all"
    )


def verdict(report: dict) -> int:
    """The exit status: 0, or 1 after printing what failed."""
    checks = {
        "the validation loss did not fall": report["loss_last"] < report["loss_first"],
        "the validation accuracy did not rise": report["acc_after"] > report["acc_before"],
        "the log did not replay to the weights": report["replayed_exactly"],
        "the weights were not restored bit for bit": report["restored_exactly"],
    }
    for failure in (text for text, ok in checks.items() if not ok):
        print(f"FAILED: {failure}", file=sys.stderr)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
