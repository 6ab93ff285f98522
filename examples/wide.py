"""A model that is larger than necessary: MiniLM-L6 with wider feed-forward layers and its weights in a file.

The output weights of the added neurons are zero at first, so the wide model computes what MiniLM does, and
training goes on from there."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from zokernels.examples.encoder import PROMPTS, Classifier, folder


class WideClassifier(Classifier):
    """A classifier with ``width`` neurons in each feed-forward layer, whose weights are to be loaded."""

    def __init__(self, width: int) -> None:
        import transformers

        nn.Module.__init__(self)
        transformers.logging.set_verbosity_error()
        config = transformers.AutoConfig.from_pretrained(folder(), local_files_only=True)
        config.intermediate_size = width
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder(), local_files_only=True)
        self.encoder = transformers.BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, len(PROMPTS), bias=False)
        self.register_buffer("centre", torch.zeros(config.hidden_size))
        self.eval()


def widen(width: int, batches: Iterable[tuple[Tensor, Tensor]], path: pathlib.Path, seed: int) -> int:
    """Writes the weights of a :class:`WideClassifier` that computes what :class:`Classifier` does to
    ``path``.

    ``batches`` are ids and masks of training sentences, for the classifier's centre.  Returns the number of
    weights."""
    from safetensors.torch import save_file

    narrow = Classifier()
    narrow.set_centre(batches)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in narrow.state_dict().items():
        if ".intermediate.dense." in name:
            more = (width - len(value), *value.shape[1:])
            fresh = torch.randn(more, generator=generator) * 0.02 if value.dim() == 2 else torch.zeros(more)
            value = torch.cat([value, fresh])
        elif name.endswith(".output.dense.weight") and ".attention." not in name:
            value = torch.cat([value, torch.zeros(len(value), width - value.shape[1])], dim=1)
        state[name] = value.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    return sum(v.numel() for v in state.values())
