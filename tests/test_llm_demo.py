"""The demo of a language model: prompts padded on the left, paired differences, and a tiny run."""

from __future__ import annotations

import json
import math

import pytest
import torch

from zokernels.examples import reviews

transformers = pytest.importorskip("transformers")

from zokernels.examples import llm_demo  # noqa: E402  # it imports transformers' friends

WORDS = [
    "<pad>",
    "<unk>",
    "it",
    "was",
    "great",
    "terrible",
    "a",
    "film",
    "the",
    "bad",
    "good",
    "movie",
    ".",
    ",",
    "and",
    "I",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama of two layers, whose tokens are words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny") / "model"
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="."
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(WORDS), max_position_embeddings=128, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=WORDS.index("."), bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def test_padding_on_the_left_changes_nothing(folder):
    model, tokenizer = llm_demo.load(llm_demo.arguments(["--model", str(folder)]))
    judge = llm_demo.Judge(model.float(), tokenizer, (" terrible", " great"))
    texts = ["a good film", "a bad movie and the film was bad and terrible", "I"]
    data = [reviews.Review(text, i % 2) for i, text in enumerate(texts)]
    (batch,) = llm_demo.Prompts(data, tokenizer, 8, "{} it was").ordered()
    assert batch.mask[:, -1].all()
    assert batch.mask.sum() < batch.mask.numel()
    found, labels = judge(batch.ids, batch.mask), batch.labels
    for row, mask, logits in zip(batch.ids, batch.mask, found, strict=True):
        ids = row[mask.bool()][None]
        alone = judge(ids, torch.ones_like(ids))[0]
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)  # fp32, sums in another order
    assert sorted(labels.tolist()) == [0, 0, 1]


def test_the_difference_is_paired():
    before, after = torch.tensor([1.0, 2.0, 6.0]).double(), torch.tensor([2.0, 2.0, 8.0]).double()
    mean, error = llm_demo.difference(before, after)  # changes of 1, 0 and 2
    assert mean == 1.0
    assert error == pytest.approx(1 / math.sqrt(3))
    assert llm_demo.improved(3.0, 1.0)
    assert not llm_demo.improved(2.9, 1.0)
    assert not llm_demo.improved(0.0, 0.0)  # of a model that has not changed
    assert not llm_demo.improved(-3.0, 1.0)


@pytest.mark.parametrize("lora", [0, 2])
def test_a_run_is_whole(lora, folder, tmp_path):
    if lora:
        pytest.importorskip("peft")
    try:
        reviews.fetch()
    except SystemExit as error:
        pytest.skip(str(error))
    options = ["--steps", "2", "--directions", "2", "--batch", "2", "--validation", "4", "--lora", str(lora)]
    code = llm_demo.main([*options, "--model", str(folder), "--output", str(tmp_path)])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["replay_exact"]
    assert len(report["losses"]) == 2
    (accuracy, accuracy_error), (loss, loss_error) = report["accuracy"], report["loss"]
    learned = 0 < accuracy >= 3 * accuracy_error or 0 < -loss >= 3 * loss_error
    assert code == (0 if learned else 1)
    assert (tmp_path / "loss.png").exists()
    base, trained = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("base", "trained"))
    assert base != trained
