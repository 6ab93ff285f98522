"""A whole step in a CUDA graph: replays against eager steps, equal masks in both forwards, no waiting."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zosgd_cases import BOTH, DTYPES, loss_of, mlp, same_bits, weights

from zokernels.optim import ZOSGD

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:ZOSGD. . step:UserWarning")]

WARM, REPLAYS = 3, 10


def build(dtype=torch.float32, dropout=0.0, **options):
    model = mlp(dtype, dropout).cuda()
    lr = torch.tensor(0.05, device="cuda")
    opt = ZOSGD(model.named_parameters(), lr=lr, eps=2.0**-6, **{"capturable": True, "seed": 3, **options})
    return model, opt


def inputs(steps):
    """Batches for each step on the GPU, and the buffers that the graph reads."""
    generator = torch.Generator().manual_seed(11)
    xs = torch.randn(steps, 16, 6, generator=generator).cuda()
    ys = torch.randint(3, (steps, 16), generator=generator).cuda()
    return xs, ys, torch.empty_like(xs[0]), torch.empty_like(ys[0])


@contextmanager
def side_stream():
    """Steps before a capture run on another stream than the default one, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def no_waiting():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def capture(opt, closure):
    graph = torch.cuda.CUDAGraph()
    opt.register_graph(graph)
    with torch.cuda.graph(graph):
        loss = opt.step(closure)
    return graph, loss


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_replays_equal_eager_steps(dtype, dropout, restore):
    """Ten replays with new data, a schedule over the tensor lr, weight decay, clipping, dropout."""
    xs, ys, x, y = inputs(WARM + REPLAYS)
    results = []
    for captured in (False, True):
        model, opt = build(dtype, dropout, restore=restore, weight_decay=0.1, clip=3.0)
        schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
        closure = lambda model=model: loss_of(model, x, y)
        graph, losses = None, []
        torch.manual_seed(7)
        for step in range(WARM + REPLAYS):
            x.copy_(xs[step])
            y.copy_(ys[step])
            if captured and step == WARM:
                held = weights(model)
                graph, static = capture(opt, closure)
                assert same_bits(weights(model), held)  # a capture runs nothing
                assert opt.step_count == WARM
            if graph is not None:
                graph.replay()
                losses.append(static.clone())
            else:
                with side_stream():
                    losses.append(opt.step(closure))
            schedule.step()
        torch.cuda.synchronize()
        assert opt.step_count == WARM + REPLAYS
        assert int(opt.skipped_steps) == 0
        results.append(
            (weights(model), torch.stack(losses), opt.last_projected_gradient.clone(), opt.state_dict())
        )
    (w1, l1, g1, s1), (w2, l2, g2, s2) = results
    assert torch.equal(l1, l2)
    assert torch.equal(g1, g2)
    assert same_bits(w1, w2)
    assert s1["zo"] == s2["zo"]


@BOTH
def test_capturable_equals_ordinary_on_the_gpu(restore):
    xs, ys, x, y = inputs(5)
    results = []
    for capturable in (False, True):
        model, opt = build(torch.bfloat16, 0.25, restore=restore, weight_decay=0.1, capturable=capturable)
        torch.manual_seed(7)
        for step in range(5):
            x.copy_(xs[step])
            y.copy_(ys[step])
            opt.step(lambda model=model: loss_of(model, x, y))
        results.append(weights(model))
    assert same_bits(*results)


@BOTH
@pytest.mark.parametrize("capturable", [False, True])
def test_no_step_waits_for_the_device(capturable, restore):
    xs, ys, x, y = inputs(1)
    x.copy_(xs[0])
    y.copy_(ys[0])
    model, opt = build(
        torch.bfloat16, 0.25, restore=restore, weight_decay=0.1, clip=3.0, capturable=capturable
    )
    closure = lambda: loss_of(model, x, y)
    with side_stream():
        for _ in range(WARM):
            opt.step(closure)
    with no_waiting(), side_stream():
        opt.step(closure)
    if capturable:
        graph = torch.cuda.CUDAGraph()
        opt.register_graph(graph)
        with torch.cuda.graph(graph), no_waiting():
            opt.step(closure)
        with no_waiting():
            graph.replay()
            graph.replay()
    torch.cuda.synchronize()
    assert opt.step_count == WARM + (3 if capturable else 1)


@BOTH
def test_a_replay_skips_a_loss_that_is_not_finite(restore):
    xs, ys, x, y = inputs(1)
    x.copy_(xs[0])
    y.copy_(ys[0])
    model, opt = build(restore=restore, weight_decay=0.1, clip=1.0)
    closure = lambda: loss_of(model, x, y)
    with side_stream():
        opt.step(closure)
    graph, _ = capture(opt, closure)
    before = weights(model)
    x.fill_(float("nan"))
    graph.replay()
    after = weights(model)
    for p, q in zip(before, after, strict=True):
        assert torch.equal(p, q) if restore == "exact" else (p - q).abs().max() <= 8 * 2**-24
    assert int(opt.skipped_steps) == 1
    x.copy_(xs[0])
    graph.replay()
    assert not same_bits(weights(model), after)
    assert int(opt.skipped_steps) == 1
    assert opt.step_count == 3


def test_a_loaded_state_reaches_the_graph():
    """Counters and lr are loaded in place: replays after a load continue the loaded run."""
    xs, ys, x, y = inputs(1)
    x.copy_(xs[0])
    y.copy_(ys[0])
    model, opt = build()
    closure = lambda: loss_of(model, x, y)
    with side_stream():
        opt.step(closure)
    graph, _ = capture(opt, closure)
    saved_model = {k: v.clone() for k, v in model.state_dict().items()}
    saved = opt.state_dict()
    saved["param_groups"] = [{**g, "lr": g["lr"].clone()} for g in saved["param_groups"]]
    graph.replay()
    once = weights(model)
    opt.param_groups[0]["lr"].fill_(0.7)
    graph.replay()
    model.load_state_dict(saved_model)
    opt.load_state_dict(saved)
    graph.replay()
    assert same_bits(weights(model), once)
    assert opt.step_count == 2


def masks_of(opt, p, register):
    """Masks that the two forwards of each of four replays drew; None where the capture was refused."""
    buffers = [torch.zeros(64, device="cuda") for _ in range(2)]
    calls = []

    def closure():
        buffers[len(calls) % 2].copy_(F.dropout(torch.ones(64, device="cuda"), 0.5))
        calls.append(None)
        return p.sum()

    with side_stream():
        opt.step(closure)
    graph = torch.cuda.CUDAGraph()
    if register:
        opt.register_graph(graph)
    try:
        with torch.cuda.graph(graph):
            opt.step(closure)
    except RuntimeError as error:
        if register or "register_graph(graph)" not in str(error):
            raise
        return None
    seen = []
    for _ in range(4):
        torch.rand(5, device="cuda")  # others draw between the replays
        graph.replay()
        seen.append([b.clone() for b in buffers])
    return seen


@pytest.mark.parametrize("register", [True, False])
def test_both_forwards_of_a_replay_draw_the_same_masks(register):
    """Without register_graph either an error (torch that wants generators registered) or equal masks as
    well.
    """
    p = nn.Parameter(torch.ones(8, device="cuda"))
    opt = ZOSGD([p], lr=0.0, capturable=True)
    seen = masks_of(opt, p, register)
    if seen is not None:
        assert all(torch.equal(first, second) for first, second in seen)
        assert not torch.equal(seen[0][0], seen[1][0])


def test_a_capture_needs_capturable():
    p = nn.Parameter(torch.ones(8, device="cuda"))
    opt = ZOSGD([p], lr=0.1)
    opt.step(lambda: p.sum())
    buffer = torch.zeros(1, device="cuda")

    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            buffer.add_(1)  # a graph that is not empty
            opt.step(lambda: p.sum())

    with pytest.raises(RuntimeError, match="capturable: expected True"):
        capture()
