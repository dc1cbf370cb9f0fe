"""The Trainer around a protected model: its loss is the model's own, at less cost."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from obfuscatune.enclave.protect import protect
from obfuscatune.training.encoding import IGNORED_LABEL
from obfuscatune.training.trainer import ProtectedTrainer

LOSS_TOLERANCE = 1e-6  # float32; measured 0 to 2e-7: the sums run over fewer ignored terms


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    adapter = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    return get_peft_model(GPT2LMHeadModel(config), adapter).eval()


def batch(labelled: slice) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (3, 9))
    labels = torch.full_like(ids, IGNORED_LABEL)
    labels[0, labelled], labels[2, -1] = ids[0, labelled], ids[2, -1]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("labelled", [slice(4, 7), slice(0, 9), slice(8, 9)])
@pytest.mark.parametrize("items", [None, 11])
def test_loss_at_labelled_positions_is_the_stock_loss(
    model, labelled: slice, items: int | None, tmp_path: Path
) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    inputs = batch(labelled)
    seen = []
    model.get_base_model().lm_head.register_forward_hook(lambda module, given, logits: seen.append(logits.shape[1]))
    with protect(model, profile="enclave") as protected:
        trainer = ProtectedTrainer(protected, kind="adamw", args=arguments)
        count = None if items is None else torch.tensor(items)
        ours = trainer.compute_loss(model, dict(inputs), num_items_in_batch=count)
        stock = Trainer.compute_loss(trainer, model, dict(inputs), num_items_in_batch=count)
    assert ours.item() == pytest.approx(stock.item(), rel=LOSS_TOLERANCE)
    assert seen[0] <= seen[1] == 9
    if labelled == slice(8, 9):
        assert seen[0] == 1


def test_a_batch_without_labels_is_left_to_the_model(model, tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    inputs = batch(slice(0, 0))
    inputs["labels"][:] = IGNORED_LABEL
    with protect(model, profile="enclave") as protected:
        trainer = ProtectedTrainer(protected, kind="adamw", args=arguments)
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(1))
    assert loss.item() == 0.0
