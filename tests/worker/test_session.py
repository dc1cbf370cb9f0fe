"""The worker's operations: what each answers, what it refuses, and what it forgets."""

from typing import Any

import pytest
import torch
from torch import Tensor

from obfuscatune.errors import ProtocolError
from obfuscatune.protocol.bits import pack_mask
from obfuscatune.protocol.norms import rms_rows
from obfuscatune.worker.adapters import SlotInputs
from obfuscatune.worker.segments import Call
from obfuscatune.worker.session import WorkerSession

D, HIDDEN, HEADS, RANK = 8, 16, 2, 2
EPS = 0.5  # so large that a wrong one shows
ATTENTION = {"heads": HEADS, "kv_heads": HEADS, "scale": 0.5, "rotary": 0, "softcap": None, "widths": [3 * D]}
MLP = {"activation": "gelu", "gated": False, "widths": [HIDDEN]}


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 100 * len(shape)), dtype=torch.float64)


@pytest.fixture
def session() -> WorkerSession:
    session = WorkerSession(torch.device("cpu"))
    attention = {"first": tensor(D, 3 * D), "first_bias": tensor(3 * D), "last": tensor(D, D)}
    mlp = {"first": tensor(D, HIDDEN), "first_bias": tensor(HIDDEN), "last": tensor(HIDDEN, D)}
    define(session, "s0", "linear", {"widths": [3]}, {"weight": tensor(D, 3)})
    define(session, "s1", "attention", ATTENTION, attention)
    define(session, "s2", "mlp", MLP, mlp)
    define(session, "s3", "body", {"parts": ["s1", "s2", "s1"], "eps": [EPS] * 3}, {"bias": tensor(3, D)})
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
    causal, other = (forward(session, "s1", {"x": t})["y"] for t in (x, changed))
    assert torch.equal(causal[:, :3], other[:, :3])
    assert not torch.equal(causal[:, 3], other[:, 3])
    for number, allowed in ((1, torch.ones(4, 4)), (2, torch.ones(4, 4).tril())):
        mask = {"id": number, "shape": [1, 1, 4, 4]}
        masked = forward(session, "s1", {"x": x, "mask": pack_mask(allowed.bool()[None, None])}, mask=mask)["y"]
        assert torch.allclose(masked, causal) == (number == 2)
        # The next call of the pass names it only.
        torch.testing.assert_close(forward(session, "s1", {"x": x}, mask=mask)["y"], masked)
    session.handle({"op": "hello", "drop": {"shared": [1, 2, 99]}}, {})
    with pytest.raises(ProtocolError, match="shared tensor"):
        forward(session, "s1", {"x": x}, mask=mask)


def test_a_cache_goes_on_where_it_stopped_in_any_order_of_rows(session: WorkerSession) -> None:
    x = tensor(3, 5, D)
    whole = forward(session, "s1", {"x": x})["y"]
    cache = {"id": 1, "start": 0, "length": 0, "rows": None}
    forward(session, "s1", {"x": x[:, :4]}, cache=cache)
    rows = [2, 0, 0]
    last = forward(session, "s1", {"x": x[rows, 4:]}, cache={"id": 1, "start": 0, "length": 4, "rows": rows})["y"]
    torch.testing.assert_close(last, whole[rows, 4:])
    again = forward(session, "s1", {"x": x[rows, 2:]}, cache={"id": 1, "start": 0, "length": 2, "rows": None})["y"]
    assert again.shape == (3, 3, D)


def spelled_out(session: WorkerSession, x: Tensor) -> Tensor:
    """The body of the session, a part at a time."""
    for segment, bias in zip(("s1", "s2", "s1"), tensor(3, D), strict=True):
        rows = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
        x = x + forward(session, segment, {"x": rows})["y"] + bias
    return x


def test_a_body_is_its_parts_one_after_another(session: WorkerSession) -> None:
    x = tensor(2, 5, D)
    torch.testing.assert_close(forward(session, "s3", {"x": x})["y"], spelled_out(session, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_is_torchs_own_in_both_directions(dtype: torch.dtype) -> None:
    x, gradient = tensor(2, 5, 64).to(dtype), tensor(2, 5, 64, seed=1).to(dtype)
    found = []
    for norm in (lambda x: rms_rows(x, 0.1), lambda x: torch.nn.functional.rms_norm(x, (64,), eps=0.1)):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        found.append((y.detach(), torch.autograd.grad(y, leaf, gradient)[0]))
        with torch.no_grad():
            torch.testing.assert_close(norm(leaf), y.detach())
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}  # its y is rounded in between
    torch.testing.assert_close(found[0], found[1], **tolerance)
    assert not torch.allclose(found[0][1], gradient)


def test_the_cache_of_a_body_is_that_of_all_its_attentions(session: WorkerSession) -> None:
    x = tensor(3, 5, D)
    whole = forward(session, "s3", {"x": x})["y"]
    forward(session, "s3", {"x": x[:, :4]}, cache={"id": 1, "start": 0, "length": 0, "rows": None})
    rows = [2, 0, 0]
    last = forward(session, "s3", {"x": x[rows, 4:]}, cache={"id": 1, "start": 0, "length": 4, "rows": rows})["y"]
    torch.testing.assert_close(last, whole[rows, 4:])
    wrong = forward(session, "s3", {"x": x[rows, 4:]}, cache={"id": 1, "start": 0, "length": 4, "rows": [1, 2, 0]})["y"]
    assert not torch.allclose(wrong, last)
    assert stats(session) == (0, 1)


@pytest.mark.parametrize("recompute", [False, True])
def test_both_factors_of_slots_of_a_body(session: WorkerSession, recompute: bool) -> None:
    x, gradient = tensor(2, 3, D).requires_grad_(), tensor(2, 3, D, seed=1)
    a, b, c = (t.requires_grad_() for t in (tensor(D, RANK), tensor(RANK, HIDDEN, seed=2), tensor(RANK)))
    names = ["A.1.in0", "B.1.in0", "c.1.in0"]
    leaves = dict(zip(names, (a, b, c), strict=True))

    def with_lora(rows: Tensor) -> Tensor:
        hidden = rows @ tensor(D, HIDDEN) + tensor(HIDDEN) + (rows @ a + c) @ b
        return torch.nn.functional.gelu(hidden) @ tensor(HIDDEN, D)

    def block(x: Tensor) -> Tensor:
        bias = tensor(3, D)
        rows = lambda x: x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()  # noqa: E731
        attention = session._segments["s1"].run
        x = x + attention(rows(x), SlotInputs({}, {}), Call()) + bias[0]
        x = x + with_lora(rows(x)) + bias[1]
        return x + attention(rows(x), SlotInputs({}, {}), Call()) + bias[2]

    expected = block(x)
    wanted = torch.autograd.grad(expected, [x, a, b, c], gradient)
    fields = {"id": 7, "keep": True, "factors": names, "recompute": recompute}
    y = forward(session, "s3", {"x": x.detach(), **{n: t.detach() for n, t in leaves.items()}}, **fields)["y"]
    torch.testing.assert_close(y, expected.detach())
    request = {"op": "backward", "segment": "s3", "call": 7, "wants": ["x", *names]}
    found = session.handle(request, {"y": gradient})[1]
    torch.testing.assert_close(found, dict(zip(["x", *names], wanted, strict=True)))
    plain = forward(session, "s3", {"x": x.detach()})["y"]
    assert not torch.allclose(plain, y)


def test_recomputing_keeps_less(session: WorkerSession) -> None:
    def kept(recompute: bool) -> int:
        sizes: list[int] = []
        note = lambda t: (sizes.append(t.numel()), t)[1]  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            forward(session, "s3", {"x": tensor(2, 5, D)}, id=8, keep=True, recompute=recompute)
        session.handle({"op": "hello", "drop": {"calls": [8]}}, {})
        return sum(sizes)

    assert kept(True) < kept(False) / 4


def test_backward_gives_the_gradients_asked_for_and_forgets_the_call(session: WorkerSession) -> None:
    x, u, b, gradient = tensor(2, D), tensor(2, RANK), tensor(RANK, 3), tensor(2, 3)
    fields = {"id": 7, "keep": True, "factors": ["B.in0"]}
    y = forward(session, "s0", {"x": x, "u.in0": u, "B.in0": b}, **fields)["y"]
    torch.testing.assert_close(y, x @ tensor(D, 3) + u @ b)
    assert stats(session) == (1, 0)
    request = {"op": "backward", "segment": "s0", "call": 7, "wants": ["x", "u.in0", "B.in0"]}
    reply, found = session.handle(request, {"y": gradient})
    assert reply == {"gradient_norms": {}}
    expected = {"x": gradient @ tensor(D, 3).T, "u.in0": gradient @ b.T, "B.in0": u.T @ gradient}
    torch.testing.assert_close(found, expected)
    assert stats(session) == (0, 0)
    with pytest.raises(ProtocolError, match="backward of a call"):
        session.handle(request, {"y": gradient})


def test_a_pushed_factor_is_kept_for_later_calls(session: WorkerSession) -> None:
    x, a = tensor(2, D), tensor(D, RANK)
    first = forward(session, "s0", {"x": x, "A.in0": a}, factors=["A.in0"])
    assert torch.equal(first["v.in0"], x @ a)
    assert torch.equal(forward(session, "s0", {"x": x}, factors=["A.in0"])["v.in0"], x @ a)
    assert set(forward(session, "s0", {"x": x})) == {"y"}


def test_held_factors_are_trained_here(session: WorkerSession) -> None:
    x, a, b = tensor(2, D), tensor(D, RANK), tensor(RANK, 3)
    hold = {"op": "hold", "segment": "s0", "slot": "in0", "scale": 2.0}
    session.handle(hold, {"a": a.clone(), "b": b.clone()})
    y = forward(session, "s0", {"x": x}, id=1, keep=True, held=["in0"])["y"]
    torch.testing.assert_close(y, x @ tensor(D, 3) + 2 * x @ a @ b)
    backward = {"op": "backward", "segment": "s0", "call": 1, "wants": [], "fresh": ["in0"]}
    reply, _ = session.handle(backward, {"y": torch.ones_like(y)})
    da, db = 2 * x.T @ torch.ones_like(y) @ b.T, 2 * (x @ a).T @ torch.ones_like(y)
    norm = float((da.square().sum() + db.square().sum()).sqrt())
    assert reply["gradient_norms"]["in0"] == pytest.approx(norm)
    step = {"op": "optimizer", "action": "step", "kind": "sgd", "options": {"lr": 0.5}, "lr": 0.5}
    stepped = session.handle({**step, "scales": {"s0.in0": 0.1}}, {})[1]
    exported = session.handle({"op": "optimizer", "action": "export"}, {})[1]
    torch.testing.assert_close(exported, {"s0.in0.a": a - 0.05 * da, "s0.in0.b": b - 0.05 * db})
    assert stepped.keys() == exported.keys() and all(torch.equal(stepped[name], exported[name]) for name in stepped)
    assert session.handle({**step, "scales": {}}, {})[1] == {}


def test_drop_forgets_calls_and_caches_and_knows_no_unknown_one(session: WorkerSession) -> None:
    forward(session, "s0", {"x": tensor(2, D)}, id=5, keep=True)
    forward(session, "s1", {"x": tensor(1, 2, D)}, cache={"id": 3, "start": 0, "length": 0, "rows": None})
    assert stats(session) == (1, 1)
    session.handle({"op": "hello", "drop": {"calls": [5, 99], "caches": [3, 99]}}, {})
    assert stats(session) == (0, 0)


BODY = {"op": "define", "segment": "n", "kind": "body"}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "no operation": ({}, {}, "operation"),
    "unknown operation": ({"op": "__init__"}, {}, "operation"),
    "drop of another type": ({"op": "hello", "drop": [1]}, {}, "what to drop"),
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
        {"op": "define", "segment": "n", "kind": "mlp", "spec": {**MLP, "widths": [2], "activation": "system"}},
        {"first": tensor(2, 2), "first_bias": tensor(2), "last": tensor(2, 2)},
        "activation",
    ),
    "impossible heads": (
        {"op": "define", "segment": "n", "kind": "attention", "spec": {**ATTENTION, "heads": 5, "kv_heads": 5}},
        {"first": tensor(D, 3 * D), "last": tensor(D, D)},
        "heads of an attention segment",
    ),
    "kv heads that do not divide the heads": (
        {"op": "define", "segment": "n", "kind": "attention", "spec": {**ATTENTION, "heads": 3, "kv_heads": 2}},
        {"first": tensor(D, 3 * D), "last": tensor(D, D)},
        "heads of an attention segment",
    ),
    "no kv heads": (
        {"op": "define", "segment": "n", "kind": "attention", "spec": {**ATTENTION, "kv_heads": 0}},
        {"first": tensor(D, 3 * D), "last": tensor(D, D)},
        "kv_heads",
    ),
    "rotary part wider than a head": (
        {"op": "define", "segment": "n", "kind": "attention", "spec": {**ATTENTION, "rotary": 6}},
        {"first": tensor(D, 3 * D), "last": tensor(D, D)},
        "rotary part",
    ),
    "soft cap of nothing": (
        {"op": "define", "segment": "n", "kind": "attention", "spec": {**ATTENTION, "softcap": 0.0}},
        {"first": tensor(D, 3 * D), "last": tensor(D, D)},
        "soft cap",
    ),
    "widths that do not add up": (
        {"op": "define", "segment": "n", "kind": "attention", "spec": {**ATTENTION, "widths": [D, D]}},
        {"first": tensor(D, 3 * D), "last": tensor(D, D)},
        "widths of layers side by side",
    ),
    "weight of one dimension": (
        {"op": "define", "segment": "n", "kind": "linear", "spec": {"widths": [2]}},
        {"weight": tensor(2)},
        "weight of a segment",
    ),
    "gate without an up branch": (
        {"op": "define", "segment": "n", "kind": "mlp", "spec": {**MLP, "gated": True}},
        {"first": tensor(D, HIDDEN), "last": tensor(HIDDEN, D)},
        "weights of an MLP",
    ),
    "mask that was not sent": (
        {"op": "forward", "segment": "s1", "mask": {"id": 7, "shape": [1, 1, 2, 2]}},
        {"x": tensor(1, 2, D)},
        "shared tensor",
    ),
    "body of nothing": ({**BODY, "spec": {"parts": [], "eps": []}}, {"bias": tensor(0, D)}, "parts of a body"),
    "body of an unknown part": (
        {**BODY, "spec": {"parts": ["s9"], "eps": [EPS]}},
        {"bias": tensor(1, D)},
        "parts of a body",
    ),
    "body of a linear": ({**BODY, "spec": {"parts": ["s0"], "eps": [EPS]}}, {"bias": tensor(1, D)}, "parts of a body"),
    "body of a body": ({**BODY, "spec": {"parts": ["s3"], "eps": [EPS]}}, {"bias": tensor(1, D)}, "parts of a body"),
    "body of parts without names": (
        {**BODY, "spec": {"parts": [["s1"]], "eps": [EPS]}},
        {"bias": tensor(1, D)},
        "parts of a body",
    ),
    "too few eps": ({**BODY, "spec": {"parts": ["s1", "s2"], "eps": [EPS]}}, {"bias": tensor(2, D)}, "eps of a body"),
    "negative eps": ({**BODY, "spec": {"parts": ["s1"], "eps": [-1.0]}}, {"bias": tensor(1, D)}, "eps of a body"),
    "eps that is no number": ({**BODY, "spec": {"parts": ["s1"], "eps": ["1"]}}, {"bias": tensor(1, D)}, "eps of a"),
    "too few rows of bias": (
        {**BODY, "spec": {"parts": ["s1", "s2"], "eps": [EPS] * 2}},
        {"bias": tensor(1, D)},
        "widths of a body",
    ),
    "bias of another width": (
        {**BODY, "spec": {"parts": ["s1"], "eps": [EPS]}},
        {"bias": tensor(1, D + 1)},
        "widths of a body",
    ),
    "hold in a body": ({"op": "hold", "segment": "s3", "slot": "1.in0"}, {"a": tensor(D, 1)}, "factors to hold"),
    "forward of an unknown segment": ({"op": "forward", "segment": "s9"}, {"x": tensor(2, D)}, "segment"),
    "forward without x": ({"op": "forward", "segment": "s0"}, {}, "input x"),
    "forward of a vector": ({"op": "forward", "segment": "s0"}, {"x": tensor(D)}, "input x"),
    "mask that does not fit": (
        {"op": "forward", "segment": "s1", "mask": {"id": 1, "shape": [9, 9, 9, 9]}},
        {"x": tensor(1, 2, D), "mask": torch.zeros(1, dtype=torch.uint8)},
        "packed mask",
    ),
    "cache that is not there": (
        {"op": "forward", "segment": "s1", "cache": {"id": 9, "start": 0, "length": 1, "rows": None}},
        {"x": tensor(1, 1, D)},
        "KV cache",
    ),
    "backward of an unknown call": ({"op": "backward", "segment": "s0", "call": 9}, {"y": tensor(2, 3)}, "backward"),
    "hold in an unknown slot": (
        {"op": "hold", "segment": "s0", "slot": "qkv"},
        {"a": tensor(D, 1), "b": tensor(1, 3)},
        "factors to hold",
    ),
    "hold without b": ({"op": "hold", "segment": "s0", "slot": "in0"}, {"a": tensor(D, 1)}, "factors to hold"),
    "unknown action": ({"op": "optimizer", "action": "explode"}, {}, "optimizer action"),
    "unknown optimizer": ({"op": "optimizer", "action": "step", "kind": "lbfgs"}, {}, "optimizer"),
    "option that asserts": (
        {"op": "optimizer", "action": "step", "kind": "adamw", "options": {"capturable": True}, "lr": 0.1},
        {},
        r"options of the optimizer: got \['capturable'\], expected \['amsgrad'",
    ),
    "state of nothing": (
        {"op": "optimizer", "action": "import", "kind": "sgd", "options": {}},
        {"s0.in0.a": tensor(1)},
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
    forward(session, "s1", {"x": tensor(1, 2, D)}, cache={"id": 1, "start": 0, "length": 0, "rows": None})
    for segment, length in (("s1", 3), ("s2", 1)):
        with pytest.raises(ProtocolError, match="KV cache"):
            forward(
                session, segment, {"x": tensor(1, 1, D)}, cache={"id": 1, "start": 0, "length": length, "rows": None}
            )


def test_parts_of_unequal_width_are_no_body(session: WorkerSession) -> None:
    define(session, "s4", "mlp", MLP, {"first": tensor(D, HIDDEN), "last": tensor(HIDDEN, D - 1)})
    with pytest.raises(ProtocolError, match="widths of a body"):
        define(session, "n", "body", {"parts": ["s1", "s4"], "eps": [EPS] * 2}, {"bias": tensor(2, D)})


def test_an_odd_number_of_parts_is_no_parallel_body(session: WorkerSession) -> None:
    spec = {"parts": ["s1", "s2", "s1"], "eps": [EPS] * 3, "parallel": True}
    with pytest.raises(ProtocolError, match="widths of a body"):
        define(session, "n", "body", spec, {"bias": tensor(3, D)})


def test_what_is_held_is_bounded_in_bytes(session: WorkerSession) -> None:
    cache = {"start": 0, "length": 0, "rows": None}
    forward(session, "s0", {"x": tensor(2, D)}, id=1, keep=True)
    forward(session, "s1", {"x": tensor(1, 1, D)}, cache={"id": 1, **cache})
    session.ledger.budget = session.ledger.held
    refused = "out of the session's memory budget"
    with pytest.raises(ProtocolError, match=refused):
        forward(session, "s0", {"x": tensor(2, D)}, id=3, keep=True)
    with pytest.raises(ProtocolError, match=refused):
        forward(session, "s1", {"x": tensor(1, 1, D)}, cache={"id": 3, **cache})
    with pytest.raises(ProtocolError, match=refused):
        define(session, "n", "linear", {}, {"weight": tensor(D, D)})
    forward(session, "s0", {"x": tensor(2, D)})
    # What was refused is not there, and what is dropped makes room.
    session.handle({"id": 9, "op": "stats", "drop": {"calls": [1], "caches": [1]}}, {})
    forward(session, "s0", {"x": tensor(2, D)}, id=10, keep=True)
    forward(session, "s1", {"x": tensor(1, 1, D)}, cache={"id": 10, **cache})
