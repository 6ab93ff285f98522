"""restore="exact": what a forward must not do, weights that torch functions do not see, hooks and
contexts.
"""

import copy
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zosgd_cases import weights

from zokernels.optim import ZOSGD
from zokernels.step.probes.functions import HiddenParameters

# --- what a forward must not do ---


def _data(p):
    p.data = torch.zeros(4)


def _item(p):
    p[1] = 5.0


def _operator(p):
    p += 1


def _through_embedding(p):
    F.embedding(torch.tensor([0]), p.view(2, 2), max_norm=0.1)


WRITES = {
    "add_": lambda p: p.add_(1), "copy_": lambda p: p.copy_(torch.zeros(4)), "out": lambda p: torch.add(p, 1,
    out=p),
    "data": _data, "setitem": _item, "iadd": _operator, "view": lambda p: p.view(2, 2).mul_(2),
    "init": nn.init.zeros_,
    "data.view": lambda p: p.data.mul_(2), "slice": lambda p: p[1:].zero_(),
    "foreach": lambda p: torch._foreach_add_([p], 1), "out of a view": lambda p: torch.add(p[:2], 1,
    out=p[2:]),
}  # fmt: skip


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_to_parameters_are_refused(write):
    p = nn.Parameter(torch.arange(4.0))
    opt = ZOSGD([p], lr=0.1)

    def closure():
        write(p)
        return p.sum()

    with pytest.raises(RuntimeError, match="does not write to its parameters"):
        opt.step(closure)
    assert torch.equal(p, torch.arange(4.0))
    assert opt.step_count == 0


def test_writes_elsewhere_are_allowed():
    p, running = nn.Parameter(torch.ones(4)), torch.zeros(4)

    def closure():
        view = p[:2]
        running.add_(p.detach())
        hidden = (view * 1).relu_()
        hidden += 1
        return hidden.sum() + p.sum()

    ZOSGD([p], lr=0.1).step(closure)
    assert running.abs().sum() > 0


# --- weights that torch functions do not see ---


class Hidden(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.inner(x))


@pytest.mark.parametrize("hide", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(1, 3))])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused(hide):
    inner = nn.Linear(3, 3)
    model = Hidden(hide(inner))
    opt = ZOSGD([*inner.parameters(), *model.head.parameters()], lr=0.1)
    before = weights(model)
    with pytest.raises(HiddenParameters, match="TorchScript module 'Linear'; use restore='inplace'"):
        opt.step(lambda: model(torch.ones(1, 3)).sum())
    assert all(map(torch.equal, weights(model), before))
    inplace = ZOSGD([*inner.parameters(), *model.head.parameters()], lr=0.1, restore="inplace")
    inplace.step(lambda: model(torch.ones(1, 3)).sum())
    assert inplace.last_losses[0] != inplace.last_losses[1]
    frozen = ZOSGD(model.head.parameters(), lr=0.1)  # TorchScript without managed weights is fine
    frozen.step(lambda: model(torch.ones(1, 3)).sum())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wholly_and_partly_hidden_parameters_are_told():
    @torch.jit.script
    def hidden(x, w):
        return x @ w

    w, b = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.zeros(3))
    with pytest.raises(HiddenParameters, match="got none"):
        ZOSGD([w], lr=0.1).step(lambda: hidden(torch.ones(1, 3), w).sum())
    assert torch.equal(w, torch.ones(3, 3))
    opt = ZOSGD([("w", w), ("b", b)], lr=0.0)
    with pytest.warns(UserWarning, match=r"1 of 2 parameters .*\('w'\).*restore='inplace'"):
        opt.step(lambda: (hidden(torch.ones(1, 3), w) + b).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        opt.step(lambda: (hidden(torch.ones(1, 3), w) + b).sum())


def test_higher_order_operators_with_parameters_as_operands_are_refused():
    p = nn.Parameter(torch.ones(3))
    operator = torch.ops.higher_order.cond
    with pytest.raises(HiddenParameters, match="higher-order operator 'cond'"):
        ZOSGD([p], lr=0.1).step(
            lambda: operator(True, lambda x: x + 1, lambda x: x - 1, (p,)).sum() + p.sum()
        )


@pytest.mark.parametrize("how", ["module", "in place", "function", "fullgraph"])
@pytest.mark.parametrize("first", ["before", "inside"])
def test_compiled_models_run_right(how, first):
    """Compiled before the step or inside it, partly or wholly: the losses are those of the plain model."""
    torch.manual_seed(0)
    plain = Hidden(nn.Linear(3, 3))
    model = copy.deepcopy(plain)
    x = torch.linspace(-1, 1, 6).view(2, 3)
    if how == "module":
        run = Hidden(torch.compile(model.inner, backend="eager"))
        run.head = model.head
    elif how == "in place":
        model.compile(backend="eager")
        run = model
    elif how == "fullgraph":
        run = torch.compile(model, backend="eager", fullgraph=True)
    else:
        run = torch.compile(lambda x: model(x), backend="eager")
    if first == "before":
        with torch.no_grad():
            run(x)
    reference = ZOSGD(plain.named_parameters(), lr=0.1)
    for restore in ("exact", "inplace"):
        opt = ZOSGD(model.named_parameters(), lr=0.0, restore=restore)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opt.step(lambda: run(x).square().mean())
        if restore == "exact":
            reference.step(lambda: plain(x).square().mean())
            assert torch.equal(opt.last_projected_gradient, reference.last_projected_gradient)
        assert opt.last_losses[0] != opt.last_losses[1]


# --- surroundings ---


def test_no_hook_or_mode_is_left_behind():
    from torch.nn.modules import module as registry

    p = nn.Parameter(torch.ones(3))
    opt = ZOSGD([p], lr=0.1)
    hooks = dict(registry._global_forward_pre_hooks)

    def broken():
        p.sum()
        raise KeyError("broken")

    with pytest.raises(KeyError):
        opt.step(broken)
    opt.step(lambda: p.sum())
    assert registry._global_forward_pre_hooks == hooks
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("context", [torch.inference_mode, torch.enable_grad, lambda: torch.device("cpu")])
@pytest.mark.parametrize("outside", [True, False])
def test_other_contexts_compose(context, outside):
    """Inference mode, grad mode and torch.device, around the step or within the closure; then a plain
    step again.
    """
    model, plain = nn.Linear(4, 2), nn.Linear(4, 2)
    plain.load_state_dict(model.state_dict())
    opt, reference = (ZOSGD(m.named_parameters(), lr=0.1, dist="rademacher") for m in (model, plain))
    loss = lambda m: m(torch.ones(3, 4)).square().sum()

    def inner():
        with context():
            return loss(model)

    if outside:
        with context():
            opt.step(lambda: loss(model))
    else:
        opt.step(inner)
    opt.step(lambda: loss(model))
    for _ in range(2):
        reference.step(lambda: loss(plain))
    assert all(map(torch.equal, weights(model), weights(plain)))


def test_works_in_a_thread():
    p, errors = nn.Parameter(torch.ones(3)), []

    def work():
        try:
            for restore in ("exact", "inplace"):
                ZOSGD([p], lr=0.1, restore=restore).step(lambda: p.sum())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
    assert not torch.equal(p, torch.ones(3))
