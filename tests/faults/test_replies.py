"""A worker that lies in the middle of real work: one clear fault that names layer and call, and the session's end."""

import threading
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

import obfuscatune
from obfuscatune.errors import NotFiniteError, UsageError, WorkerFault
from obfuscatune.protocol.connection import Connection

from .workers import IDS, Answer, Fields, Tensors, generate, loss_of, new_model, worker_in_a_thread


def lying(op: str, number: int, lie: Answer) -> Answer:
    """Answer honestly but for the ``number``-th request of an operation."""
    seen: list[int] = []

    def answer(connection: Connection, request: Fields, reply: Fields, outputs: Tensors) -> None:
        if request["op"] == op:
            seen.append(request["id"])
        if request["op"] == op and len(seen) == number:
            lie(connection, request, reply, outputs)
        else:
            connection.send(reply, outputs)

    return answer


def change(**changed: Any) -> Answer:
    return lambda connection, request, reply, outputs: connection.send({**reply, **changed}, outputs) and None


def change_tensors(how: Any) -> Answer:
    return lambda connection, request, reply, outputs: (
        connection.send(reply, {n: how(t) for n, t in outputs.items()}) and None
    )


def not_finite_while(overflows: threading.Event) -> Answer:
    def answer(connection: Connection, request: Fields, reply: Fields, outputs: Tensors) -> None:
        how = torch.nan if overflows.is_set() and request["op"] == "forward" else 1.0
        connection.send(reply, {name: tensor * how for name, tensor in outputs.items()})

    return answer


LIES: dict[str, tuple[Answer, str]] = {
    "wrong shape": (change_tensors(lambda t: t[..., :-1].contiguous()), "shape or dtype of"),
    "wrong dtype": (change_tensors(lambda t: t.half()), "shape or dtype of"),
    "too many bytes": (change_tensors(lambda t: t.double()), "payload too long"),
    "no tensors": (lambda connection, request, reply, outputs: connection.send(reply) and None, "tensors of the reply"),
    "another call": (change(id=1), "reply to another call"),
    "refusal": (change(ok=False, message="out of memory"), "out of memory"),
    "garbage": (
        lambda connection, request, reply, outputs: connection._stream._sock.sendall(bytes(99)),
        "breaks the protocol",
    ),
    "end": (lambda connection, request, reply, outputs: connection.close(), "the worker is gone"),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize(
    ("op", "number", "layer"),
    [
        ("forward", 3, "transformer.h.1.attn"),
        ("forward", 4, "transformer.h.1.mlp"),
        ("backward", 2, "transformer.h.1.attn"),
    ],
)
def test_a_lie_in_a_training_step(op: str, number: int, layer: str, lie: str, tmp_path: Path) -> None:
    answer, match = LIES[lie]
    with (
        worker_in_a_thread(tmp_path, lying(op, number, answer)) as address,
        obfuscatune.protect(new_model(), worker=address, timeout=60) as protected,
    ):
        with pytest.raises(WorkerFault, match=match) as caught:
            loss_of(protected.model).backward()
        fault = caught.value
        assert fault.worker == address
        assert fault.layer == layer
        assert fault.call == protected.session._last_id
        text = "".join(traceback.format_exception(fault))
        assert "tensor(" not in text
        with pytest.raises(UsageError, match="ended by an earlier fault"):
            loss_of(protected.model)
        assert "balanced" in str(protected.report())


@pytest.mark.parametrize("how", [lambda t: t * torch.nan, lambda t: t / 0], ids=["NaN", "Inf"])
@pytest.mark.parametrize("op", ["forward", "backward"])
def test_a_reply_that_is_not_finite_is_not_used_and_no_fault(op: str, how: Any, tmp_path: Path) -> None:
    """An honest worker's may be so. The call is forgotten on the worker, and the next one is answered."""
    with (
        worker_in_a_thread(tmp_path, lying(op, 3, change_tensors(how))) as address,
        obfuscatune.protect(new_model(), worker=address, timeout=60) as protected,
    ):
        with pytest.raises(NotFiniteError, match=r"of what comes back .*h\.[01]\.(attn|mlp)"):
            loss_of(protected.model).backward()
        loss_of(protected.model).backward()
        assert protected.session.request("stats", "-", {}, {}, {})[0]["kept_calls"] == 0


def test_what_the_worker_added_in_a_pass_that_was_not_used_is_not_stepped_with(tmp_path: Path) -> None:
    """As where a script skips a microbatch that overflowed: the anchor's gradient is that of the one before."""
    with (
        worker_in_a_thread(tmp_path, lying("backward", 9, change_tensors(lambda t: t * torch.nan))) as address,
        obfuscatune.protect(new_model(), profile="paper", worker=address, timeout=60) as protected,
    ):
        optimizer = protected.create_optimizer("sgd", lr=0.1)
        loss_of(protected.model).backward()  # eight calls
        with pytest.raises(NotFiniteError):
            loss_of(protected.model).backward()
        with pytest.raises(UsageError, match="is not, up to one factor, the one that the worker has"):
            optimizer.step()
        with pytest.raises(UsageError, match="is not, up to one factor, the one that the worker has"):
            loss_of(protected.model).backward()
        optimizer.zero_grad()
        loss_of(protected.model).backward()
        optimizer.step()


@pytest.mark.parametrize("profile", ["plain", "balanced", "stream"])
def test_after_a_reply_that_was_not_used_each_adapter_has_its_own_factors(profile: str, tmp_path: Path) -> None:
    """The worker has taken the factors of the call that failed, in the place of those that the enclave knew of."""
    overflows = threading.Event()
    model = new_model()
    model.add_adapter("other", model.peft_config["default"])
    model.eval()
    with (
        worker_in_a_thread(tmp_path, not_finite_while(overflows)) as address,
        obfuscatune.protect(model, profile=profile, worker=address, timeout=60),
        torch.no_grad(),
    ):
        before = loss_of(model)
        model.set_adapter("other")
        overflows.set()
        with pytest.raises(NotFiniteError):
            loss_of(model)
        overflows.clear()
        model.set_adapter("default")
        assert torch.equal(loss_of(model), before)


@pytest.mark.parametrize("profile", ["balanced", "stream"])
def test_a_reply_that_was_not_used_leaves_no_mask(profile: str, tmp_path: Path) -> None:
    overflows = threading.Event()
    with (
        worker_in_a_thread(tmp_path, not_finite_while(overflows)) as address,
        obfuscatune.protect(new_model(), profile=profile, worker=address, timeout=60) as protected,
        torch.no_grad(),
    ):
        mask = torch.ones_like(IDS)
        mask[0, :2] = 0

        def held() -> int:
            return int(protected.session.request("stats", "-", {}, {}, {})[0]["held_bytes"])

        protected.model(input_ids=IDS, attention_mask=mask)
        before = held()
        overflows.set()
        for _ in range(3):
            with pytest.raises(NotFiniteError):
                protected.model(input_ids=IDS, attention_mask=mask)
        assert held() == before


def test_a_duplicate_reply_in_a_generation(tmp_path: Path) -> None:
    def twice(connection: Connection, request: Fields, reply: Fields, outputs: Tensors) -> None:
        connection.send(reply, outputs)
        connection.send(reply, outputs)

    with (
        worker_in_a_thread(tmp_path, lying("forward", 5, twice)) as address,
        obfuscatune.protect(new_model(), worker=address, timeout=60) as protected,
    ):
        with pytest.raises(WorkerFault, match="reply to another call") as caught:
            generate(protected.model)
        assert caught.value.layer == "transformer.h.0.mlp"


def test_a_late_reply_in_a_generation(tmp_path: Path) -> None:
    with (
        worker_in_a_thread(tmp_path, lying("forward", 6, lambda *_: None)) as address,
        obfuscatune.protect(new_model(), worker=address, timeout=1.0) as protected,
    ):
        with pytest.raises(WorkerFault, match="no reply within 1 s") as caught:
            generate(protected.model)
        assert caught.value.layer == "transformer.h.0.mlp"
        with pytest.raises(UsageError, match="ended by an earlier fault"):
            generate(protected.model)


NORMS: dict[str, Any] = {
    "none": None,
    "list": [1.0],
    "other slots": {"x": 1.0},
    "text": {"main": "1"},
    "negative": {"main": -1.0},
}


@pytest.mark.parametrize("norms", NORMS)
def test_wrong_gradient_norms(norms: str, tmp_path: Path) -> None:
    with (
        worker_in_a_thread(tmp_path, lying("backward", 1, change(gradient_norms=NORMS[norms]))) as address,
        obfuscatune.protect(new_model(), profile="paper", worker=address, timeout=60) as protected,
    ):
        with pytest.raises(WorkerFault, match="gradient norm") as caught:
            loss_of(protected.model).backward()
        assert caught.value.layer == "transformer.h.1.mlp.c_proj"
        with pytest.raises(UsageError, match="ended by an earlier fault"):
            loss_of(protected.model)


EXPORTS: dict[str, Any] = {
    "nothing": lambda outputs: {},
    "one missing": lambda outputs: dict(list(outputs.items())[1:]),
    "one number": lambda outputs: {name: t.flatten()[:1] for name, t in outputs.items()},
    "transposed": lambda outputs: {name: t.T.contiguous() for name, t in outputs.items()},
    "another dtype": lambda outputs: {name: t.double() for name, t in outputs.items()},
    "NaN": lambda outputs: {name: t * torch.nan for name, t in outputs.items()},
    "a moment of another shape": lambda outputs: outputs | {f"{next(iter(outputs))}/exp_avg": torch.ones(2, 2)},
    "a moment that no optimizer has": lambda outputs: outputs | {f"{next(iter(outputs))}/x": torch.ones(())},
    "another's factor": lambda outputs: outputs | {"x.first.in0.a": next(iter(outputs.values()))},
    "more than it can be": lambda outputs: outputs | {f"{next(iter(outputs))}/x": torch.ones(1 << 20)},
}


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("when", ["stepped", "saved"])
def test_wrong_factors_when_the_adapter_is(when: str, export: str, tmp_path: Path) -> None:
    def lie(connection: Connection, request: Fields, reply: Fields, outputs: Tensors) -> None:
        connection.send(reply, EXPORTS[export](outputs))

    with (
        worker_in_a_thread(tmp_path, lying("optimizer", 1 if when == "stepped" else 2, lie)) as address,
        obfuscatune.protect(new_model(), profile="paper", worker=address, timeout=60) as protected,
    ):
        loss_of(protected.model).backward()
        optimizer = protected.create_optimizer("sgd", lr=0.1)
        use = optimizer.step
        if when == "saved":
            use()
            use = optimizer.state_dict
        if export == "NaN":  # an honest worker's factors are so after a run that diverged
            with pytest.raises(NotFiniteError):
                use()
            return
        wrong = "payload too long" if export == "more than it can be" else "tensors of the reply|shape or dtype"
        if when == "stepped":
            wrong += "|payload too long"  # there is no room for a moment
        with pytest.raises(WorkerFault, match=wrong):
            use()
        with pytest.raises(UsageError, match="ended by an earlier fault"):
            loss_of(protected.model)


@pytest.mark.parametrize("number", ["many", -5, None, [1], True])
def test_a_lie_about_memory_harms_nobody(number: Any, tmp_path: Path) -> None:
    with (
        worker_in_a_thread(tmp_path, lying("stats", 1, change(peak_memory_bytes=number))) as address,
        obfuscatune.protect(new_model(), worker=address, timeout=60) as protected,
    ):
        assert protected.report().worker_peak_bytes in (None, 1)
    assert "balanced" in str(protected.report())
