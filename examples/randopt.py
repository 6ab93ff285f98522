"""RandOpt inside vLLM: the best K of many random perturbations of SmolLM2-135M, and their majority vote.

    .venv-vllm/bin/python examples/randopt.py --folder .venv-vllm/smollm2

Nothing is trained.  N members theta + sigma z_k answer the questions of examples/es_vllm.py; the K that
answer best are kept, as K seeds and no weights.  On held-out questions each of them answers again, and the
answer that most of them give counts.  Source: sunrainyg/RandOpt (arXiv 2603.12228).
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Found(NamedTuple):
    """What :func:`search` has found: the kept members, the best first, and what is known of all."""

    seeds: list[int]
    scores: list[float]  #: the mean reward of every member on the training prompts, in order
    theta: float  #: the same of the unperturbed model


def search(
    engines: Any,
    prompts: Sequence[Any],
    reward: Callable[[Any, str], float],
    *,
    members: int,
    best: int,
    sigma: float,
    seed: int = 0,
    timeout: float | None = None,
    sampling: dict[str, Any] | None = None,
) -> Found:
    """The ``best`` of ``members`` random perturbations, by their mean reward on ``prompts``.

    Member k has the noise of derive_seed(seed, 0, k).  Of equal rewards the member that comes first counts.
    """
    from zokernels.contract import derive_seed_int
    from zokernels.es import rewards_of, texts_of

    if not 1 <= best <= members:
        raise SystemExit(f"best: expected a number from 1 to {members} members, got {best}")
    seeds = [derive_seed_int(seed, 0, k) for k in range(members)]
    points: list[tuple[list[int], list[float]]] = [([], []), *(([s], [sigma]) for s in seeds)]
    texts = texts_of(engines, points, prompts, sampling)
    theta, *scores = [statistics.fmean(rewards_of(reward, prompts, own, timeout, 0.0)) for own in texts]
    order = sorted(range(members), key=lambda k: -scores[k])
    return Found([seeds[k] for k in order[:best]], scores, theta)


def ensemble(
    engines: Any,
    found: Found,
    prompts: Sequence[Any],
    answer: Callable[[Any, str], str],
    *,
    sigma: float,
    sampling: dict[str, Any] | None = None,
) -> tuple[list[str], list[list[str]]]:
    """The majority's answer to each prompt, and each kept member's own answers.

    ``answer`` takes the answer out of a text; "" is none and has no vote.  Of equally frequent answers that
    of the better member counts.
    """
    from zokernels.es import texts_of

    texts = texts_of(engines, [([s], [sigma]) for s in found.seeds], prompts, sampling)
    each = [[answer(prompt, text) for prompt, text in zip(prompts, own, strict=True)] for own in texts]
    counts = [collections.Counter(a for a in votes if a) for votes in zip(*each, strict=True)]
    return [votes.most_common(1)[0][0] if votes else "" for votes in counts], each


def capital(asked: list[dict[str, str]], text: str) -> str:
    """The first name in a text that is not in the question: a capitalised word that does not begin it."""
    names = re.findall(r"(?<!^)\b[A-Z][a-z]+", text)
    return next((name for name in names if name not in asked[0]["content"]), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / ".venv-vllm" / "smollm2")
    parser.add_argument("--engines", type=int, default=1, help="1: in this process; more: Ray actors")
    parser.add_argument("--gpus", type=float, default=0, help="for each engine")
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--best", type=int, default=5)
    parser.add_argument("--sigma", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=16, help="of an answer, at most")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from examples import es_vllm
    from examples.smollm2 import convert
    from zokernels.es import Actors, Here, texts_of

    folder, questions = str(convert(args.folder)), es_vllm.questions()
    right = {question.text: question.answer for question in questions}
    asked = [es_vllm.chat(question) for question in questions]
    training, held_out = asked[: -es_vllm.HELD_OUT], asked[-es_vllm.HELD_OUT :]
    make = lambda i: es_vllm.make_engine(folder)
    engines = Here(make) if args.engines == 1 else Actors(make, args.engines, num_gpus=args.gpus)
    sampling = {"temperature": 0.0, "max_tokens": args.tokens}
    score = lambda prompt, answer: float(answer == right[prompt[0]["content"]])
    found = search(
        engines, training, lambda prompt, text: score(prompt, capital(prompt, text)), members=args.members,
        best=args.best, sigma=args.sigma, seed=args.seed, sampling=sampling,
    )  # fmt: skip
    print(f"right on {len(training)} questions: theta {found.theta:.3f}, members {min(found.scores):.3f} to "
          f"{max(found.scores):.3f}, kept {found.seeds}")  # fmt: skip
    (alone,) = texts_of(engines, [([], [])], held_out, sampling)
    together, each = ensemble(engines, found, held_out, capital, sigma=args.sigma, sampling=sampling)
    theta = [capital(prompt, text) for prompt, text in zip(held_out, alone, strict=True)]
    for name, answers in (("theta", theta), ("the best alone", each[0]), ("majority", together)):
        share = statistics.fmean(map(score, held_out, answers))
        print(f"right on {len(held_out)} held-out questions: {name} {share:.3f}")


if __name__ == "__main__":
    main()
