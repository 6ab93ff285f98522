"""What must hold around a step in both modes: exceptions, interrupts, RNG, autocast, drift of the
in-place mode.
"""

import os
import signal
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import watched
from torch import nn

import zokernels as zk
from zokernels.optim import ZOSGD
from zokernels.step.guards import RngState, uninterrupted

BOTH = pytest.mark.parametrize("restore", ["exact", "inplace"])


def check_restored(p, theta, restore, steps=1):
    if restore == "exact":
        assert torch.equal(p, theta)
    else:  # fp32: a rounding of the weight for each move
        assert (p - theta).abs().max() <= 4 * steps * 2**-24 * theta.abs().max()


@BOTH
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2])
def test_closure_that_raises(call, error, restore):
    p = nn.Parameter(torch.linspace(1, 2, 100))
    theta, calls = p.detach().clone(), []
    opt = ZOSGD([p], lr=0.1, eps=0.5, restore=restore)

    def closure():
        loss = p.sum()
        calls.append(loss)
        if len(calls) == call:
            raise error("stop")
        return loss

    with pytest.raises(error):
        opt.step(closure)
    assert len(calls) == call
    assert abs(calls[-1] - theta.sum()) > 1e-3  # it was perturbed when it raised
    check_restored(p, theta, restore)
    assert opt.step_count == 0
    assert opt.last_losses is None
    opt.step(closure)  # the same noise again, since the step did not count
    assert calls[call].item() == pytest.approx(calls[0].item(), rel=1e-5)


def test_kernel_that_fails_in_the_second_bucket():
    """The buckets that had moved go back, and the others stay as they were."""
    a, b = nn.Parameter(torch.ones(50)), nn.Parameter(torch.ones(50, dtype=torch.bfloat16))
    opt, calls = ZOSGD([a, b], lr=0.1, eps=0.5, restore="inplace"), []

    def failing(params, *rest):
        calls.append(params[0].dtype)
        if len(calls) == 2:
            raise MemoryError

    with watched("combine_", failing), pytest.raises(MemoryError):
        opt.step(lambda: a.sum() + b.float().sum())
    assert calls == [torch.float32, torch.bfloat16, torch.float32]
    check_restored(a, torch.ones(50), "inplace")
    assert torch.equal(b, torch.ones_like(b))


@BOTH
def test_interrupt_in_the_update_waits_for_its_end(restore):
    """After Ctrl-C between two buckets of the update both are updated and the step counts; then it is
    raised.
    """
    a, b = nn.Parameter(torch.ones(50)), nn.Parameter(torch.ones(50, dtype=torch.bfloat16))
    opt, calls = ZOSGD([a, b], lr=0.1, restore=restore), []
    last_but_one = {"exact": 1, "inplace": 5}[restore]  # in place, two buckets move twice before the update

    def interrupting(*args):
        calls.append(args)
        if len(calls) == last_but_one:
            os.kill(os.getpid(), signal.SIGINT)

    with watched("combine_", interrupting), pytest.raises(KeyboardInterrupt):
        opt.step(lambda: a.sum() + b.float().sum())
    assert len(calls) == last_but_one + 1
    assert opt.step_count == 1
    clean = [nn.Parameter(torch.ones_like(a)), nn.Parameter(torch.ones_like(b))]
    ZOSGD(clean, lr=0.1, restore=restore).step(lambda: clean[0].sum() + clean[1].float().sum())
    assert torch.equal(a, clean[0])
    assert torch.equal(b, clean[1])


def test_interrupts_are_only_deferred():
    before, order = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            order.append("inside")
        order.append("not reached")
    assert order == ["inside"]
    assert signal.getsignal(signal.SIGINT) is before

    def elsewhere():
        with uninterrupted():
            order.append(signal.getsignal(signal.SIGINT) is before)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert order == ["inside", True]


@BOTH
def test_both_forwards_draw_the_same_masks(restore):
    p, masks = nn.Parameter(torch.ones(64)), []

    def closure():
        masks.append(F.dropout(torch.ones(64), 0.5) != 0)
        return p.sum() + torch.rand(())

    opt = ZOSGD([p], lr=0.1, restore=restore)
    torch.manual_seed(7)
    opt.step(closure)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    F.dropout(torch.ones(64), 0.5)
    torch.rand(())
    assert torch.equal(after, torch.get_rng_state())  # advanced as by one forward
    opt.step(closure)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


def test_rng_state_of_cuda_devices_is_kept(monkeypatch):
    """No GPU needed: the generator of each CUDA device of the parameters is read once and set once."""
    log = []
    monkeypatch.setattr(
        torch.cuda, "get_rng_state", lambda device: log.append(("get", device)) or f"state {device}"
    )
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: log.append(("set", state, device)))
    one = torch.device("cuda:1")
    RngState([torch.device("cpu"), one]).restore()
    assert log == [("get", one), ("set", "state cuda:1", one)]


@BOTH
@pytest.mark.parametrize("place", ["around the step", "in the closure"])
def test_autocast_does_not_hide_a_move(restore, place):
    """autocast caches casts of fp32 weights: no forward, in the step or after it, may see an old one."""
    model, plain = nn.Linear(16, 4), nn.Linear(16, 4)
    plain.load_state_dict(model.state_dict())
    x = torch.linspace(-1, 1, 32).view(2, 16)
    cast = lambda enabled=True: torch.autocast("cpu", torch.bfloat16, enabled=enabled)
    opt, reference = (ZOSGD(m.named_parameters(), lr=0.5, eps=0.1, restore=restore) for m in (model, plain))

    def closure(m):
        with cast():
            return m(x).float().square().sum()

    if place == "around the step":
        with cast():
            before = model(x)  # fills the cache with casts of theta
            opt.step(lambda: model(x).float().square().sum())
            after = model(x)
        with cast():
            fresh = model(x)
        assert torch.equal(after, fresh)
        assert not torch.equal(after, before)
    else:
        opt.step(lambda: closure(model))
    # Without any cache: each forward on its own copy of the perturbed weights.
    for sign, loss in zip((1, -1), opt.last_losses, strict=True):
        copies = {}
        for n, p in plain.named_parameters():
            copies[n] = p.detach().clone()
            for c in (0.1,) if sign == 1 else (-0.1,) if restore == "exact" else (0.1, -0.2):
                zk.combine_(copies[n], zk.derive_seed(0, 0, 0), c, streams=zk.stream_of(n))
        with torch.no_grad():
            assert torch.equal(loss, closure(lambda x, w=copies: torch.func.functional_call(plain, w, (x,))))
    assert opt.last_losses[0] != opt.last_losses[1]
    reference.step(lambda: closure(plain))
    assert torch.equal(model.weight, plain.weight)


def test_exact_keeps_no_casts_of_its_copies(monkeypatch):
    model, enabled = nn.Linear(4, 4), []

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            enabled.append(torch.is_autocast_cache_enabled())
            return model(torch.ones(1, 4)).float().sum()

    ZOSGD(model.parameters(), lr=0.1).step(closure)
    assert enabled == [False, False]
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.float32, 0, 1e-6), (torch.bfloat16, 1e-4, 0.1)])
def test_in_place_drift(dtype, low, high):
    """In half precision the way back is not exact, which is why the exact mode exists."""
    torch.manual_seed(0)
    theta = (torch.randn(4096) * 0.02).to(dtype)
    moved = {}
    for restore in ("exact", "inplace"):
        p = nn.Parameter(theta.clone())
        opt = ZOSGD([p], lr=0.0, restore=restore)
        for _ in range(5):
            opt.step(lambda p=p: p.float().sum())
        moved[restore] = ((p.float() - theta.float()).norm() / theta.float().norm()).item()
    assert moved["exact"] == 0
    assert low < moved["inplace"] < high


def test_closure_may_return_one_buffer_twice():
    """l+ must not become l- if the closure returns the same tensor each time, as a CUDA graph does."""
    p, buffer = nn.Parameter(torch.ones(9)), torch.zeros(())
    opt = ZOSGD([p], lr=0.1)
    opt.step(lambda: buffer.copy_(p.square().sum()))
    assert opt.last_losses[0] != opt.last_losses[1]
    assert opt.last_projected_gradient != 0


@BOTH
def test_closure_may_sum_micro_batches(restore):
    model, x = nn.Linear(4, 1), torch.linspace(-1, 1, 24).view(6, 4)
    opt = ZOSGD(model.parameters(), lr=0.0, restore=restore)
    opt.step(lambda: sum(model(part).square().sum() for part in x.split(2)))
    parts = opt.last_losses[0]
    again = ZOSGD(model.parameters(), lr=0.0, restore=restore)
    again.step(lambda: model(x).square().sum())
    assert parts.item() == pytest.approx(again.last_losses[0].item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_losses_are_not_subtracted_in_half_precision(dtype):
    p = nn.Parameter(torch.zeros(2))
    answers = iter((torch.tensor(3.0, dtype=dtype), torch.tensor(1.0, dtype=dtype)))
    opt = ZOSGD([p], lr=0.0, eps=1e-5)
    loss = opt.step(lambda: p.sum().to(dtype) * 0 + next(answers))
    assert loss.dtype is opt.last_projected_gradient.dtype is torch.float32
    assert opt.last_projected_gradient.item() == pytest.approx(1e5)  # beyond fp16
