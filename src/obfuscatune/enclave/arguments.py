"""What `protect` is given, refused by name before anything starts: the model, workers, secret, numbers."""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from torch import Tensor, nn

from obfuscatune.enclave.families import Block, Decoder
from obfuscatune.enclave.keys import MasterSecret
from obfuscatune.enclave.remote.body import RemoteBody
from obfuscatune.enclave.remote.linear import RemoteLinear
from obfuscatune.enclave.remote.whole import RemotePart
from obfuscatune.enclave.sharing.scheme import Scheme
from obfuscatune.errors import KeyFaultError, UnsupportedModelError, UsageError
from obfuscatune.profiles import Profile
from obfuscatune.protocol.waiting import WAITING

# Within PEFT's layers and wrappers, what the model has had; that of trained tokens has the embedding in its layer.
_MODELS_OWN = ("base_layer", "original_module", "token_adapter")


def check_options(worker: Any, threads: Any, timeout: Any) -> None:
    """Refuse workers that are no addresses, and numbers out of range."""
    addresses = [worker] if isinstance(worker, str) or not isinstance(worker, Iterable) else list(worker)
    if not addresses or not all(isinstance(address, str) for address in addresses):
        raise UsageError("worker", got=ascii(worker)[:80], expected='"spawn", an address, or a list of addresses')
    if threads is not None and (type(threads) is not int or not 1 <= threads <= 4096):
        raise UsageError("threads of a worker", got=ascii(threads)[:40], expected="1 to 4096")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise UsageError("timeout", got=ascii(timeout)[:40], expected="seconds, above 0")


def addresses_of(worker: str | Sequence[str], profile: Profile) -> list[str]:
    """The workers' addresses: where rows are shared, one for each point."""
    given = [worker] if isinstance(worker, str) else list(worker)
    if not profile.shares:
        return given
    count = Scheme.make(threshold=profile.threshold, weights=profile.weights, spares=profile.spares).points
    if given == ["spawn"]:
        return given * len(count)
    if len(given) != len(count):
        raise UsageError(
            "number of workers", got=len(given), expected=f"{len(count)} for profile {profile.name}", hint="spares=1"
        )
    identities = [address.rpartition("#")[2] for address in given if address != "spawn"]
    if len(set(identities)) != len(identities):
        raise UsageError("one worker is given twice: with two shares it has what is shared", where=", ".join(given))
    return given


def master_secret(secret: MasterSecret | None, insecure_test_seed: int | None, workers: Sequence[str]) -> MasterSecret:
    """Return the secret that was given, or a fresh one.

    Raises: `KeyFaultError` where keys that anybody can compute would meet a worker over a network.
    """
    if insecure_test_seed is not None:
        if secret is not None:
            raise UsageError("secret and insecure_test_seed are both given", hint="choose one")
        secret = MasterSecret.from_insecure_test_seed(insecure_test_seed)
    for worker in workers:
        if secret is not None and secret.is_test and worker.startswith(("tcp:", "tls:")):
            raise KeyFaultError(
                "a test seed is refused with a worker over a network", where=worker, hint="leave insecure_test_seed out"
            )
    return secret if secret is not None else MasterSecret.generate()


def causal_lm_of(model: nn.Module) -> Any:
    """Return the model of transformers, out of PEFT's where it is in one."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not hasattr(base, "config"):
        raise UnsupportedModelError(
            "not a transformers model",
            got=type(base).__name__,
            expected="AutoModelForCausalLM.from_pretrained(...)",
            hint="take it out of what wraps it",
        )
    return base


def refuse_mixed(model: nn.Module) -> None:
    """Refuse PEFT's model of adapters of several kinds, whose modules have other paths."""
    if isinstance(model, PeftMixedModel):
        hint = "get_peft_model(model, config) without mixed=True"
        raise UnsupportedModelError("adapters of mixed kinds", got="PeftMixedModel", expected="PeftModel", hint=hint)


def refuse_protected(causal_lm: nn.Module) -> None:
    """Refuse a model some of whose parts are on a worker already."""
    if any(isinstance(module, RemoteLinear | RemotePart | RemoteBody) for module in causal_lm.modules()):
        raise UnsupportedModelError("the model is protected already", hint="load it again to protect it anew")


def check_tensors(model: nn.Module) -> None:
    """Refuse weights that are not on the CPU, or not of one float dtype that both sides compute in."""
    if not torch.is_inference_mode_enabled() and any(p.is_inference() for p in model.parameters()):
        raise UnsupportedModelError(
            "a model that was made under torch.inference_mode()", hint="load it outside of that"
        )
    # PEFT keeps the adapter of a half-precision model in float32; the model itself has one dtype.
    dtypes = {p.dtype for name, p in model.named_parameters() if p.is_floating_point() and "lora_" not in name}
    devices = {p.device.type for p in model.parameters()}
    if devices != {"cpu"}:
        raise UnsupportedModelError("the enclave's model is on the CPU", got=sorted(devices), hint='model.to("cpu")')
    if len(dtypes) != 1 or not dtypes <= {torch.float64, torch.float32, torch.bfloat16}:
        expected = "float64, float32 or bfloat16, one for all"
        raise UnsupportedModelError(
            "dtype of the weights",
            got=sorted(str(d) for d in dtypes),
            expected=expected,
            hint="model.to(torch.float32)",
        )


def leaving(decoder: Decoder, profile: Profile) -> list[Block]:
    """The blocks that leave for the worker."""
    count = len(decoder.blocks)
    if profile.enclave_blocks >= count:
        raise UsageError(
            "no block is left for the worker",
            got=f"enclave_blocks={profile.enclave_blocks}",
            expected=f"fewer than the model's {count}",
            hint='profile="enclave" keeps all of it inside',
        )
    return decoder.blocks[profile.enclave_blocks :]


def count_parameters(causal_lm: nn.Module) -> int:
    """Parameters of the model itself, without what PEFT has added: adapters, trained copies of modules and tokens.

    Args:
        causal_lm: the model of transformers, out of PEFT's, which may have a prompt of its own.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    added: set[Tensor] = set()
    for module in causal_lm.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            named = module.named_parameters()
            added |= {parameter for name, parameter in named if name.split(".")[0] not in _MODELS_OWN}
    return sum(parameter.numel() for parameter in causal_lm.parameters() if parameter not in added)


def warn_of_spinning() -> None:
    """Warn that idle threads will take the cores of a spawned worker."""
    names = " and ".join(f"{name}={value}" for name, value in WAITING.items())
    warnings.warn(
        "torch was loaded before obfuscatune, so OpenMP's idle threads spin on the cores that a worker of this machine "
        f"needs, and training may take several times as long: import obfuscatune first, or set {names}",
        stacklevel=3,
    )
