"""capturable=True: the device-side step on the CPU, bit for bit the ordinary one, and reading nothing
back.
"""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from zosgd_cases import BOTH, DTYPES, batch, loss_of, mlp, same_bits, weights

from zokernels.optim import ZOSGD
from zokernels.step.graphs import GraphRng

pytestmark = pytest.mark.filterwarnings("ignore:ZOSGD. . step:UserWarning")


def build(capturable, dtype=torch.float32, lr=0.05, **options):
    model = mlp(dtype, dropout=0.2)
    options = {"eps": 2.0**-6, "weight_decay": 0.1, "clip": 2.0, "seed": 2**63 + 9, **options}
    return model, ZOSGD(model.named_parameters(), lr=torch.tensor(lr), capturable=capturable, **options)


def run(model, opt, schedule, steps, bad=()):
    """Losses of some steps; those of ``bad`` are not finite."""
    losses = []
    for step in range(steps):
        torch.manual_seed(100 + opt.step_count)
        scale = float("nan") if step in bad else 1.0
        losses.append(opt.step(lambda scale=scale: loss_of(model, *data) * scale))
        schedule.step()
    return losses


data = batch()


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dist", "rounding"), [("normal", "stochastic"), ("rademacher", "nearest")])
def test_equals_the_ordinary_step(dtype, dist, rounding, restore):
    """20 steps with weight decay, a scheduled tensor lr, clipping and two skipped steps."""
    results = []
    for capturable in (False, True):
        model, opt = build(capturable, dtype, dist=dist, rounding=rounding, restore=restore)
        schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
        losses = run(model, opt, schedule, 20, bad=(0, 7))
        assert int(opt.skipped_steps) == 2
        assert opt.step_count == 20
        results.append(
            (weights(model), torch.stack(losses).nan_to_num(), opt.last_projected_gradient, opt.state_dict())
        )
    (w1, l1, g1, s1), (w2, l2, g2, s2) = results
    assert same_bits(w1, w2)
    assert torch.equal(l1, l2)
    assert torch.equal(g1, g2)
    assert s1 == s2
    assert not same_bits(w1, weights(mlp(dtype)))


@BOTH
@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, True)])
def test_resume_is_bit_exact(kinds, restore):
    """Also from one kind to the other."""
    first, second = kinds
    model, opt = build(first, torch.bfloat16, restore=restore)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    run(model, opt, schedule, 3, bad=(1,))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, opt, schedule)], file)
    run(model, opt, schedule, 3)
    file.seek(0)
    model2, opt2 = build(second, torch.bfloat16, restore=restore, lr=0.3, seed=1)
    schedule2 = torch.optim.lr_scheduler.ExponentialLR(opt2, 0.9)
    for part, saved in zip((model2, opt2, schedule2), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    run(model2, opt2, schedule2, 3)
    assert same_bits(weights(model), weights(model2))
    assert opt.state_dict() == opt2.state_dict()
    assert opt2.step_count == 6
    assert opt2.seed == 2**63 + 9


def test_a_graph_may_hold_the_addresses():
    """Counters, seeds and a tensor lr are written in place: by steps, by a schedule, by load_state_dict."""
    model, opt = build(True)
    state = opt.run_state
    tensors = [*state._steps.values(), *state._seeds.values(), state.skipped, opt.param_groups[0]["lr"]]
    addresses = [t.data_ptr() for t in tensors]
    saved = copy.deepcopy(opt.state_dict())
    run(model, opt, torch.optim.lr_scheduler.ExponentialLR(opt, 0.9), 3, bad=(1,))
    opt.load_state_dict(saved)
    now = [*state._steps.values(), *state._seeds.values(), state.skipped, opt.param_groups[0]["lr"]]
    assert opt.run_state is state
    assert [t.data_ptr() for t in now] == addresses
    assert [t.item() for t in now] == [0, 2**63 + 9 - 2**64, 0, pytest.approx(0.05)]


class NoReads(TorchDispatchMode):
    """Raises for what would wait for a GPU or depend on its answer."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero), (
            func
        )
        return func(*args, **(kwargs or {}))


@BOTH
def test_nothing_is_read_back(restore):
    model, opt = build(True, restore=restore)
    with NoReads():
        opt.step(lambda: loss_of(model, *data))
        opt.step(lambda: loss_of(model, *data) * float("nan"))
    assert int(opt.skipped_steps) == 1
    with NoReads(), pytest.raises(AssertionError):
        assert int(opt.skipped_steps)


def test_copies_go_on_alike():
    model, opt = build(True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    run(model, opt, schedule, 2)
    model2, opt2 = copy.deepcopy((model, opt))
    schedule2 = torch.optim.lr_scheduler.ExponentialLR(opt2, 0.9)
    run(model, opt, schedule, 2)
    run(model2, opt2, schedule2, 2)
    assert same_bits(weights(model), weights(model2))
    assert opt2.step_count == 4


def test_frozen_at_first_and_inference_mode():
    p = nn.Parameter(torch.ones(4), requires_grad=False)
    opt = ZOSGD([p], lr=0.1, capturable=True)
    assert opt.step_count == 0
    p.requires_grad_(True)
    with torch.inference_mode():
        opt.step(lambda: p.sum())
    opt.step(lambda: p.sum())
    assert opt.step_count == 2


# --- what a capture would freeze: no GPU needed to see the errors ---


def test_errors_of_a_capture():
    p = nn.Parameter(torch.ones(4))
    plain, opt, cpu_lr, fresh = (
        ZOSGD([p], lr=lr, capturable=capturable)
        for lr, capturable in ((0.0, False), (0.0, True), (torch.tensor(0.0), True), (0.0, True))
    )
    for warm in (plain, opt, cpu_lr):
        warm.step(lambda: p.sum())
    for optimizer in (plain, opt, cpu_lr, fresh):
        optimizer.is_capturing = lambda devices: True
    with pytest.raises(RuntimeError, match="capturable: expected True where a CUDA graph is captured"):
        plain.step(lambda: p.sum())
    with pytest.raises(RuntimeError, match="step: expected one step before the capture"):
        fresh.step(lambda: p.sum())
    for loss in (lambda: p.sum(), lambda: 1.0):
        with pytest.raises(
            ValueError, match="closure: expected a loss on the GPU where a CUDA graph is captured"
        ):
            opt.step(loss)
    with pytest.raises(
        ValueError, match=r"lr: expected a number or a tensor on cpu where .*, got a CPU tensor"
    ):
        cpu_lr.step(lambda: p.sum())
    assert torch.equal(p, torch.ones(4))


class FakeGenerator:
    """The part of a CUDA generator that GraphRng uses: an object that shares a state."""

    def __init__(self, state):
        self.device, self.state = torch.device("cuda:0"), state

    def clone_state(self):
        return FakeGenerator(dict(self.state))

    def graphsafe_get_state(self):
        return FakeGenerator(self.state)

    def graphsafe_set_state(self, other):
        self.state = other.state

    def draw(self):
        if not self.state.get("registered"):
            raise RuntimeError("Attempt to increase offset for a CUDA generator not in capture mode.")
        self.state["offset"] += 4
        return self.state["offset"]


def test_all_forwards_of_a_graph_draw_from_equal_generators(monkeypatch):
    default = FakeGenerator({"offset": 8})
    monkeypatch.setattr(torch.cuda, "default_generators", (default,))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    rng = GraphRng("ZOSGD", [torch.device("cpu"), torch.device("cuda:0")], 3)
    graph = SimpleNamespace(register_generator_state=lambda g: g.state.update(registered=True))
    before = default.state
    with pytest.raises(RuntimeError, match=r"register_graph\(graph\) before the capture"), rng.forward(0):
        default.draw()
    assert default.state is before
    rng.register(graph)
    draws = []
    for index in range(3):
        with rng.forward(index):
            draws.append((default.draw(), default.draw(), torch.rand(()).item()))
        assert default.state is before
    assert draws[0] == draws[1] == draws[2]
    assert draws[0][:2] == (12, 16)
    assert default.state == {"offset": 8}


def test_register_graph_needs_capturable():
    with pytest.raises(RuntimeError, match="capturable: expected True"):
        ZOSGD([nn.Parameter(torch.ones(1))], lr=0.1).register_graph(None)


# --- clipping ---


@BOTH
@pytest.mark.parametrize("capturable", [False, True])
def test_clip_bounds_g(capturable, restore):
    """g = 6 - as the loss is 3 |theta| - becomes 2; a smaller one stays; the update and the log use the
    clipped g.
    """
    moved = {}
    for clip in (None, 2.0, 100.0):
        p = nn.Parameter(torch.zeros(1))
        opt = ZOSGD(
            [p], lr=0.5, eps=0.25, dist="rademacher", clip=clip, restore=restore, capturable=capturable
        )
        opt.step(lambda p=p: 6 * p.sum())
        moved[clip] = (p.item(), opt.last_projected_gradient.item())
    assert moved[100.0] == moved[None]
    assert abs(moved[None][1]) == 6
    assert moved[2.0][1] == moved[None][1] / 3
    assert moved[2.0][0] == pytest.approx(moved[None][0] / 3)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("loss", [float("inf"), 1e39, float("nan")])
def test_clip_does_not_turn_an_overflow_into_a_step(loss, capturable):
    p = nn.Parameter(torch.ones(3))
    opt = ZOSGD([p], lr=0.5, clip=1.0, capturable=capturable)
    answers = iter((loss, 0.0))
    opt.step(lambda: (p.sum(), next(answers))[1])
    assert torch.equal(p, torch.ones(3))
    assert int(opt.skipped_steps) == 1
    assert not opt.last_projected_gradient.isfinite()


@pytest.mark.parametrize("clip", [0.0, -1.0, float("inf"), True])
def test_bad_clip(clip):
    with pytest.raises((ValueError, TypeError), match="clip: expected a finite number > 0"):
        ZOSGD([nn.Parameter(torch.ones(1))], lr=0.1, clip=clip)
