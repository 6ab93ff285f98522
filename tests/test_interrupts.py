"""Signals whose handlers raise, at any instruction of a step: weights, counter and log agree with one step
count.

``python tests/test_interrupts.py [MODE ...]``: at every instruction of a step in the package (minutes a
mode)."""

from __future__ import annotations

import contextlib
import copy
import dis
import os
import pathlib
import signal
import sys
import tempfile
import threading
import traceback

import pytest
import torch
from case_process import CaseProcess

import zokernels
from zokernels import offload
from zokernels.backends.registry import backend, forced
from zokernels.contract import derive_seed_int, seed_to_int64
from zokernels.optim import ZOSGD
from zokernels.step.guards import uninterrupted
from zokernels.step.types import Bucket
from zokernels.trajectory import read, record

PACKAGE = str(pathlib.Path(zokernels.__file__).resolve().parent)


class Preempted(Exception):
    """What the handler raises."""


def _raise(number, frame):
    raise Preempted


@contextlib.contextmanager
def signal_at(instruction):
    """SIGUSR1 before the instruction of that number that the package's own code runs; yields the count so
    far.

    NOPs are left out: CPython runs no handler there, and that of a ``try:`` which begins a ``finally`` is in
    no row of CPython 3.11's exception table, so nothing could be done about it.
    """
    count, nop = [0], dis.opmap["NOP"]

    def each(frame, event, argument):
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_code.co_code[frame.f_lasti] != nop:
            count[0] += 1
            if count[0] == instruction:
                signal.raise_signal(signal.SIGUSR1)
        return each

    def enter(frame, event, argument):
        return each(frame, "call", argument) if frame.f_code.co_filename.startswith(PACKAGE) else None

    before, tracer = signal.signal(signal.SIGUSR1, _raise), sys.gettrace()
    sys.settrace(enter)
    try:
        yield count
    finally:
        sys.settrace(tracer)
        signal.signal(signal.SIGUSR1, before)


#: After these instructions CPython raises what another thread has injected.
_CHECKED = {
    dis.opmap[name] for name in ("RESUME", "CALL", "CALL_FUNCTION_EX", "JUMP_BACKWARD") if name in dis.opmap
}


@contextlib.contextmanager
def injected_at(place):
    """An exception as ``PyThreadState_SetAsyncExc`` injects it, at the place of that number at which it can
    be raised; yields the count so far.
    """
    count, last = [0], {}

    def each(frame, event, argument):
        frame.f_trace_opcodes = True
        if event == "opcode":
            before, last[id(frame)] = last.get(id(frame)), frame.f_code.co_code[frame.f_lasti]
            if before in _CHECKED:
                count[0] += 1
                if count[0] == place:
                    raise Preempted
        elif event == "return":
            last.pop(id(frame), None)
        return each

    def enter(frame, event, argument):
        return each(frame, "call", argument) if frame.f_code.co_filename.startswith(PACKAGE) else None

    tracer = sys.gettrace()
    sys.settrace(enter)
    try:
        yield count
    finally:
        sys.settrace(tracer)


#: In the message of an error that says that an exception of another thread has left a part of an update.
TOLD = "that no exception"

#: Backends whose kernels an exception can leave half-way.
IN_PYTHON = ("reference", "triton")

#: Where the weights of each streamed mode are.
STREAMED = {
    "host": {"storage": "host"},
    "disk": {"storage": "disk"},
    "wire": {"storage": "host", "wire": "bf16"},
}


class Streamed:
    """The same for a streamed model; on disk, the folder of the run has the log."""

    def __init__(self, mode, path=None):
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(3)))
        with torch.no_grad():
            for i, p in enumerate(self.net.parameters()):
                p.fill_(8.0 + i)
        self.options, self.path, options = STREAMED[mode], path, dict(STREAMED[mode])
        self.folder = path is not None and options["storage"] == "disk"
        if self.folder:
            options["path"] = path.with_suffix(".run")
        self.engine = offload.stream(self.net, list(self.net), slots=2, **options)
        log = {} if self.folder or path is None else {"trajectory": path}
        self.optimizer = ZOSGD(
            self.net.named_parameters(), lr=2.0**-6, eps=0.25, dist="rademacher", rounding="nearest", **log
        )

    def take(self, steps):
        x = torch.ones(1, 3)
        while self.optimizer.step_count < steps:
            self.optimizer.step(lambda: self.net(x).sum() * 2.0**-9)

    def weights(self):
        return torch.cat([value.flatten() for value in self.engine.model.state_dict().values()])

    def close(self):
        """Ends the run; returns where its log is."""
        self.engine.close()
        if self.folder:
            return self.path.with_suffix(".run") / "run.zk"
        if self.path is not None:
            self.optimizer.trajectory.close()
        return self.path


class Run:
    """A run whose every move and update is exact in fp32, so that a half move shows in the bits."""

    def __init__(self, mode, path=None):
        self.path = path
        self.params = [torch.nn.Parameter(torch.full((5,), 8.0 + i)) for i in range(3)]
        groups = [{"params": [(f"p{i}", p)]} for i, p in enumerate(self.params)]
        options = {"momentum": 0.5} if mode == "momentum" else {}
        restore = "exact" if mode in ("exact", "momentum") else "inplace"
        self.optimizer = ZOSGD(
            groups,
            lr=2.0**-6,
            eps=0.25,
            dist="rademacher",
            rounding="nearest",
            restore=restore,
            trajectory=path,
            **options,
        )
        self.two_pass = mode == "two-pass"

    def take(self, steps):
        owner = torch.nn.ParameterList(self.params)
        context = self.optimizer.two_pass(owner) if self.two_pass else contextlib.nullcontext()
        with context:
            while self.optimizer.step_count < steps:
                self.optimizer.step(lambda: sum(p.sum() for p in self.params))

    def weights(self):
        return torch.cat([p.detach() for p in self.params])

    def close(self):
        """Ends the run; returns where its log is."""
        if self.path is not None:
            self.optimizer.trajectory.close()
        return self.path


IN_MEMORY = ("exact", "inplace", "momentum", "two-pass")
MODES = (*IN_MEMORY, *STREAMED)


def make(mode, path=None):
    return (Streamed if mode in STREAMED else Run)(mode, path)


def check(mode, folder, places, interrupt=signal_at, tell=None):
    """Interrupts the second step of a run at each of ``places``, fractions of its instructions; returns
    how many.

    ``tell(place)`` is called where a run did not go on as it should, in its except clause; without it that
    is raised.
    """
    whole, history = make(mode, folder / "whole.zk"), []
    for step in range(4):
        whole.take(step)
        history.append(whole.weights())
    with interrupt(None) as count:
        whole.take(4)
    whole.close()
    interrupted = 0
    for i, place in enumerate(places):
        try:
            interrupted += _check_one(mode, folder / f"{i}.zk", 1 + int(place * count[0]), interrupt, history)
        except Exception:
            if tell is None:
                raise
            tell(place)
    return interrupted


def _check_one(mode, path, place, interrupt, history):
    """Interrupts the second step at its instruction ``place``; returns whether that was noticed."""
    run, interrupted = make(mode, path), False
    run.take(1)
    saved = copy.deepcopy(run.optimizer.state_dict()) if mode in IN_MEMORY else None
    try:
        with contextlib.suppress(Preempted), interrupt(place):
            try:
                run.take(2)
            except Preempted:
                interrupted = True
                raise
        steps = run.optimizer.step_count
        assert torch.equal(run.weights(), history[steps]), (mode, place, steps)
        run.take(3)
        assert torch.equal(run.weights(), history[3]), (mode, place)
    except (RuntimeError, AssertionError) as error:
        if mode in IN_MEMORY and interrupt is injected_at and forced() in IN_PYTHON:
            return _check_told(run, saved, history)
        # Of what is streamed an exception of another thread may leave what cannot be put in order: it is
        # told, and the stream ends without a wait.
        if mode not in STREAMED or interrupt is not injected_at or TOLD not in str(error):
            raise
        with contextlib.suppress(RuntimeError):
            run.close()
        run.engine.close()
        return True
    log = run.close()
    assert read(log).steps == 3
    log.unlink()
    return interrupted


def _check_told(run, saved, history):
    """A kernel in Python has been left half-way: every use is an error until a checkpoint is loaded."""
    for use in (lambda: run.take(3), run.optimizer.state_dict, lambda: run.take(3)):
        with pytest.raises(RuntimeError, match=TOLD):
            use()
    run.optimizer.load_state_dict(saved)
    run.optimizer.trajectory.close()
    record(run.optimizer, run.path, rewind=True)
    with torch.no_grad():
        torch._foreach_copy_(run.params, list(history[1].view(3, 5)))
    run.take(3)
    assert torch.equal(run.weights(), history[3])
    assert read(run.close()).steps == 3
    return True


@pytest.mark.parametrize("mode", MODES)
def test_at_random_instructions_of_a_step(mode, rng, tmp_path):
    assert check(mode, tmp_path, [rng.random() for _ in range(8)]) > 3


@pytest.mark.parametrize("mode", MODES)
def test_exceptions_that_another_thread_injects(mode, rng, tmp_path):
    check(mode, tmp_path, [rng.random() for _ in range(8)], injected_at)


@pytest.mark.parametrize("mode", MODES)
def test_exceptions_in_a_backend_in_python(mode, rng, tmp_path):
    with backend("reference"):
        check(mode, tmp_path, [rng.random() for _ in range(8)], injected_at)


def test_an_exception_when_an_update_has_added_the_next_perturbation(monkeypatch):
    """The weights are at the next step's point then, and the end of the two-pass form brings them back."""
    whole, run = make("two-pass"), make("two-pass")
    whole.take(2)
    run.take(1)
    plain, raised = Bucket.__setattr__, []

    def interrupted(bucket, name, value):
        if name == "ahead" and value is None and bucket.ahead is not None and not raised:
            raised.append(1)
            raise Preempted
        plain(bucket, name, value)

    monkeypatch.setattr(Bucket, "__setattr__", interrupted)
    with pytest.raises(Preempted):
        run.take(2)
    assert run.optimizer.step_count == 2
    assert torch.equal(run.weights(), whole.weights())
    whole.take(3)
    run.take(3)
    assert torch.equal(run.weights(), whole.weights())


@pytest.mark.parametrize("mode", ["inplace", "exact"])
def test_an_exception_between_the_updates_of_two_groups(mode, monkeypatch):
    """The first group has its update: when the exception reaches the caller, so have the others."""
    whole, run = make(mode), make(mode)
    whole.take(2)
    run.take(1)
    update, calls = type(run.optimizer.rule).update, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise Preempted
        update(*args)

    monkeypatch.setattr(type(run.optimizer.rule), "update", interrupted)
    with pytest.raises(Preempted):
        run.take(2)
    assert run.optimizer.step_count == 2
    assert torch.equal(run.weights(), whole.weights())


def test_a_two_pass_context_whose_end_an_exception_cut_short(monkeypatch):
    """The optimizer can take two-pass steps again, and the weights are those of the steps that count."""
    whole, run = make("two-pass"), make("two-pass")
    for step in range(4):
        whole.take(step)

    def interrupted():
        raise Preempted

    run.take(1)
    with monkeypatch.context() as patch:
        patch.setattr("zokernels.step.step.ThreePass", interrupted)
        with pytest.raises(Preempted):
            run.take(2)
    run.take(3)
    assert torch.equal(run.weights(), whole.weights())


def test_an_update_that_cannot_be_finished_is_told(tmp_path):
    """What a rule keeps is renewed by several calls: a part of it is an error until a checkpoint is there."""
    param = torch.nn.Parameter(torch.full((5,), 8.0))
    optimizer = ZOSGD([param], lr=0.1, momentum=0.5, window=2, trajectory=tmp_path / "log")
    step = lambda: optimizer.step(lambda: param.sum())
    step()
    saved, theta, begin = optimizer.state_dict(), param.detach().clone(), type(optimizer.rule).begin

    def interrupted(rule, *args):
        begin(rule, *args)
        raise Preempted

    type(optimizer.rule).begin = interrupted
    try:
        with pytest.raises(Preempted):
            step()
    finally:
        type(optimizer.rule).begin = begin
    for use in (step, optimizer.state_dict):
        with pytest.raises(RuntimeError, match="weights that no exception has left half updated"):
            use()
    assert optimizer.step_count == 1
    optimizer.load_state_dict(saved)
    assert torch.equal(param, theta)
    step()
    optimizer.trajectory.close()
    assert read(tmp_path / "log").steps == 2


def test_all_signals_are_held_back_and_all_handlers_run():
    """Two signals inside, one handler of which raises: both run afterwards, and handlers are as they were."""
    told = []
    before = {n: signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGUSR1, _raise)
    signal.signal(signal.SIGUSR2, lambda number, frame: told.append(number))
    try:
        with pytest.raises(Preempted):  # noqa: PT012
            with uninterrupted():
                with uninterrupted():
                    os.kill(os.getpid(), signal.SIGUSR1)
                    os.kill(os.getpid(), signal.SIGUSR2)
                    told.append("inside")
                told.append("still inside")
            told.append("not reached")
        assert told == ["inside", "still inside", signal.SIGUSR2]
        assert signal.getsignal(signal.SIGUSR1) is _raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_block_that_never_ended_holds_no_signal_back():
    """An exception that strikes just before its end leaves the handlers with it, until somebody looks."""

    def left(inside=lambda: None):
        uninterrupted().__enter__()
        inside()

    raised = lambda: signal.raise_signal(signal.SIGUSR1)
    before = signal.signal(signal.SIGUSR1, _raise)
    try:
        left()
        assert signal.getsignal(signal.SIGUSR1) is not _raise
        with pytest.raises(Preempted):  # the next signal
            raised()
        assert signal.getsignal(signal.SIGUSR1) is _raise
        left(raised)
        with pytest.raises(Preempted), uninterrupted():  # the next block, for what came meanwhile
            pytest.fail("the block has begun")
        assert signal.getsignal(signal.SIGUSR1) is _raise
        left()
        with pytest.raises(Preempted):  # noqa: PT012
            with uninterrupted():
                raised()  # which this block holds back, as if the other had ended
                assert signal.getsignal(signal.SIGUSR1) is not _raise
            pytest.fail("the signal is lost")
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_another_threads_block_leaves_this_ones_alone():
    before, told = signal.signal(signal.SIGUSR1, _raise), []

    def elsewhere():
        with uninterrupted():
            told.append(signal.getsignal(signal.SIGUSR1))

    try:
        with pytest.raises(Preempted):  # noqa: PT012
            with uninterrupted():
                thread = threading.Thread(target=elsewhere)
                thread.start()
                thread.join()
                signal.raise_signal(signal.SIGUSR1)
                assert told[0] is not _raise
                told.append("held")
            pytest.fail("the signal is lost")
        assert told[1:] == ["held"]
        assert signal.getsignal(signal.SIGUSR1) is _raise
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_signals_that_an_exception_has_kept_from_being_given_back(monkeypatch):
    """An exception of another thread just when a step ends: handlers are the user's again all the same."""
    run, leave, raised = make("exact"), uninterrupted.__exit__, []
    run.take(1)

    def interrupted(block, *exception):
        if not raised and not block._pending and run.optimizer.step_count == 2:
            raised.append(1)
            raise Preempted
        return leave(block, *exception)

    before = signal.signal(signal.SIGUSR1, _raise)
    try:
        monkeypatch.setattr(uninterrupted, "__exit__", interrupted)
        with pytest.raises(Preempted):
            run.take(2)
        assert raised
        assert signal.getsignal(signal.SIGUSR1) is _raise
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_handlers_and_seeds_by_the_host_module():
    """What the host module finds is what Python finds without it."""
    host = pytest.importorskip("zokernels._host")
    before = signal.signal(signal.SIGUSR1, _raise)
    try:
        numbers = tuple(sorted(map(int, signal.valid_signals())))
        found = host.handled(signal.getsignal, numbers)
        assert (signal.SIGUSR1, _raise) in found
        assert found == [(n, h) for n in numbers if callable(h := signal.getsignal(n))]
    finally:
        signal.signal(signal.SIGUSR1, before)
    for seed, step in ((0, 0), (3, 7), (2**64 - 1, 2**40)):
        expected = [seed_to_int64(derive_seed_int(seed, step, k)) for k in range(5)]
        assert host.derive_seeds(seed, step, 5) == expected


@pytest.mark.parametrize("moment", ["a block comes", "a side runs"])
def test_a_signal_in_a_streamed_step_ends_it(moment, rng):
    """A handler that raises while another side runs, or brings a block in: the step ends, and the run
    goes on.
    """
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(4)))
    whole = [p.detach().clone() for p in net.parameters()]
    x, sent = torch.ones(2, 6), []
    before = signal.signal(signal.SIGUSR1, _raise)

    def send():
        if threading.current_thread() is not threading.main_thread() and not sent:
            sent.append(1)
            os.kill(os.getpid(), signal.SIGUSR1)

    def slow(*args):
        if moment == "a side runs":
            send()

    net[1].register_forward_hook(slow)
    try:
        with offload.stream(net, list(net), "host", slots=2) as engine:
            optimizer = ZOSGD(net.named_parameters(), lr=1e-2)
            grant = engine._lockstep._grant

            def granted(key, sides):
                if moment == "a block comes":
                    send()
                grant(key, sides)

            engine._lockstep._grant = granted
            with pytest.raises(Preempted):
                optimizer.step(lambda: net(x).square().mean())
            assert optimizer.step_count == 0
            assert all(
                torch.equal(a, b) for a, b in zip(engine.model.state_dict().values(), whole, strict=True)
            )
            optimizer.step(lambda: net(x).square().mean())
            assert optimizer.step_count == 1
            assert signal.getsignal(signal.SIGUSR1) is _raise
    finally:
        signal.signal(signal.SIGUSR1, before)


def sweep(modes):
    """Interrupts a step at every place of each mode, and prints where a run did not go on as it should."""
    faults = 0
    for mode in modes:
        for interrupt in (signal_at, injected_at):
            with tempfile.TemporaryDirectory() as folder:
                run, told = make(mode, pathlib.Path(folder) / "counted.zk"), []
                run.take(1)
                with interrupt(None) as count:
                    run.take(2)
                run.close().unlink()
                total = count[0]

                def tell(place, total=total, told=told):
                    told.append(int(place * total))
                    print(f"place {told[-1]}: {traceback.format_exc(-1)}", flush=True)

                places = [(i + 0.5) / total for i in range(total)]
                found = check(mode, pathlib.Path(folder), places, interrupt, tell)
                faults += len(told)
                text = f"{total} places, {found} interrupted, {len(told)} faults"
                print(f"{mode}, {interrupt.__name__}: {text}", flush=True)
    return faults


#: The steps of two ranks of distributed_cases.py, whose names begin with "mesh" here.
MESH = ("exact", "inplace", "momentum", "trials")


def sweep_mesh(modes):
    """The same for one of two ranks."""
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        ranks = CaseProcess("distributed_worker.py", folder, 2, limit=4000, OMP_NUM_THREADS="1")
        for mode in modes:
            for kind in ("signals", "exceptions"):
                said = ranks.ask(name=f"{kind} {mode} everywhere", seed=0, limit=3600)
                faults += said != ["ok", "ok"]
                print(f"mesh-{mode}, {kind}: {' '.join(said)}", flush=True)
        ranks.stop()
    return faults


if __name__ == "__main__":
    asked = sys.argv[1:] or [*MODES, *(f"mesh-{mode}" for mode in MESH)]
    faults = sweep([mode for mode in asked if mode in MODES])
    sys.exit(bool(faults + sweep_mesh([mode.removeprefix("mesh-") for mode in asked if mode not in MODES])))
