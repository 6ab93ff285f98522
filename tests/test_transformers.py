"""ZOTrainer against a MeZO loop by hand, and what a Trainer's arguments and extensions do in it."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import zokernels
from zokernels.optim import (
    FZOO,
    LOZO,
    ZOCGE,
    ZOSGD,
    ForwardGradient,
    HiZOO,
    SparseMeZO,
    ZOAdamW,
    ZOConservative,
    groups_without,
)
from zokernels.trajectory import read

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from hf_cases import bert, llama, opt, rows, same, trainer, weights  # noqa: E402

from zokernels.integrations.transformers import ZOTrainer  # noqa: E402


class Batches(list):
    """A data collator, and all that it has made."""

    def __call__(self, examples):
        self.append(transformers.default_data_collator(examples))
        return self[-1]


class Watch(transformers.TrainerCallback):
    """RNG state before each step, and the weights at each event of a step."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.rng, self.events = model, [], []

    def _note(self, event: str) -> None:
        self.events.append((event, weights(self.model)))

    def on_step_begin(self, *args, **kwargs):
        self.rng.append(torch.get_rng_state())
        self._note("begin")

    def on_substep_end(self, *args, **kwargs):
        self._note("substep")

    def on_pre_optimizer_step(self, *args, **kwargs):
        self._note("before")

    def on_optimizer_step(self, *args, **kwargs):
        self._note("after")


def mezo_by_hand(model, batches, states, rate, loss_of, *, seed, eps=1e-3, steps):
    """Plain MeZO: every weight gets its own noise from a seed, three times, and a copy puts it back."""
    model.train()
    parameters, losses = dict(model.named_parameters()), []
    with torch.no_grad():
        for step in range(steps):
            z_seed = int(zokernels.derive_seed(seed, step, 0))
            base, sides = weights(model), []
            for sign in (1, -1):
                for name, p in parameters.items():
                    p.copy_(base[name])
                    zokernels.combine_(p, z_seed, sign * eps, streams=zokernels.stream_of(name))
                torch.set_rng_state(states[step])
                sides.append(loss_of(model, batches[step]).double())
            g = float(((sides[0] - sides[1]) / (2 * eps)).float())
            for name, p in parameters.items():
                p.copy_(base[name])
                stream = zokernels.stream_of(name)
                zokernels.combine_(p, z_seed, -rate(step) * g, streams=stream, rounding="stochastic",
                                   rounding_seed=z_seed)  # fmt: skip
            losses.append(torch.stack(sides))
    return losses


CASES = {
    "OPT with dropout": (lambda: opt(0.1), False, {}),
    "Llama, tied": (llama, False, {}),
    "BERT with dropout": (bert, True, {}),
    "OPT in bf16": (lambda: opt().bfloat16(), False, {}),
    "Llama under autocast": (llama, False, {"bf16": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_is_mezo_by_hand(case, tmp_path):
    """The same losses and weights, bit for bit; batches of two, four and, at the end of an epoch, one of
    them.
    """
    build, classes, options = CASES[case]
    data, model, twin, taken = rows(18, classes), build(), build(), Batches()
    watch = Watch(model)
    ours = trainer(
        tmp_path, model, data, own={"callbacks": [watch], "data_collator": taken},
        gradient_accumulation_steps=4, num_train_epochs=2, max_steps=-1, **options,
    )  # fmt: skip
    seen = []
    ours.add_callback(type("Losses", (transformers.TrainerCallback,), {
        "on_optimizer_step": lambda self, *a,
        **k: seen.append(torch.stack(ours.zo_optimizer.last_losses).double())
    }))  # fmt: skip
    ours.train()
    assert len(taken) == 18
    steps = [taken[0:4], taken[4:8], taken[8:9], taken[9:13], taken[13:17], taken[17:18]]

    def loss_of(model, batches):
        """The mean over the step's labels."""
        total = 0.0
        labels = [b["labels"] if classes else b["labels"][:, 1:] for b in batches]
        count = sum(int((label != -100).sum()) for label in labels)
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in options, cache_enabled=False):
                if classes:
                    total = total + model(**batch).loss / len(batches)
                else:
                    total = total + model(**batch, num_items_in_batch=torch.tensor(count)).loss
        return total

    rate = lambda step: 1e-2 * (1 - step / 6)
    losses = mezo_by_hand(twin, steps, watch.rng, rate, loss_of, seed=7, steps=6)
    assert all(torch.equal(a, b) for a, b in zip(seen, losses, strict=True))
    assert same(weights(model), weights(twin))
    assert not same(weights(model), weights(build()))
    assert all(p.grad is None for p in model.parameters())
    logged = [entry["loss"] for entry in ours.state.log_history if "loss" in entry]
    assert logged == pytest.approx([float(sides.float().mean()) for sides in losses], rel=1e-6)


METHODS = {
    "FZOO": (FZOO, {"directions": 3}),
    "ZOAdamW": (ZOAdamW, {"lr": 1e-3}),
    "HiZOO": (HiZOO, {}),
    "SparseMeZO": (SparseMeZO, {"density": 0.5}),
    "LOZO": (LOZO, {"rank": 2}),
    "ZOConservative": (ZOConservative, {}),
    "ForwardGradient": (ForwardGradient, {}),
    "in place": (ZOSGD, {"restore": "inplace", "directions": 2}),
    "ZOCGE": (ZOCGE, {"per_step": 3}),
    "a function": (lambda params, lr, seed: ZOSGD(params, lr, 1e-2, seed=seed + 1), {}),
}


@pytest.mark.parametrize("method", METHODS)
def test_any_method(method, tmp_path):
    """The optimizer by itself, with the same batches, gives the same weights."""
    kind, options = METHODS[method]
    model, twin, taken = bert(0.0), bert(0.0), Batches()
    own = {"optimizer_cls_and_kwargs": (kind, options), "data_collator": taken}
    ours = trainer(tmp_path, model, rows(8, True), own=own, max_steps=2, lr_scheduler_type="constant")
    ours.train()
    assert all(p.grad is None for p in model.parameters())
    optimizer = kind(twin.named_parameters(), **{"lr": 1e-2, "seed": 7} | options)
    twin.train()
    for batch in taken[:2]:
        optimizer.step(lambda: twin(**batch).loss)  # noqa: B023
    assert type(ours.zo_optimizer) is type(optimizer)
    assert ours.zo_optimizer.step_count == optimizer.step_count == 2
    assert torch.equal(ours.zo_optimizer.last_loss, optimizer.last_loss)
    assert same(weights(model), weights(twin))


@pytest.mark.parametrize("restore", ["exact", "inplace"])
def test_gradients_for_the_head_beside_forwards_for_the_rest(restore, tmp_path):
    """A hybrid optimizer by itself gives the same weights; a checkpoint holds both parts, the log one."""

    def make(module):
        def made(groups, **options):
            head = torch.optim.AdamW(module.classifier.parameters(), lr=1e-2)
            return ZOSGD(groups_without(groups, head), first_order=head, restore=restore, **options)

        return made

    model, twin, rest, taken = bert(0.0), bert(0.0), bert(0.0), Batches()
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}

    def run(module, **more):
        own = {"optimizer_cls_and_kwargs": (make(module), {}), "trajectory": tmp_path / "run.zk"}
        return trainer(tmp_path, module, rows(8, True), own=own | more, **options)

    ours = run(model, data_collator=taken)
    ours.train()
    assert all(p.grad is None for p in model.parameters())
    optimizer = make(twin)(twin.named_parameters(), lr=1e-2, seed=7)
    twin.train()
    for batch in taken[:4]:
        optimizer.step(lambda: twin(**batch).loss)  # noqa: B023
    assert same(weights(model), weights(twin))
    assert not torch.equal(model.classifier.weight, bert(0.0).classifier.weight)
    assert read(tmp_path / "run.zk").header["part"] is True
    assert read(tmp_path / "run.zk").steps == 4
    ours.zo_optimizer.trajectory.close()
    run(rest).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(model), weights(rest))


def test_weight_decay_leaves_out_what_the_trainer_does(tmp_path):
    model = opt()
    ours = trainer(tmp_path, model, rows(4), weight_decay=0.1)
    decayed, kept = ours.create_optimizer().param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert all(("bias" in n) or ("norm" in n) for n in kept["param_names"])
    assert not any(("bias" in n) or ("norm" in n) for n in decayed["param_names"])
    assert sorted(decayed["param_names"] + kept["param_names"]) == sorted(
        n for n, _ in model.named_parameters()
    )
    assert len(trainer(tmp_path, opt(), rows(4)).create_optimizer().param_groups) == 1


def test_callbacks_see_the_step_where_they_expect_it(tmp_path):
    model = opt()
    watch = Watch(model)
    trainer(
        tmp_path, model, rows(8), own={"callbacks": [watch]}, gradient_accumulation_steps=2, max_steps=2
    ).train()
    assert [event for event, _ in watch.events] == ["begin", "substep", "before", "after"] * 2
    states = [state for _, state in watch.events]
    assert all(same(states[i], states[0]) for i in range(3))
    assert not same(states[2], states[3])
    assert same(states[3], states[6])
    assert not same(states[6], states[7])


def first_losses(folder, model, data, *, kind=ZOTrainer, own=None, **options):
    ours = trainer(folder, model, data, kind, own=own, max_steps=1, **options)
    ours.train()
    return ours, ours.zo_optimizer.last_losses


def test_losses_of_the_users_own(tmp_path):
    """compute_loss, compute_loss_func, training_step and label smoothing act as under backward."""

    class Custom(ZOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).logits.float().square().mean() + 0.0 * inputs.pop("labels").sum()

    class Step(ZOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            for factor in (0.25, 0.75):
                self.accelerator.backward(factor * custom(model(**inputs).logits, None))

    data = rows(4)
    batch = transformers.default_data_collator(data)
    custom = lambda logits, labels: logits.float().square().mean()
    func = lambda outputs, labels, num_items_in_batch: custom(outputs.logits, labels)
    cases = [
        (first_losses(tmp_path, opt(), data, kind=Custom, per_device_train_batch_size=4), custom),
        (first_losses(tmp_path, opt(), data, kind=Step, per_device_train_batch_size=4), custom),
        (
            first_losses(
                tmp_path, opt(), data, own={"compute_loss_func": func}, per_device_train_batch_size=4
            ),
            custom,
        ),
        (
            first_losses(tmp_path, opt(), data, label_smoothing_factor=0.1, per_device_train_batch_size=4),
            lambda logits, labels: nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
            ),
        ),
    ]
    for (ours, losses), expected in cases:
        twin = opt()
        optimizer = ZOSGD(twin.named_parameters(), 1e-2, seed=7)
        optimizer.step(lambda: expected(twin(batch["input_ids"]).logits, batch["labels"]))  # noqa: B023
        torch.testing.assert_close(torch.stack(losses), torch.stack(optimizer.last_losses), rtol=2e-6, atol=0)
        assert math.isfinite(ours.state.log_history[0]["loss"])


def test_eval_mode_has_no_dropout(tmp_path):
    data, modes = rows(4), []
    hook = lambda module, *_: modes.append(module.training)
    for eval_mode, dropout in ((True, 0.5), (False, 0.5)):
        model = opt(dropout)
        model.model.decoder.layers[0].register_forward_pre_hook(hook)
        _, losses = first_losses(
            tmp_path, model, data, own={"eval_mode": eval_mode}, per_device_train_batch_size=4
        )
        _, without = first_losses(tmp_path, opt(0.0), data, per_device_train_batch_size=4)
        assert torch.equal(torch.stack(losses), torch.stack(without)) is eval_mode
    assert modes == [False, False, True, True]
    assert model.train() is model
    assert model.training


def test_logs(tmp_path):
    data = rows(8)
    ours = trainer(
        tmp_path, opt(), data, logging_steps=2, own={"eval_dataset": data[:2]}, eval_strategy="steps"
    )
    ours.train()
    steps = [entry for entry in ours.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [2, 4]
    for entry in steps:
        difference = (entry["loss_plus"] - entry["loss_minus"]) / 2e-3
        assert entry["projected_gradient"] == pytest.approx(difference, rel=1e-6)
        assert entry["skipped_steps"] == 0
        assert entry["steps_per_second"] > 0
        assert "grad_norm" not in entry
    low, high = sorted((steps[1]["loss_plus"], steps[1]["loss_minus"]))
    assert low <= float(ours.zo_optimizer.last_loss) <= high
    assert sum("eval_loss" in entry for entry in ours.state.log_history) == 2
    # two forwards instead of a forward and a backward of twice its cost
    assert ours.floating_point_ops({"input_ids": torch.zeros(2, 5)}) == 4 * 10 * ours.model.num_parameters(
        exclude_embeddings=True
    )


def test_a_loss_that_is_not_finite_skips_the_step(tmp_path):
    class Broken(ZOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return loss * float("nan") if self.state.global_step == 1 else loss

    model, states = opt(), []
    ours = trainer(tmp_path, model, rows(8), Broken, max_steps=3)
    ours.add_callback(type("States", (transformers.TrainerCallback,), {
        "on_step_end": lambda self, *a, **k: states.append(weights(model))
    }))  # fmt: skip
    with pytest.warns(UserWarning, match="1 step.s. skipped: loss not finite"):
        ours.train()
    assert same(states[0], states[1])
    assert not same(states[1], states[2])
    assert [entry["skipped_steps"] for entry in ours.state.log_history if "loss" in entry] == [0, 1, 1]
    assert all(math.isfinite(entry["loss"]) for entry in ours.state.log_history if "loss" in entry)


def test_a_compiled_model_stays_compiled(tmp_path, monkeypatch):
    """With graphs that run as they are, its weights are those of the plain model; each is compiled once."""
    for name, value in (("BACKEND", "no"), ("MODE", "default")):  # the Trainer's arguments set them
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", value)
    torch._dynamo.reset()
    counts = []
    graphs = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    note = type("Note", (transformers.TrainerCallback,), {
        "on_step_end": lambda self, *a, **k: counts.append(graphs())
    })  # fmt: skip
    plain, model, before = opt(), opt(), graphs()
    trainer(tmp_path / "plain", plain, rows(8), max_steps=3).train()
    ours = trainer(
        tmp_path / "compiled", model, rows(8), max_steps=3, torch_compile=True, torch_compile_backend="eager"
    )
    ours.add_callback(note)
    ours.train()
    torch._dynamo.reset()
    assert ours.zo_optimizer.restore == "exact"
    assert same(weights(model), weights(plain))
    assert counts[0] > before
    assert counts == counts[:1] * 3


def test_what_cannot_work_says_so(tmp_path):
    data = rows(4)
    adam = lambda params, lr, seed: torch.optim.AdamW(params, lr)
    with pytest.raises(TypeError, match=r"ZOTrainer: optimizer: expected one of zokernels\.optim, got AdamW"):
        trainer(tmp_path, opt(), data, own={"optimizer_cls_and_kwargs": (adam, {})}).train()
    with pytest.warns(UserWarning, match="max_grad_norm=0.5 has no effect"):
        trainer(tmp_path, opt(), data, max_grad_norm=0.5)
    for options, own, text in (
        ({"optim": "sgd"}, {}, "optim=sgd has no effect: optimizer_cls_and_kwargs"),
        ({"adam_beta2": 0.5}, {}, "adam_beta2=0.5 has no effect"),
        ({"learning_rate": 0.1}, {"lr": 0.01}, "learning_rate=0.1 has no effect: the lr=0.01 of"),
    ):
        pair = {"optimizer_cls_and_kwargs": (ZOSGD, own)}
        with pytest.warns(UserWarning, match=text) as told:
            trainer(tmp_path, opt(), data, own=pair, **options)
        assert len(told) == 1
    with pytest.warns(UserWarning, match="the loss is in torch.bfloat16"):
        trainer(tmp_path, bert().bfloat16(), rows(4, True), max_steps=1).train()

    class Backward(ZOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            self.compute_loss(model, inputs).backward()

    class Nothing(ZOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return self.compute_loss(model, inputs)

    with pytest.raises(
        RuntimeError, match=r"^Backward: .*self.accelerator.backward\(loss\).*does not require grad$"
    ):
        trainer(tmp_path, opt(), data, Backward, max_steps=1).train()
    with pytest.raises(RuntimeError, match="Nothing: training_step: expected micro-batches whose loss"):
        trainer(tmp_path, opt(), data, Nothing, max_steps=1).train()


def test_optimizers_of_the_other_kind(tmp_path):
    """One of torch in a ZOTrainer is refused when it is made; one of ours in a plain Trainer at its step."""
    model, data = opt(), rows(4)
    theirs = torch.optim.AdamW(model.parameters(), 1e-3)
    with pytest.raises(TypeError, match=r"ZOTrainer: optimizers: expected an optimizer of zokernels\.optim"):
        trainer(tmp_path, model, data, own={"optimizers": (theirs, None)})
    with pytest.raises(TypeError, match=r"optimizer_cls_and_kwargs: expected a class of zokernels\.optim"):
        trainer(tmp_path, model, data, own={"optimizer_cls_and_kwargs": (torch.optim.AdamW, {})})
    before = weights(model)
    ours = ZOSGD(model.named_parameters(), lr=1e-3)
    for own, got in (
        ({"optimizers": ours}, "ZOSGD"),
        ({"optimizer_cls_and_kwargs": ZOSGD}, "ZOSGD"),
        ({"optimizer_cls_and_kwargs": (ZOSGD,)}, "a tuple of 1"),
        ({"optimizer_cls_and_kwargs": (ZOSGD, None)}, "NoneType as its second part"),
    ):
        with pytest.raises(TypeError, match=rf"ZOTrainer: \w+: expected a pair \(.*\), got {got}$"):
            trainer(tmp_path, model, data, own=own)
    with pytest.raises(TypeError, match=r"optimizer_cls_and_kwargs: expected a class of .*, got 'FZOO'$"):
        trainer(tmp_path, model, data, own={"optimizer_cls_and_kwargs": ("FZOO", {})})
    with pytest.raises(TypeError, match=r"ZOTrainer: optimizers: .* got the class ZOSGD$"):
        trainer(tmp_path, model, data, own={"optimizers": (ZOSGD, None)})
    with pytest.raises(TypeError, match=r"ZOSGD: closure: expected a function .* take ZOTrainer"):
        trainer(tmp_path, model, data, transformers.Trainer, own={"optimizers": (ours, None)}).train()
    assert same(weights(model), before)


def test_the_trainers_default_learning_rate_is_told(tmp_path):
    default = transformers.TrainingArguments(str(tmp_path)).learning_rate
    with pytest.warns(UserWarning, match="learning_rate=5e-05 is the Trainer's default") as told:
        trainer(tmp_path, opt(), rows(4), learning_rate=default, max_steps=1).train()
    assert "find_lr" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = {"optimizer_cls_and_kwargs": (ZOSGD, {"lr": 1e-3})}
        trainer(tmp_path, opt(), rows(4), learning_rate=default, max_steps=1, own=given).train()


def test_arguments_that_mean_nothing_are_let_be(tmp_path, recwarn):
    ours = trainer(tmp_path, opt(), rows(4), activation_checkpointing=True, max_steps=1)
    ours.train()
    assert not ours.model.is_activation_checkpointing
    # of the default max_grad_norm, for example
    assert not [w for w in recwarn if "ZOTrainer" in str(w.message)]
