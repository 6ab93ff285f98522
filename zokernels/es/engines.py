"""What answers prompts with perturbed weights: engines in this process, or as actors of Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..checks import check_integer
from .run import Run


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
    """An engine in a process that Ray has made."""

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
