"""``obfuscatune inspect``: what each profile would keep inside, from the configuration alone."""

import json
import warnings
from dataclasses import dataclass
from typing import Any

from obfuscatune.cli.options import ModelOptions, option, takes
from obfuscatune.cli.table import print_table

EPILOG = (
    "Examples:\n\nobfuscatune inspect --model_name_or_path gpt2\n\n"
    "obfuscatune inspect --model_name_or_path llama-3.2-1b\n\n"
    "obfuscatune inspect --model_name_or_path ./model --json"
)


@dataclass(frozen=True, kw_only=True)
class InspectOptions(ModelOptions):
    """Options of ``obfuscatune inspect``."""

    as_json: bool = option("print JSON for scripts", False, flag="--json")


@takes(InspectOptions)
def command(options: InspectOptions) -> None:
    """Show a model's shapes, and for each profile what stays in the enclave and what crosses. Loads no weights."""
    from obfuscatune.studies.bench.shapes import is_shape, shape_config
    from obfuscatune.training.loading import load_config

    name = options.model_name_or_path
    config = shape_config(name) if is_shape(name) else load_config(name)
    found = {"model": name, **examine(config, options.dtype)}
    if options.as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)


def examine(config: Any, dtype: str) -> dict[str, Any]:
    """Return the findings as plain values, the profiles' under ``profiles``; the formula is in ``estimate.py``."""
    import torch

    from obfuscatune.enclave.families import read_decoder
    from obfuscatune.enclave.families.empty import empty_model
    from obfuscatune.enclave.families.fit import fit
    from obfuscatune.errors import UnsupportedModelError
    from obfuscatune.profiles import PROFILES
    from obfuscatune.studies.bench.estimate import estimate

    model = empty_model(config)
    model.tie_weights()
    decoder = read_decoder(model)
    itemsize = getattr(torch, dtype).itemsize
    profiles: list[dict[str, Any]] = []
    for profile in PROFILES.values():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the changed name says what was changed
                fitted = fit(decoder, profile)
        except UnsupportedModelError as error:
            profiles.append({"profile": profile.name, "refused": str(error)})
            continue
        said = {"audience": profile.audience, "claim": profile.claim}
        profiles.append({**estimate(decoder, fitted, itemsize).to_dict(), **said})
    return {
        "family": decoder.family,
        "record": decoder.known,
        **_shape(decoder),
        "vocabulary": int(config.vocab_size),
        "tied_head": bool(config.tie_word_embeddings),
        "dtype": dtype,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "profiles": profiles,
    }


def _shape(decoder: Any) -> dict[str, Any]:
    """What is known of the blocks: by the family's record, or the linear layers that were found."""
    first = decoder.blocks[0]
    found: dict[str, Any] = {"blocks": len(decoder.blocks), "width": decoder.width}
    if first.attention is not None and first.mlp is not None:
        shape = first.attention.shape
        found |= {
            "hidden": first.mlp.last.shape[0],
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
        }
    return {**found, "calls": _calls(decoder.blocks)}


def _calls(blocks: list[Any]) -> list[dict[str, Any]]:
    """Which layers of a block travel in one call, for each kind of block; hybrid models have several kinds."""
    kinds: dict[tuple[str, ...], list[int]] = {}
    for block in blocks:
        names = [[layer.path.removeprefix(f"{block.path}.") for layer in group.layers] for group in block.groups]
        kinds.setdefault(tuple(" + ".join(together) for together in names), []).append(block.index)
    return [{"blocks": indices, "calls": list(calls)} for calls, indices in kinds.items()]


def _show(found: dict[str, Any]) -> None:
    for name, value in found.items():
        if name not in ("calls", "profiles"):
            print(f"{name:<18}{value:,}" if type(value) is int else f"{name:<18}{value}")
    for kind in found["calls"]:
        which = "each block" if len(found["calls"]) == 1 else "blocks " + ", ".join(map(str, kind["blocks"]))
        print(f"calls of {which}: {'; '.join(kind['calls'])}")
    refused = [row for row in found["profiles"] if "refused" in row]
    rows = [
        (
            row["profile"],
            f"{row['enclave_parameters'] / 1e6:,.1f} M",
            f"{100 * row['enclave_share']:.1f} %",
            f"{row['calls']}",
            f"{row['bytes_sent_per_token']:,}",
            f"{row['bytes_received_per_token']:,}",
            f"{100 * row['enclave_arithmetic']:.1f} %",
        )
        for row in found["profiles"]
        if row not in refused
    ]
    headers = ("profile", "in the enclave", "share", "calls", "bytes out / token", "bytes back / token", "arithmetic")
    print_table(f"one forward of all keyed blocks, in {found['dtype']}", headers, rows)
    print("for whom, and what is claimed against whoever operates the worker:")
    for row in found["profiles"]:
        if row not in refused:
            print(f"  {row['profile']}: {row['audience']}\n    claim: {row['claim']}")
    for row in refused:
        print(f"{row['profile']} cannot run this model: {row['refused']}")
