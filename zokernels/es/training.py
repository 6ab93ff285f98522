"""Generations: members are shared out, their texts rewarded, and the weights moved."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..checks import check_integer, check_number, fail
from .engines import Engine, Here
from .fleet import Fleet
from .rewards import Reward, rewards_of
from .run import Run


def member(
    engine: Engine, point: tuple[list[int], list[float]], prompts: list[Any], sampling: dict[str, Any]
) -> list[str]:
    """The texts of one member.  Its prompts go in one call of fixed order, so that the batch is the same."""
    engine.perturb(*point)
    return engine.generate(prompts, **sampling)


@dataclasses.dataclass(frozen=True)
class Generation:
    """What :func:`train` yields for each generation."""

    step: int
    rewards: tuple[float, ...]  #: the mean reward of each member; nothing of one that was replayed
    loss: float  #: the estimator's: the mean reward of the members
    seconds: float
    #: The mean reward on the held-out prompts at theta, before the update of generation 0 and after others.
    evaluation: float | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.rewards)


def _restore(engine: Engine) -> None:
    engine.restore()


def _evaluate(engine: Engine, prompts: list[Any], sampling: dict[str, Any]) -> list[str]:
    engine.restore()
    return engine.generate(prompts, **sampling)


def _save(engine: Engine, path: str) -> None:
    engine.save(path)


def texts_of(
    engines: Here,
    points: Sequence[tuple[list[int], list[float]]],
    prompts: Sequence[Any],
    sampling: dict[str, Any] | None = None,
) -> list[list[str]]:
    """The texts of ``prompts`` at each point theta + sum_k coeffs[k] z_k, by the engine that is free first.

    Nothing is trained: afterwards every engine computes with theta again.  An engine that dies is made anew
    and does its work again.

    Args:
        engines: :class:`Here` or :class:`Actors`.
        points: seeds and coefficients of each; ``([], [])`` is theta.
        prompts, sampling: of ``Engine.generate``, the same for all points.
    """
    fleet = Fleet(engines)
    texts = fleet.map(member, [(point, list(prompts), sampling or {}) for point in points])
    fleet.all(_restore)
    return texts


def train(
    engines: Here,
    run: Run,
    prompts: Callable[[int], Sequence[Any]],
    reward: Reward,
    *,
    generations: int,
    sampling: dict[str, Any] | None = None,
    timeout: float | None = None,
    late: float = 0.0,
    held_out: Sequence[Any] = (),
    evaluate_every: int = 10,
    save_every: int | None = None,
    save_to: str | os.PathLike[str] = ".",
    progress: bool = False,
    tensorboard: str | os.PathLike[str] | None = None,
) -> Iterator[Generation]:
    """Trains until the log has ``generations`` of them, and yields each of the new ones.

    Args:
        engines: :class:`Here` or :class:`Actors`, whose engines begin with the base of ``run``.  They know
            which of its updates they have, so that this can be called again with them.
        prompts: those of a generation, by its number; all members get the same.
        reward: of a prompt and the text that came of it; more is better.
        sampling: of ``Engine.generate``.  What is random in it should have a fixed seed, so that members
            differ by their weights alone.
        timeout, late: seconds that a reward may take, and the reward of a text that takes more.
        held_out: prompts on which theta is evaluated at the start and every ``evaluate_every`` generations.
        save_every, save_to: writes ``generation-N.safetensors`` into a folder.
        progress: a bar (tqdm).
        tensorboard: a folder for TensorBoard's files; the package tensorboard writes them.

    A reward is a function of generated text, and that depends on the batch, the kernels and the number of
    ranks.  So what is promised is the log: each generation that was logged is kept to the bit, whatever
    engines run it.  A generation that was killed before its record is taken anew and may come out otherwise
    on other engines.
    """
    check_integer("es", "generations", generations, 0)
    check_integer("es", "evaluate_every", evaluate_every)
    if timeout is not None:
        check_number("es", "timeout", timeout, positive=True)
    write, close = _writer(tensorboard)
    sampling, fleet = sampling or {}, Fleet(engines)
    bar = _bar(progress, generations, len(run.past))
    score = lambda texts, asked: statistics.fmean(rewards_of(reward, asked, texts, timeout, late))
    judge = lambda: (
        score(fleet.map(_evaluate, [(list(held_out), sampling)])[0], held_out) if held_out else None
    )
    try:
        fleet.join(run)
        for step in range(len(run.past), generations):
            if step != len(run.past):
                got = f"{len(run.past)} that are in the log"
                fail("es", "run", f"one train() at a time: {step} generations", got, RuntimeError)
            began, asked = time.monotonic(), list(prompts(step))
            if not asked:
                fail("es", "prompts", "at least one prompt", f"none for generation {step}")
            evaluation = judge() if step == 0 else None
            tasks = [(point, asked, sampling) for point in run.points(step)]
            values = [score(texts, asked) for texts in fleet.map(member, tasks)]
            record = run.record(step, values)
            run.append(record)
            if (update := run.update(record)) is not None:
                fleet.update(update)
            last = step == generations - 1
            if (step + 1) % evaluate_every == 0 or last:
                evaluation = judge()
            if save_every and ((step + 1) % save_every == 0 or last):
                fleet.map(_save, [(os.path.join(save_to, f"generation-{step + 1}.safetensors"),)])
            found = Generation(step, tuple(values), record.loss, time.monotonic() - began, evaluation)
            bar.update(found)
            write(found)
            yield found
    finally:
        bar.close()
        close()


class _Bar:
    def __init__(self, bar: Any = None) -> None:
        self._bar = bar

    def update(self, found: Generation) -> None:
        if self._bar is not None:
            held = {} if found.evaluation is None else {"held out": f"{found.evaluation:.3f}"}
            self._bar.set_postfix(reward=f"{found.mean:.3f}", refresh=False, **held)
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _bar(wanted: bool, total: int, done: int) -> _Bar:
    if not wanted:
        return _Bar()
    from tqdm import tqdm

    return _Bar(tqdm(total=total, initial=done, unit="generation"))


def _writer(folder: str | os.PathLike[str] | None) -> tuple[Callable[[Generation], None], Callable[[], None]]:
    """What writes a generation for TensorBoard, and what closes its file."""
    if folder is None:
        return lambda found: None, lambda: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        fail("es", "tensorboard", "the package tensorboard (pip install tensorboard)", "none", RuntimeError)
    writer = SummaryWriter(os.fspath(folder))

    def write(found: Generation) -> None:
        writer.add_scalar("reward/mean", found.mean, found.step)
        writer.add_scalar("reward/best", max(found.rewards), found.step)
        writer.add_scalar("seconds", found.seconds, found.step)
        if found.evaluation is not None:
            writer.add_scalar("reward/held out", found.evaluation, found.step)
        writer.flush()

    return write, writer.close
