"""The shapes that the benchmark knows by name: hyper-parameters of published models, and of any local directory.

Only facts of each model's ``config.json`` that decide shapes and arithmetic are here. Weights are random.
"""

import functools
from pathlib import Path
from typing import Any

from obfuscatune.errors import UsageError
from obfuscatune.studies.bench.workloads import SIZES, gpt2_config

Fields = dict[str, Any]

_SMOLLM: Fields = {"vocab_size": 49152, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
_QWEN25: Fields = {"vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
_QWEN3: Fields = {**_QWEN25, "max_position_embeddings": 40960, "head_dim": 128}
_LLAMA32: Fields = {
    **{"vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
    **{"head_dim": 64, "num_key_value_heads": 8},
    "rope_scaling": {
        **{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 8192,
    },
}
_PYTHIA: Fields = {
    **{"vocab_size": 50304, "max_position_embeddings": 2048, "rotary_pct": 0.25, "tie_word_embeddings": False},
    **{"use_parallel_residual": True, "hidden_act": "gelu", "layer_norm_eps": 1e-5},
}


_MISTRAL: Fields = {"vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": 4096}
_GEMMA2: Fields = {
    **{"vocab_size": 256000, "head_dim": 256, "max_position_embeddings": 8192, "sliding_window": 4096},
    **{"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
}
_PHI3: Fields = {"vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": 2047}
_TIED: Fields = {"tie_word_embeddings": True}


def _of(family: Fields, width: int, inner: int, layers: int, heads: int, kv_heads: int | None = None) -> Fields:
    own = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**family, **own} if kv_heads is None else {**family, **own, "num_key_value_heads": kv_heads}


# Name of the shape: model_type of transformers, and its hyper-parameters.
NAMED: dict[str, tuple[str, Fields]] = {
    "smollm-135m": ("llama", _of(_SMOLLM | _TIED, 576, 1536, 30, 9, 3)),
    "smollm-360m": ("llama", _of(_SMOLLM | _TIED, 960, 2560, 32, 15, 5)),
    "tinyllama-1.1b": ("llama", _of(_SMOLLM | {"vocab_size": 32000}, 2048, 5632, 22, 32, 4)),
    "llama-3.2-1b": ("llama", _of(_LLAMA32 | _TIED, 2048, 8192, 16, 32)),
    "llama-3.2-3b": ("llama", _of(_LLAMA32 | _TIED | {"head_dim": 128}, 3072, 8192, 28, 24)),
    "mistral-7b": ("mistral", _of(_MISTRAL, 4096, 14336, 32, 32, 8)),
    "qwen2.5-0.5b": ("qwen2", _of(_QWEN25 | _TIED, 896, 4864, 24, 14, 2)),
    "qwen2.5-1.5b": ("qwen2", _of(_QWEN25 | _TIED, 1536, 8960, 28, 12, 2)),
    "qwen3-0.6b": ("qwen3", _of(_QWEN3 | _TIED, 1024, 3072, 28, 16, 8)),
    "gemma-2-2b": ("gemma2", _of(_GEMMA2 | _TIED, 2304, 9216, 26, 8, 4)),
    "phi-3-mini": ("phi3", _of(_PHI3, 3072, 8192, 32, 32, 32)),
    "pythia-160m": ("gpt_neox", _of(_PYTHIA, 768, 3072, 12, 12)),
    "pythia-410m": ("gpt_neox", _of(_PYTHIA, 1024, 4096, 24, 16)),
    "pythia-1b": ("gpt_neox", _of(_PYTHIA, 2048, 8192, 16, 8)),
}


def is_shape(name: str) -> bool:
    """Whether ``name`` is a shape that is known here; a directory of that name is written with a slash in it."""
    return name in SIZES or name in NAMED


def shape_config(name: str) -> Any:
    """Return the ``transformers`` configuration of a shape known by name, or of a local directory, without dropout.

    Raises:
        UsageError: neither, or a configuration that cannot be read.
    """
    from transformers import AutoConfig

    from obfuscatune.training.loading import load_config

    if name in SIZES:
        return gpt2_config(SIZES[name])
    if name in NAMED:
        model_type, fields = NAMED[name]
        config: Any = AutoConfig.for_model(model_type, **fields)
        config.bos_token_id = config.eos_token_id = 0  # the library's defaults are of other vocabularies
        config.pad_token_id = None
    elif Path(name).is_dir():
        config = load_config(name)
    else:
        expected = f"one of {', '.join(known_names())}, or a model's directory"
        raise UsageError("no such shape", got=name, expected=expected, where="--size")
    for field, value in config.to_dict().items():
        if field.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(config, field, 0.0)
    return config


@functools.cache
def layers_of(name: str) -> int:
    """Return the number of decoder blocks."""
    return int(shape_config(name).num_hidden_layers)


def known_names() -> tuple[str, ...]:
    """Return the names, the smaller families first."""
    return (*SIZES, *NAMED)
