"""Evolution strategies for language models in inference engines, with a run that is a log.

A generation perturbs the weights once for each member of a population, lets an engine answer the same prompts
with each, turns the answers into rewards, and moves the weights along the members' noise:

    theta <- round((1 - lr * weight_decay) theta - lr sum_k g_k z_k)

g comes from the rewards by an :class:`~zokernels.step.estimators.Estimator` (z-scores, ranks, antithetic
pairs: :class:`Population`), as in an optimizer's step.  Each generation is a step of the log
(docs/trajectory.md), written before the update.  So ``zokernels replay`` makes the trained weights of the
base checkpoint and the log, bit for bit what every engine holds, and a run that was killed goes on from its
log with any number of engines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .checks import DTYPES, check_integer, check_number, fail
from .contract import derive_seed_int
from .files.appending import AppendedFile
from .files.safetensors import Checkpoint
from .step.estimators import Estimator, Population
from .step.guards import uninterrupted
from .step.rules.sgd import SGD
from .step.scalars import NO, decay_of, gate, projected_gradient
from .step.step import StepOptimizer
from .trajectory.format import Log, Record, encode, read, scan
from .trajectory.replay import check_records
from .trajectory.settings import check_base, check_same_run, match, whole_header

__all__ = [
    "Actors",
    "Engine",
    "Generation",
    "Here",
    "Reward",
    "Run",
    "Settings",
    "rewards_of",
    "texts_of",
    "train",
]

#: Of one prompt (as it was given) and the text that an engine made of it: a number, of which more is better.
Reward = Callable[[Any, str], float]


class Engine(Protocol):
    """What computes the members; ``zokernels.integrations.vllm.Engine`` is one."""

    def perturb(self, seeds: Sequence[int], coeffs: Sequence[float]) -> None: ...

    def restore(self) -> None: ...

    def update(
        self,
        seeds: Sequence[int],
        coeffs: Sequence[float],
        decay: float | None,
        rounding: Any,
        rounding_seed: int | None,
    ) -> None: ...

    def save(self, path: str) -> None: ...

    def names(self) -> list[str]: ...

    def generate(self, prompts: Sequence[Any], **sampling: Any) -> list[str]: ...


def member(
    engine: Engine, point: tuple[list[int], list[float]], prompts: list[Any], sampling: dict[str, Any]
) -> list[str]:
    """The texts of one member.  Its prompts go in one call of fixed order, so that the batch is the same."""
    engine.perturb(*point)
    return engine.generate(prompts, **sampling)


# Engines: here, or as actors of Ray -------------------------------------------------------------------------


class Here:
    """Engines in this process, one after the other.  ``make(i)`` makes the i-th."""

    #: What an engine raises when it has died.
    dead: tuple[type[BaseException], ...] = ()

    def __init__(self, make: Callable[[int], Engine], count: int = 1) -> None:
        check_integer("Here", "count", count)
        self._make, self._engines = make, [make(i) for i in range(count)]
        self._begin(count)

    def _begin(self, count: int) -> None:
        self.run: Run | None = None  #: whose updates the engines have
        #: How many of them each engine has; None: perhaps a part of one.
        self.taken: list[int | None] = [0] * count

    def __len__(self) -> int:
        return len(self._engines)

    def submit(self, i: int, function: Callable[..., Any], *args: Any) -> Any:
        """Begins ``function(engine i, *args)``; :meth:`wait` has its result."""
        return function(self._engines[i], *args)

    def wait(self, handles: Sequence[Any]) -> Any:
        """One of ``handles`` whose result is there."""
        return handles[0]

    def result(self, handle: Any) -> Any:
        return handle

    def restart(self, i: int) -> None:
        self._engines[i] = self._make(i)


class _Actor:
    """An engine in a process of Ray's."""

    def __init__(self, make: Callable[[int], Engine], i: int) -> None:
        self._engine = make(i)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self._engine, *args)

    def pid(self) -> int:
        return os.getpid()


class Actors(Here):
    """Engines as Ray actors, each in a process of its own, on any machine of the cluster.

    ``make(i)`` runs in the actor.  ``options`` are those of ``ray.remote``, such as ``num_gpus`` for each."""

    def __init__(self, make: Callable[[int], Engine], count: int = 1, **options: Any) -> None:
        import ray

        check_integer("Actors", "count", count)
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False)
        self._ray, self._make, self._class = ray, make, ray.remote(**{"num_cpus": 1, **options})(_Actor)
        self.dead = (ray.exceptions.RayActorError,)
        self.actors = [self._class.remote(make, i) for i in range(count)]
        self._begin(count)

    def __len__(self) -> int:
        return len(self.actors)

    def submit(self, i: int, function: Callable[..., Any], *args: Any) -> Any:
        return self.actors[i].run.remote(function, *args)

    def wait(self, handles: Sequence[Any]) -> Any:
        return self._ray.wait(list(handles), num_returns=1)[0][0]

    def result(self, handle: Any) -> Any:
        return self._ray.get(handle)

    def restart(self, i: int) -> None:
        self._ray.kill(self.actors[i])
        self.actors[i] = self._class.remote(self._make, i)


# Rewards ----------------------------------------------------------------------------------------------------


class Late(BaseException):
    """A reward function did not return in time.  ``except Exception`` in it does not catch this."""


@contextlib.contextmanager
def _within(seconds: float | None) -> Iterator[None]:
    """Raises :class:`Late` in the block after so many seconds, whatever Python code runs there."""
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        fail("es", "timeout", "None outside of the main thread, whose signals end a function", seconds)

    armed = True

    def late(number: int, frame: Any) -> None:
        if armed:
            raise Late

    before = signal.signal(signal.SIGALRM, late)
    # Python drops an exception that is raised in a destructor or in a callback of the garbage collector, so
    # the signal comes again.
    signal.setitimer(signal.ITIMER_REAL, seconds, max(seconds, 0.5))
    try:
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def rewards_of(
    reward: Reward, prompts: Sequence[Any], texts: Sequence[str], timeout: float | None, late: float
) -> list[float]:
    """The reward of each text; ``late`` for one that took more than ``timeout`` seconds."""
    if len(texts) != len(prompts):
        fail("es", "engine", f"{len(prompts)} texts, one for each prompt", len(texts))
    found = []
    for prompt, text in zip(prompts, texts, strict=True):
        try:
            with _within(timeout):
                value = _number(reward(prompt, text))
        except Late:
            value = late
        found.append(value)
    return found


def _number(reward: Any) -> float:
    """A reward as a float; what is beyond its range is infinite, so that the generation is skipped."""
    if not isinstance(reward, (str, bytes)):  # which float would read
        try:
            return float(reward)
        except OverflowError:
            return math.inf if reward > 0 else -math.inf
        except (TypeError, ValueError, RuntimeError):
            pass
    fail("es", "reward", "a function that returns a number", repr(reward)[:200], TypeError)


# The run ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one log has one of.

    Args:
        estimator: members and coefficients: ``Population(directions, shaping, mirrored, maximize=True)``.
        sigma: the size of the perturbation, in units of theta.
        lr: theta moves by lr g_k z_k.  es-at-scale's alpha.
        weight_decay: theta shrinks by the factor 1 - lr * weight_decay in each generation.
        seed: of the run; member k of generation t has the noise of ``derive_seed(seed, t, k)``.
        dist: of the noise, "normal" or "rademacher": the one for which the engines were made.
        rounding: of the update; "stochastic" keeps on average what is smaller than a step of bf16.
    """

    estimator: Estimator = Population(directions=15, mirrored=True, maximize=True)  # noqa: RUF009
    sigma: float = 1e-3
    lr: float = 1e-3
    weight_decay: float = 0.0
    seed: int = 0
    dist: str = "normal"
    rounding: str = "stochastic"


@dataclasses.dataclass(frozen=True)
class Generation:
    """What :func:`train` tells of a generation."""

    step: int
    rewards: tuple[float, ...]  #: the mean reward of each member; nothing of one that was replayed
    loss: float  #: the estimator's: the mean reward of the members
    seconds: float
    #: The mean reward on the held-out prompts at theta, before the update of generation 0 and after others.
    evaluation: float | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.rewards)


class Run:
    """The log of a run over a checkpoint, and the updates that it means.

    Args:
        base: the checkpoint with which the engines begin: a safetensors file or a folder of them.
        log: the path of the log.  One that is there is continued, if it is of the same run.
        settings: see :class:`Settings`.

        names: the parameters that the engines train, by default all of fp32, bf16 and fp16.  A checkpoint may
            have others, which no engine loads; they stay.

    Raises: ValueError where the log is damaged or of another run; RuntimeError where another process has it.
    """

    def __init__(
        self,
        base: str | os.PathLike[str],
        log: str | os.PathLike[str],
        settings: Settings,
        names: Collection[str] | None = None,
    ) -> None:
        check_number("es", "sigma", settings.sigma, positive=True)
        self.settings, self.base = settings, Checkpoint(base)
        floats = {n: t for n, t in self.base.tensors().items() if t.dtype in DTYPES}
        self.names = set(floats if names is None else names)
        if unknown := self.names - floats.keys():
            fail("es", "names", f"parameters of {base}", f"{min(unknown)!r}")
        options = {
            "lr": settings.lr, "eps": settings.sigma, "weight_decay": settings.weight_decay,
            "dist": settings.dist, "rounding": settings.rounding,
        }  # fmt: skip
        # Of an optimizer over the base's mapped memory, which takes no step: it says what a log of it is.
        self.optimizer = StepOptimizer(
            [(name, t.detach().requires_grad_(name in self.names)) for name, t in floats.items()],
            options, seed=settings.seed, restore="exact", estimator=settings.estimator, rule=SGD(),
        )  # fmt: skip
        self.group = self.optimizer.param_groups[0]
        self.file = AppendedFile("es", log)
        try:
            self.past = self._begin()
        except BaseException:
            self.file.close()
            raise

    def _begin(self) -> list[Record]:
        """The records that are there.  The file then ends with the last of them, or with a new header."""
        found: Log | None = scan(self.file.path) if self.file.end else None
        if found is None:  # nothing, or killed inside the header: no generation was recorded
            head, self.layout = encode(whole_header(self.optimizer))
            self.file.cut(0)
            self.file.write(head, 0)
            self.file.sync()
            self._records = len(head)
            return []
        if found.broken and not found.cut_off:
            read(self.file.path)  # raises
        check_same_run(self.optimizer, found.header)
        check_base(found.header, match(found.header, self.base.tensors()))
        self.layout, self._records = found.layout, found.begin
        records = list(found.records())
        check_records(self.optimizer, records)
        self.file.cut(found.end)
        return records

    def seeds(self, step: int) -> list[int]:
        return [derive_seed_int(self.settings.seed, step, k) for k in range(self.layout.directions)]

    def points(self, step: int) -> list[tuple[list[int], list[float]]]:
        """Seeds and coefficients of each member of generation ``step``."""
        seeds, sigma = self.seeds(step), self.settings.sigma
        return [
            ([seeds[k]], [sign * sigma]) if sign else ([], []) for k, sign in self.settings.estimator.points()
        ]

    def record(self, step: int, values: Sequence[float]) -> Record:
        """The record of a generation whose members have these values."""
        values_ = torch.tensor(values, dtype=torch.float64)
        estimator: Estimator = self.settings.estimator
        g = projected_gradient(estimator.coefficients(values_, self.settings.sigma), None)
        (g,), finite = gate([self.group], [g], reads=True)
        loss = float(estimator.loss(values_).float())
        rates, gradients = (float(self.group["lr"]),), (tuple(g.tolist()),)
        return Record(step, finite is not NO, False, False, 1, loss, rates, gradients, ())

    def append(self, record: Record) -> None:
        """Writes ``record``, the next one, and brings it to the disk.

        It has its own place in the file: where this was interrupted, the generation that is taken again
        writes there, too.
        """
        with uninterrupted():
            self.file.check_untouched()
            self.file.write(self.layout.pack(record), self._records + len(self.past) * self.layout.size)
            self.file.sync()
            self.past.append(record)

    def update(self, record: Record) -> tuple[Any, ...] | None:
        """The arguments of :meth:`Engine.update` for a record; None where nothing changes.

        They are the seeds and coefficients of :class:`~zokernels.step.rules.sgd.SGD`, to the bit."""
        group = {**self.group, "lr": record.rates[0]}
        if not record.finite or not record.rates[0]:
            return None
        g: Tensor = torch.tensor(record.gradients[0])
        decay = float(torch.tensor(decay_of(group, g)).float()) if group["weight_decay"] else None
        seeds = self.seeds(record.step)
        coeffs = (0.0 - record.rates[0] * g.double()).float().tolist()  # 0.0 and not -0.0 where g is 0
        return seeds, coeffs, decay, self.settings.rounding, seeds[0]

    def close(self) -> None:
        self.file.close()


def _names(engine: Engine) -> list[str]:
    return engine.names()


def _catch_up(engine: Engine, updates: list[tuple[Any, ...]]) -> None:
    for update in updates:
        engine.update(*update)


class _Fleet:
    """Engines that share out tasks.

    One that dies is made anew, takes the updates so far, and does its work again.
    """

    def __init__(self, engines: Here) -> None:
        self.engines = engines
        self.updates = [] if engines.run is None else self._updates_of(engines.run)
        self.restarts = 0  # since the last task that an engine has finished

    @staticmethod
    def _updates_of(run: Run) -> list[tuple[Any, ...]]:
        return [u for u in map(run.update, run.past) if u is not None]

    def join(self, run: Run) -> None:
        """Brings engines that are at the base of ``run`` to where its log ends."""
        if self.engines.run not in (None, run):
            fail("es", "engines", "engines of this run", "those of another one, whose updates they have")
        self.updates = self._updates_of(run)
        (found,) = self.map(_names, [()])
        if differ := run.names.symmetric_difference(found):
            got = f"{min(differ)!r} in one of them alone"
            fail("es", "engines", "the parameters of the run (its names=engine.names())", got)
        self.engines.run = run
        self._bring_up()

    def map(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
        """``function(engine, *task)`` of each task, by the engine that is free first; results in order."""
        results: list[Any] = [None] * len(tasks)
        waiting, free = list(enumerate(tasks))[::-1], list(range(len(self.engines)))[::-1]
        running: list[tuple[Any, int, int, tuple[Any, ...]]] = []
        while waiting or running:
            while waiting and free:
                place, task = waiting.pop()
                i = free.pop()
                running.append((self.engines.submit(i, function, *task), i, place, task))
            done = self.engines.wait([handle for handle, *_ in running])
            at = next(n for n, (handle, *_) in enumerate(running) if handle is done)
            handle, i, place, task = running.pop(at)
            try:
                results[place] = self.engines.result(handle)
                self.restarts = 0
            except self.engines.dead:
                self._revive(i)
                waiting.append((place, task))
            free.append(i)
        return results

    def all(self, function: Callable[..., Any]) -> None:
        """``function(engine)`` on every engine, but on one that is made anew, which is at theta."""
        handles = [self.engines.submit(i, function) for i in range(len(self.engines))]
        for i, handle in enumerate(handles):
            try:
                self.engines.result(handle)
            except self.engines.dead:
                self._revive(i)

    def _bring_up(self) -> None:
        """Lets every engine take the updates that it lacks.

        An engine that an exception has left with a part of them is made anew.
        """
        handles, taken = [], self.engines.taken
        for i in range(len(self.engines)):
            if (done := taken[i]) is None:
                self.engines.restart(i)
                done = 0
            taken[i] = None
            handles.append(self.engines.submit(i, _catch_up, self.updates[done:]))
        for i, handle in enumerate(handles):
            try:
                self.engines.result(handle)
                taken[i] = len(self.updates)
            except self.engines.dead:
                self._revive(i)

    def update(self, update: tuple[Any, ...]) -> None:
        self.updates.append(update)
        self._bring_up()

    def _revive(self, i: int) -> None:
        """Makes engine ``i`` anew; it may die again while it takes the updates."""
        while True:
            self.restarts += 1
            if self.restarts > 3 * len(self.engines):
                fail("es", f"engine {i}", "an engine that lives", f"{self.restarts} that died", RuntimeError)
            self.engines.restart(i)
            with contextlib.suppress(*self.engines.dead):
                self.engines.taken[i] = None
                self.engines.result(self.engines.submit(i, _catch_up, self.updates))
                self.engines.taken[i] = len(self.updates)
                return


def _mean_reward(
    texts: list[str], prompts: Sequence[Any], reward: Reward, timeout: float | None, late: float
) -> float:
    return statistics.fmean(rewards_of(reward, prompts, texts, timeout, late))


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
    fleet = _Fleet(engines)
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
    sampling, fleet = sampling or {}, _Fleet(engines)
    bar = _bar(progress, generations, len(run.past))
    score = lambda texts, asked: _mean_reward(texts, asked, reward, timeout, late)
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
