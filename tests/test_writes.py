"""Disks that are full, or fail, at any byte: what was there stays, and the run goes on when there is room.

Log and blocks are written by ``os.pwrite`` and ``os.pwritev``, for which :class:`Disk` stands in.  Other
files are limited by the system itself: beyond RLIMIT_FSIZE a write takes what fits, and the next one fails.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
import warnings

import pytest
import torch
from torch import nn

from zokernels import offload
from zokernels.files.appending import AppendedFile
from zokernels.files.atomic import replacing
from zokernels.optim import ZOSGD
from zokernels.trajectory import read, recorder, replay_

STEPS = 4


class Disk:
    """A disk with ``room`` for so many bytes.  As write(2) does, it takes a part of what is too much."""

    def __init__(self, monkeypatch, error=errno.ENOSPC):
        self.room, self.error = 1 << 60, error
        plain, direct = os.pwrite, os.pwritev
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: plain(fd, self.fits(data, 1), at))
        monkeypatch.setattr(os, "pwritev", lambda fd, parts, at: direct(fd, [self.fits(parts[0], 512)], at))
        # Not every disk can promise room.
        monkeypatch.setattr(os, "posix_fallocate", lambda fd, at, size: os.ftruncate(fd, at + size))

    def fits(self, data, unit):
        """What the disk takes of ``data``: whole units, if it is not all."""
        count = len(data) if len(data) <= self.room else self.room // unit * unit
        if not count and len(data):
            raise OSError(self.error, os.strerror(self.error))
        self.room -= count
        return data[:count]


@contextlib.contextmanager
def limited(size):
    """No file may be longer than ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def one_weight():
    return nn.Parameter(torch.linspace(-1.0, 1.0, 5))


def optimizer_of(p, path, **options):
    return ZOSGD([("w", p)], lr=1e-2, trajectory=path, **options)


def step(optimizer, p):
    optimizer.step(lambda: (p * (1 + optimizer.step_count)).sin().sum())


@pytest.fixture
def whole(tmp_path):
    """The bytes of the log of a run on a disk with room, and the weights before each step and after the
    last.
    """
    p = one_weight()
    optimizer, history = optimizer_of(p, tmp_path / "whole.zk"), [p.detach().clone()]
    for _ in range(STEPS):
        step(optimizer, p)
        history.append(p.detach().clone())
    optimizer.trajectory.close()
    return (tmp_path / "whole.zk").read_bytes(), history


@pytest.mark.parametrize("then", ["room", "end"])
def test_a_log_on_a_disk_that_is_full_at_any_byte(then, whole, tmp_path, monkeypatch):
    """``then``: there is room again, and the run goes on; or the process ends, and another one resumes
    the run.
    """
    data, history = whole
    disk, path = Disk(monkeypatch), tmp_path / "run.zk"
    begin = read(tmp_path / "whole.zk").begin
    for room in range(0 if then == "room" else begin - 40, len(data)):
        path.unlink(missing_ok=True)
        p = one_weight()
        optimizer = optimizer_of(p, path)
        disk.room = room
        with contextlib.suppress(OSError):
            for _ in range(STEPS):
                step(optimizer, p)
        # What raised has not happened, and what happened is in the file.
        assert torch.equal(p, history[optimizer.step_count])
        size = path.stat().st_size
        assert path.read_bytes() == data[:size]
        whole_records = max(0, size - begin) // 26
        assert size == (begin + 26 * whole_records if room >= begin else 0)
        assert optimizer.step_count == whole_records
        if then == "end":
            optimizer.log._file.close()
            p = one_weight()
            disk.room = 1 << 60
            optimizer = optimizer_of(p, path, resume=True)
            assert optimizer.step_count == whole_records
        disk.room = 1 << 60
        while optimizer.step_count < STEPS:
            step(optimizer, p)
        optimizer.trajectory.close()
        assert path.read_bytes() == data, room
        assert torch.equal(p, history[-1])


class Late:
    """The event of numbers that a device sends later."""

    def __init__(self):
        self.ready = False

    def query(self):
        return self.ready

    def synchronize(self):
        self.ready = True


def test_numbers_that_a_gpu_sends_late_are_lost_by_no_full_disk(tmp_path, monkeypatch):
    """What waits is told by all who rely on it: nobody goes on, or saves a state, without those records."""
    disk, p, events, real = Disk(monkeypatch, errno.EIO), one_weight(), [], recorder.pending

    def pending(*args):
        events.append(Late())
        return real(*args)._replace(arrived=events[-1])

    monkeypatch.setattr(recorder, "pending", pending)
    optimizer = optimizer_of(p, tmp_path / "run.zk")
    for _ in range(3):
        step(optimizer, p)
    assert read(tmp_path / "run.zk").steps == 0
    disk.room = 26 + 3
    before = p.detach().clone()
    for event in events:
        event.ready = True
    log = optimizer.trajectory
    for use in (lambda: step(optimizer, p), log.flush, optimizer.state_dict, log.close):
        with pytest.raises(OSError, match="Input/output error"):
            use()
        assert read(tmp_path / "run.zk").steps == 1
        assert torch.equal(p, before)
        assert optimizer.step_count == 3
    disk.room = 1 << 60
    step(optimizer, p)
    log.close()
    assert read(tmp_path / "run.zk").steps == optimizer.step_count == 4
    base = {"w": one_weight().detach()}
    replay_(base, tmp_path / "run.zk")
    assert torch.equal(base["w"], p)


@pytest.mark.parametrize("late", [False, True])
def test_a_step_whose_update_fails_has_no_record(late, tmp_path, monkeypatch):
    real = recorder.pending
    if late:
        monkeypatch.setattr(recorder, "pending", lambda *args: real(*args)._replace(arrived=Late()))
    p = one_weight()
    optimizer = optimizer_of(p, tmp_path / "run.zk")
    step(optimizer, p)
    before = p.detach().clone()

    def fails(*args):
        raise MemoryError

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(optimizer.rule, "update", fails)
            with pytest.raises(MemoryError):
                step(optimizer, p)
        assert torch.equal(p, before)
        assert optimizer.step_count == 1
    step(optimizer, p)
    optimizer.trajectory.close()
    assert read(tmp_path / "run.zk").steps == 2
    base = {"w": one_weight().detach()}
    replay_(base, tmp_path / "run.zk")
    assert torch.equal(base["w"], p)


def test_a_sync_that_failed_writes_again(tmp_path, monkeypatch):
    """After a failed sync the system takes the pages for written: only new writes reach the disk."""
    file = AppendedFile("test", tmp_path / "file")
    written, write, sync = [], os.pwrite, os.fsync
    monkeypatch.setattr(
        os, "pwrite", lambda fd, data, at: (written.append(bytes(data)), write(fd, data, at))[1]
    )
    file.write(b"one", 0)
    file.sync()
    file.write(b"two", 3)

    def fails(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output"):
        file.sync()
    monkeypatch.setattr(os, "fsync", sync)
    assert file.unsure
    file.sync()
    assert written == [b"one", b"two", b"two"]
    assert not file.unsure
    file.close()


def test_a_file_is_replaced_or_left(tmp_path):
    """``replacing``, by which checkpoints, resident weights and replayed models are written, at every
    byte.
    """
    path, data = tmp_path / "file", os.urandom(300)
    path.write_bytes(b"before")
    for size in range(len(data)):
        with pytest.raises(OSError, match="File too large"), limited(size), replacing(path) as file:
            file.write(data)
        assert path.read_bytes() == b"before"
        assert os.listdir(tmp_path) == ["file"]
    with limited(len(data)), replacing(path) as file:
        file.write(data)
    assert path.read_bytes() == data


# Streams ----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(6, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


def train(net, optimizer, steps):
    while optimizer.step_count < steps:
        x = torch.linspace(-1, 1, 12).view(2, 6) * (1 + optimizer.step_count)
        optimizer.step(lambda: net(x).square().mean())  # noqa: B023


def weights_of(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("write_every", [1, 3])
@pytest.mark.parametrize("wire", [None, "bf16"])
@pytest.mark.parametrize("then", ["room", "end"])
def test_a_streamed_run_on_a_disk_that_is_full(then, wire, write_every, rng, tmp_path, monkeypatch):
    expected, steps = Net(), 7
    if wire:  # lossy: what a disk with room makes is right
        with offload.stream(expected, "layers", "disk", path=tmp_path / "right", wire=wire) as engine:
            train(expected, ZOSGD(expected.named_parameters(), lr=1e-2), steps)
            expected = weights_of(engine.model)
    else:
        train(expected, ZOSGD(expected.named_parameters(), lr=1e-2), steps)
        expected = weights_of(expected)
    disk, failed = Disk(monkeypatch), 0
    options = {"slots": 2, "write_every": write_every, "wire": wire}
    for case in range(6):
        path, net = tmp_path / f"{case}", Net()
        engine = offload.stream(net, "layers", "disk", path=path, **options)
        optimizer = ZOSGD(net.named_parameters(), lr=1e-2)
        disk.room = rng.randrange(5_000 * case, 5_000 * (case + 1))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                train(net, optimizer, steps)
                engine.flush()
        except OSError:
            failed += 1
            if then == "end":
                optimizer.trajectory._file.close()  # as the end of the process does
                # RuntimeError: the run does not know its log again, which was closed behind its back
                with contextlib.suppress(OSError, RuntimeError):
                    engine.close()
        disk.room = 1 << 60
        if optimizer.trajectory.closed:
            net = Net()
            engine = offload.stream(net, "layers", "disk", path=path, resume=True, **options)
            optimizer = ZOSGD(net.named_parameters(), lr=1e-2)
        # what failed while there was no room, a write or a block that was to come, is told once
        for _ in range(4):
            with contextlib.suppress(OSError):
                train(net, optimizer, steps)
        assert optimizer.step_count == steps
        assert same(weights_of(net), expected), (case, then)
        engine.close()
        assert read(path / "run.zk").steps == steps
        again = Net()
        with offload.stream(again, "layers", "disk", path=path, resume=True, **options):
            ZOSGD(again.named_parameters(), lr=1e-2)
            assert same(weights_of(again), expected)
    assert failed > 3, failed


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 KiB, and a function that leaves so many bytes of it free."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")

    def leave(free: int | None) -> None:
        (place / "fill").unlink(missing_ok=True)
        if free is not None:
            status = os.statvfs(place)
            (place / "fill").write_bytes(b"x" * max(0, status.f_bavail * status.f_frsize - free))

    try:
        yield place, leave
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_log_on_a_small_disk(small_disk):
    """Header and records that need a page when there is none: a real ENOSPC."""
    place, leave = small_disk
    for pages in (0, 1):
        path = place / f"{pages}.zk"
        params = [nn.Parameter(torch.randn(5)) for _ in range(30)]  # a header of more than a page
        base = {f"layer.{i}.weight": p.detach().clone() for i, p in enumerate(params)}
        optimizer = ZOSGD(list(zip(base, params, strict=True)), lr=1e-3, trajectory=path)
        leave(4096 * pages)
        with pytest.raises(OSError, match="No space left"):
            optimizer.step(lambda: sum(p.square().sum() for p in params))  # noqa: B023
        assert (path.stat().st_size, optimizer.step_count) == (0, 0)
        leave(None)
        optimizer.step(lambda: sum(p.square().sum() for p in params))  # noqa: B023
        leave(0)
        with warnings.catch_warnings(), pytest.raises(OSError, match="No space left"):  # noqa: PT012
            warnings.simplefilter("ignore")
            for _ in range(1000):
                optimizer.step(lambda: sum(p.square().sum() for p in params))  # noqa: B023
        leave(None)
        optimizer.step(lambda: sum(p.square().sum() for p in params))  # noqa: B023
        optimizer.trajectory.close()
        assert replay_(base, path) == optimizer.step_count
        assert all(torch.equal(a, b) for a, b in zip(base.values(), params, strict=True))
