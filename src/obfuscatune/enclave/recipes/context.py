"""What all recipes share while a model is keyed: secrets and their names, shipping, LoRA slots, and replacements.

Two phases, so that a failure leaves the model as it was: every block is keyed and shipped first, one at a time, then
all replacements are made at once. Only after that are the plain weights gone from the enclave.
"""

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from obfuscatune.enclave.families import Layer, Norm, Part
from obfuscatune.enclave.folding import Read, fold_shift, times_gain
from obfuscatune.enclave.keys import Key, MasterSecret, build, haar
from obfuscatune.enclave.keys.rows import RowMixer
from obfuscatune.enclave.keys.source import Stream
from obfuscatune.enclave.lazy import LazyWeights
from obfuscatune.enclave.links import Link
from obfuscatune.enclave.remote.cache import CacheMirror
from obfuscatune.enclave.remote.held import HeldSlot
from obfuscatune.enclave.remote.held_adapter import HeldAdapter
from obfuscatune.enclave.remote.norms import FoldedNorm
from obfuscatune.enclave.remote.passes import Passes
from obfuscatune.enclave.session import Session
from obfuscatune.errors import UnsupportedModelError
from obfuscatune.profiles import Profile

Streams = Callable[[str], Stream]


@dataclass
class Keying:
    """The keying of one model. Recipes add to it; :meth:`install` makes what they noted real.

    Attributes:
        links: the model's workers. link: the one that what is keyed now goes to.
        adapted: whether the model has an adapter: then a base parameter that is trained is one that plain PEFT trains.
        weights: of a model that is read layer by layer, else None.
    """

    links: list[Link]
    profile: Profile
    config: Any
    secret: MasterSecret
    held: HeldAdapter
    adapted: bool
    weights: LazyWeights | None = None
    replacements: list[Callable[[], None]] = field(default_factory=list)
    _dropout_off: list[str] = field(default_factory=list)
    _segments: int = 0

    def __post_init__(self) -> None:
        self.link = self.links[0]
        # Never of the master secret: a resumed session would mix other rows by the same secrets, and meet a worker that
        # may have learnt the vectors of the check from the fault that ended the last one.
        fresh = self.secret if self.secret.is_test else MasterSecret.generate()
        self.mixer = RowMixer(fresh.stream("rows of calls"))
        self.checks = fresh.stream("vectors of checks")

    # the worker in turn

    @property
    def session(self) -> Session:
        """The session with it."""
        return self.link.session

    @property
    def mirror(self) -> CacheMirror:
        """Of the KV caches there."""
        return self.link.mirror

    @property
    def passes(self) -> Passes:
        """Of the masks and rotary tables there."""
        return self.link.passes

    # weights

    def open(self, *layers: Layer) -> None:
        """Have the weights of layers at hand.

        Raises:
            UnsupportedModelError: plain PEFT would train one of them.
        """
        for layer in layers:
            if self.weights is not None:
                self.weights.fill(layer.path)
            self.refuse_trained(layer.base, layer.path)

    def close(self) -> None:
        """Drop what was read for a block; its replacements hold nothing of it."""
        if self.weights is not None:
            self.weights.release()

    def refuse_trained(self, module: nn.Module, path: str) -> None:
        """Refuse what plain PEFT would train here and we could not. A model without an adapter is just frozen."""
        trained = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]
        if self.adapted and trained:
            raise UnsupportedModelError(
                "a base parameter that is trained, in a layer that leaves for the worker",
                got=", ".join(trained),
                where=path,
                hint='LoraConfig(bias="none"), and freeze the base model',
            )

    def fold(self, norm: Norm | None) -> FoldedNorm | None:
        """Return what takes a norm's place where the profile folds it into the next layer, and note that it does."""
        if norm is None or not self.profile.fold_norms:
            return None
        self.refuse_trained(norm.module, norm.path)
        folded, parent, name = FoldedNorm(norm), norm.parent, norm.name
        self.replacements.append(lambda: setattr(parent, name, folded))
        return folded

    def first_of(self, part: Part) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of a part's first layers; where the profile folds norms, the bias has the norm's."""
        weight, bias = part.first_weight(), part.first_bias()
        return weight, fold_shift(weight, bias, part.norm.shift) if self.profile.fold_norms else bias

    def read(self, norm: Norm | None) -> Read:
        """Return what makes the columns that are keyed of those of a weight after a norm: its gain, where folded."""
        if norm is None or not self.profile.fold_norms:
            return Tensor.double
        return partial(times_gain, gain=norm.gain)

    # secrets

    def streams(self, path: str, *layers: Layer, norm: Norm | None) -> Streams:
        """Randomness by name for some layers; its label has a digest of what is keyed: no other model gets these keys.

        A norm that is folded into a weight is part of that. One weight under equal keys, but with another gain, would
        give the worker ``R^-1 diag(g / g') R``, whose eigenvectors are the key's.
        """
        folded = [] if norm is None or not self.profile.fold_norms else [norm.gain, norm.shift]
        model = digest_of(*(t for layer in layers for t in (layer.base.weight, layer.base.bias)), *folded)
        switches = json.dumps(self.profile.switches(), sort_keys=True)
        return lambda name: self.secret.stream(model, switches, path, name)

    def key(self, stream: Streams, name: str, size: int, *, inner: bool = False) -> Key:
        """A key of the profile's family for a stream of this width, ``inner`` to a part or around it."""
        family = self.profile.inner_keys if inner else self.profile.keys
        return build(family, stream(name), size, block=self.profile.key_block, kappa=self.profile.kappa)

    # shipping

    def define(self, path: str, kind: str, spec: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> str:
        """Send a segment's keyed weights, rounded to ``dtype``, and return its name on the worker."""
        segment = f"s{self._segments}"
        self._segments += 1
        keyed = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
        self.session.request("define", path, {"segment": segment, "kind": kind, "spec": spec}, keyed, {})
        self.link.parameters += sum(tensor.numel() for tensor in keyed.values())
        return segment

    def hold(self, name: str, layer: Layer, segment: str, key_in: Key, key_out: Key, stream: Streams) -> HeldSlot:
        """Hand a LoRA pair to the worker to train. ``stream``: randomness of its keys."""
        self.note_lora_dropout(layer)
        slot = HeldSlot(name, layer, self.session, self.passes, segment=segment, key_in=key_in, key_out=key_out)
        self.held.add(slot, stream(f"{name} mark").bytes(16))
        self.replacements += [slot.take_over, lambda: self._read_back(layer.lora)]
        return slot

    def _read_back(self, lora: Any) -> None:
        """Let nobody save or load this layer's state after a step whose result is not here, without asking for it."""
        lora.register_state_dict_pre_hook(lambda *_: self.held.pull())
        lora.register_load_state_dict_pre_hook(lambda *_: self.held.pull())

    # dropout that keyed values do not allow

    def note_dropout(self, name: str, probability: float) -> None:
        """Remember a dropout that is switched off, for one warning."""
        if probability > 0:
            self._dropout_off.append(name)

    def note_lora_dropout(self, layer: Layer) -> None:
        """The same, of a LoRA layer whose input is on the worker."""
        self.note_dropout("lora_dropout", max(getattr(d, "p", 0.0) for d in layer.lora.lora_dropout.values()))

    # the second phase

    def install(self) -> None:
        """Replace what has left; cannot fail half-way."""
        if self._dropout_off:  # first, because a filter may turn the warning into an error
            names = ", ".join(sorted(set(self._dropout_off)))
            first = "rotate_stream=False, " if self.profile.rotate_stream else ""
            warnings.warn(
                f"{names} > 0 cannot be run exactly on keyed values and is switched off there. "
                f"{first}attention='enclave', mlp='enclave' and lora_placement='enclave' together keep all dropout.",
                stacklevel=3,
            )
        for replace in self.replacements:
            replace()
        self.replacements.clear()  # what makes LoRA's keys keeps this object, and they hold the plain weights


def digest_of(*tensors: Tensor | None) -> str:
    """Return the SHA-256 of the bytes of those that are there."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            # numpy's view of the bytes: hashing needs no copy of a contiguous weight.
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def rank_keys(stream: Streams, slot: str) -> Callable[[int], Key]:
    """Return what makes the secret rotation of a slot's low-rank numbers, by their number."""
    return lambda rank: haar(stream(f"{slot} rank {rank}"), rank)
