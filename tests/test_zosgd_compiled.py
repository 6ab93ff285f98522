"""restore="exact" with torch.compile: what is compiled stays compiled, is compiled once, and sees the
points.
"""

import copy
import gc
import subprocess
import sys
import warnings

import case_process
import pytest
import torch
import torch.nn.functional as F
from helpers import watched
from test_zosgd_blocks import EPS, at_point, check_nothing_is_left, language_loss, mixed, tokens
from torch import nn
from torch._dynamo.testing import CompileCounter

from zokernels.optim import ZOSGD, ForwardGradient
from zokernels.step.probes.functions import HiddenParameters
from zokernels.step.scratch import arena_numel


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Layers(nn.Module):
    """An embedding, layers of one class, and a head that is tied to the embedding."""

    def __init__(self, layers=4):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = Head(self.embedding)

    def forward(self, x):
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Head(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.weight = embedding.weight

    def forward(self, x):
        return F.linear(x, self.weight)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def layers():
    torch.manual_seed(0)
    return Layers()


def compile_layers(model, **options):
    for layer in model.layers:
        layer.compile(**options)
    return model


def compile_head(model, **options):
    model.head.compile(**options)
    return model


WAYS = {
    "model": lambda m, **o: torch.compile(m, **o),
    "in place": lambda m, **o: (m.compile(**o), m)[1],
    "layers": compile_layers,
    "tied head": compile_head,
    "function": lambda m, **o: torch.compile(lambda x: m(x), **o),
    "method": lambda m, **o: torch.compile(m.forward, **o),
}
CASES = {
    "whole, warm": {"scratch": None, "fullgraph": False, "before": True, "steps": 3},
    "some, fullgraph": {"scratch": 3000, "fullgraph": True, "before": False, "steps": 3},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_compiled_once_and_right(way, case):
    """With a backend that runs the graphs as they are, the losses are those of the plain model, bit for
    bit.
    """
    case, model, plain, counter = CASES[case], layers(), layers(), CompileCounter()
    run = WAYS[way](model, backend=counter, fullgraph=case["fullgraph"])
    if case["before"]:
        with torch.no_grad():
            run(tokens())
    loss = lambda: F.cross_entropy(run(tokens()).flatten(0, 1), (tokens().flatten() + 1) % 11)
    opt = ZOSGD(model.named_parameters(), lr=1e-4, eps=EPS, scratch=case["scratch"])
    reference = ZOSGD(plain.named_parameters(), lr=1e-4, eps=EPS)
    memory, stance = [p.detach() for p in model.parameters()], torch._dynamo.eval_frame._stance
    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(case["steps"]):
            opt.step(loss)
            reference.step(lambda: language_loss(plain))
            assert torch.equal(torch.stack(opt.last_losses), torch.stack(reference.last_losses))
            counts.append((counter.frame_count, counter.op_count))
    assert counts[0][0] >= 1
    assert counts == counts[:1] * len(counts)  # nothing is compiled again
    assert torch._dynamo.eval_frame._stance is stance
    check_nothing_is_left(model, memory)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_nothing_is_compiled_again_when_functions_are_looked_at():
    """As in the 33rd step."""
    model, counter = layers(), CompileCounter()
    compile_layers(model, backend=counter)
    opt = ZOSGD(model.named_parameters(), lr=1e-4, eps=EPS, scratch=3000)
    counts = []
    for _ in range(34):
        opt.step(lambda: language_loss(model))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 34
    assert counts[0] >= 1


def test_inductor_follows_the_points():
    """Compiled code has its own last bits; a log of its losses replays to the same weights."""
    model = layers()
    run = compile_layers(model)
    opt = ZOSGD(model.named_parameters(), lr=1e-4, eps=EPS, scratch=3000)
    for t in range(4):
        expected = [language_loss(plain_copy(at_point(model, t, sign))).detach() for sign in (1, -1)]
        opt.step(lambda: language_loss(run))
        torch.testing.assert_close(torch.stack(opt.last_losses), torch.stack(expected), rtol=1e-5, atol=1e-6)


def plain_copy(model):
    """The model without what is compiled of it."""
    plain = Layers()
    plain.load_state_dict(model.state_dict())
    return plain


def test_dynamic_shapes():
    model, counter = layers(), CompileCounter()
    run = torch.compile(model, backend=counter, dynamic=True)
    opt = ZOSGD(model.named_parameters(), lr=0.0, eps=EPS)
    for n in (3, 4, 5, 6):
        x = torch.arange(5 * n).view(n, 5) % 11
        opt.step(lambda x=x: run(x).square().mean())
        with torch.no_grad():
            expected = at_point(model, opt.step_count - 1, -1)(x).square().mean()
        assert torch.equal(opt.last_losses[1], expected)
    assert counter.frame_count == 1


def test_scratch_of_compiled_layers_is_a_block():
    model = compile_layers(layers(), backend="eager")
    layer = 4 * arena_numel([*model.layers[0].parameters()])
    opt, most = ZOSGD(model.named_parameters(), lr=1e-3, scratch=layer), []
    for _ in range(3):
        with watched("combine", lambda *args: most.append(opt.scratch.nbytes())):
            opt.step(lambda: language_loss(model))
    embedding = 4 * arena_numel([model.embedding.weight])
    assert layer <= max(most) <= layer + embedding  # which the head takes again, so it is kept


def test_compiled_after_the_first_step():
    """A function that was not there when the optimizer looked: right at once, and compiled from then on."""
    model, plain = layers(), layers()
    opt = ZOSGD(model.named_parameters(), lr=1e-4, eps=EPS, scratch=0)
    reference = ZOSGD(plain.named_parameters(), lr=1e-4, eps=EPS)
    counter, run = CompileCounter(), model
    for t in range(6):
        if t == 2:
            run = torch.compile(model, backend=counter)
        opt.step(lambda run=run: language_loss(run))
        reference.step(lambda: language_loss(plain))
        assert torch.equal(torch.stack(opt.last_losses), torch.stack(reference.last_losses))
        if t == 4:
            compiled = counter.frame_count
    assert counter.frame_count == compiled > 0


def test_what_gc_freeze_hides_is_found():
    """An engine freezes what it has made: compiled functions are among it."""
    counter, plain = CompileCounter(), layers()
    model = compile_layers(layers(), backend=counter)
    with torch.no_grad():
        model(tokens())
    counts = []
    gc.freeze()
    frozen = gc.get_freeze_count()
    for t in range(6):
        if t % 3 == 0:  # the second one finds what the first has found
            opt = ZOSGD(model.named_parameters(), lr=1e-4, eps=EPS)
            reference = ZOSGD(plain.named_parameters(), lr=1e-4, eps=EPS)
        opt.step(lambda: language_loss(model))
        reference.step(lambda: language_loss(plain))
        assert torch.equal(torch.stack(opt.last_losses), torch.stack(reference.last_losses))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 6
    assert gc.get_freeze_count() > frozen // 2  # frozen as before, but for those that are gone


def test_a_process_of_its_own_stays_compiled():
    """Another model's compiled forward in the closure is not run eagerly, and costs no copy."""
    model, other, counter = mixed(), layers(), CompileCounter()
    run = torch.compile(other, backend=counter)
    opt = ZOSGD(model.named_parameters(), lr=0.0)
    for _ in range(3):
        opt.step(lambda: language_loss(model) + run(tokens()).square().mean())
    assert counter.frame_count == 1


def test_who_compiles_nothing_pays_no_search():
    """All objects of a process are looked through only once torch.compile was called; then before the first
    forward, so that a model compiled from the beginning is compiled once.
    """
    code = """if True:
        import gc, torch
        from torch import nn
        from torch._dynamo.testing import CompileCounter
        from zokernels.optim import ZOSGD

        searches, real = [], gc.get_objects
        gc.get_objects = lambda *args: searches.append(1) or real(*args)
        model, counter = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), CompileCounter()

        def three_steps(run):
            optimizer = ZOSGD(model.named_parameters(), lr=0.1)
            for _ in range(3):
                optimizer.step(lambda: run(torch.ones(1, 3)).sum())

        three_steps(model)
        three_steps(model)
        print(len(searches))
        three_steps(torch.compile(model, backend=counter))
        print(len(searches), counter.frame_count)
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=case_process.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    none, (searches, compiled) = (list(map(int, line.split())) for line in done.stdout.splitlines())
    assert none == [0]
    assert 1 <= searches <= 3
    assert compiled == 1


def test_frozen_graphs_are_refused():
    import torch._inductor.config as config

    model = layers()
    run = torch.compile(model, backend="eager")
    with config.patch(freezing=True), pytest.raises(HiddenParameters, match="freezing"):
        ZOSGD(model.named_parameters(), lr=0.1).step(lambda: language_loss(run))


def test_a_write_in_a_compiled_forward_is_refused():
    model = nn.Linear(3, 3)
    before = copy.deepcopy(model.state_dict())

    @torch.compile(backend="eager")
    def run(x):
        out = model(x)
        model.weight.mul_(2)
        return out.sum()

    with pytest.raises(RuntimeError, match="does not write to its parameters"):
        ZOSGD(model.named_parameters(), lr=0.1).step(lambda: run(torch.ones(1, 3)))
    assert torch.equal(model.weight, before["weight"])


@pytest.mark.parametrize("fullgraph", [False, True])
def test_forward_gradients_run_uncompiled(fullgraph):
    model, plain = layers(), layers()
    run = torch.compile(model, backend="eager", fullgraph=fullgraph)
    first, second = (ForwardGradient(m.named_parameters(), lr=1e-4) for m in (model, plain))
    with pytest.warns(UserWarning, match="uncompiled"):
        first.step(lambda: language_loss(run))
    second.step(lambda: language_loss(plain))
    assert torch.equal(first.last_projected_gradient, second.last_projected_gradient)
