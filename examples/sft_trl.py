"""Fine-tunes a bundled model with TRL's SFTTrainer, its large layers keyed onto a worker.

Example: python examples/sft_trl.py obfuscatune-example
"""

import obfuscatune  # before torch: idle threads then leave the cores to the worker

# isort: split

import argparse
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from obfuscatune.studies.bundled import model_directory
from obfuscatune.studies.bundled.records import company_records


def main(output: Path) -> None:
    """Train on prompts with completions, and save the adapter."""
    set_seed(0)
    directory = model_directory("llama")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.eos_token
    records, _ = company_records(seed=0, facts=16)  # {"prompt": ..., "completion": ...}

    model = AutoModelForCausalLM.from_pretrained(directory)
    lora = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)

    with obfuscatune.protect(model, profile="stream", worker="spawn") as protected:
        arguments = SFTConfig(
            output_dir=str(output / "run"),
            max_steps=40,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            logging_steps=10,
            max_length=64,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=True,
        )
        trainer = SFTTrainer(
            model=protected.model, args=arguments, train_dataset=Dataset.from_list(records), processing_class=tokenizer
        )
        trainer.train()
        protected.model.save_pretrained(output / "adapter")
        print(protected.report())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", nargs="?", type=Path, default=Path("obfuscatune-example"))
    main(parser.parse_args().output_dir)
