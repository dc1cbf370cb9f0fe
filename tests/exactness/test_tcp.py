"""A worker at a TCP address: a LoRA step and a generation, as over a unix socket."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import obfuscatune
from obfuscatune.errors import KeyFaultError

from .models import error, gradients, scalar, tokens, twins, worst


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    command = [sys.executable, "-m", "obfuscatune.worker", "--listen", "tcp://127.0.0.1:0", "--threads", "1"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:  # noqa: S603
        try:
            yield process.stdout.readline().split()[3]
        finally:
            process.terminate()


@pytest.mark.parametrize("profile", ["paper", "balanced", "stream"])
def test_step_and_generation(address: str, profile: str) -> None:
    reference, model = twins()
    ids = tokens(2, 5)
    with obfuscatune.protect(model, profile=profile, worker=address, timeout=60.0) as protected:
        assert protected.session.worker == address
        logits = [each(input_ids=ids).logits for each in (reference, protected.model)]
        assert error(logits[1], logits[0]) < 1e-9
        for each in logits:
            scalar(each).backward()
        if profile != "paper":
            assert worst(gradients(protected.model), gradients(reference)) < 1e-9
        prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
        assert torch.equal(protected.model.generate(**prompt), reference.generate(**prompt))


def test_predictable_keys_are_refused(address: str) -> None:
    with pytest.raises(KeyFaultError, match="test seed is refused"):
        obfuscatune.protect(twins()[1], worker=address, insecure_test_seed=1)
