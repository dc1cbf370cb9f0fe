"""Models, tokenizers and adapters from a directory or the hub, refused in one line where they do not fit.

Code that comes with a model is never run. That must be said to transformers: where nobody has decided, it asks on the
terminal, and in an enclave the terminal is the operator's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from obfuscatune.errors import UsageError

DTYPES = ("float32", "float64", "bfloat16")
_PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<PAD>")


def load_config(name: str) -> Any:
    """Return the configuration of a model.

    Raises:
        UsageError: nothing there that can be read. UnsupportedModelError: one that its family's record refuses.
    """
    from transformers import AutoConfig

    from obfuscatune.enclave.families import FAMILIES, family_of

    if name[:1] in "./~" and not Path(name).is_dir():
        raise UsageError("no such model directory", got=name, where="--model_name_or_path")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unreadable("the model's configuration", name, error) from error
    if getattr(config, "model_type", None) in FAMILIES:
        family_of(config)
    return config


def load(name: str | Path, dtype: str = "float32") -> Any:
    """Return a causal language model to be protected, from a directory or the hub, on the CPU in evaluation mode.

    The weights of its blocks' linear layers are not in it yet: :func:`obfuscatune.protect` reads, keys and drops them
    layer by layer, so that the enclave never holds the whole model. Until then the model has all shapes, an adapter can
    be put around it, and a forward is refused. To compute with a model in the clear load it with ``transformers``.

    Args:
        name: a directory with safetensors, one file or shards, or a name on the hub.
        dtype: ``float32``, ``float64`` or ``bfloat16``; weights are converted where they have another on disk.

    Raises:
        UsageError: nothing there that can be read; other files of weights than safetensors; tensors that are missing,
            superfluous or of another shape. UnsupportedModelError: a model that cannot be run exactly.
    """
    import torch
    from transformers.utils import logging

    from obfuscatune.enclave.lazy import load_lazily
    from obfuscatune.training.directory import DirectoryTensors

    if dtype not in DTYPES:
        raise UsageError("dtype of the weights", got=repr(dtype), expected=", ".join(DTYPES))
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    name = str(name)
    config = load_config(name)
    directory = _find_directory(name)
    model = load_lazily(config, DirectoryTensors(directory), getattr(torch, dtype))
    model.name_or_path = model.config.name_or_path = name  # adapters name their base by it
    _load_generation_config(model, directory)
    return model


def _find_directory(name: str) -> Path:
    """Return the directory of a model; of one on the hub, that of the cache."""
    if Path(name).is_dir():
        return Path(name)
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    try:
        found = cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False)
        if found is None:
            found = cached_file(name, "model.safetensors.index.json")
            get_checkpoint_shard_files(name, found)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise _unreadable("the model's weights", name, error) from error
    return Path(str(found)).parent


def _load_generation_config(model: Any, directory: Path) -> None:
    from transformers import GenerationConfig

    if not (directory / "generation_config.json").exists():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise _unreadable("the settings of generation", str(directory), error) from error


def load_model(name: str, dtype: str) -> Any:
    """Return the causal language model, its weights mapped from the file; as :func:`load` otherwise.

    For a model that computes in the clear.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    load_config(name)
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unreadable("the model's weights", name, error) from error


def load_tokenizer(name: str, config: Any) -> Any:
    """Return the tokenizer, with a padding token: its own, or one of the usual names that it has, or its end of text.

    The end of text may pad, because padding is told by the attention mask and the labels, never by the token.

    Raises:
        UsageError: none there, or one with more tokens than the model has.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unreadable("the tokenizer", name, error) from error
    if len(tokenizer) > config.vocab_size:
        got, expected = f"{len(tokenizer)} tokens", f"at most the model's {config.vocab_size}"
        raise UsageError("tokenizer of another model", got=got, expected=expected, where=name)
    if tokenizer.pad_token_id is None:
        known = tokenizer.get_vocab()
        tokenizer.pad_token = next((name for name in _PAD_TOKENS if name in known), tokenizer.eos_token)
    return tokenizer


def load_generation_settings(name: str) -> Any:
    """Return the model's own settings of generation. Raises UsageError where they cannot be read."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(name)
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable("the generation settings", name, error) from error


def load_adapter(model: Any, path: str) -> Any:
    """Return the PEFT model of an adapter for ``model``. Raises UsageError where it cannot be read or does not fit."""
    return load_adapters(model, {"default": path})


def load_adapters(model: Any, paths: Mapping[str, str]) -> Any:
    """Return the PEFT model of adapters by name, the first one in use; raises as :func:`load_adapter`."""
    from peft import PeftModel
    from safetensors import SafetensorError

    for name, path in paths.items():
        try:
            if isinstance(model, PeftModel):
                model.load_adapter(path, name)
            else:
                model = PeftModel.from_pretrained(model, path, adapter_name=name)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise _unreadable("the adapter", path, error) from error
    return model


def _unreadable(what: str, name: str, error: Exception) -> UsageError:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UsageError(
        f"cannot load {what}",
        got=first[:200],
        where=name,
        hint="give a directory that save_pretrained wrote, or a hub name",
    )
