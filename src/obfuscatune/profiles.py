"""Profiles: the records that say what crosses the boundary and under which keys.

A profile is data. Each field is a switch of its own; the named profiles are instances, and any switch can be changed
alone (``resolve("balanced", mlp="enclave")``). What each profile leaks is stated in ``docs/security.md``; none of them
is a cryptographic boundary but `shared`, under the assumptions that ``docs/sharing.md`` names.
"""

import dataclasses
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from obfuscatune.errors import UsageError

Side = Literal["enclave", "worker"]
KeyFamily = Literal["identity", "haar", "monarch", "conditioned", "gaussian"]
LoraPlacement = Literal["enclave", "split", "worker"]
Weights = Literal["keyed", "shared", "open"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What is where, and under which keys.

    Attributes:
        name: how reports call it; a changed switch is appended, as in ``balanced+mlp=enclave``.
        summary: one line for people.
        audience: who should take it, and for what; `obfuscatune inspect`, README.md and docs/security.md quote it.
        claim: what the worker is kept from, and nothing more; `--help`, README.md and docs/security.md quote it.
        remote: whether a worker takes part at all; ``False`` runs the whole model in the enclave.
        keys: key family of the four width-d streams of a block: into and out of attention, into and out of the MLP.
        inner_keys: key family of what crosses inside attention and MLP, where these run in the enclave: q, k, v and
            the heads' output; the MLP's pre-activations and activations.
        attention: side that runs softmax and keeps the KV cache.
        mlp: side that runs the MLP's activation function.
        head_keys: per-head keys on q, k, v and a secret order of the heads, where attention runs on the worker.
        permute_mlp: secret permutation of the MLP's neurons, where the MLP runs on the worker.
        fold_norms: fold norm gain and bias into the next weight, so that the worker sees rows of constant norm.
        lora_placement: ``enclave``: PEFT's own layers around the remote linear where input and output are in the
            enclave, split elsewhere; ``split``: one factor pushed to the worker after each step, the optimizer in the
            enclave; ``worker``: both factors and the optimizer on the worker, in keyed coordinates. With
            ``rotate_stream``, ``split`` pushes both factors.
        enclave_blocks: how many first blocks stay in the enclave as they are.
        key_block: block size of Monarch keys.
        kappa: condition number of ``conditioned`` keys.
        head_kappa: condition number of each head's key.
        mix_rows: mix the rows of every call with noise rows, by a secret used once; everything but the linear layers
            runs in the enclave then.
        mix_tile: the most columns that are mixed by one secret; as many noise rows go with them.
        verify: check every product of a linear layer against a secret vector, where all of its input and output is in
            the enclave.
        weights: ``keyed``: on one worker, or block by block on several, under keys; ``shared``: as secret shares on
            workers of different operators, as are the rows of every call, and everything but the linear layers in the
            enclave; ``open``: in the clear on all of them, and only the rows are shared.
        primes: how many primes shares are residues of: the precision. 0: 6 for a float32 model, 3 for a bfloat16 one.
        threshold: how many workers together learn nothing of what is shared.
        spares: how many workers may fail.
        rotate_stream: keep the residual stream on the worker too, under one secret rotation, so that all blocks are one
            call.
        chosen: names of the switches that the caller set himself: a model that cannot have them is refused, not
            adapted to.
    """

    name: str
    summary: str
    audience: str
    claim: str
    remote: bool = True
    keys: KeyFamily = "identity"
    inner_keys: KeyFamily = "identity"
    attention: Side = "enclave"
    mlp: Side = "enclave"
    head_keys: bool = False
    permute_mlp: bool = False
    fold_norms: bool = False
    lora_placement: LoraPlacement = "enclave"
    enclave_blocks: int = 0
    key_block: int = 64
    kappa: float = 1.0
    head_kappa: float = 4.0
    mix_rows: bool = False
    mix_tile: int = 512
    verify: bool = False
    rotate_stream: bool = False
    weights: Weights = "keyed"
    primes: int = 0
    threshold: int = 1
    spares: int = 0
    chosen: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @property
    def shares(self) -> bool:
        """Whether rows go to several workers as secret shares."""
        return self.weights != "keyed"

    @property
    def share_workers(self) -> int:
        """How many workers a sharing takes, spares included; 0 where rows are not shared."""
        degree = self.threshold * (2 if self.weights == "shared" else 1)
        return degree + 1 + self.spares if self.remote and self.shares else 0

    def switches(self) -> dict[str, str | int | float | bool]:
        """Return what the profile does, as plain values by name: equal exactly where two profiles do the same."""
        names = SWITCHES if self.shares else [name for name in SWITCHES if name not in OF_SHARES]
        return {name: getattr(self, name) for name in ("remote", *names)}


PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            name="plain",
            summary="nothing is keyed but LoRA's rank numbers: the baseline of cost, and the control of the wire test",
            audience="research: the baseline that protects nothing",
            claim="none",
            attention="worker",
            mlp="worker",
        ),
        Profile(
            name="naive",
            summary="as paper, under ill-conditioned Gaussian matrices: the ablation",
            audience="research: the ablation of the paper's keys",
            claim="none",
            keys="gaussian",
            lora_placement="worker",
        ),
        Profile(
            name="paper",
            summary="as published: one dense key for q, k, v, their true values outside, LoRA on the worker",
            audience="research: the reproduction of the paper",
            claim="none",
            keys="haar",
            lora_placement="worker",
        ),
        Profile(
            name="balanced",
            summary="Q, K, V keyed as well, cheap keys, attention and MLP on the worker, LoRA optimizer in the enclave",
            audience="against copying of weights that have no public relative; does not protect data",
            claim="no plain coordinates of weights, activations or adapter; nothing on data",
            keys="monarch",
            inner_keys="monarch",
            attention="worker",
            mlp="worker",
            head_keys=True,
            permute_mlp=True,
            fold_norms=True,
        ),
        Profile(
            name="strict",
            summary="linear layers alone on the worker, rows mixed with noise by secrets used once, products verified",
            audience="research: no claim for weights with a near public base; on data only what the audit measures",
            claim="the attacks listed in security.md are at chance, on small models; no more",
            keys="monarch",
            inner_keys="monarch",
            mix_rows=True,
            verify=True,
        ),
        Profile(
            name="stream",
            summary="all blocks on the worker in one call: it gets the working body in one unknown rotation",
            audience="as balanced, but faster: the worker runs all blocks by itself, under one secret rotation",
            claim="embeddings and head withheld; nothing on data",
            keys="monarch",
            inner_keys="monarch",
            attention="worker",
            mlp="worker",
            head_keys=True,
            permute_mlp=True,
            fold_norms=True,
            lora_placement="split",
            rotate_stream=True,
        ),
        Profile(
            name="shared",
            summary="weights and rows as secret shares on three workers that must not collude: one alone sees noise",
            audience="where three operators do not collude: weights and data are hidden from each of them alone",
            claim="one operator alone sees uniformly random numbers, proved; any two together have everything",
            verify=True,
            weights="shared",
        ),
        Profile(
            name="enclave",
            summary="everything stays in the enclave; no worker",
            audience="if the weights fit into the TEE's memory: data and weights are as safe as the TEE",
            claim="what the TEE claims",
            remote=False,
        ),
    )
}

# float64 has 16 digits: beyond this a key's inverse is noise, and nothing computed under it means anything.
MAX_KAPPA = 1e8
_NO_SWITCHES = ("name", "summary", "audience", "claim", "remote", "chosen")
SWITCHES = tuple(f.name for f in dataclasses.fields(Profile) if f.name not in _NO_SWITCHES)
# What is said of shares alone: not part of the keys and the checkpoints of profiles that have none.
OF_SHARES = ("weights", "primes", "threshold", "spares")
_LEAST = {"enclave_blocks": 0, "key_block": 2, "mix_tile": 64, "primes": 0, "threshold": 1, "spares": 0}
_CHOICES = {
    "keys": get_args(KeyFamily),
    "inner_keys": get_args(KeyFamily),
    "attention": get_args(Side),
    "mlp": get_args(Side),
    "lora_placement": get_args(LoraPlacement),
    "weights": get_args(Weights),
}


def resolve(profile: str | Profile, **switches: Any) -> Profile:
    """Return the profile of that name with the given switches changed, checked as a whole.

    ``None`` leaves a switch as the profile has it. LoRA factors on the worker need the norm's own output there, so
    ``lora_placement="worker"`` un-folds the norms, with a warning that names what this shows. A switch that has no
    effect under the others is warned of too, and not named.

    Raises:
        UsageError: unknown profile or switch, or a value out of range; all faults in one message.
    """
    if isinstance(profile, str):
        if profile not in PROFILES:
            raise UsageError("unknown profile", got=repr(profile), expected=f"one of {', '.join(PROFILES)}")
        profile = PROFILES[profile]
    changed = {name: value for name, value in switches.items() if value is not None}
    unknown = sorted(set(changed) - set(SWITCHES))
    if unknown:
        raise UsageError("unknown profile switch", got=", ".join(unknown), expected=f"some of {', '.join(SWITCHES)}")
    base = profile
    for name in ("kappa", "head_kappa"):
        if type(changed.get(name)) is int:
            changed[name] = float(changed[name])
    profile = dataclasses.replace(profile, **changed)
    faults = _faults(profile)
    if faults:
        raise UsageError("the profile's switches do not fit", got="; ".join(faults), where=f"profile {base.name}")
    if profile.lora_placement == "worker" and profile.fold_norms:
        warnings.warn(
            "lora_placement='worker' needs the norm's own output on the worker, so norms are not folded: row norms of "
            "the activations show. lora_placement='enclave' keeps them folded.",
            stacklevel=3,
        )
        profile = dataclasses.replace(profile, fold_norms=False)
    idle = _without_effect(profile, changed)
    if idle:
        warnings.warn("; ".join(idle.values()), stacklevel=3)
        changed = {name: value for name, value in changed.items() if name not in idle}
    names = [f"{n}={getattr(profile, n)}" for n in SWITCHES if n in changed and getattr(profile, n) != getattr(base, n)]
    if profile.shares and changed.keys() & {"weights", "threshold", "spares"}:
        profile = _with_words_of_shares(profile)
    return dataclasses.replace(profile, name="+".join([base.name, *names]), chosen=(*base.chosen, *changed))


def _with_words_of_shares(profile: Profile) -> Profile:
    """Return a sharing with what its switches, which say who sees what, make of the named profile's words."""
    if (profile.weights, profile.threshold, profile.spares) == ("shared", 1, 0):
        return profile
    workers, t = profile.share_workers, profile.threshold
    alone, sees = ("one operator alone", "sees") if t == 1 else (f"any {t} operators together", "see")
    where, several = f"where no {t + 1} of {workers} operators collude", f"any {t + 1} together have everything"
    if profile.weights == "open":
        return dataclasses.replace(
            profile,
            summary=f"rows as secret shares on {workers} workers: {alone} {sees} noise of them; weights in the clear",
            audience=f"{where}: data is hidden from {alone}, the weights from nobody",
            claim=f"nothing on weights; of data {alone} {sees} uniformly random numbers, proved; {several}",
        )
    return dataclasses.replace(
        profile,
        summary=f"weights and rows as secret shares on {workers} workers: {alone} {sees} noise",
        audience=f"{where}: weights and data are hidden from {alone}",
        claim=f"{alone} {sees} uniformly random numbers, proved; {several}",
    )


def _without_effect(profile: Profile, changed: dict[str, Any]) -> dict[str, str]:
    """Say which of the given switches do nothing under the others: a result must not bear their names."""
    inside = "enclave" in (profile.attention, profile.mlp)
    families = {profile.keys, profile.inner_keys} if inside else {profile.keys}
    needs = {
        "inner_keys": (inside, "attention or mlp in the enclave"),
        "kappa": ("conditioned" in families, "conditioned keys"),
        "key_block": ("monarch" in families, "monarch keys"),
        "head_keys": (profile.attention == "worker", "attention on the worker"),
        "head_kappa": (profile.attention == "worker" and profile.head_keys, "head_keys"),
        "permute_mlp": (profile.mlp == "worker", "mlp on the worker"),
        "mix_tile": (profile.mix_rows, "mix_rows"),
        "primes": (profile.shares, "weights shared or open"),
        "threshold": (profile.shares, "weights shared or open"),
        "spares": (profile.shares, "weights shared or open"),
        "verify": (inside or not profile.verify, "attention or mlp in the enclave"),
    }
    if not profile.remote:
        return {name: f"{name} has no effect: everything stays in the enclave" for name in changed}
    idle = {name: need for name, (used, need) in needs.items() if name in changed and not used}
    return {name: f"{name} has no effect without {need}" for name, need in idle.items()}


def _faults(profile: Profile) -> list[str]:
    faults = [
        f"{name} is {getattr(profile, name)!r}, not one of {', '.join(allowed)}"
        for name, allowed in _CHOICES.items()
        if getattr(profile, name) not in allowed
    ]
    for name in ("head_keys", "permute_mlp", "fold_norms", "mix_rows", "verify", "rotate_stream"):
        if not isinstance(getattr(profile, name), bool):
            faults.append(f"{name} is {getattr(profile, name)!r}, not true or false")
    for name, least in _LEAST.items():
        value = getattr(profile, name)
        if type(value) is not int or value < least:
            faults.append(f"{name} is {value!r}, not a whole number of at least {least}")
    for name in ("kappa", "head_kappa"):
        value = getattr(profile, name)
        if type(value) not in (int, float) or not 1 <= value <= MAX_KAPPA:
            faults.append(f"{name} is {value!r}, not a number from 1 to {MAX_KAPPA:g}")
    inside = (profile.attention, profile.mlp, profile.lora_placement) == ("enclave",) * 3
    if profile.remote and profile.mix_rows and not inside:
        faults.append("mix_rows needs attention, mlp and lora_placement in the enclave")
    if profile.remote and profile.verify and profile.lora_placement != "enclave":
        faults.append("verify needs lora_placement=enclave: what the worker adds of an adapter is not verified")
    if profile.remote and profile.shares:
        faults += _faults_of_shares(profile)
    if profile.remote and profile.rotate_stream:
        faults += _faults_of_a_rotated_stream(profile)
    return faults


def _faults_of_shares(profile: Profile) -> list[str]:
    what, faults = f"weights={profile.weights}", []
    if (profile.attention, profile.mlp, profile.lora_placement) != ("enclave",) * 3:
        faults.append(f"{what} needs attention, mlp and lora_placement in the enclave: workers multiply, no more")
    if profile.mix_rows or profile.fold_norms or {profile.keys, profile.inner_keys} != {"identity"}:
        faults.append(f"{what} needs identity keys, without mix_rows and fold_norms: shares hide all that these hide")
    for name, most in (("primes", 7), ("threshold", 2), ("spares", 8)):
        value = getattr(profile, name)
        if type(value) is int and (value > most or (name, value) == ("primes", 1)):
            faults.append(f"{name} is {value}, not {'0, or 2' if name == 'primes' else _LEAST[name]} to {most}")
    return faults


def _faults_of_a_rotated_stream(profile: Profile) -> list[str]:
    faults = []
    if (profile.attention, profile.mlp) != ("worker", "worker"):
        faults.append("rotate_stream needs attention and mlp on the worker")
    if profile.lora_placement != "split":
        faults.append("rotate_stream needs lora_placement=split: what LoRA reads and writes is on the worker")
    if not profile.fold_norms:
        faults.append("rotate_stream needs fold_norms: a gain does not commute with a rotation")
    if profile.keys in ("conditioned", "gaussian"):
        faults.append(f"rotate_stream needs orthogonal keys, which {profile.keys} ones are not")
    return faults
