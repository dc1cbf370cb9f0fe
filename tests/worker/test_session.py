"""The worker's operations: what each answers, what it refuses, and what it forgets."""

from typing import Any

import pytest
import torch
from torch import Tensor

from obfuscatune.errors import ProtocolError
from obfuscatune.protocol.bits import pack_mask
from obfuscatune.worker.session import WorkerSession

D, HIDDEN, HEADS, RANK = 8, 16, 2, 2


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 100 * len(shape)), dtype=torch.float64)


@pytest.fixture
def session() -> WorkerSession:
    session = WorkerSession(torch.device("cpu"))
    attention = {"qkv": tensor(D, 3 * D), "qkv_bias": tensor(3 * D), "out": tensor(D, D)}
    mlp = {"up": tensor(D, HIDDEN), "up_bias": tensor(HIDDEN), "down": tensor(HIDDEN, D)}
    define(session, "s0", "linear", {}, {"weight": tensor(D, 3)})
    define(session, "s1", "attention", {"heads": HEADS, "scale": 0.5}, attention)
    define(session, "s2", "mlp", {"activation": "gelu"}, mlp)
    return session


def define(session: WorkerSession, name: str, kind: str, spec: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    session.handle({"op": "define", "segment": name, "kind": kind, "spec": spec}, tensors)


def forward(session: WorkerSession, segment: str, tensors: dict[str, Tensor], **fields: Any) -> dict[str, Tensor]:
    return session.handle({"op": "forward", "segment": segment, **fields}, tensors)[1]


def stats(session: WorkerSession) -> tuple[int, int]:
    reply, tensors = session.handle({"op": "stats"}, {})
    assert tensors == {}
    assert reply["peak_memory_bytes"] > 1_000_000
    return reply["kept_calls"], reply["caches"]


def test_linear(session: WorkerSession) -> None:
    x = tensor(2, 5, D)
    assert torch.allclose(forward(session, "s0", {"x": x})["y"], x @ tensor(D, 3), rtol=0, atol=1e-5)


def test_mlp(session: WorkerSession) -> None:
    x = tensor(2, 5, D)
    expected = torch.nn.functional.gelu(x @ tensor(D, HIDDEN) + tensor(HIDDEN)) @ tensor(HIDDEN, D)
    torch.testing.assert_close(forward(session, "s2", {"x": x})["y"], expected)


def test_attention_is_causal_and_a_mask_replaces_that(session: WorkerSession) -> None:
    x = tensor(1, 4, D)
    changed = torch.cat([x[:, :3], x[:, 3:] + 1], dim=1)
    causal, other = (forward(session, "s1", {"x": t}, causal=True)["y"] for t in (x, changed))
    assert torch.equal(causal[:, :3], other[:, :3])
    assert not torch.equal(causal[:, 3], other[:, 3])
    open_ = forward(session, "s1", {"x": x}, causal=False)["y"]
    assert not torch.allclose(causal, open_)
    lower = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    masked = forward(session, "s1", {"x": x, "mask": pack_mask(lower)}, mask_shape=[1, 1, 4, 4])["y"]
    torch.testing.assert_close(masked, causal)


def test_a_cache_goes_on_where_it_stopped_in_any_order_of_rows(session: WorkerSession) -> None:
    x = tensor(3, 5, D)
    whole = forward(session, "s1", {"x": x})["y"]
    cache = {"id": 1, "length": 0, "rows": None}
    forward(session, "s1", {"x": x[:, :4]}, cache=cache)
    rows = [2, 0, 0]
    last = forward(session, "s1", {"x": x[rows, 4:]}, cache={"id": 1, "length": 4, "rows": rows})["y"]
    torch.testing.assert_close(last, whole[rows, 4:])
    again = forward(session, "s1", {"x": x[rows, 2:]}, cache={"id": 1, "length": 2, "rows": None}, causal=False)["y"]
    assert again.shape == (3, 3, D)


def test_backward_gives_the_gradients_asked_for_and_forgets_the_call(session: WorkerSession) -> None:
    x, u, b, gradient = tensor(2, D), tensor(2, RANK), tensor(RANK, 3), tensor(2, 3)
    fields = {"id": 7, "keep": True, "factors": ["B.main"]}
    y = forward(session, "s0", {"x": x, "u.main": u, "B.main": b}, **fields)["y"]
    torch.testing.assert_close(y, x @ tensor(D, 3) + u @ b)
    assert stats(session) == (1, 0)
    request = {"op": "backward", "segment": "s0", "call": 7, "wants": ["x", "u.main", "B.main"]}
    reply, found = session.handle(request, {"y": gradient})
    assert reply == {"gradient_norms": {}}
    expected = {"x": gradient @ tensor(D, 3).T, "u.main": gradient @ b.T, "B.main": u.T @ gradient}
    torch.testing.assert_close(found, expected)
    assert stats(session) == (0, 0)
    with pytest.raises(ProtocolError, match="backward of a call"):
        session.handle(request, {"y": gradient})


def test_a_pushed_factor_is_kept_for_later_calls(session: WorkerSession) -> None:
    x, a = tensor(2, D), tensor(D, RANK)
    first = forward(session, "s0", {"x": x, "A.main": a}, factors=["A.main"])
    assert torch.equal(first["v.main"], x @ a)
    assert torch.equal(forward(session, "s0", {"x": x}, factors=["A.main"])["v.main"], x @ a)
    assert set(forward(session, "s0", {"x": x})) == {"y"}


def test_held_factors_are_trained_here(session: WorkerSession) -> None:
    x, a, b = tensor(2, D), tensor(D, RANK), tensor(RANK, 3)
    hold = {"op": "hold", "segment": "s0", "slot": "main", "scale": 2.0}
    session.handle(hold, {"a": a.clone(), "b": b.clone()})
    y = forward(session, "s0", {"x": x}, id=1, keep=True, held=["main"])["y"]
    torch.testing.assert_close(y, x @ tensor(D, 3) + 2 * x @ a @ b)
    backward = {"op": "backward", "segment": "s0", "call": 1, "wants": [], "fresh": ["main"]}
    reply, _ = session.handle(backward, {"y": torch.ones_like(y)})
    da, db = 2 * x.T @ torch.ones_like(y) @ b.T, 2 * (x @ a).T @ torch.ones_like(y)
    norm = float((da.square().sum() + db.square().sum()).sqrt())
    assert reply["gradient_norms"]["main"] == pytest.approx(norm)
    step = {"op": "optimizer", "action": "step", "kind": "sgd", "options": {"lr": 0.5}, "lr": 0.5}
    session.handle({**step, "scales": {"s0.main": 0.1}}, {})
    exported = session.handle({"op": "optimizer", "action": "export"}, {})[1]
    torch.testing.assert_close(exported, {"s0.main.a": a - 0.05 * da, "s0.main.b": b - 0.05 * db})


def test_drop_forgets_calls_and_caches_and_knows_no_unknown_one(session: WorkerSession) -> None:
    forward(session, "s0", {"x": tensor(2, D)}, id=5, keep=True)
    forward(session, "s1", {"x": tensor(1, 2, D)}, cache={"id": 3, "length": 0, "rows": None})
    assert stats(session) == (1, 1)
    session.handle({"op": "hello", "drop": {"calls": [5, 99], "caches": [3, 99]}}, {})
    assert stats(session) == (0, 0)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "no operation": ({}, {}, "operation"),
    "unknown operation": ({"op": "__init__"}, {}, "operation"),
    "drop of another type": ({"op": "hello", "drop": [1]}, {}, "calls and caches to drop"),
    "segment that is there": ({"op": "define", "segment": "s0", "kind": "linear", "spec": {}}, {}, "segment name"),
    "segment without a name": ({"op": "define", "segment": 1, "kind": "linear", "spec": {}}, {}, "segment name"),
    "unknown kind": ({"op": "define", "segment": "n", "kind": "conv", "spec": {}}, {}, "kind of segment"),
    "no spec": ({"op": "define", "segment": "n", "kind": "linear"}, {}, "kind of segment"),
    "missing weight": ({"op": "define", "segment": "n", "kind": "linear", "spec": {}}, {}, "weights of a segment"),
    "extra weight": (
        {"op": "define", "segment": "n", "kind": "linear", "spec": {}},
        {"weight": tensor(2, 2), "more": tensor(2, 2)},
        "weights of a segment",
    ),
    "unknown activation": (
        {"op": "define", "segment": "n", "kind": "mlp", "spec": {"activation": "system"}},
        {"up": tensor(2, 2), "up_bias": tensor(2), "down": tensor(2, 2)},
        "activation",
    ),
    "impossible heads": (
        {"op": "define", "segment": "n", "kind": "attention", "spec": {"heads": 5, "scale": 1.0}},
        {"qkv": tensor(D, 3 * D), "qkv_bias": tensor(3 * D), "out": tensor(D, D)},
        "heads of an attention segment",
    ),
    "forward of an unknown segment": ({"op": "forward", "segment": "s9"}, {"x": tensor(2, D)}, "segment"),
    "forward without x": ({"op": "forward", "segment": "s0"}, {}, "input x"),
    "forward of a vector": ({"op": "forward", "segment": "s0"}, {"x": tensor(D)}, "input x"),
    "mask that does not fit": (
        {"op": "forward", "segment": "s1", "mask_shape": [9, 9, 9, 9]},
        {"x": tensor(1, 2, D), "mask": torch.zeros(1, dtype=torch.uint8)},
        "packed mask",
    ),
    "cache that is not there": (
        {"op": "forward", "segment": "s1", "cache": {"id": 9, "length": 1, "rows": None}},
        {"x": tensor(1, 1, D)},
        "KV cache",
    ),
    "backward of an unknown call": ({"op": "backward", "segment": "s0", "call": 9}, {"y": tensor(2, 3)}, "backward"),
    "hold in an unknown slot": (
        {"op": "hold", "segment": "s0", "slot": "qkv"},
        {"a": tensor(D, 1), "b": tensor(1, 3)},
        "factors to hold",
    ),
    "hold without b": ({"op": "hold", "segment": "s0", "slot": "main"}, {"a": tensor(D, 1)}, "factors to hold"),
    "unknown action": ({"op": "optimizer", "action": "explode"}, {}, "optimizer action"),
    "unknown optimizer": ({"op": "optimizer", "action": "step", "kind": "lbfgs"}, {}, "optimizer"),
    "option that asserts": (
        {"op": "optimizer", "action": "step", "kind": "adamw", "options": {"capturable": True}, "lr": 0.1},
        {},
        r"options of the optimizer: got \['capturable'\], expected \['amsgrad'",
    ),
    "state of nothing": (
        {"op": "optimizer", "action": "import", "kind": "sgd", "options": {}},
        {"s0.main.a": tensor(1)},
        "optimizer|state of a factor|options",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_and_the_next_request_is_served(session: WorkerSession, case: str) -> None:
    header, tensors, match = REFUSED[case]
    with pytest.raises(ProtocolError, match=match):
        session.handle({"id": 3, **header}, tensors)
    assert forward(session, "s0", {"x": tensor(2, D)})["y"].shape == (2, 3)
    assert stats(session) == (0, 0)


@pytest.mark.parametrize(
    ("wants", "given"), [(["x", "z"], ["y"]), (["x"], ["y", "z"]), (["x"], []), (["x"], ["x"])], ids=str
)
def test_gradients_of_other_names_are_refused(session: WorkerSession, wants: list[str], given: list[str]) -> None:
    forward(session, "s0", {"x": tensor(2, D)}, id=5, keep=True)
    request = {"op": "backward", "segment": "s0", "call": 5, "wants": wants}
    with pytest.raises(ProtocolError, match="gradients of a call"):
        session.handle(request, {name: tensor(2, 3) for name in given})


def test_a_cache_may_not_be_longer_than_it_is(session: WorkerSession) -> None:
    forward(session, "s1", {"x": tensor(1, 2, D)}, cache={"id": 1, "length": 0, "rows": None})
    for segment, length in (("s1", 3), ("s2", 1)):
        with pytest.raises(ProtocolError, match="KV cache"):
            forward(session, segment, {"x": tensor(1, 1, D)}, cache={"id": 1, "length": length, "rows": None})


def test_kept_calls_and_caches_are_bounded(session: WorkerSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obfuscatune.worker.session.MAX_KEPT_CALLS", 2)
    monkeypatch.setattr("obfuscatune.worker.session.MAX_CACHES", 2)
    for call in (1, 2):
        forward(session, "s0", {"x": tensor(2, D)}, id=call, keep=True)
        forward(session, "s1", {"x": tensor(1, 1, D)}, cache={"id": call, "length": 0, "rows": None})
    with pytest.raises(ProtocolError, match="kept calls: got 2, expected fewer than 2"):
        forward(session, "s0", {"x": tensor(2, D)}, id=3, keep=True)
    with pytest.raises(ProtocolError, match="KV caches: got 2, expected fewer than 2"):
        forward(session, "s1", {"x": tensor(1, 1, D)}, cache={"id": 3, "length": 0, "rows": None})
    forward(session, "s0", {"x": tensor(2, D)})
