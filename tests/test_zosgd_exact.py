"""The exact probe: every forward sees theta +- eps z, no weight moves, scratch stays small, hidden
weights are told.
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import watched
from torch import nn
from torch.utils.checkpoint import checkpoint

import zokernels as zk
from zokernels.optim import ZOSGD
from zokernels.step.scratch import arena_numel

EPS = 0.02


class Language(nn.Module):
    """Tied embedding used functionally, attention, norm, dropout, weights as slices, chunks, transposes
    and views.
    """

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
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda: torch.ones(2, 3,
    8)),
    "lstm": (lambda: nn.LSTM(5, 4, num_layers=2), lambda: torch.linspace(-1, 1, 30).view(3, 2, 5)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.PReLU()),
             lambda: torch.linspace(-1, 1, 150).view(2, 3, 5, 5)),
}  # fmt: skip


def scalar(out):
    return (out[0] if isinstance(out, tuple) else out).float().square().mean()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.fixture
def unfused_attention():
    """A step does not let attention take its fused path, whose last bits are others on some machines."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_forwards_see_perturbed_weights(name, train, unfused_attention):
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
    """With scratch=0 nothing is joined to blocks."""
    model = nn.Sequential(
        nn.Embedding(50, 16), nn.Linear(16, 128), nn.Tanh(), nn.Linear(128, 4), nn.LayerNorm(4)
    )
    opt, sizes = ZOSGD(model.named_parameters(), lr=0.1, scratch=0), []
    with watched("combine", lambda *args: sizes.append(opt.scratch.nbytes())):
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

    opt = ZOSGD([a, b], lr=0.0, eps=EPS, scratch=0)
    opt.step(closure)
    assert all(x != y for x, y in addresses)
    opt.step(lambda: a.sum() + b.sum())
    # All the views are gone.  One arena stays, and that of ``a``, which is kept because it came again after
    # ``b``.
    assert opt.scratch.nbytes() == 2 * 256


def test_metadata_materialises_nothing():
    p, q, calls = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(2)), []

    def closure():
        assert (p.shape, p.size(0), p.dim(), p.ndim, len(p), p.numel()) == ((4, 6), 4, 2, 2, 4, 24)
        assert (p.dtype, p.device.type, p.requires_grad, p.is_leaf, p.grad) == (
            torch.float32,
            "cpu",
            True,
            True,
            None,
        )
        assert (p.is_cuda, p.is_floating_point(), p.stride(), p.is_contiguous()) == (
            False,
            True,
            (6, 1),
            True,
        )
        assert torch.empty_like(p).shape == p.shape
        assert isinstance(p, nn.Parameter)
        assert not calls
        return q.sum()

    opt = ZOSGD([p, q], lr=0.1)
    told = pytest.warns(UserWarning, match=r"1 of 2 parameters .*\(params\[0\]\)")
    with watched("combine", lambda *args: calls.append(args)), told:
        opt.step(lambda: (calls.clear(), closure())[1])
    assert calls  # of q
