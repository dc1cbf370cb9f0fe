"""The Trainer around a protected model: its loss is the model's own, at less cost."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import BartConfig, BartForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from obfuscatune.enclave.protect import protect
from obfuscatune.errors import TrainingError, UsageError
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


class Swallows(GPT2LMHeadModel):
    """Takes what it does not know, and does not read it, as xLSTM does."""

    def forward(self, input_ids=None, **more):
        more.pop("logits_to_keep", None)
        return super().forward(input_ids, **more)


GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
BART = {"vocab_size": 50, "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
ALL_LOGITS = {
    "swallows the argument": lambda: (
        Swallows(GPT2Config(**GPT2)),
        LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True),
    ),
    "a loss of its own": lambda: (BartForCausalLM(BartConfig(**BART)), LoraConfig(target_modules=["q_proj"])),
}


@pytest.mark.parametrize("name", ALL_LOGITS)
def test_a_model_whose_loss_reads_all_logits_gives_all(name: str, tmp_path: Path) -> None:
    model, adapter = ALL_LOGITS[name]()
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    adapted = get_peft_model(model, adapter).eval()
    inputs = batch(slice(4, 7))
    with protect(adapted, profile="enclave") as protected:
        trainer = ProtectedTrainer(protected, args=arguments)
        ours = trainer.compute_loss(protected.model, dict(inputs))
        assert ours.item() == Trainer.compute_loss(trainer, protected.model, dict(inputs)).item()


def test_a_batch_without_labels_is_left_to_the_model(model, tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    inputs = batch(slice(0, 0))
    inputs["labels"][:] = IGNORED_LABEL
    with protect(model, profile="enclave") as protected:
        trainer = ProtectedTrainer(protected, kind="adamw", args=arguments)
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(1))
    assert loss.item() == 0.0


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no mask": ({}, {}),
    "label smoothing": ({"label_smoothing_factor": 0.3}, {}),
    "adam": ({"adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 1e-3, "weight_decay": 0.3}, {}),
    "sgd": ({"optim": "sgd", "learning_rate": 0.5, "weight_decay": 0.1}, {}),
    "a loss function": (
        {},
        {"compute_loss_func": lambda out, labels, num_items_in_batch: out.logits[0].square().mean()},
    ),
    "metrics": ({}, {"compute_metrics": lambda told: {"sum": float(abs(told.predictions).sum())}}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_rows_and_settings_of_the_callers_train_as_with_the_stock_trainer(model, name: str, tmp_path: Path) -> None:
    """Rows that no collator of ours has made, and settings that read the logits."""
    settings, more = SETTINGS[name]
    labels = [IGNORED_LABEL] * 5 + [7, 8, 9]
    rows = [{"input_ids": [*range(n, n + 8)], "labels": labels} for n in range(1, 7)]
    if name != "no mask":
        rows = [{**row, "attention_mask": [1] * 8} for row in rows]
    reference = copy.deepcopy(model)

    def run(trainer: Trainer) -> tuple[dict[str, float], Tensor, list[int]]:
        trainer.train()
        told, predicted = trainer.evaluate(), trainer.predict(rows[:3]).predictions
        numbers = {key: value for key, value in told.items() if key in ("eval_loss", "eval_sum")}
        return numbers, torch.cat([p.flatten() for n, p in model_of(trainer) if "lora_" in n]), list(predicted.shape)

    def model_of(trainer: Trainer) -> list[tuple[str, Tensor]]:
        return [(name, tensor.detach().clone()) for name, tensor in trainer.model.named_parameters()]

    def arguments() -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, max_steps=3, save_strategy="no",
            per_device_train_batch_size=2, **{"learning_rate": 0.01, "optim": "adamw_torch", **settings},
        )  # fmt: skip

    stock = run(Trainer(reference, arguments(), train_dataset=rows, eval_dataset=rows[:2], **more))
    with protect(model, profile="enclave") as protected:
        data = {"train_dataset": rows, "eval_dataset": rows[:2]}
        ours = run(ProtectedTrainer(protected, args=arguments(), quiet=True, **data, **more))
    assert ours[0] == pytest.approx(stock[0], rel=LOSS_TOLERANCE)
    assert torch.allclose(ours[1], stock[1], rtol=1e-4, atol=1e-6)
    assert ours[2] == stock[2] == [3, 8, 50]


def shifted(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Targets of the collator's own: not those of the labels."""
    return {**batch, "shift_labels": batch["labels"].roll(-2, 1)}


def embedded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(int(batch["input_ids"].sum()))
    return {"inputs_embeds": torch.randn(*batch["labels"].shape, 16, generator=numbers), "labels": batch["labels"]}


def longer(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": torch.nn.functional.pad(batch["labels"], (0, 2), value=IGNORED_LABEL)}


def shorter(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": batch["labels"][:, :-2]}


def unlabelled(batch: dict[str, Tensor]) -> dict[str, Any]:
    return {**batch, "labels": None}


def few_logits(batch: dict[str, Tensor]) -> dict[str, Any]:
    return {**batch, "logits_to_keep": 2}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("made", [shifted, embedded, longer, shorter, unlabelled, few_logits])
def test_what_a_collator_makes_is_heeded_or_refused_as_by_the_stock_trainer(
    model, made: Any, overlap: bool, tmp_path: Path
) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    rows = [{"input_ids": [*range(n, n + 8)], "labels": [*range(n, n + 8)]} for n in range(1, 7)]

    def collate(some: list[dict[str, list[int]]]) -> dict[str, Any]:
        return made({name: torch.tensor([row[name] for row in some]) for name in ("input_ids", "labels")})

    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, max_steps=2, save_strategy="no", logging_steps=1,
        per_device_train_batch_size=3, remove_unused_columns=False,
    )  # fmt: skip
    reference = copy.deepcopy(model)

    def losses(trainer: Trainer) -> list[float] | tuple[type[Exception], str]:
        try:
            trainer.train()
        except Exception as error:
            return type(error), str(error)[:20]
        return [entry[key] for entry in trainer.state.log_history for key in ("loss", "grad_norm") if key in entry]

    data = {"train_dataset": rows, "data_collator": collate}
    stock = losses(Trainer(reference, arguments, **data))
    with protect(model, profile="enclave") as protected:
        ours = losses(ProtectedTrainer(protected, args=arguments, quiet=True, overlap=overlap, **data))
    assert isinstance(stock, list) == (made in (shifted, embedded))
    assert ours == (pytest.approx(stock, rel=1e-5) if isinstance(stock, list) else stock)


def test_a_loss_that_is_not_finite_ends_the_evaluation_of_any_set(model, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, max_steps=1, eval_strategy="steps", eval_steps=1,
        remove_unused_columns=False,
    )  # fmt: skip
    row = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}

    def collate(some: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = {name: torch.tensor([each[name] for each in some]) for name in row}
        if "huge" in some[0]:
            batch["inputs_embeds"] = torch.full((len(some), 3, 16), torch.nan)
            del batch["input_ids"]
        return batch

    sets = {"good": [row], "bad": [{**row, "huge": True}]}
    with protect(model, profile="enclave") as protected:
        trainer = ProtectedTrainer(
            protected, args=arguments, quiet=True, train_dataset=[row], eval_dataset=sets, data_collator=collate
        )
        with pytest.raises(TrainingError, match="loss of the evaluation is not finite"):
            trainer.train()


@pytest.mark.parametrize("name", ["model", "model_init", "optimizers", "optimizer_cls_and_kwargs"])
def test_another_model_or_optimizer_is_refused(model, name: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with protect(model, profile="enclave") as protected, pytest.raises(UsageError, match=f"got {name}, expected"):
        ProtectedTrainer(protected, args=arguments, **{name: (None, None)})


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (None, {"optim": "rmsprop"}, "got optim 'rmsprop', expected adamw_torch, adamw_torch_fused, sgd"),
        ("sgd", {"optim": "adafactor"}, "got optim 'adafactor'"),
        ("adamw", {"optim": "sgd"}, "got optim 'sgd', expected adamw, as kind says"),
        ("sgd", {"optim_args": "momentum=0.9"}, "optim_args"),
        (None, {"optim_target_modules": ["c_attn"]}, "optim_target_modules"),
    ],
)
def test_an_optimizer_that_it_does_not_make_is_refused(
    model, kind: str | None, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **settings)
    with protect(model, profile="enclave") as protected, pytest.raises(UsageError, match=message):
        ProtectedTrainer(protected, kind=kind, args=arguments)


def test_decay_of_a_norm_is_refused(model, tmp_path: Path) -> None:
    """The stock Trainer leaves norms and biases out of it."""
    model.get_base_model().transformer.ln_f.requires_grad_(True)
    arguments = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True}
    with protect(model, profile="enclave") as protected:
        ProtectedTrainer(protected, args=TrainingArguments(**arguments))
        with pytest.raises(
            UsageError, match=r"got base_model.model.transformer.ln_f.weight, .*expected weight_decay 0"
        ):
            ProtectedTrainer(protected, args=TrainingArguments(**arguments, weight_decay=0.1))
