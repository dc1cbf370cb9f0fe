"""The cells of `conditioning`: functions of plain values to plain values, each able to run in a process of its own."""

import base64
import dataclasses
import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from obfuscatune.enclave.families import read_decoder
from obfuscatune.enclave.protect import protect
from obfuscatune.profiles import resolve
from obfuscatune.studies.reproduce.fidelity import compare, read_text, text_windows
from obfuscatune.studies.reproduce.keyed import DTYPES, NONE, add_adapters, key_model, key_switches
from obfuscatune.studies.reproduce.lesson import Lesson, ask, teach
from obfuscatune.studies.reproduce.one_layer import layer_errors
from obfuscatune.training.loading import load_model, load_tokenizer

Plain = dict[str, Any]


def layer(inputs: Plain, places: Plain) -> Plain:
    """Errors of one linear layer; see `layer_errors`."""
    return layer_errors(inputs["keys"], width=inputs["width"], rows=inputs["rows"], seed=inputs["seed"])


def inference(inputs: Plain, places: Plain) -> Plain:
    """Fidelity to the plain model on the text, and the accuracy of the taught model, under keys in one process."""
    device, dtype = inputs["device"], DTYPES[inputs["dtype"]]
    options: Plain = {"dtype": dtype, "seed": inputs["seed"], "key_precision": inputs["key_precision"]}
    model, tokenizer = _model(places)
    key_model(model, inputs["keys"], **options)
    fidelity = compare(model.to(device), _reference(places, device), _windows(inputs, places, tokenizer))
    taught, _ = _model(places)
    _merge(taught, load(base64.b64decode(places["adapter"])))
    key_model(taught, inputs["keys"], **options)
    accuracy = ask(taught.to(device), tokenizer, Lesson(**inputs["lesson"]))
    return {**dataclasses.asdict(fidelity), "accuracy": accuracy}


def two_processes(inputs: Plain, places: Plain) -> Plain:
    """The same fidelity of the real thing: `protect`, an enclave and a worker, under keys of its own."""
    model, tokenizer = _model(places, inputs["dtype"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        profile = resolve("paper", **key_switches(inputs["keys"]))
    device = None if inputs["device"] == "cpu" else inputs["device"]
    with protect(model, profile=profile, device=device, insecure_test_seed=inputs["seed"]) as protected:
        windows = _windows(inputs, places, tokenizer)
        return dataclasses.asdict(compare(protected.model, _reference(places, inputs["device"]), windows))


def lesson(inputs: Plain, places: Plain) -> Plain:
    """Train through the keys and ask, still through them; ``adapter`` is there where no keys are: plain factors."""
    model, tokenizer = _model(places)
    settings = Lesson(**inputs["lesson"])
    layers = key_model(model, inputs["keys"], dtype=DTYPES[inputs["dtype"]], seed=settings.seed)
    trained = add_adapters(
        layers, r=settings.r, alpha=settings.alpha, seed=settings.seed, outside=inputs["lora"] == "worker"
    )
    device = inputs["device"]
    model.to(device)
    losses = teach(model, trained, tokenizer, settings)
    value = {"accuracy": ask(model, tokenizer, settings), "losses": losses}
    if inputs["keys"] == NONE and inputs["dtype"] == "float32":
        factors = {
            f"{path}.{name}": parameter.detach().cpu().contiguous()
            for path, each in layers.items()
            for name, parameter in (("a", each.a), ("b", each.b))
            if parameter is not None
        }
        scales = {f"{path}.scale": torch.tensor(each.scale) for path, each in layers.items()}
        value["adapter"] = base64.b64encode(save({**factors, **scales})).decode()
    return value


def windows_digest(windows: Tensor) -> str:
    """Return the SHA-256 of token ids: 64 hex digits."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


def _model(places: Plain, dtype: str = "float32") -> tuple[Any, Any]:
    model = load_model(places["model"], dtype)
    return model.eval(), load_tokenizer(places["model"], model.config)


def _reference(places: Plain, device: str) -> Any:
    return _model(places, "float64")[0].to(device)


def _windows(inputs: Plain, places: Plain, tokenizer: Any) -> Tensor:
    path = places["text_file"]
    text = read_text(None if path is None else Path(path))
    return text_windows(text, tokenizer, windows=inputs["windows"], length=inputs["window_tokens"])


def _merge(model: Any, factors: dict[str, Tensor]) -> None:
    """Add ``A B scale`` to each plain weight."""
    with torch.no_grad():
        for block in read_decoder(model).blocks:
            for layer in block.layers:
                name, weight = layer.path, layer.weight
                weight += factors[f"{name}.a"] @ factors[f"{name}.b"] * factors[f"{name}.scale"]
