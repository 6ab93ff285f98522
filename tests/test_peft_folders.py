"""Folders as peft writes them are base and final weights of a log: verify and replay find each parameter."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from zokernels.cli import main
from zokernels.files.safetensors import peft_name
from zokernels.optim import ZOSGD

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

TARGETS = ["q_proj", "v_proj"]
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=TARGETS),
    "dora and a head": lambda: peft.LoraConfig(
        r=2, target_modules=TARGETS, use_dora=True, modules_to_save=["score"]
    ),
    "embedding": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens", "k_proj"]),
    "prompt": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
}


def build(kind: str, name: str = "default") -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, pad_token_id=0, num_labels=2, **sizes)
    model = transformers.LlamaForSequenceClassification(config)
    return peft.get_peft_model(model, CONFIGS[kind](), adapter_name=name).eval()


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train(model: nn.Module, log, rng, inner: nn.Module | None = None) -> None:
    """Some steps of ``model``, of which ``inner`` is the part that computes."""
    ids = torch.randint(1, 32, (4, 6), generator=torch.Generator().manual_seed(rng.randrange(2**32)))
    labels = torch.tensor([0, 1, 0, 1])
    optimizer = ZOSGD(model.named_parameters(), lr=0.1, eps=1e-2, seed=rng.randrange(2**32), trajectory=log)
    for _ in range(3):
        optimizer.step(lambda: (inner or model)(input_ids=ids, labels=labels).loss)
    optimizer.trajectory.close()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    ("kind", "name"),
    [*((kind, "default") for kind in CONFIGS), ("lora", "v")],
)
def test_a_folder_of_peft_is_base_and_result(kind, name, rng, tmp_path, capsys):
    model = build(kind, name)
    folder = lambda path: tmp_path / path / ("" if name == "default" else name)  # where peft saves it
    model.save_pretrained(tmp_path / "before")
    train(model, tmp_path / "run.zk", rng)
    model.save_pretrained(tmp_path / "after")
    log, before, after = (str(p) for p in (tmp_path / "run.zk", folder("before"), folder("after")))
    count = len(trained(model))
    assert main(["verify", log, before, after]) == 0
    assert f"bit for bit ({count} tensors)" in capsys.readouterr().out
    assert main(["verify", log, after]) == 1
    assert main(["verify", log, before, before]) == 1
    assert "expected the bits of the run, got others" in capsys.readouterr().err

    (again := tmp_path / "again").mkdir()
    shutil.copy(folder("before") / "adapter_config.json", again)
    assert main(["replay", before, log, "-o", str(again / "adapter_model.safetensors")]) == 0
    assert main(["replay", before, log, "-o", str(tmp_path / "fp32.safetensors"), "--mode", "fp32"]) == 0
    want = safetensors.load_file(folder("after") / "adapter_model.safetensors")
    got = safetensors.load_file(again / "adapter_model.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[n], want[n]) for n in want)
    if kind != "prompt":  # whose parameter is on a module that loading replaces
        base = build(kind, name).unload()
        loaded = peft.PeftModel.from_pretrained(base, again, adapter_name=name, is_trainable=True)
        assert all(torch.equal(p, trained(model)[n]) for n, p in trained(loaded).items())


def test_a_model_of_peft_inside_another(rng, tmp_path):
    class Judge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build("lora")

    judge = Judge()
    judge.model.save_pretrained(tmp_path / "before")
    train(judge, tmp_path / "run.zk", rng, judge.model)
    judge.model.save_pretrained(tmp_path / "after")
    assert main(["verify", *(str(tmp_path / name) for name in ("run.zk", "before", "after"))]) == 0


def test_the_folders_of_a_trainer(tmp_path):
    from zokernels.integrations.transformers import ZOTrainer

    model = build("lora")
    model.save_pretrained(tmp_path / "before")
    rows = [{"input_ids": torch.randint(1, 32, (6,)), "labels": i % 2} for i in range(8)]
    args = transformers.TrainingArguments(
        str(tmp_path / "out"), max_steps=4, save_steps=2, learning_rate=0.1, report_to=[], use_cpu=True,
        per_device_train_batch_size=4, disable_tqdm=True,
    )  # fmt: skip
    ZOTrainer(model=model, args=args, train_dataset=rows, trajectory=str(tmp_path / "run.zk")).train()
    log, before = str(tmp_path / "run.zk"), str(tmp_path / "before")
    assert main(["verify", log, before, str(tmp_path / "out" / "checkpoint-4")]) == 0
    assert main(["verify", log, before, str(tmp_path / "out" / "checkpoint-2"), "--upto", "2"]) == 0
    assert main(["verify", log, before, str(tmp_path / "out" / "checkpoint-2")]) == 1


def test_another_adapter_is_refused(rng, tmp_path, capsys):
    """One of other layers has not all parameters of the log, and is not taken for it."""
    train(build("lora"), tmp_path / "run.zk", rng)
    build("embedding").save_pretrained(tmp_path / "other", save_embedding_layers=False)
    assert main(["verify", str(tmp_path / "run.zk"), str(tmp_path / "other")]) == 1
    assert "expected every trained parameter of the log" in capsys.readouterr().err


def test_names_are_those_of_peft():
    """A layer that is called as the adapter keeps its name: peft itself cuts it at every place."""
    model = build("dora and a head")
    saved = peft.get_peft_model_state_dict(model)
    assert {peft_name(name, "default") for name in trained(model)} == saved.keys()
