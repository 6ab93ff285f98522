"""Fine-tunes the demo's sentence encoder with a Hugging Face Trainer, forward passes only.

``python examples/transformers_trainer.py FOLDER [STEPS]``.  Killed and started again, it goes on from its
last checkpoint and ends with the same bits.  docs/transformers.md"""

import sys

import torch.nn.functional as F
from transformers import TrainingArguments, trainer_utils

from zokernels.examples.encoder import Classifier
from zokernels.examples.reviews import load, split
from zokernels.integrations.transformers import ZOTrainer
from zokernels.optim import ZOSGD


class Model(Classifier):
    def forward(self, input_ids, attention_mask, labels):
        logits = super().forward(input_ids, attention_mask)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


folder, steps = sys.argv[1], int((*sys.argv, 300)[2])
model = Model()
encode = lambda text: model.tokenizer(text, truncation=True, max_length=64, return_token_type_ids=False)
rows = [[encode(r.text) | {"label": r.label} for r in part] for part in split(load(), min(200, 5 * steps))]
args = TrainingArguments(folder, max_steps=steps, save_steps=max(2, steps // 6), logging_steps=10,
    per_device_train_batch_size=min(24, steps), eval_strategy="steps", eval_steps=50)  # fmt: skip
part = lambda head: [(n, p) for n, p in model.named_parameters() if n.startswith("head.") == head]
groups = [{"params": part(False), "lr": 3e-6}, {"params": part(True), "lr": 0.15, "eps": 0.3}]
trainer = ZOTrainer(
    model, args, train_dataset=rows[0], eval_dataset=rows[1], processing_class=model.tokenizer,
    compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(1) == result.label_ids).mean()},
    eval_mode=True, optimizers=(ZOSGD(groups, lr=0.0), None), trajectory=folder + "/run.zk")  # fmt: skip
trainer.train(resume_from_checkpoint=trainer_utils.get_last_checkpoint(folder))
trainer.save_model(folder)
