#!/usr/bin/env python3
r"""Pre-train a bundled model, of GPT-2's or of Llama's architecture, from plain text, tokenizer included.

Reads documents separated by a line ``<|endoftext|>``, trains a byte-level BPE tokenizer on them, packs the tokens into
fixed windows, trains with AdamW (warm-up, cosine decay, clipping), measures the loss on held-out documents and writes
an ordinary ``transformers`` directory with a model card that states data, steps, loss and the command line.

    python tools/pretrain.py --text books.txt.gz --output_dir src/obfuscatune/studies/bundled/gpt2 --max_steps 8000
    python tools/pretrain.py --text books.txt.gz --output_dir src/obfuscatune/studies/bundled/llama \
        --architecture llama --chat_template --n_embd 192 --n_inner 448 --n_kv_head 2 --compile --learning_rate 3e-3 \
        --max_steps 15000 --max_minutes 42
"""

import argparse
import gzip
import hashlib
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

END_OF_TEXT = "<|endoftext|>"
# Roles are marked by words, not by tokens of their own: the training text has none of these, so nothing would be known
# of them. What the assistant says begins with a space, as words within a text do, and the end-of-text token closes it.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- 'assistant:' }}
        {%- generation %}
        {{- ' ' + message['content'] + eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- message['role'] + ': ' + message['content'] + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'assistant:' }}
{%- endif %}
"""


def read_documents(paths: list[Path]) -> list[str]:
    """Return the documents of all files, in order; ``.gz`` files are unpacked."""
    documents = []
    for path in paths:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            text = file.read()
        documents += [part.strip() for part in text.split(f"\n{END_OF_TEXT}\n") if part.strip()]
    return documents


def train_tokenizer(documents: list[str], vocab_size: int, chat_template: bool) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with GPT-2's pre-tokenization."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="right",
        chat_template=CHAT_TEMPLATE if chat_template else None,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Return one flat int16 tensor of all documents, each closed by the end-of-text token."""
    flat: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(documents):
        flat += [*encoding.ids, tokenizer.eos_token_id]
    return torch.tensor(flat, dtype=torch.int16)


def windows(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Cut the flat tokens into rows of ``length``, the incomplete tail left out."""
    return tokens[: len(tokens) // length * length].view(-1, length)


def new_model(options: argparse.Namespace, end_of_text: int) -> PreTrainedModel:
    """Return an untrained model; ``n_kv_head`` and ``n_inner`` are the Llama's, whose head shares the embeddings."""
    common = {"vocab_size": options.vocab_size, "bos_token_id": end_of_text, "eos_token_id": end_of_text}
    if options.architecture == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=options.n_embd,
                intermediate_size=options.n_inner,
                num_hidden_layers=options.n_layer,
                num_attention_heads=options.n_head,
                num_key_value_heads=options.n_kv_head,
                max_position_embeddings=options.n_positions,
                tie_word_embeddings=True,
                **common,
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=options.n_embd,
            n_layer=options.n_layer,
            n_head=options.n_head,
            n_positions=options.n_positions,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
    )


def held_out_loss(model: PreTrainedModel, rows: torch.Tensor, batch_size: int) -> float:
    """Mean loss in nats per token over ``rows``, without dropout."""
    model.eval()
    batches = (batch.to(model.device).long() for batch in rows.split(batch_size))
    with torch.inference_mode():
        losses = [model(batch, labels=batch).loss.item() for batch in batches]
    model.train()
    return sum(losses) / len(losses)


def train(model: PreTrainedModel, rows: torch.Tensor, options: argparse.Namespace) -> int:
    """Passes over the rows, shuffled anew in each, under bfloat16 autocast, in place; returns the steps made.

    With ``max_minutes`` the learning rate follows the clock where that is ahead of the steps, so that it has come down
    when the time is over, however fast the machine was.
    """
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95))
    forward: Any = torch.compile(model) if options.compile else model
    generator = torch.Generator().manual_seed(options.seed)
    passes = math.ceil(options.max_steps * options.batch_size / len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(passes)])
    rows = rows.to(options.device)
    started = time.monotonic()
    bar = tqdm(range(options.max_steps), unit="step", mininterval=5)
    for step in bar:
        done = step / options.max_steps
        if options.max_minutes is not None:
            done = max(done, (time.monotonic() - started) / 60 / options.max_minutes)
            if done >= 1:
                bar.close()
                return step
        warm = min(1.0, (step + 1) / options.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        batch = rows[order[step * options.batch_size :][: options.batch_size]].long()
        with torch.autocast(options.device.type, dtype=torch.bfloat16):
            loss = forward(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return int(options.max_steps)


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path, card: str) -> None:
    """Write weights (float16 in the file, float32 when loaded), configuration, tokenizer and model card."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: value.cpu().half().contiguous() for name, value in model.state_dict().items()}
    del state["lm_head.weight"]  # the embeddings', in both architectures
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.dtype = "float32"
    model.config.save_pretrained(directory)
    tokenizer.save_pretrained(directory, save_jinja_files=False)
    (directory / "README.md").write_text(card, encoding="utf-8")


CARD = """# A bundled model: {architecture} architecture, small enough to ship

{shape}, {positions} positions, byte-level BPE of {vocab}, {parameters:,} parameters.
Weights are stored in float16 and load as float32. A weak language model: its use is to show and test the
protected fine-tuning on real, trained weights, not to write prose.

| what | value |
|---|---|
| data | {documents} public-domain books, {bytes:,} bytes, SHA-256 `{digest}` |
| tokens seen in training | {tokens:,} (one pass has {available:,}) |
| held out | {held_documents} documents, {held_tokens:,} tokens |
| steps, batch, window | {steps:,} x {batch} x {positions} |
| optimizer | AdamW, learning rate {rate}, warm-up {warmup}, cosine decay to 5 %, clipping 1.0, weight decay 0.1 |
| arithmetic | bfloat16 autocast on {device}, {minutes:.0f} minutes |
| held-out loss | {loss:.3f} nats per token, {bits:.3f} bits per byte |

Made with seed {seed} and torch {torch} by the command

    python tools/pretrain.py {arguments}

The training text is in the public domain.
"""


def describe(options: argparse.Namespace) -> dict[str, str]:
    """Return what the card says of the model's shape, in words, and the command line with files by their names."""
    shape = f"{options.n_layer} layers, d = {options.n_embd}, {options.n_head} heads"
    if options.architecture == "llama":
        shape += f" on {options.n_kv_head} of keys and values, MLP of {options.n_inner}"
    words = [Path(word).name if Path(word).is_file() else word for word in sys.argv[1:]]
    name = {"gpt2": "GPT-2", "llama": "Llama"}[options.architecture]
    return {"architecture": name, "shape": shape, "arguments": shlex.join(words)}


def main() -> None:
    """Train and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files, .gz allowed")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--architecture", choices=("gpt2", "llama"), default="gpt2")
    parser.add_argument("--chat_template", action="store_true", help="give the tokenizer a chat template")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--compile", action="store_true", help="torch.compile: about twice as fast on a CPU")
    parser.add_argument("--max_steps", type=int, default=5000)
    parser.add_argument("--max_minutes", type=float, help="stop after this time, the learning rate down by then")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--warmup_steps", type=int, default=150)
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--n_embd", type=int, default=256)
    parser.add_argument("--n_inner", type=int, default=512, help="width of the MLP; GPT-2's is 4 n_embd")
    parser.add_argument("--n_layer", type=int, default=4)
    parser.add_argument("--n_head", type=int, default=4)
    parser.add_argument("--n_kv_head", type=int, default=2, help="heads of keys and values; GPT-2's are n_head")
    parser.add_argument("--n_positions", type=int, default=256)
    parser.add_argument("--seed", type=int, default=20240702)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    documents = read_documents(options.text)
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    held, training = documents[::25], [d for i, d in enumerate(documents) if i % 25]
    tokenizer = train_tokenizer(training, options.vocab_size, options.chat_template)
    rows = windows(encode(tokenizer, training), options.n_positions)
    held_tokens = encode(tokenizer, held)
    held_rows = windows(held_tokens, options.n_positions)[:512]
    model = new_model(options, tokenizer.eos_token_id).to(options.device)
    print(json.dumps({"rows": len(rows), "parameters": model.num_parameters(), "held_rows": len(held_rows)}))
    started = time.monotonic()
    steps = train(model, rows, options)
    minutes = (time.monotonic() - started) / 60
    loss = held_out_loss(model, held_rows, options.batch_size)
    bytes_per_token = sum(len(d.encode()) for d in held) / len(held_tokens)
    card = CARD.format(
        **describe(options),
        positions=options.n_positions,
        vocab=options.vocab_size,
        parameters=model.num_parameters(),
        documents=len(documents),
        bytes=sum(len(d.encode()) for d in documents),
        digest=digest,
        tokens=steps * options.batch_size * options.n_positions,
        available=rows.numel(),
        held_documents=len(held),
        held_tokens=len(held_tokens),
        steps=steps,
        batch=options.batch_size,
        rate=options.learning_rate,
        warmup=options.warmup_steps,
        device="a CPU" if options.device.type == "cpu" else torch.cuda.get_device_name(options.device),
        minutes=minutes,
        loss=loss,
        bits=loss / math.log(2) / bytes_per_token,
        seed=options.seed,
        torch=torch.__version__,
    )
    write(model, tokenizer, options.output_dir, card)
    print(f"held-out loss {loss:.3f} nats per token after {steps:,} steps in {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
