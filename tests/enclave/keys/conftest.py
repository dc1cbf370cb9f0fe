import pytest

from obfuscatune.enclave.keys import MasterSecret


@pytest.fixture
def master() -> MasterSecret:
    return MasterSecret.from_insecure_test_seed(20240607)
