"""The main job, twice from the same seed: in the clear, and between an enclave and a worker."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from obfuscatune.enclave.protect import protect
from obfuscatune.enclave.report import Report
from obfuscatune.enclave.spawn import check_workers
from obfuscatune.profiles import resolve
from obfuscatune.studies.bundled import DemoSettings, model_directory
from obfuscatune.studies.bundled.records import write_records
from obfuscatune.training.data import read_rows
from obfuscatune.training.encoding import Collator, encode_rows
from obfuscatune.training.scoring import Question, accuracy, read_questions, score_choices


@dataclass(frozen=True)
class Run:
    """What one fine-tuning gave: loss of each step, seconds, and the choice made on each question."""

    losses: list[float]
    seconds: float
    predicted: list[int]


@dataclass(frozen=True)
class Outcome:
    """Everything the demo shows."""

    settings: DemoSettings
    profile: str
    questions: list[Question] = field(repr=False)
    before: list[int]
    clear: Run
    protected: Run
    answers: list[tuple[str, str]] = field(repr=False)
    report: Report
    keying_seconds: float
    records: Path
    adapter: Path

    def accuracy(self, predicted: list[int]) -> float:
        """Share of right choices."""
        return accuracy(predicted, self.questions)

    @property
    def different_choices(self) -> int:
        """Questions on which the clear and the protected run chose differently."""
        return sum(a != b for a, b in zip(self.clear.predicted, self.protected.predicted, strict=True))

    @property
    def largest_loss_difference(self) -> float:
        """Largest difference of the two loss curves, over all steps."""
        return max(abs(a - b) for a, b in zip(self.clear.losses, self.protected.losses, strict=True))

    @property
    def slowdown(self) -> float:
        """Seconds of the protected fine-tuning over those in the clear."""
        return self.protected.seconds / self.clear.seconds


def run_demo(
    output_dir: Path, *, profile: str, worker: str, settings: DemoSettings, say: Callable[[str], None]
) -> Outcome:
    """Run the job in the clear and protected, and return both.

    Args:
        output_dir: gets ``records/`` and ``adapter/``. say: called with a line on what happens next.

    Raises:
        UsageError: no bundled model, or options that do not fit. WorkerFault: the worker failed.
    """
    resolve(profile)  # refused before the training in the clear, not after it
    check_workers([worker], threads=None, device=None, identity=None, insecure=False)
    paths = write_records(output_dir / "records", settings.seed, settings.facts)
    questions = read_questions(paths[1])
    tokenizer = AutoTokenizer.from_pretrained(model_directory(settings.family))
    say(f"{settings.facts} private facts in {paths[0]}, asked in words that are in no training row")

    model = _fresh_model(settings)
    with model.disable_adapter():
        before = score_choices(model, tokenizer, questions)
    say("fine-tuning in the clear, for comparison")
    # Not the Trainer's default, a fused one: what differs from the protected run is the protection alone.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    clear = _fine_tune(model, tokenizer, paths[0], questions, settings, optimizer=adamw)

    say(f"the same fine-tuning, protected: profile {profile}, worker {worker}")
    model = _fresh_model(settings)
    started = time.perf_counter()
    with protect(model, profile=profile, worker=worker) as job:
        keying_seconds = time.perf_counter() - started
        optimizer = job.create_optimizer("adamw", lr=settings.learning_rate, weight_decay=0.0)
        protected = _fine_tune(model, tokenizer, paths[0], questions, settings, optimizer=optimizer)
        answers = _answer(model, tokenizer, questions[:: max(1, len(questions) // 4)][:4])
        adapter = output_dir / "adapter"
        model.save_pretrained(adapter)
        report = job.report()
    return Outcome(
        settings=settings,
        profile=profile,
        questions=questions,
        before=before,
        clear=clear,
        protected=protected,
        answers=answers,
        report=report,
        keying_seconds=keying_seconds,
        records=output_dir / "records",
        adapter=adapter,
    )


def _fresh_model(settings: DemoSettings) -> Any:
    """The bundled model under a new adapter; the same one each time."""
    set_seed(settings.seed)
    model = AutoModelForCausalLM.from_pretrained(model_directory(settings.family), dtype=torch.float32)
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        target_modules=list(settings.lora_target_modules),
        fan_in_fan_out=settings.lora_fan_in_fan_out,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


class LossBar(ProgressCallback):
    """The Trainer's progress bar with the loss in it, and no line for each step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """Show the loss of the step."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)


def _fine_tune(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    train_file: Path,
    questions: list[Question],
    settings: DemoSettings,
    *,
    optimizer: torch.optim.Optimizer,
) -> Run:
    rows, _ = encode_rows(read_rows(train_file), tokenizer, settings.max_length)
    arguments = TrainingArguments(
        output_dir=str(train_file.parent),
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm,
        weight_decay=0.0,
        lr_scheduler_type="linear",
        logging_steps=1,
        logging_strategy="steps",
        save_strategy="no",
        report_to="none",
        seed=settings.seed,
        disable_tqdm=False,
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=Collator(tokenizer.pad_token_id),
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBar())
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Run(losses, seconds, score_choices(model, tokenizer, questions))


def _answer(model: Any, tokenizer: PreTrainedTokenizerBase, questions: list[Question]) -> list[tuple[str, str]]:
    """Let the protected model complete a few prompts, greedily, as one left-padded batch."""
    tokenizer.padding_side = "left"
    batch = tokenizer([q.prompt for q in questions], return_tensors="pt", padding=True)
    model.eval()
    with torch.inference_mode():
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=3,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    new = tokens[:, batch["input_ids"].shape[1] :]
    return [
        (q.prompt, text.strip().split("\n")[0])
        for q, text in zip(questions, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True)
    ]
