"""A worker whose replies have the right form and wrong values: caught in the call it happens in, in `strict`."""

from pathlib import Path
from typing import Any

import pytest
import torch

import obfuscatune
from obfuscatune.errors import UsageError, WorkerFault
from obfuscatune.protocol.connection import Connection

from .test_replies import lying
from .workers import Answer, Fields, Tensors, generate, loss_of, new_model, worker_in_a_thread


def changed(how: Any) -> Answer:
    return lambda connection, request, reply, outputs: (
        connection.send(reply, {n: how(t.clone()) for n, t in outputs.items()}) and None
    )


def in_one_place(y: torch.Tensor) -> torch.Tensor:
    y[(0,) * (y.ndim - 1)][3] += 0.02 * y[(0,) * (y.ndim - 1)].norm()
    return y


def one_row(y: torch.Tensor) -> torch.Tensor:
    y[(0,) * (y.ndim - 1)] = y[(-1,) * (y.ndim - 1)]
    return y


LIES: dict[str, Answer] = {
    "zeros": changed(torch.zeros_like),
    "other weights": changed(lambda y: y.flip(-1)),
    "noise": changed(lambda y: y + 0.01 * y.abs().mean() * torch.randn_like(y)),
    "noise in one entry": changed(in_one_place),
    "rows swapped": changed(lambda y: y.flip(-2)),
    "one row": changed(one_row),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("number", [1, 6, 8, 9, 14])  # 8 forward products, then 8 backward
def test_a_wrong_product_in_a_training_step(number: int, lie: str, tmp_path: Path) -> None:
    with (
        worker_in_a_thread(tmp_path, lying("multiply", number, LIES[lie])) as address,
        obfuscatune.protect(new_model(), profile="strict", worker=address, timeout=60) as protected,
    ):
        before = protected.session._last_id
        with pytest.raises(WorkerFault, match="a product is wrong") as caught:
            loss_of(protected.model).backward()
        assert caught.value.call == before + number
        assert f"got a {'forward' if number <= 8 else 'backward'}" in str(caught.value)
        with pytest.raises(UsageError, match="ended by an earlier fault"):
            loss_of(protected.model)


def test_an_earlier_reply_for_the_same_input(tmp_path: Path) -> None:
    """The same tokens again are another call: what was right for the first one is wrong for the second."""
    replies: dict[str, Tensors] = {}

    def replay(connection: Connection, request: Fields, reply: Fields, outputs: Tensors) -> None:
        connection.send(reply, replies.setdefault(request["segment"], outputs) if "transpose" in request else outputs)

    with (
        worker_in_a_thread(tmp_path, replay) as address,
        obfuscatune.protect(new_model(), profile="strict", worker=address, timeout=60) as protected,
        torch.no_grad(),
    ):
        loss_of(protected.model)
        with pytest.raises(WorkerFault, match="a product is wrong"):
            loss_of(protected.model)


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_in_balanced_with_all_outputs_returned(op: str, tmp_path: Path) -> None:
    switches = {"attention": "enclave", "mlp": "enclave", "verify": True}
    with (
        worker_in_a_thread(tmp_path, lying(op, 3, LIES["one row"])) as address,
        obfuscatune.protect(new_model(), profile="balanced", worker=address, timeout=60, **switches) as protected,
        pytest.raises(WorkerFault, match=f"a product is wrong: got a {op}"),
    ):
        loss_of(protected.model).backward()


def test_the_control_without_the_check_nobody_notices(tmp_path: Path) -> None:
    with (
        worker_in_a_thread(tmp_path, lying("multiply", 6, LIES["zeros"])) as address,
        obfuscatune.protect(new_model(), profile="strict", worker=address, timeout=60, verify=False) as protected,
    ):
        loss = loss_of(protected.model)
        loss.backward()
    assert abs(loss.item() - loss_of(new_model()).item()) > 2e-5  # the lie was told; the model is small


def test_an_honest_worker_is_not_accused(tmp_path: Path) -> None:
    with (
        worker_in_a_thread(tmp_path) as address,
        obfuscatune.protect(new_model(), profile="strict", worker=address, timeout=60) as protected,
    ):
        loss = loss_of(protected.model)
        loss.backward()
        generate(protected.model)
    torch.testing.assert_close(loss, loss_of(new_model()), rtol=0, atol=5e-6)
