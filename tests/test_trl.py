"""TRL's trainers with the mix-in, compared with the plain loop over the same batches and the formulas.

SFTTrainer is in test_transformers_runs."""

from __future__ import annotations

import copy
import os

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

import transformers  # noqa: E402
from hf_cases import VOCABULARY, llama  # noqa: E402
from test_transformers_runs import words  # noqa: E402

from zokernels.integrations.transformers import ZOTrainerMixin  # noqa: E402
from zokernels.optim import ZOSGD  # noqa: E402

STEPS, LR = 3, 1e-2


def train(base, config, folder, model, data, **options):
    """The trainer after its run, and the inputs of each step."""
    batches = []

    class Ours(ZOTrainerMixin, base):
        def _prepare_inputs(self, inputs):
            prepared = super()._prepare_inputs(inputs)
            batches.append(copy.deepcopy(prepared))
            return prepared

    own = options.pop("own", {})
    args = config(
        str(folder), use_cpu=True, bf16=False, max_steps=STEPS, per_device_train_batch_size=4,
        learning_rate=LR, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, seed=3, **own,
    )  # fmt: skip
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words(), pad_token="w0", eos_token="w1", padding_side="left"
    )
    ours = Ours(
        model=model, args=args, train_dataset=datasets.Dataset.from_list(data), processing_class=tokenizer,
        **options,
    )  # fmt: skip
    ours.train()
    assert len(batches) == STEPS  # prepared once a step, not once a forward
    assert all(p.grad is None for p in model.parameters())
    return ours, batches


def compare(ours, twin, batches, loss_of):
    """Each step's losses within the roundings of other orders of summing, and not all the same."""
    logged = [(e["loss_plus"], e["loss_minus"]) for e in ours.state.log_history if "loss_plus" in e]
    optimizer = ZOSGD(twin.named_parameters(), LR, seed=3)
    for inputs, pair in zip(batches, logged, strict=True):
        closure = loss_of(twin, inputs)
        optimizer.step(closure)
        torch.testing.assert_close(
            torch.tensor(pair), torch.stack(optimizer.last_losses), rtol=2e-4, atol=2e-6
        )
        assert pair[0] != pair[1]


def logps(model, ids, mask):
    """The log-probability of each token but the first, given those before it."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def test_dpo(tmp_path):
    """-log sigmoid(beta ((c - c_ref) - (r - r_ref))): Rafailov et al. 2023 (arXiv 2305.18290), equation 7."""
    rows = range(4)
    data = [
        {"prompt": f"w{i + 3} w{i + 4}", "chosen": f" w{i + 9} w{i + 8}", "rejected": f" w{i + 20}"}
        for i in rows
    ]
    model, twin, reference = llama(), llama(), llama()
    ours, batches = train(
        trl.DPOTrainer, trl.DPOConfig, tmp_path, model, data, ref_model=llama(), own={"beta": 0.5}
    )

    def loss_of(model, inputs):
        def scores(network):
            tokens = logps(network, inputs["input_ids"], inputs["attention_mask"])
            return (tokens * inputs["completion_mask"][:, 1:]).sum(-1).chunk(2)

        def closure():
            (chosen, rejected), (chosen_ref, rejected_ref) = scores(model), scores(reference)
            return -F.logsigmoid(0.5 * ((chosen - chosen_ref) - (rejected - rejected_ref))).mean()

        return closure

    compare(ours, twin, batches, loss_of)


def test_reward(tmp_path):
    """-log sigmoid(r_chosen - r_rejected): Ouyang et al. 2022 (arXiv 2203.02155), equation 1."""
    data = [{"chosen": f"w{i + 9} w{i + 8}", "rejected": f"w{i + 20}"} for i in range(4)]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(config)
    twin = copy.deepcopy(model)
    ours, batches = train(trl.RewardTrainer, trl.RewardConfig, tmp_path, model, data)

    def loss_of(model, inputs):
        def closure():
            rewards = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            chosen, rejected = rewards.squeeze(-1).chunk(2)
            return -F.logsigmoid(chosen - rejected).mean()

        return closure

    compare(ours, twin, batches, loss_of)


def test_grpo(tmp_path):
    """-mean(min(r A, clamp(r) A)), where r is the ratio to the weights that the step begins with: Shao et al.
    2024 (arXiv 2402.03300), equation 3 without the KL term.

    TRL itself would take for the ratio's denominator what the forward gives, so that every loss is -mean(A).
    """
    data = [{"prompt": f"w{i + 3} w{i + 4}"} for i in range(4)]
    model, twin = llama(), llama()
    ours, batches = train(
        trl.GRPOTrainer, trl.GRPOConfig, tmp_path, model, data,
        own={"num_generations": 4, "max_completion_length": 5, "loss_type": "grpo"},
        reward_funcs=lambda completions, **_: [float(len(set(c.split()))) + len(c) for c in completions],
    )  # fmt: skip

    def loss_of(model, inputs):
        ids, mask = (
            torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask")
        )
        count, counted = inputs["completion_ids"].shape[1], inputs["completion_mask"]
        advantages = inputs["advantages"][:, None]
        scores = lambda: logps(model, ids, mask)[:, -count:]
        with torch.no_grad():
            old = scores()

        def closure():
            ratio = (scores() - old).exp()
            terms = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
            return -((terms * counted).sum(-1) / counted.sum(-1)).mean()

        return closure

    compare(ours, twin, batches, loss_of)
