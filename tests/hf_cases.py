"""Small random models of transformers and their data, for the tests of ZOTrainer."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import nn

from zokernels.integrations.transformers import ZOTrainer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY, LENGTH = 64, 10


def opt(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, dropout=dropout, layerdrop=0.0,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def rows(count: int, classes: bool = False) -> list[dict]:
    """Sentences of random tokens.  Some labels are left out of the loss, or each sentence has a class."""
    generator, found = torch.Generator().manual_seed(5), []
    for i in range(count):
        ids = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        labels = i % 3 if classes else torch.where(torch.arange(LENGTH) < i % 5, -100, ids)
        found.append({"input_ids": ids, "labels": labels})
    return found


def arguments(folder, **options) -> transformers.TrainingArguments:
    defaults = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    defaults |= {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2, "seed": 7}
    return transformers.TrainingArguments(str(folder), **defaults | options)


def trainer(folder, model: nn.Module, data, kind: type = ZOTrainer, *, own: dict | None = None, **options):
    """A trainer.  ``own`` are arguments of the trainer itself, ``options`` those of its TrainingArguments."""
    return kind(model=model, args=arguments(folder, **options), train_dataset=data, **own or {})


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
