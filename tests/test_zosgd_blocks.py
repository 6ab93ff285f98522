"""restore="exact": every use of a weight sees the point, in every step, whatever block the weight is in.

The oracle is a model of its own, with theta + c z in its weights: z is that of ``zokernels.noise``, and the
sum is made by the formula.  It runs as any model does."""

import copy
import gc
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import watched
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint
from zosgd_cases import combined

import zokernels as zk
from zokernels.optim import ZOSGD
from zokernels.step.probes.functions import HiddenParameters
from zokernels.step.probes.guard import Guard, held
from zokernels.step.scratch import arena_numel

EPS, STEPS = 0.01, 5
#: Bytes of scratch: all parameters of the small models here are one block, or nothing is joined.
SCRATCH = pytest.mark.parametrize("scratch", [None, 0, 700], ids=["whole", "single", "some"])


def at_point(model, step, sign, seed=0):
    """A copy of the model at theta + sign * EPS * z, made by the formula."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in copied.named_parameters():
            if not p.requires_grad:
                continue
            z = zk.noise(p.shape, seed=zk.derive_seed(seed, step, 0), stream=zk.stream_of(name))
            p.copy_(combined(p.detach(), z, sign * EPS))
    return copied


def check_steps(model, loss, oracle=None, *, steps=STEPS, lr=1e-3, exact=True, before=None, **options):
    """Takes steps on ``loss(model, t)``; each loss is that of ``oracle`` on copies at the points, bit for
    bit.
    """
    oracle = oracle or loss
    opt = ZOSGD(model.named_parameters(), lr=lr, eps=EPS, **options)
    same = torch.equal if exact else lambda a, b: torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    for t in range(steps):
        if before:
            before(t)
        expected = []
        for sign in (1, -1):
            with torch.no_grad():
                torch.manual_seed(t)
                expected.append(oracle(at_point(model, t, sign), t).detach())
        memory = [p.detach() for p in model.parameters()]
        theta = [m.clone() for m in memory]

        def closure(t=t, memory=memory, theta=theta):
            assert all(map(torch.equal, memory, theta))  # nothing is written to a weight
            return loss(model, t)

        torch.manual_seed(t)
        opt.step(closure)
        assert same(opt.last_losses[0], expected[0])
        assert same(opt.last_losses[1], expected[1])
        assert not torch.equal(expected[0], expected[1])
        check_nothing_is_left(model, memory)
    return opt


def check_nothing_is_left(model, memory):
    """Parameters have their own class and memory, and modules nothing that they did not have."""
    assert not held
    for p, own in zip(model.parameters(), memory, strict=True):
        assert type(p) is nn.Parameter
        assert p.data_ptr() == own.data_ptr()
    assert not any("forward" in vars(m) or m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert "__call__" not in vars(torch.jit.ScriptModule)


class Mixed(nn.Module):
    """A tied embedding, a layer that is called twice, a norm, and a bare parameter."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.twice = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(8) + 0.1 * torch.randn(8))
        self.wide = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for _ in range(2):
            x = x + torch.tanh(self.twice(self.norm(x))) * self.scale
        return self.head(x + self.wide(x))


def tokens():
    return torch.arange(15).view(3, 5) % 11


def language_loss(model, t=0):
    return F.cross_entropy(model(tokens()).flatten(0, 1), (tokens().flatten() + 1) % 11)


def mixed():
    torch.manual_seed(0)
    return Mixed()


@SCRATCH
@pytest.mark.parametrize("seed", [0, 5])
def test_every_step_sees_its_points(scratch, seed):
    model = mixed()
    opt = ZOSGD(model.named_parameters(), lr=1e-3, eps=EPS, seed=seed, scratch=scratch)
    for t in range(40):  # the 33rd looks at every function again
        expected = [language_loss(at_point(model, t, sign, seed)).detach() for sign in (1, -1)]
        opt.step(lambda: language_loss(model))
        assert torch.equal(torch.stack(opt.last_losses), torch.stack(expected))


# --- uses that no module makes, from some step on alone ---


def late(t, plain, use):
    """A closure that makes a use of its own from the fourth step on."""
    return plain if t < 3 else use


@SCRATCH
def test_a_parameter_list_captured_before(scratch):
    model = mixed()
    captured = list(model.parameters())
    penalty = lambda params: sum(p.square().sum() for p in params) * 0.1
    check_steps(
        model,
        lambda m, t: language_loss(m) + late(t, 0.0, penalty(captured)),
        lambda m, t: language_loss(m) + late(t, 0.0, penalty(list(m.parameters()))),
        scratch=scratch,
    )


@SCRATCH
def test_a_captured_weight_in_a_function(scratch):
    model = mixed()
    weight, bias = model.twice.weight, model.twice.bias
    x = torch.linspace(-1, 1, 16).view(2, 8)
    check_steps(
        model,
        lambda m, t: language_loss(m) + late(t, 0.0, F.linear(x, weight, bias).square().mean()),
        lambda m, t: (
            language_loss(m) + late(t, 0.0, F.linear(x, m.twice.weight, m.twice.bias).square().mean())
        ),
        scratch=scratch,
    )


USES = {
    "parameters_to_vector": lambda m: torch.nn.utils.parameters_to_vector(m.parameters()).square().mean(),
    "functional_call": lambda m: functional_call(m, m.state_dict(), (tokens(),),
    tie_weights=False).square().mean(),
    "named parameters": lambda m: functional_call(m, dict(m.named_parameters()), (tokens(),)).square().mean(),
    "deepcopy": lambda m: copy.deepcopy(m)(tokens()).square().mean(),
    "vmap": lambda m: vmap(m)(tokens()).square().mean(),
    "grad": lambda m: vmap(grad(lambda x: m.wide(x).sum()))(torch.ones(3, 8)).square().mean(),
    "jvp": lambda m: jvp(m.wide, (torch.ones(3, 8),), (torch.ones(3, 8),))[1].square().mean(),
    "jacrev": lambda m: jacrev(m.wide)(torch.ones(8)).square().mean(),
    "grad of parameters": lambda m: sum(
        g.square().sum()
        for g in grad(lambda p: functional_call(m, p, (tokens(),
        )).square().mean())(dict(m.named_parameters())).values()
    ),
    "checkpoint": lambda m: checkpoint(m, tokens(), use_reentrant=False).square().mean(),
    "item": lambda m: torch.tensor(sum(p.sum().item() for p in m.parameters())),
    "numpy": lambda m: torch.as_tensor(sum(p.detach().numpy().sum() for p in m.parameters())),
    "slices": lambda m: sum(p[..., 1:].sum() + p.data[..., 0].sum() for p in m.parameters()),
    "views that are kept": lambda m: sum(v.sum() * i for i,
    v in enumerate([p.view(-1)[1:] for p in m.parameters()])),
    "foreach": lambda m: sum(n * (i + 1) for i, n in enumerate(torch._foreach_norm(list(m.parameters())))),
    "pickle": lambda m: sum(t.sum() for t in saved(m).values()),
}  # fmt: skip


def saved(m):
    import io

    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    return torch.load(io.BytesIO(file.getvalue()))


@SCRATCH
@pytest.mark.parametrize("alone", [False, True], ids=["late", "alone"])
@pytest.mark.parametrize("use", USES)
def test_uses_without_a_visit(use, alone, scratch):
    """Alone, and besides an ordinary forward from the fourth step on."""
    of = USES[use]
    loss = (lambda m, t: of(m)) if alone else (lambda m, t: language_loss(m) + late(t, 0.0, of(m)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*were taken by no torch function.*")  # of what is not in ``wide``
        check_steps(mixed(), loss, lr=1e-5, scratch=scratch)


@SCRATCH
def test_a_backward_inside_the_forward(scratch):
    """The graph holds what the forward saw, also of weights whose scratch others have got by then."""
    model = nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))

    def loss(m, t):
        x = torch.linspace(-1, 1, 8).view(2, 4).requires_grad_()
        m(x.detach())  # without a graph at first, so that blocks are open
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(m(x).sum(), x)
        return slope.square().mean()

    check_steps(model, loss, scratch=scratch)
    assert all(p.grad is None for p in model.parameters())


@SCRATCH
@pytest.mark.parametrize("leaf", [False, True])
def test_a_backward_after_the_step(leaf, scratch):
    """It gives the gradient at the point, or it is an error, where the graph has the parameter itself."""
    model, graphs = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)), []

    def run(m):
        x = torch.ones(2, 4, requires_grad=True)
        out = m(x)
        return (out * m[2].weight).sum() if leaf else out.sum(), x

    def closure():
        with torch.enable_grad():
            graphs.append(run(model))
        return graphs[-1][0].detach()

    opt = ZOSGD(model.named_parameters(), lr=0.0, eps=EPS, scratch=scratch)
    for _ in range(3):
        opt.step(closure)

    def gradient(loss, x):
        try:
            return torch.autograd.grad(loss, x)[0]
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            return None

    first, second = (gradient(*graph) for graph in graphs[-2:])
    at_first, at_second = (gradient(*run(at_point(model, 2, sign))) for sign in (1, -1))
    assert torch.equal(second, at_second)  # the first graph had the scratch of what was open
    if scratch is None and leaf:
        assert first is None
    else:
        assert (scratch is None and first is None) or torch.equal(first, at_first)


# --- modules of all kinds ---


class Experts(nn.Module):
    """A mixture in which each step uses another expert, and the weights of some are one tensor."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(6, 4)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.stacked = nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, x, which):
        x = self.experts[which](x) * self.router(x)[:, which : which + 1]
        return sum(torch.tanh(x @ self.stacked[e]) for e in range(4))


@SCRATCH
def test_experts_that_are_not_used(scratch):
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(3, 6)
    with pytest.warns(UserWarning, match="6 of 11 parameters were taken by no torch function"):
        check_steps(model, lambda m, t: m(x, t % 4).square().mean(), scratch=scratch, steps=12)


@SCRATCH
@pytest.mark.parametrize("kind", ["attention", "encoder", "lstm", "parametrized", "lora"])
def test_kinds_of_modules(kind, scratch):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)
    if kind == "attention":
        model, run = nn.MultiheadAttention(8, 2, batch_first=True), lambda m: m(x, x, x)[0]
    elif kind == "encoder":
        model, run = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), lambda m: m(x)
    elif kind == "lstm":
        model, run = nn.LSTM(8, 8, num_layers=2, batch_first=True), lambda m: m(x)[0]
    elif kind == "parametrized":
        model = nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 2)
        )
        run = lambda m: m(x)
    else:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)), config)
        run = lambda m: m(x)
    check_steps(model, lambda m, t: run(m).square().mean(), scratch=scratch)


@SCRATCH
@pytest.mark.parametrize("training", [False, True])
def test_attention_takes_one_path_in_all_forwards(training, scratch):
    """Its fused path has other values where something is padded: what is open must not decide on it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 2)).train(training)
    x, mask = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])

    def loss(m, t):
        return m[1](m[0](x), src_key_padding_mask=mask).square().mean()

    def oracle(m, t):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return loss(m, t)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    check_steps(model, loss, oracle, scratch=scratch)
    assert torch.backends.mha.get_fastpath_enabled()


def test_hooks_run_in_their_order_and_see_the_point():
    model, seen = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)), []
    x = torch.ones(2, 3)

    def hook(which):
        return lambda module, *args: seen.append((which, module.weight.detach().clone()))

    handles = [model[0].register_forward_pre_hook(hook("pre")), model[1].register_forward_hook(hook("post"))]
    opt = ZOSGD(model.named_parameters(), lr=1e-3, eps=EPS)
    for t in range(4):
        points = [at_point(model, t, sign) for sign in (1, -1)]
        seen.clear()
        opt.step(lambda: model(x).square().sum())
        assert [which for which, _ in seen] == ["pre", "post"] * 2
        for (_, weight), (point, layer) in zip(seen, [(p, i) for p in points for i in (0, 1)], strict=True):
            assert torch.equal(weight, point[layer].weight)
    for handle in handles:
        handle.remove()


# --- how often, and how much ---


def perturbations(opt, closure):
    """The number of elements that each call of combine makes in a step."""
    calls = []
    with watched("combine", lambda out, *args: calls.append(sum(t.numel() for t in out))):
        opt.step(closure)
    return calls


def test_one_call_perturbs_a_block():
    model = mixed()
    count = sum(p.numel() for p in model.parameters())
    opt = ZOSGD(model.named_parameters(), lr=1e-3)
    opt.step(lambda: language_loss(model))
    assert perturbations(opt, lambda: language_loss(model)) == [count, count]


@SCRATCH
def test_a_weight_that_is_used_often_is_perturbed_once(scratch):
    """A recurrent cell over 20 steps, a tied head, experts of one tensor: each weight once for each
    forward.
    """
    torch.manual_seed(0)
    cell, embedding = nn.LSTMCell(8, 8), nn.Embedding(30, 8)
    stacked = nn.Parameter(torch.randn(5, 8, 8))
    params = [*cell.parameters(), embedding.weight, stacked]

    def closure():
        state = None
        for i in range(20):
            state = cell(embedding(torch.tensor([i])), state)
        x = sum(state[0] @ stacked[e] for e in range(5))
        return F.cross_entropy(x @ embedding.weight.t(), torch.tensor([3]))

    opt = ZOSGD(params, lr=1e-3, scratch=scratch)
    opt.step(closure)
    opt.step(closure)
    once = 2 * sum(p.numel() for p in params)
    assert sum(perturbations(opt, closure)) == (once if scratch is None else pytest.approx(once, rel=1.5))
    if scratch is None:
        assert sum(perturbations(ZOSGD(params, lr=1e-3), closure)) == once


class StackedExperts(nn.Module):
    """13 experts whose weights are two tensors, of which a forward takes one expert after the other."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(6, 13)
        self.up, self.down = nn.Parameter(torch.randn(13, 8, 6)), nn.Parameter(torch.randn(13, 6, 8))

    def forward(self, x):
        share, out = self.router(x).softmax(-1), torch.zeros_like(x)
        for e in range(13):
            out = out + torch.relu(x @ self.up[e].t()) @ self.down[e].t() * share[:, e : e + 1]
        return out


@pytest.mark.parametrize("restore", ["exact", "inplace"])
def test_experts_that_are_indexed_one_by_one_are_drawn_once_for_each_point(restore):
    """Two points and the update are three launches over all weights, whatever the number of experts."""
    torch.manual_seed(0)
    model, x, calls = nn.Sequential(StackedExperts(), StackedExperts()), torch.randn(3, 6), []
    opt = ZOSGD(model.named_parameters(), lr=1e-3, restore=restore)
    opt.step(lambda: model(x).square().mean())
    count = lambda out, *args: calls.append(sum(t.numel() for t in out))
    with watched("combine", count), watched("combine_", count):
        opt.step(lambda: model(x).square().mean())
    assert calls == [sum(p.numel() for p in model.parameters())] * 3


def test_an_expert_that_is_rarely_used_leaves_its_block():
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(3, 6)
    opt = ZOSGD(model.named_parameters(), lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step(lambda: model(x, 0).square().mean())  # so that one expert is learned together with the rest
        for _ in range(200):
            opt.step(lambda: model(x, 1).square().mean())
    calls = perturbations(opt, lambda: model(x, 1).square().mean())
    used = [*model.router.parameters(), *model.experts[1].parameters(), model.stacked]
    assert sum(calls) == 2 * sum(p.numel() for p in used)


def test_scratch_is_no_larger_than_a_block():
    """Layers of 64 KiB with at most 200 KB of scratch: three of them at a time, and nothing else."""
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(12)))
    layer = 4 * arena_numel(list(model[0].parameters()))
    opt, most = ZOSGD(model.named_parameters(), lr=1e-3, scratch=200_000), []
    for _ in range(3):
        with watched("combine", lambda *args: most.append(opt.scratch.nbytes())):
            opt.step(lambda: model(torch.ones(1, 128)).square().mean())
    assert 2 * layer < max(most) <= 200_000
    # The first forward makes each layer's copy by itself; the others, three at a time.
    assert len(most) == 12 + 5 * 4


def test_scratch_is_checked():
    with pytest.raises(ValueError, match="ZOSGD: scratch: expected an integer >= 0, got -1"):
        ZOSGD([nn.Parameter(torch.ones(2))], lr=0.1, scratch=-1)


# --- what is not allowed, and what ends a step ---


@pytest.mark.parametrize("scratch", [None, 0])
@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("write", ["add_", "data", "copy of all", "view", "through data", "to data[0]"])
def test_writes_are_refused_in_every_step(write, step, scratch):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    before = [p.detach().clone() for p in model.parameters()]
    opt = ZOSGD(model.named_parameters(), lr=0.0, scratch=scratch)
    writes = {
        "add_": lambda: model[0].weight.add_(1),
        "data": lambda: setattr(model[0].weight, "data", torch.zeros(3, 3)),
        "copy of all": lambda: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}),
        "view": lambda: model[0].weight.view(9)[2:].zero_(),
        "through data": lambda: model[0].weight.data.clamp_(max=-1),
        "to data[0]": lambda: model[0].weight.data.__setitem__(0, 5.0),
    }

    def closure(t):
        loss = model(torch.ones(1, 3)).sum()
        if t == step:
            writes[write]()
        return loss

    for t in range(step):
        opt.step(lambda t=t: closure(t))
    with pytest.raises(RuntimeError, match="does not write to its parameters"):
        opt.step(lambda: closure(step))
    assert opt.step_count == step
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("scratch", [None, 0])
def test_data_of_tensors_that_are_no_parameters(scratch):
    """A write to ``data`` is refused, too, in a step in which nothing looks at every function."""
    weight, x = torch.linspace(-1, 1, 9).view(3, 3).requires_grad_(), torch.ones(2, 3)
    before, writes = weight.detach().clone(), []

    def closure():
        loss = F.linear(x, weight).square().sum()
        for write in writes:
            write()
        return loss + weight.data.sum()

    opt = ZOSGD([weight], lr=0.0, eps=EPS, scratch=scratch)
    for _ in range(2):
        opt.step(closure)
    assert not torch.equal(*opt.last_losses)
    writes.append(lambda: weight.data.add_(1))
    with pytest.raises(RuntimeError, match="does not write to its parameters"):
        opt.step(closure)
    assert type(weight) is torch.Tensor
    assert torch.equal(weight, before)


def test_data_outside_of_steps_is_torchs_own():
    """It counts versions by itself, and takes what torch's own does."""
    model, other = nn.Linear(3, 1), nn.Linear(3, 1)
    ZOSGD(model.named_parameters(), lr=0.0).step(lambda: other.weight.data.add_(1).sum() + model.weight.sum())
    for p in (model.weight, other.weight):
        version = p._version
        p.data.add_(1)
        assert p._version == version
        p.data = torch.zeros(2)
        assert p.shape == (2,)
    assert nn.Parameter.data is torch.Tensor.data


@SCRATCH
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_nothing(error, scratch):
    model = mixed()
    memory = [p.detach() for p in model.parameters()]
    theta = [m.clone() for m in memory]
    opt = ZOSGD(model.named_parameters(), lr=0.0, scratch=scratch)
    for when in range(4):
        calls = iter(range(10))

        def closure(calls=calls, when=when):
            if next(calls) == when:
                model.embedding(tokens())
                raise error
            return language_loss(model)

        with pytest.raises(error) if when < 2 else warnings.catch_warnings():
            opt.step(closure)
        check_nothing_is_left(model, memory)
        assert all(map(torch.equal, memory, theta))


def test_a_copy_of_a_guarded_parameter_is_an_ordinary_one():
    model, copies = nn.Linear(3, 1), []

    def closure():
        copies.append(copy.deepcopy(model))
        copies.append(type(model.weight)(torch.ones(3)))
        return model(torch.ones(1, 3)).sum() + (copies[-1] * 1).sum()

    ZOSGD(model.named_parameters(), lr=0.1).step(closure)
    gc.collect()
    assert not [p for c in copies[::2] for p in c.parameters() if isinstance(p, Guard)]
    assert not isinstance(copies[1], Guard)


def test_another_step_in_the_closure():
    """On other parameters it is a step like others; on the same ones, an error."""
    outer, inner = nn.Linear(3, 3), nn.Linear(3, 3)
    x = torch.linspace(-1, 1, 6).view(2, 3)
    first, second = (ZOSGD(m.named_parameters(), lr=0.0, eps=EPS) for m in (outer, inner))
    for t in range(3):
        expected = [inner(at_point(outer, t, sign)(x)).square().mean() for sign in (1, -1)]

        def closure():
            second.step(lambda: inner(outer(x)).square().mean())
            return inner(outer(x)).square().mean()

        first.step(closure)
        assert torch.equal(torch.stack(first.last_losses), torch.stack(expected))
    with pytest.raises(RuntimeError, match="one step at a time for a parameter"):
        first.step(
            lambda: second.step(lambda: ZOSGD(outer.parameters(), lr=0.1).step(lambda: outer(x).sum()))
        )


def take_steps(model):
    opt = ZOSGD(model.named_parameters(), lr=1e-2)
    for _ in range(12):
        opt.step(lambda: language_loss(model))


def test_two_threads_with_models_of_their_own():
    """Each takes the steps that it takes alone."""
    models, errors = [mixed() for _ in range(2)], []
    reference = mixed()
    take_steps(reference)

    def work(model):
        try:
            take_steps(model)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(m,)) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for model in models:
        assert all(map(torch.equal, model.parameters(), reference.parameters()))


def test_one_model_in_two_threads_is_an_error():
    model, inside, done = nn.Linear(3, 1), threading.Event(), threading.Event()

    def slow():
        inside.set()
        assert done.wait(60)
        return model(torch.ones(1, 3)).sum()

    thread = threading.Thread(target=lambda: ZOSGD(model.named_parameters(), lr=0.0).step(slow))
    thread.start()
    assert inside.wait(60)
    try:
        with pytest.raises(RuntimeError, match="one step at a time for a parameter"):
            ZOSGD(model.named_parameters(), lr=0.0).step(lambda: model(torch.ones(1, 3)).sum())
    finally:
        done.set()
        thread.join()
    assert type(model.weight) is nn.Parameter


def test_a_model_without_a_use_is_told_later_too():
    """In the 33rd step all functions are looked at again."""
    model, other = nn.Linear(3, 1), nn.Linear(3, 1)
    opt = ZOSGD(model.named_parameters(), lr=0.0)
    for _ in range(32):
        opt.step(lambda: model(torch.ones(1, 3)).sum())
    with pytest.raises(HiddenParameters, match="got none"):
        opt.step(lambda: other(torch.ones(1, 3)).sum())
    assert opt.step_count == 32
