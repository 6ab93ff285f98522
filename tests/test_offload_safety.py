"""What could lose weights of a streamed run: reads that fail, writes that are slow, memory that is not to
be had.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import mmap
import os
import time

import pytest
import torch
from helpers import watched
from offload_cases import batch_of, loss_of, same_bits, same_state, tower, train

import zokernels.offload.memory
from zokernels import offload
from zokernels.optim import ZOSGD


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize(("storage", "wire"), [("host", None), ("disk", None), ("disk", "bf16")])
def test_a_read_that_fails_once(storage, wire, slots, rng, tmp_path):
    """The step fails.  The next one reads again, instead of taking the contents of the slot for the block."""
    model = tower(torch.bfloat16, seed=rng.getrandbits(30))
    expected, _ = train(ours := copy.deepcopy(model), 5)
    path = tmp_path / "run" if storage == "disk" else None
    with offload.stream(model, "layers", storage, path=path, slots=slots, wire=wire) as engine:
        optimizer = ZOSGD(model.named_parameters(), lr=1e-2, eps=1e-2, weight_decay=0.1, seed=5)
        source, failing = engine.mover.source, set(rng.sample(range(5, 20), 3))
        read, count = source.read, iter(range(10**6))

        def sometimes(block, data):
            if next(count) in failing:
                data.fill_(rng.getrandbits(8))
                raise OSError(errno.EIO, "Input/output error")
            read(block, data)

        source.read, failures = sometimes, 0
        while (step := optimizer.step_count) < 5:
            torch.manual_seed(step)
            try:
                loss = optimizer.step(lambda: loss_of(model, batch_of(step)))
            except OSError:
                failures += 1
            else:
                assert same_bits(loss.double(), expected[step])
        source.read = read
        assert failures
        assert all(not s.users for s in engine.buffers)
        assert not same_state(model.state_dict(), ours.state_dict())


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_each_block_is_read_once_a_step(slots, tmp_path):
    """The checksums of the log read each block once more."""
    model, reads = tower(), []
    with offload.stream(model, "layers", "disk", path=tmp_path / "run", slots=slots) as engine:
        read = engine.mover.source.read
        engine.mover.source.read = lambda block, data: (reads.append(block.index), read(block, data))
        train(model, 6)
        assert len(reads) <= 5 * 7 + slots
        assert len(reads) > (5 - slots) * 7


@pytest.mark.parametrize("storage", ["host", "disk"])
def test_what_is_being_written_stays_as_it_is(storage, rng, tmp_path, monkeypatch):
    """A block that stays in its slot takes the next update only when the last one has been written: else its
    file would have a part of it."""
    model = tower(torch.bfloat16, seed=rng.getrandbits(30))
    expected, _ = train(copy.deepcopy(model), 4)
    engine = offload.stream(
        model, "layers", storage, path=tmp_path / "run" if storage == "disk" else None, slots=5
    )
    write, changed = engine.mover.source.write, []

    def slowly(block, data, updates):
        before = data.clone()
        time.sleep(0.03)
        changed.append(not torch.equal(data, before))
        write(block, data, updates)

    monkeypatch.setattr(engine.mover.source, "write", slowly)
    with engine:
        assert same_bits(train(model, 4)[0], expected)
    assert len(changed) >= 4 * len(engine.blocks)
    assert not any(changed)


def test_an_update_that_is_interrupted(rng):
    """If only half of a block's parameters have the update, the block is read again."""
    model = tower(torch.bfloat16, seed=rng.getrandbits(30))
    for layer in model.layers:
        layer.norm.weight.data = layer.norm.weight.data.clone()
    base = copy.deepcopy(model)
    make = lambda m: ZOSGD(
        [
            {"params": [(n, p) for n, p in m.named_parameters() if "norm" not in n]},
            {"params": [(n, p) for n, p in m.named_parameters() if "norm" in n], "dist": "rademacher"},
        ],
        lr=1e-2, eps=1e-2, seed=5,
    )  # fmt: skip
    left = [rng.randrange(12, 19)]

    def interrupted(*args):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with watched("fan_out_", interrupted), offload.stream(model, "layers", "host", slots=5):
        a, b, stopped = make(model), make(base), 0
        while (step := a.step_count) < 4:
            torch.manual_seed(step)
            try:
                got = a.step(lambda: loss_of(model, batch_of(step)))
            except KeyboardInterrupt:
                stopped += 1
                continue
            torch.manual_seed(step)
            assert same_bits(got, b.step(lambda: loss_of(base, batch_of(step))))
        assert stopped == 1
        assert not same_state(model.state_dict(), base.state_dict())


def test_memory_that_cannot_be_had(tmp_path, monkeypatch):
    model = tower()
    before = copy.deepcopy(model.state_dict())

    def refused(*args, **options):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    for storage in ("host", "disk"):
        with monkeypatch.context() as patched:
            patched.setattr(mmap, "mmap", refused)
            with pytest.raises(MemoryError, match=r"bytes of host memory.*Cannot allocate"):
                offload.stream(model, "layers", storage, path=tmp_path / "run" if storage == "disk" else None)
    assert not same_state(model.state_dict(), before)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("error", "hint"), [(2, "free memory"), (801, "ulimit -l")])
def test_memory_that_cannot_be_pinned(error, hint, monkeypatch):
    runtime = type(
        "Runtime", (), {"cudaHostRegister": lambda *args: error, "cudaHostUnregister": lambda *args: 0}
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    # no PCI numbers: any CPU
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: object())
    with pytest.raises(MemoryError, match=rf"8192 bytes.*pinned \({hint}\).*error {error}"):
        zokernels.offload.memory.mapping(8192, torch.device("cuda", 0))


def test_the_cpus_beside_a_gpu(tmp_path, monkeypatch):
    """The CPUs of the GPU's NUMA node, as the system lists them, that this process may use."""
    mine = os.sched_getaffinity(0)
    name = "0001:0a:00"
    (tmp_path / f"sys/bus/pci/devices/{name}.0").mkdir(parents=True)
    (tmp_path / "sys/devices/system/node/node1").mkdir(parents=True)
    (tmp_path / f"sys/bus/pci/devices/{name}.0/numa_node").write_text("1\n")
    (tmp_path / "sys/devices/system/node/node1/cpulist").write_text(f"{min(mine)},4000-4003\n")
    properties = type("P", (), {"pci_domain_id": 1, "pci_bus_id": 10, "pci_device_id": 0})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    beside = lambda: zokernels.offload.memory.cpus_beside(torch.device("cuda", 0), root=tmp_path)
    assert beside() == {min(mine)}
    (tmp_path / f"sys/bus/pci/devices/{name}.0/numa_node").write_text("-1\n")  # a machine with one node
    assert beside() == set()
