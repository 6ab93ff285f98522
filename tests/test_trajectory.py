"""Logs: what is recorded replays to the bits of the run, whatever the optimizer, in pieces, on another
backend.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import DISTS, DTYPES
from torch import nn
from trajectory_cases import CASES, Model, assert_same, base_of, record_with_cpu, run
from zosgd_cases import combined

import zokernels
from zokernels.optim import (
    PGAP,
    ZOSGD,
    Blocks,
    ForwardGradient,
    GivenMask,
    MeZOGV,
    QuZO,
    ZOConservative,
    ZORankSearch,
)
from zokernels.quantize import QuantizedLinear, named_integers
from zokernels.trajectory import read, record, replay_


def in_place(name: str) -> bool:
    """MeZO-GV, P-GAP and the line search keep a log in the exact mode alone."""
    return CASES[name][0] not in (PGAP, ForwardGradient, MeZOGV, ZORankSearch)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("name", "restore"), [(n, r) for n in CASES for r in ("exact", "inplace") if r == "exact" or in_place(n)]
)
def test_replay_gives_the_bits_of_the_run(name, restore, half, rng, tmp_path):
    dtype = rng.choice(DTYPES[1:]) if half else torch.float32
    base, history, _ = record_with_cpu(tmp_path / "run", name, dtype, rng, restore=restore, weight_decay=0.1)
    assert any(not torch.equal(history[-1][key], base[key]) for key in base)
    for upto in (5, rng.randrange(5)):
        with zokernels.backend("reference"):
            weights = {key: value.clone() for key, value in base.items()}
            assert replay_(weights, tmp_path / "run", upto) == upto
        assert_same(weights, history[upto - 1] if upto else base, f"{name} after {upto}")


@pytest.mark.filterwarnings("ignore:.*were taken by no torch function")  # the losses need no forward
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_and_fused_steps_change_no_bit(dtype, rng, tmp_path):
    """Weights in pieces of 2^20 elements, and more directions than are fused, with one thread and with
    two.
    """
    sizes = [301, 2**21 + rng.randrange(2**19), *(rng.randrange(1, 2**19) for _ in range(3)), 2**20]
    params = {f"w{i}": nn.Parameter((torch.randn(n) * 0.1).to(dtype)) for i, n in enumerate(sizes)}
    base = {name: p.detach().clone() for name, p in params.items()}
    options = {"dist": rng.choice(DISTS), "weight_decay": rng.choice([0.0, 0.1]), "directions": 23}
    with zokernels.backend("cpu"):
        optimizer = ZOSGD(
            params.items(), lr=1e-2, seed=rng.getrandbits(60), trajectory=tmp_path / "run", **options
        )
        for _ in range(3):
            optimizer.step(lambda: params["w0"].sum())
    optimizer.trajectory.close()
    final, threads = {name: p.detach() for name, p in params.items()}, torch.get_num_threads()
    assert all(not torch.equal(final[name], base[name]) for name in base)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            weights, done = {key: value.clone() for key, value in base.items()}, []
            replay_(weights, tmp_path / "run", progress=done.append)
            assert_same(weights, final)
            assert sum(done) == 3 * sum(sizes)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)


def test_a_log_of_more_steps_than_are_put_off_together(rng, tmp_path):
    """A replay puts off 4,096 steps at a time."""
    p = nn.Parameter(torch.randn(5))
    weights = {"p": p.detach().clone()}
    optimizer = ZOSGD([("p", p)], lr=1e-3, weight_decay=0.1, restore="inplace", trajectory=tmp_path / "run")
    for _ in range(4_100):
        optimizer.step(rng.random)
    optimizer.trajectory.close()
    assert replay_(weights, tmp_path / "run") == 4_100
    assert torch.equal(weights["p"], p)


@pytest.mark.parametrize("restore", ["exact", "inplace"])
def test_groups_frozen_weights_clipping_skipped_steps_and_lr_of_zero(restore, rng, tmp_path):
    model = Model(torch.bfloat16, rng)
    model.head.data = model.head.data.float()
    model.layers.get_submodule("1").w.requires_grad_(False)
    with torch.no_grad():
        model.embed.w[0, 0] = -0.0
    base, named = base_of(model), list(model.named_parameters())
    groups = [
        {"params": named[:2], "eps": 1e-2, "clip": 0.5, "rounding": "nearest"},
        {"params": named[2:], "weight_decay": 0.3, "dist": "rademacher"},
    ]
    with zokernels.backend("cpu"):
        optimizer = ZOSGD(groups, lr=0.1, restore=restore, directions=2, trajectory=tmp_path / "run")
        with pytest.warns(UserWarning, match="skipped"):
            history = run(optimizer, model, 4, {1: math.nan, 2: math.inf})
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step(lambda: model.loss(4))
        history.append(base_of(model))
    assert optimizer.trajectory.close() is None
    records = list(read(tmp_path / "run").records())
    assert [r.finite for r in records] == [True, False, False, True, True]
    assert [r.rates for r in records] == [(0.05 / (1 + i),) * 2 for i in range(4)] + [(0.0,) * 2]
    with zokernels.backend("reference"):
        for upto in range(1, 6):
            weights = {key: value.clone() for key, value in base.items()}
            replay_(weights, tmp_path / "run", upto)
            assert_same(weights, history[upto - 1], str(upto))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_pass_runs_replay_with_their_flushes(dtype, rng, tmp_path):
    model = Model(dtype, rng)
    base, history = base_of(model), []
    optimizer = ZOSGD(model.named_parameters(), lr=0.05, restore="inplace", weight_decay=0.1)
    record(optimizer, tmp_path / "run")
    run(optimizer, model, 1)
    for steps in (3, 2):
        with optimizer.two_pass(model):
            run(optimizer, model, steps)
            optimizer.flush()
            run(optimizer, model, 2)
            optimizer.state_dict()
        history.append((optimizer.step_count, base_of(model)))
        run(optimizer, model, 1)
        history.append((optimizer.step_count, base_of(model)))
    optimizer.trajectory.close()
    carried = [r.carried for r in read(tmp_path / "run").records()]
    assert carried == [False, False, True, True, False, True, False, False, True, False, True, False]
    for upto, want in history:
        weights = {key: value.clone() for key, value in base.items()}
        with zokernels.backend("reference"):
            replay_(weights, tmp_path / "run", upto)
        assert_same(weights, want, f"after {upto}")


@pytest.mark.parametrize("name", ["directions", "rademacher", "blocks", "ZOConservative"])
def test_fp32_is_one_sum_of_all_steps(name, rng, tmp_path):
    """In fp32, theta_0 prod d + sum of c_k z_k times the later decays, as one chain of fmas."""
    base, history, optimizer = record_with_cpu(tmp_path / "run", name, torch.bfloat16, rng, weight_decay=0.3)
    log = read(tmp_path / "run")
    q, decays = log.layout.directions, [1 - r.rates[0] * 0.3 for r in log.records()]
    got = {key: value.float() for key, value in base.items()}
    replay_(got, log, mode="fp32")
    fp32 = lambda x: torch.tensor(x, dtype=torch.float64).float().item()
    moved = 0
    for key, theta in base.items():
        z, c, factor = [], [], 1.0
        for record_, decay in reversed(list(zip(log.records(), decays, strict=True))):
            if name != "blocks" or key.startswith(block_of(optimizer.seed, record_.step)):
                for k in reversed(range(q)):
                    seed = zokernels.derive_seed(optimizer.seed, record_.step, k)
                    dist = optimizer.param_groups[0]["dist"]
                    z.append(
                        zokernels.noise(theta.shape, seed=seed, stream=zokernels.stream_of(key), dist=dist)
                    )
                    g = record_.gradients[0][k] * (record_.multiple if name == "ZOConservative" else 1)
                    c.append(fp32(factor * fp32(-record_.rates[0] * g)))
                factor *= fp32(decay)
        want = combined(theta.float(), tuple(z[::-1]), tuple(c[::-1]), decay=factor)
        assert_same({key: got[key]}, {key: want}, name)
        moved += not torch.equal(got[key], theta.float())
        # The run rounded to bf16 after each step, each time by less than a unit in the last place.
        unit = torch.finfo(torch.bfloat16).eps
        bound = sum(unit * weights[key].float().abs() for weights in history) + 1e-5
        assert ((got[key] - history[-1][key].float()).abs() <= bound).all()
    assert moved


def block_of(seed, step):
    blocks = ["layers.0.", "layers.1.", "layers.2.", ("embed", "head")]
    return blocks[zokernels.derive_seed(seed, step // 2, 0xFFFFFFFF) % 4]


def test_fp32_refuses_what_is_no_sum(rng, tmp_path):
    base, _, _ = record_with_cpu(tmp_path / "run", "kept", torch.float32, rng, steps=1)
    with pytest.raises(
        ValueError, match="mode: expected 'exact' for all but SGD on dense noise, got SGD on KeptRight"
    ):
        replay_(base, tmp_path / "run", mode="fp32")


def test_weights_may_be_a_module_pairs_or_a_list(rng, tmp_path):
    base, history, _ = record_with_cpu(tmp_path / "run", "ZOSGD", torch.float32, rng)
    model = Model(torch.float32, rng)
    model.load_state_dict(base)
    replay_(model, tmp_path / "run")
    assert_same(base_of(model), history[-1])
    pairs = [(f"module.{key}", value.clone()) for key, value in base.items()]
    replay_(pairs, tmp_path / "run")
    assert_same({key.removeprefix("module."): value for key, value in pairs}, history[-1])

    bare = [nn.Parameter(p.clone()) for p in base.values()]
    optimizer = ZOSGD(bare, lr=0.05, trajectory=tmp_path / "bare")
    for _ in range(3):
        optimizer.step(lambda: sum(p.square().sum() for p in bare))
    optimizer.trajectory.close()
    weights = [p.clone() for p in base.values()]
    replay_(weights, tmp_path / "bare")
    replay_(holder := nn.ParameterList([p.clone() for p in base.values()]), tmp_path / "bare")
    for got, also, want in zip(weights, holder, bare, strict=True):
        assert torch.equal(got, want)
        assert torch.equal(also, want)


def test_what_a_log_cannot_hold_is_given_again(rng, tmp_path):
    masks = {"embed.w": torch.tensor([0, 7, 59]), "layers.0.b": torch.tensor([True, False] * 3 + [True])}
    CASES["given"] = (ZOSGD, {"direction": GivenMask(masks), "subset": Blocks(layers=r"^layers\.(\d)\.")})
    try:
        base, history, _ = record_with_cpu(tmp_path / "run", "given", torch.bfloat16, rng)
    finally:
        del CASES["given"]
    given = {"direction": GivenMask(masks), "subset": Blocks(layers=r"^layers\.(\d)\.")}
    for missing in given:
        others = {key: value for key, value in given.items() if key != missing}
        with pytest.raises(ValueError, match=f"{missing}: expected {missing}=... as in the run"):
            replay_(base, tmp_path / "run", **others)
    wrong = GivenMask({**masks, "embed.w": torch.tensor([0, 8, 59])})
    with pytest.raises(ValueError, match="direction: expected the one of the log"):
        replay_(base, tmp_path / "run", direction=wrong, subset=given["subset"])
    replay_(base, tmp_path / "run", **given)
    assert_same(base, history[-1])


@pytest.mark.parametrize("fault", ["value", "dtype", "shape", "missing", "upto", "mode"])
def test_a_wrong_base_changes_nothing(fault, rng, tmp_path):
    base, _, _ = record_with_cpu(tmp_path / "run", "ZOSGD", torch.bfloat16, rng, steps=2)
    options, message = {}, ""
    if fault == "value":
        base["layers.1.w"][3, 8] += 1
        message = r"layers.1.w: expected the base weights of the run \(SHA-256\), got other values"
    elif fault == "dtype":
        base["head"], message = base["head"].half(), "head: expected dtype bfloat16, got float16"
    elif fault == "shape":
        base["head"], message = base["head"][1:], r"head: expected shape \(301,\), got \(300,\)"
    elif fault == "missing":
        del base["layers.0.b"]
        message = "weights: expected every trained parameter of the log, 'layers.0.b', got none"
    elif fault == "upto":
        options, message = {"upto": 3}, r"upto: expected a step in \[0, 2\], got 3"
    else:
        options, message = {"mode": "double"}, "mode: expected 'exact' or 'fp32'"
    before = {key: value.clone() for key, value in base.items()}
    with pytest.raises(ValueError, match=message):
        replay_(base, tmp_path / "run", **options)
    assert_same(base, before)


def test_settings_stay_as_they_are(rng, tmp_path):
    model = Model(torch.float32, rng)
    optimizer = ZOSGD(model.named_parameters(), lr=0.1, trajectory=tmp_path / "run")
    run(optimizer, model, 1)
    changes = [
        lambda: optimizer.param_groups[0].update(eps=1e-4),
        lambda: optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(2)))]}),
        lambda: model.head.requires_grad_(False),
    ]
    before = base_of(model)
    for change in changes:
        change()
        with pytest.raises(ValueError, match="expected the settings of the log"):
            optimizer.step(lambda: model.loss(1))
        optimizer.param_groups[0]["eps"] = 1e-3
        del optimizer.param_groups[1:]
    model.head.requires_grad_(True)
    other = ZOSGD(model.named_parameters(), lr=0.1)
    other.load_state_dict({**other.state_dict(), "zo": {**other.state_dict()["zo"], "step": 7}})
    optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="expected step 1, the next of the log, got 7"):
        optimizer.step(lambda: model.loss(1))
    assert_same(base_of(model), before)
    assert read(tmp_path / "run").steps == 1


def test_a_log_may_begin_at_any_step_without_state(rng, tmp_path):
    model = Model(torch.float32, rng)
    optimizer = ZOSGD(model.named_parameters(), lr=0.1)
    run(optimizer, model, 3)
    base = base_of(model)
    record(optimizer, tmp_path / "late")
    run(optimizer, model, 2)
    optimizer.trajectory.close()
    assert (read(tmp_path / "late").start, replay_(base, tmp_path / "late")) == (3, 2)
    assert_same(base, base_of(model))
    model, optimizer = Model(torch.float32, rng), None
    masked = CASES["sparse"][0](model.named_parameters(), lr=0.1)
    run(masked, model, 1)
    record(masked, tmp_path / "masked")
    with pytest.raises(ValueError, match="optimizer: expected a fresh optimizer, got one with state"):
        run(masked, model, 1)


def test_recording_changes_nothing_and_stops_at_close(rng, tmp_path):
    seed = rng.getrandbits(60)
    results = []
    for path in (None, tmp_path / "run"):
        torch.manual_seed(seed)
        model = Model(torch.bfloat16, type(rng)(seed))
        optimizer = ZOConservative(model.named_parameters(), lr=0.1, trajectory=path)
        run(optimizer, model, 3)
        results.append((base_of(model), optimizer.last_losses, optimizer.last_projected_gradient))
    assert_same(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]
    optimizer.trajectory.close()
    with pytest.raises(RuntimeError, match="expected an open log"):
        optimizer.step(lambda: model.loss(0))


def test_integer_weights(rng, tmp_path):
    layers = [
        QuantizedLinear.from_linear(nn.Linear(13, 11), bits=8),
        QuantizedLinear.from_linear(nn.Linear(11, 5), bits=4, packed=False),
    ]
    model, x = nn.Sequential(*layers), torch.randn(4, 13)
    base, untouched = ({name: t.clone() for name, t in model.state_dict().items()} for _ in range(2))
    with zokernels.backend("cpu"):
        optimizer = QuZO(named_integers(model), lr=50.0, trajectory=tmp_path / "run")
        for _ in range(4):
            optimizer.step(lambda: model(x).square().sum())
    optimizer.trajectory.close()
    with zokernels.backend("reference"):
        replay_(base, tmp_path / "run")
    for i, layer in enumerate(model):
        assert not torch.equal(layer.weight, untouched[f"{i}.weight"])
        assert torch.equal(layer.weight, base[f"{i}.weight"])


def test_lr_as_a_tensor(rng, tmp_path):
    model = Model(torch.float32, rng)
    base, lr = base_of(model), torch.tensor(0.3)
    optimizer = ZOSGD(model.named_parameters(), lr=lr, weight_decay=0.1, trajectory=tmp_path / "run")
    for value in (0.3, 0.0, 0.1):
        lr.fill_(value)
        optimizer.step(lambda: model.loss(0))
    optimizer.trajectory.close()
    replay_(base, tmp_path / "run")
    assert_same(base, base_of(model))
    assert [r.rates[0] for r in read(tmp_path / "run").records()] == [
        torch.tensor(v).item() for v in (0.3, 0.0, 0.1)
    ]


def test_capturable_is_refused(rng, tmp_path):
    model = Model(torch.float32, rng)
    with pytest.raises(ValueError, match="capturable: expected False"):
        ZOSGD(model.named_parameters(), lr=0.1, capturable=True, trajectory=tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("restore", ["exact", "inplace"])
def test_on_a_gpu_nothing_waits_and_the_cpu_replays(dtype, restore, rng, tmp_path):
    model = Model(dtype, rng)
    base = base_of(model)
    model.cuda()
    optimizer = ZOSGD(
        model.named_parameters(), lr=0.05, restore=restore, trajectory=tmp_path / "run", weight_decay=0.1
    )
    run(optimizer, model, 1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 5):
            optimizer.step(lambda: model.loss(step))  # noqa: B023
    finally:
        torch.cuda.set_sync_debug_mode("default")
    optimizer.trajectory.close()
    replay_(base, tmp_path / "run")
    assert_same(base, {key: value.cpu() for key, value in base_of(model).items()})
