"""A model whose large weights are read one layer at a time, as they are keyed, and dropped again.

For weights that are not a file that can be mapped, as in a sealed file: the plain copy in the enclave is never larger
than one block and what stays inside. The model is the stock one; its large weights have their shapes and, until they
are filled, no memory.
"""

import re
from collections.abc import Collection
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from obfuscatune.enclave.families import read_decoder
from obfuscatune.errors import UnsupportedModelError
from obfuscatune.profiles import Profile


class TensorSource(Protocol):
    """Tensors by name, read when asked for."""

    def names(self) -> Collection[str]:
        """Return all names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape, without reading the tensor."""

    def get(self, name: str) -> Tensor:
        """Read one tensor."""


class LazyWeights:
    """The large weights of one model, by the path of their layer, until they are keyed. Secret: the plain weights."""

    def __init__(self, model: nn.Module, source: TensorSource, names: dict[str, str]) -> None:
        self._source, self._names = source, names
        self._parameters = {path: model.get_parameter(path) for path in names}
        self._filled: list[nn.Parameter] = []

    def fill(self, layer: str) -> None:
        """Read the weight of a layer into the model, if it is one of these."""
        path = f"{layer}.weight"
        if path in self._names:
            parameter = self._parameters[path]
            _copy(parameter, self._source.get(self._names[path]))
            self._filled.append(parameter)

    def release(self) -> None:
        """Drop all that was filled from the model; whoever holds another view of it must drop that too."""
        for parameter in self._filled:
            parameter.data = parameter.new_empty(0)
        self._filled.clear()


def load_lazily(
    config: Any, source: TensorSource, dtype: torch.dtype, profile: Profile
) -> tuple[nn.Module, LazyWeights]:
    """Return the causal language model of ``config``, in evaluation mode, and the weights that `protect` is to fill.

    Args:
        config: a ``transformers`` configuration. source: its tensors, under the names that ``save_pretrained`` gives.
        dtype: of the weights. profile: decides which layers leave, and so are not read yet.

    Raises:
        UnsupportedModelError: an unknown family, or tensors that are not those of the configuration.
    """
    from transformers import AutoModelForCausalLM

    _check(config, source)
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, trust_remote_code=False
        )
    wanted = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    if config.tie_word_embeddings:
        wanted = {name: shape for name, shape in wanted.items() if name not in (skeleton._tied_weights_keys or {})}
    names = _match(wanted, source, skeleton)
    leaving = {
        f"{layer.path}.weight"
        for block in read_decoder(skeleton).blocks
        if profile.remote and block.index >= profile.enclave_blocks
        for layer in block.layers
    }
    # Of an empty tensor no page is taken before it is written.
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in wanted.items()}
    for name, tensor in tensors.items():
        if name not in leaving:
            _copy(tensor, source.get(names[name]))
    model = type(skeleton).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    # It calls itself "None" now. PEFT writes the name into adapters, and looks for a directory or a model on the hub of
    # that name: the one is the operator's, the other anybody's.
    model.name_or_path = model.config.name_or_path = ""
    return model.eval(), LazyWeights(model, source, {name: names[name] for name in wanted if name in leaving})


def _check(config: Any, source: TensorSource) -> None:
    """Refuse what a configuration of another party can ask for before a tensor of it is looked at."""
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError("a quantized model", expected="plain floating-point weights")
    attention = config._attn_implementation
    if attention not in (None, "eager", "sdpa"):  # others are code that is loaded by this name, from the hub too
        raise UnsupportedModelError("attention of the model's configuration", expected="eager or sdpa")
    layers = config.num_hidden_layers
    if type(layers) is not int or not 1 <= layers <= len(source.names()):  # each is made before weights are compared
        expected = f"1 to {len(source.names())}, the number of tensors"
        raise UnsupportedModelError("number of layers in the configuration", expected=expected)


def _match(wanted: dict[str, tuple[int, ...]], source: TensorSource, skeleton: Any) -> dict[str, str]:
    """Find each tensor of the model in the source, with or without the prefix of the base model."""
    there, prefix = set(source.names()), f"{skeleton.base_model_prefix}."
    found = {}
    for name, shape in wanted.items():
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        given = name if name in there else other
        if given not in there:
            raise UnsupportedModelError("a tensor of the model is missing", expected=name)
        if tuple(source.shape(given)) != shape:
            got, expected = list(source.shape(given)), list(shape)
            raise UnsupportedModelError(
                "a tensor of the model has another shape", got=got, expected=expected, where=name
            )
        found[name] = given
    ignored = skeleton._keys_to_ignore_on_load_unexpected or []
    tied = skeleton._tied_weights_keys or {}
    rest = [
        name
        for name in sorted(there - set(found.values()))
        if name not in tied and not any(re.search(pattern, name) for pattern in ignored)
    ]
    if rest:
        raise UnsupportedModelError("tensors that are not of this model", got=", ".join(rest[:5]))
    return found


def _copy(target: Tensor, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise UnsupportedModelError("a weight that is no floating-point tensor", got=tensor.dtype)
    with torch.no_grad():
        target.copy_(tensor)
