"""How far a model in low precision under keys is from the plain one in float64, on held-out text."""

import gzip
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from obfuscatune.errors import UsageError
from obfuscatune.studies.bundled.records import MAX_FACTS, company_records

_MAX_TEXT_BYTES = 1 << 22  # of a text file; more than any preset looks at


@dataclass(frozen=True)
class Fidelity:
    """What a forward over windows of text gave.

    Args:
        error: ``|l - l64| / |l64|`` over all logits, each row centred, since softmax ignores a constant.
        largest: of the differences of two centred logits.
        top1: share of positions where the likeliest next token is that of float64.
        perplexity: exp of the mean loss of a next token, nats. reference_perplexity: that of float64.
        finite: whether every logit is a finite number; the others are NaN where it is not.
    """

    error: float
    largest: float
    top1: float
    perplexity: float
    reference_perplexity: float
    finite: bool


def read_text(path: Path | None) -> str:
    """Return the first 4 MiB of a UTF-8 text, plain or ``.gz``; without a path the bundled records, told as sentences.

    Raises:
        UsageError: the file cannot be read, or is no UTF-8.
    """
    if path is None:
        rows, _ = company_records(seed=1, facts=MAX_FACTS)
        return "\n".join(row["prompt"] + row["completion"] for row in rows)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(_MAX_TEXT_BYTES)
        # The last character may be cut.
        return data.decode("utf-8", errors="strict" if len(data) < _MAX_TEXT_BYTES else "ignore")
    except OSError as error:
        raise UsageError("cannot read the text", got=error.strerror or type(error).__name__, where=str(path)) from None
    except UnicodeDecodeError:
        raise UsageError("the text is not UTF-8", where=str(path)) from None


def text_windows(text: str, tokenizer: Any, *, windows: int, length: int) -> Tensor:
    """Return ``[windows, length]`` token ids, taken evenly over the text.

    Raises:
        UsageError: the text is too short.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < windows * length:
        raise UsageError("the text is too short", got=f"{len(ids)} tokens", expected=f"at least {windows * length}")
    stride = len(ids) // windows
    return torch.tensor([ids[i * stride : i * stride + length] for i in range(windows)])


@torch.inference_mode()
def compare(model: Any, reference: Any, windows: Tensor) -> Fidelity:
    """Run both models over the windows, one at a time; ``reference`` is the plain one in float64."""
    squares = expected_squares = loss = reference_loss = 0.0
    agreeing, largest, finite = 0, 0.0, True
    devices = [next(m.parameters()).device for m in (model, reference)]
    for window in windows:
        got, expected = (
            m(input_ids=window[None].to(device), use_cache=False).logits[0].double().to(devices[1])
            for m, device in zip((model, reference), devices, strict=True)
        )
        targets = window[1:].to(devices[1])
        loss += F.cross_entropy(got[:-1], targets, reduction="sum").item()
        reference_loss += F.cross_entropy(expected[:-1], targets, reduction="sum").item()
        agreeing += int((got.argmax(-1) == expected.argmax(-1)).sum())
        finite = finite and bool(got.isfinite().all())
        got, expected = (logits - logits.mean(-1, keepdim=True) for logits in (got, expected))
        squares += (got - expected).square().sum().item()
        expected_squares += expected.square().sum().item()
        largest = max(largest, (got - expected).abs().max().item())
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    if not finite:
        squares = loss = largest = math.nan
    return Fidelity(
        error=math.sqrt(squares / expected_squares),
        largest=largest,
        top1=agreeing / windows.numel(),
        perplexity=math.exp(min(loss / predicted, 700.0)),  # beyond it, no float
        reference_perplexity=math.exp(reference_loss / predicted),
        finite=finite,
    )
