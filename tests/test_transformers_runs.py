"""ZOTrainer's runs: checkpoints, logs that replay, adapters, TRL, and other ways to use a Trainer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from case_process import TESTS, environment

from zokernels.offload import empty_weights
from zokernels.optim import ZOSGD, ZOAdamW
from zokernels.step.roles import Log
from zokernels.trajectory import read, record, replay_

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from hf_cases import arguments, bert, llama, opt, rows, same, trainer, weights  # noqa: E402

from zokernels.integrations.transformers import ZOTrainer, ZOTrainerMixin  # noqa: E402

STEPS = 5
OPTIMIZERS = {
    "MeZO": (ZOSGD, {"directions": 2}),
    "momentum": (ZOSGD, {"momentum": 0.9}),
    "Adam": (ZOAdamW, {"lr": 1e-3, "state_dtype": torch.bfloat16}),
    "in place": (ZOSGD, {"restore": "inplace"}),
}


def run(folder, optimizer, **options):
    """18 sentences in batches of 4, 4 and 1: three steps an epoch."""
    own = {"optimizer_cls_and_kwargs": OPTIMIZERS[optimizer], "trajectory": folder / "run.zk"}
    own["eval_dataset"] = rows(4)
    defaults = {
        "max_steps": STEPS,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    defaults |= {"eval_strategy": "steps", "eval_steps": 2, "warmup_steps": 2, "weight_decay": 0.1}
    return trainer(folder, opt(0.1).bfloat16(), rows(11), own=own, **defaults | options)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_runs_end_with_the_same_bits(optimizer, tmp_path):
    """Stopped in the middle of an epoch and at the end of one; the log is of the steps that led to the
    weights.
    """
    base, whole = opt(0.1).bfloat16(), run(tmp_path / "whole", optimizer)
    whole.train()
    log, final = (tmp_path / "whole" / "run.zk").read_bytes(), weights(whole.model)
    losses = lambda of: [entry["loss"] for entry in of.state.log_history if "loss" in entry]
    for step in (2, 3):
        folder = tmp_path / f"from {step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        (folder / "run.zk").write_bytes(log[:-30])  # a killed run has gone on behind its last checkpoint
        again = run(folder, optimizer)
        with torch.no_grad():
            for p in again.model.parameters():
                p.zero_()
        again.train(resume_from_checkpoint=True)
        assert same(weights(again.model), final)
        assert (folder / "run.zk").read_bytes() == log
        assert losses(again) == losses(whole)
        assert str(again.zo_optimizer.state_dict()) == str(whole.zo_optimizer.state_dict())
    replay_(base, tmp_path / "whole" / "run.zk")
    assert same(weights(base), final)
    assert read(tmp_path / "whole" / "run.zk").steps == STEPS


def test_a_run_that_begins_again_begins_its_log_again(tmp_path):
    """Killed before its first checkpoint."""
    run(tmp_path, "MeZO", save_strategy="no").train()
    log = (tmp_path / "run.zk").read_bytes()
    again = run(tmp_path, "MeZO", save_strategy="no", max_steps=3)
    again.train()
    assert read(tmp_path / "run.zk").steps == 3
    again.zo_optimizer.trajectory.close()
    other = run(tmp_path, "MeZO", save_strategy="no")
    with torch.no_grad():
        next(other.model.parameters())[0, 0] += 1
    with pytest.raises(ValueError, match=r"expected the base weights of the run \(SHA-256\)"):
        other.train()
    other.zo_optimizer.log = Log()
    (tmp_path / "run.zk").write_bytes(log)
    late = ZOSGD(opt().named_parameters(), 1e-2)
    for message, options in (
        ("one of them, got both", {"resume": True}),
        ("resume: estimator: expected that of", {}),
    ):
        with pytest.raises(ValueError, match=message):
            record(late, tmp_path / "run.zk", rewind=True, **options)


def test_rewind_needs_the_steps_before(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = ZOSGD(model.named_parameters(), 1e-2, trajectory=tmp_path / "run.zk")
    for step in range(3):
        if step == 2:
            before = optimizer.state_dict()
        optimizer.step(lambda: model(torch.ones(3)).square().sum())
    optimizer.trajectory.close()
    state = optimizer.state_dict()
    state["zo"]["step"] = 4
    later = ZOSGD(model.named_parameters(), 1e-2)
    later.load_state_dict(state)
    with pytest.raises(ValueError, match="rewind: expected a log with the steps before 4"):
        record(later, tmp_path / "run.zk", rewind=True)
    state["zo"]["step"] = 2  # the weights are those of step 3
    later.load_state_dict(state)
    with pytest.raises(ValueError, match="rewind: expected a state_dict of step 3, as its log's, got step 2"):
        record(later, tmp_path / "run.zk", rewind=True)
    later.load_state_dict(before)
    record(later, tmp_path / "run.zk", rewind=True).close()
    assert read(tmp_path / "run.zk").steps == 2


def test_first_order_checkpoints_are_refused(tmp_path):
    plain = trainer(
        tmp_path, opt(), rows(4), transformers.Trainer, save_strategy="steps", save_steps=1, max_steps=1
    )
    plain.train()
    with pytest.raises(ValueError, match="state_dict: expected an entry 'zo'"):
        trainer(tmp_path, opt(), rows(4), max_steps=2).train(resume_from_checkpoint=True)


def test_lora(tmp_path):
    peft = pytest.importorskip("peft")
    build = lambda: peft.get_peft_model(opt(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model = build()
    before = weights(model)
    ours = trainer(tmp_path, model, rows(8), save_strategy="steps", save_steps=2, learning_rate=1.0)
    ours.train()
    after = weights(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "lora_" in name}
    torch.manual_seed(9)
    again = trainer(tmp_path, build(), rows(8), save_strategy="steps", save_steps=2, learning_rate=1.0)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(again.model), after)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    scores = iter([1, 3, 2])
    model, states = llama(), []
    ours = trainer(
        tmp_path, model, rows(8), own={"eval_dataset": rows(4),
        "compute_metrics": lambda _: {"score": next(scores)}},
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=3,
        load_best_model_at_end=True, metric_for_best_model="score",
    )  # fmt: skip
    ours.add_callback(type("States", (transformers.TrainerCallback,), {
        "on_step_end": lambda self, *a, **k: states.append(weights(model))
    }))  # fmt: skip
    ours.train()
    assert same(weights(model), states[1])
    assert not same(states[1], states[2])


def test_an_optimizer_and_a_scheduler_of_ones_own(tmp_path):
    """Groups with sizes of their own, in the two-pass form."""
    model = llama()
    head = [(n, p) for n, p in model.named_parameters() if "norm" in n]
    body = [(n, p) for n, p in model.named_parameters() if "norm" not in n]
    groups = [{"params": body, "lr": 1e-2}, {"params": head, "lr": 0.1}]
    optimizer = ZOSGD(groups, 0.0, restore="inplace", seed=3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    ours = trainer(tmp_path, model, rows(8), own={"optimizers": (optimizer, schedule)}, max_steps=3)
    with optimizer.two_pass(model):
        ours.train()
    assert optimizer.step_count == 3
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2 / 8, 0.1 / 8]
    assert ours.zo_optimizer is optimizer


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from rows(40)


def test_a_stream_of_data_and_workers(tmp_path):
    """An iterable dataset read by another process, a half-frozen model; a second call of train goes on."""
    model = llama()
    for p in model.model.layers[0].parameters():
        p.requires_grad_(False)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    ours = trainer(tmp_path, model, Stream(), dataloader_num_workers=1, gradient_accumulation_steps=2)
    ours.train()
    assert ours.zo_optimizer.step_count == ours.state.global_step == 4
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    ours.train()
    assert ours.zo_optimizer.step_count == 8


def test_a_batch_that_does_not_fit_is_halved(tmp_path):
    """auto_find_batch_size: what a failed attempt has gathered is not taken into the next."""
    sizes = []

    class Full(ZOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            sizes.append(len(inputs["input_ids"]))
            if sizes[-1] > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    model, before = opt(), weights(opt())
    ours = trainer(
        tmp_path, model, rows(8), Full, auto_find_batch_size=True, per_device_train_batch_size=3, max_steps=2
    )
    ours.train()
    assert sizes == [3, 2, 2, 2, 2]
    assert ours.zo_optimizer.step_count == 2
    assert not same(weights(model), before)


def test_generation_and_prediction(tmp_path):
    ours = trainer(tmp_path, opt(), rows(8), max_steps=2)
    texts = []
    ours.add_callback(type("Generate", (transformers.TrainerCallback,), {
        "on_step_end": lambda self, *a, model, **k: texts.append(model.generate(torch.ones(1, 3).long(),
        max_length=6))
    }))  # fmt: skip
    ours.train()
    assert [t.shape for t in texts] == [(1, 6)] * 2
    assert ours.predict(rows(4)).predictions.shape == (4, 10, 64)


def test_reports(tmp_path):
    """A reporting callback gets numbers, and trainer_state.json can be read."""
    seen = {}
    ours = trainer(tmp_path, bert(), rows(8, True), save_strategy="steps", save_steps=2, max_steps=2)
    ours.add_callback(type("Report", (transformers.TrainerCallback,), {
        "on_log": lambda self, a, s, c, logs=None, **k: seen.update(logs)
    }))  # fmt: skip
    ours.train()
    assert all(isinstance(value, (int, float)) for value in seen.values())
    assert {"projected_gradient", "loss_plus", "loss_minus", "steps_per_second", "skipped_steps"} <= set(seen)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["log_history"][-1]["loss_plus"] == ours.state.log_history[-2]["loss_plus"]


def test_sft_trainer_of_trl(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    class ZOSFTTrainer(ZOTrainerMixin, trl.SFTTrainer):
        pass

    model, twin = llama(), llama()
    data = [{"input_ids": row["input_ids"].tolist()} for row in rows(4)]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words(), pad_token="w0", eos_token="w1")
    options = {key: getattr(arguments(tmp_path), key) for key in ("report_to", "disable_tqdm", "seed")}
    args = trl.SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, max_steps=2, per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", **options,
    )  # fmt: skip
    ours = ZOSFTTrainer(
        model=model, args=args, train_dataset=datasets.Dataset.from_list(data), processing_class=tokenizer
    )
    ours.train()
    ids = torch.tensor([row["input_ids"] for row in data])
    optimizer = ZOSGD(twin.named_parameters(), 1e-2, seed=args.seed)
    for _ in range(2):
        optimizer.step(lambda: twin(input_ids=ids, labels=ids).loss)
    assert all(p.grad is None for p in model.parameters())
    # The order of the sentences, and the fused head of TRL, sum otherwise
    torch.testing.assert_close(torch.stack(ours.zo_optimizer.last_losses), torch.stack(optimizer.last_losses),
                               rtol=1e-5, atol=0)  # fmt: skip
    logged = [entry for entry in ours.state.log_history if "loss" in entry]
    assert {"mean_token_accuracy", "projected_gradient"} <= set(logged[-1])


def words():
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def streamed(folder, model, *, offload, own=None, **options):
    own = {"offload": offload, "eval_dataset": rows(4)} | (own or {})
    defaults = {"gradient_accumulation_steps": 2, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    return trainer(folder, model, rows(12), own=own, **defaults | options)


@pytest.mark.parametrize("eval_mode", [False, True])
def test_a_streamed_model_has_the_same_run(eval_mode, tmp_path):
    """Blocks in host memory; the losses, evaluations, weights and the log of the run in memory; and
    resumed.
    """
    own = {"eval_mode": eval_mode, "optimizer_cls_and_kwargs": (ZOSGD, {"directions": 2})}
    runs = {}
    for name, offload in (("memory", None), ("host", {"storage": "host", "slots": 2})):
        runs[name] = streamed(
            tmp_path / name, opt(0.1).bfloat16(), offload=offload, own={**own,
            "trajectory": tmp_path / f"{name}.zk"},
            save_strategy="steps", save_steps=1,
        )  # fmt: skip
        runs[name].train()
    told = [
        [(e.get("loss"), e.get("projected_gradient"), e.get("eval_loss")) for e in of.state.log_history][:-1]
        for of in runs.values()
    ]
    assert told[0] == told[1]
    files = [(tmp_path / name / "checkpoint-3" / "model.safetensors") for name in runs]
    expected, found = (transformers.OPTForCausalLM.from_pretrained(file.parent) for file in files)
    assert same(weights(found), weights(expected))
    assert (tmp_path / "host.zk").read_bytes() == (tmp_path / "memory.zk").read_bytes()
    runs["host"].engine.close()
    again = streamed(tmp_path / "host", opt(0.1).bfloat16(), offload={"storage": "host"}, own=own)
    again.train(resume_from_checkpoint=str(tmp_path / "host" / "checkpoint-2"))
    again.save_model(tmp_path / "again")
    again.engine.close()
    assert same(weights(transformers.OPTForCausalLM.from_pretrained(tmp_path / "again")), weights(expected))


@pytest.mark.parametrize("storage", ["host", "read", "written"])
def test_states_are_streamed_and_loaded_again(storage, tmp_path):
    """Adam has the run in memory, and goes on from a checkpoint of the Trainer, also where its folder is
    further.
    """
    own = {"optimizer_cls_and_kwargs": (ZOAdamW, {})}
    options = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}
    streamed(tmp_path / "memory", opt(), offload=None, own=own, **options).train()
    opt().save_pretrained(tmp_path / "base")
    offload = {"storage": "host" if storage == "host" else "disk", "slots": 2}
    if storage != "host":
        offload["weights"] = tmp_path / "base"
    if storage == "written":
        offload["path"] = tmp_path / "run"
    first = streamed(tmp_path / "ours", opt(), offload=offload, own=own, **options)
    first.train()
    assert first.engine.has_states
    first.engine.close()
    again = streamed(tmp_path / "ours", opt(), offload=offload, own=own, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    again.save_model(tmp_path / "again")
    again.engine.close()
    places = tmp_path / "memory" / "checkpoint-3", tmp_path / "ours" / "checkpoint-3", tmp_path / "again"
    expected, *found = (weights(transformers.OPTForCausalLM.from_pretrained(p)) for p in places)
    assert all(same(one, expected) for one in found)


@pytest.mark.slow
def test_killed_at_random_moments_a_trainer_from_disk_ends_with_the_same_bits(rng, tmp_path):
    command = [sys.executable, str(TESTS / "trainer_kill_worker.py"), str(tmp_path), "5"]
    command.append(str(rng.getrandbits(40)))
    done = subprocess.run(command, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True,
                          timeout=500, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= 5


def test_a_model_that_is_never_in_memory(tmp_path):
    """Read from a checkpoint on disk, a block at a time; what a checkpoint of the Trainer holds is read
    next.
    """
    base = llama()
    base.save_pretrained(tmp_path / "base")
    options = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    streamed(tmp_path / "memory", base, offload=None, **options).train()
    for steps in (2, 3):
        with empty_weights():
            model = llama()
        offload = {"storage": "disk", "weights": tmp_path / "base"}
        ours = streamed(tmp_path / "disk", model, offload=offload, **options, max_steps=steps)
        ours.train(resume_from_checkpoint=steps == 3)
        ours.engine.close()
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "disk" / "checkpoint-3")
    assert same(weights(found), weights(base))


def test_what_does_not_go_with_a_stream(tmp_path):
    with pytest.raises(ValueError, match="load_best_model_at_end: expected False with offload"):
        streamed(tmp_path, opt(), offload={}, save_strategy="steps", load_best_model_at_end=True)
    with pytest.raises(ValueError, match="optimizers: expected optimizer_cls_and_kwargs with offload"):
        streamed(tmp_path, opt(), offload={}, own={"optimizers": (ZOSGD(opt().parameters(), 1e-3), None)})


def test_a_checkpoint_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    """Each of its files in turn fails; then the process is killed while it writes one."""
    whole = run(tmp_path, "MeZO", save_steps=2, max_steps=4)
    whole.train()
    whole.zo_optimizer.trajectory.close()
    final = weights(whole.model)
    files = sorted(p.name for p in (tmp_path / "checkpoint-4").iterdir())
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= set(files)

    def contents():
        return {
            p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file() and "checkpoint" in str(p)
        }

    for there in (True, False):  # a folder that is written once more, and a new one
        if not there:
            shutil.rmtree(tmp_path / "checkpoint-4")
        before = contents()
        for name in ("_save_optimizer_and_scheduler", "_save_rng_state", "save_model"):
            again = run(tmp_path, "MeZO", save_steps=2, max_steps=4)
            real = getattr(again, name)

            def fails(*args, real=real, **kwargs):
                real(*args, **kwargs)
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(again, name, fails)
            with pytest.raises(OSError, match="No space"):
                again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
            assert again.state.global_step == 4
            assert contents() == before
            again.zo_optimizer.trajectory.close()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-11")  # as a killed process leaves it
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text('{"epoch": 0.')
    again = run(tmp_path, "MeZO", save_strategy="no", max_steps=4)
    with pytest.warns(UserWarning, match="checkpoint-11 is only a part of a checkpoint"):
        again.train(resume_from_checkpoint=True)
    assert same(weights(again.model), final)
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    again.zo_optimizer.trajectory.close()
    again = run(tmp_path, "MeZO", save_strategy="no", max_steps=4)
    with pytest.raises(ValueError, match=r"expected optimizer\.pt in .*the seed and the step of the run"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("other", ["data", "base"])
def test_a_checkpoint_does_not_go_on_with_the_log_of_another_run(other, tmp_path):
    options = {"save_steps": 2, "max_steps": 4, "eval_strategy": "no"}
    run(tmp_path / "ours", "MeZO", **options).train()
    another = run(tmp_path / "theirs", "MeZO", **options, **({"data_seed": 5} if other == "data" else {}))
    if other == "base":
        with torch.no_grad():
            next(another.model.parameters())[0, 0] += 1
    another.train()
    another.zo_optimizer.trajectory.close()
    log = (tmp_path / "theirs" / "run.zk").read_bytes()
    assert log != (tmp_path / "ours" / "run.zk").read_bytes()
    mixed = run(tmp_path / "theirs", "MeZO", **options)
    with pytest.raises(
        ValueError, match=r"rewind: expected the log with which the checkpoint was written|that of the log"
    ):
        mixed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    assert (tmp_path / "theirs" / "run.zk").read_bytes() == log


def test_inputs_are_prepared_once_whatever_is_overridden(tmp_path):
    """A trainer whose inputs are scaled as they come, in both orders of bases: the plain Trainer's values."""
    seen = []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def forward(self, pixels, labels=None):
            seen.append(pixels.max().item())
            return {"loss": (self.layer(pixels) - labels).square().mean()}

    class Scaled:
        def _prepare_inputs(self, inputs):
            inputs = super()._prepare_inputs(inputs)
            return {**inputs, "pixels": inputs["pixels"] / 255}

    class Plain(Scaled, transformers.Trainer):
        pass

    class Before(Scaled, ZOTrainer):
        pass

    class Behind(ZOTrainerMixin, Plain):
        pass

    data = [{"pixels": torch.tensor([255.0, 0.0]), "labels": torch.ones(1)} for _ in range(8)]
    for kind in (Plain, Before, Behind):
        seen.clear()
        trainer(tmp_path, Net(), data, kind, max_steps=2, remove_unused_columns=False).train()
        assert set(seen) == {1.0}, kind
