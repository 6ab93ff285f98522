"""Streamed models of transformers against their runs in memory; generation; what a stream takes of the
device.
"""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import Live
from offload_cases import same_bits, same_state, tower, train
from torch import nn

from bench import offload as bench_offload
from zokernels import offload
from zokernels.offload.blocks import blocks_of
from zokernels.offload.footprint import fitting
from zokernels.optim import ZOSGD

VOCABULARY = 61
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
WIDE = {**SIZES, "intermediate_size": 40, "max_position_embeddings": 32}
#: (configuration, model, container of blocks, arguments)
FAMILIES = {
    "OPT": (
        "OPTConfig",
        "OPTForCausalLM",
        "model.decoder.layers",
        {**SIZES, "word_embed_proj_dim": 24, "ffn_dim": 40},
    ),
    "LLaMA": ("LlamaConfig", "LlamaForCausalLM", "model.layers", {**WIDE, "num_key_value_heads": 1}),
    "Qwen": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        "model.layers",
        {**WIDE, "num_key_value_heads": 1, "head_dim": 8},
    ),
    "GPT-2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        "transformer.h",
        {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 3, "n_head": 2, "n_positions": 32},
    ),
    "BERT": ("BertConfig", "BertForMaskedLM", "bert.encoder.layer", WIDE),
}


def build(family, tied, rng):
    transformers = pytest.importorskip("transformers")
    config, model, blocks, options = FAMILIES[family]
    torch.manual_seed(rng.getrandbits(30))
    made = getattr(transformers, model)(getattr(transformers, config)(**options, tie_word_embeddings=tied))
    assert (made.get_output_embeddings().weight is made.get_input_embeddings().weight) == tied
    return made.to(rng.choice((torch.float32, torch.bfloat16))), blocks


def batch_of(step):
    return torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(step))


def loss_of(model, ids):
    return F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1).float(), ids.flatten())


@pytest.mark.filterwarnings("ignore:.*cls.predictions.bias")  # BERT's is the decoder's, too
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tied, rng, tmp_path):
    """Trains from a random storage with a random number of slots, with dropout if the model has it, then
    generates.
    """
    steps = 20 if family in ("OPT", "LLaMA", "BERT") else 4
    model, blocks = build(family, tied, rng)
    ours, storage, slots = (
        copy.deepcopy(model),
        rng.choice(("device", "host", "disk")),
        rng.choice((1, 2, 3, 4)),
    )
    print(storage, slots)
    run = {"losses": loss_of, "batch": batch_of}
    expected, _ = train(model, steps, **run)
    path = tmp_path / "run" if storage == "disk" else None
    with offload.stream(ours, blocks, storage, path=path, slots=slots) as engine:
        losses, _ = train(ours, steps, **run)
        assert same_bits(losses, expected)
        assert len(engine.blocks) == 3
        assert len({p for b in engine.blocks for p in b.entries}) > 8
        model.eval(), ours.eval()
        if hasattr(model, "generate") and family != "BERT":
            written = []
            for m in (ours, model):
                torch.manual_seed(7)  # sampled: greedy, a model of random weights may repeat one token
                written.append(
                    m.generate(
                        batch_of(0), max_new_tokens=6, min_new_tokens=6, do_sample=True, pad_token_id=0
                    )
                )
            assert written[0].shape == (2, 15)
            assert torch.equal(*written)
            assert len(written[0][:, 9:].unique()) > 1
        assert not same_state(ours.state_dict(), model.state_dict())


class Wide(nn.Module):
    def __init__(self, columns, rows):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns) / 32)

    def forward(self, x):
        return F.linear(x, self.weight)


class Stack(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("way", ["eager", "whole", "wrapped", "layers"])
def test_the_footprint_of_a_step_on_the_device(way):
    """Copies of a block and as much again at most; a model that is compiled as one takes a whole copy."""
    torch._dynamo.reset()
    model = Stack([Wide(*pair) for pair in itertools.pairwise((512, 8192, 512, 512, 512))])
    options = {"backend": "eager", "fullgraph": True}
    if way == "whole":
        model.compile(**options)
    for layer in model.layers if way == "layers" else ():
        layer.compile(**options)
    run = torch.compile(model, **options) if way == "wrapped" else model
    expected = offload.footprint(run, list(model.layers), storage="device")
    total = sum(-(-p.nbytes // 256) * 256 for p in model.parameters())
    assert expected.slots == expected.scratch == expected.decoded == 0
    assert expected.resident == sum(p.nbytes for p in model.parameters())
    assert expected.total == expected.resident + expected.copy
    with offload.stream(model, "layers", "device"):
        optimizer = ZOSGD(model.named_parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.step(lambda: run(torch.ones(1, 512)).square().mean())
    torch._dynamo.reset()
    taken = optimizer.scratch.nbytes()
    assert taken <= expected.copy
    if way in ("whole", "wrapped"):
        assert taken == expected.copy == total
    else:
        assert expected.copy == 2 * (16 << 20) < total


@pytest.mark.parametrize("scratch", [1, 2])
@pytest.mark.parametrize(("slots", "wire"), [(1, None), (3, None), (9, None), (3, "bf16"), (1, "fp8")])
def test_the_footprint_is_what_is_allocated(slots, wire, scratch, rng, monkeypatch):
    model = tower(rng.choice((torch.float32, torch.bfloat16)), layers=4, width=rng.randrange(30, 60))
    options = {"slots": slots, "scratch": scratch, "wire": wire}
    expected = offload.footprint(model, "layers", **options)
    resident = sum(t.nbytes for t in (model.embed.weight, *model.norm.parameters()))
    made, empty = [], torch.empty
    patched = lambda *args, **options: made.append(empty(*args, **options)) or made[-1]
    monkeypatch.setattr(torch, "empty", patched)
    with offload.stream(model, "layers", **options) as engine:
        monkeypatch.undo()
        assert expected.slots == sum(s.data.nbytes for s in engine.buffers)
        assert expected.scratch + expected.decoded == sum(t.nbytes for t in made)
        assert bool(expected.decoded) == (wire is not None)
        assert expected.resident == resident
        assert expected.copy == model.embed.weight.nbytes


@pytest.mark.parametrize(
    ("shape", "limit"), [("opt-13b", 3.5e9), ("opt-30b", 5e9), ("opt-66b", 8e9), ("opt-175b", 18e9)]
)
def test_memory_of_large_models(shape, limit, monkeypatch):
    """In bf16, 2,048 tokens, with the options of gpu-check: what the engine takes, the activations of one
    side (without scores, as fused attention has none), and what the other side keeps between two blocks."""
    monkeypatch.setattr(
        bench_offload.F, "scaled_dot_product_attention", lambda q, k, v, **_: torch.empty_like(q)
    )
    model = bench_offload.build(shape, torch.bfloat16, layers=3)
    planned = offload.footprint(model, model.blocks(True), slots=2, scratch=1)
    width = model.embed.weight.shape[1]
    with torch.no_grad(), Live() as live:
        model(torch.zeros(1, 2048, dtype=torch.long, device="meta"))
    assert live.most > 2048 * 50272 * 2  # the logits
    libraries = 200e6  # workspaces of cuBLAS for two threads, and the like
    total = planned.total + live.most + 2048 * width * 2 + libraries
    print(f"{shape}: {total / 1e9:.2f} GB, {planned}, activations {live.most / 1e9:.2f}")
    assert planned.total > 6 * width * width * 2 * 2
    assert total < limit
    layers = model.blocks(False)
    assert offload.footprint(model, layers, slots=3, scratch=2).total > limit  # so this test can fail


def test_what_fits_is_chosen_and_said(monkeypatch):
    """OPT-175B's shapes: a card of 24 GB takes the defaults, one of 18 GB fewer, and 4 GB are not enough."""
    model = bench_offload.build("opt-175b", torch.bfloat16, layers=3)
    made = blocks_of("stream", model, model.blocks(True))
    cuda, chosen = torch.device("cuda", 0), {}
    for what in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, what, lambda device: 10**9)
    for free in (24e9, 18e9, 12.5e9, 10e9, 4e9):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), 80 * 10**9))  # noqa: B023
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            slots, scratch = fitting("stream", model, made, cuda, None, None, None, None)
        chosen[free] = slots, scratch
        taken = offload.footprint(model, model.blocks(True), slots=slots, scratch=scratch).total
        assert taken <= 0.8 * free or (slots, scratch) == (1, 1)
        assert len(said) == ((slots, scratch) != (3, 2))
        for one in said:
            assert f"slots={slots} and scratch={scratch}, which take {taken / 1e9:.3g} GB" in str(one.message)
    assert chosen == {24e9: (3, 2), 18e9: (2, 2), 12.5e9: (2, 1), 10e9: (1, 1), 4e9: (1, 1)}
    assert fitting("stream", model, made, torch.device("cpu"), None, None, None, None) == (3, 2)


def test_memory_that_is_asked_for(rng):
    model = tower(torch.bfloat16, seed=rng.getrandbits(30))
    total = lambda **options: offload.footprint(model, "layers", **options).total
    with pytest.raises(ValueError, match=r"stream: memory: .*, got 5000, where slots=1 and scratch=1 take"):
        offload.stream(model, "layers", memory=5000)
    with pytest.raises(ValueError, match=r"stream: memory: .*, got \d+, where slots=2 and scratch=1 take"):
        offload.stream(model, "layers", memory=total(slots=1, scratch=1), slots=2)
    with pytest.raises(ValueError, match="stream: memory: expected None where storage is 'device'"):
        offload.stream(model, "layers", "device", memory=10**9)
    with (
        pytest.warns(UserWarning, match="stream: slots=2 and scratch=1, which take"),
        offload.stream(model, "layers", memory=total(slots=2, scratch=1)) as engine,
    ):
        assert (len(engine.buffers), engine.scratches) == (2, 1)
