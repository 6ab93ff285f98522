"""What is process-wide around steps in threads and inside each other; generators of the closure's own; models
whose forward is another one with gradients or padding."""

from __future__ import annotations

import copy
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as registry

from zokernels import offload
from zokernels.optim import ZOSGD

BOTH = pytest.mark.parametrize("restore", ["exact", "inplace"])


def surroundings():
    from torch._dynamo import eval_frame

    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_cache_enabled(),
        dict(registry._global_forward_pre_hooks),
        torch.overrides._get_current_function_mode_stack(),
        eval_frame._stance.stance,
        torch.get_num_threads(),
    )


def in_threads(works):
    """What each of ``works`` returned in its thread; all run at once."""
    found, begin = {}, threading.Barrier(len(works))

    def run(i):
        begin.wait()
        try:
            found[i] = works[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(works))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads)
    return [found[i] for i in range(len(works))]


def run(restore, seed, compiled=False):
    """The weights after some steps, and what its thread has around them."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    call = torch.compile(model, backend="eager") if compiled else model
    optimizer = ZOSGD(model.named_parameters(), lr=0.1, restore=restore, seed=seed)
    optimizer.generators = [generator]
    for _ in range(12):
        optimizer.step(lambda: call(torch.randn(3, 5, generator=generator)).square().mean())
    return torch.cat([p.detach().flatten() for p in model.parameters()]), surroundings()


def test_steps_in_several_threads():
    """Exact and in place beside each other: the weights of runs one after another, and nothing left."""
    before = surroundings()
    kinds = [("exact", 1), ("inplace", 2), ("exact", 3), ("inplace", 4)]
    together = in_threads([lambda kind=kind: run(*kind) for kind in kinds])
    assert surroundings() == before
    for kind, found in zip(kinds, together, strict=True):
        assert not isinstance(found, BaseException), found
        assert torch.equal(found[0], run(*kind)[0])
        assert found[1] == before


@pytest.mark.parametrize("inner", ["exact", "inplace"])
@BOTH
def test_nested_optimizers(restore, inner):
    """Of other parameters: each step is the one that it would be alone."""
    before, losses = surroundings(), []
    torch.manual_seed(0)
    outer_model, inner_model = nn.Linear(4, 2), nn.Linear(4, 2)
    outer = ZOSGD(outer_model.named_parameters(), lr=0.1, restore=restore)
    nested = ZOSGD(inner_model.named_parameters(), lr=0.1, restore=inner)
    twins = [nn.Linear(4, 2), nn.Linear(4, 2)]
    for twin, model in zip(twins, (outer_model, inner_model), strict=True):
        twin.load_state_dict(model.state_dict())
    x = torch.ones(3, 4)

    def closure():
        nested.step(lambda: inner_model(x).square().mean())
        losses.append(surroundings()[:4])
        return outer_model(x).square().mean()

    outer.step(closure)
    ZOSGD(twins[0].named_parameters(), lr=0.1, restore=restore).step(lambda: twins[0](x).square().mean())
    alone = ZOSGD(twins[1].named_parameters(), lr=0.1, restore=inner)
    for _ in range(2):
        alone.step(lambda: twins[1](x).square().mean())
    for twin, model in zip(twins, (outer_model, inner_model), strict=True):
        assert all(map(torch.equal, twin.state_dict().values(), model.state_dict().values()))
    assert surroundings() == before
    assert losses[0] == losses[1]


@BOTH
@pytest.mark.parametrize("where", ["in the closure", "in another thread"])
def test_one_optimizer_takes_one_step_at_a_time(restore, where):
    model, found = nn.Linear(4, 2), []
    twin = copy.deepcopy(model)
    optimizer, alone = (ZOSGD(m.named_parameters(), lr=0.0, restore=restore) for m in (model, twin))
    loss = lambda m=model: m(torch.ones(3, 4)).square().mean()

    def second():
        with pytest.raises(RuntimeError, match="step: expected one step at a time"):
            optimizer.step(loss)
        found.append(optimizer.step_count)

    def closure():
        second() if where == "in the closure" else in_threads([second])
        return loss()

    optimizer.step(closure)
    assert found == [0, 0]
    alone.step(lambda: loss(twin))
    assert torch.equal(torch.stack(alone.last_losses), torch.stack(optimizer.last_losses))
    optimizer.step(loss)
    assert optimizer.step_count == 2


@pytest.mark.parametrize("where", ["exact", "inplace", "streamed"])
def test_generators_of_the_closure(where):
    """Set back on request, and left as after one forward; without, each forward draws on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    if where == "streamed":
        offload.stream(model, list(model), "host", slots=2)
    optimizer = ZOSGD(model.named_parameters(), lr=0.1, restore="inplace" if where == "inplace" else "exact")
    generator, drawn = torch.Generator().manual_seed(7), []

    def closure():
        first = torch.rand(3, 4, generator=generator)
        loss = model(first).sum()
        drawn.append((first, torch.rand(2, generator=generator)))
        return loss

    optimizer.step(closure)
    assert not torch.equal(drawn[0][0], drawn[1][0])
    optimizer.generators = [generator]
    for _ in range(2):
        drawn.clear()
        before = generator.get_state()
        optimizer.step(closure)
        assert all(map(torch.equal, *drawn))
        after = generator.get_state()
        generator.set_state(before)
        torch.rand(3, 4, generator=generator), torch.rand(2, generator=generator)
        assert torch.equal(generator.get_state(), after)


# Forwards that torch takes another way ---------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_an_encoder_with_padding(train, nested):
    """The losses of the values at the point, of positions that are not padded; at padded ones torch's fused
    path, which is not taken inside a step, gives 0."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).train(train)
    x, padded = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([[4], [3], [5]])
    loss = lambda m: m(x, src_key_padding_mask=padded)[~padded].square().sum()
    optimizer = ZOSGD(model.named_parameters(), lr=0.0, eps=1e-2)
    optimizer.step(lambda: loss(model))
    moved = ZOSGD(model.named_parameters(), lr=0.0, eps=1e-2, restore="inplace")
    moved.step(lambda: loss(model))
    torch.testing.assert_close(
        torch.stack(optimizer.last_losses), torch.stack(moved.last_losses), rtol=1e-5, atol=0
    )
    assert optimizer.last_losses[0] != optimizer.last_losses[1]


@BOTH
@pytest.mark.parametrize("anchor", ["activations", "a parameter"])
def test_modules_inside_a_callable_are_perturbed(restore, anchor):
    """TripletMarginWithDistanceLoss calls a distance that has parameters of its own."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.anchor, self.metric = nn.Parameter(torch.randn(2, 4)), nn.Linear(4, 3)
            self.loss = nn.TripletMarginWithDistanceLoss(
                distance_function=lambda x, y: self.metric(x - y).square().sum(-1), margin=5.0
            )

        def forward(self, x):
            return self.loss(self.anchor if anchor == "a parameter" else 2 * x + self.anchor, x + 1, x - 1)

    torch.manual_seed(0)
    model, x = Model(), torch.ones(2, 4)
    optimizer = ZOSGD(model.named_parameters(), lr=0.0, eps=1e-2, restore=restore)
    optimizer.step(lambda: model(x))
    other = ZOSGD(model.named_parameters(), lr=0.0, eps=1e-2, restore="inplace")
    losses = []

    def written_out():
        start = model.anchor if anchor == "a parameter" else 2 * x + model.anchor
        distance = lambda a, b: ((a - b) @ model.metric.weight.T + model.metric.bias).square().sum(-1)
        losses.append(F.relu(5.0 + distance(start, x + 1) - distance(start, x - 1)).mean())
        return losses[-1]

    other.step(written_out)
    torch.testing.assert_close(torch.stack(optimizer.last_losses), torch.stack(losses), rtol=1e-5, atol=0)
    assert losses[0] != losses[1]


@BOTH
def test_the_row_of_padding_idx_is_a_weight(restore):
    """It moves, as docs/optimizer.md says."""
    model = nn.Embedding(5, 4, padding_idx=0)
    before = model.weight.detach().clone()
    ZOSGD(model.named_parameters(), lr=0.1, restore=restore).step(
        lambda: model(torch.tensor([0, 1])).square().sum()
    )
    assert not torch.equal(model.weight[0], before[0])


@pytest.mark.parametrize("restore", ["exact", "inplace"])
@pytest.mark.parametrize("off", [torch._C.DisableTorchFunction, torch._C.DisableTorchFunctionSubclass])
def test_torch_functions_stay_off_after_a_step_that_raises(off, restore):
    """Who has switched them off around a step finds them off when its closure has raised."""
    model = torch.nn.Linear(3, 2)
    optimizer = ZOSGD(model.named_parameters(), lr=1e-2, restore=restore)

    def closure():
        raise KeyError

    with off():
        before = torch._C._get_torch_function_state()
        with pytest.raises(KeyError):
            optimizer.step(closure)
        assert torch._C._get_torch_function_state() == before != torch._C._TorchFunctionState.ENABLED
