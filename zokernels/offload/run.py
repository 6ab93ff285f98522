"""The folder of a streamed run: a file for each block, one for the resident parameters, and the log.

A block's file says how many updates it has, and the log has every update.  So after a kill at any moment each
block takes what it lacks.  For this the log's record of a step must reach the disk before the first block
that has its update.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import fail
from ..files.appending import AppendedFile, sha256_of
from ..files.atomic import replacing
from ..files.safetensors import NAMES, File
from ..step.groups import label_of
from ..step.roles import home_of
from ..step.step import StepOptimizer
from ..trajectory.format import Log, scan
from ..trajectory.recorder import Follower, Recorder
from ..trajectory.replay import check_records, repeat_streamed, retaking
from ..trajectory.settings import check_same_run, digest
from .blocks import STATE, Block, state_named
from .disk import Direct, Folder, checksums, header, mark_of, memory_of, version_of
from .history import History

LOG = "run.zk"
RESIDENT = "resident"


class Run:
    """What a run keeps in its folder, and how it goes on with it."""

    op = "stream"

    def __init__(
        self, path: str | os.PathLike[str], blocks: Sequence[Block], resume: bool, writes: bool = True
    ) -> None:
        """``writes``: False where another process, which has the run already, writes its files."""
        self.path, self.writes = pathlib.Path(path), writes
        self.log = self.path / LOG
        self._is_new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        if not os.access(self.path, os.W_OK):
            fail(
                self.op,
                "path",
                "a folder that can be written to",
                f"{self.path}, which cannot",
                PermissionError,
            )
        self._attached = False
        #: Waits for the threads that write blocks; the engine sets it.
        self.await_writes: Callable[[], None] = lambda: None
        self._lock: AppendedFile | None = None  # of the folder, after the log was closed
        # The lock of the log is that of the folder: without it nothing is read, removed or written.
        self._recorder = self._new_recorder()
        try:
            self._open(blocks, resume)
        except BaseException:
            self.close()
            raise

    def _new_recorder(self) -> Follower:
        if not self.writes:
            return Follower(self.log)
        return Recorder(self.log, sync=10.0, before_close=lambda: self.await_writes())

    def _is_empty(self) -> bool:
        """Whether the log is."""
        return (
            self._recorder.is_empty if isinstance(self._recorder, Recorder) else not self.log.stat().st_size
        )

    def _open(self, blocks: Sequence[Block], resume: bool) -> None:
        self.resumes = not self._is_empty()
        there = [
            p for p in self.path.iterdir() if p.suffix == ".safetensors" or (p == self.log and self.resumes)
        ]
        if there and not resume and self.writes:
            expected = "a folder without a run, or resume=True"
            fail(self.op, "path", expected, f"{min(p.name for p in there)!r} in {self.path}")
        if not self.resumes:
            self._check_unbegun()
        self.folder = Folder(self.path)
        self.files: dict[int, Direct] = {}
        for block in blocks if self.resumes else ():
            if (file := self.folder.open(self.op, block)) is not None:
                self.files[block.index] = file
                block.scheduled = block.stored
        for part in self.path.glob("*.part") if self.writes else ():  # of a process that was killed
            part.unlink()

    def _check_unbegun(self) -> None:
        """Raises where files have updates but no log is there: it is lost, and a new run would write over
        them.
        """
        resident = [self._resident_file] if self._resident_file.exists() else []
        for path in [*sorted(self.path.glob("block-*.safetensors")), *resident]:
            if updates := version_of(self.op, File(path)):
                fail(self.op, str(self.log), f"the log of the {updates} updates in {path.name}", "none")

    def attach(self, optimizer: StepOptimizer, blocks: Sequence[Block], history: History) -> None:
        """Records ``optimizer`` here, after it has taken the steps that are in the log."""
        recorder = self._recorder
        if self._attached and not recorder.closed:
            fail(self.op, "path", "one optimizer for a run", f"a second one for {self.path}", RuntimeError)
        if recorder.closed:
            self._unlock()
            recorder = self._recorder = self._new_recorder()
        try:
            if not self._is_empty():
                self._resume(optimizer, blocks, history, recorder)
        except BaseException:
            recorder.close()
            raise
        optimizer.log = recorder
        self._attached = True

    def _resume(
        self, optimizer: StepOptimizer, blocks: Sequence[Block], history: History, recorder: Follower
    ) -> None:
        log = scan(recorder.path)
        if log is None:  # killed inside the header
            if isinstance(recorder, Recorder):
                recorder.clear()
            return
        if log.broken and not log.cut_off:
            fail(self.op, recorder.path, "a whole log", log.broken)
        check_same_run(optimizer, log.header)
        self._check_marks(log)
        self._check_base(optimizer, log.header, blocks)
        since, resident, states, rule = self._read_resident(optimizer)
        stored = [b.stored for b in blocks]
        if max(stored) > log.steps:
            fail(self.op, recorder.path, f"the records of the {max(stored)} updates in the blocks", log.steps)
        if min(stored) < since:  # they are written before the resident ones
            fail(
                self.op,
                str(self.path),
                f"blocks with the {since} updates of the resident parameters",
                min(stored),
            )
        check_records(optimizer, log.records())
        with torch.no_grad():  # from here on, nothing more can be wrong
            for p, value in resident:
                p.copy_(value)
            for p, key, value in states:
                optimizer.state[p][key] = value.to(p.device, copy=True)
            if rule is not None:
                optimizer.rule.load_state_dict(optimizer, rule)
            optimizer.home.find_measured(optimizer, self._measured(optimizer, blocks))
        history.restart(since)
        with retaking(optimizer, log.start + since):
            repeat_streamed(optimizer, log, since)
        recorder.go_on(log, optimizer)

    def mark(self) -> dict[str, Any] | None:
        """Brings all steps so far to the disk; what tells the log as it is then from others.

        Where the log was closed, the folder is locked again, because it is about to be written to.
        """
        assert isinstance(self._recorder, Recorder)  # of the process that writes
        mark = self._recorder.mark()
        self._recorder.flush()
        if self._recorder.closed and self._lock is None:
            self._lock = AppendedFile(self.op, self.log)
            if mark is not None and self._lock.sha256() != mark["sha256"]:
                self._unlock()
                fail(self.op, str(self.log), "the log that this run closed", "another run's", RuntimeError)
        return mark

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def close(self) -> None:
        self._unlock()
        if not self._recorder.closed:
            unused = self.writes and self._is_empty() and not any(self.path.glob("*.safetensors"))
            self._recorder.close()
            if unused:
                self.log.unlink(missing_ok=True)

    def withdraw(self) -> None:
        """Closes a run that never began, and removes the folder if it was made for it."""
        self.close()
        if self._is_new and self.writes and not any(self.path.iterdir()):
            self.path.rmdir()

    def _check_marks(self, log: Log) -> None:
        """Raises where a file of the folder was written by another run, or with records that are gone."""
        files = dict(self.folder.marks)
        if self._resident_file.exists():
            files[self._resident_file.name] = File(self._resident_file).metadata
        marks = {name: mark_of(self.op, name, metadata) for name, metadata in files.items()}
        marks = {name: (step, sha256) for name, (step, sha256) in marks.items() if step}
        for name, (step, _) in marks.items():
            if not log.start <= step <= log.start + log.steps:
                got = f"{name}, which was written after step {step}"
                fail(self.op, log.path, f"steps {log.start} to {log.start + log.steps} (exclusive)", got)
        place = {name: log.begin + (step - log.start) * log.layout.size for name, (step, _) in marks.items()}
        found = sha256_of(log.path, place.values())
        for name, (step, sha256) in marks.items():
            if found[place[name]] != sha256:
                fail(
                    self.op,
                    str(self.path / name),
                    f"a file of the run in {LOG}",
                    f"another run's, of step {step}",
                )

    # Resident parameters ------------------------------------------------------------------------------------

    @property
    def _resident_file(self) -> pathlib.Path:
        return self.path / f"{RESIDENT}.safetensors"

    def _measured(self, optimizer: StepOptimizer, blocks: Sequence[Block]) -> set[str]:
        """The names of the states in blocks' files that the direction has measured: not all zeros."""
        found = set()
        for b in blocks if self.files else ():
            keys = {e.name: [key for key, *_ in optimizer.direction.kept_of(e.param)] for e in b.entries}
            names = [f"{STATE}{key}.{name}" for name, of in keys.items() for key in of]
            if b.index in self.files and names:
                file = File(self.folder.file_of(b))
                found |= {name for name in names if name in file.entries and bool(file.tensor(name).any())}
                file.release()
        return found

    def _resident(self, optimizer: StepOptimizer) -> list[tuple[str, Tensor]]:
        """The resident parameters, with their names."""
        return [
            (label_of(group, i).strip("'"), p)
            for group in optimizer.param_groups
            for i, p in enumerate(group["params"])
            if home_of(p).in_memory and p.numel()
        ]

    def keep_resident(self, optimizer: StepOptimizer, updates: int) -> None:
        """Replaces the file of the resident parameters, whose values have ``updates`` updates.

        What is kept of each of them is there, too, and what the rule keeps of the groups.  It is the process
        that writes which does so.
        """
        if not self.writes:
            return
        block, tensors = Block(-1, RESIDENT, torch.nn.Identity()), self._resident(optimizer)
        for name, p in list(tensors):
            kept = sorted(optimizer.state[p].items()) if p in optimizer.state else []
            tensors += [(f"{STATE}{key}.{name}", t) for key, t in kept if isinstance(t, Tensor)]
        block.place(tensors)
        values = [t.detach().cpu().contiguous() for _, t in tensors]
        sums, rule = checksums(block, values), {"rule": json.dumps(optimizer.rule.state_dict())}
        head = header(block, updates, self.mark(), sums, rule)
        with replacing(self._resident_file) as file:
            os.posix_fallocate(file.fileno(), 0, len(head) + block.nbytes)
            file.write(head)
            for e, value in zip(block.entries, values, strict=True):
                file.seek(len(head) + e.begin)
                file.write(memory_of(value))

    def _read_resident(
        self, optimizer: StepOptimizer
    ) -> tuple[int, list[tuple[Tensor, Tensor]], list[tuple[Tensor, str, Tensor]], dict[str, Any] | None]:
        """What the file of the resident parameters holds, if it is there; nothing is changed.

        Returns the number of their updates; each parameter with its value; each with the name and the value
        of what is kept of it; and what the rule keeps of the groups.
        """
        path = self._resident_file
        if not path.exists():
            return 0, [], [], None
        file, params = File(path), self._resident(optimizer)
        for name, p in params:
            kind = NAMES[p.dtype], tuple(p.shape)
            found = file.entries.get(name)
            if found is None or (found.dtype, found.shape) != kind:
                fail(self.op, str(path), f"{name}: {kind}", found and (found.dtype, found.shape))
        owners = dict(params)
        named = [(text, state) for text in file.entries if (state := state_named(text, owners)) is not None]
        states = [(owners[name], key, text) for text, (key, name) in named]
        block = Block(-1, RESIDENT, torch.nn.Identity())
        tensors = [name for name, _ in params] + [text for _, _, text in states]
        block.place([(name, file.tensor(name)) for name in tensors])
        if checksums(block, [file.tensor(name) for name in tensors]) != file.metadata.get("crc32"):
            fail(self.op, str(path), "the bytes of its checksums (CRC32)", "others")
        rule = json.loads(file.metadata["rule"]) if "rule" in file.metadata else None
        if rule is not None:
            optimizer.rule.check_state_dict(optimizer, rule)
        values = [(p, file.tensor(name)) for name, p in params]
        return (
            version_of(self.op, file),
            values,
            [(p, key, file.tensor(text)) for p, key, text in states],
            rule,
        )

    def _check_base(self, optimizer: StepOptimizer, header: dict[str, Any], blocks: Sequence[Block]) -> None:
        """Raises where what has no update yet is not what the run began with."""
        missing = {id(e.param) for b in blocks if not b.stored for e in b.entries}
        resident = not self._resident_file.exists()
        for ours, theirs in zip(optimizer.param_groups, header["groups"], strict=True):
            for p, entry in zip(ours["params"], theirs["params"], strict=True):
                bare = resident if home_of(p).in_memory else id(p) in missing
                if bare and entry["sha256"] is not None and digest(p) != entry["sha256"]:
                    fail(self.op, str(entry["name"]), "the base weights of the run (SHA-256)", "other values")
