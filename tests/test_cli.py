"""The command line: one entry point, JSON where a program reads it, exit codes, an example in every help."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from trajectory_cases import record_with_cpu

import zokernels
from zokernels.cli import main

COMMANDS = ("info", "demo", "bench", "replay", "verify", "log")


def exit_of(*arguments: str) -> int:
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("command", ["info", "replay", "verify", "log"])
def test_help_has_an_example_that_parses(command, capsys):
    assert exit_of(command, "--help") == 0
    text = capsys.readouterr().out
    example = text.split("example:\n  ")[1].splitlines()[0]
    assert "exit status: 0" in text
    words = shlex.split(example)
    assert words[:2] == ["zokernels", command]
    from zokernels.cli import _parser

    _parser().parse_args(words[1:])


def test_help_lists_every_command(capsys):
    assert exit_of("--help") == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command} " in text


def test_version_and_wrong_arguments(capsys):
    assert exit_of("--version") == 0
    assert capsys.readouterr().out == f"zokernels {zokernels.__version__}\n"
    for arguments in (
        ("tune",),
        ("replay", "base.safetensors"),
        ("log",),
        ("info", "--yaml"),
        ("bench", "fly"),
    ):
        assert exit_of(*arguments) == 2, arguments


def test_info_as_json(capsys):
    assert exit_of("info", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["zokernels"], found["contract"]) == (zokernels.__version__, "zk1")
    assert found["torch"] == torch.__version__
    assert set(found["backends"]) == {"reference", "cpu", "triton", "cuda"}
    assert found["backends"]["reference"] == {"ready": True, "devices": ["cpu", "cuda"]}
    assert found["chosen"]["cpu"] == "cpu"
    assert "portable" in found["host"]["instruction_sets"]


def test_without_a_command_it_is_info(capsys):
    assert main([]) == 0
    plain = capsys.readouterr().out
    assert main(["info"]) == 0
    assert capsys.readouterr().out == plain
    assert f"zokernels {zokernels.__version__}".split()[1] in plain


def test_bench_and_demo_have_their_own_help(capsys):
    for command, words in (("bench", "zokernels bench"), ("demo", "zokernels demo")):
        if command == "demo":
            for package in ("transformers", "safetensors", "tqdm", "matplotlib"):
                pytest.importorskip(package)
        assert exit_of(command, "--help") == 0
        assert words in capsys.readouterr().out
    assert main(["bench", "list"]) == 0
    assert "combine" in capsys.readouterr().out


def test_demo_without_its_packages_says_what_to_install(monkeypatch, capsys):
    for name in ("demo", "curve"):
        monkeypatch.delitem(sys.modules, f"zokernels.examples.{name}", raising=False)
        monkeypatch.delattr(f"zokernels.examples.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo"]) == 1
    error = capsys.readouterr().err
    assert "expected the demo's packages, got no matplotlib; install them: pip install -r " in error
    assert "--no-deps -r " in error


def test_recorded_run_as_json(rng, tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    base, history, _ = record_with_cpu(tmp_path / "run.zk", "ZOSGD", torch.bfloat16, rng)
    safetensors.save_file(base, tmp_path / "base.safetensors")
    safetensors.save_file(history[-1], tmp_path / "final.safetensors")
    at = lambda name: str(tmp_path / name)
    capsys.readouterr()

    assert main(["replay", at("base.safetensors"), at("run.zk"), "-o", at("out.safetensors"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["output"], found["mode"]) == (at("out.safetensors"), "exact")
    steps = found["steps"]

    assert main(["verify", at("run.zk"), at("base.safetensors"), at("out.safetensors"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["records"], found["base"], found["final"]) == (steps, True, True)
    assert found["tensors"] > 0
    assert main(["verify", at("run.zk"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "records": steps,
        "base": None,
        "final": None,
        "tensors": None,
    }

    assert main(["verify", at("run.zk"), at("base.safetensors"), at("base.safetensors"), "--json"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("zokernels verify: ")
    assert main(["log", at("nothing.zk"), "--json"]) == 1


def test_a_reader_that_has_gone_is_no_error(rng, tmp_path):
    """As in `zokernels log run.zk | head -1`: no message, neither of ours nor of the interpreter's end."""
    record_with_cpu(log := tmp_path / "run.zk", "ZOSGD", torch.float32, rng)
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "zokernels", "log", str(log)]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
