"""The large linear layers as they stand in the model, and the acts of replacing them."""

from dataclasses import dataclass
from typing import Any

from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from obfuscatune.enclave.families import FamilySpec
from obfuscatune.enclave.folding import fold_norm
from obfuscatune.errors import UnsupportedModelError


@dataclass(slots=True, repr=False)  # a repr would show weights
class Site:
    """One large linear layer in the model: its module, PEFT's layer around it, weight ``[in, out]``, bias."""

    parent: nn.Module
    name: str
    path: str
    base: nn.Module
    lora: LoraLinear | None
    weight: Tensor
    bias: Tensor

    def folded(self, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
        """Return weight and bias in float64, the norm before them folded in."""
        if norm is None:
            return self.weight.double(), self.bias.double()
        return fold_norm(self.weight, self.bias, norm.weight.detach(), norm.bias.detach())


def find_site(spec: FamilySpec, parent: nn.Module, child: str, where: str) -> Site:
    """Return the layer ``child`` of ``parent``, whose path is ``where``.

    Raises:
        UnsupportedModelError: a layer or an adapter of a kind that cannot be run exactly.
    """
    path = f"{where}.{child}"
    module = parent.get_submodule(child)
    lora = module if isinstance(module, LoraLinear) else None
    base: Any = module if lora is None else lora.get_base_layer()
    expected = Conv1D if spec.in_out else nn.Linear
    if type(base) is not expected:
        raise UnsupportedModelError(
            "layer of a kind that cannot be keyed", got=type(base).__name__, expected=expected.__name__, where=path
        )
    if lora is not None:
        _check_adapter(lora, path)
    weight = spec.weight_in_out(base)
    bias: Any = base.bias
    return Site(
        parent,
        child,
        path,
        base,
        lora,
        weight,
        weight.new_zeros(weight.shape[1]) if bias is None else bias.detach(),
    )


def _check_adapter(lora: Any, path: str) -> None:
    if type(lora) is not LoraLinear or lora.lora_variant or any(lora.lora_bias.values()):
        raise UnsupportedModelError(
            "kind of adapter", got=type(lora).__name__, expected="plain LoRA (no DoRA, no lora_bias)", where=path
        )
    if lora.merged:
        raise UnsupportedModelError("a merged adapter", where=path, hint="model.unmerge_adapter() first")


def adapters_by_name(*sites: Site) -> dict[str, nn.Module]:
    """PEFT's layers under the names they had, so that the adapter's parameters keep theirs."""
    return {site.name: site.lora for site in sites if site.lora is not None}


class Withdrawn(nn.Module):
    """Stands where a plain weight was that is on the worker now, keyed."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refuse: the weight is not here."""
        raise UnsupportedModelError("this weight is on the worker", where=self._path)


def _refuse_merge(site: Site) -> None:
    def merge(*args: Any, **kwargs: Any) -> None:
        raise UnsupportedModelError(
            "the adapter cannot be merged: the weight is on the worker",
            where=site.path,
            hint="save_pretrained the adapter, and merge it into the original model",
        )

    site.lora.merge = merge  # type: ignore[union-attr, method-assign]


def replace_linear(site: Site, remote: nn.Module, *, whole: bool) -> None:
    """Put ``remote`` in the layer's place; ``whole``: it computes the LoRA too, in one call."""
    if site.lora is None:
        setattr(site.parent, site.name, remote)
        return
    site.lora.base_layer = remote
    _refuse_merge(site)
    if whole:
        # PEFT's layer stays, with its parameters, names and switches; only what it computes is done in one remote call.
        site.lora.forward = remote.forward  # type: ignore[method-assign]


def replace_whole(block: nn.Module, name: str, remote: nn.Module, sites: tuple[Site, ...]) -> None:
    """Put ``remote`` in the place of a whole submodule, whose two layers are ``sites``."""
    for site in sites:
        if site.lora is not None:
            site.lora.base_layer = Withdrawn(site.path)
            _refuse_merge(site)
    setattr(block, name, remote)
