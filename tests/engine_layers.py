"""A stand-in of an inference engine's model: tensors joined and sharded as vLLM's layers have them.

The shapes and the loading are those of vLLM's ``QKVParallelLinear``, ``MergedColumnParallelLinear``,
``RowParallelLinear``, ``VocabParallelEmbedding`` and ``FusedMoE``, for one rank of ``ranks`` and one stage of
``stages``, without processes.  ``tests/vllm_cases.py`` compares the shapes with the real ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: vLLM pads each rank's part of the vocabulary to a multiple of this.
PADDING = 64


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder, and the place of this rank."""

    hidden: int = 48
    heads: int = 8
    kv_heads: int = 2
    head: int = 6
    inner: int = 40
    experts: int = 0
    vocabulary: int = 150
    layers: int = 4
    tied: bool = False
    rank: int = 0
    ranks: int = 1
    stage: int = 0
    stages: int = 1


class Layer(nn.Module):
    """A weight, with ``weight.load(loaded, part)`` for what comes of the checkpoint."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape, dtype=torch.bfloat16), requires_grad=False)
        self.weight.load = self.load

    def load(self, loaded: Tensor, part: object) -> None:
        assert self.weight.shape == loaded.shape
        self.weight.data.copy_(loaded)


class Rows(Layer):
    """RowParallelLinear: this rank's columns of the matrix."""

    def __init__(self, sizes: Sizes, out: int, inner: int) -> None:
        super().__init__(out, inner // sizes.ranks)
        self.rank = sizes.rank

    def load(self, loaded: Tensor, part: object) -> None:
        width = self.weight.shape[1]
        self.weight.data.copy_(loaded.narrow(1, self.rank * width, width))


class GateUp(Layer):
    """MergedColumnParallelLinear: this rank's rows of gate, then of up."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(2 * sizes.inner // sizes.ranks, sizes.hidden)
        self.rank = sizes.rank

    def load(self, loaded: Tensor, part: object) -> None:
        half = self.weight.shape[0] // 2
        self.weight.data.narrow(0, half * int(part), half).copy_(loaded.narrow(0, self.rank * half, half))


class QKV(Layer):
    """QKVParallelLinear: this rank's heads of q, of k and of v.

    Where there are fewer key heads than ranks it is one head, which several ranks have.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.q = sizes.heads // sizes.ranks * sizes.head
        self.kv = max(1, sizes.kv_heads // sizes.ranks) * sizes.head
        super().__init__(self.q + 2 * self.kv, sizes.hidden)
        self.rank, self.copies = sizes.rank, max(1, sizes.ranks // sizes.kv_heads)

    def load(self, loaded: Tensor, part: object) -> None:
        begin, size, shard = {
            "q": (0, self.q, self.rank),
            "k": (self.q, self.kv, self.rank // self.copies),
            "v": (self.q + self.kv, self.kv, self.rank // self.copies),
        }[str(part)]
        self.weight.data.narrow(0, begin, size).copy_(loaded.narrow(0, shard * size, size))


class Vocabulary(Layer):
    """VocabParallelEmbedding and ParallelLMHead: this rank's rows, padded with zeros."""

    def __init__(self, sizes: Sizes) -> None:
        per_rank = -(-sizes.vocabulary // (PADDING * sizes.ranks)) * PADDING
        super().__init__(per_rank, sizes.hidden)
        self.begin = min(sizes.rank * per_rank, sizes.vocabulary)
        self.count = min(per_rank, sizes.vocabulary - self.begin)

    def load(self, loaded: Tensor, part: object) -> None:
        self.weight[: self.count].data.copy_(loaded.narrow(0, self.begin, self.count))
        self.weight[self.count :].data.fill_(0)


class Experts(nn.Module):
    """FusedMoE: w13 [experts, 2 inner, hidden] and w2 [experts, hidden, inner], the inner size shared out."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        inner = sizes.inner // sizes.ranks
        make = lambda *shape: nn.Parameter(torch.empty(*shape, dtype=torch.bfloat16), requires_grad=False)
        self.w13_weight = make(sizes.experts, 2 * inner, sizes.hidden)
        self.w2_weight = make(sizes.experts, sizes.hidden, inner)
        self.rank, self.inner = sizes.rank, inner

    def load(self, loaded: Tensor, expert: int, part: str) -> None:
        begin = self.rank * self.inner
        if part == "down_proj":
            self.w2_weight.data[expert].copy_(loaded.narrow(1, begin, self.inner))
        else:
            at = self.inner * (part == "up_proj")
            target = self.w13_weight.data[expert].narrow(0, at, self.inner)
            target.copy_(loaded.narrow(0, begin, self.inner))


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.input_layernorm = Layer(sizes.hidden)
        self.self_attn = nn.Module()
        self.self_attn.qkv_proj = QKV(sizes)
        self.self_attn.o_proj = Rows(sizes, sizes.hidden, sizes.heads * sizes.head)
        self.mlp = nn.Module()
        if sizes.experts:
            self.mlp.gate = Layer(sizes.experts, sizes.hidden)
            self.mlp.experts = Experts(sizes)
        else:
            self.mlp.gate_up_proj = GateUp(sizes)
            self.mlp.down_proj = Rows(sizes, sizes.hidden, sizes.inner)


#: Parts of a joined parameter, by their names in the checkpoint.
JOINED = {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v"),
          "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}  # fmt: skip


class Model(nn.Module):
    """One rank's part of the decoder, or one stage's."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        per_stage = sizes.layers // sizes.stages
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict(
            {str(i): Block(sizes) for i in range(sizes.stage * per_stage, (sizes.stage + 1) * per_stage)}
        )
        first, last = sizes.stage == 0, sizes.stage == sizes.stages - 1
        if first or (last and sizes.tied):
            self.model.embed_tokens = Vocabulary(sizes)
        if last:
            self.model.norm = Layer(sizes.hidden)
            self.lm_head = self.model.embed_tokens if sizes.tied else Vocabulary(sizes)

    def load_weights(self, weights) -> None:
        params = dict(self.named_parameters())
        for name, loaded in weights:
            part: object = None
            path = name.split(".")
            if "experts" in path:
                at = path.index("experts")
                layer = self.model.layers
                if path[2] in layer:
                    layer[path[2]].mlp.experts.load(loaded, int(path[at + 1]), path[at + 2])
                continue
            if path[-2] in JOINED:
                path[-2], part = JOINED[path[-2]]
            if (param := params.get(".".join(path))) is not None:  # else it is of another stage
                param.load(loaded, part)


def checkpoint(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the parameters, as Hugging Face has them."""
    hidden, found = sizes.hidden, {"model.embed_tokens.weight": (sizes.vocabulary, sizes.hidden)}
    for i in range(sizes.layers):
        at = f"model.layers.{i}"
        found[f"{at}.input_layernorm.weight"] = (hidden,)
        found[f"{at}.self_attn.q_proj.weight"] = (sizes.heads * sizes.head, hidden)
        found[f"{at}.self_attn.k_proj.weight"] = (sizes.kv_heads * sizes.head, hidden)
        found[f"{at}.self_attn.v_proj.weight"] = (sizes.kv_heads * sizes.head, hidden)
        found[f"{at}.self_attn.o_proj.weight"] = (hidden, sizes.heads * sizes.head)
        if sizes.experts:
            found[f"{at}.mlp.gate.weight"] = (sizes.experts, hidden)
        for expert in [f"experts.{e}." for e in range(sizes.experts)] or [""]:
            found[f"{at}.mlp.{expert}gate_proj.weight"] = (sizes.inner, hidden)
            found[f"{at}.mlp.{expert}up_proj.weight"] = (sizes.inner, hidden)
            found[f"{at}.mlp.{expert}down_proj.weight"] = (hidden, sizes.inner)
    found["model.norm.weight"] = (hidden,)
    if not sizes.tied:
        found["lm_head.weight"] = (sizes.vocabulary, hidden)
    return found
