"""Streams of 56 bits: their upper bits reach every draw on every backend; names, derived seeds, and logs
of old.
"""

from __future__ import annotations

import itertools
import pathlib
import random
import struct
import zlib

import pytest
import stream_cases
import torch
from safetensors.torch import load_file
from trajectory_cases import Model, assert_same, base_of

import zokernels
from zokernels import contract
from zokernels.backends.reference.noise import uniform16
from zokernels.optim import ZOSGD
from zokernels.optim.cge import sample
from zokernels.trajectory import read, replay_

OLD_LOGS = pathlib.Path(__file__).parent / "data/logs-of-32-bit-streams"


@pytest.mark.parametrize("name", stream_cases.RUNS)
def test_upper_bits_of_streams(cpu_backend, name):
    stream_cases.check(name)


def test_counter_words(rng):
    """z and u16 from Philox itself, its counter written as the contract has it."""
    seed, stream, block = rng.getrandbits(64), rng.getrandbits(56), rng.getrandbits(60)
    key = seed % 2**32, seed // 2**32
    for domain in (3, 4, 5, 6):
        counter = (block % 2**32, block // 2**32, stream % 2**32, domain + 256 * (stream // 2**32))
        words = contract.philox4x32(counter, key)
        want = [half for word in words for half in (word % 2**16, word // 2**16)]
        got = uniform16(torch.tensor(contract.seed_to_int64(seed)), stream, domain, 8 * block, 8)
        assert got.tolist() == want


def test_derived_seed_of_a_stream(rng):
    for stream in (0, 5, 2**32 - 1, 2**32, rng.getrandbits(56), 2**56 - 1):
        run_seed, last = rng.getrandbits(64), rng.getrandbits(64)
        counter = (last % 2**32, last // 2**32, stream % 2**32, 256 * (stream // 2**32))
        w0, w1, _, _ = contract.philox4x32(counter, (run_seed % 2**32, run_seed // 2**32))
        assert contract.derive_stream_seed(run_seed, last, stream) == w0 + 2**32 * w1
        if stream < 2**32:
            assert contract.derive_seed_int(run_seed, last, stream) == w0 + 2**32 * w1
    for step, stream in ((-1, 0), (2**64, 0), (0, -1), (0, 2**56)):
        with pytest.raises(ValueError, match=r"derive_stream_seed: s(tep|tream): expected an integer in"):
            contract.derive_stream_seed(1, step, stream)


def test_coordinates_of_streams_that_differ_above_32_bits():
    chosen = [tuple(sample(9, stream, 40, 10**6)) for stream in stream_cases.STREAMS]
    assert len(set(chosen)) == len(chosen)


def test_a_million_names_have_streams_of_their_own():
    names = (f"model.layers.{i}.mlp.experts.{j}.{k}_proj.weight" for i, j in itertools.product(range(64),
        range(2605))
             for k in ("gate", "up", "down", "a", "b", "c"))  # fmt: skip
    streams = zokernels.streams_of(names)
    assert len(set(streams)) == len(streams) > 10**6
    assert max(streams) < 2**56
    assert len({stream % 2**32 for stream in streams}) < len(streams)  # 32 bits would not have done


@pytest.mark.parametrize("name", sorted(path.stem for path in OLD_LOGS.glob("*.zk")))
def test_logs_written_before_replay_to_their_bits(cpu_backend, name):
    """Runs whose streams were four bytes of the names' hashes: a log holds its streams, so nothing has
    changed.
    """
    part = lambda file: {key.removeprefix(f"{name}/"): value for key,
        value in load_file(OLD_LOGS / file).items()
                         if key.startswith(f"{name}/")}  # fmt: skip
    weights, log = part("base.safetensors"), read(OLD_LOGS / f"{name}.zk")
    for group in log.header["groups"]:
        assert all(p["stream"] != zokernels.stream_of(p["name"]) for p in group["params"])
    assert replay_(weights, log.path) == 4
    assert_same(weights, part("final.safetensors"))


def test_resuming_a_log_of_other_streams(tmp_path):
    """It is refused with the way out; with the log's streams, the run goes on to its bits."""
    part = lambda file: {key.removeprefix("directions/"): value for key,
        value in load_file(OLD_LOGS / file).items()
                         if key.startswith("directions/")}  # fmt: skip
    path = tmp_path / "run.zk"
    path.write_bytes((OLD_LOGS / "directions.zk").read_bytes())
    log = read(path)
    model = Model(torch.float32, random.Random(0))
    for name, value in part("base.safetensors").items():
        model.get_parameter(name).data = value
    options = {"lr": 0.05, "directions": 3, "seed": log.header["seed"], "trajectory": path, "resume": True}
    with pytest.raises(
        ValueError, match=r"resume: streams: expected those of the log .*'streams'.*got others"
    ):
        ZOSGD(model.named_parameters(), **options)
    assert path.read_bytes() == (OLD_LOGS / "directions.zk").read_bytes()
    streams = [p["stream"] for p in log.header["groups"][0]["params"]]
    ZOSGD([{"params": list(model.named_parameters()), "streams": streams}], **options)
    assert_same(base_of(model), part("final.safetensors"))


def test_a_state_keeps_its_streams():
    named = [("a.w", torch.nn.Parameter(torch.ones(40))), ("b.w", torch.nn.Parameter(torch.ones(9)))]
    old = ZOSGD([{"params": named, "streams": [539432606, 7]}], lr=0.1)
    new = ZOSGD(named, lr=0.1)
    assert new.param_groups[0]["streams"] == zokernels.streams_of(["a.w", "b.w"])
    new.load_state_dict(old.state_dict())
    assert new.param_groups[0]["streams"] == [539432606, 7]


def test_names_of_wrapped_modules_in_a_log(tmp_path):
    """A log that names a component of a wrapper, as logs did before, replays into weights without it."""
    base = {"a.w": torch.randn(40), "b.w": torch.randn(9)}
    weights = {name: torch.nn.Parameter(w.clone()) for name, w in base.items()}
    optimizer = ZOSGD(list(weights.items()), lr=0.1, trajectory=tmp_path / "run.zk")
    for _ in range(2):
        optimizer.step(lambda: sum(w.square().sum() for w in weights.values()))
    optimizer.trajectory.close()
    data = (tmp_path / "run.zk").read_bytes()
    magic, version, size, _ = struct.unpack_from("<6sHII", data)
    text = data[16 : 16 + size].replace(b'"a.w"', b'"a._fsdp_wrapped_module.w"')
    crc, records = zlib.crc32(text), b""
    for at in range(16 + size, len(data), 26):  # a record's checksum begins with the header's
        records += data[at : at + 22] + struct.pack("<I", zlib.crc32(data[at : at + 22], crc))
    (tmp_path / "old.zk").write_bytes(struct.pack("<6sHII", magic, version, len(text), crc) + text + records)
    assert replay_(base, tmp_path / "old.zk") == 2
    assert_same(base, {name: w.detach() for name, w in weights.items()})
