"""The folder of a streamed run: a file for each block, one for the resident parameters, and the log.

A block's file says how many updates it has, and the log has every update.  So after a kill at any moment each
block takes what it lacks.  For this the log's record of a step must reach the disk before the first block
that has its update.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import fail
from ..files.atomic import replacing
from ..files.safetensors import File
from ..step.groups import label_of
from ..step.roles import home_of
from ..step.step import StepOptimizer
from ..trajectory.format import scan
from ..trajectory.recorder import Recorder
from ..trajectory.replay import repeat_streamed, retaking
from ..trajectory.settings import check_same_run, digest
from .blocks import Block
from .disk import Direct, Folder, header, memory_of, version_of
from .history import History

LOG = "run.zk"
_RESIDENT = "resident"


class Run:
    """What a run keeps in its folder, and how it goes on with it."""

    op = "stream"

    def __init__(self, path: str | os.PathLike[str], blocks: Sequence[Block], resume: bool) -> None:
        self.path = pathlib.Path(path)
        self.log = self.path / LOG
        self.path.mkdir(parents=True, exist_ok=True)
        if not resume and (found := sorted(p.name for p in self.path.iterdir() if p.suffix in (".safetensors", ".zk"))):
            fail(self.op, "path", "a folder without a run, or resume=True", f"{found[0]!r} in {self.path}")
        self.resumes = self.log.exists() and self.log.stat().st_size > 0
        if not os.access(self.path, os.W_OK):
            fail(self.op, "path", "a folder that can be written to", f"{self.path}, which cannot", PermissionError)
        self.folder = Folder(self.path)
        self.files: dict[int, Direct] = {}
        for block in blocks if self.resumes else ():
            if (file := self.folder.open(self.op, block)) is not None:
                self.files[block.index] = file
                block.scheduled = block.stored
        for part in self.path.glob("*.part"):  # of a process that was killed
            part.unlink()
        self._recorder: Recorder | None = None

    def attach(self, optimizer: StepOptimizer, blocks: Sequence[Block], history: History) -> None:
        """Records ``optimizer`` here, after it has taken the steps that are in the log."""
        recorder = self._recorder = Recorder(self.log, sync=10.0)
        try:
            if self.log.stat().st_size:
                self._resume(optimizer, blocks, history, recorder)
        except BaseException:
            recorder.close()
            raise
        optimizer.log = recorder

    def _resume(self, optimizer: StepOptimizer, blocks: Sequence[Block], history: History, recorder: Recorder) -> None:
        log = scan(recorder.path)
        if log is None:  # killed inside the header
            recorder.clear()
            return
        if log.broken and not log.cut_off:
            fail(self.op, recorder.path, "a whole log", log.broken)
        check_same_run(optimizer, log.header)
        since = self._load_resident(optimizer, log.header)
        stored = [b.stored for b in blocks]
        if max(stored) > log.steps:
            fail(self.op, recorder.path, f"the records of the {max(stored)} updates in the blocks", log.steps)
        if min(stored) < since:  # they are written before the resident ones
            fail(self.op, str(self.path), f"blocks with the {since} updates of the resident parameters", min(stored))
        history.restart(since)
        with retaking(optimizer, log.start + since):
            repeat_streamed(optimizer, log, since)
        recorder.go_on(log, optimizer)

    def durable(self) -> None:
        """Brings all steps so far to the disk."""
        if self._recorder is not None:
            self._recorder.flush()

    def close(self) -> None:
        if self._recorder is not None:
            self._recorder.close()

    # Resident parameters ------------------------------------------------------------------------------------

    def _resident(self, optimizer: StepOptimizer) -> tuple[Block, list[Tensor]]:
        block, params = Block(-1, _RESIDENT, torch.nn.Identity()), []
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                if home_of(p).in_memory and p.numel():
                    params.append((label_of(group, i).strip("'"), p))
        block.place(params)
        return block, [p for _, p in params]

    def keep_resident(self, optimizer: StepOptimizer, updates: int) -> None:
        """Replaces the file of the resident parameters, whose values have ``updates`` updates."""
        block, params = self._resident(optimizer)
        head = header(block, updates)
        with replacing(self.path / f"{_RESIDENT}.safetensors") as file:
            os.posix_fallocate(file.fileno(), 0, len(head) + block.nbytes)
            file.write(head)
            for e, p in zip(block.entries, params, strict=True):
                file.seek(len(head) + e.begin)
                value = p.detach().cpu().contiguous()
                file.write(memory_of(value))
            file.flush()
            self.durable()

    def _load_resident(self, optimizer: StepOptimizer, header: dict[str, Any]) -> int:
        """Loads the resident parameters, and returns the number of their updates."""
        path = self.path / f"{_RESIDENT}.safetensors"
        block, params = self._resident(optimizer)
        if not path.exists():
            self._check_base(optimizer, header)
            return 0
        file = File(path)
        with torch.no_grad():
            for e, p in zip(block.entries, params, strict=True):
                if e.name not in file.entries or file.entries[e.name].shape != tuple(p.shape):
                    fail(self.op, str(path), f"{e.name} of shape {tuple(p.shape)}", "none")
                p.copy_(file.tensor(e.name))
        return version_of(self.op, file)

    def _check_base(self, optimizer: StepOptimizer, header: dict[str, Any]) -> None:
        """Raises where the resident parameters do not hold what the run began with."""
        for ours, theirs in zip(optimizer.param_groups, header["groups"], strict=True):
            for p, entry in zip(ours["params"], theirs["params"], strict=True):
                if home_of(p).in_memory and entry["sha256"] is not None and digest(p) != entry["sha256"]:
                    fail(self.op, str(entry["name"]), "the base weights of the run (SHA-256)", "other values")
