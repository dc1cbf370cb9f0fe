"""A small model, and a worker in a thread whose replies a test can change."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from obfuscatune.errors import ConnectionClosedError, ProtocolError
from obfuscatune.protocol.address import Address, listen
from obfuscatune.protocol.connection import Connection
from obfuscatune.worker.session import WorkerSession

Fields = dict[str, Any]
Tensors = dict[str, Tensor]
# Gets a request's fields and the right reply, and does what it likes with the connection.
Answer = Callable[[Connection, Fields, Fields, Tensors], None]

IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])


def new_model() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=23, n_positions=16, n_embd=8, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    lora = LoraConfig(r=2, target_modules=["c_attn", "c_proj", "c_fc"], init_lora_weights=False, fan_in_fan_out=True)
    return get_peft_model(GPT2LMHeadModel(config), lora).eval()


def loss_of(model: Any) -> Tensor:
    loss: Tensor = model(input_ids=IDS, labels=IDS).loss
    return loss


def generate(model: Any) -> Tensor:
    mask = torch.ones_like(IDS)
    ids: Tensor = model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    return ids


def honest(connection: Connection, request: Fields, reply: Fields, outputs: Tensors) -> None:
    connection.send(reply, outputs)


@contextlib.contextmanager
def worker_in_a_thread(directory: Path, answer: Answer = honest, sessions: int = 1) -> Iterator[str]:
    """Serve some enclaves, one after another, and yield the address; every reply is sent by ``answer``."""
    address = Address(path=str(directory / "worker"))
    listener = listen(address)

    def serve() -> None:
        for _ in range(sessions):
            connection = Connection(listener.accept()[0], peer="enclave")
            session = WorkerSession(torch.device("cpu"), passing=connection)
            with contextlib.closing(connection), contextlib.suppress(ConnectionClosedError):
                while True:
                    request, tensors = connection.receive()
                    try:
                        reply, outputs = session.handle(request, tensors)
                    except ProtocolError as error:
                        connection.send({"id": request["id"], "ok": False, "error": "refused", "message": str(error)})
                        continue
                    answer(connection, request, {"id": request["id"], "ok": True, **reply}, outputs)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield str(address)
        thread.join(timeout=60)
        assert not thread.is_alive()
    finally:
        listener.close()
