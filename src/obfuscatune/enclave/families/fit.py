"""What a profile can do with a model: exact, adapted to something that shows less, or refused with the reason."""

import dataclasses
import warnings

import torch
from torch import nn

from obfuscatune.enclave.families.form import Decoder
from obfuscatune.enclave.families.made import refuse_other_values
from obfuscatune.enclave.families.stock import refuse_changed
from obfuscatune.errors import UnsupportedModelError
from obfuscatune.profiles import Profile


def fit(decoder: Decoder, profile: Profile) -> Profile:
    """Return the profile as it is run on this model, whose code is stock where it leaves.

    Where q and k are normalized in each head no key of theirs commutes with what the worker would compute, so attention
    stays in the enclave, with a warning; refused where it was asked for on the worker.

    Raises:
        UnsupportedModelError: this profile cannot run this model exactly; why, and what can.
    """
    fitted = _adapted(decoder, profile)
    if fitted.shares and not fitted.primes:
        bfloat16 = next(decoder.model.parameters()).dtype == torch.bfloat16
        fitted = dataclasses.replace(fitted, primes=3 if bfloat16 else 6)
    if fitted.remote:
        leaving = decoder.blocks[fitted.enclave_blocks :]
        refuse_changed(leaving, fitted)
        if decoder.known:
            refuse_other_values(decoder, leaving, fitted)
    return fitted


def _adapted(decoder: Decoder, profile: Profile) -> Profile:
    if not profile.remote:
        return profile
    if not decoder.known:
        _refuse_unknown(decoder, profile)
        return profile
    if profile.rotate_stream:
        _refuse_rotation(decoder)
    if profile.attention == "worker" and _has_head_norms(decoder):
        what = "q and k are normalized in each head, and no key commutes with that"
        if "attention" in profile.chosen:
            raise UnsupportedModelError(
                f"attention cannot run on the worker: {what}", where=decoder.family, hint='attention="enclave"'
            )
        warnings.warn(f"{decoder.family}: {what}, so attention stays in the enclave.", stacklevel=4)
        return dataclasses.replace(profile, attention="enclave", name=f"{profile.name}+attention=enclave")
    return profile


def _has_head_norms(decoder: Decoder) -> bool:
    return any(block.attention is not None and block.attention.shape.head_norms for block in decoder.blocks)


def _refuse_unknown(decoder: Decoder, profile: Profile) -> None:
    if profile.attention == "worker" or profile.mlp == "worker" or profile.fold_norms:
        raise UnsupportedModelError(
            "this profile needs a record of the model family, and there is none",
            got=f"profile {profile.name}, model_type {decoder.family!r}",
            hint="profiles that send linear layers alone need none: paper, naive, strict, shared",
        )


def _refuse_rotation(decoder: Decoder) -> None:
    """Refuse where the residual stream cannot stay on the worker under one rotation."""
    reasons = []
    parts = [part for block in decoder.blocks for part in block.parts]
    if any(part.norm_after is not None for part in parts):
        reasons.append("norms stand after attention and MLP too, and a gain that cannot be folded does not commute")
    if _has_head_norms(decoder):
        reasons.append("q and k are normalized in each head, and no key commutes with that")
    final = None if decoder.final_norm is None else decoder.model.get_submodule(decoder.final_norm)
    if decoder.norm == "layernorm" and type(final) is not nn.LayerNorm:
        reasons.append(f"the final norm, {type(final).__name__}, sees the mean of a row, which centring takes away")
    kinds = set(getattr(decoder.model.config, "layer_types", None) or ())
    if len(kinds) > 1:
        reasons.append(f"layers differ in their masks ({', '.join(sorted(kinds))}), and one call has one mask")
    if reasons:
        raise UnsupportedModelError(
            "rotate_stream cannot run this model exactly",
            got="; ".join(reasons),
            where=decoder.family,
            hint='profile="balanced"',
        )
