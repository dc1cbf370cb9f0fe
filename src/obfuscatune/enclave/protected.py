"""``protect``, the door: keys a model's large layers onto a worker and gives the same model back."""

import weakref
from types import TracebackType
from typing import Any, Self

import torch
from peft import PeftModel
from torch import nn

from obfuscatune.enclave.body import RemoteBody
from obfuscatune.enclave.families import FamilySpec, family_of
from obfuscatune.enclave.held import OPTIMIZERS, HeldAdapter, RemoteOptimizer
from obfuscatune.enclave.install import Installer
from obfuscatune.enclave.install_body import BodyInstaller
from obfuscatune.enclave.keys import MasterSecret
from obfuscatune.enclave.lazy import LazyWeights
from obfuscatune.enclave.linear import RemoteLinear
from obfuscatune.enclave.mixed import MixedLinear
from obfuscatune.enclave.report import Report, make_report
from obfuscatune.enclave.session import Session
from obfuscatune.enclave.spawn import open_session
from obfuscatune.enclave.whole import RemoteWhole
from obfuscatune.errors import KeyFaultError, UnsupportedModelError, UsageError, WorkerFault
from obfuscatune.profiles import Profile, resolve
from obfuscatune.protocol.products import linear


def protect(
    model: nn.Module,
    *,
    profile: str | Profile = "balanced",
    worker: str = "spawn",
    device: str | None = None,
    threads: int | None = None,
    timeout: float = 600.0,
    secret: MasterSecret | None = None,
    insecure_test_seed: int | None = None,
    progress: bool = False,
    weights: LazyWeights | None = None,
    **switches: Any,
) -> "Protected":
    """Run ``model`` between this process, the enclave, and a worker that sees only keyed weights and activations.

    The model is changed in place: its large linear layers leave for the worker, keyed, and are gone from this process.
    Only what stays can be trained: LoRA (PEFT), and embeddings, final norm and head where they require gradients. On
    failure the model is as it was.

    Args:
        model: a ``transformers`` GPT-2, or a PEFT model with plain LoRA around one; on the CPU, one float dtype.
        profile: name of a profile, or a record; ``switches`` change single fields of it (``mlp="enclave"``).
        worker: ``"spawn"`` for a process on this machine, or the address of one that runs: ``unix://PATH``,
            ``tcp://HOST:PORT``.
        device, threads: of a spawned worker; torch's default otherwise.
        timeout: seconds to wait for each reply of the worker.
        secret: master secret of an earlier session, to resume it bit for bit; a fresh one otherwise.
        insecure_test_seed: makes the keys predictable, for tests only; refused with a TCP worker.
        progress: show a bar while the weights are keyed.
        weights: of a model made by `load_lazily`: its large weights, read and dropped again layer by layer.

    Returns:
        A context manager with ``.model``, ``.report()``, ``.create_optimizer()`` and ``.close()``.

    Raises:
        UsageError: options that do not fit, no worker at the address.
        UnsupportedModelError: a model, configuration or adapter that cannot be run exactly.
        WorkerFault: the worker failed.
    """
    resolved = resolve(profile, **switches)
    causal_lm = _causal_lm(model)
    spec = family_of(causal_lm.config)
    _check_tensors(causal_lm)
    keys = _master_secret(secret, insecure_test_seed, worker)
    total = _base_parameters(model)
    if not resolved.remote:
        return Protected(model, resolved, None, None, keys, total_parameters=total, worker_parameters=0)
    blocks = _blocks(causal_lm, spec, resolved)
    if resolved.rotate_stream:
        _check_final_norm(causal_lm, spec)
    session = open_session(worker, timeout=timeout, threads=threads, device=device)
    try:
        session.hello()
        held = HeldAdapter(session)
        adapted = isinstance(model, PeftModel)
        kind = BodyInstaller if resolved.rotate_stream else Installer
        installer = kind(session, resolved, spec, causal_lm, keys, held, adapted, weights)
        for index, path, block in _with_bar(blocks, progress):
            installer.key_block(block, index, path)
        installer.finish()
        if resolved.attention == "worker":
            causal_lm.set_attn_implementation("sdpa")  # its masks say only what is allowed, and None for causal
        installer.install()
    except BaseException:
        session.close()
        raise
    if resolved.attention == "worker":
        _refuse_output(causal_lm, "output_attentions", 'attention weights stay on the worker: attention="enclave"')
    if resolved.rotate_stream:
        what = "the blocks' outputs stay on the worker: rotate_stream=False. The last hidden state is there"
        _refuse_output(causal_lm, "output_hidden_states", what)
    head = causal_lm.get_output_embeddings()
    if type(head) is nn.Linear:
        # A quarter of a decoding step of GPT-2 small is the reading of this weight.
        head.forward = lambda input: linear(input, head.weight, head.bias)  # type: ignore[method-assign]
    return Protected(
        model,
        resolved,
        session,
        held,
        keys,
        total_parameters=total,
        worker_parameters=installer.worker_parameters,
    )


class Protected:
    """A model that runs between enclave and worker; a context manager that ends the session and a spawned worker.

    Attributes:
        model: the very object that was protected, of its old class: ``forward``, ``generate``, ``Trainer`` and PEFT's
            ``save_pretrained`` work as before.
        profile: the resolved record. secret: the master secret, for a checkpoint; never leaves the enclave.
    """

    def __init__(
        self,
        model: nn.Module,
        profile: Profile,
        session: Session | None,
        held: HeldAdapter | None,
        secret: MasterSecret,
        *,
        total_parameters: int,
        worker_parameters: int,
    ) -> None:
        self.model, self.profile, self.session, self.secret = model, profile, session, secret
        self._held = held
        self._total_parameters, self._worker_parameters = total_parameters, worker_parameters
        self._final_report: Report | None = None
        if session is not None:
            # The model's end, not this object's: `protect(model).model` alone keeps running.
            weakref.finalize(model, session.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def create_optimizer(self, kind: str = "adamw", *, lr: float, **options: Any) -> torch.optim.Optimizer:
        """Return the optimizer of what is trained, wherever it is; for ``Trainer(optimizers=(optimizer, None))``.

        Only needed with ``lora_placement="worker"``; otherwise the Trainer's own optimizer does.

        Args:
            kind: ``adamw`` or ``sgd``. options: of that torch optimizer (weight_decay, betas, momentum, ...).
        """
        if kind not in OPTIMIZERS:
            raise UsageError("optimizer", got=repr(kind), expected=", ".join(OPTIMIZERS))
        slots = [] if self._held is None else self._held.slots
        anchors = {id(slot.anchor) for slot in slots}
        local = [p for p in self.model.parameters() if p.requires_grad and id(p) not in anchors]
        if self._held is not None and slots:
            return RemoteOptimizer(self._held, local, kind=kind, lr=lr, **options)
        return OPTIMIZERS[kind](local, lr=lr, **options)

    def report(self) -> Report:
        """Return what is where, what crossed the boundary, and what it cost."""
        if self._final_report is not None:
            return self._final_report
        # What did not leave, rather than what the model counts now: the biases of remote layers are its buffers.
        total, worker = self._total_parameters, self._worker_parameters
        return make_report(self.profile, self.session, enclave=total - worker, worker=worker, total=total)

    def close(self) -> None:
        """End the session; the worker forgets it all. The model cannot be run after that; may be called again."""
        if self.session is not None and self._final_report is None:
            try:
                if self._held is not None:
                    self._held.pull()
                self._final_report = self.report()
            except (UsageError, WorkerFault):
                self._final_report = None  # the session had ended by a fault, which was raised where it happened
            finally:
                self.session.close()

    def __repr__(self) -> str:
        where = "no worker" if self.session is None else self.session.worker
        return f"Protected({type(self.model).__name__}, profile={self.profile.name!r}, worker={where!r})"


def _causal_lm(model: nn.Module) -> Any:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not hasattr(base, "config"):
        raise UnsupportedModelError(
            "not a transformers model", got=type(base).__name__, expected="AutoModelForCausalLM.from_pretrained(...)"
        )
    return base


def _blocks(causal_lm: nn.Module, spec: FamilySpec, profile: Profile) -> list[tuple[int, str, nn.Module]]:
    """The blocks that leave for the worker."""
    if any(isinstance(module, RemoteLinear | MixedLinear | RemoteWhole | RemoteBody) for module in causal_lm.modules()):
        raise UnsupportedModelError("the model is protected already", hint="load it again to protect it anew")
    try:
        blocks = list(spec.iter_blocks(causal_lm))
    except AttributeError:
        raise UnsupportedModelError(
            "the model has no decoder blocks where its family has them",
            got=type(causal_lm).__name__,
            expected=f"a model with a head, its blocks at {spec.blocks}",
        ) from None
    if profile.enclave_blocks >= len(blocks):
        raise UsageError(
            "no block is left for the worker",
            got=f"enclave_blocks={profile.enclave_blocks}",
            expected=f"fewer than the model's {len(blocks)}",
            hint='profile="enclave" keeps all of it inside',
        )
    return blocks[profile.enclave_blocks :]


def _check_final_norm(causal_lm: nn.Module, spec: FamilySpec) -> None:
    """Refuse a model that could see the mean of a row, which the centred residual stream has not."""
    norm = causal_lm.get_submodule(spec.final_norm)
    if type(norm) is not nn.LayerNorm:
        got, hint = type(norm).__name__, "rotate_stream=False"
        raise UnsupportedModelError("final norm", got=got, expected="LayerNorm", where=spec.final_norm, hint=hint)


def _check_tensors(model: nn.Module) -> None:
    # PEFT keeps the adapter of a half-precision model in float32; the model itself has one dtype.
    dtypes = {p.dtype for name, p in model.named_parameters() if p.is_floating_point() and "lora_" not in name}
    devices = {p.device.type for p in model.parameters()}
    if devices != {"cpu"}:
        raise UnsupportedModelError("the enclave's model is on the CPU", got=sorted(devices), hint='model.to("cpu")')
    if len(dtypes) != 1 or not dtypes <= {torch.float64, torch.float32, torch.bfloat16}:
        expected = "float64, float32 or bfloat16, one for all"
        raise UnsupportedModelError("dtype of the weights", got=sorted(str(d) for d in dtypes), expected=expected)


def _master_secret(secret: MasterSecret | None, insecure_test_seed: int | None, worker: str) -> MasterSecret:
    if insecure_test_seed is not None:
        if secret is not None:
            raise UsageError("secret and insecure_test_seed are both given", hint="choose one")
        secret = MasterSecret.from_insecure_test_seed(insecure_test_seed)
    if secret is not None and secret.is_test and worker.startswith("tcp:"):
        raise KeyFaultError(
            "a test seed is refused with a TCP worker", where=worker, hint="leave insecure_test_seed out"
        )
    return secret if secret is not None else MasterSecret.generate()


def _base_parameters(model: nn.Module) -> int:
    """Parameters of the model itself: no adapter, no anchor."""
    skipped = ("lora_", ".anchor", "anchor_")
    return sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in skipped))


def _with_bar(blocks: list[Any], progress: bool) -> Any:
    if not progress:
        return blocks
    from tqdm.auto import tqdm

    return tqdm(blocks, desc="keying weights", unit="block")


def _refuse_output(model: Any, name: str, why: str) -> None:
    """Refuse a forward that asks for an output which is on the worker, by its argument or by the configuration."""
    reason, _, hint = why.partition(": ")

    def check(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        wanted = kwargs.get(name)
        if wanted is None:
            wanted = getattr(model.config, name, None)
        if wanted is not None and wanted is not False:  # a number may choose one of several, 0 the first
            raise UnsupportedModelError(f"{name}: {reason}", hint=f"protect with {hint}")

    for each in (model, model.base_model):  # the one without the head can be called alone
        each.register_forward_pre_hook(check, with_kwargs=True)
