"""A population in one batched forward: handwritten digits from a reward that has no gradient.

    python examples/population.py [FOLDER] [GENERATIONS]

Each generation has 256 members, 128 directions of rank 1 and their mirror images (EGGROLL).  All of them
classify the same images in one forward, whose products with the weights they share.  A member's reward is the
share of images that it gets right, which is a count: nothing could be differentiated.  The accuracy on images
that no member has seen is printed on the way, and the learning curve is drawn to FOLDER/population.png.  It
takes less than a minute on two cores.
"""

from __future__ import annotations

import pathlib
import sys
import time

import torch
from tqdm import tqdm

from zokernels.examples import digits
from zokernels.optim import EGGROLL, Cohort


def train(folder: pathlib.Path, generations: int) -> list[tuple[int, float, float]]:
    """(generation, mean reward of its members, accuracy on validation images) on the way."""
    training, validation = digits.load()
    model, generator = digits.network(), torch.Generator().manual_seed(1)
    rate = torch.tensor(LEARNING_RATE)
    optimizer = EGGROLL(
        model.named_parameters(), lr=rate, eps=EPS, directions=128, maximize=True, restore="products"
    )
    points = [(0, digits.accuracy(model, training), digits.accuracy(model, validation))]
    start = time.perf_counter()
    with tqdm(total=generations, unit="generation", disable=None) as bar:
        for generation in range(1, generations + 1):
            rate.fill_(LEARNING_RATE * (1 - 0.9 * generation / generations))
            x, y = digits.batch(training, 128, generator)

            def rewards(cohort: Cohort, x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                answers = model(cohort.repeat(x)).argmax(-1)
                return cohort.mean((answers == cohort.repeat(y)).float())

            reward = optimizer.step(rewards, batched=True).item()
            bar.update()
            if generation % max(1, generations // 20) == 0:
                points.append((generation, reward, digits.accuracy(model, validation)))
                bar.set_postfix(reward=f"{reward:.3f}", validation=f"{points[-1][2]:.3f}")
    seconds = time.perf_counter() - start
    print(
        f"{generations} generations of 256 members in {seconds:.1f} s: validation accuracy "
        f"{points[0][2]:.1%} to {points[-1][2]:.1%}"
    )
    draw(folder / "population.png", points)
    return points


LEARNING_RATE, EPS = 1.0, 0.1


def draw(path: pathlib.Path, points: list[tuple[int, float, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    at, rewards, accuracy = zip(*points, strict=True)
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    axes.plot(at[1:], rewards[1:], color="#3b6ea5", label="mean reward of the members")
    axes.plot(at, accuracy, "o-", color="#d1662a", markersize=3, label="accuracy on validation images")
    axes.set(xlabel="generation", ylabel="share of digits that are right", ylim=(0, 1))
    axes.legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"learning curve: {path}")


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    points = train(folder, int(sys.argv[2]) if len(sys.argv) > 2 else 300)
