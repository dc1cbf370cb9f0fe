"""The hooks on a protected model: what begins a pass, looks at what it is asked, and refuses what is not there."""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from obfuscatune.enclave.frozen import refuse_training_of_all
from obfuscatune.enclave.guard import Guard
from obfuscatune.enclave.guarded import guard_class
from obfuscatune.enclave.hooks import forget_adapters_of_rows
from obfuscatune.enclave.inputs import Inputs
from obfuscatune.enclave.links import Link
from obfuscatune.enclave.remote.body import RemoteBody
from obfuscatune.enclave.remote.head import use_fast_head
from obfuscatune.enclave.remote.passes import Passes
from obfuscatune.enclave.remote.withdrawn import Standin
from obfuscatune.errors import UnsupportedModelError
from obfuscatune.profiles import Profile


def watch(causal_lm: Any, profile: Profile, links: Sequence[Link], *, frozen: bool) -> None:
    """Hook a model whose blocks have left, and seal what stands in the places of their weights.

    Args:
        causal_lm: with its remote modules installed. profile: as it was fitted to the model. frozen: whether nothing
            that has left was to be trained.
    """
    eager = getattr(causal_lm.config, "_attn_implementation", None) == "eager"
    causal_lm.base_model.register_forward_pre_hook(use_whole_float32)
    for link in links:
        link.passes.eager, link.passes.config = eager, causal_lm.config
        causal_lm.base_model.register_forward_pre_hook(link.passes.begin, with_kwargs=True)
    causal_lm.base_model.register_forward_pre_hook(Inputs(causal_lm), with_kwargs=True)
    causal_lm.base_model.register_forward_pre_hook(Guard(causal_lm, profile, links[0].passes))
    if profile.attention == "worker":
        # Blocks that stay in the enclave would look at other positions than the worker's where a row sees none.
        if getattr(causal_lm, "_supports_sdpa", False) and not (eager and profile.enclave_blocks):
            causal_lm.set_attn_implementation("sdpa")  # its masks say only what is allowed, and None for causal
        refuse = partial(_refuse_masks_of_bools, links[0].passes)
        causal_lm.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
        _refuse_output(causal_lm, "output_attentions", 'attention weights stay on the worker: attention="enclave"')
    if profile.rotate_stream:
        what = "the blocks' outputs stay on the worker: rotate_stream=False. The last hidden state is there"
        _refuse_output(causal_lm, "output_hidden_states", what)
        for body in causal_lm.modules():
            if isinstance(body, RemoteBody) and body.blind is not None:
                causal_lm.register_forward_hook(body.blind.check_labels, with_kwargs=True)
    use_fast_head(causal_lm)
    refuse_training_of_all(causal_lm, frozen=frozen)
    causal_lm.register_forward_hook(forget_adapters_of_rows, always_call=True)
    guard_class(causal_lm, [link.passes for link in links])
    for standin in causal_lm.modules():
        if isinstance(standin, Standin):
            standin.seal()


def use_whole_float32(*_: Any) -> None:
    """Take ``torch.set_float32_matmul_precision`` back to "highest", with a warning.

    When a model is protected, and as a hook of each pass. Under "medium", torch's float32 products on CPUs with AMX are
    of bfloat16, and under "high" on some of TF32: keys would lose five digits, or seem not to be orthogonal, and a
    check would find an honest worker's product wrong.
    """
    if torch.backends.mkldnn.matmul.fp32_precision in ("bf16", "tf32"):  # type: ignore[attr-defined]
        torch.set_float32_matmul_precision("highest")
        warnings.warn(
            'torch.set_float32_matmul_precision is "highest" again: keys and checks need whole float32 products',
            stacklevel=3,
        )


def _refuse_masks_of_bools(passes: Passes, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what eager attention adds to its logits as zeros and ones, and the worker would take as forbidden or not.

    The masks that transformers makes of one ``[rows, keys]`` are not here yet.
    """
    if not passes.eager:
        return
    given = kwargs.get("attention_mask")
    for mask in (*args, *(given.values() if isinstance(given, dict) else (given,))):
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.dtype == torch.bool:
            raise UnsupportedModelError(
                "a mask of bools for eager attention, which adds it as a number",
                where=type(module).__name__,
                expected="0 where attention is allowed, and the dtype's least value elsewhere",
                hint='or attn_implementation="sdpa", where the model has it',
            )


def _refuse_output(model: Any, name: str, why: str) -> None:
    """Refuse a forward that asks for an output which is on the worker, by its argument or by the configuration."""
    reason, _, hint = why.partition(": ")

    def check(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        wanted = kwargs.get(name)
        if wanted is None:
            wanted = getattr(model.config, name, None)
        if wanted is not None and wanted is not False:  # a number may choose one of several, 0 the first
            where = type(module).__name__
            raise UnsupportedModelError(f"{name}: {reason}", where=where, hint=f"protect with {hint}")

    for each in (model, model.base_model):  # the one without the head can be called alone
        each.register_forward_pre_hook(check, with_kwargs=True)
