# ruff: noqa: B023  closures of a loop run inside it
"""The two-pass form: its bits, its passes, what may change between steps, checkpoints."""

import io
import warnings

import pytest
import torch
from helpers import watched
from torch import nn
from zosgd_cases import DTYPES, batch, combined, loss_of, mlp, same_bits, weights

import zokernels as zk
from zokernels.optim import ZOSGD


def build(dtype=torch.float32, dropout=0.0, **options):
    model = mlp(dtype, dropout)
    return model, ZOSGD(
        model.named_parameters(), **{"lr": 0.05, "eps": 2.0**-6, "restore": "inplace", **options}
    )


class Reference:
    """The form with every z materialised: K = 1 moves, and one K = 2 pass a step."""

    def __init__(self, model, opt):
        self.model, self.opt, self.step, self.pending = model, opt, 0, None

    def z(self, name, p, step):
        seed = zk.derive_seed(self.opt.seed, step, 0)
        dist = self.opt.param_groups[0]["dist"]
        return zk.noise(p.shape, seed=seed, stream=zk.stream_of(name), dist=dist)

    def move(self, step, c):
        for name, p in self.model.named_parameters():
            p.data.copy_(combined(p.data, self.z(name, p, step), c))

    def flush(self):
        if self.pending:
            self.move(self.step, -self.pending)
            self.pending = None

    @torch.no_grad()
    def take(self, loss, lr):
        group = self.opt.param_groups[0]
        eps, decay, t = group["eps"], 1 - lr * group["weight_decay"], self.step
        if self.pending is None:
            self.move(t, eps)
        plus = loss(self.model)
        self.move(t, -2 * eps)
        minus = loss(self.model)
        g = ((plus.double() - minus.double()) / (2 * eps)).float().item()
        finite = torch.isfinite(torch.tensor(g))
        c, decay = (decay * eps - lr * g, decay) if finite else (eps, 1.0)
        seed = zk.contract.seed_to_int64(zk.derive_seed(self.opt.seed, t, 0))
        for name, p in self.model.named_parameters():
            z = (self.z(name, p, t), self.z(name, p, t + 1))
            rounding = seed if group["rounding"] == "stochastic" else None
            stream = zk.stream_of(name)
            p.data.copy_(combined(p.data, z, (c, eps), decay=decay, stochastic_seed=rounding, stream=stream))
        self.step, self.pending = t + 1, eps
        return plus, minus


@pytest.mark.filterwarnings("ignore:ZOSGD. 1 step:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dist", ["normal", "rademacher"])
@pytest.mark.parametrize(("rounding", "weight_decay"), [("stochastic", 0.1), ("nearest", 0.0)])
def test_equals_the_materialised_form(dtype, dist, rounding, weight_decay):
    """With a schedule, a loss that is not finite in the middle, and the flush at the end."""
    model, opt = build(dtype, dist=dist, rounding=rounding, weight_decay=weight_decay, seed=5)
    plain = mlp(dtype)
    reference, data = Reference(plain, opt), batch()
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.7)
    with opt.two_pass(model):
        for step in range(4):
            loss = lambda m, bad=step == 1: loss_of(m, *data) * (float("nan") if bad else 1)
            lr = opt.param_groups[0]["lr"]
            opt.step(lambda loss=loss: loss(model))
            assert (
                torch.equal(torch.stack(opt.last_losses), torch.stack(reference.take(loss, lr))) or step == 1
            )
            assert same_bits(weights(model), weights(plain))
            schedule.step()
    assert int(opt.skipped_steps) == 1
    assert not same_bits(weights(model), weights(plain))
    reference.flush()
    assert same_bits(weights(model), weights(plain))


def test_first_step_from_clean_weights_is_that_of_three_passes():
    """fp32: same losses in the first step, and the same weights to a few roundings."""
    (model, opt), (other, three) = build(), build()
    data = batch()
    with opt.two_pass(model):
        opt.step(lambda: loss_of(model, *data))
        losses = opt.last_losses
    three.step(lambda: loss_of(other, *data))
    assert losses == three.last_losses
    for p, q in zip(weights(model), weights(other), strict=True):
        assert (p - q).abs().max() <= 8 * 2**-24


def test_passes_over_the_weights():
    (model, opt), calls = build(), []
    with watched("combine_", lambda params, seeds, *rest: calls.append(seeds.numel())), opt.two_pass(model):
        for _ in range(3):
            opt.step(lambda: loss_of(model, *batch()))
    assert calls == [1, 1, 2, 1, 2, 1, 2, 1]  # the first +eps, then two a step, then the flush


@pytest.mark.parametrize("change", ["eps", "dist", "frozen", "added"])
def test_what_a_perturbation_depends_on_may_change(change):
    """It is taken out with the values it was made with: as by a flush before the change."""
    runs = []
    for explicit in (True, False):
        model, opt = build()
        extra = nn.Parameter(torch.ones(3))
        data = batch()
        with opt.two_pass(model, nn.ParameterList([extra])):
            opt.step(lambda m=model: loss_of(m, *data))
            if explicit:
                opt.flush()
            if change == "frozen":
                model[0].weight.requires_grad_(False)
            elif change == "added":
                opt.add_param_group({"params": [("extra", extra)]})
            else:
                opt.param_groups[0][change] = {"eps": 2.0**-4, "dist": "rademacher"}[change]
            opt.step(lambda m=model: loss_of(m, *data) + extra.sum())
        runs.append(weights(model))
    assert same_bits(*runs)


# --- checkpoints, dropout, errors ---


def test_resume_is_bit_exact():
    """state_dict flushes, so a run that goes on and one that is loaded continue alike; dropout masks
    included.
    """

    def run(model, opt, steps):
        for _ in range(steps):
            opt.step(lambda: loss_of(model, *batch()))

    model, opt = build(torch.bfloat16, dropout=0.3, weight_decay=0.01)
    model2, opt2 = build(torch.bfloat16, dropout=0.3, seed=9)
    torch.manual_seed(5)
    file = io.BytesIO()
    with opt.two_pass(model):
        run(model, opt, 3)
        torch.save((model.state_dict(), opt.state_dict(), torch.get_rng_state()), file)
        rng = torch.get_rng_state()
        run(model, opt, 3)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.set_rng_state(rng)
    with opt2.two_pass(model2):
        model2.load_state_dict(saved[0])
        opt2.load_state_dict(saved[1])
        run(model2, opt2, 3)
    assert same_bits(weights(model), weights(model2))
    assert opt.state_dict() == opt2.state_dict()


def test_refused():
    model, opt = build()
    with pytest.raises(ValueError, match="two_pass: expected the modules that own all trained parameters"):
        opt.two_pass(model[0]).__enter__()
    with pytest.raises(ValueError, match="'inplace'"):
        build(restore="exact")[1].two_pass(model).__enter__()
    with pytest.raises(ValueError, match="capturable=False"):
        build(capturable=True)[1].two_pass(model).__enter__()
    with opt.two_pass(model):
        with pytest.raises(RuntimeError, match="one at a time"):
            opt.two_pass(model).__enter__()
        opt.step(lambda: loss_of(model, *batch()))


def test_a_compiled_module_is_used_between_steps_without_a_warning():
    """torch warns of global hooks; where the user has set one, too, it still does."""
    model = mlp()
    compiled, seen = torch.compile(model, backend="eager"), []
    opt = ZOSGD(compiled.named_parameters(), lr=0.05, restore="inplace")
    before, filters = weights(model), list(warnings.filters)
    with warnings.catch_warnings(), opt.two_pass(model), torch.no_grad():
        warnings.simplefilter("error")
        x, _ = batch()
        for _ in range(2):
            opt.step(lambda: compiled(x).square().mean())
        assert opt.passes.pending
        assert torch.equal(compiled(x), model(x))
        assert not opt.passes.pending  # flushed: the forward saw theta
        hook = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args))
        try:
            opt.step(lambda: model(x).square().mean())
            with pytest.warns(UserWarning, match="global hooks"):
                compiled(x)
        finally:
            hook.remove()
    assert seen
    assert warnings.filters == filters
    assert not same_bits(weights(model), before)
