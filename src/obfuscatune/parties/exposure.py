"""What a profile hides from whom, in the words that people sign.

``enclave`` and ``shared`` show the operator of one worker nothing of weights or data, under the assumptions that they
name. Every other profile shows something: an owner's terms allow it only by its name together with `line`, so that
nobody allows it unread. docs/security.md has the whole of it.
"""

from obfuscatune.profiles import Profile

_SHOWN = {
    "plain": "shows the worker's operator weights and activations as they are",
    "naive": "shows the worker's operator true Q, K, V and MLP activations, from which text can be read, and LoRA",
    "paper": "shows the worker's operator true Q, K, V and MLP activations, from which text can be read, and LoRA",
    "balanced": "shows the worker's operator attention maps, lengths, equal tokens and gradients: nothing is claimed "
    "for data, and a model with a public relative can be recovered",
    "strict": "shows the worker's operator singular values of the weights and row counts: no claim for weights with a "
    "near public base, and for data only what an audit of small models measures",
    "stream": "hands the worker's operator the working body in one unknown rotation, and attention maps, lengths and "
    "equal tokens: nothing is claimed for data",
    "shared": "hands every worker's operator the plain weights; rows are hidden from each of them alone",
}


def hides_all(profile: Profile) -> bool:
    """Return whether one worker's operator alone learns nothing of weights and data: `enclave` and `shared`."""
    return not profile.remote or (profile.shares and profile.weights != "open")


def line(profile: Profile) -> str:
    """Return the sentence that terms must hold to allow this profile; empty where it `hides_all`."""
    if hides_all(profile):
        return ""
    base, *switches = profile.name.split("+")
    changed = f"; with {', '.join(switches)} it may show more" if switches else ""
    return f"{_SHOWN['shared' if profile.shares else base]}{changed}"


def statement(profile: Profile) -> list[str]:
    """Return what the profile hides from whom, in lines: of the worker's operator, and of the enclave's."""
    if not profile.remote:
        lines = ["no worker takes part: nobody but the enclave computes"]
    elif hides_all(profile):
        alone = "each operator" if profile.threshold == 1 else f"any {profile.threshold} operators"
        lines = [
            f"{alone} of {profile.share_workers} workers: uniformly random numbers; sizes, timing, which layer",
            f"any {profile.threshold + 1} of them together: everything, weights and data",
        ]
    else:
        lines = [f"the profile {line(profile)}"]
    return [*lines, "the enclave's own operator: sizes, times and who connects, if the enclave's evidence is genuine"]
