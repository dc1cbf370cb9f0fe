"""Errors across the channel: our own with their text, all others without a word of theirs."""

import pytest

from obfuscatune.errors import (
    ConsentError,
    DataError,
    ObfuscatuneError,
    ProtocolError,
    SealError,
    UsageError,
    WorkerFault,
)
from obfuscatune.parties.channel.faults import CODES, MAX_CHARS, raise_from, to_fields


@pytest.mark.parametrize(
    ("error", "code", "arrives_as"),
    [
        (ConsentError("job is used up", got=3, expected=2, hint="make a new one"), "consent", ConsentError),
        (SealError("changed"), "seal", SealError),
        (DataError("bad row", where="x:1"), "usage", UsageError),
        (WorkerFault("late", worker="w", layer="l", call=1), "failed", ObfuscatuneError),
        (ObfuscatuneError("other"), "failed", ObfuscatuneError),
    ],
)
def test_our_own_errors_arrive(error: ObfuscatuneError, code: str, arrives_as: type) -> None:
    fields = to_fields(error)
    assert fields["error"] == code
    with pytest.raises(ObfuscatuneError) as caught:
        raise_from(fields, "tls://h:1")
    assert type(caught.value) is arrives_as
    assert caught.value.what == str(error).partition("\nhint: ")[0]
    assert caught.value.hint == error.hint
    assert caught.value.where == "tls://h:1"


@pytest.mark.parametrize("error", [ValueError("canary"), KeyError("canary"), MemoryError("canary"), OSError("canary")])
def test_other_errors_say_nothing(error: Exception) -> None:
    fields = to_fields(error)
    assert fields["error"] == "failed"
    assert "canary" not in str(fields)


def test_no_control_characters_and_no_more_than_a_page() -> None:
    fields = to_fields(UsageError("\x1b[2Jred\ud800" + "x" * 5000))
    assert "\x1b" not in fields["message"]
    assert len(fields["message"]) <= MAX_CHARS
    with pytest.raises(UsageError) as caught:
        raise_from({"error": "usage", "message": "\x1b[2Jred\r"}, "w")
    assert caught.value.what == r"\x1b[2Jred\r"


@pytest.mark.parametrize(
    "fields",
    [
        {"error": "unknown", "message": ""},
        {"error": "usage"},
        {"error": "usage", "message": 1},
        {"error": ["usage"], "message": ""},
        {"error": "usage", "message": "x" * (MAX_CHARS + 1)},
    ],
)
def test_an_error_of_another_form_breaks_the_protocol(fields: dict) -> None:
    with pytest.raises(ProtocolError, match="error of an unknown form"):
        raise_from(fields, "w")
    assert "usage" in CODES


def test_no_error_is_none() -> None:
    raise_from({"fields": {}}, "w")
