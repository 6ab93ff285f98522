"""Fine-tunes the demo's sentence encoder in a LightningModule, forward passes only.

``python examples/lightning_module.py FOLDER [STEPS]``.  The optimization is
manual, because the closure is the whole step.  The checkpoints of Lightning hold the optimizer's seed and
step."""

import sys

import lightning
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from zokernels.examples.encoder import Classifier
from zokernels.examples.reviews import load, split
from zokernels.optim import ZOSGD


class Module(lightning.LightningModule):
    def __init__(self, lr=3e-6, head_lr=0.15):
        super().__init__()
        self.save_hyperparameters()
        self.model, self.automatic_optimization = Classifier(), False

    def loss(self, batch):
        return F.cross_entropy(self.model(batch["input_ids"], batch["attention_mask"]), batch["labels"])

    def training_step(self, batch):
        self.model.eval()  # no dropout
        optimizer = self.optimizers()
        optimizer.step(lambda: self.loss(batch))
        self.log("loss", optimizer.optimizer.last_loss, prog_bar=True)

    def configure_optimizers(self):
        part = lambda head: [
            (n, p) for n, p in self.model.named_parameters() if n.startswith("head.") == head
        ]
        groups = [{"params": part(False), "lr": self.hparams.lr}]
        return ZOSGD(
            [*groups, {"params": part(True), "lr": self.hparams.head_lr, "eps": 0.3}], lr=0.0, seed=0
        )


def loader(tokenizer, batch):
    encode = lambda text: tokenizer(text, truncation=True, max_length=64, return_token_type_ids=False)
    data = [{**encode(r.text), "label": r.label} for r in split(load(), 100)[0]]
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        data, batch, shuffle=True, generator=generator, collate_fn=DataCollatorWithPadding(tokenizer)
    )


if __name__ == "__main__":
    folder, steps = sys.argv[1], int((*sys.argv, 300)[2])
    module = Module()
    trainer = lightning.Trainer(
        max_steps=steps, default_root_dir=folder, log_every_n_steps=10, accelerator="cpu"
    )
    trainer.fit(module, loader(module.model.tokenizer, min(24, steps)))
    trainer.save_checkpoint(folder + "/last.ckpt")
