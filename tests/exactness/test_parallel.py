"""A worker of several processes under torchrun: the results are those of the plain model; each has a part of it."""

import contextlib
import copy
import os
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from obfuscatune.errors import WorkerFault

from .families import model_of, wide
from .models import error, expected_gradients, gradients, scalar, tokens, twins, worst

pytestmark = pytest.mark.slow
BOUND = 1e-9
PROFILES = ["plain", "naive", "paper", "balanced", "strict", "stream"]


@contextlib.contextmanager
def torchrun(directory: Path, processes: int, *more: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A worker of so many processes, by its address, and torchrun's own process."""
    address = f"unix://{directory}/w"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "obfuscatune.worker", "--listen", address, "--threads", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with (
        open(directory / "log", "w") as log,
        subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process,  # noqa: S603
    ):
        try:
            assert "listening" in process.stdout.readline()  # type: ignore[union-attr]
            yield address, process
        finally:
            process.terminate()


@pytest.fixture(scope="module", params=[2, 3])
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, str]]:
    with torchrun(tmp_path_factory.mktemp("group"), request.param) as (address, _):
        yield request.param, address


@pytest.mark.parametrize("profile", PROFILES)
def test_logits_gradients_and_tokens(profile: str, group: tuple[int, str], protect: Callable[..., Any]) -> None:
    reference, model = twins(n_layer=2)
    ids, mask = tokens(2, 7), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    real, bound = mask == 1, 1e-7 if profile == "naive" else BOUND  # naive's condition numbers are in the hundreds
    expected = reference(ids, attention_mask=mask).logits[real]
    scalar(expected).backward()
    with protect(model, profile=profile, worker=group[1]) as protected:
        got = protected.model(ids, attention_mask=mask).logits[real]
        assert error(got, expected) < bound
        scalar(got).backward()
        assert worst(gradients(protected.model), expected_gradients(reference, profile, {})) < bound
        options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "num_beams": 2}
        assert torch.equal(protected.model.generate(ids, **options), reference.generate(ids, **options))


@pytest.mark.parametrize("profile", ["balanced", "stream", "paper"])
@pytest.mark.parametrize("name", ["llama, biases, tied", "phi3", "gpt_neox", "gemma2"])
def test_grouped_heads_gates_and_fused_layers(
    name: str, profile: str, group: tuple[int, str], protect: Callable[..., Any]
) -> None:
    """Three processes cannot share two heads of k and v: they have the attention whole."""
    if profile == "stream" and name == "gemma2":
        pytest.skip("refused there: norms after the parts")
    with wide():
        reference = model_of(name)
        model = copy.deepcopy(reference)
        ids = tokens(2, 8)
        expected = reference(ids).logits
        scalar(expected).backward()
        wanted = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None and "lora_" in n}
        with protect(model, profile=profile, worker=group[1]) as protected:
            got = protected.model(ids).logits
            assert error(got, expected) < BOUND
            scalar(got).backward()
            found = gradients(protected.model)
            if profile != "paper":  # there the worker has them
                assert worst({n: found[n] for n in wanted}, wanted) < BOUND
            options = {"max_new_tokens": 4, "do_sample": False}
            assert torch.equal(protected.model.generate(ids, **options), reference.generate(ids, **options))


def test_shares_on_a_group(group: tuple[int, str], protect: Callable[..., Any], tmp_path: Path) -> None:
    """Each process of the first worker computes for some of the primes: bit for bit what one process gives."""
    _, one = twins(n_layer=2, dtype=torch.float32)
    _, many = twins(n_layer=2, dtype=torch.float32)
    ids, logits = tokens(2, 7), {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*one machine.*")
        for model, first in ((one, "spawn"), (many, group[1])):
            with protect(model, profile="shared", worker=[first, "spawn", "spawn"]) as protected:
                result = protected.model(ids).logits
                scalar(result).backward()
                logits[first] = {"logits": result.detach(), **gradients(protected.model)}
    assert all(torch.equal(logits["spawn"][name], logits[group[1]][name]) for name in logits["spawn"])


def test_factors_that_the_group_trains(group: tuple[int, str], protect: Callable[..., Any]) -> None:
    one, many = twins(n_layer=2)
    ids = tokens(2, 7)

    def train(model: Any, **options: Any) -> dict[str, torch.Tensor]:
        with protect(model, profile="paper", **options) as protected:
            optimizer = protected.create_optimizer(lr=1e-2)
            for _ in range(4):
                protected.model(ids, labels=ids).loss.backward()
                torch.nn.utils.clip_grad_norm_([p for p in protected.model.parameters() if p.requires_grad], 0.05)
                optimizer.step()
                optimizer.zero_grad()
            return {name: t.clone() for name, t in protected.model.state_dict().items() if "lora_" in name}

    assert worst(train(many, worker=group[1]), train(one)) < BOUND


def test_each_process_has_its_part(group: tuple[int, str], protect: Callable[..., Any]) -> None:
    size, address = group
    held = {}
    for at in (None, address):
        _, model = twins(n_layer=2, n_embd=96, n_head=6, lora=False)
        with protect(model, profile="balanced", **({} if at is None else {"worker": at})) as protected:
            held[at] = protected.session.request("stats", "-", {}, {}, {})[0]["held_bytes"]
    assert held[address] == pytest.approx(held[None] / size, rel=0.1)


def ranks_of(process: "subprocess.Popen[str]") -> dict[int, int]:
    """Process ids by rank, of torchrun's children."""
    found = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = next((entry for entry in environment if entry.startswith(b"RANK=")), None)
        if rank is not None:
            found[int(rank.removeprefix(b"RANK="))] = int(child)
    return found


@pytest.mark.parametrize(("processes", "victim"), [(2, 1), (3, 2)])
def test_a_dead_rank_ends_the_session_with_its_name(
    processes: int, victim: int, protect: Callable[..., Any], tmp_path: Path
) -> None:
    _, model = twins(n_layer=2)
    with (
        torchrun(tmp_path, processes) as (address, process),
        protect(model, profile="balanced", worker=address) as protected,
    ):
        protected.model(tokens(1, 5))
        os.kill(ranks_of(process)[victim], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while "closing signal SIGTERM" not in (tmp_path / "log").read_text():  # torchrun ends the others
            assert time.monotonic() < deadline
            select.select([], [], [], 0.02)
        with pytest.raises(WorkerFault, match=f"rank {victim} of the worker is gone"):
            protected.model(tokens(1, 5))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_group_that_is_told_to_end_ends(number: signal.Signals, tmp_path: Path) -> None:
    """torchrun kills what is left after 30 s, and then the socket's file stays behind."""
    with torchrun(tmp_path, 2) as (_, process):
        process.send_signal(number)
        process.wait(25)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sandbox", "bubblewrap"], "a worker of several processes has no sandbox"),
        (["--max_sessions", "2"], "a worker of several processes serves one session"),
    ],
)
def test_what_a_group_cannot_have_is_refused(more: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "obfuscatune.worker", "--listen", f"unix://{tmp_path}/w", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)  # noqa: S603
    assert done.returncode != 0
    assert message in done.stderr
