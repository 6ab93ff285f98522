"""The command line over logs: checkpoints of one file and of several, progress, damage, failures, memory."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from helpers import watched
from torch import nn
from trajectory_cases import assert_same, record_with_cpu

from zokernels.cli import main
from zokernels.optim import ZOSGD
from zokernels.trajectory import read, replay_

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def files(rng, tmp_path):
    """(folder with base, log and final weights; base; final) of a bf16 run with buffers beside the
    weights.
    """
    base, history, _ = record_with_cpu(tmp_path / "run.zk", "ZOSGD", torch.bfloat16, rng, weight_decay=0.1)
    others = {"steps": torch.tensor(7), "odd": torch.arange(3, dtype=torch.uint8), "empty": torch.zeros(0, 4)}
    safetensors.save_file({**base, **others}, tmp_path / "base.safetensors", {"format": "pt"})
    safetensors.save_file({**history[-1], **others}, tmp_path / "final.safetensors")
    return tmp_path, {**base, **others}, {**history[-1], **others}


def weights_only(tensors):
    return {
        name: t for name, t in tensors.items() if t.dtype in (torch.bfloat16, torch.float32) and t.numel()
    }


def command(folder: pathlib.Path, *arguments: str) -> int:
    at = lambda word: str(folder / word) if "." in word else word
    return main([at(word) for word in arguments])


def test_replay_writes_the_final_weights(files):
    folder, _, final = files
    assert command(folder, "replay", "base.safetensors", "run.zk", "-o", "out.safetensors") == 0
    out = safetensors.load_file(folder / "out.safetensors")
    assert_same(weights_only(out), weights_only(final))
    assert out.keys() == final.keys()
    assert all(torch.equal(out[name], final[name]) for name in ("steps", "odd", "empty"))
    with safetensors.safe_open(folder / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert (folder / "out.safetensors").stat().st_mode & 0o777 == (folder / "run.zk").stat().st_mode & 0o777
    assert {p.name for p in folder.iterdir()} == {
        "run.zk",
        *(f"{n}.safetensors" for n in ("base", "final", "out")),
    }


def test_replay_makes_the_folder_of_its_file(files, capsys):
    folder, _, final = files
    assert command(folder, "replay", "base.safetensors", "run.zk", "-o", "again/model.safetensors") == 0
    out = safetensors.load_file(folder / "again/model.safetensors")
    assert_same(weights_only(out), weights_only(final))
    whole = str(folder / "again")
    assert main(["replay", str(folder / "base.safetensors"), str(folder / "run.zk"), "-o", whole]) != 0
    assert "--output: expected a .safetensors file to write, got the folder" in capsys.readouterr().err


def test_replay_in_fp32_and_up_to_a_step(files):
    folder, base, _ = files
    log = read(folder / "run.zk")
    for mode, upto in (("fp32", 5), ("fp32", 2), ("exact", 2), ("exact", 0)):
        assert command(
            folder, "replay", "base.safetensors", "run.zk", "-o", "out.safetensors", "--mode", mode,
            "--upto", str(upto)
        ) == 0  # fmt: skip
        want = {n: t.float() if mode == "fp32" else t.clone() for n, t in weights_only(base).items()}
        replay_(want, log, upto, mode=mode)
        assert_same(weights_only(safetensors.load_file(folder / "out.safetensors")), want)


@pytest.mark.parametrize("index", [True, False])
def test_a_folder_of_shards(files, index):
    folder, base, final = files
    (shards := folder / "model").mkdir()
    names, where = list(base), {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        safetensors.save_file({f"module.{n}": base[n] for n in names[i::3]}, shards / file)
        where |= {f"module.{n}": file for n in names[i::3]}
    if index:
        (shards / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": where})
        )
    assert main(["replay", str(shards), str(folder / "run.zk"), "-o", str(folder / "out.safetensors")]) == 0
    out = {n.removeprefix("module."): t for n, t in safetensors.load_file(folder / "out.safetensors").items()}
    assert_same(weights_only(out), weights_only(final))
    assert main(["verify", str(folder / "run.zk"), str(shards), str(folder / "out.safetensors")]) == 0


def test_an_index_cannot_point_elsewhere(files, capsys):
    folder, _, _ = files
    (folder / "model").mkdir()
    index = {"weight_map": {"head": "../base.safetensors"}}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["verify", str(folder / "run.zk"), str(folder / "model")]) == 1
    assert "expected weight_map: names of files in this folder" in capsys.readouterr().err


def test_verify(files, capsys, rng):
    folder, _, final = files
    assert command(folder, "verify", "run.zk") == 0
    assert command(folder, "verify", "run.zk", "base.safetensors") == 0
    assert command(folder, "verify", "run.zk", "base.safetensors", "final.safetensors") == 0
    assert "bit for bit (6 tensors)" in capsys.readouterr().out
    final["layers.1.w"][2, 5] = -final["layers.1.w"][2, 5]
    safetensors.save_file(final, folder / "other.safetensors")
    assert command(folder, "verify", "run.zk", "base.safetensors", "other.safetensors") == 1
    assert "layers.1.w: expected the bits of the run" in capsys.readouterr().err
    assert command(folder, "verify", "run.zk", "final.safetensors") == 1
    assert "expected the base weights of the run (SHA-256)" in capsys.readouterr().err


def test_a_failure_leaves_no_file(files, capsys):
    folder, _, _ = files
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    replay = lambda base, out="out.safetensors": command(folder, "replay", base, "run.zk", "-o", out)
    assert replay("final.safetensors") == 1
    assert replay("nowhere.safetensors") == 1
    assert replay("run.zk") == 1
    assert replay("base.safetensors", "base.safetensors") == 1
    assert "out: expected another file than the base and the log" in capsys.readouterr().err
    assert (
        command(folder, "replay", "base.safetensors", "run.zk", "-o", "out.safetensors", "--upto", "9") == 1
    )

    def interrupted(*args):
        raise KeyboardInterrupt

    with watched("combine_", interrupted), pytest.raises(KeyboardInterrupt):
        replay("base.safetensors")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_damaged_checkpoints_are_refused(files, rng, capsys):
    folder, _, _ = files
    data = (folder / "base.safetensors").read_bytes()
    header = int.from_bytes(data[:8], "little")
    for i in range(60):
        if i % 3 == 0:
            changed = data[: rng.randrange(len(data))]
        else:
            changed = bytearray(data)
            changed[rng.randrange(8 + header)] = rng.choice([rng.randrange(256), *b'0919",:[]{}-e.'])
        (folder / "bad.safetensors").write_bytes(changed)
        code = command(folder, "replay", "bad.safetensors", "run.zk", "-o", "out.safetensors")
        assert code == (0 if (folder / "out.safetensors").exists() else 1)  # a name of a buffer may change
        (folder / "out.safetensors").unlink(missing_ok=True)
    assert "Traceback" not in capsys.readouterr().err


def test_recover(files, capsys):
    folder, base, _ = files
    log = read(folder / "run.zk")
    os.truncate(folder / "run.zk", log.begin + 3 * log.layout.size + 5)
    arguments = ("replay", "base.safetensors", "run.zk", "-o", "out.safetensors")
    assert command(folder, *arguments) == 1
    assert command(folder, *arguments, "--recover") == 0
    assert f"damaged at step 3, byte {log.begin + 78}: 5 of 26 bytes; 3 records" in capsys.readouterr().err
    want = weights_only(base)
    replay_(want, folder / "run.zk", recover=True)
    assert_same(weights_only(safetensors.load_file(folder / "out.safetensors")), want)
    assert command(folder, "log", "run.zk", "--recover", "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3


def test_log(files, capsys):
    folder, base, _ = files
    assert command(folder, "log", "run.zk") == 0
    assert "steps              5" in capsys.readouterr().out
    assert command(folder, "log", "run.zk", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    records = list(read(folder / "run.zk").records())
    expected = {
        "optimizer": "ZOSGD",
        "rule": {"class": "SGD"},
        "steps": 5,
        "skipped_steps": 0,
        "weights": sum(t.numel() for t in weights_only(base).values()),
        "bytes_per_step": 26,
        "lr_first": [0.05],
        "lr_last": [0.01],
        "loss_first_tenth": records[0].loss,
        "loss_last_tenth": records[-1].loss,
        "largest_gradient": max(abs(r.gradients[0][0]) for r in records),
    }
    assert {key: found[key] for key in expected} == expected


def test_log_for_people(files, capsys):
    """The words of print(optimizer), and nothing of what there is not."""
    folder, _, _ = files
    assert command(folder, "log", "run.zk") == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["estimator"] == "TwoSided(directions=1)"
    assert (lines["rule"], lines["direction"], lines["lr_first"]) == ("SGD()", "dense noise", "0.05")
    assert "weight_decay=0.1" in lines["group"]
    assert len(lines["loss_last_tenth"].lstrip("-").replace(".", "").strip("0")) <= 5
    assert not {"null", "None", "false"} & {*lines.values()}
    assert not {"part", "broken", "subset"} & lines.keys()


def test_a_log_and_its_base_swapped(files, capsys):
    folder, _, _ = files
    (folder / "a.model").mkdir()
    (folder / "base.safetensors").rename(folder / "a.model" / "model.safetensors")
    for base in ("a.model", "final.safetensors"):
        assert command(folder, "verify", base, "run.zk") == 1
        error = capsys.readouterr().err
        assert "expected zokernels verify LOG BASE FINAL, got them swapped: " in error
        assert command(folder, "replay", "run.zk", base, "-o", "out.safetensors") == 1
        assert "expected zokernels replay BASE LOG -o OUTPUT, got them swapped: " in capsys.readouterr().err
    assert command(folder, "verify", "a.model", "final.safetensors") == 1
    assert (
        "verify: LOG: expected the log of a run, which is a file, got the folder" in capsys.readouterr().err
    )
    assert not (folder / "out.safetensors").exists()


def test_base_and_final_swapped(files, capsys):
    """Found by their hashes; weights that are neither of the two, and the base twice, are told as before."""
    folder, _, _ = files
    assert command(folder, "verify", "run.zk", "final.safetensors", "base.safetensors") == 1
    error = capsys.readouterr().err
    assert (
        "verify: BASE, FINAL: expected zokernels verify LOG BASE FINAL, got the last two swapped: " in error
    )
    for base, final in (("final.safetensors", "final.safetensors"), ("base.safetensors", "base.safetensors")):
        assert command(folder, "verify", "run.zk", base, final) == 1
        assert "swapped" not in capsys.readouterr().err


def test_a_base_of_another_model(files, capsys):
    folder, _, _ = files
    safetensors.save_file({"other.w": torch.ones(3)}, folder / "other.safetensors")
    assert command(folder, "replay", "other.safetensors", "run.zk", "-o", "out.safetensors") == 1
    assert "got not one of them: they are probably another model's" in capsys.readouterr().err


def test_plot(files, capsys, monkeypatch):
    folder, _, _ = files
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command(folder, "log", "run.zk", "--plot", "run.png") == 1
    assert "--plot: expected matplotlib, got none; pip install zokernels[cli]" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert command(folder, "log", "run.zk", "--plot", "run.png") == 0
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")


def test_progress_is_complete(files, monkeypatch, capsys):
    """On a terminal with tqdm the bar ends at 100 %."""
    pytest.importorskip("tqdm")
    folder, _, _ = files
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert command(folder, "replay", "base.safetensors", "run.zk", "-o", "out.safetensors") == 0
    assert "100%" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert command(folder, "replay", "base.safetensors", "run.zk", "-o", "out.safetensors") == 0
    assert "no progress bar: pip install zokernels[cli]" in capsys.readouterr().err


def test_as_a_program_without_optional_packages(files):
    folder, _, final = files
    blocked = "import sys; sys.modules.update(safetensors=None, tqdm=None, matplotlib=None, numpy=None)\n"
    words = [
        "replay",
        *(str(folder / n) for n in ("base.safetensors", "run.zk")),
        "-o",
        str(folder / "out.safetensors"),
    ]
    code = blocked + f"from zokernels.cli import main; raise SystemExit(main({words!r}))"
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_same(weights_only(safetensors.load_file(folder / "out.safetensors")), weights_only(final))


def test_memory_stays_below_the_model(rng, tmp_path):
    """96 MiB of weights are replayed and checked by a process that grows by less than a quarter of that.

    Pages that it lets go on the way, after each 2^24 elements, have reached the file.
    """
    tensors = {f"w{i}": torch.randn(1 << 21) * 0.1 for i in range(12)}
    safetensors.save_file(tensors, tmp_path / "base.safetensors")
    model = nn.ParameterDict({name: nn.Parameter(t) for name, t in tensors.items()})
    optimizer = ZOSGD(model.named_parameters(), lr=0.1, dist="rademacher", trajectory=tmp_path / "run.zk")
    for _ in range(2):
        optimizer.step(lambda: sum(p[:9].square().sum() for p in model.values()))
    optimizer.trajectory.close()
    safetensors.save_file(dict(model.state_dict()), tmp_path / "final.safetensors")
    code = f"""
import resource, torch, zokernels.trajectory.checkpoint
from zokernels.cli import main
import zokernels
zokernels.combine_(torch.zeros(1 << 19), 1, 1.0, streams=0)
torch.zeros(0).sin()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
replay = ["{tmp_path}/base.safetensors", "{tmp_path}/run.zk", "-o", "{tmp_path}/out.safetensors"]
assert main(["replay", *replay]) == 0
print(peak() - before)
verify = ["{tmp_path}/run.zk", "{tmp_path}/base.safetensors", "{tmp_path}/final.safetensors"]
assert main(["verify", *verify]) == 0
"""
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.splitlines()[1])
    assert grown < 96 * 1024 / 4, f"{grown} KiB"
    out, final = (safetensors.load_file(tmp_path / f"{name}.safetensors") for name in ("out", "final"))
    assert_same(out, final)
