"""Models, tokenizers and adapters from a directory or the hub, refused in one line where they do not fit.

Code that comes with a model is never run. That must be said to transformers: where nobody has decided, it asks on the
terminal, and in an enclave the terminal is the operator's.
"""

import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from obfuscatune.errors import UnsupportedModelError, UsageError
from obfuscatune.profiles import Profile, resolve
from obfuscatune.training.config_limits import refuse_many_layers

DTYPES = ("float32", "float64", "bfloat16")
_FIELD = re.compile(r"(?:Validation error for field|Class validation error for validator) '(\w{1,64})'")
_PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<PAD>")


def load_config(name: str) -> Any:
    """Return the configuration of a model; of one that takes pictures too, that of what stock loading makes of it.

    Raises:
        UsageError: nothing there that can be read. UnsupportedModelError: one that asks for code of attention by name.
    """
    from transformers import AutoConfig

    from obfuscatune.enclave.families.empty import refuse_attention, text_alone

    if _is_path(name) and not Path(name).is_dir():
        raise UsageError("no such model directory", got=name, where="--model_name_or_path", hint=_path_hint(name))
    refuse_many_layers(Path(name) / "config.json")
    try:
        config = text_alone(AutoConfig.from_pretrained(name, trust_remote_code=False))
    except Exception as error:  # a value that does not fit fails in many ways
        raise _unreadable("the model's configuration", name, error) from error
    refuse_attention(config)
    return config


def _is_path(name: str) -> bool:
    """Whether a name is that of a directory: a misspelt one must not be asked for on the hub, which is a third party.

    Names on the hub are NAME or OWNER/NAME. Where a folder OWNER is here, it is that one.
    """
    return name[:1] in "./~" or name.count("/") > 1 or ("/" in name and Path(name.partition("/")[0]).is_dir())


def _path_hint(name: str) -> str:
    if name[:1] not in "./~" and name.count("/") == 1:
        return f"the folder {name.partition('/')[0]} is here, so the hub was not asked"
    return "give a directory that save_pretrained wrote, or a hub name"


def load(name: str | Path, dtype: str = "float32", profile: str | Profile | None = None) -> Any:
    """Return a causal language model to be protected, from a directory or the hub, on the CPU in evaluation mode.

    The weights of its blocks' linear layers are not in it yet: `obfuscatune.protect` reads, keys and drops them
    layer by layer, so that the enclave never holds the whole model. Until then the model has all shapes, an adapter can
    be put around it, and a forward is refused. To compute with a model in the clear load it with ``transformers``. Of a
    model whose layers cannot be told, such as one of experts, all weights are read here: ``profile="enclave"`` runs it.

    Args:
        name: a directory with safetensors, one file or shards, or a name on the hub.
        dtype: ``float32``, ``float64`` or ``bfloat16``; weights are converted where they have another on disk.
        profile: that it will be protected with, so that what only ``enclave`` runs is refused before it is read.

    Raises:
        UsageError: nothing there that can be read, or other files of weights than safetensors.
        UnsupportedModelError: a model that cannot be run exactly; tensors that are missing, superfluous or of another
            shape; one that is not finite. That of a block's linear layer shows only when it is read.
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
    whole = profile is None or not resolve(profile).remote
    model = load_lazily(config, DirectoryTensors(directory), getattr(torch, dtype), whole=whole)
    model.name_or_path = model.config.name_or_path = name  # adapters name their base by it
    _load_generation_config(model, directory)
    return model


def check_model(directory: Path) -> None:
    """Refuse a model directory that no enclave would train, before somebody seals it: reads every tensor once.

    Raises:
        UsageError, UnsupportedModelError: as :func:`load_tokenizer` and :func:`load`, non-finite weights included.
    """
    from obfuscatune.enclave.lazy import lazy_weights

    load_tokenizer(str(directory), load_config(str(directory)))
    weights = lazy_weights(load(directory, "bfloat16", "paper"))  # jobs run no model that only `enclave` would
    if weights is not None:
        weights.check()


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
    except Exception as error:
        raise _unreadable("the settings of generation", str(directory), error) from error


def load_model(name: str, dtype: str) -> Any:
    """Return the causal language model, its weights mapped from the file; as `load` otherwise.

    For a model that computes in the clear.

    Raises: as :func:`load`; numbers that are not finite are not looked for.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    load_config(name)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # of the files, of their format, or of a configuration that no model can have
        raise _unreadable("the model's weights", name, error) from error
    model, found = loaded
    # What is missing transformers draws at random, with a line in the log.
    _refuse_differences("the model", found["missing_keys"], found["unexpected_keys"], name)
    return model


def load_tokenizer(name: str, config: Any, **options: Any) -> Any:
    """Return the tokenizer, with a padding token: its own, or one of the usual names that it has, or its end of text.

    ``options`` are of ``AutoTokenizer.from_pretrained``, such as ``add_bos_token``.

    Any token may pad, because padding is told by the attention mask and the labels, never by the token.

    Raises:
        UsageError: none there, or one that is not the model's: ids beyond the model's embedding, or fewer tokens than
            half of it has. (Embeddings have some rows more, for the sake of their kernels.)
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # tokenizers raises its own as such
        raise _unreadable("the tokenizer", name, error) from error
    known = tokenizer.get_vocab()
    rows, size = config.get_text_config().vocab_size, 1 + max(known.values(), default=-1)
    # A special token of pictures may be beyond the embedding of a model of texts (Gemma 3): no text is made of it.
    used = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} - used
    if not rows < 2 * size or any(number >= rows and number not in special for number in known.values()):
        # Without files of a tokenizer, transformers makes one of special tokens alone.
        few = size <= len(tokenizer.all_special_ids)
        raise UsageError(
            "no tokenizer" if few else "tokenizer of another model",
            got=f"{size} tokens",
            expected=f"as many as the model's embedding, {rows}, or somewhat fewer",
            where=name,
            hint="tokenizer.json and tokenizer_config.json, as save_pretrained writes them, belong beside the model",
        )
    if tokenizer.pad_token_id is None:
        usual = next((name for name in _PAD_TOKENS if name in known), tokenizer.eos_token)
        tokenizer.pad_token = usual or min(known, key=known.__getitem__)
    return tokenizer


def load_generation_settings(name: str) -> Any:
    """Return the model's own settings of generation. Raises UsageError where they cannot be read."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(name)
    except Exception as error:
        raise _unreadable("the generation settings", name, error) from error


# How PEFT fills an adapter before its weights are read, without a change of the base. `pissa`, `olora`, `corda` and
# `loftq` take what they put into the adapter out of the base.
_STARTS = (True, False, "gaussian", "orthogonal", "eva", "lora_ga")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def load_adapter(model: Any, path: str) -> Any:
    """Return the PEFT model of an adapter for ``model``; raises as `load_adapters`."""
    return load_adapters(model, {"default": path})


def load_adapters(model: Any, paths: Mapping[str, str]) -> Any:
    """Return the PEFT model of adapters by name, the first one in use.

    Raises:
        UsageError: one cannot be read; it is not of a model of this shape, or not all of it is there; it is not finite.
    """
    for name, path in paths.items():
        model = _with_adapter(model, name, path)
    return model


def _with_adapter(model: Any, name: str, path: str) -> Any:
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    directory = Path(path)
    if _is_path(path) or directory.is_dir():
        expected = "adapter_config.json and adapter_model.safetensors"
        here = [name for name in _ADAPTER_FILES if (directory / name).is_file()]
        if "adapter_config.json" not in here or len(here) == 1:
            what = "no adapter in the directory" if directory.is_dir() else "no such adapter directory"
            raise UsageError(what, expected=expected, where=path, hint=None if directory.is_dir() else _path_hint(path))
        if "adapter_model.safetensors" not in here:
            hint = "load it with PEFT where you trust its files, and save it with save_pretrained"
            raise UsageError("the adapter is a pickle", got=here[-1], expected=expected, where=path, hint=hint)
    _refuse_changed_base(model, path)
    try:
        given = load_peft_weights(path, device="cpu")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            if isinstance(model, PeftModel):
                found = model
                found.load_adapter(path, name)
            else:
                found = PeftModel.from_pretrained(model, path, adapter_name=name)
    except Exception as error:  # a configuration that PEFT does not know fails in many ways
        if "not found in the base model" in str(error) or type(error).__name__ == "NoMatchingPeftModuleError":
            what, hint = "the adapter does not fit", "give the model that it was trained on"
            got = "no layer that it names is in the model"
            raise UnsupportedModelError(what, got=got, where=path, hint=hint) from error
        raise _unreadable("the adapter", path, error) from error
    wanted = get_peft_model_state_dict(found, save_embedding_layers=False, adapter_name=name)
    known = {*wanted, *found.state_dict()}  # an adapter may bring layers of the base along, whole
    _refuse_differences("the adapter", set(wanted) - set(given), set(given) - known, path)
    for name, tensor in given.items():
        if not tensor.isfinite().all():
            raise UsageError("the adapter is not finite", got=name, where=path, hint="its training run diverged")
    return found


def _refuse_changed_base(model: Any, path: str) -> None:
    """Refuse an adapter with whose loading PEFT changes the base's weights, where these are not in the model yet."""
    from peft import PeftConfig

    from obfuscatune.enclave.lazy import lazy_weights

    try:
        start = getattr(PeftConfig.from_pretrained(path), "init_lora_weights", True)
    except Exception as error:
        raise _unreadable("the adapter", path, error) from error
    if lazy_weights(model) is not None and start not in _STARTS:
        raise UsageError(
            "loading the adapter would change the model's own weights",
            got=f"init_lora_weights {ascii(start)[:40]}",
            expected="a plain LoRA adapter",
            where=path,
            hint="save it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )


def _refuse_differences(what: str, missing: Collection[str], unexpected: Collection[str], where: str) -> None:
    """Refuse tensors that a file lacks, or has beyond what the model takes of it."""
    faults = {"missing": missing, "unexpected": unexpected}
    got = [f"{len(names)} {fault} tensors: {', '.join(sorted(names)[:3])}" for fault, names in faults.items() if names]
    if got:
        hint = "it is of a model of another shape, or not all of it is there"
        raise UnsupportedModelError(f"{what} does not fit", got="; ".join(got), where=where, hint=hint)


def _unreadable(what: str, name: str, error: Exception) -> UsageError:
    # transformers says as an OSError which file or name there is not. Other errors may quote what they could not read,
    # and in an enclave both owners are told.
    words = str(error).splitlines() if isinstance(error, OSError) else ()
    first = next((line.strip() for line in words if line.strip()), f"{type(error).__name__} in the reader")
    if named := _FIELD.match(str(error)):  # a name of the library's own
        first = f"{named[1]}, which does not fit"
    if str(error).startswith("Can't find 'adapter_config.json'"):
        first = "no directory of that name, and nothing found on the hub"
    return UsageError(
        f"cannot load {what}",
        got=first[:200],
        where=name,
        hint="give a directory that save_pretrained wrote, or a hub name",
    )
