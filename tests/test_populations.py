"""Perturbed products without perturbed weights: one point in a forward, and all members of a population.

What a step sees is compared with the dense form, whose perturbed copies are made, and with float64.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits, watched, watched_kernel
from torch import nn

from zokernels.optim import (
    EGGROLL,
    ES,
    LOZO,
    ZOSGD,
    FreshFactors,
    KeptLeft,
    KeptRight,
    Population,
    Subspace,
    SubZero,
    TemporalFactor,
    TeZO,
    ZOConservative,
)
from zokernels.step.cohort import members_within
from zokernels.step.directions.low_rank import Factored
from zokernels.step.probes.functions import HiddenParameters
from zokernels.step.probes.products import Learned
from zokernels.trajectory import read, replay_

KINDS = {
    "FreshFactors": FreshFactors(3),
    "KeptRight": KeptRight(3),
    "KeptLeft": KeptLeft(3),
    "TemporalFactor": TemporalFactor(5),
    "Subspace": Subspace(4),
}
METHODS = {
    "EGGROLL": lambda p, **o: EGGROLL(p, 1.0, 0.02, rank=3, directions=3, **o),
    "ES": lambda p, **o: ES(p, 0.02, 0.02, population=5, maximize=False, direction=FreshFactors(2), **o),
    "LOZO": lambda p, **o: LOZO(p, 1e-3, 0.02, directions=2, **o),
    "SubZero": lambda p, **o: SubZero(p, 1e-3, 0.02, rank=4, directions=2, **o),
    "TeZO": lambda p, **o: TeZO(p, 1e-3, 0.02, rank=5, directions=2, **o),
}


class Model(nn.Module):
    """Tied head, learned positions, norms, biases, and parameters that are used as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, 24), nn.Embedding(9, 24)
        self.norm, self.last = nn.LayerNorm(24), nn.RMSNorm(24)
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24, bias=False)
        self.head = nn.Linear(24, 50, bias=False)
        self.head.weight = self.tokens.weight
        self.gain, self.matrix = nn.Parameter(torch.ones(24)), nn.Parameter(0.2 * torch.randn(24, 24))

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1])[None])
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        x = x + torch.matmul(x, self.matrix) + x @ self.matrix.t()
        return self.head(self.last(x) * (0.5 + self.gain.float()).to(x.dtype))


def cross_entropy(logits, targets):
    losses = F.cross_entropy(logits.flatten(0, -2).double(), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def losses_of(make, batched=False, dtype=torch.float32, model=None, **options):
    """The losses of one step, and the model after it."""
    torch.manual_seed(3)
    model, data = (model or Model)().to(dtype), torch.randint(50, (2, 3, 7)).unbind()
    optimizer = make(model.named_parameters(), **options)
    ids, targets = data

    def closure(cohort=None):
        if cohort is None:
            return cross_entropy(model(ids), targets).mean()
        return cohort.mean(cross_entropy(model(cohort.repeat(ids)), cohort.repeat(targets)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure, batched=True) if batched else optimizer.step(closure)
    return torch.stack(list(optimizer.last_losses)), model


@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_those_of_the_dense_form(kind, rng):
    """Drawn for many seeds at once, they have the bits of those drawn one by one."""
    direction, shapes, streams = KINDS[kind], [(17, 40), (24, 9)], [5, rng.getrandbits(56)]
    params = [torch.empty(shape) for shape in shapes]
    kept, seeds = torch.tensor([rng.getrandbits(62)]), torch.tensor([rng.getrandbits(62) for _ in range(4)])
    noise = Factored(direction, kept, {})
    left, right = noise.factors(params, streams, seeds)
    for i, stream in enumerate(streams):
        for got, want in zip(noise.stacked(params[i], stream, seeds), (left[i], right[i]), strict=True):
            assert_same_bits(got.expand_as(want).contiguous(), want, f"{shapes[i]}")


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_perturbed_weights(method):
    """In fp32, up to the rounding of sums of 50 terms and of the losses' own: far below their spread."""
    want, _ = losses_of(METHODS[method])
    for options in ({}, {"batched": True}, {"batched": True, "cohort": 3}):
        got, _ = losses_of(METHODS[method], restore="products", **options)
        assert (got - want).abs().max() < 2e-5
        assert want.std() > 1e-2


def exact_points(optimizer, model):
    """The parameters at each of a step's points, float64: the weights plus c z, which is not rounded."""
    buckets = optimizer.plan()
    seeds = optimizer.run_state.seeds({b.device: None for b in buckets}, optimizer.estimator.directions)
    optimizer.direction.prepare(optimizer, buckets, seeds)
    own = {name: p.detach().double() for name, p in model.named_parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    for k, sign in optimizer.estimator.points():
        moved = dict(own)
        for b in buckets:
            zeros = [torch.full(p.shape, -0.0) for p in b.params]
            drawn = [torch.empty_like(zero) for zero in zeros]
            members = b.members._replace(plan=None)
            b.noise.perturb(drawn, members, seeds[b.device][k : k + 1], torch.ones(1), theta=zeros)
            for p, z in zip(b.params, drawn, strict=True):
                moved[names[id(p)]] = own[names[id(p)]] + sign * b.eps * z.double()
        yield moved


MANY = {
    "EGGROLL": lambda p, **o: EGGROLL(p, 0.0, 1e-3, rank=3, directions=12, **o),
    "LOZO": lambda p, **o: LOZO(p, 0.0, 1e-3, rank=4, directions=12, **o),
}


@pytest.mark.parametrize("method", MANY)
def test_losses_are_nearer_to_the_truth_than_those_of_perturbed_copies(method):
    """In bf16, at a perturbation near the spacing of the weights, whose copies are rounded."""
    torch.manual_seed(3)
    model, (ids, targets) = Model().bfloat16(), torch.randint(50, (2, 3, 7)).unbind()
    truth = []
    optimizer = MANY[method](model.named_parameters())
    points = list(exact_points(optimizer, model))
    exact = model.double()
    for moved in points:
        moved["head.weight"] = moved["tokens.weight"]
        truth.append(cross_entropy(torch.func.functional_call(exact, moved, (ids,)), targets).mean())
    truth = torch.stack(truth)
    # A step uses differences of losses; what is common to all forwards is no matter.
    error = lambda losses: ((losses - losses.mean()) - (truth - truth.mean())).norm()
    dense, _ = losses_of(MANY[method], dtype=torch.bfloat16)
    for options in ({}, {"batched": True}):
        got, _ = losses_of(MANY[method], dtype=torch.bfloat16, restore="products", **options)
        assert error(got) < error(dense)


@pytest.mark.parametrize("batched", [False, True])
def test_a_product_is_rounded_once(batched):
    """Its error is that of one rounding of the result; a perturbed copy adds as much again."""
    torch.manual_seed(0)
    model, x = nn.Linear(96, 80).bfloat16(), torch.randn(40, 96).bfloat16()
    make = lambda **o: EGGROLL(model.named_parameters(), 0.0, 1e-2, rank=2, directions=3, **o)
    optimizer = make()
    exact = [F.linear(x.double(), moved["weight"], moved["bias"]) for moved in exact_points(optimizer, model)]

    def outputs(batched, **options):
        found = []

        def closure(cohort=None):
            found.append(model(x if cohort is None else cohort.repeat(x)))
            return torch.zeros(()) if cohort is None else torch.zeros(len(cohort))

        make(**options).step(closure, batched=batched)
        return torch.cat(found[2:]).split(40) if batched else found

    error = lambda got: sum(((g.double() - e) / e.abs().clamp(min=0.1)).square().sum() for g, e in zip(
        got, exact, strict=True))  # fmt: skip
    dense, got = error(outputs(False)), error(outputs(batched, restore="products"))
    assert got < 0.75 * dense
    # bf16 has eight bits: a rounding is off by 2^-9 of a number at most, and so by less on average.
    assert (got / (6 * 40 * 80)).sqrt() < 2.0**-9


def test_no_perturbed_weight_is_made():
    """What is drawn at once is vectors and factors, and no operation that makes copies of weights runs."""
    sizes = []
    note = lambda out, x, *_: sizes.append(x.numel())
    copy = lambda *_: pytest.fail("a copy")
    with watched_kernel("spread", note), watched("combine", copy), watched("low_rank", copy):
        losses_of(METHODS["EGGROLL"], restore="products", batched=True)
    assert max(sizes) == 50 * 3  # the left factor of rank 3 of the embedding [50, 24]


class Forgetful(Learned):
    """Knows of no parameter that it is used, and of no memory: factors are drawn one by one, into fresh
    memory.
    """

    used = property(lambda self: {}, lambda self, value: None)

    def empty(self, what, shape, device):
        return torch.empty(shape, device=device)


@pytest.mark.parametrize("name", ["LOZO", "EGGROLL", "SubZero", "TeZO"])
@pytest.mark.parametrize("batched", [False, True])
def test_factors_drawn_together_and_into_old_memory_are_those_drawn_alone(name, batched):
    """From a run's second forward on factors are drawn in one call, or into the memory of those before."""

    def run(learned):
        torch.manual_seed(2)
        model, x = Model(), torch.randint(50, (3, 7))
        optimizer = METHODS[name](model.named_parameters(), restore="products", cohort=6 if batched else None)
        optimizer.learned = learned
        losses = []
        for _ in range(3):
            if batched:
                optimizer.step(lambda c: c.mean(model(c.repeat(x)).square()), batched=True)
            else:
                optimizer.step(lambda: model(x).square().mean())
            losses.append(torch.stack(list(optimizer.last_losses)))
        return [*losses, *(p.detach() for p in model.parameters())]

    together, alone = run(Learned()), run(Forgetful())
    assert len({loss.item() for losses in together[:3] for loss in losses}) > 10
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)


def test_the_same_seeds_give_the_same_weights_and_a_log_replays(tmp_path):
    results = []
    for name in ("a", "b"):
        torch.manual_seed(1)
        model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(5, 6)
        base = [p.detach().clone() for p in model.parameters()]
        options = {"rank": 2, "directions": 4, "restore": "products", "cohort": 3}
        optimizer = EGGROLL(model.named_parameters(), 0.1, 0.05, trajectory=tmp_path / name, **options)
        for _ in range(3):
            optimizer.step(lambda c, m=model, x=x: c.mean(m(c.repeat(x)).square()), batched=True)
        optimizer.trajectory.close()
        results.append([p.detach() for p in model.parameters()])
    again = dict(zip(dict(model.named_parameters()), (b.clone() for b in base), strict=True))
    replay_(again, tmp_path / "b")
    for one, two, three, first in zip(*results, again.values(), base, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(two, three)
        assert not torch.equal(one, first)
    header = read(tmp_path / "b").header
    assert (header["restore"], header["cohort"]) == ("products", 3)


def test_members_with_rows_of_their_own():
    """Each member has its own inputs, and another number of them."""
    torch.manual_seed(0)
    model, counts = Model(), [1, 4, 2, 3, 1]
    data = [torch.randint(50, (n, 7)) for n in counts]
    make = METHODS["ES"]

    def batched(cohort):
        own = [data[m] for m in cohort.members]
        return cohort.mean(model(cohort.rows(torch.cat(own), list(map(len, own)))).square())

    optimizer = make(model.named_parameters(), restore="products", cohort=4)
    optimizer.step(batched, batched=True)
    got = torch.stack(list(optimizer.last_losses))
    torch.manual_seed(0)
    model = Model()
    rest = iter(data)
    optimizer = make(model.named_parameters())
    optimizer.step(lambda: model(next(rest)).square().mean())
    torch.testing.assert_close(got, torch.stack(list(optimizer.last_losses)), rtol=1e-5, atol=1e-6)


class Convolutional(nn.Module):
    """Convolutions, a class token, positions that are added, and a group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.head = nn.Linear(8, 50)

    def forward(self, ids):
        x = F.pad(ids.double().to(self.head.weight.dtype) / 50, (0, 5)).view(len(ids), 1, 3, 4)
        x = F.interpolate(x, (4, 4))
        x = self.norm(self.patches(x)).flatten(2).mT
        x = torch.cat((self.token.expand(len(ids), -1, -1), x), 1) + self.places
        return F.pad(self.head(x.tanh()), (0, 0, 0, 2))


def test_what_is_no_product_gets_perturbed_copies_and_is_said_once():
    want, _ = losses_of(METHODS["EGGROLL"], model=Convolutional)
    torch.manual_seed(3)
    model, (ids, targets) = Convolutional(), torch.randint(50, (2, 3, 7)).unbind()
    optimizer = METHODS["EGGROLL"](model.named_parameters(), restore="products")
    closure = lambda c: c.mean(cross_entropy(model(c.repeat(ids)), c.repeat(targets)))
    with pytest.warns(UserWarning, match="EGGROLL: ") as said:
        optimizer.step(closure, batched=True)
    assert sorted(str(w.message).split()[1] for w in said) == ["'token'", "add", "conv2d"]
    torch.testing.assert_close(torch.stack(list(optimizer.last_losses)), want, rtol=1e-5, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure, batched=True)


class Patches(nn.Module):
    """Convolutions that are products: windows side by side, some of the image left over, and 1 x 1."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.mix = nn.Conv2d(2, 8, (2, 3), stride=(2, 3)), nn.Conv2d(8, 8, 1, bias=False)
        self.line, self.head = nn.Conv1d(8, 6, 2, stride=2, padding="valid"), nn.Linear(18, 50 * 7)

    def forward(self, ids):
        x = F.pad(ids.double().to(self.head.weight.dtype) / 50, (0, 103)).sin()
        x = self.mix(self.patches(x.view(len(ids), 2, 5, 11)).relu())  # [b, 8, 2, 3]
        return self.head(self.line(x.view(len(ids), 8, 6)).view(len(ids), 18).tanh()).view(len(ids), 7, 50)


def test_convolutions_of_windows_side_by_side_are_products():
    want, _ = losses_of(METHODS["EGGROLL"], model=Patches)
    copy = lambda *_: pytest.fail("a copy of a weight")
    with watched("low_rank", copy):
        for options in ({}, {"batched": True}):  # a warning is an error there
            got, _ = losses_of(METHODS["EGGROLL"], model=Patches, restore="products", **options)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert want.std() > 1e-3


class Experts(nn.Module):
    """Each token goes to one expert of two, whose rows are picked from all."""

    def __init__(self, stacked=False) -> None:
        super().__init__()
        self.tokens, self.router = nn.Embedding(50, 8), nn.Linear(8, 2, bias=False)
        self.experts = None if stacked else nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.stacked = nn.Parameter(torch.randn(2, 8, 8)) if stacked else None
        self.head = nn.Linear(8, 50)

    def pick(self, expert, chosen):
        return (chosen == expert).nonzero()[:, 0]

    def forward(self, ids):
        x = self.tokens(ids).flatten(0, 1)
        chosen, out = self.router(x).argmax(1), torch.zeros_like(x)
        for i in range(2):
            at = self.pick(i, chosen)
            y = F.linear(x[at], self.stacked[i]) if self.experts is None else self.experts[i](x[at])
            out.index_add_(0, at, y)
        return self.head(out).view(*ids.shape, 50)


class StackedExperts(Experts):
    def __init__(self) -> None:
        super().__init__(stacked=True)


class SortedExperts(Experts):
    """Picks a fixed number of tokens for each expert, of all rows sorted by the router's choice."""

    def pick(self, expert, chosen):
        half = len(chosen) // 2
        return chosen.argsort(stable=True)[half * expert : half * (expert + 1)]


def check_one_by_one(make, model, tolerance):
    """A batched step of ``model()`` runs members one by one, and says so; losses are the dense form's."""
    want, _ = losses_of(make, model=model)
    torch.manual_seed(3)
    net, (ids, targets) = model(), torch.randint(50, (2, 3, 7)).unbind()
    optimizer = make(net.named_parameters(), restore="products")
    sizes = []

    def closure(cohort):
        sizes.append(len(cohort))
        return cohort.mean(cross_entropy(net(cohort.repeat(ids)), cohort.repeat(targets)))

    with pytest.warns(UserWarning, match="members run one by one"):
        optimizer.step(closure, batched=True)
    assert set(sizes[2:]) == {1}
    torch.testing.assert_close(torch.stack(list(optimizer.last_losses)), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("model", [Experts, StackedExperts, SortedExperts])
def test_where_experts_pick_their_rows_members_run_one_by_one(model):
    """At a small perturbation every member's tokens go where theta's do, so that numbers of rows tell
    nothing; the losses would be those of other members.
    """
    make = lambda p, **o: EGGROLL(p, 1.0, 1e-4, rank=3, directions=3, **o)
    check_one_by_one(make, model, 1e-6)


@pytest.mark.parametrize("name", ["EGGROLL", "LOZO", "SubZero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_taken_by_its_number_gets_a_perturbed_copy_of_its_own(name, dtype):
    """It has the bits of the whole tensor's copy, and no other expert's copy is made."""
    torch.manual_seed(4)
    stack = nn.ParameterDict({"experts": torch.randn(5, 4, 6), "bias": torch.randn(5, 4)}).to(dtype)

    def taken(**options):
        found, make = [], METHODS[name]
        optimizer = make(stack.named_parameters(), **options)
        for group in optimizer.param_groups:
            group["lr"] = 0.0

        def closure():
            found.extend(stack["experts"][i].clone() for i in (0, torch.tensor(3), -1))
            found.append(stack["bias"][1].clone())
            return torch.zeros(())

        optimizer.step(closure)
        return found

    sizes = []
    note = lambda out, *_: sizes.extend(o.numel() for o in out)
    said = pytest.warns(UserWarning, match="entries of 'experts' are taken by their numbers")
    with watched("low_rank", note), said as warned:
        got = taken(restore="products")
    assert len([w for w in warned if "entries" in str(w.message)]) == 1
    want = taken()
    assert set(sizes) == {24, 4}
    assert len(got) == len(want) >= 8
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(got[0], got[4])


class TimeFirst(nn.Module):
    """The batch is the second dimension; the first is as long as two members' rows."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mix = nn.Embedding(50, 8), nn.Linear(8, 50)

    def forward(self, ids):
        x = self.tokens(F.pad(ids, (0, 5)))  # [rows, 12, 8]
        return self.mix(x.transpose(0, 1)).transpose(0, 1)[:, :7]


class OfTheWeightAlone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 8)
        self.weight = nn.Parameter(torch.randn(50, 8))

    def forward(self, ids):
        return F.linear(self.tokens(ids), self.weight / self.weight.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("model", [TimeFirst, OfTheWeightAlone])
def test_where_rows_cannot_be_told_apart_members_run_one_by_one(model):
    """Silence would be the losses of other members."""
    check_one_by_one(METHODS["EGGROLL"], model, 1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_models_of_transformers(name):
    """Unmodified: rotary and learned positions, masks, a cache and generation."""
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(intermediate_size=48, num_key_value_heads=2, **common)
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=24)
        model = transformers.GPT2LMHeadModel(config)
    model.eval()
    ids, mask = torch.randint(3, 60, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    greedy = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None}

    def scores(ids, mask):
        """Of the tokens that the model generates, by its own logits: one for each row."""
        out = model.generate(
            input_ids=ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **greedy
        )
        return torch.stack(out.logits, 1).float().logsumexp(-1).mean(1)

    make = lambda **o: EGGROLL(model.named_parameters(), 0.0, 0.05, rank=2, directions=2, **o)
    results = []
    for options, closure in (
        ({}, lambda: scores(ids, mask).mean()),
        ({"restore": "products"}, lambda: scores(ids, mask).mean()),
    ):
        optimizer = make(**options)
        optimizer.step(closure)
        results.append(torch.stack(list(optimizer.last_losses)))
    optimizer = make(restore="products", cohort=3)
    optimizer.step(lambda c: c.mean(scores(c.repeat(ids), c.repeat(mask))), batched=True)
    results.append(torch.stack(list(optimizer.last_losses)))
    assert results[0].std() > 1e-2
    for got in results[1:]:
        torch.testing.assert_close(got, results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batched", [False, True])
def test_compiled_models_run_uncompiled(batched):
    """A compiled graph would hold the parameters themselves."""
    want, _ = losses_of(METHODS["EGGROLL"])
    torch.manual_seed(3)
    plain, (ids, targets) = Model(), torch.randint(50, (2, 3, 7)).unbind()
    calls = []

    def backend(graph, example_inputs):
        calls.append(graph)
        return graph.forward

    model = torch.compile(plain, backend=backend)
    model(ids)
    assert len(calls) == 1
    optimizer = METHODS["EGGROLL"](plain.named_parameters(), restore="products")

    def closure(cohort=None):
        if cohort is None:
            return cross_entropy(model(ids), targets).mean()
        return cohort.mean(cross_entropy(model(cohort.repeat(ids)), cohort.repeat(targets)))

    with pytest.warns(UserWarning, match="products run torch.compile'd functions uncompiled"):
        optimizer.step(closure, batched=batched)
    torch.testing.assert_close(torch.stack(list(optimizer.last_losses)), want, rtol=1e-5, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure, batched=batched)  # said once
    assert len(calls) == 1


def test_rules_that_try_points_of_several_directions():
    """A trial moves along all directions at once."""

    def losses(**options):
        torch.manual_seed(2)
        model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(5, 6)
        options |= {"directions": 2, "direction": FreshFactors(2)}
        optimizer = ZOConservative(model.named_parameters(), 0.1, 0.05, **options)
        optimizer.step(lambda: model(x).square().mean())
        return torch.stack(list(optimizer.last_losses))

    torch.testing.assert_close(losses(restore="products"), losses(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("limit", "one", "two", "members", "step", "found"),
    [
        (100, 10, 14, 8, 1, 8),  # all of them
        (100, 40, 60, 32, 1, 4),  # 40, 60, 80, 100
        (100, 40, 60, 9, 1, 3),  # four fit: three forwards, shared out evenly
        (100, 40, 60, 6, 2, 2),  # three each, but pairs stay together
        (60, 40, 60, 12, 2, 2),
        (59, 40, 60, 12, 2, 1),
        (39, 40, 60, 12, 1, 1),  # not even one
        (100, 0, 0, 5, 1, 5),  # nothing was seen
    ],
)
def test_members_within_a_limit(limit, one, two, members, step, found):
    assert members_within(limit, one, two, members, step) == found


def test_scratch_bounds_the_members_of_a_forward(tmp_path):
    """A member's hidden values take 64 x 1024 fp32 numbers, twice where the ReLU makes its own of them."""
    each = 2 * 64 * 1024 * 4
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(16, 1024), nn.ReLU(), nn.Linear(1024, 1)).state_dict()
    x = torch.randn(64, 16)

    def run(name, **options):
        model, sizes = nn.Sequential(nn.Linear(16, 1024), nn.ReLU(), nn.Linear(1024, 1)), []
        model.load_state_dict(start)
        log = {"trajectory": tmp_path / name, "restore": "products"}
        optimizer = EGGROLL(model.named_parameters(), 0.1, 0.05, rank=2, directions=6, **log, **options)

        def closure(cohort):
            sizes.append(len(cohort))
            return cohort.mean(model(cohort.repeat(x)).square())

        optimizer.step(closure, batched=True)
        optimizer.trajectory.close()
        return sizes, torch.stack(list(optimizer.last_losses)), read(tmp_path / name).header["cohort"]

    sizes, losses, header = run("all")
    assert (sizes, header) == ([1, 2, 12], 12)
    for scratch, size in ((int(4.7 * each), 4), (int(2.7 * each), 2), (int(40 * each), 12)):
        sizes, own, header = run(str(size), scratch=scratch)
        assert (sizes, header) == ([1, 2] + [size] * (12 // size), size)
        torch.testing.assert_close(own, losses, rtol=1e-4, atol=1e-6)
    assert run("both", scratch=40 * each, cohort=3)[0] == [1, 2, 3, 3, 3, 3]
    with pytest.warns(UserWarning, match="members run one by one: a forward of one takes .* of scratch"):
        assert run("none", scratch=each // 2)[0] == [1, 2] + [1] * 12


def test_baselines_and_groups():
    """Written from the formulas: (x - x_0) / (std + 1e-8), and the mean of each group."""
    x = torch.tensor([3.0, 1.0, 4.0, 1.5, 9.0], dtype=torch.float64)
    g = Population(4, baseline=True).coefficients(x, 0.1)
    torch.testing.assert_close(g, (x[1:] - 3.0) / (x[1:].std(correction=0) + 1e-8) / 4)
    assert Population(4, baseline=True).points() == [(0, 0), (0, 1), (1, 1), (2, 1), (3, 1)]
    assert Population(4, baseline=True).loss(x) == x[1:].mean()
    g = Population(4, "variance", group=2, maximize=True).coefficients(x[1:], 0.1)
    rewards = torch.tensor([1.0, 4.0, 1.5, 9.0], dtype=torch.float64)
    centred = rewards - torch.tensor([2.5, 2.5, 5.25, 5.25], dtype=torch.float64)
    torch.testing.assert_close(g, -centred / (rewards.var(correction=0) + 1e-5).sqrt() / 4)
    with pytest.raises(ValueError, match="Population: baseline, group: expected another shaping"):
        Population(4, "ranks", baseline=True)
    with pytest.raises(ValueError, match="Population: group: expected a divisor of the 4 members"):
        Population(4, group=3)


def test_errors():
    model = nn.Linear(3, 2)
    named = lambda: model.named_parameters()
    with pytest.raises(ValueError, match="ZOSGD: restore: expected a direction of low rank"):
        ZOSGD(named(), 0.1, restore="products")
    with pytest.raises(ValueError, match="LOZO: restore: expected a direction of low rank, of at most 64"):
        LOZO(named(), 0.1, rank=65, restore="products")
    with pytest.raises(ValueError, match="LOZO: cohort: expected an integer >= 1"):
        LOZO(named(), 0.1, restore="products", cohort=0)
    with pytest.raises(ValueError, match="LOZO: batched: expected restore='products', got 'exact'"):
        LOZO(named(), 0.1).step(lambda c: [0.0] * len(c), batched=True)
    x, optimizer = torch.randn(4, 3), LOZO(named(), 0.1, restore="products")
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"LOZO: closure: expected a loss of each member, shape \(2,\)"):
        optimizer.step(lambda c: model(c.repeat(x)).mean(), batched=True)
    with pytest.raises(TypeError, match="LOZO: closure: expected 2 losses, one of each member"):
        optimizer.step(lambda c: model(c.repeat(x)).mean().item(), batched=True)
    with pytest.raises(HiddenParameters, match="LOZO: closure: expected torch functions that take"):
        optimizer.step(lambda c: torch.zeros(len(c)), batched=True)
    with pytest.raises(ValueError, match="Cohort: counts: expected 2 numbers of rows with the sum 4"):
        optimizer.step(lambda c: c.mean(model(c.rows(x, [1, 2]))), batched=True)
    with pytest.raises(RuntimeError, match="does not write to its parameters"):
        optimizer.step(lambda c: setattr(model.weight, "data", torch.zeros(2, 3)), batched=True)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert type(model.weight) is nn.Parameter
