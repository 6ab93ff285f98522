"""capturable=True with models as users have them: an OPT and a Llama of transformers, whole steps in a
CUDA graph.
"""

from __future__ import annotations

import pytest
import torch
from test_zosgd_capturable import NoReads
from test_zosgd_graph import capture, no_waiting, side_stream
from torch import nn
from zosgd_cases import BOTH, same_bits, weights

from zokernels.optim import ZOSGD

transformers = pytest.importorskip("transformers")

VOCABULARY, ROWS, LENGTH = 96, 2, 12


def opt(dtype: torch.dtype) -> nn.Module:
    sizes = dict(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    config = transformers.OPTConfig(vocab_size=VOCABULARY, max_position_embeddings=64, dropout=0.1, **sizes)
    return transformers.OPTForCausalLM(config).to(dtype)


def llama(dtype: torch.dtype) -> nn.Module:
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=64,
        **sizes,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


MODELS = pytest.mark.parametrize("make", [opt, llama])


def built(make, dtype, restore: str, device: str = "cpu", **options):
    """A model in training mode, an optimizer of it and a closure over a static buffer of tokens."""
    torch.manual_seed(1)
    model = make(dtype).to(device).train()
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH)).to(device)
    optimizer = ZOSGD(model.named_parameters(), restore=restore, seed=3, eps=1e-2, **options)
    inputs = static_inputs(device)
    return model, optimizer, tokens, lambda: model(input_ids=tokens, labels=tokens, **inputs).loss


def static_inputs(device: str) -> dict:
    """A whole mask and positions.

    Without them the models make their own, and read whether they need one; while a graph is captured they do
    not read, take one, and so run other kernels than in the steps before."""
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=device).tril().expand(ROWS, 1, LENGTH, LENGTH)
    positions = torch.arange(LENGTH, device=device).expand(ROWS, LENGTH)
    return {"attention_mask": mask, "position_ids": positions, "use_cache": False}


@BOTH
@MODELS
def test_nothing_is_read_back(make, restore):
    """What a step with such a forward does between capture and replay: no host branch on a tensor's value."""
    model, optimizer, _, closure = built(make, torch.float32, restore, lr=1e-2, capturable=True)
    before = weights(model)
    optimizer.step(closure)
    with NoReads():
        optimizer.step(closure)
        optimizer.step(closure)
    assert optimizer.step_count == 3
    assert not same_bits(before, weights(model))


@BOTH
@MODELS
def test_a_capture_changes_no_forward(make, restore, monkeypatch):
    """transformers asks torch whether a graph is captured, and then avoids reads; with a whole mask
    nothing changes.
    """
    found = []
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        _, optimizer, _, closure = built(make, torch.float32, restore, lr=1e-2, capturable=True)
        torch.manual_seed(5)
        found.append(torch.stack([optimizer.step(closure) for _ in range(3)]))
    assert torch.equal(*found)


@BOTH
@MODELS
def test_the_bits_of_ordinary_steps(make, restore):
    found = []
    for capturable in (False, True):
        lr = torch.tensor(1e-2, dtype=torch.float64) if capturable else 1e-2
        model, optimizer, _, closure = built(make, torch.bfloat16, restore, lr=lr, capturable=capturable)
        torch.manual_seed(5)
        losses = torch.stack([optimizer.step(closure) for _ in range(4)])
        found.append((losses, weights(model)))
    assert torch.equal(found[0][0], found[1][0])
    assert same_bits(found[0][1], found[1][1])


@pytest.mark.gpu
@BOTH
@MODELS
def test_replays_equal_eager_steps(make, restore):
    """A whole step in one graph, dropout included, with new tokens at each replay."""
    found = []
    for captured in (False, True):
        lr = torch.tensor(1e-2, device="cuda")
        model, optimizer, tokens, closure = built(
            make, torch.bfloat16, restore, "cuda", lr=lr, capturable=True
        )
        generator, losses, graph = torch.Generator().manual_seed(9), [], None
        torch.manual_seed(7)
        for step in range(6):
            tokens.copy_(torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator))
            if captured and step == 2:
                with no_waiting():
                    graph, loss = capture(optimizer, closure)
            if graph is not None:
                graph.replay()
            else:
                with side_stream():
                    loss = optimizer.step(closure)
            losses.append(loss.clone())
        found.append((torch.stack(losses), weights(model)))
        assert optimizer.step_count == 6
    assert torch.equal(found[0][0], found[1][0])
    assert same_bits(found[0][1], found[1][1])
