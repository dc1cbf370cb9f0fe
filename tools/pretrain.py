#!/usr/bin/env python3
"""Pre-train the bundled GPT-2-architecture model from plain text, tokenizer included.

Reads documents separated by a line ``<|endoftext|>``, trains a byte-level BPE tokenizer on them, packs the tokens into
fixed windows, trains with AdamW (warm-up, cosine decay, clipping), measures the loss on held-out documents and writes
an ordinary ``transformers`` directory with a model card that states data, steps and loss.

    python tools/pretrain.py --text books.txt.gz --output_dir src/obfuscatune/studies/bundled/model --max_steps 5000
"""

import argparse
import gzip
import hashlib
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def read_documents(paths: list[Path]) -> list[str]:
    """Return the documents of all files, in order; ``.gz`` files are unpacked."""
    documents = []
    for path in paths:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            text = file.read()
        documents += [part.strip() for part in text.split(f"\n{END_OF_TEXT}\n") if part.strip()]
    return documents


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
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


def held_out_loss(model: GPT2LMHeadModel, rows: torch.Tensor, batch_size: int) -> float:
    """Mean loss in nats per token over ``rows``, without dropout."""
    model.eval()
    with torch.inference_mode():
        losses = [model(batch.long(), labels=batch.long()).loss.item() for batch in rows.split(batch_size)]
    model.train()
    return sum(losses) / len(losses)


def train(model: GPT2LMHeadModel, rows: torch.Tensor, options: argparse.Namespace) -> None:
    """Passes over the rows, shuffled anew in each, under bfloat16 autocast, in place."""
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95))

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / options.warmup_steps)
        return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / options.max_steps))))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator = torch.Generator().manual_seed(options.seed)
    passes = math.ceil(options.max_steps * options.batch_size / len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(passes)])
    bar = tqdm(range(options.max_steps), unit="step", mininterval=5)
    for step in bar:
        batch = rows[order[step * options.batch_size :][: options.batch_size]].long()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def write(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, directory: Path, card: str) -> None:
    """Write weights (float16 in the file, float32 when loaded), configuration, tokenizer and model card."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.dtype = "float32"
    model.config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(card, encoding="utf-8")


CARD = """# The bundled model: GPT-2 architecture, small enough to ship

{layers} layers, d = {width}, {heads} heads, {positions} positions, byte-level BPE of {vocab}, {parameters:,}
parameters. Weights are stored in float16 and load as float32. A weak language model: its use is to show and test the
protected fine-tuning on real, trained weights, not to write prose.

| what | value |
|---|---|
| data | {documents} public-domain books, {bytes:,} bytes, SHA-256 `{digest}` |
| tokens seen in training | {tokens:,} (one pass has {available:,}) |
| held out | {held_documents} documents, {held_tokens:,} tokens |
| steps, batch, window | {steps:,} x {batch} x {positions} |
| optimizer | AdamW, learning rate {rate}, warm-up {warmup}, cosine decay to 5 %, clipping 1.0, weight decay 0.1 |
| arithmetic | bfloat16 autocast on a CPU, {minutes:.0f} minutes |
| held-out loss | {loss:.3f} nats per token, {bits:.3f} bits per byte |

Made by `tools/pretrain.py` with seed {seed} and torch {torch}. The training text is in the public domain.
"""


def main() -> None:
    """Train and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files, .gz allowed")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_steps", type=int, default=5000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--warmup_steps", type=int, default=150)
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--n_embd", type=int, default=256)
    parser.add_argument("--n_layer", type=int, default=4)
    parser.add_argument("--n_head", type=int, default=4)
    parser.add_argument("--n_positions", type=int, default=256)
    parser.add_argument("--seed", type=int, default=20240702)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    documents = read_documents(options.text)
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    held, training = documents[::25], [d for i, d in enumerate(documents) if i % 25]
    tokenizer = train_tokenizer(training, options.vocab_size)
    rows = windows(encode(tokenizer, training), options.n_positions)
    held_tokens = encode(tokenizer, held)
    held_rows = windows(held_tokens, options.n_positions)[:512]
    config = GPT2Config(
        vocab_size=options.vocab_size,
        n_embd=options.n_embd,
        n_layer=options.n_layer,
        n_head=options.n_head,
        n_positions=options.n_positions,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    print(json.dumps({"rows": len(rows), "parameters": model.num_parameters(), "held_rows": len(held_rows)}))
    started = time.monotonic()
    train(model, rows, options)
    minutes = (time.monotonic() - started) / 60
    loss = held_out_loss(model, held_rows, options.batch_size)
    bytes_per_token = sum(len(d.encode()) for d in held) / len(held_tokens)
    card = CARD.format(
        layers=options.n_layer,
        width=options.n_embd,
        heads=options.n_head,
        positions=options.n_positions,
        vocab=options.vocab_size,
        parameters=model.num_parameters(),
        documents=len(documents),
        bytes=sum(len(d.encode()) for d in documents),
        digest=digest,
        tokens=options.max_steps * options.batch_size * options.n_positions,
        available=rows.numel(),
        held_documents=len(held),
        held_tokens=len(held_tokens),
        steps=options.max_steps,
        batch=options.batch_size,
        rate=options.learning_rate,
        warmup=options.warmup_steps,
        minutes=minutes,
        loss=loss,
        bits=loss / math.log(2) / bytes_per_token,
        seed=options.seed,
        torch=torch.__version__,
    )
    write(model, tokenizer, options.output_dir, card)
    print(f"held-out loss {loss:.3f} nats per token after {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
