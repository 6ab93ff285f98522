"""Fine-tunes a real language model, SmolLM2-135M-Instruct, on movie reviews, with forward passes only.

    make llm-demo                    # or: python examples/llm_demo.py [--lora 8] [--seed 1]

As MeZO does it: a sentence becomes the prompt "... It was", and the model says "great" or "terrible": the
loss is the cross entropy between these two words' logits at the last token.  All weights are bf16, the
updates are rounded stochastically, and nothing is differentiated.  Each step is FZOO's: one forward at theta
and one for each of ``--directions`` members.

It reports loss and accuracy on held-out sentences before and after, the standard error of the paired
difference, and what the model writes of two prompts.  It leaves the log, the loss curve, the weights before
and after and ``report.json`` in ``build/llm-demo``; the log is replayed onto the base weights and compared
bit for bit.  The exit status is 1 if neither accuracy nor loss improved by three standard errors, or if a bit
differs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import statistics
import sys
import time
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # set before transformers is imported: nothing is fetched

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokernels.bench import machine
from zokernels.examples import curve, reviews
from zokernels.examples.smollm2 import convert
from zokernels.optim import FZOO
from zokernels.trajectory import replay_

#: Prompts, each with the words of a negative and a positive sentence and the space that stands before them.
PROMPTS = {
    "mezo": ("{} It was", (" terrible", " great")),
    "sentiment": ("Review: {}\nSentiment:", (" negative", " positive")),
}
TEXTS = ("A good film needs", "I fell asleep twice. It was")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompt", choices=sorted(PROMPTS), default="mezo")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16, help="sentences a step")
    parser.add_argument("--directions", type=int, default=8, help="members; a step takes one forward more")
    parser.add_argument("--lr", type=float, help="default: 1e-3 for all weights, 1e-2 with --lora")
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="adapters instead of all weights")
    parser.add_argument("--validation", type=int, default=400, help="held-out sentences")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=pathlib.Path, default=reviews.WORK / "smollm2")
    parser.add_argument("--output", type=pathlib.Path, default=reviews.WORK / "llm-demo")
    args = parser.parse_args(argv)
    args.lr = args.lr or (1e-2 if args.lora else 1e-3)
    return args


class Judge(nn.Module):
    """Logits [batch, 2] of two words after each prompt, which is padded on the left."""

    def __init__(self, model: nn.Module, tokenizer: Any, words: tuple[str, str]) -> None:
        super().__init__()
        self.model = model
        ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        assert all(len(i) == 1 for i in ids), "a label word is one token"
        self.words = [i[0] for i in ids]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        places = (mask.cumsum(1) - 1).clamp(min=0)
        last = {"logits_to_keep": 1, "use_cache": False}
        found = self.model(input_ids=ids, attention_mask=mask, position_ids=places, **last)
        return found.logits[:, -1, self.words].float()


class Prompts(reviews.Batcher):
    """Batches of prompts of similar length, padded on the left, so that all end at the same place."""

    def __init__(self, data: list[reviews.Review], tokenizer: Any, size: int, template: str) -> None:
        prompts = [reviews.Review(template.format(r.text), r.label) for r in data]
        super().__init__(prompts, tokenizer, size, torch.device("cpu"), max_length=96)

    def _collate(self, items: Any) -> reviews.Batch:
        batch = super()._collate(items)
        turned = [row.roll(int((row == 0).sum())) for row in batch.mask]
        ids = [row.roll(int((mask == 0).sum())) for row, mask in zip(batch.ids, batch.mask, strict=True)]
        return reviews.Batch(torch.stack(ids), torch.stack(turned), batch.labels)


@torch.inference_mode()
def evaluate(model: nn.Module, batches: list[reviews.Batch]) -> tuple[Tensor, Tensor]:
    """The loss of each held-out sentence, and 1 where the model is right: always in the same order."""
    losses, right = [], []
    for batch in batches:
        logits = model(batch.ids, batch.mask)
        losses.append(F.cross_entropy(logits, batch.labels, reduction="none"))
        right.append((logits.argmax(1) == batch.labels).double())
    return torch.cat(losses).double(), torch.cat(right)


def difference(before: Tensor, after: Tensor) -> tuple[float, float]:
    """The mean of after - before over the sentences, and its standard error."""
    change = after - before
    return float(change.mean()), float(change.std() / math.sqrt(len(change)))


def improved(gain: float, error: float) -> bool:
    """Whether a gain is at least three standard errors; where nothing has changed both are 0."""
    return gain > 0 and gain >= 3 * error


@torch.inference_mode()
def write(model: nn.Module, tokenizer: Any) -> list[str]:
    """What the model makes of :data:`TEXTS`, always the likeliest token."""
    found = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")
        made = model.generate(**ids, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        found.append(tokenizer.decode(made[0], skip_special_tokens=True))
    return found


def load(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = convert(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if args.lora:
        import peft

        torch.manual_seed(args.seed)
        layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = peft.LoraConfig(r=args.lora, lora_alpha=2 * args.lora, target_modules=layers)
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    return model.eval(), tokenizer


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def main(argv: list[str] | None = None) -> int:
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm

    args = arguments(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(args)
    template, words = PROMPTS[args.prompt]
    judge = Judge(model, tokenizer, words)
    training, held_out = reviews.split(reviews.load(), args.validation)
    data = Prompts(training, tokenizer, args.batch, template)
    validation = Prompts(held_out, tokenizer, 32, template).ordered()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    count = sum(p.numel() for _, p in named)
    print(f"{count:,} weights in bf16, {len(training)} sentences, {len(held_out)} held out", flush=True)
    save_file(weights_of(model), args.output / "base.safetensors")
    log = args.output / "run.zk"
    log.unlink(missing_ok=True)
    options = {"seed": args.seed, "directions": args.directions, "trajectory": log}
    optimizer = FZOO(named, lr=args.lr, eps=args.eps, **options)
    texts, start = [write(model, tokenizer)], time.perf_counter()
    before = evaluate(judge, validation)
    print(f"before    loss {before[0].mean():.4f}, accuracy {100 * before[1].mean():.1f} %", flush=True)
    losses, began, cpu = [], time.perf_counter(), time.process_time()
    with tqdm(total=args.steps, desc="training", unit="step", ncols=100) as bar:
        for _, batch in zip(range(args.steps), data.forever(args.seed), strict=False):
            closure = lambda batch=batch: F.cross_entropy(judge(batch.ids, batch.mask), batch.labels)
            losses.append(float(optimizer.step(closure)))
            bar.set_postfix(loss=f"{statistics.fmean(losses[-20:]):.3f}", refresh=False)
            bar.update()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    optimizer.trajectory.close()
    after = evaluate(judge, validation)
    texts.append(write(model, tokenizer))
    loss, accuracy = difference(before[0], after[0]), difference(before[1], after[1])
    print(f"training  {seconds:.0f} s by the clock, {cpu:.0f} s of processors")
    print(f"after     loss {after[0].mean():.4f}, accuracy {100 * after[1].mean():.1f} %")
    print(f"          loss {loss[0]:+.4f} +- {loss[1]:.4f}, accuracy {100 * accuracy[0]:+.1f} +- "
          f"{100 * accuracy[1]:.1f} points (standard error of the paired difference)")  # fmt: skip
    save_file(weights_of(model), args.output / "trained.safetensors")
    replayed = load_file(args.output / "base.safetensors")
    replay_(replayed, log)
    trained = load_file(args.output / "trained.safetensors")
    bits = lambda t: t.view(torch.int16)
    exact = all(torch.equal(bits(t), bits(replayed[name])) for name, t in trained.items())
    print(f"replay    {'the trained weights, bit for bit' if exact else 'OTHER WEIGHTS'}")
    for name, pair in zip(TEXTS, zip(*texts, strict=True), strict=True):
        print(f"{name!r}\n   before: {pair[0]!r}\n   after:  {pair[1]!r}")
    learned = improved(*accuracy) or improved(-loss[0], loss[1])
    points = [(0, float(before[0].mean()), float(before[1].mean()))]
    points.append((args.steps, float(after[0].mean()), float(after[1].mean())))
    curve.draw(args.output / "loss.png", losses, points, f"SmolLM2-135M, FZOO, {count:,} weights")
    report = {
        "machine": machine.describe("cpu"), "options": {k: str(v) for k, v in vars(args).items()},
        "weights": count, "points": points, "loss": loss, "accuracy": accuracy, "losses": losses,
        "seconds": seconds, "cpu_seconds": cpu, "seconds_in_all": time.perf_counter() - start,
        "replay_exact": exact, "texts": texts,
    }  # fmt: skip
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    if not learned:
        print("neither accuracy nor loss improved by three standard errors")
    return 0 if learned and exact else 1


if __name__ == "__main__":
    sys.exit(main())
