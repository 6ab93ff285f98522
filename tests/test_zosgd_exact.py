"""The exact probe: every forward sees theta +- eps z, no weight moves, scratch stays small, hidden weights are told."""

import copy
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import zokernels as zk
from zokernels.optim import ZOSGD
from zokernels.optim.scratch import ScratchPool, arena_numel
from zokernels.optim.substitute import HiddenParameters

EPS = 0.02


class Language(nn.Module):
    """Tied embedding used functionally, attention, norm, dropout, weights as slices, chunks, transposes and views."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.1)
        self.gates = nn.Parameter(torch.randn(16, 8))
        self.scales = nn.ParameterDict({"a": nn.Parameter(torch.ones(8)), "b": nn.Parameter(torch.ones(8))})

    def forward(self, tokens):
        x = self.wte(tokens)
        x = x + self.attention(self.norm(x), self.norm(x), self.norm(x))[0]
        up, down = self.gates.chunk(2)
        x = self.drop(torch.tanh(x @ up.t())) @ down.data.view(8, 8) + self.gates[3]
        x = x * torch.stack(list(self.scales.values())).prod(0)
        return F.linear(x, self.wte.weight)


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


class Odd(nn.Module):
    """Other ways in which weights reach a function."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))
        self.b = nn.Parameter(torch.randn(6))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))

    def forward(self, x):
        x = torch.addmm(input=self.b, mat1=x, mat2=self.w)
        x = Custom.apply(x, self.w)
        x = checkpoint(lambda h: torch.ops.aten.mm(h, self.w), x, use_reentrant=False)
        x = torch.cat([x, self.b[None]])
        x = x + torch.from_numpy(self.b.detach().numpy()) + self.b.mean().item()
        return self.normed(torch.einsum("ij,jk->ik", x, self.w))


def tokens():
    return torch.arange(20).view(4, 5) % 11


MODELS = {
    "language": (Language, tokens),
    "odd": (Odd, lambda: torch.linspace(-1, 1, 24).view(4, 6)),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda: torch.ones(2, 3, 8)),
    "lstm": (lambda: nn.LSTM(5, 4, num_layers=2), lambda: torch.linspace(-1, 1, 30).view(3, 2, 5)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.PReLU()),
             lambda: torch.linspace(-1, 1, 150).view(2, 3, 5, 5)),
}  # fmt: skip


def scalar(out):
    return (out[0] if isinstance(out, tuple) else out).float().square().mean()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_forwards_see_perturbed_weights(name, train):
    """The losses are bit for bit those of copies of the model that are perturbed in place."""
    build, data = MODELS[name]
    torch.manual_seed(0)
    model, x = build().train(train), data()
    with torch.no_grad():
        model(x)  # fills caches and running statistics
    expected = []
    for sign in (1, -1):
        copied = copy.deepcopy(model)
        for n, p in copied.named_parameters():
            zk.combine_(p, zk.derive_seed(0, 0, 0), sign * EPS, streams=zk.stream_of(n))
        torch.manual_seed(3)
        with torch.no_grad():
            expected.append(scalar(copied(x)))
    before = weights(model)
    opt = ZOSGD(model.named_parameters(), lr=0.0, eps=EPS)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no parameter goes unseen
        opt.step(lambda: scalar(model(x)))
    assert expected[0] != expected[1]
    assert torch.equal(opt.last_losses[0], expected[0])
    assert torch.equal(opt.last_losses[1], expected[1])
    assert all(map(torch.equal, weights(model), before))


def test_hugging_face_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    x = torch.arange(12).view(2, 6)
    expected = copy.deepcopy(model)
    for n, p in expected.named_parameters():
        zk.combine_(p, zk.derive_seed(0, 0, 0), EPS, streams=zk.stream_of(n))
    opt = ZOSGD(model.named_parameters(), lr=0.0, eps=EPS)
    torch.manual_seed(3)
    opt.step(lambda: model(x, labels=x).loss)
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.equal(opt.last_losses[0], expected(x, labels=x).loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_lr_zero_leaves_every_bit(dtype, as_tensor):
    """With a tensor lr the update pass runs, with coefficient 0 and stochastic rounding."""
    torch.manual_seed(0)
    model = Language().to(dtype)
    before = weights(model)
    opt = ZOSGD(model.named_parameters(), lr=torch.zeros(()) if as_tensor else 0.0, weight_decay=0.1)
    for _ in range(3):
        opt.step(lambda: scalar(model(tokens())))
        assert opt.last_losses[0] != opt.last_losses[1]
    assert all(map(torch.equal, weights(model), before))


def test_update_uses_the_noise_of_the_forward():
    """Seen in the forward: combine's output; the update moves against that very z."""
    model, seen = nn.Linear(5, 3), []
    theta = weights(model)

    def closure():
        seen.append([p.clone() for p in model.parameters()])
        return model(torch.ones(2, 5)).square().sum()

    opt = ZOSGD(model.named_parameters(), lr=0.1, eps=EPS, seed=6)
    opt.step(closure)
    seed = zk.derive_seed(6, 0, 0)
    c = (opt.last_projected_gradient.double() * -0.1).float()
    for i, (name, p) in enumerate(model.named_parameters()):
        for sign, copies in zip((1, -1), seen, strict=True):
            out = torch.empty_like(theta[i])
            zk.combine(out, theta[i], seed, sign * EPS, streams=zk.stream_of(name))
            assert torch.equal(copies[i], out)
        zk.combine_(theta[i], seed, c, streams=zk.stream_of(name))
        assert torch.equal(p, theta[i])


# --- scratch ---


def test_scratch_is_that_of_the_largest_call():
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 128), nn.Tanh(), nn.Linear(128, 4), nn.LayerNorm(4))
    opt = ZOSGD(model.named_parameters(), lr=0.1)
    sizes, like = [], ScratchPool.like

    def counted(pool, tensors):
        out = like(pool, tensors)
        sizes.append(pool.nbytes())
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScratchPool, "like", counted)
        opt.step(lambda: model(torch.arange(6)).square().mean())
    largest = max(4 * arena_numel(list(m.parameters())) for m in model if list(m.parameters()))
    assert len(sizes) == 2 * 4  # one combine a module and forward: weight and bias together
    assert max(sizes) == largest
    assert largest <= 4 * (16 * 128 + 128) + 2 * 256  # alignment is all it may add


def test_scratch_with_live_views_is_not_reused():
    a, b = nn.Parameter(torch.zeros(64)), nn.Parameter(torch.ones(64))
    addresses = []

    def closure():
        kept = [a.view(8, 8), a.detach().numpy(), a[3:], b.view(8, 8), b.data]  # five arenas at once
        copies = [torch.as_tensor(k).clone() for k in kept]
        addresses.append((a.data_ptr(), b.data_ptr()))  # addresses alone keep their memory, too
        total = (a * 1).sum() + (b * 2).sum()
        for k, before in zip(kept, copies, strict=True):
            assert torch.equal(torch.as_tensor(k), before)
        return total

    opt = ZOSGD([a, b], lr=0.0, eps=EPS)
    opt.step(closure)
    assert all(x != y for x, y in addresses)
    opt.step(lambda: a.sum() + b.sum())
    assert opt._pool.nbytes() == 256  # all the views are gone, and one arena stays


def test_metadata_materialises_nothing(monkeypatch):
    p, q = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(2))
    calls, like = [], ScratchPool.like

    def closure():
        assert (p.shape, p.size(0), p.dim(), p.ndim, len(p), p.numel()) == ((4, 6), 4, 2, 2, 4, 24)
        assert (p.dtype, p.device.type, p.requires_grad, p.is_leaf, p.grad) == (torch.float32, "cpu", True, True, None)
        assert (p.is_cuda, p.is_floating_point(), p.stride(), p.is_contiguous()) == (False, True, (6, 1), True)
        assert torch.empty_like(p).shape == p.shape
        assert isinstance(p, nn.Parameter)
        assert not calls
        return q.sum()

    monkeypatch.setattr(ScratchPool, "like", lambda pool, ts: (calls.append(ts), like(pool, ts))[1])
    opt = ZOSGD([p, q], lr=0.1)
    with pytest.warns(UserWarning, match=r"1 of 2 parameters .*\(params\[0\]\)"):
        opt.step(lambda: (calls.clear(), closure())[1])


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
    "add_": lambda p: p.add_(1), "copy_": lambda p: p.copy_(torch.zeros(4)), "out": lambda p: torch.add(p, 1, out=p),
    "data": _data, "setitem": _item, "iadd": _operator, "view": lambda p: p.view(2, 2).mul_(2), "init": nn.init.zeros_,
    "data.view": lambda p: p.data.mul_(2), "slice": lambda p: p[1:].zero_(),
    "foreach": lambda p: torch._foreach_add_([p], 1), "out of a view": lambda p: torch.add(p[:2], 1, out=p[2:]),
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


def test_higher_order_operators_are_refused():
    p = nn.Parameter(torch.ones(3))
    operator = torch.ops.higher_order.cond
    with pytest.raises(HiddenParameters, match="higher-order operator 'cond'"):
        ZOSGD([p], lr=0.1).step(
            lambda: operator(True, lambda x: x + p, lambda x: x - p, (torch.ones(3),)).sum() + p.sum()
        )


@pytest.mark.parametrize("how", ["module", "in place", "function"])
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
    else:
        run = torch.compile(lambda x: model(x), backend="eager")
    if first == "before":
        with torch.no_grad():
            run(x)
    reference = ZOSGD(plain.named_parameters(), lr=0.1)
    for restore in ("exact", "inplace"):
        opt = ZOSGD(model.named_parameters(), lr=0.0, restore=restore)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt.step(lambda: run(x).square().mean())
        if restore == "exact":
            assert any("uncompiled" in str(w.message) for w in caught) == (how != "function")
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
    """Inference mode, grad mode and torch.device, around the step or within the closure; then a plain step again."""
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
