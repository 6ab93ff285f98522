"""The two-pass form: nothing ever reads weights that hold the next step's perturbation."""

import copy
import os
import pickle
import signal

import pytest
import torch
import torch.nn.functional as F
from helpers import watched
from torch import nn
from torch.nn.modules import module as registry
from zosgd_cases import batch, loss_of, mlp, same_bits, weights

import zokernels as zk
from zokernels.optim import ZOSGD


def build(dtype=torch.float32, dropout=0.0, **options):
    model = mlp(dtype, dropout)
    return model, ZOSGD(
        model.named_parameters(), **{"lr": 0.05, "eps": 2.0**-6, "restore": "inplace", **options}
    )


def stepped(dtype=torch.bfloat16):
    """A model inside the context after a step, its optimizer, the context, and the weights a flush must
    leave.
    """
    model, opt = build(dtype)
    context = opt.two_pass(model)
    context.__enter__()
    opt.step(lambda: loss_of(model, *batch()))
    clean = copy.deepcopy([p.detach() for p in model.parameters()])
    for (name, _), p in zip(model.named_parameters(), clean, strict=True):
        zk.combine_(p, zk.derive_seed(0, 1, 0), -(2.0**-6), streams=zk.stream_of(name))
    assert not same_bits(weights(model), clean)
    return model, opt, context, clean


READS = {
    "forward": lambda model, opt: model(torch.zeros(2, 6, dtype=torch.bfloat16)),
    "forward of a part": lambda model, opt: model[3](torch.zeros(2, 9, dtype=torch.bfloat16)),
    "forward of a wrapper": lambda model, opt: nn.Sequential(model)(torch.zeros(2, 6, dtype=torch.bfloat16)),
    "state_dict": lambda model, opt: model.state_dict(),
    "state_dict of a part": lambda model, opt: model[0].state_dict(),
    "state_dict of a wrapper": lambda model, opt: nn.Sequential(model).state_dict(),
    "load_state_dict": lambda model, opt: model.load_state_dict({}, strict=False),
    "optimizer state_dict": lambda model, opt: opt.state_dict(),
    "optimizer load_state_dict": lambda model, opt: opt.load_state_dict(build()[1].state_dict()),
    "flush": lambda model, opt: opt.flush(),
}


@pytest.mark.parametrize("read", READS)
def test_reading_flushes(read):
    model, opt, context, clean = stepped()
    READS[read](model, opt)
    assert same_bits(weights(model), clean)
    opt.flush()  # nothing more to do
    context.__exit__(None, None, None)
    assert same_bits(weights(model), clean)


def test_a_forward_sees_clean_weights():
    model, _, context, clean = stepped(torch.float32)
    fresh = mlp()
    for p, value in zip(fresh.parameters(), clean, strict=True):
        p.data.copy_(value)
    x = batch()[0]
    assert torch.equal(model(x), fresh(x))
    context.__exit__(None, None, None)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_forward_flushes():
    with torch.no_grad():
        traced = torch.jit.trace(
            mlp(torch.bfloat16), torch.zeros(1, 6, dtype=torch.bfloat16), check_trace=False
        )
    opt = ZOSGD(traced.named_parameters(), lr=0.05, eps=2.0**-6, restore="inplace")
    x = torch.zeros(2, 6, dtype=torch.bfloat16)
    with opt.two_pass(nn.ParameterList([p for g in opt.param_groups for p in g["params"]])):
        opt.step(lambda: traced(x).float().square().sum())
        held = weights(traced)
        traced(x)
        assert not same_bits(weights(traced), held)


@pytest.mark.filterwarnings(
    "ignore:Using `torch.compile:UserWarning", "ignore:Dynamo does not know:UserWarning"
)
@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_compiled_forward_flushes(way):
    model, opt = build()
    x, y = batch()
    if way == "wrapped":
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = model
        model.compile(backend="eager")
    with opt.two_pass(model):
        for _ in range(2):
            opt.step(lambda: F.cross_entropy(compiled(x), y))
        held = weights(model)
        with torch.no_grad():
            out = compiled(x)
        now = weights(model)
        assert not same_bits(held, now)
        opt.flush()
        assert same_bits(now, weights(model))
    fresh = mlp()
    fresh.load_state_dict(model.state_dict())
    assert torch.allclose(out, fresh(x), atol=1e-6)


def test_modules_without_managed_parameters_do_not_flush():
    model, _, context, _ = stepped()
    held = weights(model)
    nn.Linear(2, 2)(torch.ones(1, 2))
    nn.Linear(2, 2).state_dict()
    assert same_bits(weights(model), held)
    context.__exit__(None, None, None)


@pytest.mark.parametrize("copier", [copy.deepcopy, pickle.dumps])
def test_copies_and_pickles_are_refused_until_flushed(copier):
    model, opt, context, clean = stepped()
    for thing in (model, opt):
        with pytest.raises(RuntimeError, match=r"two_pass: expected flush\(\) before"):
            copier(thing)
    opt.flush()
    copier((model, opt))
    copied, _ = copy.deepcopy((model, opt))
    opt.step(lambda: loss_of(model, *batch()))
    held = weights(model)
    assert same_bits(weights(copied), clean)
    copied.state_dict()  # its hooks do nothing to the original
    assert same_bits(weights(model), held)
    context.__exit__(None, None, None)


def leave_by_exception(context, model, opt):
    with pytest.raises(KeyError), context:
        raise KeyError


def leave_by_interrupt(context, model, opt):
    with pytest.raises(KeyboardInterrupt), context:
        os.kill(os.getpid(), signal.SIGINT)


def leave_by_close(context, model, opt):
    def training():
        with context:
            yield

    run = training()
    next(run)
    run.close()


@pytest.mark.parametrize("leave", [leave_by_exception, leave_by_interrupt, leave_by_close])
def test_leaving_flushes(leave):
    hooks = len(registry._global_forward_pre_hooks)

    class Entered:  # the context of stepped(), which is open already
        def __enter__(self):
            return None

        def __exit__(self, *exception):
            return context.__exit__(*exception)

    model, opt, context, clean = stepped()
    leave(Entered(), model, opt)
    assert same_bits(weights(model), clean)
    assert len(registry._global_forward_pre_hooks) == hooks
    assert not any(m._state_dict_pre_hooks or m._load_state_dict_pre_hooks for m in model.modules())
    opt.step(lambda: loss_of(model, *batch()))  # three passes again
    after = weights(model)
    opt.flush()
    assert same_bits(weights(model), after)


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_closure_that_raises_restores(call, error):
    model, opt, context, clean = stepped(torch.float32)
    calls = []

    def closure():
        calls.append(None)
        if len(calls) == call:
            raise error
        return loss_of(model, *batch())

    with pytest.raises(error):
        opt.step(closure)
    for p, value in zip(model.parameters(), clean, strict=True):
        assert (p - value).abs().max() <= 8 * 2**-24
    assert opt.step_count == 1
    held = weights(model)
    opt.flush()
    assert same_bits(weights(model), held)
    opt.step(closure)
    context.__exit__(None, None, None)
    assert opt.step_count == 2


def test_kernel_that_fails_in_the_update_leaves_nothing_pending():
    a, b = nn.Parameter(torch.ones(50)), nn.Parameter(torch.ones(50, dtype=torch.float16))
    opt, calls = ZOSGD([a, b], lr=0.0, eps=0.5, restore="inplace"), []

    def failing(params, seeds, *args):
        calls.append(params[0].dtype)
        # What updates the second bucket (two directions) fails however often it is tried; moves do not.
        if params[0].dtype is torch.float16 and len(seeds) > 1:
            raise MemoryError

    with opt.two_pass(nn.ParameterList([a, b])):
        opt.step(lambda: a.sum() + b.float().sum())
        with watched("combine_", failing), pytest.raises(MemoryError):
            opt.step(lambda: a.sum() + b.float().sum())
        assert (a - 1).abs().max() < 1e-5
        assert (b.float() - 1).abs().max() < 2e-2
        assert opt.step_count == 1
    opt.step(lambda: a.sum() + b.float().sum())  # finishes that update in the ordinary form, and takes one
    assert opt.step_count == 3
    assert (a - 1).abs().max() < 1e-5
    assert (b.float() - 1).abs().max() < 2e-2
