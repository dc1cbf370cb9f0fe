"""What a profile hides from whoever operates the worker, and what it shows, in plain words for the page."""

from typing import Any

from obfuscatune.profiles import Profile

_TEXTS = "prompts, answers and tokens as such, embeddings, the head, and every key"
_PATTERNS = "attention maps, lengths, timing, and which tokens are equal"
_CLAIMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "plain": ((), ("weights and activations in the clear", "what was asked and answered can be read from them")),
    "naive": ((), ("as paper, under matrices that lose precision",)),
    "paper": ((_TEXTS,), ("true Q, K, V and MLP activations", _PATTERNS, "the data, to whoever looks for it")),
    "balanced": (
        (_TEXTS, "plain coordinates of weights, activations and the adapter"),
        (_PATTERNS, "the data, to whoever links the streams: nothing is claimed for it"),
    ),
    "stream": (
        (_TEXTS, "plain coordinates of weights, activations and the adapter"),
        (_PATTERNS, "a working copy of the body in one unknown rotation", "the data: nothing is claimed for it"),
    ),
    "strict": (
        (_TEXTS, "rows of activations, mixed with noise by secrets used once"),
        ("counts of rows, timing, singular values of weights", "weights that have a near public base"),
    ),
    "enclave": (("everything: nothing leaves the enclave",), ()),
}


def describe(profile: Profile) -> dict[str, Any]:
    """Return what the page says of a profile."""
    base, *switches = profile.name.split("+")
    hidden, shown = _CLAIMS.get(base, ((), ("a profile of your own: see docs/security.md",)))
    if profile.shares:
        hidden, shown = _of_shares(profile)
    elif profile.remote and switches:
        shown = (*shown, f"with {', '.join(switches)} perhaps more")
    return {
        "profile": profile.name,
        "summary": profile.summary,
        "audience": profile.audience,
        "hidden": list(hidden),
        "shown": list(shown),
    }


def _of_shares(profile: Profile) -> tuple[tuple[str, ...], tuple[str, ...]]:
    alone = "each operator alone" if profile.threshold == 1 else f"any {profile.threshold} operators together"
    more = f"everything, to any {profile.threshold + 1} operators together"
    if profile.weights == "open":
        return (_TEXTS, f"activations, from {alone}"), ("the weights, to every operator", more, "shapes and timing")
    return (_TEXTS, f"weights and activations, from {alone}"), (more, "shapes and timing")
