"""``protect``, the door: keys a model's large layers onto a worker and gives the same model back."""

import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from obfuscatune.enclave.arguments import (
    addresses_of,
    causal_lm_of,
    check_options,
    check_tensors,
    count_parameters,
    leaving,
    master_secret,
    refuse_mixed,
    refuse_protected,
    warn_of_spinning,
)
from obfuscatune.enclave.families import Block, read_decoder
from obfuscatune.enclave.families.fit import fit
from obfuscatune.enclave.families.options import refuse_options
from obfuscatune.enclave.families.stock import refuse_own_attention, refuse_replaced_activation
from obfuscatune.enclave.frozen import are_frozen
from obfuscatune.enclave.guard import refuse_looking_ahead
from obfuscatune.enclave.inputs import Inputs
from obfuscatune.enclave.keys import MasterSecret
from obfuscatune.enclave.lazy import lazy_weights
from obfuscatune.enclave.lifetime import close_all
from obfuscatune.enclave.links import Link, bytes_of, spread
from obfuscatune.enclave.protected import Protected
from obfuscatune.enclave.recipes.context import Keying
from obfuscatune.enclave.recipes.parts import Recipe, recipe_of
from obfuscatune.enclave.recipes.shared import SharedRecipe
from obfuscatune.enclave.remote.calls import without_autocast
from obfuscatune.enclave.remote.held_adapter import HeldAdapter
from obfuscatune.enclave.session import Session
from obfuscatune.enclave.sharing.statement import describe
from obfuscatune.enclave.spawn import check_workers, open_session
from obfuscatune.enclave.tuners import guard_tuners
from obfuscatune.enclave.watching import use_whole_float32, watch
from obfuscatune.profiles import Profile, resolve
from obfuscatune.protocol.waiting import is_chosen

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
    check_options(worker, threads, timeout)
    causal_lm = causal_lm_of(model)
    refuse_protected(causal_lm)
    check_tensors(causal_lm)
    adapters = getattr(causal_lm, "peft_config", None) or {}  # of a PEFT model, and of one that transformers adapted
    workers = addresses_of(worker, resolved)
    if resolved.remote:
        identity = check_workers(workers, threads=threads, device=device, identity=identity, insecure=insecure)
    keys = master_secret(secret, insecure_test_seed, workers)
    total = count_parameters(causal_lm)
    weights = lazy_weights(causal_lm)
    if resolved.remote or weights is not None:  # else PEFT has had the whole model, and has it still
        refuse_options(adapters, causal_lm)
    if not resolved.remote:  # nothing leaves, so it need not be understood
        if weights is not None:
            weights.keep()
            weights.finish()
        causal_lm.base_model.register_forward_pre_hook(Inputs(causal_lm), with_kwargs=True)
        return Protected(model, resolved, [], None, keys, total_parameters=total)
    refuse_mixed(model)
    use_whole_float32()
    decoder = read_decoder(causal_lm)
    asked = resolved
    resolved = fit(decoder, resolved)
    if resolved.attention == "worker":
        refuse_looking_ahead(causal_lm.config)
        refuse_own_attention(causal_lm.config)
    if resolved.mlp == "worker":
        refuse_replaced_activation(causal_lm.config)
    if "spawn" in workers and device in (None, "cpu") and not is_chosen():
        warn_of_spinning()
    blocks = leaving(decoder, resolved)
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
        held = HeldAdapter()
        keying = Keying(links, resolved, causal_lm.config, keys, held, bool(adapters), weights)
        if weights is not None:
            weights.keep(layer.path for block in decoder.blocks[: resolved.enclave_blocks] for layer in block.layers)
        sharing = SharedRecipe(keying) if resolved.shares else None
        recipes = [recipe_of(keying, decoder) for _ in links] if sharing is None else [sharing]
        _key(keying, recipes, blocks, progress)
        if sharing is not None:
            _warn_of_sharing(sharing, workers)
        keying.install()
        watch(causal_lm, resolved, links, frozen=frozen)
        guard_tuners(model)
        protected = Protected(
            model,
            resolved,
            links,
            held,
            keys,
            total_parameters=total,
            asked=asked,
            sharing=None if sharing is None else (sharing.workers, workers),
        )
        if weights is not None:
            weights.finish()
        return protected
    except BaseException:
        close_all(sessions)
        if weights is not None:
            weights.release()
        raise


def _key(keying: Keying, recipes: Sequence[Recipe], blocks: list[Block], progress: bool) -> None:
    """Key each block for its worker, or share it to all of them, and drop its plain weights."""
    links, shares = keying.links, keying.profile.shares
    placed = [0] * len(blocks) if shares else spread([bytes_of(block) for block in blocks], links)
    with without_autocast():
        for block, number in zip(_with_bar(blocks, progress), placed, strict=True):
            keying.link = links[number]
            for link in links if shares else [keying.link]:
                link.blocks.append(block.path)
            recipes[number].key_block(block)
            keying.close()
        for keying.link, recipe in zip(links, recipes, strict=False):
            recipe.finish()


def _warn_of_sharing(recipe: SharedRecipe, addresses: Sequence[str]) -> None:
    for text in describe(recipe.workers, addresses).warnings():
        warnings.warn(text, stacklevel=3)


def _with_bar(blocks: list[Block], progress: bool) -> Iterable[Block]:
    if not progress:
        return blocks
    from tqdm.auto import tqdm

    bar: Iterable[Block] = tqdm(blocks, desc="keying weights", unit="block")
    return bar
