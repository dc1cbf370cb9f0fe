"""``protect``, the door: keys a model's large layers onto a worker and gives the same model back."""

import math
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from peft import PeftModel
from torch import nn

from obfuscatune.enclave.families import Block, Decoder, read_decoder
from obfuscatune.enclave.families.empty import refuse_attention
from obfuscatune.enclave.families.fit import fit
from obfuscatune.enclave.families.options import refuse_options
from obfuscatune.enclave.frozen import are_frozen, refuse_training_of_all
from obfuscatune.enclave.guard import Guard, refuse_looking_ahead
from obfuscatune.enclave.guarded import guard_class
from obfuscatune.enclave.hooks import forget_adapters_of_rows
from obfuscatune.enclave.inputs import Inputs
from obfuscatune.enclave.keys import MasterSecret
from obfuscatune.enclave.lazy import lazy_weights
from obfuscatune.enclave.links import Link, bytes_of, spread
from obfuscatune.enclave.protected import Protected
from obfuscatune.enclave.recipes.context import Keying
from obfuscatune.enclave.recipes.linears import key_group
from obfuscatune.enclave.recipes.shared import SharedRecipe
from obfuscatune.enclave.recipes.stream import StreamRecipe
from obfuscatune.enclave.recipes.whole import key_attention_part, key_mlp_part
from obfuscatune.enclave.remote.body import RemoteBody
from obfuscatune.enclave.remote.calls import without_autocast
from obfuscatune.enclave.remote.head import use_fast_head
from obfuscatune.enclave.remote.held import HeldAdapter
from obfuscatune.enclave.remote.linear import RemoteLinear
from obfuscatune.enclave.remote.whole import RemotePart
from obfuscatune.enclave.remote.withdrawn import Standin
from obfuscatune.enclave.session import Session
from obfuscatune.enclave.sharing.scheme import Scheme
from obfuscatune.enclave.sharing.statement import describe
from obfuscatune.enclave.spawn import open_session
from obfuscatune.errors import KeyFaultError, UnsupportedModelError, UsageError
from obfuscatune.profiles import Profile, resolve
from obfuscatune.protocol.waiting import WAITING, is_chosen

if TYPE_CHECKING:
    from obfuscatune.parties.identity import Identity


def protect(
    model: nn.Module,
    *,
    profile: str | Profile = "balanced",
    worker: str | Sequence[str] = "spawn",
    device: str | None = None,
    threads: int | None = None,
    timeout: float = 600.0,
    identity: "Identity | str | Path | None" = None,
    insecure: bool = False,
    queue: bool = True,
    secret: MasterSecret | None = None,
    insecure_test_seed: int | None = None,
    progress: bool = False,
    **switches: Any,
) -> Protected:
    """Run ``model`` between this process, the enclave, and a worker that gets what the profile hands over, keyed.

    The model is changed in place: its large linear layers leave for the worker, keyed, and are gone from this process.
    Only what stays can be trained: LoRA (PEFT), and embeddings, final norm and head where they require gradients. On
    failure the model is as it was. The large weights of a model from `obfuscatune.load` are read, keyed and
    dropped layer by layer.

    Args:
        model: a causal language model of ``transformers``, or a PEFT model with plain LoRA around one; on the CPU, one
            float dtype. Which profiles run which families is a table in docs/models.md.
        profile: name of a profile, or a record, which says what it claims; ``switches`` change single fields of it
            (``mlp="enclave"``).
        worker: ``"spawn"`` for a process on this machine, or the address of one that runs: ``unix://PATH``,
            ``tls://HOST:PORT#FINGERPRINT``, ``tcp://HOST:PORT``. Several of them share the blocks, each as many as it
            can hold. Profile ``shared`` needs three, of operators that do not collude, and more with ``spares``;
            ``"spawn"`` starts all of them here, for tests and demonstrations, and protects nothing.
        device: of a spawned worker; torch's default otherwise.
        threads: of a spawned worker; torch's default otherwise.
        timeout: seconds to wait for each reply of the worker.
        identity: this enclave's, or the path of its ``NAME.key``, for ``tls://``; the worker must allow it.
        insecure: whether ``tcp://`` may leave this machine: neither encrypted nor authenticated.
        queue: whether to wait where all places of a worker are taken.
        secret: master secret of an earlier session, to resume it bit for bit; a fresh one otherwise.
        insecure_test_seed: makes the keys predictable, for tests only; refused with a worker over a network.
        progress: show a bar while the weights are keyed.

    Returns:
        A context manager with ``.model``, ``.report()``, ``.create_optimizer()`` and ``.close()``.

    Raises:
        UsageError: options that do not fit, no worker at the address, or one that does not let this identity in.
        AttestationError: the worker has another identity than the address names.
        UnsupportedModelError: a model, configuration or adapter that cannot be run exactly.
        WorkerFault: the worker failed. BusyError: it has no place, and ``queue`` is off.
    """
    resolved = resolve(profile, **switches)
    _check_options(worker, threads, timeout)
    causal_lm = _causal_lm(model)
    _refuse_protected(causal_lm)
    _check_tensors(causal_lm)
    adapters = getattr(causal_lm, "peft_config", None) or {}  # of a PEFT model, and of one that transformers adapted
    workers = _addresses(worker, resolved)
    keys = _master_secret(secret, insecure_test_seed, workers)
    total = _base_parameters(model)
    weights = lazy_weights(causal_lm)
    if resolved.remote or weights is not None:  # else PEFT has had the whole model, and has it still
        refuse_options(adapters)
    if not resolved.remote:  # nothing leaves, so it need not be understood
        if weights is not None:
            weights.keep()
            weights.finish()
        causal_lm.base_model.register_forward_pre_hook(Inputs(causal_lm), with_kwargs=True)
        return Protected(model, resolved, [], None, keys, total_parameters=total)
    decoder = read_decoder(causal_lm)
    asked = resolved
    resolved = fit(decoder, resolved, {name for name, value in switches.items() if value is not None})
    if resolved.attention == "worker":
        refuse_looking_ahead(causal_lm.config)
        refuse_attention(causal_lm.config)
    if "spawn" in workers and device in (None, "cpu") and not is_chosen():
        _warn_of_spinning()
    blocks = _leaving(decoder, resolved)
    if resolved.shares and threads is None and set(workers) == {"spawn"}:
        # Workers of our own that multiply at the same time share the cores: more threads would wait for each other.
        threads = max(1, torch.get_num_threads() // len(workers))
    connect = partial(
        open_session,
        timeout=timeout,
        threads=threads,
        device=device,
        identity=identity,
        insecure=insecure,
        queue=queue,
    )
    frozen = bool(adapters) or are_frozen(blocks)
    sessions: list[Session] = []
    try:
        for address in workers:
            sessions.append(connect(address))
        links = [Link.greet(session) for session in sessions]
        placed = [0] * len(blocks) if resolved.shares else spread([bytes_of(block) for block in blocks], links)
        held = HeldAdapter()
        keying = Keying(links, resolved, causal_lm.config, keys, held, bool(adapters), weights)
        if weights is not None:
            weights.keep(layer.path for block in decoder.blocks[: resolved.enclave_blocks] for layer in block.layers)
        sharing = SharedRecipe(keying) if resolved.shares else None
        recipes = [_recipe(keying, decoder) for _ in links] if sharing is None else [sharing]
        with without_autocast():
            for block, number in zip(_with_bar(blocks, progress), placed, strict=True):
                keying.link = links[number]
                for link in links if resolved.shares else [keying.link]:
                    link.blocks.append(block.path)
                recipes[number].key_block(block)
                keying.close()
            for keying.link, recipe in zip(links, recipes, strict=False):
                recipe.finish()
        if sharing is not None:
            _warn_of_sharing(sharing, workers)
        keying.install()
    except BaseException:
        for session in sessions:
            session.close()
        if weights is not None:
            weights.release()
        raise
    if weights is not None:
        weights.finish()
    eager = getattr(causal_lm.config, "_attn_implementation", None) == "eager"
    for link in links:
        link.passes.eager = eager
        causal_lm.base_model.register_forward_pre_hook(link.passes.begin, with_kwargs=True)
    causal_lm.base_model.register_forward_pre_hook(Inputs(causal_lm), with_kwargs=True)
    causal_lm.base_model.register_forward_pre_hook(Guard(causal_lm, resolved, links[0].passes))
    if resolved.attention == "worker":
        # Blocks that stay in the enclave would look at other positions than the worker's where a row sees none.
        if getattr(causal_lm, "_supports_sdpa", False) and not (eager and resolved.enclave_blocks):
            causal_lm.set_attn_implementation("sdpa")  # its masks say only what is allowed, and None for causal
        _refuse_output(causal_lm, "output_attentions", 'attention weights stay on the worker: attention="enclave"')
    if resolved.rotate_stream:
        what = "the blocks' outputs stay on the worker: rotate_stream=False. The last hidden state is there"
        _refuse_output(causal_lm, "output_hidden_states", what)
        for body in causal_lm.modules():
            if isinstance(body, RemoteBody) and body.blind is not None:
                causal_lm.register_forward_hook(body.blind.check_labels, with_kwargs=True)
    use_fast_head(causal_lm)
    refuse_training_of_all(causal_lm, frozen=frozen)
    causal_lm.register_forward_hook(forget_adapters_of_rows, always_call=True)
    guard_class(causal_lm)
    for standin in causal_lm.modules():
        if isinstance(standin, Standin):
            standin.seal()
    return Protected(
        model,
        resolved,
        links,
        held,
        keys,
        total_parameters=total,
        asked=asked,
        sharing=None if sharing is None else (sharing.workers, workers),
    )


class _Recipe(Protocol):
    """Keys and ships one block after the other, and notes what will stand in their places."""

    def key_block(self, block: Block) -> None: ...

    def finish(self) -> None: ...


class _ByPart:
    """Attention and MLP each by its side: whole on the worker, or their linear layers alone."""

    def __init__(self, keying: Keying) -> None:
        self._keying = keying

    def key_block(self, block: Block) -> None:
        profile = self._keying.profile
        whole = (("attention", profile.attention, key_attention_part), ("mlp", profile.mlp, key_mlp_part))
        if not block.parts:
            for group in block.groups:
                key_group(self._keying, group)
            return
        for (_, side, key_part), groups in zip(whole, (block.groups[:2], block.groups[2:]), strict=True):
            if side == "worker":
                key_part(self._keying, block)
                continue
            for group in groups:
                key_group(self._keying, group)

    def finish(self) -> None:
        """Nothing is of more than one block."""


def _warn_of_spinning() -> None:
    names = " and ".join(f"{name}={value}" for name, value in WAITING.items())
    warnings.warn(
        "torch was loaded before obfuscatune, so OpenMP's idle threads spin on the cores that a worker of this machine "
        f"needs, and training may take several times as long: import obfuscatune first, or set {names}",
        stacklevel=3,
    )


def _check_options(worker: Any, threads: Any, timeout: Any) -> None:
    addresses = [worker] if isinstance(worker, str) or not isinstance(worker, Iterable) else list(worker)
    if not addresses or not all(isinstance(address, str) for address in addresses):
        raise UsageError("worker", got=ascii(worker)[:80], expected='"spawn", an address, or a list of addresses')
    if threads is not None and (type(threads) is not int or not 1 <= threads <= 4096):
        raise UsageError("threads of a worker", got=ascii(threads)[:40], expected="1 to 4096")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise UsageError("timeout", got=ascii(timeout)[:40], expected="seconds, above 0")


def _addresses(worker: str | Sequence[str], profile: Profile) -> list[str]:
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


def _warn_of_sharing(recipe: SharedRecipe, addresses: Sequence[str]) -> None:
    for text in describe(recipe.workers, addresses).warnings():
        warnings.warn(text, stacklevel=3)


def _recipe(keying: Keying, decoder: Decoder) -> _Recipe:
    return StreamRecipe(keying, decoder) if keying.profile.rotate_stream else _ByPart(keying)


def _causal_lm(model: nn.Module) -> Any:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not hasattr(base, "config"):
        raise UnsupportedModelError(
            "not a transformers model",
            got=type(base).__name__,
            expected="AutoModelForCausalLM.from_pretrained(...)",
            hint="take it out of what wraps it",
        )
    return base


def _refuse_protected(causal_lm: nn.Module) -> None:
    if any(isinstance(module, RemoteLinear | RemotePart | RemoteBody) for module in causal_lm.modules()):
        raise UnsupportedModelError("the model is protected already", hint="load it again to protect it anew")


def _leaving(decoder: Decoder, profile: Profile) -> list[Block]:
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


def _check_tensors(model: nn.Module) -> None:
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


def _master_secret(secret: MasterSecret | None, insecure_test_seed: int | None, workers: Sequence[str]) -> MasterSecret:
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


def _base_parameters(model: nn.Module) -> int:
    """Parameters of the model itself: no adapter, no anchor."""
    skipped = ("lora_", ".anchor", "anchor_")
    return sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in skipped))


def _with_bar(blocks: list[Block], progress: bool) -> Iterable[Block]:
    if not progress:
        return blocks
    from tqdm.auto import tqdm

    bar: Iterable[Block] = tqdm(blocks, desc="keying weights", unit="block")
    return bar


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
