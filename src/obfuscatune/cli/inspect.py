"""``obfuscatune inspect``: what each profile would keep inside, from the configuration alone."""

import json
from dataclasses import dataclass
from typing import Any

from obfuscatune.cli.options import ModelOptions, option, takes

EPILOG = (
    "Examples:\n\nobfuscatune inspect --model_name_or_path gpt2\n\n"
    "obfuscatune inspect --model_name_or_path ./model --json"
)


@dataclass(frozen=True, kw_only=True)
class InspectOptions(ModelOptions):
    """Options of ``obfuscatune inspect``."""

    as_json: bool = option("print JSON for scripts", False, flag="--json")


@takes(InspectOptions)
def command(options: InspectOptions) -> None:
    """Show a model's shapes, and for each profile what stays in the enclave and what crosses. Loads no weights."""
    from obfuscatune.training.loading import load_config

    found = examine(load_config(options.model_name_or_path), options.dtype)
    found = {"model": options.model_name_or_path, **found}
    if options.as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)


def examine(config: Any, dtype: str) -> dict[str, Any]:
    """Return the findings as plain values, the profiles' under ``profiles``; the formula is in ``estimate.py``."""
    import torch
    from transformers import AutoModelForCausalLM

    from obfuscatune.enclave.families import family_of
    from obfuscatune.profiles import PROFILES
    from obfuscatune.studies.bench.estimate import estimate

    spec = family_of(config)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.tie_weights()
    shape = spec.attention_shape(config, 0)
    itemsize = getattr(torch, dtype).itemsize
    return {
        "family": spec.model_type,
        "blocks": sum(1 for _ in spec.iter_blocks(model)),
        "width": spec.width(config),
        "hidden": spec.hidden(config),
        "heads": shape.heads,
        "head_dim": shape.head_dim,
        "vocabulary": int(config.vocab_size),
        "tied_head": bool(config.tie_word_embeddings),
        "dtype": dtype,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "profiles": [estimate(model, spec, profile, itemsize).to_dict() for profile in PROFILES.values()],
    }


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    for name, value in found.items():
        if name != "profiles":
            print(f"{name:<12}{value:,}" if type(value) is int else f"{name:<12}{value}")
    table = Table(title=f"one forward of all keyed blocks, in {found['dtype']}")
    table.add_column("profile")
    for header in ("in the enclave", "share", "calls", "bytes out/token", "bytes back/token", "arithmetic"):
        table.add_column(header, justify="right")
    for row in found["profiles"]:
        table.add_row(
            row["profile"],
            f"{row['enclave_parameters']:,}",
            f"{100 * row['enclave_share']:.1f} %",
            f"{row['calls']}",
            f"{row['bytes_sent_per_token']:,}",
            f"{row['bytes_received_per_token']:,}",
            f"{100 * row['enclave_arithmetic']:.1f} %",
        )
    Console().print(table)
