"""Evolution strategies on SmolLM2-135M inside vLLM: short and correct answers, by reward alone.

    make es-demo                    # or: python examples/es_vllm.py --folder .venv-vllm/smollm2

Engines are Ray actors with a vLLM each.  A generation asks every member of the population the same questions;
the reward of an answer is 1 if it has the right word, less a little for each word too many.  The log is
``build/es/run.zk``, and a run that was killed goes on from it.  At the end the log is replayed onto the base
checkpoint, and compared with what the engines hold, bit for bit.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pathlib
import statistics
import sys
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent

#: Countries with the answers that count; the first are trained on, the last are held out.
CAPITALS = """
France Paris|Germany Berlin|Italy Rome|Spain Madrid|Japan Tokyo|Russia Moscow|Egypt Cairo|Greece Athens
Ireland Dublin|Austria Vienna|Portugal Lisbon|Poland Warsaw|Sweden Stockholm|Norway Oslo|Denmark Copenhagen
Finland Helsinki|Cuba Havana|Peru Lima|Kenya Nairobi|China Beijing|India Delhi|Iran Tehran|Iraq Baghdad
Turkey Ankara|England London|Hungary Budapest|Belgium Brussels|Canada Ottawa|Thailand Bangkok|Chile Santiago
Lebanon Beirut|Jordan Amman
"""
HELD_OUT = 8
#: Words of an answer beyond this many cost PENALTY each.
SHORT, PENALTY = 3, 0.05


class Question(NamedTuple):
    text: str
    answer: str


def questions() -> list[Question]:
    pairs = [pair.split() for line in CAPITALS.split("\n") for pair in line.split("|") if pair]
    return [Question(f"What is the capital of {country}?", city) for country, city in pairs]


def chat(question: Question) -> list[dict[str, str]]:
    return [{"role": "user", "content": question.text}]


def reward(asked: list[dict[str, str]], text: str) -> float:
    """1 for the right word, less PENALTY for each word beyond SHORT."""
    right = {question.text: question.answer for question in questions()}[asked[0]["content"]]
    return float(right in text) - PENALTY * max(0, len(text.split()) - SHORT)


def make_engine(folder: str) -> object:
    """An engine, in a process of its own: a vLLM on this CPU, or on the GPU that Ray has given it."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM

    from zokernels.integrations.vllm import Engine, WorkerExtension

    name = f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}"
    return Engine(LLM(folder, worker_extension_cls=name, enforce_eager=True, max_model_len=256))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / ".venv-vllm" / "smollm2")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "build" / "es")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="for each engine")
    parser.add_argument("--generations", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=10, help="stop after so many; the next call goes on")
    parser.add_argument("--pairs", type=int, default=4, help="antithetic pairs in a population")
    parser.add_argument("--sigma", type=float, default=2e-3)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--questions", type=int, default=6, help="for each member")
    parser.add_argument("--tokens", type=int, default=8, help="of an answer, at most")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from examples.smollm2 import convert
    from zokernels.cli import main as zokernels
    from zokernels.es import Actors, Run, Settings, train
    from zokernels.step.estimators import Population

    args.out.mkdir(parents=True, exist_ok=True)
    folder, asked = str(convert(args.folder)), [chat(q) for q in questions()]
    training, held_out = asked[:-HELD_OUT], asked[-HELD_OUT:]
    estimator = Population(args.pairs, mirrored=True, maximize=True)
    run = Run(folder, args.out / "run.zk", Settings(estimator, sigma=args.sigma, lr=args.lr))
    print(f"{len(run.past)} generations are in {args.out / 'run.zk'}")
    engines = Actors(lambda i: make_engine(folder), args.engines, num_gpus=args.gpus)

    def batch(step: int) -> list[list[dict[str, str]]]:
        """Neighbouring questions, further on in each generation."""
        begin = step * args.questions
        return list(itertools.islice(itertools.cycle(training), begin, begin + args.questions))

    began, evaluations, means = time.monotonic(), [], []
    sampling = {"temperature": 0.0, "max_tokens": args.tokens}
    for generation in train(
        engines, run, batch, reward, generations=args.generations, sampling=sampling, held_out=held_out,
        evaluate_every=5, save_every=args.generations, save_to=args.out, timeout=5.0, progress=True,
    ):  # fmt: skip
        means.append(generation.mean)
        if generation.evaluation is not None:
            evaluations.append(generation.evaluation)
        if time.monotonic() - began > 60 * args.minutes:
            print("\nthe minutes are over; the same command goes on")
            break
    run.close()
    if means:
        fifth = max(1, len(means) // 5)
        print(f"reward of members: first {statistics.fmean(means[:fifth]):.3f}, "
              f"last {statistics.fmean(means[-fifth:]):.3f}")  # fmt: skip
    if evaluations:
        print("reward on held-out questions:", " ".join(f"{value:.3f}" for value in evaluations))
    trained = args.out / f"generation-{args.generations}.safetensors"
    if trained.exists():
        base = str(args.folder / "model.safetensors")
        sys.exit(zokernels(["verify", str(args.out / "run.zk"), base, str(trained)]))


if __name__ == "__main__":
    main()
