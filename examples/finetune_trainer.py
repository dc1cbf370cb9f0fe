"""Fine-tunes a bundled model with the stock Trainer, its large layers keyed onto a worker.

Example: python examples/finetune_trainer.py obfuscatune-example
"""

import obfuscatune  # before torch: idle threads then leave the cores to the worker

# isort: split

import argparse
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from obfuscatune.studies.bundled import model_directory
from obfuscatune.studies.bundled.records import company_records


def main(output: Path) -> None:
    """Train, save the adapter, and ask the protected model."""
    set_seed(0)
    directory = model_directory()  # yours: the directory of any model that docs/models.md lists
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.eos_token
    records, _ = company_records(seed=0, facts=16)
    rows = [tokenizer(record["prompt"] + record["completion"]) for record in records]

    model = AutoModelForCausalLM.from_pretrained(directory)
    lora = LoraConfig(r=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)

    # worker="spawn" starts the worker on this machine, which protects nothing from its owner. Elsewhere:
    # worker="tls://HOST:PORT#FINGERPRINT", identity="lab.key"
    with obfuscatune.protect(model, profile="balanced", worker="spawn") as protected:
        arguments = TrainingArguments(
            output_dir=str(output / "run"),
            max_steps=40,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = Trainer(model=protected.model, args=arguments, train_dataset=rows, data_collator=collator)
        trainer.train()
        protected.model.save_pretrained(output / "adapter")  # an ordinary PEFT adapter

        prompt = tokenizer(records[0]["prompt"], return_tensors="pt")
        tokens = protected.model.generate(**prompt, max_new_tokens=3, do_sample=False)
        print(tokenizer.decode(tokens[0]))
        print(protected.report())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", nargs="?", type=Path, default=Path("obfuscatune-example"))
    main(parser.parse_args().output_dir)
