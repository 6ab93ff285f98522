"""Models as users bring them: LoRA adapters of peft on a transformer, compiled models, every kind of
method.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zokernels.optim import FZOO, LOZO, ZOSGD, HiZOO, LeZO, SparseMeZO, ZOAdamW


@pytest.fixture
def lora():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=32, dropout=0.0,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )


METHODS = {
    "ZOSGD": lambda p: ZOSGD(p, lr=1e-2),
    "in place": lambda p: ZOSGD(p, lr=1e-2, restore="inplace"),
    "FZOO": lambda p: FZOO(p, lr=1e-3, directions=4),
    "ZOAdamW": lambda p: ZOAdamW(p, lr=1e-2),
    "HiZOO": lambda p: HiZOO(p, lr=1e-2),
    "SparseMeZO": lambda p: SparseMeZO(p, lr=1e-2),
    "LeZO": lambda p: LeZO(p, lr=1e-2, skipped=0.5),
    "LOZO": lambda p: LOZO(p, lr=1e-2, rank=1),
}


@pytest.mark.parametrize("method", METHODS)
def test_lora(lora, method):
    """Adapters train, the frozen model keeps its bits, and the tied embedding is one parameter."""
    ids = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(1))
    frozen = {n: p.clone() for n, p in lora.named_parameters() if not p.requires_grad}
    optimizer = METHODS[method]([(n, p) for n, p in lora.named_parameters() if p.requires_grad])
    loss = lambda: lora(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        before = loss().item()
    for _ in range(30):
        optimizer.step(loss)
    with torch.no_grad():
        assert loss().item() < before
    assert all(torch.equal(p, frozen[n]) for n, p in lora.named_parameters() if n in frozen)


@pytest.mark.parametrize("method", ["in place", "FZOO in place", "ZOAdamW in place"])
def test_compiled_models_stay_compiled(method):
    make = {"in place": ZOSGD, "FZOO in place": FZOO, "ZOAdamW in place": ZOAdamW}[method]
    torch.manual_seed(0)
    plain, traces = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), []

    def backend(graph, inputs):
        traces.append(graph)
        return graph

    twin = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    twin.load_state_dict(plain.state_dict())
    compiled, x = torch.compile(twin, backend=backend), torch.randn(16, 6)
    ours = make(compiled.named_parameters(), lr=1e-2, seed=3, restore="inplace")
    theirs = make(plain.named_parameters(), lr=1e-2, seed=3, restore="inplace")
    for _ in range(5):
        ours.step(lambda: compiled(x).square().mean())
        theirs.step(lambda: plain(x).square().mean())
    assert len(traces) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), twin.parameters(), strict=True))
