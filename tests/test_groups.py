"""Parameter groups that are added, removed, reordered or edited by hand; states and names of parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from zokernels.optim import ZOSGD, ZOAdamW

KINDS = {
    "plain": lambda groups: ZOSGD(groups, lr=0.1),
    "momentum": lambda groups: ZOSGD(groups, lr=0.1, momentum=0.9),
    "window": lambda groups: ZOSGD(groups, lr=0.1, momentum=0.9, window=3),
    "Adam": lambda groups: ZOAdamW(groups, lr=0.1),
}
KIND = pytest.mark.parametrize("kind", KINDS)


def parameters(count=3):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(5)) for _ in range(count)]


def groups_of(params):
    return [{"params": [(f"p{i}", p)]} for i, p in enumerate(params)]


def take(optimizer, params, steps=1):
    for _ in range(steps):
        optimizer.step(lambda: sum(p.square().sum() for p in params))


def same(ours, theirs):
    return all(map(torch.equal, ours, theirs))


@KIND
def test_the_dicts_of_the_caller_stay_as_they_are(kind):
    params = parameters()
    given = groups_of(params[:2])
    given[1]["lr"] = 0.2
    before = [dict(group, params=list(group["params"])) for group in given]
    optimizer = KINDS[kind](given)
    added = {"params": [("p2", params[2])], "eps": 0.5}
    optimizer.add_param_group(added)
    assert given == before
    assert added == {"params": [("p2", params[2])], "eps": 0.5}
    broken = {"params": [("p3", nn.Parameter(torch.ones(2))), ("p2", nn.Parameter(torch.ones(2)))]}
    kept = dict(broken)
    with pytest.raises(ValueError, match="one stream for each parameter"):
        optimizer.add_param_group(broken)
    assert broken == kept
    take(optimizer, params)
    state = optimizer.state_dict()
    text = str(state)
    KINDS[kind](groups_of(parameters())).load_state_dict(state)
    assert str(state) == text


@KIND
def test_reordered_groups_keep_their_history(kind):
    ours, theirs = parameters(), parameters()
    one, other = KINDS[kind](groups_of(ours)), KINDS[kind](groups_of(theirs))
    take(one, ours, 2)
    take(other, theirs, 2)
    other.param_groups.reverse()
    take(one, ours, 2)
    take(other, theirs, 2)
    assert same(ours, theirs)


@KIND
def test_a_group_that_goes_leaves_the_others_their_history(kind):
    """The rest goes on as in a run in which the group is frozen, also through a checkpoint."""
    ours, theirs = parameters(), parameters()
    one, other = KINDS[kind](groups_of(ours)), KINDS[kind](groups_of(theirs))
    take(one, ours, 2)
    take(other, theirs, 2)
    gone = one.param_groups.pop(0)
    theirs[0].requires_grad_(False)
    take(one, ours)
    take(other, theirs)
    assert same(ours, theirs)
    again = copy.deepcopy(ours)
    resumed = KINDS[kind](groups_of(again)[1:])
    resumed.load_state_dict(one.state_dict())
    take(resumed, again, 2)
    take(one, ours, 2)
    take(other, theirs, 2)
    assert same(ours, theirs)
    assert same(ours[1:], again[1:])
    one.param_groups.insert(0, gone)  # it comes back
    theirs[0].requires_grad_(True)
    if kind != "window":  # whose kept numbers belong to the group, and went with it
        take(one, ours)
        take(other, theirs)
        assert same(ours, theirs)


@KIND
def test_an_added_group_begins_its_own_history(kind):
    params = parameters()
    optimizer = KINDS[kind](groups_of(params[:2]))
    take(optimizer, params[:2], 2)
    optimizer.add_param_group({"params": [("p2", params[2])]})
    take(optimizer, params)
    again = copy.deepcopy(params)
    resumed = KINDS[kind](groups_of(again))
    resumed.load_state_dict(optimizer.state_dict())
    take(optimizer, params, 2)
    take(resumed, again, 2)
    assert same(params, again)


def _append_a_group(optimizer, new):
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [new]})


def _swap(optimizer, new):
    a, b = optimizer.param_groups[:2]
    a["params"], b["params"] = b["params"], a["params"]


BY_HAND = {
    "a group": (_append_a_group, "one stream for each parameter"),
    "a parameter more": (
        lambda o, new: o.param_groups[0]["params"].append(new),
        r"'streams'\]: expected 2 int",
    ),
    "a parameter less": (
        lambda o, new: o.param_groups[0]["params"].pop(),
        r"'streams'\]: expected 0 integers",
    ),
    "a name less": (
        lambda o, new: o.param_groups[0]["param_names"].pop(),
        r"'param_names'\]: expected 1 names",
    ),
    "swapped": (_swap, r"'p0': expected stream \d+, as before"),
}


@KIND
@pytest.mark.parametrize("edit", BY_HAND)
def test_edits_by_hand_that_cannot_be_followed_are_told(kind, edit):
    params = parameters(4)
    optimizer = KINDS[kind](groups_of(params[:3]))
    take(optimizer, params, 2)
    before = [p.detach().clone() for p in params]
    change, message = BY_HAND[edit]
    change(optimizer, params[3])
    with pytest.raises(ValueError, match=message):
        take(optimizer, params)
    assert optimizer.step_count == 2
    assert same(params, before)


def test_aliases_are_named():
    w, frozen = torch.zeros(8), nn.Parameter(torch.ones(3), requires_grad=False)
    a, b = nn.Parameter(w[:6]), nn.Parameter(w[4:])
    for groups in (
        [("frozen", frozen), ("first", a), ("second", b)],
        [{"params": [("frozen", frozen), ("first", a)]}, {"params": [("second", b)]}],
    ):
        with pytest.raises(ValueError, match=r"'second': .* share no memory .* got overlap with 'first'"):
            ZOSGD(groups, lr=0.1).step(lambda: a.sum() + b.sum())
    with pytest.raises(ValueError, match=r"params\[2\]: .* got overlap with params\[1\]"):
        ZOSGD([frozen, a, b], lr=0.1).step(lambda: a.sum() + b.sum())
    with pytest.raises(ValueError, match=r"each parameter once .* got one as 'in' and as 'out'"):
        ZOSGD([("in", a), ("between", frozen), ("out", a)], lr=0.1)


# Checkpoints of others -----------------------------------------------------------------------------------


@KIND
def test_accelerate_saves_and_loads_the_run(kind, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    x = torch.ones(2, 3)

    def made(value):
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(cpu=True)
        torch.manual_seed(value)
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        optimizer = KINDS[kind]([{"params": list(model.named_parameters())}])
        return (accelerator, *accelerator.prepare(model, optimizer))

    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.step(lambda: model(x).square().sum())

    accelerator, model, optimizer = made(1)
    steps(model, optimizer, 3)
    accelerator.save_state(tmp_path)
    steps(model, optimizer, 2)
    other, again, resumed = made(2)
    steps(again, resumed, 1)
    other.load_state(tmp_path)
    assert resumed.optimizer.step_count == 3
    steps(again, resumed, 2)
    assert same(model.parameters(), again.parameters())


@pytest.fixture
def lightning():
    import logging

    module = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return module


def fit(lightning, kind, folder, *, automatic, steps, resume=None, **options):
    """The module and its optimizer after ``steps`` steps of a Trainer."""

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model, self.automatic_optimization = nn.Linear(3, 1), automatic

        def training_step(self, batch, index):
            loss = lambda: self.model(batch).square().mean()
            return loss() if automatic else self.optimizers().step(loss)

        def configure_optimizers(self):
            return KINDS[kind]([{"params": list(self.model.named_parameters())}])

    module, batches = Module(), torch.utils.data.DataLoader(torch.ones(20, 3), 2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", enable_checkpointing=False, **quiet, **options
    )
    trainer.fit(module, batches, ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return module, trainer.optimizers[0]


@pytest.mark.filterwarnings("ignore")
@KIND
def test_lightning_saves_and_loads_the_run(kind, tmp_path, lightning):
    fit(lightning, kind, tmp_path, automatic=False, steps=2)
    whole, _ = fit(lightning, kind, tmp_path, automatic=False, steps=4)
    again, resumed = fit(lightning, kind, tmp_path, automatic=False, steps=4, resume=tmp_path / "2.ckpt")
    assert resumed.step_count == 4
    assert same(whole.parameters(), again.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("automatic", [True, False])
def test_lightning_may_not_accumulate(automatic, tmp_path, lightning):
    """Lightning itself refuses it in manual optimization; in automatic one the run without is right."""
    error, message = (
        (ValueError, "accumulate_grad_batches: expected 1") if automatic else (Exception, "manual")
    )
    with pytest.raises(error, match=message):
        fit(lightning, "plain", tmp_path, automatic=automatic, steps=2, accumulate_grad_batches=2)
    ours, _ = fit(lightning, "plain", tmp_path, automatic=True, steps=2)
    theirs, _ = fit(lightning, "plain", tmp_path, automatic=False, steps=2)
    assert same(ours.parameters(), theirs.parameters())
