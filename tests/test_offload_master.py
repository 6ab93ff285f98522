"""Blocks whose fp32 weights are kept in bf16 or fp16 (``stream(..., master=)``): against a loop that is
written out here, in which nothing is streamed.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from offload_cases import Tower, batch_of, kept, loss_of, same_bits, same_state, tower, train
from safetensors.torch import load_file, save_file
from test_offload_states import METHODS, run

import zokernels
from zokernels import offload
from zokernels.optim import ZOSGD, ForwardGradient, ZOAdam
from zokernels.trajectory import replay_

KINDS = {"SGD": ZOSGD, "momentum": lambda p, **o: ZOSGD(p, momentum=0.9, **o), "Adam": ZOAdam}


def written_out(model, steps, kind, eps=1e-2, **options):
    """Losses of steps on the weights of ``model``, each forward of which an fp32 copy makes.

    That copy has theta +- eps z, computed in fp32 from the weights, and rounded to nothing else.
    """
    weights = {name: p.data for name, p in model.named_parameters()}
    shadow, losses = copy.deepcopy(model).float(), []
    optimizer = kind(model.named_parameters(), lr=1e-2, eps=eps, seed=5, **options)
    for step in range(steps):
        torch.manual_seed(step)
        sides = iter((1, -1))

        def loss():
            for p in model.parameters():  # the optimizer perturbs them for whoever takes them: here, nobody
                p.sum()
            sign, seed = next(sides), zokernels.derive_seed(5, step)  # noqa: B023
            with torch.no_grad():
                for name, p in shadow.named_parameters():
                    p.copy_(weights[name])
                    if p.requires_grad:
                        zokernels.combine_(p, seed, sign * eps, streams=zokernels.stream_of(name))
            return loss_of(shadow, batch_of(step))  # noqa: B023

        losses.append(optimizer.step(loss).double())
    return torch.stack(losses)


@pytest.mark.parametrize("storage", ["host", "disk"])
@pytest.mark.parametrize("master", offload.blocks.MASTERS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_has_the_bits_of_the_loop(kind, master, storage, rng, tmp_path):
    model = tower(seed=rng.getrandbits(30), dropout=rng.choice((0.0, 0.1)))
    expected, start = kept(model, master), kept(model, master)
    options = {"weight_decay": 0.0} if kind == "Adam" else {}
    losses = written_out(expected, 6, KINDS[kind], **options)
    placed = {"storage": storage, "path": tmp_path / "run" if storage == "disk" else None}
    placed |= {"slots": rng.choice((1, 2, 8)), "scratch": rng.choice((1, 2))}
    with offload.stream(model, "layers", master=master, write_every=rng.choice((1, 3)), **placed) as engine:
        ours, _ = train(model, 6, KINDS[kind], weight_decay=0.0)
        assert {p.dtype for p in model.layers.parameters()} == {master}
        assert same_bits(ours, losses)
        assert not same_state(model.state_dict(), expected.state_dict())
        torch.manual_seed(0)
        logits = model(batch_of(9))  # evaluation computes with fp32 copies, too
        engine.save(tmp_path / "saved.safetensors")
    torch.manual_seed(0)
    assert same_bits(logits.detach(), copy.deepcopy(expected).float()(batch_of(9)).detach())
    assert not same_bits(logits, copy.deepcopy(start).float()(batch_of(9)))
    saved = load_file(tmp_path / "saved.safetensors")
    assert all(same_bits(v, expected.state_dict()[k]) for k, v in saved.items())
    assert len({v.dtype for v in saved.values()}) == 2
    if storage == "disk":  # the log, on weights in memory
        replay_(start, tmp_path / "run" / "run.zk")
        assert not same_state(start.state_dict(), expected.state_dict())


@pytest.mark.parametrize("method", [m for m in METHODS if m != "forward gradient"])
def test_methods(method, rng, tmp_path):
    """Every form of streaming has the same bits, and the first losses are those of the fp32 run in memory,
    whose weights are the same until then."""
    model = tower(seed=rng.getrandbits(30), layers=3)
    model.layers.bfloat16().float()
    runs = []
    for options in ({"scratch": 1, "slots": 1}, {"storage": "disk", "path": tmp_path / "run"}):
        ours = copy.deepcopy(model)
        with offload.stream(ours, "layers", master=torch.bfloat16, **options):
            losses, _ = run(method, ours, 4)
            runs.append((losses, ours.state_dict()))
    assert same_bits(runs[0][0], runs[1][0])
    assert not same_state(runs[0][1], runs[1][1])
    assert any(not same_bits(v.float(), model.state_dict()[k].float()) for k, v in runs[0][1].items())
    in_memory, _ = run(method, model, 1)
    assert same_bits(runs[0][0][:1], in_memory)


def test_from_checkpoints_and_resumed(rng, tmp_path):
    """From a file of bf16 weights, which is read in place, and from one of fp32, which is rounded."""
    start = tower(seed=rng.getrandbits(30))
    expected = kept(start, torch.bfloat16)
    expected.bfloat16()  # all of the file is bf16, and resident weights are widened
    save_file({k: v.contiguous().clone() for k, v in expected.state_dict().items() if k != "head.weight"},
              tmp_path / "bf16.safetensors")  # fmt: skip
    expected.float()
    expected.layers.bfloat16()
    losses = written_out(expected, 6, ZOSGD)
    options = {"weights": tmp_path / "bf16.safetensors", "path": tmp_path / "run", "master": torch.bfloat16}
    for steps in (3, 6):
        with offload.empty_weights():
            ours = Tower()
        with offload.stream(ours, "layers", "disk", resume=steps == 6, **options):
            got, _ = train(ours, steps, weight_decay=0.0)
            if steps == 3:
                assert same_bits(got, losses[:3])
            else:
                assert not same_state(ours.state_dict(), expected.state_dict())
    save_file({k: v.contiguous().clone() for k, v in start.state_dict().items() if k != "head.weight"},
              tmp_path / "fp32.safetensors")  # fmt: skip
    with offload.empty_weights():
        ours = Tower()
    whole = kept(start, torch.float16)
    options = {"weights": tmp_path / "fp32.safetensors", "master": torch.float16}
    with pytest.raises(ValueError, match=r"weights: .*expected dtype torch.float16, as master says, got F32"):
        offload.stream(ours, "layers", "disk", **options)  # in place it cannot be rounded
    with offload.stream(ours, "layers", "host", **options):
        assert not same_state(ours.state_dict(), whole.state_dict())


def test_the_footprint_counts_it(rng):
    """Slots have the bytes of what is stored, scratch those of fp32."""
    model = tower(seed=rng.getrandbits(30))
    expected = offload.footprint(model, "layers", slots=2, master=torch.bfloat16)
    fp32 = offload.footprint(model, "layers", slots=2)
    assert expected.slots < 0.75 * fp32.slots
    assert expected.scratch == fp32.scratch
    with offload.stream(model, "layers", slots=2, master=torch.bfloat16) as engine:
        assert sum(s.data.nbytes for s in engine.buffers) == expected.slots
        assert sum(s.nbytes for s in engine._scratch) == expected.scratch


def test_frozen_weights_and_integers_are_as_they_are(rng):
    """Frozen ones are widened, too; weights of other dtypes are stored and computed with as they are."""
    model = tower(seed=rng.getrandbits(30), dropout=0.0)
    model.layers[1].register_buffer("table", torch.arange(12, dtype=torch.int8).view(3, 4))
    model.layers[0].norm.requires_grad_(False)
    expected = kept(model, torch.bfloat16)
    losses = written_out(expected, 4, ZOSGD)
    with offload.stream(model, "layers", master=torch.bfloat16, scratch=rng.choice((1, 2))):
        ours, _ = train(model, 4, weight_decay=0.0)
        assert same_bits(ours, losses)
        assert not same_state(model.state_dict(), expected.state_dict())


def test_refused(tmp_path):
    make = lambda model=None, **options: offload.stream(model or tower(), "layers", **options)
    with pytest.raises(ValueError, match=r"master: expected torch.bfloat16, torch.float16 or None"):
        make(master=torch.float32)
    for options in ({"storage": "device"}, {"wire": "bf16"}):
        with pytest.raises(ValueError, match=r"master: expected None where storage is 'device', and with wi"):
            make(master=torch.bfloat16, **options)
    model = tower()
    model.layers[1].up.weight.data[0, 0] = 1e5
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"layers.1.up.weight: expected weights up to 65504.*got 100000"):
        make(model, master=torch.float16)
    assert not same_state(model.state_dict(), before)
    with make(master=torch.bfloat16) as engine, pytest.raises(ValueError, match="streamed with master="):
        ForwardGradient(engine.model.named_parameters(), lr=1e-3)


def test_small_updates_are_not_lost():
    """Steps far below a unit of bf16 move the weights on average, as they do in fp32."""
    torch.manual_seed(0)
    net, x = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(2))), torch.randn(8, 64)
    target = torch.randn(8, 64)
    losses = []
    for rounding in ("stochastic", "nearest"):
        ours = copy.deepcopy(net)
        with warnings.catch_warnings(), offload.stream(ours, list(ours), master=torch.bfloat16):
            warnings.simplefilter("ignore")
            optimizer = ZOSGD(ours.named_parameters(), lr=2e-3, eps=1e-3, seed=1, rounding=rounding)
            loss = lambda: (ours(x) - target).square().mean()  # noqa: B023
            losses.append([float(optimizer.step(loss)) for _ in range(60)])
    assert losses[0][-1] < losses[0][0]
    assert abs(losses[1][-1] - losses[1][0]) < abs(losses[0][-1] - losses[0][0])
