"""The randomness: derivation against an independent reference, distributions, hygiene of the master secret."""

import copy
import hashlib
import hmac
import math
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.enclave.keys import MasterSecret, Stream
from obfuscatune.errors import KeyFaultError, UsageError

SIGMAS = 6.0  # two-sided chance of 2e-9 per statistic
CHI_SQUARE_P = 1e-7
VALUE = bytes(range(32))


def hkdf_reference(value: bytes, info: bytes) -> bytes:
    """RFC 5869 for one output block, from the standard library only."""
    extracted = hmac.digest(bytes(32), value, hashlib.sha256)
    return hmac.digest(extracted, info + b"\x01", hashlib.sha256)


def keystream_reference(key: bytes, n: int) -> bytes:
    return Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor().update(bytes(n))


def chi_square_p(counts: list[int], cells: int) -> float:
    """Chance of a chi-square this large under the uniform distribution on ``cells`` outcomes."""
    expected = sum(counts) / cells
    statistic = sum((c - expected) ** 2 / expected for c in counts) + (cells - len(counts)) * expected
    return torch.special.gammaincc(torch.tensor((cells - 1) / 2).double(), torch.tensor(statistic / 2).double()).item()


def test_stream_is_hkdf_then_chacha20() -> None:
    info = b"obfuscatune stream v1" + b"\0\0\0\x05model" + b"\0\0\0\x01h"
    expected = keystream_reference(hkdf_reference(VALUE, info), 1000)
    stream = MasterSecret(VALUE).stream("model", "h")
    assert stream.bytes(1) + stream.bytes(0) + stream.bytes(700) + stream.bytes(299) == expected


def test_uniform_is_the_top_53_bits_of_each_word() -> None:
    key = bytes(32)
    raw = keystream_reference(key, 8 * 300_000)  # more than one chunk
    expected = [(int.from_bytes(raw[i : i + 8], "little") >> 11) / 2**53 for i in range(0, len(raw), 8)]
    assert Stream(key).uniform(300, 1000).flatten().tolist() == expected


@given(st.lists(st.text(max_size=5), min_size=1, max_size=4), st.lists(st.text(max_size=5), min_size=1, max_size=4))
@settings(deadline=None)
def test_streams_agree_exactly_when_labels_do(first: list[str], second: list[str]) -> None:
    master = MasterSecret(VALUE)
    assert (master.stream(*first).bytes(16) == master.stream(*second).bytes(16)) == (first == second)


@pytest.mark.parametrize(
    ("first", "second"),
    [(("ab", "c"), ("a", "bc")), (("a", ""), ("a",)), (("", "a"), ("a", "")), (("a\0b",), ("a", "b"))],
)
def test_ambiguous_label_splits_differ(master: MasterSecret, first: tuple[str, ...], second: tuple[str, ...]) -> None:
    assert master.stream(*first).bytes(32) != master.stream(*second).bytes(32)


def test_other_secrets_give_other_streams() -> None:
    assert MasterSecret.generate().stream("x").bytes(32) != MasterSecret.generate().stream("x").bytes(32)
    one, same, two = (MasterSecret.from_insecure_test_seed(seed) for seed in (1, 1, 2))
    assert one.stream("x").bytes(32) == same.stream("x").bytes(32) != two.stream("x").bytes(32)
    assert one.is_test and not MasterSecret.generate().is_test


def test_streams_do_not_touch_the_global_generator(master: MasterSecret) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = master.stream("x").normal(10)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, master.stream("x").normal(10))


def test_normal_moments(master: MasterSecret) -> None:
    n = 1_000_001  # odd, several chunks
    x = master.stream("normal").normal(n)
    assert x.shape == (n,) and x.dtype == torch.float64 and x.isfinite().all()
    moments = [(x, 0.0, 1.0), (x**2, 1.0, 2.0), (x**3, 0.0, 15.0), (x**4, 3.0, 96.0)]  # value, mean, variance
    for value, mean, variance in moments:
        assert abs(value.mean().item() - mean) < SIGMAS * math.sqrt(variance / n)
    for lag in (1, 2, 65536):  # Box-Muller's halves must not be correlated, nor their squares
        for y in (x, (x**2 - 1) / math.sqrt(2)):
            assert abs((y[lag:] * y[:-lag]).mean().item()) < SIGMAS / math.sqrt(n - lag)
    tail = (x.abs() > 3).double().mean().item()
    p = math.erfc(3 / math.sqrt(2))
    assert abs(tail - p) < SIGMAS * math.sqrt(p / n)


def test_normal_is_finite_at_the_ends_of_the_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in (0, -1):  # u = 0 and u = 1 - 2^-53
        monkeypatch.setattr(Stream, "_words", lambda self, n, word=word: torch.full((n,), word))
        assert Stream(bytes(32)).normal(4).isfinite().all()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
def test_shapes(master: MasterSecret, shape: tuple[int, ...]) -> None:
    assert master.stream("x").uniform(*shape).shape == master.stream("x").normal(*shape).shape == shape


@given(st.integers(0, 300), st.integers(0, 10))
@settings(deadline=None)
def test_permutation_is_one(n: int, seed: int) -> None:
    order = MasterSecret.from_insecure_test_seed(seed).stream("p").permutation(n)
    assert order.dtype == torch.int64
    assert order.sort().values.equal(torch.arange(n))


def test_permutation_is_uniform(master: MasterSecret) -> None:
    stream = master.stream("p")
    counts = Counter(tuple(stream.permutation(4).tolist()) for _ in range(4800))
    assert chi_square_p(list(counts.values()), 24) > CHI_SQUARE_P


def test_uniformity_test_catches_the_naive_shuffle(master: MasterSecret) -> None:
    def naive(picks: list[int]) -> tuple[int, ...]:  # swap each position with any: 4^4 is not a multiple of 4!
        order = [0, 1, 2, 3]
        for i, j in enumerate(picks):
            order[i], order[j] = order[j], order[i]
        return tuple(order)

    picks = master.stream("p").uniform(4800, 4).mul(4).long().tolist()
    assert chi_square_p(list(Counter(map(naive, picks)).values()), 24) < CHI_SQUARE_P


def test_rejected_draws_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = iter([[3, 3], [3, 1], [2]])  # tops 2, 1 with masks 3, 1: the 3 for top 2 is refused twice
    monkeypatch.setattr(Stream, "_words", lambda self, n: torch.tensor(next(draws)[:n]))
    assert Stream(bytes(32)).permutation(3).tolist() == [0, 1, 2]
    assert next(draws, None) is None


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "master"
    path.write_text("older")
    for secret in (MasterSecret.generate(), MasterSecret.from_insecure_test_seed(5)):
        secret.save(path)
        assert path.stat().st_mode & 0o777 == 0o600
        assert len(path.read_text().splitlines()) == 1
        again = MasterSecret.load(path)
        assert again.stream("x").bytes(32) == secret.stream("x").bytes(32)
        assert again.is_test == secret.is_test
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left


def test_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        MasterSecret.generate().save(tmp_path / "master")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_load_refuses_a_file_open_to_others(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "master"
    MasterSecret.generate().save(path)
    path.chmod(mode)
    with pytest.raises(UsageError, match="owner alone"):
        MasterSecret.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda line: b"",
        lambda line: line[:-2] + b"\n",
        lambda line: line[:-1],
        lambda line: line + line,
        lambda line: line.upper(),
        lambda line: line.replace(b"-v1", b"-v2"),
        lambda line: line[:-2] + b"\xff\n",
        lambda line: line + b" " * 10_000,
    ],
)
def test_load_refuses_a_malformed_file_without_showing_it(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "master"
    MasterSecret(VALUE).save(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UsageError, match="malformed") as caught:
        MasterSecret.load(path)
    assert str(path) in str(caught.value)
    assert VALUE.hex()[:16] not in repr(caught.value).lower() + str(caught.value).lower()


def test_load_refuses_what_is_missing_or_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        MasterSecret.load(tmp_path / "nothing")
    with pytest.raises(UsageError, match="cannot be read"):
        MasterSecret.load(tmp_path)


def test_wrong_arguments_are_usage_errors(master: MasterSecret) -> None:
    for wrong in (lambda: MasterSecret(b"short"), lambda: master.stream(), lambda: master.stream("x").bytes(-1)):
        with pytest.raises(UsageError):
            wrong()


def test_secrets_hide_and_do_not_travel(master: MasterSecret, tmp_path: Path) -> None:
    for secret in (MasterSecret(VALUE), MasterSecret(VALUE).stream("label")):
        shown = f"{secret!r} {secret} {secret:}"
        assert "hidden" in shown and VALUE.hex()[:8] not in shown and "label" not in shown
        for leave in (
            lambda s=secret: pickle.dumps(s),
            lambda s=secret: pickle.dumps(s, protocol=0),
            lambda s=secret: copy.copy(s),
            lambda s=secret: copy.deepcopy(s),
            lambda s=secret: torch.save(s, tmp_path / "x"),
            secret.__getstate__,
        ):
            with pytest.raises(KeyFaultError, match="pickled or copied"):
                leave()
