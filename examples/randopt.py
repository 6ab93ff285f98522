"""RandOpt inside vLLM: the best K of many random perturbations of SmolLM2-135M, and their majority vote.

    .venv-vllm/bin/python examples/randopt.py --folder .venv-vllm/smollm2

Nothing is trained.  N members theta + sigma z_k answer the questions of examples/es_vllm.py; the K that
answer best are kept, as K seeds and no weights.  On held-out questions each of them answers again, and the
name that most of them give counts.  Source: sunrainyg/RandOpt (arXiv 2603.12228).
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import re
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def vote(question: str, texts: list[str]) -> str:
    """The name that most texts give: a capitalised word that neither begins a text nor is in the question."""
    names = [set(re.findall(r"(?<!^)\b[A-Z][a-z]+", text)) for text in texts]
    counts = collections.Counter(name for found in names for name in found if name not in question)
    return counts.most_common(1)[0][0] if counts else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / ".venv-vllm" / "smollm2")
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--best", type=int, default=4)
    parser.add_argument("--sigma", type=float, default=2e-3)
    parser.add_argument("--tokens", type=int, default=16, help="of an answer, at most")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from examples import es_vllm
    from examples.smollm2 import convert

    engine = es_vllm.make_engine(str(convert(args.folder)))
    questions = es_vllm.questions()
    training, held_out = questions[: -es_vllm.HELD_OUT], questions[-es_vllm.HELD_OUT :]
    sampling = {"temperature": 0.0, "max_tokens": args.tokens}

    def answers(seed: int | None, asked: list[es_vllm.Question]) -> list[str]:
        engine.perturb([] if seed is None else [seed], [] if seed is None else [args.sigma])
        return engine.generate([es_vllm.chat(q) for q in asked], **sampling)

    def right(texts: list[str], asked: list[es_vllm.Question]) -> float:
        return statistics.fmean(q.answer in text for q, text in zip(asked, texts, strict=True))

    scores = {seed: right(answers(seed, training), training) for seed in range(args.members)}
    best = sorted(scores, key=lambda seed: -scores[seed])[: args.best]
    print(f"right on {len(training)} questions: theta {right(answers(None, training), training):.3f}, "
          f"members {min(scores.values()):.3f} to {max(scores.values()):.3f}, kept {best}")  # fmt: skip
    alone = answers(None, held_out)
    each = [answers(seed, held_out) for seed in best]
    together = [vote(q.text, list(texts)) for q, texts in zip(held_out, zip(*each, strict=True), strict=True)]
    found = {"theta": alone, "the best alone": each[0], "majority": together}
    shares = ", ".join(f"{name} {right(texts, held_out):.3f}" for name, texts in found.items())
    print(f"right on {len(held_out)} held-out questions: {shares}")


if __name__ == "__main__":
    main()
