"""Models and runs for the tests of zokernels.offload."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from zokernels.optim import ZOSGD

VOCAB = 53


class Layer(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 2 * width + 1)
        self.down, self.drop = nn.Linear(2 * width + 1, width, bias=False), nn.Dropout(dropout)

    def forward(self, x):
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Tower(nn.Module):
    """A stack of layers as in nanoGPT.  If ``tied``, the head has the weights of the embedding."""

    def __init__(self, layers=5, width=19, tied=True, dropout=0.1):
        super().__init__()
        self.embed, self.layers = (
            nn.Embedding(VOCAB, width),
            nn.ModuleList(Layer(width, dropout) for _ in range(layers)),
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def tower(dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    model = Tower(**options)
    with torch.no_grad():
        for p in model.parameters():  # so that biases and norms are not constant either
            p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype)


def kept(model, master):
    """The model with the weights of its layers in the dtype ``master``, or as it is."""
    low = copy.deepcopy(model)
    if master is not None:
        low.layers.to(master)
    return low


def batch_of(step):
    return torch.randint(VOCAB, (3, 7), generator=torch.Generator().manual_seed(step))


def loss_of(model, ids):
    return F.cross_entropy(model(ids).flatten(0, 1).float(), ids.flatten())


def train(model, steps, make=ZOSGD, losses=loss_of, batch=batch_of, **options):
    """Trains; returns the losses (float64) and the optimizer."""
    options = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "seed": 5, **options}
    optimizer = make(model.named_parameters(), **options)
    values = []
    while (step := optimizer.step_count) < steps:
        torch.manual_seed(step)  # this is the seed of dropout
        values.append(optimizer.step(lambda: losses(model, batch(step))).double())
    return torch.stack(values) if values else torch.empty(0), optimizer


def same_bits(a, b):
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
    )


def same_state(ours, theirs):
    """The names of two state dicts whose tensors differ."""
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not same_bits(ours[name], theirs[name])]
