"""The log as a file: resuming after any cut and any kill, damage, hostile bytes, two writers."""

from __future__ import annotations

import json
import math
import os
import pathlib
import struct
import subprocess
import sys
import time
import zlib

import pytest
import torch
from trajectory_cases import CASES, Model, assert_same, base_of, record_with_cpu, run

from zokernels.optim import ZOSGD, SparseMeZO
from zokernels.step.rules.rule import Rule
from zokernels.trajectory import format as log_format
from zokernels.trajectory import read, record, replay_, settings

PREFIX = struct.Struct("<6sHII")


@pytest.fixture
def short(rng, tmp_path):
    """(path, base, weights after each step) of a run of four steps of three directions."""
    base, history, _ = record_with_cpu(tmp_path / "run", "directions", torch.bfloat16, rng, steps=4)
    return tmp_path / "run", base, history


def clone(base):
    return {key: value.clone() for key, value in base.items()}


def rewritten(path: pathlib.Path, change) -> pathlib.Path:
    """A log whose header ``change`` has edited, with a right checksum; records that no longer match it."""
    data = path.read_bytes()
    _, version, size, _ = PREFIX.unpack_from(data)
    header = json.loads(data[PREFIX.size : PREFIX.size + size])
    text = change(header)
    if not isinstance(text, bytes):
        text = log_format.canonical(header)
    result = path.with_suffix(".edited")
    result.write_bytes(
        PREFIX.pack(b"ZKLOG\n", version, len(text), zlib.crc32(text)) + text + data[PREFIX.size + size :]
    )
    return result


def test_the_file_is_as_documented(short, rng):
    """Every byte by hand, as docs/trajectory.md has it."""
    path, _, _ = short
    data = path.read_bytes()
    magic, version, size, crc = PREFIX.unpack_from(data)
    text = data[PREFIX.size : PREFIX.size + size]
    assert (magic, version, crc) == (b"ZKLOG\n", 1, zlib.crc32(text))
    header = json.loads(text)
    assert json.dumps(header, sort_keys=True, separators=(",", ":")).encode() == text
    assert header["estimator"] == {"class": "TwoSided", "directions": 3}
    records = list(read(path).records())
    assert len(data) == PREFIX.size + size + 4 * 34
    for step in range(4):
        part = data[PREFIX.size + size + 34 * step :][:34]
        low, flags, multiple, loss, lr, *g, checksum = struct.unpack("<IBbfdfffI", part)
        assert checksum == zlib.crc32(part[:-4], crc)
        assert (low, flags, multiple, lr) == (step, 1, 1, 0.05 / (1 + step))
        assert (loss, (tuple(g),)) == (records[step].loss, records[step].gradients)


def test_one_direction_takes_26_bytes_a_step(rng, tmp_path):
    record_with_cpu(tmp_path / "run", "ZOSGD", torch.float32, rng, steps=2)
    assert read(tmp_path / "run").layout.size == 26


def test_cut_anywhere_it_resumes_to_the_same_bits(short, rng, tmp_path):
    """Truncated at every byte: the reader says where, and the run goes on as if nothing had happened."""
    path, base, history = short
    data, header = path.read_bytes(), read(path)
    model = Model(torch.bfloat16, rng)
    cut = tmp_path / "cut"
    for size in range(len(data)):
        cut.write_bytes(data[:size])
        whole, rest = divmod(size - header.begin, header.layout.size)
        if size < header.begin:
            with pytest.raises(ValueError, match="expected a whole header"):
                read(cut)
            if size % 100:
                continue
            whole = 0
        elif rest:
            with pytest.raises(ValueError, match=f"step {whole}, byte {size - rest}: {rest} of 34 bytes"):
                read(cut)
            weights = clone(base)
            assert replay_(weights, cut, recover=True) == whole
            assert_same(weights, history[whole - 1] if whole else base)
        model.load_state_dict(base)
        optimizer = ZOSGD(
            model.named_parameters(),
            lr=9.0,
            directions=3,
            seed=header.header["seed"],
            trajectory=cut,
            resume=True,
        )
        assert (optimizer.step_count, optimizer.param_groups[0]["lr"]) == (whole, 9.0)
        if size % 10 == 0:
            run(optimizer, model, 4 - whole)
            assert_same(base_of(model), history[-1], f"cut at {size}")
            optimizer.trajectory.close()
            assert cut.read_bytes() == data
        elif size >= header.begin:
            optimizer.trajectory.close()
            assert cut.read_bytes() == data[: size - rest]


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("ZOSGD",)])
def test_every_optimizer_resumes(name, rng, tmp_path):
    make, options = CASES[name]
    base, history, first = record_with_cpu(tmp_path / "run", name, torch.bfloat16, rng, steps=5)
    log = read(tmp_path / "run")
    os.truncate(tmp_path / "run", log.begin + 3 * log.layout.size + 7)
    model = Model(torch.bfloat16, rng)
    model.load_state_dict(base)
    optimizer = make(
        model.named_parameters(),
        lr=0.05,
        seed=first.seed,
        trajectory=tmp_path / "run",
        resume=True,
        **options,
    )
    assert_same(base_of(model), history[2])
    run(optimizer, model, 2)
    assert_same(base_of(model), history[-1])


def test_resume_refuses_another_run(short, rng):
    path, base, history = short
    before = path.read_bytes()
    model = Model(torch.bfloat16, rng)
    model.load_state_dict(base)
    seed = read(path).header["seed"]
    build = lambda kind=ZOSGD, **o: kind(
        model.named_parameters(),
        **{"lr": 1.0, "seed": seed, "directions": 3, "trajectory": path, "resume": True, **o},
    )
    for message, change in {
        "resume: seed": {"seed": seed + 1},
        r"resume: estimator: .* log, TwoSided\(directions=3\), got TwoSided\(directions=2\)": {
            "directions": 2
        },
        r"resume: groups\[0\]: options: eps: expected that of the log": {"eps": 1e-4},
        "resume: direction": {"kind": SparseMeZO},
        "resume: restore": {"restore": "inplace"},
        "a new file, or resume=True": {"resume": False},
    }.items():
        with pytest.raises(ValueError, match=message):
            build(**change)
    with pytest.raises(ValueError, match=r"resume: params: expected model.named_parameters\(\)"):
        ZOSGD(model.parameters(), lr=1.0, seed=seed, directions=3, trajectory=path, resume=True)
    with pytest.raises(FileNotFoundError, match=r"trajectory: .* expected a file in a folder that exists"):
        ZOSGD(model.named_parameters(), lr=1.0, trajectory=path.parent / "nowhere" / "run")
    model.load_state_dict(history[0])
    with pytest.raises(ValueError, match="expected the base weights of the run"):
        build()
    assert_same(base_of(model), history[0])
    assert path.read_bytes() == before
    stepped = ZOSGD(model.named_parameters(), lr=1.0, seed=seed, directions=3)
    run(stepped, model, 1)
    with pytest.raises(ValueError, match="expected a fresh one"):
        record(stepped, path, resume=True)


def test_damage_is_found_and_recovered_from_only_if_asked(short, rng):
    path, base, history = short
    data, log = path.read_bytes(), read(path)
    for step in range(4):
        at = log.begin + 34 * step + rng.randrange(34)
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        weights = clone(base)
        with pytest.raises(ValueError, match=f"step {step}, byte {log.begin + 34 * step}: a checksum"):
            replay_(weights, path)
        assert_same(weights, base)
        assert replay_(weights, path, recover=True) == step
        assert_same(weights, history[step - 1] if step else base)
        model = Model(torch.bfloat16, rng)
        model.load_state_dict(base)
        optimizer = ZOSGD(model.named_parameters(), lr=1.0, directions=3, seed=log.header["seed"])
        with pytest.raises(ValueError, match="expected whole records"):
            record(optimizer, path, resume=True)
        record(optimizer, path, resume=True, recover=True).close()
        assert path.read_bytes() == data[: log.begin + 34 * step]
    one = lambda i: data[log.begin + 34 * i :][:34]
    path.write_bytes(data[: log.begin] + one(0) + one(2))
    with pytest.raises(ValueError, match=r"step 1, .* the record of step 2"):
        read(path)


@pytest.mark.parametrize("entry", ["contract", "version", "crc", "magic"])
def test_another_contract_or_format_is_refused(entry, short):
    path, base, _ = short
    data = bytearray(path.read_bytes())
    if entry == "contract":
        path = rewritten(path, lambda header: header.update(contract="zk2"))
        message = "header.contract: expected contract 'zk1', got 'zk2'"
    else:
        at, message = {
            "magic": (0, "a log of zokernels"),
            "version": (6, "format version 1"),
            "crc": (40, "a header that matches its checksum"),
        }[entry]
        data[at] ^= 2
        path.write_bytes(data)
    weights = clone(base)
    with pytest.raises(ValueError, match=message):
        replay_(weights, path, recover=True)
    assert_same(weights, base)


def test_a_class_of_the_same_name_stands_for_no_class_of_the_package(rng, tmp_path):
    base, history, _ = record_with_cpu(tmp_path / "run", "momentum", torch.float32, rng, steps=3)

    class Momentum(Rule):
        pass

    weights = clone(base)
    replay_(weights, tmp_path / "run")
    assert_same(weights, history[-1])
    assert settings.describe(Momentum()) == {"class": "custom:Momentum", "state_dtype": "float32"}


HOSTILE = {
    "deep": lambda h: b"[" * 100_000,
    "not canonical": lambda h: json.dumps(h, indent=1).encode(),
    "infinite": lambda h: json.dumps({**h, "seed": math.inf}).encode(),
    "huge number": lambda h: json.dumps(h).replace('"start": 0', '"start": 1' + "0" * 9000).encode(),
    "extra": lambda h: h.update(extra=1),
    "missing": lambda h: h.pop("rule"),
    "many directions": lambda h: h["estimator"].update(directions=2**20),
    "directions": lambda h: h["estimator"].update(directions=2**20 - 1),
    "rank": lambda h: h.update(direction={"class": "KeptRight", "rank": 10**9, "refresh": 1}),
    "losses": lambda h: h.update(losses=2**20 - 1),
    "class": lambda h: h.update(rule={"class": "Popen"}),
    "private class": lambda h: h.update(direction={"class": "_Put", "deferred": 1}),
    "arguments": lambda h: h["estimator"].update(more=1),
    "pattern": lambda h: h.update(subset={"class": "LayerSkip", "layers": "(a+)+$", "skipped": 0.5}),
    "shape": lambda h: h["groups"][0]["params"][0].update(shape=[2**62, 2**62]),
    "name": lambda h: h["groups"][0]["params"][0].update(name="../../etc/passwd"),
    "same parameter": lambda h: h["groups"][0]["params"].append(h["groups"][0]["params"][0]),
    "streams": lambda h: h["groups"][0]["params"][0].update(stream=2**56),
    "eps": lambda h: h["groups"][0]["options"].update(eps=0.0),
    "window": lambda h: h["rule"].update({"class": "MomentumWindow", "window": 2**24}),
    "window of many": lambda h: h["rule"].update({"class": "MomentumWindow", "window": 2**19}),
    "lr option": lambda h: h["groups"][0]["options"].update(params=[1]),
    "dist": lambda h: h["groups"][0]["options"].update(dist="cauchy"),
    "no groups": lambda h: h.update(groups=[]),
    "dtype": lambda h: h["groups"][0]["params"][0].update(dtype="float64"),
    "list": lambda h: b"[]",
    "null": lambda h: b"null",
    "not text": lambda h: b"\xff\xfe",
}


TOO_LARGE = ("directions", "losses")


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused(case, short):
    path, base, _ = short
    weights = clone(base)
    edited = rewritten(path, HOSTILE[case])
    if case in TOO_LARGE:  # no record of this size is there
        assert replay_(weights, edited, recover=True) == 0
    with pytest.raises(ValueError, match=r"^(trajectory|replay_|ZerothOrder|streams)\b"):
        replay_(weights, edited, recover=case not in TOO_LARGE)
    assert_same(weights, base)


def test_random_bytes_and_mutated_logs_never_do_harm(short, rng):
    """Only ValueError, no weight changed, little memory and time; some mutations of a number are still
    good logs.
    """
    import resource

    path, base, _ = short
    data, begin = path.read_bytes(), time.monotonic()
    head = PREFIX.unpack_from(data)[2] + PREFIX.size
    fuzzed = path.with_suffix(".fuzz")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for i in range(400):
        if i % 4 == 0:
            changed = b"ZKLOG\n\1\0"[: rng.randrange(9)] + rng.randbytes(rng.randrange(300))
        else:
            changed = bytearray(data)
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(changed) if i % 4 == 1 else head)
                changed[at] = rng.choice([rng.randrange(256), *b'0919",:[]{}-e.'])
            if i % 2:  # with a right checksum
                text = bytes(changed[PREFIX.size : head])
                changed[: PREFIX.size] = PREFIX.pack(b"ZKLOG\n", 1, len(text), zlib.crc32(text))
        fuzzed.write_bytes(changed)
        weights = clone(base)
        try:
            replay_(weights, fuzzed, recover=rng.random() < 0.5)
        except ValueError:
            refused += 1
            assert_same(weights, base)
    assert refused > 200
    assert time.monotonic() - begin < 120
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_one_writer_at_a_time(rng, tmp_path):
    model = Model(torch.float32, rng)
    optimizer = ZOSGD(model.named_parameters(), lr=0.1, trajectory=tmp_path / "run")
    with pytest.raises(RuntimeError, match="expected a file that no one else writes"):
        ZOSGD(model.named_parameters(), lr=0.1, trajectory=tmp_path / "run", resume=True)
    with pytest.raises(RuntimeError, match="expected one log at a time"):
        record(optimizer, tmp_path / "other")
    run(optimizer, model, 1)
    code = f"import fcntl; fcntl.flock(open({str(tmp_path / 'run')!r}), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    assert (
        b"BlockingIOError"
        in subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).stderr
    )
    optimizer.trajectory.close()
    record(optimizer, tmp_path / "other").close()


def test_syncs_come_at_their_period(rng, tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), sync(fd)))
    model = Model(torch.float32, rng)
    counts = []
    for period, path in ((0, "always"), (1e9, "never")):
        optimizer = ZOSGD(model.named_parameters(), lr=0.1)
        record(optimizer, tmp_path / path, sync=period)
        run(optimizer, model, 1)
        synced.clear()
        run(optimizer, model, 5)
        counts.append(len(synced))
        assert read(tmp_path / path).steps == 6  # in the file at once, all the same
        optimizer.state_dict()
        counts.append(len(synced))
        optimizer.trajectory.close()
    assert counts == [5, 6, 0, 1]


@pytest.mark.slow
def test_killed_a_hundred_times_it_ends_with_the_same_bits(rng, tmp_path):
    worker = pathlib.Path(__file__).with_name("kill_worker.py")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(worker.parents[1]), os.environ.get("PYTHONPATH", ""))),
    }
    command = [sys.executable, str(worker), str(tmp_path), "100", str(rng.getrandbits(40))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 100
    assert read(tmp_path / "run.zk").steps == 500
