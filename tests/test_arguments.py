"""What optimizers take, say of themselves, and refuse, and by which names."""

from __future__ import annotations

import copy
import inspect
import re
import subprocess
import sys
import warnings
from collections import OrderedDict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import zokernels
from zokernels import optim
from zokernels.optim import (
    EGGROLL,
    ES,
    FZOO,
    LOZO,
    PGAP,
    SGD,
    ZOBCD,
    ZOSGD,
    ConMeZO,
    GivenMask,
    KeptRight,
    LayerSkip,
    LeZO,
    MagnitudeMask,
    MeZOGV,
    SubZero,
    TeZO,
    TwoSided,
    ZerothOrder,
    ZOAdamW,
    ZORankSearch,
    ZORankSGD,
)
from zokernels.optim.arguments import Options

CLASSES = {
    name: value
    for name in optim.__all__
    if inspect.isclass(value := getattr(optim, name)) and issubclass(value, ZerothOrder)
}


@pytest.fixture
def model():
    return nn.Linear(3, 4)


def named(inner: str) -> type[ValueError | TypeError]:
    return pytest.raises((ValueError, TypeError), match=f"^{re.escape(inner)}")


# Signatures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_every_argument_has_a_name(name):
    """None is hidden behind *args or **options, and none stands there twice."""
    parameters = inspect.signature(CLASSES[name]).parameters
    kinds = {p.kind for p in parameters.values()}
    assert kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    assert {"params", "lr", "eps", "seed", "weight_decay", "rounding"} <= parameters.keys()
    assert all(p.annotation is not p.empty for p in parameters.values())


@pytest.mark.parametrize("name", CLASSES)
def test_help_tells_every_argument(name):
    """Once, in the class's own docstring or in the sentence that it takes over from the base class."""
    told = [
        argument
        for names in re.findall(r"^ {4}(\w[\w, ]*): ", inspect.getdoc(CLASSES[name]), re.MULTILINE)
        for argument in names.split(", ")
    ]
    assert sorted(set(told)) == sorted(told)
    assert set(inspect.signature(CLASSES[name]).parameters) <= set(told)


def test_the_shared_arguments_are_those_of_the_base():
    """The table that type checkers read, and the constructor that takes the arguments, agree."""
    base = inspect.signature(ZerothOrder).parameters
    own = {"params", "lr", "eps", "estimator", "rule"}
    assert {n: p.annotation for n, p in base.items() if n not in own} == {
        n: getattr(kind, "__forward_arg__", kind) for n, kind in Options.__annotations__.items()
    }


def test_defaults_are_those_of_the_class_that_has_them():
    of = lambda kind, name: inspect.signature(kind).parameters[name].default
    assert of(FZOO, "dist") == "rademacher"
    assert of(ZOSGD, "dist") == "normal"
    assert of(optim.QZO, "clip") == 100.0
    assert of(LOZO, "momentum") == 0.0
    assert of(ZOAdamW, "betas") == (0.9, 0.999)
    assert "direction" not in inspect.signature(LOZO).parameters
    assert "direction" in inspect.signature(LeZO).parameters
    assert "subset" not in inspect.signature(LeZO).parameters


def test_every_shared_argument_arrives(model):
    """What the signature promises is what the parts get."""
    optimizer = TeZO(model.named_parameters(), 1e-3, 2e-3, rank=2, directions=3, seed=5, weight_decay=0.1)
    assert (optimizer.seed, optimizer.estimator, optimizer.direction.rank) == (5, TwoSided(3), 2)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["eps"], group["weight_decay"]) == (1e-3, 2e-3, 0.1)
    assert LOZO(model.named_parameters(), 1.0, momentum=0.5).param_groups[0]["momentum"] == 0.5


def test_classes_of_users_keep_their_own_arguments(model):
    class Loose(ZOSGD):
        def __init__(self, params, lr, **options):
            self.extra = options.pop("extra", None)
            super().__init__(params, lr, **options)

    assert Loose(model.named_parameters(), 0.1, extra=3).extra == 3
    with pytest.raises(TypeError, match="zo_eps"):
        Loose(model.named_parameters(), 0.1, zo_eps=1e-3)


# Refusals ---------------------------------------------------------------------------------------------------

UNKNOWN = {
    "near": (ZOSGD, {"zo_eps": 1e-3}, "ZOSGD: zo_eps: expected 'eps', the nearest"),
    "of others": (ES, {"sigma": 1e-3}, "ES: sigma: expected 'eps', the nearest"),
    "typo": (ZOAdamW, {"weight_dcay": 0.1}, "ZOAdamW: weight_dcay: expected 'weight_decay'"),
    "another word": (LOZO, {"r": 4}, "LOZO: r: expected 'rank', the nearest"),
    "another name": (ES, {"directions": 4}, "ES: directions: expected 'population', the nearest"),
    "count": (ZOSGD, {"n": 4}, "ZOSGD: n: expected 'directions', the nearest"),
    "count of candidates": (MeZOGV, {"population": 4}, "MeZOGV: population: expected 'candidates', the"),
    "count of probes": (PGAP, {"num_perturbations": 4}, "PGAP: num_perturbations: expected 'probes', the"),
    "count of members": (ES, {"candidates": 4}, "ES: candidates: expected 'population', the nearest"),
    "inverse": (optim.SparseMeZO, {"sparsity": 0.8}, "SparseMeZO: sparsity: expected density = 1 - sparsity"),
    "far": (ZOSGD, {"betas": (0.9, 0.9)}, "ZOSGD: betas: expected one of its arguments (help(ZOSGD)"),
    "other methods'": (FZOO, {"sparsity": 0.1}, "FZOO: sparsity: expected one of its arguments (help(FZOO)"),
    "no match": (FZOO, {"qqqq": 1}, "FZOO: qqqq: expected one of its arguments (help(FZOO)"),
    "fixed": (LOZO, {"direction": None}, "LOZO: direction: expected nothing, because LOZO sets it"),
    "base": (ZerothOrder, {"momentum": 0.9, "estimator": TwoSided(), "rule": SGD()}, "ZerothOrder: momentum"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_argument(case, model):
    kind, options, message = UNKNOWN[case]
    with named(message) as error:
        kind(model.named_parameters(), lr=0.1, **options)
    assert error.type is TypeError


GROUPS = {
    "eps": ({"epz": 0.1}, "ZOSGD: params: a group's 'epz': expected 'eps', the nearest"),
    "decay": ({"weight_decy": 0.1}, "ZOSGD: params: a group's 'weight_decy': expected 'weight_decay'"),
}


@pytest.mark.parametrize("case", GROUPS)
def test_a_misspelt_key_of_a_group(case, model):
    keys, message = GROUPS[case]
    with named(message) as error:
        ZOSGD([{"params": model.named_parameters(), **keys}], lr=0.1)
    assert error.type is TypeError


def test_keys_of_the_users_own(model):
    """Schedulers and users keep their own values in groups."""
    keys = {"initial_lr": 1.0, "max_lr": 2.0, "min_lr": 0.0, "lr_scale": 3.0, "name": "head"}
    optimizer = ZOSGD([{"params": model.named_parameters(), **keys}], lr=0.1)
    assert {key: optimizer.param_groups[0][key] for key in keys} == keys


@pytest.mark.parametrize("what", ["model", "state_dict"])
def test_a_model_in_the_place_of_its_parameters(what, model):
    given = model if what == "model" else model.state_dict()
    with named("ZOSGD: params: expected the model's parameters (model.named_parameters()), got the whole"):
        ZOSGD(given, lr=0.1)


def test_to_go_on_without_a_log(model):
    with named("ZOSGD: resume: expected False without trajectory="):
        ZOSGD(model.named_parameters(), lr=0.1, resume=True)


NAMES = {
    "FZOO": (FZOO, {"directions": 1}, "FZOO: directions: "),
    "LOZO": (LOZO, {"rank": 0}, "LOZO: rank: "),
    "interval": (LOZO, {"interval": 0}, "LOZO: interval: "),
    "SubZero": (SubZero, {"interval": 0}, "SubZero: interval: "),
    "MeZOGV": (MeZOGV, {"candidates": 1}, "MeZOGV: candidates: "),
    "ranking": (ZORankSGD, {"candidates": 1}, "ZORankSGD: candidates: "),
    "population": (ES, {"population": 1}, "ES: population: "),
    "EGGROLL": (EGGROLL, {"shaping": "x"}, "EGGROLL: shaping: "),
    "probes": (PGAP, {"probes": 0}, "PGAP: probes: "),
    "window": (PGAP, {"interval": 0}, "PGAP: interval: "),
    "angle": (ConMeZO, {"angle": 9.0}, "ConMeZO: angle: "),
    "betas": (ZOAdamW, {"betas": (2.0, 0.9)}, "ZOAdamW: betas[0]: "),
    "order": (ZOBCD, {"order": "up"}, "ZOBCD: order: "),
    "factors": (LOZO, {"momentum": 0.5, "l2": 0.1}, "LOZO: l2: "),
    "text": (ZOSGD, {"direction": "low-rank"}, "ZOSGD: direction: expected one such as KeptRight(rank=4)"),
    "misspelt": (ZOSGD, {"direction": "magnitude_mask"}, "ZOSGD: direction: expected one such as Magnitude"),
    "class": (ZOSGD, {"direction": KeptRight}, "ZOSGD: direction: expected an instance: KeptRight(...)"),
    "subset": (ZOSGD, {"subset": LayerSkip}, "ZOSGD: subset: expected an instance: LayerSkip(...)"),
    "rule": (ZerothOrder, {"estimator": TwoSided(), "rule": "adam"}, "ZerothOrder: rule: expected one such"),
    "estimator": (ZerothOrder, {"estimator": TwoSided, "rule": SGD()}, "ZerothOrder: estimator: expected an"),
    "a part's own": (ZOSGD, {"direction": None, "estimator": "three-sided"}, "ZOSGD: estimator: "),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_a_wrong_argument_has_the_name_that_the_user_wrote(case, model):
    kind, options, message = NAMES[case]
    with named(message):
        kind(model.named_parameters(), lr=0.1, **options)


def test_a_part_that_the_user_made_keeps_its_name():
    with named("KeptRight: rank: "):
        KeptRight(rank=0)


def test_parameters_that_are_used_up(model):
    params = model.parameters()
    list(params)
    with named("ZOSGD: params: ") as error:
        ZOSGD(params, lr=0.1)
    assert "a generator that gave none (it was used up before" in str(error.value)
    with named("ZOSGD: params: "):
        ZOSGD([], lr=0.1)


def test_names_in_the_place_of_streams(model):
    theta = torch.ones(4)
    with named("noise: stream: expected an integer (zokernels.stream_of('a')"):
        zokernels.noise(4, seed=0, stream="a")
    with named("combine_: streams[0]: expected an integer (zokernels.stream_of('a')"):
        zokernels.combine_([theta], 1, 0.1, streams=["a"])
    with named("combine_: streams: expected an integer (zokernels.stream_of('a')"):
        zokernels.combine_([theta], 1, 0.1, streams="a")
    with named("streams_of: names: expected several names"):
        zokernels.streams_of("abc")
    with named("plan: streams[0]: "):
        zokernels.plan([theta], streams=["a"])
    with named("ZOSGD: streams[0]: expected an integer (zokernels.stream_of('a')"):
        ZOSGD([{"params": [nn.Parameter(theta)], "streams": ["a"]}], lr=0.1)
    assert torch.equal(theta, torch.ones(4))


def test_one_stream_of_two_tensors(model):
    """They have the same noise, which is rarely meant; pieces of one tensor have other indices."""
    tensors = [torch.ones(4), torch.zeros(3)]
    with pytest.warns(UserWarning, match="combine_: streams: tensors 0 and 1 have stream 5 at the") as told:
        zokernels.combine_(tensors, 1, 0.5, streams=[5, 5])
    assert told[0].filename == __file__
    assert torch.equal(tensors[0][:3] - 1, tensors[1]), "the same noise"
    with pytest.warns(UserWarning, match="plan: streams: tensors 0 and 1 have stream 5") as told:
        zokernels.plan(tensors, streams=[5, 5], offsets=[2, 0])
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zokernels.combine_(tensors, 1, 0.5, streams=[5, 5], offsets=[0, 4])
        zokernels.combine_([*tensors, torch.ones(0)], 1, 0.5, streams=[5, 6, 5])
    with named("combine_: streams: expected an integer for each tensor (zokernels.stream_of(name)"):
        zokernels.combine_(tensors, 1, 0.5)


CALLS = {
    "misspelt": (lambda t: zokernels.combine_(t, 7, 1.0, seed=7), "combine_: seed: expected 'seeds', the "),
    "not there": (lambda t: zokernels.combine(t, t, 7, 1.0, xyz=1), "combine: xyz: expected one of its arg"),
    "too few": (lambda t: zokernels.combine_(t, 7), "combine_: params, seeds, coeffs: expected all of them"),
    "too many": (lambda t: zokernels.combine_(t, 7, 1.0, 0), "combine_: params, seeds, coeffs: expected all"),
    "integers": (lambda t: zokernels.requantize_(t, 7, 1.0, bit=8), "requantize_: bit: expected "),
    "low rank": (lambda t: zokernels.low_rank_(t, stream=0), "low_rank_: stream: expected 'streams'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_calls_of_operations_with_wrong_arguments(case):
    """Under the operation's own name, and not that of a function behind it."""
    theta, (call, message) = torch.ones(4), CALLS[case]
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        call(theta)
    assert torch.equal(theta, torch.ones(4))


# Closures ---------------------------------------------------------------------------------------------------


class Output(OrderedDict):
    """As transformers' ModelOutput: a table with attributes."""

    @property
    def loss(self):
        return self["loss"]


CLOSURES = {
    "output": (lambda m, x: Output(loss=m(x).mean(), logits=m(x)), TypeError, "a Output: return its .loss"),
    "attribute": (lambda m, x: SimpleNamespace(loss=m(x).mean()), TypeError, "return its .loss"),
    "dict": (lambda m, x: {"loss": m(x).mean()}, TypeError, 'got a dict: return its ["loss"]'),
    "nothing": (lambda m, x: m(x) and None if False else None, TypeError, "got None: does it end with"),
    "tuple": (lambda m, x: (m(x).mean(), 1), TypeError, "got a tuple of 2: return the loss alone"),
    "backward": (lambda m, x: m(x).mean().backward(), RuntimeError, "without loss.backward()"),
    "members": (lambda m, x: m(x).mean(1), ValueError, "step(closure, batched=True)"),
    "iterator": (lambda m, x: next(iter(())), RuntimeError, "an iterator that it draws from is at its end"),
}  # fmt: skip


@pytest.mark.parametrize("restore", ["exact", "inplace"])
@pytest.mark.parametrize("case", CLOSURES)
def test_what_a_closure_may_not_do(case, restore, model):
    closure, kind, message = CLOSURES[case]
    optimizer, x = ZOSGD(model.named_parameters(), lr=0.1, restore=restore), torch.ones(2, 3)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(kind, match=r"^ZOSGD: closure: expected ") as error:
        optimizer.step(lambda: closure(model, x))
    assert message in str(error.value)
    assert optimizer.step_count == 0
    for p, own in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p, own)  # in place a restored weight may differ in its last bit


ARITIES = {
    "cohort": (lambda o, x: o.step(lambda cohort: cohort.mean(x)), "EGGROLL: closure: ", "batched=True"),
    "batched": (lambda o, x: o.step(lambda: x, batched=True), "EGGROLL: closure: ", "of the step's Cohort"),
    "find_lr": (lambda o, x: optim.find_lr(o, lambda b: b), "find_lr: closure: ", "batches= gives it"),
    "diagnose": (lambda o, x: o.diagnose(lambda b: b), "EGGROLL.diagnose: closure: ", "batches= gives it"),
    "batches": (lambda o, x: optim.find_lr(o, lambda: x, batches=[x]), "find_lr: closure: ", "of a batch"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARITIES)
def test_a_closure_of_too_few_or_too_many_arguments(case, model):
    act, begin, hint = ARITIES[case]
    optimizer = EGGROLL(model.named_parameters(), lr=0.1, restore="products")
    before = model.weight.detach().clone()
    with pytest.raises(TypeError, match=f"^{re.escape(begin)}expected a function") as error:
        act(optimizer, torch.ones(2, 3))
    assert hint in str(error.value)
    assert "positional argument" in str(error.value)
    assert torch.equal(model.weight, before)
    assert optimizer.step_count == 0


def test_errors_of_the_closure_stay_as_they_are(model):
    optimizer = ZOSGD(model.named_parameters(), lr=0.1)

    def closure(error):
        raise error

    for error in (RuntimeError("mine"), KeyError("mine"), ValueError("mine")):
        with pytest.raises(type(error)) as raised:
            optimizer.step(partial(closure, error))
        assert raised.value is error
    for wrong in (lambda: len(), lambda: model(), lambda: closure()):
        with pytest.raises(TypeError, match=r"^(?!ZOSGD)"):
            optimizer.step(wrong)


def test_a_step_of_a_loop_with_gradients(model):
    """Which is what a plain Trainer calls."""
    with pytest.raises(TypeError, match=r"ZOSGD: closure: .* got None.*ZOTrainer"):
        ZOSGD(model.named_parameters(), lr=0.1).step()


def test_transforms_of_torch_func(model):
    """Around a step they would hide its writes; inside the closure they are as good as anything."""
    optimizer, x = ZOSGD(model.named_parameters(), lr=0.1), torch.ones(2, 3)
    before = model.weight.detach().clone()
    for transform in (torch.func.vmap, torch.func.grad):
        argument = torch.ones(2) if transform is torch.func.vmap else torch.ones(())
        with pytest.raises(RuntimeError, match="ZOSGD: step: expected a call outside vmap, grad"):
            transform(lambda s: optimizer.step(lambda: model(x * s).mean()))(argument)
    assert torch.equal(model.weight, before)
    plain, mapped = (ZOSGD(copy.deepcopy(model).named_parameters(), lr=0.1) for _ in range(2))
    losses = []
    for each in (plain, mapped):
        weight, bias = each.param_groups[0]["params"]
        one = lambda row, weight=weight, bias=bias: nn.functional.linear(row, weight, bias)
        run = torch.func.vmap(one) if each is mapped else one
        losses.append(each.step(lambda run=run: run(x).square().mean()))
    torch.testing.assert_close(*losses)


def test_a_log_that_this_process_still_writes(tmp_path, model):
    first = ZOSGD(model.named_parameters(), lr=0.1, trajectory=tmp_path / "run.zk")
    with pytest.raises(RuntimeError, match=r"still writes \(its \.trajectory\.close\(\)"):
        ZOSGD(model.named_parameters(), lr=0.1, trajectory=tmp_path / "run.zk")
    first.trajectory.close()
    ZOSGD(model.named_parameters(), lr=0.1, trajectory=tmp_path / "run.zk", resume=True).trajectory.close()


# What is shown ----------------------------------------------------------------------------------------------


def test_print_shows_the_parts(model):
    optimizer = LOZO(model.named_parameters(), lr=1e-3, seed=7, restore="inplace")
    optimizer.step(lambda: model(torch.ones(2, 3)).mean())
    text = str(optimizer)
    for part in (
        "LOZO (",
        "estimator: TwoSided(directions=1)",
        "direction: KeptRight(rank=4, refresh=50, scaled=True)",
        "rule: SGD()",
        "restore: inplace",
        "seed: 7, step: 1",
        "2 tensors, 16 weights of float32",
        "lr: 0.001",
    ):
        assert part in text
    assert "weight'" not in text, "names of all parameters"


def test_no_message_and_no_part_shows_an_address(model):
    for name in optim.__all__:
        kind = getattr(optim, name)
        if inspect.isclass(kind) and issubclass(kind, (optim.Direction, optim.Rule)):
            assert kind.__repr__ is not object.__repr__, name
    assert (repr(optim.Direction()), repr(SGD())) == ("dense noise", "SGD()")
    with named("ZOSGD: restore: expected a direction of low rank, of at most ") as error:
        ZOSGD(model.named_parameters(), 0.1, restore="products")
    assert str(error.value).endswith("(as LOZO and EGGROLL have it), got dense noise")
    weights = [p.detach() for p in model.parameters()]
    assert repr(zokernels.plan(weights, streams=[0, 1])) == "a plan of 2 tensors, 16 elements"
    assert repr(optim.Cohort([0, 2])) == "Cohort(members=[0, 2])"


def test_print_is_as_short_for_large_parts():
    params = {f"layers.{i}.w": nn.Parameter(torch.ones(64, 64)) for i in range(100)}
    masks = {name: torch.ones(64, 64, dtype=torch.bool) for name in params}
    text = repr(ZOSGD(params.items(), 1e-3, direction=GivenMask(masks), subset=LayerSkip()))
    assert len(text) < 800
    assert "LayerSkip(" in text


def test_later_modules():
    """``zokernels.optim`` is there after ``import zokernels`` alone, which stays as light."""
    code = (
        "import sys, zokernels\n"
        "assert 'zokernels.optim' not in sys.modules and 'zokernels.offload' not in sys.modules\n"
        "assert {'optim', 'offload', 'combine_', 'noise'} <= set(dir(zokernels))\n"
        "import types\n"
        "modules = ('backends', 'functional', 'integrations', *zokernels._LATER)\n"
        "assert all(isinstance(getattr(zokernels, name), types.ModuleType) for name in modules)\n"
        "assert {*modules} <= set(dir(zokernels))\n"
        "assert 'transformers' not in sys.modules\n"
        "assert all(f'zokernels.{name}' in zokernels.__doc__ for name in zokernels._LATER)\n"
        "print(zokernels.optim.ZOSGD.__name__, zokernels.trajectory.read.__name__)\n"
        "try: zokernels.optimm\n"
        "except AttributeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "ZOSGD read\nmodule 'zokernels' has no attribute 'optimm'\n"


@pytest.mark.parametrize("module", ["optim", "offload", "trajectory", "distributed"])
def test_dir_is_what_is_public(module):
    found = getattr(zokernels, module)
    assert dir(found) == sorted(found.__all__)


def test_a_copy_keeps_what_its_class_adds(model):
    """Copies of classes with attributes of their own take the steps of the original."""
    x = torch.ones(2, 3)
    for optimizer in (
        ZORankSearch(model.named_parameters(), 1e-2, trials=3),
        MeZOGV(model.named_parameters(), 1e-2, restore="inplace"),
        SubZero(model.named_parameters(), 1e-2, rank=2),
        ZOSGD(model.named_parameters(), 1e-2, direction=MagnitudeMask(0.5)),
    ):
        own = copy.deepcopy(optimizer)
        assert own.replayable == optimizer.replayable
        (weight, bias) = own.param_groups[0]["params"]
        optimizer.step(lambda: model(x).square().mean())
        own.step(lambda: nn.functional.linear(x, weight, bias).square().mean())  # noqa: B023
        assert torch.equal(weight, model.weight)
