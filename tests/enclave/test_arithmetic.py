"""What calls cost, by the shapes that they have."""

import pytest

from obfuscatune.enclave.arithmetic import of_keys
from obfuscatune.enclave.keys import MasterSecret, build
from obfuscatune.profiles import resolve


@pytest.mark.parametrize(("family", "size"), [("identity", 96), ("haar", 96), ("monarch", 48), ("monarch", 256)])
def test_a_key_costs_a_multiply_add_for_each_number_of_its_factors(family: str, size: int) -> None:
    profile = resolve("strict")
    stream = MasterSecret.from_insecure_test_seed(1).stream("x")
    key = build(family, stream, size, block=profile.key_block, kappa=1.0)
    assert of_keys(family, size, profile) == sum(f.numel() for f in key._factors if f.is_floating_point())
