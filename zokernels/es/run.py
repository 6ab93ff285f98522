"""A run as a log over a base checkpoint, and the updates that the log means."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import DTYPES, check_number, fail
from ..contract import derive_seed_int
from ..files.appending import AppendedFile
from ..files.safetensors import Checkpoint
from ..step.estimators import Estimator, Population
from ..step.guards import uninterrupted
from ..step.rules.sgd import SGD
from ..step.scalars import NO, decay_of, gate, projected_gradient
from ..step.step import StepOptimizer
from ..trajectory.format import Log, Record, encode, read, scan
from ..trajectory.rebuilding import match
from ..trajectory.replay import check_records
from ..trajectory.settings import check_base, check_same_run, whole_header


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a run, which its log holds and which cannot change within it.

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
        # This optimizer over the base's mapped memory takes no step.  It says what the log is of.
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
