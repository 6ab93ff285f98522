"""A coarse solver of a partial differential equation, corrected by a network in its loop (DeepZero, Chen et
al. 2024, arXiv 2310.02025; solver in the loop, Um et al. 2020, arXiv 2007.00016).

The equation is Burgers', u_t + u u_x = nu u_xx on a circle.  A NumPy program solves it, on 128 points and on
32; the coarse one is eight times as fast and loses what is sharp.  After each of its steps a small network
adds a correction, which is trained so that a whole run of coarse and corrected steps stays close to the fine
solution.  The solver has no gradients, so the network's weights are trained by finite differences through
it, some coordinates in each step (:class:`ZOCGE`).

Beside it: the coarse solver alone ("source"), and the network as it begins, trained by backpropagation to
correct single steps from fine states ("non-interactive"): it has never seen what its corrections lead to.
``python examples/pde.py`` prints each one's error on runs that were not trained on."""

from __future__ import annotations

import argparse
import copy

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zokernels.optim import ZOCGE

FINE, COARSE, STEP, VISCOSITY = 128, 32, 0.04, 0.01


def solve(u: numpy.ndarray, time: float = STEP) -> numpy.ndarray:
    """u [B, N] after ``time``: Rusanov's fluxes, central diffusion, as many steps as the grid needs."""
    dx = 1 / u.shape[1]
    count = max(1, round(time / (0.2 * dx)))
    dt = time / count
    for _ in range(count):
        right = numpy.roll(u, -1, 1)
        speed = numpy.maximum(abs(u), abs(right))
        flux = (u * u + right * right) / 4 - speed * (right - u) / 2
        diffusion = (right - 2 * u + numpy.roll(u, 1, 1)) * VISCOSITY / dx**2
        u = u - dt * ((flux - numpy.roll(flux, 1, 1)) / dx - diffusion)
    return u


def coarsened(u: numpy.ndarray) -> numpy.ndarray:
    """Means of each FINE / COARSE neighbours, [..., COARSE]."""
    return u.reshape(*u.shape[:-1], COARSE, -1).mean(-1)


def runs(count: int, steps: int, seed: int) -> Tensor:
    """Fine solutions on the coarse grid, float32 [count, steps + 1, COARSE], from random smooth waves."""
    rng = numpy.random.default_rng(seed)
    x, u = numpy.arange(FINE) / FINE, numpy.zeros((count, FINE))
    for wave in (1, 2, 3):
        size, shift = rng.normal(size=(count, 1)) / wave, rng.random((count, 1))
        u += 0.6 * size * numpy.sin(2 * numpy.pi * (wave * x + shift))
    states = [u]
    for _ in range(steps):
        states.append(solve(states[-1]))
    return torch.from_numpy(coarsened(numpy.stack(states, 1))).float()


class Corrector(nn.Module):
    """STEP c(u), a correction [B, COARSE] of the state u: c are two convolutions around the circle."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        options = {"kernel_size": 5, "padding": 2, "padding_mode": "circular"}
        self.first, self.second = nn.Conv1d(1, width, **options), nn.Conv1d(width, 1, **options)
        nn.init.zeros_(self.second.weight)  # no correction at first
        nn.init.zeros_(self.second.bias)

    def forward(self, u: Tensor) -> Tensor:
        return STEP * self.second(torch.tanh(self.first(u[:, None])))[:, 0]


def coarse_step(u: Tensor) -> Tensor:
    return torch.from_numpy(solve(u.double().numpy())).float()


@torch.no_grad()
def error(corrector: nn.Module | None, states: Tensor) -> Tensor:
    """The mean absolute error of a run of coarse steps from ``states[:, 0]``."""
    u, errors = states[:, 0], []
    for t in range(1, states.shape[1]):
        u = coarse_step(u)
        u = u if corrector is None else u + corrector(u)
        errors.append((u - states[:, t]).abs().mean())
    return torch.stack(errors).mean()


def train_single_steps(states: Tensor, steps: int) -> Corrector:
    """Trains the network alone by backpropagation, without the solver, from fine states to the next ones."""
    torch.manual_seed(0)
    corrector = Corrector()
    moved = coarse_step(states[:, :-1].reshape(-1, COARSE))
    missing = states[:, 1:].reshape(-1, COARSE) - moved
    optimizer = torch.optim.Adam(corrector.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(corrector(moved), missing).backward()
        optimizer.step()
    return corrector


def train_in_the_loop(start: Corrector, states: Tensor, steps: int, coordinates: int, lr: float) -> Corrector:
    """From ``start``, by finite differences of whole runs, solver and network together."""
    corrector, generator = copy.deepcopy(start), torch.Generator().manual_seed(0)
    optimizer = ZOCGE(
        corrector.named_parameters(),
        lr,
        eps=1e-3,
        clip=0.2,
        per_step=coordinates,
        momentum=0.9,
        estimator="two-sided",
    )
    for _ in range(steps):
        rows = torch.randint(len(states), (8,), generator=generator)
        optimizer.step(lambda: error(corrector, states[rows]))  # noqa: B023
    return corrector


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="of the training in the loop")
    parser.add_argument("--coordinates", type=int, default=20, help="of each of these steps")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--length", type=int, default=12, help="steps of the solver in a run")
    args = parser.parse_args(argv)
    training, unseen = runs(32, args.length, 1), runs(32, args.length, 2)
    single = train_single_steps(training, 300)
    in_the_loop = train_in_the_loop(single, training, args.steps, args.coordinates, args.lr)
    correctors = {"source": None, "non-interactive": single, "in the loop": in_the_loop}
    results = {name: error(corrector, unseen).item() for name, corrector in correctors.items()}
    for name, found in results.items():
        print(f"{name:16} mean absolute error {found:.5f} ({found / results['source']:.2f} of source)")
    return results


if __name__ == "__main__":
    main()
