"""A streamed model is one thread's at a time, and a run is its own process's: any other gets one error."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from offload_cases import same_bits, tower, train

from zokernels import offload
from zokernels.files.appending import AppendedFile
from zokernels.offload.lockstep import Lockstep
from zokernels.optim import ZOSGD
from zokernels.trajectory.recorder import Recorder

ONE_THREAD = "one thread at a time"


@pytest.fixture
def streamed():
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(4)))
    plain = [p.detach().clone() for p in net.parameters()]
    with offload.stream(net, list(net), "host", slots=2) as engine:
        yield net, plain, engine


X = torch.ones(2, 6)


def in_a_thread(work):
    """What ``work`` returns or raises in a thread of its own, which must end."""
    found = []

    def run():
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    return found[0]


def refused(found):
    return isinstance(found, RuntimeError) and ONE_THREAD in str(found)


USES = {
    "a forward": lambda net, engine: net(X),
    "state_dict": lambda net, engine: net.state_dict(),
    "flush": lambda net, engine: engine.flush(),
    "close": lambda net, engine: engine.close(),
    "a step": lambda net, engine: ZOSGD(net.named_parameters(), lr=0.1).step(lambda: net(X).sum()),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("moment", ["between the blocks of a step", "in a block of a step", "in a block"])
def test_a_second_thread_is_refused(use, moment, streamed):
    """What the first thread does goes on, with the bits of a run that nobody disturbs."""
    net, plain, engine = streamed
    found, second = [], lambda *args: found.append(in_a_thread(lambda: USES[use](net, engine)))
    if moment == "in a block":
        handle = net[1].register_forward_pre_hook(second)
        net(X)
        handle.remove()
    else:
        optimizer = ZOSGD(net.named_parameters(), lr=0.1)
        handle = net[1].register_forward_pre_hook(second) if moment == "in a block of a step" else None

        def closure():
            loss = net(X).square().mean()
            if handle is None:
                second()
            return loss

        optimizer.step(closure)
        if handle is not None:
            handle.remove()
        alone = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(4)))
        with torch.no_grad():
            for p, value in zip(alone.parameters(), plain, strict=True):
                p.copy_(value)
        ZOSGD(alone.named_parameters(), lr=0.1).step(lambda: alone(X).square().mean())
        assert all(map(torch.equal, net.state_dict().values(), alone.state_dict().values()))
    assert found
    assert all(map(refused, found))
    assert not engine.closed


def test_threads_may_take_turns(streamed):
    """One after the other, and again after an error inside a block."""
    net, _, _ = streamed
    handle = net[1].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(X)
    handle.remove()
    assert torch.equal(in_a_thread(lambda: net(X)), net(X))


def test_an_engine_is_not_closed_inside_a_closure(streamed):
    net, plain, engine = streamed
    optimizer = ZOSGD(net.named_parameters(), lr=0.1)

    def closure():
        loss = net(X).square().mean()
        engine.close()
        return loss

    with pytest.raises(RuntimeError, match="close: expected a call between two steps"):
        optimizer.step(closure)
    assert optimizer.step_count == 0
    assert all(map(torch.equal, net.state_dict().values(), plain))
    optimizer.step(lambda: net(X).square().mean())


FORK = """
import faulthandler, os, sys, tempfile, torch
from zokernels import offload
from zokernels.optim import ZOSGD
kind = sys.argv[1]
torch.set_num_threads(2)
net = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 512))
if kind == "disk":
    engine = offload.stream(net, list(net), "disk", slots=2, path=tempfile.mkdtemp())
log = tempfile.mkdtemp() + "/log" if kind == "memory" else None
optimizer = ZOSGD(net.named_parameters(), lr=0.1, trajectory=log)
step = lambda: optimizer.step(lambda: net(torch.ones(2, 512)).square().mean())
step()
if (child := os.fork()) == 0:
    faulthandler.dump_traceback_later(15, exit=True)
    try:
        step()
    except RuntimeError as error:
        print(error, flush=True)
    if kind == "disk":
        try:
            net(torch.ones(2, 512))
        except RuntimeError as error:
            print(error, flush=True)
        engine.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
step()
assert optimizer.step_count == 2
if kind == "disk":
    engine.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_fork_that_goes_on_stepping_gets_an_error(kind):
    """It has none of the threads that the step would wait for; the parent goes on."""
    done = subprocess.run([sys.executable, "-c", FORK, kind], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == (2 if kind == "disk" else 1)
    assert all("a fork of it, which has none of its threads" in line for line in lines)


@pytest.fixture
def slow_sync(monkeypatch):
    """The system's sync of a log takes long in the threads that write blocks."""
    real = os.fsync

    def slow(fd):
        if threading.current_thread().name.startswith("zokernels-write"):
            time.sleep(0.05)
        real(fd)

    monkeypatch.setattr(os, "fsync", slow)


@pytest.mark.parametrize("wire", [None, "bf16"])
def test_a_log_is_closed_while_blocks_are_written(wire, slow_sync, tmp_path):
    """It waits for what names the log; blocks that are written later lock the folder again."""
    model, path = tower(torch.bfloat16), tmp_path / "run"
    expected, _ = train(copy.deepcopy(model), 5)
    start, options = copy.deepcopy(model), {"path": path, "slots": 2, "write_every": 2, "wire": wire}
    engine = offload.stream(model, "layers", "disk", **options)
    _, optimizer = train(model, 3)
    optimizer.trajectory.close()
    engine.mover.drain()  # raises what a write ran into
    Recorder(path / "run.zk", sync=10.0).close()  # the folder is free
    engine.flush()
    with pytest.raises(RuntimeError, match="still writes"):
        Recorder(path / "run.zk", sync=10.0)
    engine.close()
    with offload.stream(start, "layers", "disk", resume=True, **options) as engine:
        assert {b.stored for b in engine.blocks} == {3}
        losses, optimizer = train(start, 5)
        assert same_bits(losses, expected[3:])
        optimizer.trajectory.close()
        other = Recorder(path / "run.zk", sync=10.0)
        with pytest.raises(RuntimeError, match="no one else writes"):
            engine.flush()
        other.close()


def test_a_file_is_closed_while_another_thread_syncs_it(tmp_path, monkeypatch):
    """The number of a closed file may be that of another one by then."""
    file, real, inside, synced = AppendedFile("op", tmp_path / "log"), os.fsync, threading.Event(), []

    def slow(fd):
        inside.set()
        time.sleep(0.1)
        real(fd)
        synced.append(file.closed)

    monkeypatch.setattr(os, "fsync", slow)
    file.write(b"abc", 0)
    thread = threading.Thread(target=file.sync)
    thread.start()
    inside.wait()
    file.close()
    thread.join()
    assert synced == [False]
    file.sync()  # has nothing to bring
    file.end += 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.sync()


def test_a_run_of_sides_that_was_not_forgotten_is_over():
    """As an exception of another thread leaves it, which falls into the last line of a run."""
    lockstep = Lockstep(lambda key, sides: None, [torch.device("cpu")])
    assert lockstep._run(lambda side: side, 2) == [0, 1]
    assert lockstep.current is None
    assert not lockstep.in_own_thread
    assert lockstep.run(lambda side: (side, lockstep.current), 2) == [(0, 0), (1, 1)]
    with pytest.raises(RuntimeError, match="a step inside a step"):
        lockstep.run(lambda side: lockstep.run(lambda inner: inner, 1), 2)
    assert lockstep.current is None
    lockstep.close()
