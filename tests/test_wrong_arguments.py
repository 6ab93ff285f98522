"""Calls with wrong arguments: one error of the house's shape, which names the nearest right thing."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import zokernels
from zokernels.offload import stream
from zokernels.optim import ZOSGD

OPERATIONS = [
    "combine", "combine_", "decode", "decode_fan_out", "derive_seed", "encode", "fan_out_", "low_rank",
    "low_rank_", "low_rank_linear_", "noise", "pack_mask", "plan", "project", "requantize", "requantize_",
    "spread", "squared_norm", "update_",
]  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_argument_that_no_operation_has(name):
    with pytest.raises(TypeError, match=rf"^{name}: colour: expected one of its arguments \(help\({name}\)"):
        getattr(zokernels, name)(colour=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: zokernels.noise(4, seeds=1), "noise: seeds: expected 'seed', the nearest of its"),
        (lambda p: zokernels.noise(4, 1), "noise: shape, seed: expected all of them, and the rest by name"),
        (lambda p: zokernels.plan([p], stream=[1]), "plan: stream: expected 'streams', the nearest of its"),
        (lambda p: zokernels.plan([p]), "plan: params, streams: expected all of them"),
        (lambda p: zokernels.project([p], seed=1, streams=1), "project: seed: expected 'seeds', the nearest"),
        (lambda p: stream(nn.Linear(2, 2), storages="host"), "stream: storages: expected 'storage', the"),
        (lambda p: stream(), "stream: model: expected all of them, and the rest by name"),
    ],
)  # fmt: skip
def test_the_nearest_argument(call, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        call(torch.ones(4))


def test_the_arguments_of_a_step():
    """Nothing is done before the error, and steps go on."""
    model = nn.Linear(4, 1)
    optimizer, calls = ZOSGD(model.named_parameters(), lr=1e-2), []
    closure = lambda: calls.append(1) or model(torch.ones(4)).sum()
    before = model.weight.clone()
    with pytest.raises(TypeError, match=r"^step: batch: expected 'batched', the nearest of its arguments"):
        optimizer.step(closure, batch=True)
    with pytest.raises(TypeError, match=r"^step: arguments: expected all of them, and the rest"):
        optimizer.step(closure, True)
    assert torch.equal(model.weight, before)
    assert optimizer.step_count == len(calls) == 0
    optimizer.step(closure)
    assert optimizer.step_count == 1
    assert not torch.equal(model.weight, before)


class Meant(TypeError):
    pass


def test_an_error_of_the_closure_stays_its_own():
    def closure():
        raise Meant("closure() got an unexpected keyword argument 'batch'")

    optimizer = ZOSGD(nn.Linear(4, 1).named_parameters(), lr=1e-2)
    with pytest.raises(Meant, match=r"^closure\(\) got"):
        optimizer.step(closure)


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (lambda p: {"a": p}, "params: expected a tensor or a list of tensors; of such an x: list(x.value"),
        (lambda p: {p}, "params: expected a tensor or a list of tensors; of such an x: a list, whose order"),
        (lambda p: nn.Linear(2, 2), "params: expected a tensor or a list of tensors; of such an x: list(x.p"),
        (lambda p: None, "params: expected a tensor or a list of tensors, got NoneType"),
        (lambda p: [p, None], "params[1]: expected a tensor, got NoneType"),
        (lambda p: [("a", p)], "params[0]: expected a tensor (parameters() gives tensors, named_parameters("),
        (lambda p: [zokernels.plan(p, 1)], "params[0]: expected a tensor (a plan is given alone, in the pl"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("streams", [None, [1]])
def test_what_is_no_list_of_tensors(of, message, streams):
    p = torch.ones(4)
    with pytest.raises(TypeError, match=f"^combine_: {re.escape(message)}"):
        zokernels.combine_(of(p), 1, 1.0, streams=streams)
    assert torch.equal(p, torch.ones(4))


@pytest.mark.parametrize("argument", ["out", "curvature", "masks"])
def test_other_lists_of_tensors(argument):
    p, lists = torch.ones(4), {"out": [torch.ones(4)], argument: {"a": torch.ones(4)}}
    with pytest.raises(TypeError, match=f"^combine: {argument}: expected a tensor or a list of tensors"):
        zokernels.combine(lists.pop("out"), [p], 1, 1.0, streams=1, **lists)


@pytest.mark.parametrize("shape", [torch.ones(3), torch.tensor(3), "3", None, 3.0, [3.0], [torch.ones(2)]])
def test_the_shape_of_noise(shape):
    expected = "noise: shape: expected an integer or a sequence of integers (tensor.shape: noise of a"
    with pytest.raises(TypeError, match=f"^{re.escape(expected)}"):
        zokernels.noise(shape, seed=1)


def test_shapes_of_noise_that_are_right():
    import numpy as np

    whole = zokernels.noise(6, seed=1)
    for shape in (np.int64(6), [6], (2, 3), torch.ones(2, 3).shape, [np.int64(2), 3]):
        assert torch.equal(zokernels.noise(shape, seed=1).flatten(), whole)


def test_a_run_resumed_with_frozen_parameters(tmp_path):
    """As peft loads an adapter without is_trainable=True: the message says so."""

    def model(trained):
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        for name, p in made.named_parameters():
            p.requires_grad_(name in trained)
        return made

    path, first = tmp_path / "run.zk", model({"1.weight"})
    optimizer = ZOSGD(first.named_parameters(), lr=1e-2, trajectory=path)
    optimizer.step(lambda: first(torch.ones(4)).sum())
    optimizer.trajectory.close()
    for trained, message in (
        (set(), "1.weight: expected requires_grad=True, as in the log (peft: from_pretrained(..., is_trai"),
        ({"1.weight", "1.bias"}, "1.bias: expected a frozen parameter, as in the log, got one that is trai"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape('trajectory: resume: params: ' + message)}"):
            ZOSGD(model(trained).named_parameters(), lr=1e-2, trajectory=path, resume=True)
    ZOSGD(model({"1.weight"}).named_parameters(), lr=1e-2, trajectory=path, resume=True).trajectory.close()


def test_the_arguments_of_a_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    from zokernels.integrations.transformers import ZOTrainer

    model, args = (
        nn.Linear(2, 2),
        transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
    )
    for options, message in (
        (
            {"trajectories": "run.zk"},
            "ZOTrainer: trajectories: expected 'trajectory', the nearest of its arg",
        ),
        (
            {"train_datasets": []},
            "ZOTrainer: train_datasets: expected 'train_dataset', the nearest of its arg",
        ),
        (
            {"offload": {"storages": "host"}},
            "stream: storages: expected 'storage', the nearest of its arguments",
        ),
        ({"offload": "host"}, "ZOTrainer: offload: expected a dict of arguments of zokernels.offload.stream"),
        ({"offload": {"model": model}}, "stream: model: expected all of them"),
    ):
        with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
            ZOTrainer(model=model, args=args, **options)
