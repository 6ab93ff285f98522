"""Files of another run, files that somebody else touches, and two writers: refused before anything
changes.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from zokernels import offload
from zokernels.files.safetensors import File
from zokernels.optim import ZOSGD
from zokernels.trajectory import read, record


def make(path, seed=3, **options):
    """A parameter, its optimizer with a log at ``path``, and a function that takes a step."""
    generator = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.randn(5, generator=generator))
    optimizer = ZOSGD([("w", p)], lr=1e-2, trajectory=path, **options)
    return p, optimizer, lambda: optimizer.step(lambda: (p * (1 + optimizer.step_count)).sin().sum())


# The log ----------------------------------------------------------------------------------------------------


def test_a_log_that_is_taken_away_is_noticed_in_the_next_step(tmp_path):
    def removed(path):
        path.unlink()

    def replaced(path):
        shutil.copy(path, tmp_path / "copy")
        os.replace(tmp_path / "copy", path)

    def cut(path):
        os.truncate(path, path.stat().st_size - 3)

    for change, message in (
        (removed, "the file that was opened"),
        (replaced, "another in its place"),
        (cut, "has cut it"),
    ):
        path = tmp_path / f"{change.__name__}.zk"
        p, optimizer, step = make(path)
        step()
        change(path)
        before = p.detach().clone()
        with pytest.raises(RuntimeError, match=message):
            step()
        assert torch.equal(p, before)
        assert optimizer.step_count == 1


def test_a_log_must_be_an_ordinary_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/null", tmp_path):
        with pytest.raises(ValueError, match="an ordinary file"):
            make(path)


def test_a_forked_child_neither_writes_nor_keeps_the_lock(tmp_path):
    path = tmp_path / "run.zk"
    _, optimizer, step = make(path)
    step()
    size, (told, tell), (ended, end) = path.stat().st_size, os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        try:
            step()
        except RuntimeError as error:
            os.write(tell, str(error).encode())
        os.read(ended, 1)
        os._exit(0)
    try:
        assert b"expected the process that took the first step" in os.read(told, 1000)
        assert path.stat().st_size == size
        optimizer.trajectory.close()
        make(path, resume=True)[1].trajectory.close()  # though the child still lives
    finally:
        os.write(end, b"x")
        os.waitpid(child, 0)


def test_the_lock_of_a_killed_process_is_free_although_its_child_lives(tmp_path):
    """As the workers of a DataLoader, which outlive a training that is killed."""
    code = f"""
import os, sys, time, torch
from zokernels.optim import ZOSGD
p = torch.nn.Parameter(torch.ones(3))
optimizer = ZOSGD([("w", p)], lr=1e-2, trajectory={str(tmp_path / "run.zk")!r})
optimizer.step(lambda: p.sum())
if os.fork() == 0:
    sys.stdin.read()  # until the test ends
    os._exit(0)
print("ready", flush=True)
time.sleep(100)
"""
    path = os.pathsep.join((str(pathlib.Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")))
    job = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert job.stdout.readline() == b"ready\n"
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="no one else writes"):
        ZOSGD([("w", p)], lr=1e-2, trajectory=tmp_path / "run.zk", resume=True)
    job.kill()
    job.wait()
    optimizer = ZOSGD([("w", p)], lr=1e-2, trajectory=tmp_path / "run.zk", resume=True)
    assert optimizer.step_count == 1
    optimizer.trajectory.close()
    job.stdin.close()


def test_a_checkpoint_goes_on_with_its_own_log_alone(tmp_path):
    logs = {}
    for name, seed in (("ours", 3), ("other base", 4), ("other data", 3)):
        logs[name] = tmp_path / f"{name}.zk"
        p, optimizer, step = make(logs[name], seed)
        for i in range(4):
            if i == 2 and name == "ours":
                state, weights = optimizer.state_dict(), p.detach().clone()
            if name == "other data":
                optimizer.step(lambda: p.square().sum())  # noqa: B023
            else:
                step()
        optimizer.trajectory.close()
    whole = logs["ours"].read_bytes()
    assert state["zo"]["log"]["step"] == 2

    def resumed(log, state):
        p = nn.Parameter(weights.clone())
        optimizer = ZOSGD([("w", p)], lr=1e-2)
        optimizer.load_state_dict(state)
        record(optimizer, log, rewind=True)
        return p, optimizer

    for name in ("other base", "other data"):
        before = logs[name].read_bytes()
        with pytest.raises(
            ValueError, match=r"the log with which the checkpoint was written|that of the log"
        ):
            resumed(logs[name], state)
        assert logs[name].read_bytes() == before
    for wrong in ({**state["zo"], "step": 1}, {k: v for k, v in state["zo"].items() if k != "log"}):
        with pytest.raises(ValueError, match="rewind: expected a state_dict"):
            resumed(logs["ours"], {**state, "zo": wrong})
        assert logs["ours"].read_bytes() == whole
    p, optimizer = resumed(logs["ours"], state)
    for _ in range(2):
        optimizer.step(lambda: (p * (1 + optimizer.step_count)).sin().sum())
    optimizer.trajectory.close()
    assert logs["ours"].read_bytes() == whole


# A streamed run's folder ------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(6, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


def train(net, optimizer, steps, scale=1.0):
    while optimizer.step_count < steps:
        x = scale * torch.linspace(-1, 1, 12).view(2, 6) * (1 + optimizer.step_count)
        optimizer.step(lambda: net(x).square().mean())  # noqa: B023


def run_in(path, steps=4, seed=0, scale=1.0, **options):
    """A run in the folder ``path``; the engine, which is still open, and the optimizer."""
    net = Net(seed)
    engine = offload.stream(net, "layers", "disk", path=path, slots=2, **options)
    try:
        optimizer = ZOSGD(net.named_parameters(), lr=1e-2)
        train(net, optimizer, steps, scale)
    except BaseException:
        with contextlib.suppress(OSError):
            engine.close()
        raise
    return engine, optimizer


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


def refuses(path, before, match, error=(ValueError, OSError), **options):
    """Whether resuming raises, and leaves the folder as it was."""
    with pytest.raises(error, match=match):
        run_in(path, 5, resume=True, **options)
    assert contents(path) == before


def test_a_second_job_changes_nothing_in_a_folder(tmp_path):
    engine, optimizer = run_in(tmp_path / "run", 2, write_every=3)
    (tmp_path / "run" / "block-00001.part").write_bytes(b"of the first job")
    before = contents(tmp_path / "run")
    for options in ({"resume": True}, {"resume": False}, {"resume": True, "seed": 1}):
        with pytest.raises(RuntimeError, match="no one else writes"):
            run_in(tmp_path / "run", **options)
        assert contents(tmp_path / "run") == before
    train(engine.model, optimizer, 4)
    engine.close()
    again, optimizer = run_in(tmp_path / "run", 4, resume=True)
    expected = Net()
    train(expected, ZOSGD(expected.named_parameters(), lr=1e-2), 4)
    got = again.model.state_dict()
    assert all(torch.equal(got[k], v) for k, v in expected.state_dict().items())
    again.close()


def test_a_block_of_another_run_is_refused(tmp_path):
    for name, options in (("ours", {}), ("data", {"scale": 2.0}), ("base", {"seed": 1})):
        run_in(tmp_path / name, **options)[0].close()
    for name in ("data", "base"):
        for file in ("block-00001.safetensors", "resident.safetensors", "run.zk"):
            shutil.copytree(tmp_path / "ours", tmp_path / "mixed", dirs_exist_ok=True)
            shutil.copy(tmp_path / name / file, tmp_path / "mixed" / file)
            refuses(
                tmp_path / "mixed",
                contents(tmp_path / "mixed"),
                "a file of the run in run.zk|that of the log|base",
            )
    # Records that are gone, with blocks that have their updates.
    log = read(tmp_path / "ours" / "run.zk")
    os.truncate(log.path, log.end - log.layout.size)
    refuses(tmp_path / "ours", contents(tmp_path / "ours"), "which was written after step 4")


@pytest.mark.parametrize(
    "lose", [pathlib.Path.unlink, lambda log: os.truncate(log, 0)], ids=["gone", "empty"]
)
def test_blocks_whose_log_is_lost_are_not_written_over(lose, tmp_path):
    run_in(tmp_path / "run")[0].close()
    lose(tmp_path / "run" / "run.zk")
    before = {**contents(tmp_path / "run"), "run.zk": b""}
    with pytest.raises(ValueError, match=r"run\.zk: expected the log of the 4 updates in block-00000"):
        run_in(tmp_path / "run", 5, resume=True)
    assert contents(tmp_path / "run") == before


def test_blocks_without_updates_are_compared_with_the_base(tmp_path):
    for name, seed in (("ours", 0), ("other", 1)):
        engine, optimizer = run_in(tmp_path / name, 2, seed, write_every=9)
        optimizer.trajectory.flush()
        # as a process that is killed: no block has been written since the start
        optimizer.trajectory._file.close()
        engine.mover.drain()
    shutil.copy(tmp_path / "other" / "block-00002.safetensors", tmp_path / "ours")
    refuses(tmp_path / "ours", contents(tmp_path / "ours"), r"layers\.2.*base weights of the run \(SHA-256\)")


def test_a_flipped_bit_is_noticed(rng, tmp_path):
    run_in(tmp_path / "whole")[0].close()
    for file in ("block-00000.safetensors", "block-00002.safetensors", "resident.safetensors"):
        shutil.copytree(tmp_path / "whole", tmp_path / "run", dirs_exist_ok=True)
        data = bytearray((tmp_path / "run" / file).read_bytes())
        entries = [
            e for name, e in File(tmp_path / "run" / file).entries.items() if not name.startswith("_gap")
        ]
        entry = rng.choice(entries)
        at = entry.begin + rng.randrange(entry.size)
        data[at] ^= 1 << rng.randrange(8)
        (tmp_path / "run" / file).write_bytes(data)
        before = (tmp_path / "run" / file).read_bytes()
        with pytest.raises((OSError, ValueError), match="CRC32"):
            run_in(tmp_path / "run", 5, resume=True)
        assert (tmp_path / "run" / file).read_bytes() == before


def test_a_block_that_somebody_removes_or_replaces_is_noticed(tmp_path):
    def replaced(path):
        shutil.copy(path, tmp_path / "copy")
        os.replace(tmp_path / "copy", path)

    def cut(path):
        os.truncate(path, path.stat().st_size // 2)

    for i, change in enumerate((pathlib.Path.unlink, replaced, cut)):
        engine, optimizer = run_in(tmp_path / f"{i}", 2)
        engine.flush()
        weights = [slot for slot in engine.buffers if slot.block is engine.blocks[0]]
        for slot in weights:  # so that the block has to be read again
            engine.mover.drop(slot)
        change(tmp_path / f"{i}" / "block-00000.safetensors")
        with pytest.raises(OSError, match=r"another in its place|expected .* bytes"):
            train(engine.model, optimizer, 4)
        assert optimizer.step_count == 2
        with contextlib.suppress(OSError):
            engine.close()
