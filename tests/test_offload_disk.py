"""Weights on disk: checkpoints that are read, folders that are written, kills, faults, and the memory
that it takes.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from offload_cases import Tower, batch_of, loss_of, same_bits, same_state, tower, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zokernels import offload
from zokernels.optim import ZOSGD


def checkpoint(model, path, shards=1):
    """``model`` as a file, or as a folder of shards with an index."""
    state = {
        k: v
        for k, v in model.state_dict().items()
        if k != "head.weight" or "embed.weight" not in model.state_dict()
    }
    if shards == 1:
        save_file(state, path)
        return path
    path.mkdir()
    names = sorted(state)
    index = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: state[n] for n in names[i::shards]}, path / file)
        index |= dict.fromkeys(names[i::shards], file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


def empty(dtype=torch.bfloat16, **options):
    with offload.empty_weights():
        model = Tower(**options)
    return model.to(dtype)


@pytest.mark.parametrize("write_every", [None, 1, 4])
@pytest.mark.parametrize("shards", [1, 3])
def test_from_a_checkpoint(shards, write_every, rng, tmp_path):
    model = tower(torch.bfloat16, seed=rng.getrandbits(30))
    base = checkpoint(model, tmp_path / "base", shards)
    before = {p: p.read_bytes() for p in sorted(base.rglob("*")) or [base]}
    expected, _ = train(model, 9)
    ours, path = empty(), None if write_every is None else tmp_path / "run"
    with offload.stream(
        ours, "layers", "disk", weights=base, path=path, slots=rng.choice((1, 2, 3)), write_every=write_every
    ) as e:
        losses, _ = train(ours, 9)
        assert same_bits(losses, expected)
        e.save(tmp_path / "out.safetensors")
        assert not same_state(ours.state_dict(), model.state_dict())
    saved = load_file(tmp_path / "out.safetensors")
    assert all(same_bits(v, model.state_dict()[k]) for k, v in saved.items())
    assert len(saved) == len(list(model.named_parameters()))
    assert all(p.read_bytes() == data for p, data in before.items())  # a checkpoint is never written
    if path:
        for block in path.glob("block-*.safetensors"):  # which others can open
            with safe_open(block, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if not name.startswith("_gap"):
                        assert same_bits(file.get_tensor(name), model.state_dict()[name])


@pytest.mark.parametrize("from_file", [True, False])
def test_resuming(from_file, rng, tmp_path):
    model = tower(torch.bfloat16, seed=rng.getrandbits(30))
    base = checkpoint(model, tmp_path / "base.safetensors") if from_file else None
    start = copy.deepcopy(model)
    expected, _ = train(model, 12)
    at = 0
    for until in (3, 4, 12):
        ours = empty() if from_file else copy.deepcopy(start)
        engine = offload.stream(
            ours, "layers", "disk", weights=base, path=tmp_path / "run", resume=True, slots=2
        )
        losses, optimizer = train(ours, until)
        assert same_bits(losses, expected[at:until])
        at = until
        if until == 4:  # as a process that dies: nothing is flushed
            optimizer.trajectory.close()  # which waits for writes that look at the log
        else:
            engine.close()
    ours = empty() if from_file else copy.deepcopy(start)
    with offload.stream(ours, "layers", "disk", weights=base, path=tmp_path / "run", resume=True):
        _, optimizer = train(ours, 12)
        assert optimizer.step_count == 12
        assert not same_state(ours.state_dict(), model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wire", "kills", "method", "ranks"),
    [
        ("none", 30, "SGD", 1),
        ("fp8", 8, "SGD", 1),
        ("master", 3, "SGD", 1),
        ("none", 4, "Adam", 1),
        ("none", 4, "Sparse-MeZO", 1),
        ("none", 8, "SGD", 2),
        ("fp8", 6, "SGD", 2),
        ("none", 4, "Adam", 2),
        ("none", 4, "SGD", 4),
    ],
)
def test_killed_at_random_moments_it_ends_with_the_same_bits(wire, kills, method, ranks, rng, tmp_path):
    """Of several ranks, which read slices of the blocks, each is killed in turn."""
    worker = pathlib.Path(__file__).with_name("offload_kill_worker.py")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(worker.parents[1]), os.environ.get("PYTHONPATH", ""))),
    }
    command = [sys.executable, str(worker), str(tmp_path), str(kills), str(rng.getrandbits(40)), wire, method]
    command.append(str(ranks))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= kills


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "layers"),
    [("SGD", 60), *(pytest.param(*case, marks=pytest.mark.large) for case in (("Adam", 20), ("QZO", 239)))],
)
def test_a_model_of_4_gb_trains_in_less_than_1_gb(method, layers, tmp_path):
    """The weights are read, updated and written back, and with Adam both moments, which are 4 GB together.

    The memory is the most that was ever resident of a process that does nothing else.
    """
    import offload_memory_worker as worker

    width, steps = 4096, 2
    assert (size := worker.write(tmp_path / "base.safetensors", layers, width, method)) > 4e9
    numbers = map(str, (layers, width, 2, steps))
    command = [sys.executable, worker.__file__, str(tmp_path), method, *numbers]
    path = os.pathsep.join((str(pathlib.Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")))
    try:
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        print(found)
        assert found["resident"] < 1e9
        assert len(set(found["losses"])) == steps
        stored = list((tmp_path / "run").glob("block-*"))
        assert len(stored) == layers
        assert sum(p.stat().st_size for p in stored) > size
        name = f"layers.{layers - 1}.{'scale' if method == 'QZO' else 'weight'}"
        with safe_open(tmp_path / "base.safetensors", "pt") as base, safe_open(max(stored), "pt") as last:
            change = last.get_tensor(name) - base.get_tensor(name)
            assert 0 < change.abs().max() < 0.1
    finally:  # pytest keeps the folders of its last runs
        for file in tmp_path.rglob("*.safetensors"):
            file.unlink()


def test_faults_of_a_checkpoint(tmp_path):
    model = tower(torch.bfloat16)
    state = dict(load_file(checkpoint(model, tmp_path / "good.safetensors")))
    run = tmp_path / "run"

    def refused(match, error=ValueError, name="bad.safetensors", **options):
        with pytest.raises(error, match=match):
            offload.stream(empty(), "layers", "disk", weights=tmp_path / name, path=run, **options)
        assert not list(run.glob("*"))

    save_file({k: v for k, v in state.items() if k != "layers.2.up.weight"}, tmp_path / "bad.safetensors")
    refused(r"weights: layers\.2\.up\.weight.*a tensor of that name")
    save_file({**state, "layers.1.norm.bias": torch.zeros(3)}, tmp_path / "bad.safetensors")
    refused(r"layers\.1\.norm\.bias.*shape \(19,\)")
    save_file({**state, "norm.bias": state["norm.bias"].half()}, tmp_path / "bad.safetensors")
    refused(r"norm\.bias.*dtype torch\.bfloat16")
    whole = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "bad.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("safetensors")
    refused("bad", OSError, name="nowhere/bad.safetensors")


def test_a_shard_that_is_cut_off_later(rng, tmp_path):
    model = tower(torch.bfloat16, seed=rng.getrandbits(30))
    base = checkpoint(model, tmp_path / "base.safetensors")
    ours = empty()
    engine = offload.stream(ours, "layers", "disk", weights=base, slots=1)
    os.truncate(base, base.stat().st_size // 3)
    with pytest.raises(OSError, match=r"base\.safetensors.*bytes"):
        train(ours, 1)
    engine.mover.close()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    model = tower()
    monkeypatch.setattr(os, "access", lambda *a: False)  # root may write everywhere
    with pytest.raises(PermissionError, match=r"path.*can be written"):
        offload.stream(model, "layers", "disk", path=tmp_path / "run")
    assert not model.layers[0].up.weight.isnan().any()


def test_a_folder_with_a_run(tmp_path):
    model = tower()
    with offload.stream(model, "layers", "disk", path=tmp_path / "run"):
        train(model, 2)
    with pytest.raises(ValueError, match="resume=True"):
        offload.stream(tower(), "layers", "disk", path=tmp_path / "run")
    with pytest.raises(ValueError, match=r"layers\.0\."):
        offload.stream(tower(width=21), "layers", "disk", path=tmp_path / "run", resume=True)
    ours = tower()
    with (
        offload.stream(ours, "layers", "disk", path=tmp_path / "run", resume=True),
        pytest.raises(ValueError, match="groups"),
    ):
        ZOSGD(ours.named_parameters(), lr=1e-2, eps=2e-2, weight_decay=0.1, seed=5)
    ours = tower(seed=1)  # other embeddings: the run's are in its folder
    with offload.stream(ours, "layers", "disk", path=tmp_path / "run", resume=True):
        train(ours, 4)
        other = tower()
        train(other, 4)
        assert not same_state(ours.state_dict(), other.state_dict())


def test_other_base_weights_are_refused(tmp_path):
    model = tower()
    engine = offload.stream(model, "layers", "disk", path=tmp_path / "run")
    train(model, 2)
    engine.mover.drain()
    engine.optimizer.trajectory.close()
    ours = tower(seed=1)
    offload.stream(ours, "layers", "disk", path=tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=r"embed\.weight.*SHA-256"):
        train(ours, 4)


def test_a_full_disk(rng, tmp_path, monkeypatch):
    """The run stops with the error of the system.

    What is on the disk is whole, and the run goes on from it.
    """
    model = tower(torch.bfloat16, seed=rng.getrandbits(30))
    base = checkpoint(model, tmp_path / "base.safetensors")
    expected, _ = train(model, 8)
    ours, room, real = empty(), [25], os.pwritev

    def write(fd, data, at):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwritev", write)
    engine = offload.stream(ours, "layers", "disk", weights=base, path=tmp_path / "run", slots=2)
    with pytest.raises(OSError, match="No space"):
        train(ours, 8)
    engine.optimizer.trajectory.close()
    engine.mover.close()
    assert not list((tmp_path / "run").glob("*.part"))
    monkeypatch.undo()
    ours = empty()
    with offload.stream(ours, "layers", "disk", weights=base, path=tmp_path / "run", resume=True):
        losses, _ = train(ours, 8)
        assert 0 < len(losses) < 8
        assert same_bits(losses, expected[-len(losses) :])
        assert not same_state(ours.state_dict(), model.state_dict())


def test_too_little_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    status = os.statvfs(tmp_path)
    small = os.statvfs_result([*status[:4], 1, *status[5:]])
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    model = tower()
    with pytest.raises(OSError, match=r"path.*free bytes"):
        offload.stream(model, "layers", "disk", path=tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
    assert not model.layers[0].up.weight.isnan().any()


def test_without_direct_access(rng, tmp_path, monkeypatch):
    """As on a file system that refuses it (tmpfs)."""
    refused, real = [], os.open

    def without(path, flags, *args, **options):
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", without)
    model = tower(torch.bfloat16, seed=rng.getrandbits(30))
    expected, _ = train(copy.deepcopy(model), 4)
    with offload.stream(model, "layers", "disk", path=tmp_path / "run"):
        assert same_bits(train(model, 4)[0], expected)
    assert refused


def test_empty_weights_build_the_same_model():
    model, real = empty(torch.float32), tower()
    assert all(p.is_meta for p in model.parameters())
    assert [(n, p.shape) for n, p in model.named_parameters()] == [
        (n, p.shape) for n, p in real.named_parameters()
    ]
    assert not torch.nn.Linear(2, 2).weight.is_meta
    assert not same_bits(loss_of(real, batch_of(0)), torch.zeros(()))
