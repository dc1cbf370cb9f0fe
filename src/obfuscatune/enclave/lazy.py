"""A model whose large weights are read one layer at a time, as they are keyed, and dropped again.

The plain copy in the enclave is never larger than one block and what stays inside. The model is the stock one. Until it
is filled, a large weight is a view of one number, NaN, in the weight's own shape: PEFT can build an adapter around it,
it takes no memory, and whatever would compute with it cannot give a plausible result. A forward is refused besides.
"""

import math
import re
from collections.abc import Collection, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from obfuscatune.enclave.families import read_decoder
from obfuscatune.enclave.families.empty import empty_model, refuse_attention, refuse_wrapper
from obfuscatune.errors import OWN_CONFIG, SAVE_AGAIN, UNQUANTIZED, UnsupportedModelError, UsageError

_ATTRIBUTE = "_obfuscatune_lazy_weights"  # of a model that is not filled
# In files of older versions of transformers, of any family; it is computed from the configuration today.
_COMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
_CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias)$")  # likewise: [1, 1, n, n], and a number


class TensorSource(Protocol):
    """Tensors by name, read when asked for."""

    def names(self) -> Collection[str]:
        """Return all names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape, without reading the tensor."""

    def get(self, name: str) -> Tensor:
        """Read one tensor."""


class LazyWeights:
    """The large weights of one model, by the path of their layer, until they are keyed. Secret: the plain weights.

    It belongs to its model, where `lazy_weights` finds it, until `finish`.

    Args:
        model: with parameters that are not filled. source: of the tensors. names: in the source, by parameter.
    """

    def __init__(self, model: Any, source: TensorSource, names: dict[str, str]) -> None:
        self._model, self._source, self._names = model, source, names
        self._parameters: dict[str, nn.Parameter] = {path: model.get_parameter(path) for path in names}
        self._unfilled = _unfilled(model.dtype)
        for parameter in self._parameters.values():
            self._empty(parameter)
        self._filled: set[str] = set()
        self._kept: set[str] = set()
        self._guards = [module.register_forward_pre_hook(_refuse_forward) for module in (model, model.base_model)]
        setattr(model, _ATTRIBUTE, self)

    def fill(self, layer: str) -> None:
        """Read the weight of a layer into the model, if it is one of these.

        Raises:
            UsageError: somebody has written to the weight in the meantime, or it cannot be read.
            UnsupportedModelError: it is no floating-point tensor, or not finite.
        """
        path = f"{layer}.weight"
        if path not in self._names or path in self._filled:
            return
        parameter = self._parameters[path]
        if parameter.data_ptr() != self._unfilled.data_ptr():
            hint = "give the dtype where the model is loaded, and start LoRA without the base weights, as PEFT does"
            raise UsageError("a weight was changed before it was read from its file", where=path, hint=hint)
        parameter.data = _floating(self._source.get(self._names[path]), parameter.dtype, path)
        self._filled.add(path)

    def check(self) -> None:
        """Read each of the weights once and drop it again; raises as `fill`."""
        for path in self._names:
            self.fill(path.removesuffix(".weight"))
            self.release()

    def keep(self, layers: Iterable[str] | None = None) -> None:
        """Read the weights of layers that stay in the enclave, of all layers by default; raises as `fill`."""
        paths = [path.removesuffix(".weight") for path in self._names] if layers is None else list(layers)
        for layer in paths:
            self.fill(layer)
            self._kept.add(f"{layer}.weight")

    def release(self) -> None:
        """Drop what was filled and is not kept; whoever holds another view of it must drop that too."""
        for path in self._filled - self._kept:
            self._empty(self._parameters[path])
        self._filled &= self._kept

    def finish(self) -> None:
        """Let the model go, when all of these weights are kept or have left it."""
        for guard in self._guards:
            guard.remove()
        delattr(self._model, _ATTRIBUTE)
        self._names, self._parameters, self._model = {}, {}, None

    def _empty(self, parameter: nn.Parameter) -> None:
        parameter.data = self._unfilled.expand(parameter.shape)


def lazy_weights(model: nn.Module) -> LazyWeights | None:
    """Return the weights that a model of `load_lazily` still lacks; None for any other, and once it is protected."""
    found: LazyWeights | None = getattr(model, _ATTRIBUTE, None)
    return found


def load_lazily(config: Any, source: TensorSource, dtype: torch.dtype, *, whole: bool = False) -> Any:
    """Return the causal language model of ``config``, in evaluation mode; `protect` reads its large weights.

    Large are the weights of the linear layers in the decoder's blocks. All else is read here, each tensor converted to
    the dtype that the model has it in. No parameter is initialized: one that is not in the source is refused.

    Args:
        config: a ``transformers`` configuration. source: its tensors, under the names that ``save_pretrained`` gives.
        dtype: of the weights. whole: read all weights of a model in which the large ones cannot be told; only
            profile ``enclave`` can run it, where nothing leaves. Refused otherwise.

    Raises:
        UnsupportedModelError: an unknown family, or tensors that are not those of the configuration.
    """
    _check(config, source)
    skeleton = empty_model(config, dtype=dtype)
    # Before the files are looked at: experts, say, have other names there than in the model.
    try:
        leaving = {f"{layer.path}.weight" for block in read_decoder(skeleton).blocks for layer in block.layers}
    except UnsupportedModelError:
        if not whole:
            raise
        return _load_whole(type(skeleton), config, source, dtype)
    wanted = dict(skeleton.state_dict())
    tied = dict(skeleton._tied_weights_keys or {}) if getattr(config, "tie_word_embeddings", False) else {}
    wanted = {name: tensor for name, tensor in wanted.items() if name not in tied}
    names = _match({name: tuple(tensor.shape) for name, tensor in wanted.items()}, source, skeleton)
    unfilled = _unfilled(dtype)
    tensors = {
        name: unfilled.expand(tensor.shape) if name in leaving else _read(source, names[name], tensor.dtype)
        for name, tensor in wanted.items()
    }
    _check_tied(tied, tensors, source, skeleton)
    model = _unnamed(type(skeleton).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype))
    LazyWeights(model, source, {name: names[name] for name in wanted if name in leaving})
    return model


def _load_whole(kind: Any, config: Any, source: TensorSource, dtype: torch.dtype) -> Any:
    """Return a model of which nothing is known, all of it read; stock loading finds the places of its tensors."""
    tensors = {name: source.get(name) for name in source.names()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            _floating(tensor, dtype, name)  # looked at alone: some weights stay wider than the model's dtype
    try:
        model, found = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # of another shape, or with parts that stock loading does not put together
        got = f"a {type(error).__name__} in the reader"
        raise UnsupportedModelError("the weights do not fit the model", got=got, hint=SAVE_AGAIN) from error
    # What is missing stock loading draws at random, with a line in the log.
    if found["missing_keys"]:
        name = sorted(found["missing_keys"])[0]
        raise UnsupportedModelError("a tensor of the model is missing", expected=name, hint=SAVE_AGAIN)
    if rest := sorted(name for name in found["unexpected_keys"] if not _COMPUTED.search(name)):
        raise UnsupportedModelError("tensors that are not of this model", got=", ".join(rest[:5]), hint=SAVE_AGAIN)
    return _unnamed(model)


def _unnamed(model: Any) -> Any:
    """Return a model that was made of tensors, in evaluation mode; without a name."""
    # It calls itself "None". PEFT writes the name into adapters, and looks for a directory or a model on the hub of
    # that name: the one is the operator's, the other anybody's.
    model.name_or_path = model.config.name_or_path = ""
    return model.eval()


def _refuse_forward(module: nn.Module, args: Any) -> None:
    hint = 'obfuscatune.protect(model) reads them; profile="enclave" runs the model without a worker'
    raise UsageError("the model's weights are not read yet", where=type(module).__name__, hint=hint)


def _unfilled(dtype: torch.dtype) -> Tensor:
    return torch.full((1,), math.nan, dtype=dtype)


def _check(config: Any, source: TensorSource) -> None:
    """Refuse what a configuration of another party can ask for before a tensor of it is looked at."""
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError("a quantized model", expected="plain floating-point weights", hint=UNQUANTIZED)
    refuse_wrapper(config)
    refuse_attention(config)
    layers = getattr(config, "num_hidden_layers", None)
    if type(layers) is not int or not 1 <= layers <= len(source.names()):  # each is made before weights are compared
        expected = f"1 to {len(source.names())}, the number of tensors"
        raise UnsupportedModelError("number of layers in the configuration", expected=expected, hint=OWN_CONFIG)


def _match(wanted: dict[str, tuple[int, ...]], source: TensorSource, skeleton: Any) -> dict[str, str]:
    """Find each tensor of the model in the source, under any name by which stock loading finds it."""
    there, prefix = _renamed(source, skeleton), f"{skeleton.base_model_prefix}."
    found = {}
    for name, shape in wanted.items():
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        given = name if name in there else other
        if given not in there:
            raise UnsupportedModelError("a tensor of the model is missing", expected=name, hint=SAVE_AGAIN)
        given = there[given]
        if tuple(source.shape(given)) != shape:
            got, expected = list(source.shape(given)), list(shape)
            raise UnsupportedModelError(
                "a tensor of the model has another shape", got=got, expected=expected, where=name, hint=SAVE_AGAIN
            )
        found[name] = given
    ignored = skeleton._keys_to_ignore_on_load_unexpected or []
    tied = skeleton._tied_weights_keys or {}
    used = set(found.values())
    rest = [
        given
        for name, given in sorted(there.items())
        if given not in used
        and name not in tied
        and not _COMPUTED.search(name)
        and not (_CAUSAL_MASK.search(name) and tuple(source.shape(given))[:2] in ((), (1, 1)))
        and not any(re.search(pattern, name) for pattern in ignored)
    ]
    if rest:
        raise UnsupportedModelError("tensors that are not of this model", got=", ".join(rest[:5]), hint=SAVE_AGAIN)
    return found


def _renamed(source: TensorSource, skeleton: Any) -> dict[str, str]:
    """Return the source's names by those that the model has them under today, as stock loading renames them.

    GPT-NeoX's head, for instance, is ``embed_out`` in files, and ``lm_head`` in the model.
    """
    renamings = [one for one in get_model_conversion_mapping(skeleton) if isinstance(one, WeightRenaming)]
    found: dict[str, str] = {}
    for given in source.names():
        name = given
        for one in renamings:
            name, _ = one.rename_source_key(name)
        if name in found:
            raise UnsupportedModelError(
                "a tensor of the model is there twice", got=f"{given} and {found[name]}", hint=SAVE_AGAIN
            )
        found[name] = given
    return found


def _check_tied(tied: dict[str, str], tensors: dict[str, Tensor], source: TensorSource, skeleton: Any) -> None:
    """Refuse a file that holds a tied weight twice, with two values: which of them counts is not known."""
    there = _renamed(source, skeleton)
    for name, other in tied.items():
        if name not in there or other not in tensors:
            continue
        held, given = tensors[other], there[name]
        if tuple(source.shape(given)) != held.shape or not torch.equal(_read(source, given, held.dtype), held):
            raise UnsupportedModelError(
                "a tied weight has two values", got=f"{name} and {other}", expected="one", hint=SAVE_AGAIN
            )


def _read(source: TensorSource, name: str, dtype: torch.dtype) -> Tensor:
    """Read what stays, in the dtype that the model has it in."""
    if dtype.is_floating_point:
        return _floating(source.get(name), dtype, name)
    tensor = source.get(name)
    if tensor.dtype != dtype:
        raise UnsupportedModelError("dtype of a tensor", got=tensor.dtype, expected=dtype, where=name, hint=SAVE_AGAIN)
    return tensor


def _floating(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise UnsupportedModelError(
            "a weight that is no floating-point tensor", got=tensor.dtype, where=name, hint=UNQUANTIZED
        )
    tensor = tensor.to(dtype)
    # The least and the greatest are NaN where any number is: one pass, and no memory.
    if tensor.numel() and not all(math.isfinite(bound) for bound in torch.aminmax(tensor)):
        hint = f"the file is damaged, or of a training run that diverged; or the weight has no room in {dtype}"
        raise UnsupportedModelError("a weight is not finite", where=name, hint=hint)
    return tensor
