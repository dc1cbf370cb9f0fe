"""Keying a model's blocks and replacing their large submodules by remote ones.

Two phases, so that a failure leaves the model as it was: every block is keyed and shipped first, one layer at a time,
then all replacements are made at once. Only after that are the plain weights gone from the enclave.
"""

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from obfuscatune.enclave.cache import CacheMirror
from obfuscatune.enclave.families import FamilySpec
from obfuscatune.enclave.folding import key_attention, key_mlp, key_weight
from obfuscatune.enclave.freivalds import Check
from obfuscatune.enclave.held import HeldAdapter, HeldSlot
from obfuscatune.enclave.keys import ConcatKey, IdentityKey, Key, MasterSecret, build, haar, per_head
from obfuscatune.enclave.keys.rows import RowMixer
from obfuscatune.enclave.keys.source import Stream
from obfuscatune.enclave.lazy import LazyWeights
from obfuscatune.enclave.linear import RemoteLinear
from obfuscatune.enclave.lora import SplitInput, SplitOutput
from obfuscatune.enclave.mixed import MixedLinear
from obfuscatune.enclave.norm import FoldedLayerNorm
from obfuscatune.enclave.session import Session
from obfuscatune.enclave.sites import Site, adapters_by_name, find_site, replace_linear, replace_whole
from obfuscatune.enclave.whole import RemoteAttention, RemoteMlp, WholeSlots
from obfuscatune.errors import UnsupportedModelError
from obfuscatune.profiles import Profile
from obfuscatune.protocol.activations import ACTIVATION_NAMES


@dataclass(slots=True, repr=False)  # a repr would show secret biases
class Shipped:
    """A whole submodule whose keyed weights the worker has, and what the enclave needs to use it.

    Attributes:
        segment, path: its name on the worker, and in the model. first, last: its two layers, norms not folded.
        norm: that was folded into the first one, if any. stream: randomness by name.
        key_in, key_out: of what enters and leaves. key_first, key_last: of the stream between, as LoRA sees it.
        bias: ``[d]``, float64, of the un-keyed output. offset: what the true input of the last layer has more than the
            worker's, ``[d]``, if anything.
    """

    segment: str
    path: str
    first: Site
    last: Site
    norm: nn.LayerNorm | None
    stream: Callable[[str], Stream]
    key_in: Key
    key_out: Key
    key_first: Key
    key_last: Key
    bias: Tensor
    offset: Tensor | None = None


@dataclass
class Installer:
    """Keys, ships and replaces; one per protected model."""

    session: Session
    profile: Profile
    spec: FamilySpec
    model: Any
    secret: MasterSecret
    held: HeldAdapter
    adapted: bool
    weights: LazyWeights | None = None
    worker_parameters: int = 0
    _replacements: list[Callable[[], None]] = field(default_factory=list)
    _dropout_off: list[str] = field(default_factory=list)
    _sites: list[Site] = field(default_factory=list)
    _segments: int = 0

    def __post_init__(self) -> None:
        self._mirror = CacheMirror(self.session)
        # Never of the master secret: a resumed session would mix other rows by the same secrets, and meet a worker that
        # may have learnt the vectors of the check from the fault that ended the last one.
        fresh = self.secret if self.secret.is_test else MasterSecret.generate()
        self._mixer = RowMixer(fresh.stream("rows of calls"))
        self._checks = fresh.stream("vectors of checks")

    def key_block(self, block: nn.Module, index: int, path: str) -> None:
        """Key and ship one block; the replacements wait for :meth:`install`."""
        spec, profile = self.spec, self.profile
        attention = block.get_submodule(spec.attention)
        where = f"{path}.{spec.attention}"
        if profile.attention == "worker":
            self._whole_attention(block, attention, index, where)
        else:
            norm = self._norm(block, spec.attention_norm)
            self._linear(self._site(attention, spec.qkv, where), ("attention in", "qkv"), inner="out", norm=norm)
            self._linear(self._site(attention, spec.out, where), ("heads", "attention out"), inner="in", norm=None)
        mlp = block.get_submodule(spec.mlp)
        where = f"{path}.{spec.mlp}"
        if profile.mlp == "worker":
            self._whole_mlp(block, mlp, where)
        else:
            norm = self._norm(block, spec.mlp_norm)
            self._linear(self._site(mlp, spec.up, where), ("mlp in", "hidden"), inner="out", norm=norm)
            self._linear(self._site(mlp, spec.down, where), ("activations", "mlp out"), inner="in", norm=None)
        if self.weights is not None:
            self.weights.release()
            for site in self._sites:  # the replacements hold them
                site.weight = site.weight.new_empty(0)
        self._sites.clear()

    def finish(self) -> None:
        """Ship what is not of one block, after the last of them."""

    def install(self) -> None:
        """Replace the submodules of all keyed blocks; cannot fail half-way."""
        if self._dropout_off:  # first, because a filter may turn the warning into an error
            names = ", ".join(sorted(set(self._dropout_off)))
            first = "rotate_stream=False, " if self.profile.rotate_stream else ""
            warnings.warn(
                f"{names} > 0 cannot be run exactly on keyed values and is switched off there. "
                f"{first}attention='enclave', mlp='enclave' and lora_placement='enclave' together keep all dropout.",
                stacklevel=3,
            )
        for replace in self._replacements:
            replace()

    # keys and shipping

    def _key(self, stream: Callable[[str], Stream], name: str, size: int, *, inner: bool = False) -> Key:
        family = self.profile.inner_keys if inner else self.profile.keys
        return build(family, stream(name), size, block=self.profile.key_block, kappa=self.profile.kappa)

    def _streams(self, path: str, *weights: Tensor) -> Callable[[str], Stream]:
        """Randomness by name for one layer; the weights' digest is in the label: no other model gets the same keys."""
        digest = hashlib.sha256()
        for weight in weights:
            # numpy's view of the bytes: hashing needs no copy of a contiguous weight.
            digest.update(weight.contiguous().view(torch.uint8).numpy().data)
        model, switches = digest.hexdigest(), json.dumps(self.profile.switches(), sort_keys=True)
        return lambda name: self.secret.stream(model, switches, "epoch 0", path, name)

    def _define(
        self, path: str, kind: str, spec: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype
    ) -> str:
        segment = f"s{self._segments}"
        self._segments += 1
        keyed = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
        self.session.request("define", path, {"segment": segment, "kind": kind, "spec": spec}, keyed, {})
        self.worker_parameters += sum(tensor.numel() for tensor in keyed.values())
        return segment

    # what stands in the model

    def _site(self, parent: nn.Module, child: str, where: str) -> Site:
        site = find_site(self.spec, parent, child, where)
        if self.weights is not None:
            self.weights.fill(site.path)
        self._sites.append(site)
        self._refuse_trained(site.base, site.path)
        return site

    def _refuse_trained(self, module: nn.Module, path: str) -> None:
        """Refuse what plain PEFT would train here and we could not. A model without an adapter is just frozen."""
        trained = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]
        if self.adapted and trained:
            raise UnsupportedModelError(
                "a base parameter that is trained, in a layer that leaves for the worker",
                got=", ".join(trained),
                where=path,
                hint='LoraConfig(bias="none"), and freeze the base model',
            )

    def _norm(self, block: nn.Module, name: str) -> nn.LayerNorm | None:
        """The norm to fold, or None; its replacement is noted."""
        if not self.profile.fold_norms:
            return None
        norm = block.get_submodule(name)
        if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
            raise UnsupportedModelError("norm", got=type(norm).__name__, expected="LayerNorm with gain and bias")
        self._refuse_trained(norm, name)
        self._replacements.append(lambda: setattr(block, name, FoldedLayerNorm(norm)))
        return norm

    # replacements

    def _linear(self, site: Site, names: tuple[str, str], *, inner: str, norm: nn.LayerNorm | None) -> None:
        stream = self._streams(site.path, site.weight)
        dtype = site.weight.dtype
        key_in = self._key(stream, names[0], site.weight.shape[0], inner=inner == "in")
        key_out = self._key(stream, names[1], site.weight.shape[1], inner=inner == "out")
        weight, bias = site.folded(norm)
        keyed = key_weight(weight, key_in, key_out).to(dtype)
        if self.profile.mix_rows and dtype == torch.bfloat16:
            keyed = keyed.float()  # rows of the noise's size would lose two of three digits
        segment = self._define(site.path, "linear", {}, {"weight": keyed}, keyed.dtype)
        check = Check(keyed, self._checks) if self.profile.verify else None
        if self.profile.mix_rows:
            mixed = MixedLinear(
                self.session,
                segment=segment,
                layer=site.path,
                key_in=key_in,
                key_out=key_out,
                bias=bias.to(dtype),
                folded=norm is not None,
                wire_dtype=keyed.dtype,
                mixer=self._mixer,
                tile=self.profile.mix_tile,
                check=check,
            )
            self._replacements.append(lambda: replace_linear(site, mixed, whole=False))
            return
        split = held = None
        if site.lora is not None and self.profile.lora_placement == "split":
            split = SplitInput("main", site.lora, site.path, lambda r: haar(stream(f"rank {r}"), r), key_out)
        elif site.lora is not None and self.profile.lora_placement == "worker":
            held = self._hold(site, segment, "main", key_in, key_out)
        remote = RemoteLinear(
            self.session,
            segment=segment,
            layer=site.path,
            key_in=key_in,
            key_out=key_out,
            bias=bias.to(dtype),
            folded=norm is not None,
            check=check,
            split=split,
            held=held,
        )
        self._replacements.append(lambda: replace_linear(site, remote, whole=split is not None or held is not None))

    def _whole_attention(self, block: nn.Module, attention: nn.Module, index: int, where: str) -> None:
        shipped = self._ship_attention(block, attention, index, where)
        remote = RemoteAttention(
            self.session,
            dropout=attention.get_submodule(self.spec.dropout),
            mirror=self._mirror,
            index=index,
            **self._parts(shipped, "qkv", "out"),
        )
        self._replacements.append(
            lambda: replace_whole(block, self.spec.attention, remote, (shipped.first, shipped.last))
        )

    def _whole_mlp(self, block: nn.Module, mlp: nn.Module, where: str) -> None:
        shipped = self._ship_mlp(block, mlp, where)
        remote = RemoteMlp(
            self.session, dropout=mlp.get_submodule(self.spec.mlp_dropout), **self._parts(shipped, "up", "down")
        )
        self._replacements.append(lambda: replace_whole(block, self.spec.mlp, remote, (shipped.first, shipped.last)))

    def _parts(self, shipped: Shipped, first: str, last: str) -> dict[str, Any]:
        """What every whole submodule takes; ``first`` and ``last`` are its slots."""
        return {
            "segment": shipped.segment,
            "layer": shipped.path,
            "key_in": shipped.key_in,
            "key_out": shipped.key_out,
            "bias": shipped.bias.to(shipped.last.weight.dtype),
            "folded": shipped.norm is not None,
            "slots": self._slots(shipped, first, last),
            "children": adapters_by_name(shipped.first, shipped.last),
        }

    # whole submodules

    def _around(self, stream: Callable[[str], Stream], part: str, size: int) -> tuple[Key, Key]:
        """Return the keys of what enters and of what leaves a whole submodule."""
        return self._key(stream, f"{part} in", size), self._key(stream, f"{part} out", size)

    def _reading(self, site: Site, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
        """Return weight and bias, in float64, of a layer that reads normalized rows."""
        return site.folded(norm)

    def _written(self, rows: Tensor) -> Tensor:
        """Return, for what writes the residual stream (a weight's or a bias' rows), what it is to write; float64."""
        return rows.double()

    def _ship_attention(self, block: nn.Module, attention: nn.Module, index: int, where: str) -> Shipped:
        spec, profile = self.spec, self.profile
        qkv, out = self._site(attention, spec.qkv, where), self._site(attention, spec.out, where)
        norm = self._norm(block, spec.attention_norm)
        shape = spec.attention_shape(self.model.config, index)
        stream = self._streams(where, qkv.weight, out.weight)
        d = out.weight.shape[1]
        key_in, key_out = self._around(stream, "attention", d)
        if profile.head_keys:
            key_q, key_k, key_v = per_head(stream("heads"), shape.heads, shape.head_dim, profile.head_kappa)
            key_qkv: Key = ConcatKey([key_q, key_k, key_v])
            key_value: Key = key_v
        else:
            key_qkv, key_value = IdentityKey(3 * d), IdentityKey(d)
        # Held LoRA of the output layer sees the heads' output as it is on the worker, so it must be the true one.
        secret_biases = profile.head_keys and profile.lora_placement != "worker"
        keyed = key_attention(
            qkv=self._reading(qkv, norm),
            out=(self._written(out.weight), self._written(out.bias)),
            key_in=key_in,
            key_qkv=key_qkv,
            key_value=key_value,
            key_out=key_out,
            stream=stream("biases") if secret_biases else None,
        )
        fields = {"heads": shape.heads, "scale": shape.scale}
        segment = self._define(where, "attention", fields, keyed.keyed, qkv.weight.dtype)
        if getattr(self.model.config, spec.attention_dropout, 0.0) > 0:
            self._dropout_off.append(spec.attention_dropout)
        offset = keyed.value_offset if secret_biases else None
        between = (key_qkv, key_value)
        return Shipped(segment, where, qkv, out, norm, stream, key_in, key_out, *between, keyed.bias, offset)

    def _ship_mlp(self, block: nn.Module, mlp: nn.Module, where: str) -> Shipped:
        spec, profile = self.spec, self.profile
        activation = spec.activation(self.model.config)
        if activation not in ACTIVATION_NAMES:
            expected = f"one of {', '.join(ACTIVATION_NAMES)}"
            raise UnsupportedModelError(
                "the worker does not know the activation", got=activation, expected=expected, hint='mlp="enclave"'
            )
        up, down = self._site(mlp, spec.up, where), self._site(mlp, spec.down, where)
        norm = self._norm(block, spec.mlp_norm)
        stream = self._streams(where, up.weight, down.weight)
        d, hidden = up.weight.shape
        key_in, key_out = self._around(stream, "mlp", d)
        family = "permutation" if profile.permute_mlp else "identity"
        key_hidden = build(family, stream("neurons"), hidden)
        keyed = key_mlp(
            up=self._reading(up, norm),
            down=self._written(down.weight),
            key_in=key_in,
            key_hidden=key_hidden,
            key_out=key_out,
        )
        segment = self._define(where, "mlp", {"activation": activation}, keyed, up.weight.dtype)
        between, bias = (key_hidden, key_hidden), self._written(down.bias)
        return Shipped(segment, where, up, down, norm, stream, key_in, key_out, *between, bias)

    # LoRA

    def _slots(self, shipped: Shipped, first: str, last: str) -> WholeSlots:
        """LoRA of the two layers of a whole submodule."""
        slots, segment = WholeSlots(first, last), shipped.segment
        if self.profile.lora_placement == "worker":
            slots.held_first = self._hold(shipped.first, segment, first, shipped.key_in, shipped.key_first)
            slots.held_last = self._hold(shipped.last, segment, last, shipped.key_last, shipped.key_out)
            return slots
        if (lora := shipped.first.lora) is not None:
            make = rank_keys(shipped.stream, first)
            slots.split_first = SplitInput(first, lora, shipped.first.path, make, shipped.key_first)
        if (lora := shipped.last.lora) is not None:
            make, path = rank_keys(shipped.stream, last), shipped.last.path
            offset = None if shipped.offset is None else shipped.offset.to(shipped.last.weight.dtype)
            slots.split_last = SplitOutput(last, lora, path, make, shipped.key_last, offset)
            self._note_lora_dropout(lora)
        return slots

    def _hold(self, site: Site, segment: str, slot: str, key_in: Key, key_out: Key) -> HeldSlot | None:
        if site.lora is None:
            return None
        self._note_lora_dropout(site.lora)
        held = HeldSlot(
            self.session,
            segment=segment,
            slot=slot,
            layer=site.path,
            lora=site.lora,
            adapter=site.lora.active_adapters[0],
            key_in=key_in,
            key_out=key_out,
        )
        self.held.slots.append(held)
        self._replacements += [held.take_over, lambda: self._read_back(site.lora)]
        return held

    def _read_back(self, lora: Any) -> None:
        """Let whoever saves this layer's state (save_pretrained, a checkpoint) get the worker's values.

        Before a load too: loaded values are known by their difference from the worker's.
        """
        lora.register_state_dict_pre_hook(lambda *_: self.held.pull())
        lora.register_load_state_dict_pre_hook(lambda *_: self.held.pull())

    def _note_lora_dropout(self, lora: Any) -> None:
        if any(getattr(dropout, "p", 0.0) > 0 for dropout in lora.lora_dropout.values()):
            self._dropout_off.append("lora_dropout")


def rank_keys(stream: Callable[[str], Stream], slot: str) -> Callable[[int], Key]:
    """Return what makes the secret rotation of a slot's low-rank numbers, by their number."""
    return lambda rank: haar(stream(f"{slot} rank {rank}"), rank)
