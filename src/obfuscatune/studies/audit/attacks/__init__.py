"""All attacks, one idea a file, by their ids in docs/security.md."""

from importlib import import_module

from obfuscatune.studies.audit.attack import Attack

# In the order of their ids.
_MODULES = (
    *("procrustes", "two_sided", "structured", "head_gauge", "lineage"),
    *("pseudo_inverse", "norms", "gram", "sequential", "known_text", "customer", "alignment"),
    *("separation", "outliers", "multiset", "fingerprint"),
    *("labels", "span", "adapter", "frequency", "shape"),
    *("linking", "theft", "covariance", "near_base"),
)


def all_attacks() -> dict[str, Attack]:
    """Return every attack by its id, A1 first."""
    found: dict[str, Attack] = {}
    for name in _MODULES:
        module = import_module(f"{__name__}.{name}")
        attacks: tuple[Attack, ...] = getattr(module, "ATTACKS", None) or (module.ATTACK,)
        found |= {attack.id: attack for attack in attacks}
    return dict(sorted(found.items(), key=lambda item: int(item[0][1:])))
