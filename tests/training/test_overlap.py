"""Two halves of a batch under way give the gradients of the whole batch, the same ones every time."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from obfuscatune.enclave.protect import protect
from obfuscatune.errors import UsageError, WorkerFault
from obfuscatune.training.encoding import IGNORED_LABEL
from obfuscatune.training.overlap import halves_of, step
from obfuscatune.training.trainer import ProtectedTrainer

from ..exactness.conftest import listening

TOLERANCE = 1e-12  # float64, relative to the largest gradient: the halves are summed in another order


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of one worker for all tests of this file."""
    with listening(tmp_path_factory.mktemp("worker")) as address:
        yield address


def new_model(dropout: float = 0.0, width: int = 16, layers: int = 2) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_embd=width, n_layer=layers, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=dropout,
    )  # fmt: skip
    adapter = LoraConfig(r=2, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    return get_peft_model(GPT2LMHeadModel(config).double(), adapter)


def batch(rows: int, length: int = 9) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    labels = ids.masked_fill(mask == 0, IGNORED_LABEL)
    labels[0, 3] = IGNORED_LABEL  # predicted from padding
    labels[-1, : length // 2] = IGNORED_LABEL
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trainer_of(protected: Any, directory: Path, **options: Any) -> ProtectedTrainer:
    arguments = TrainingArguments(output_dir=str(directory), report_to="none", use_cpu=True)
    return ProtectedTrainer(protected, kind="adamw", args=arguments, quiet=True, **options)


def gradients(protected: Any, directory: Path, *, overlap: bool, batches: int = 2) -> dict[str, torch.Tensor]:
    """Of several accumulated batches, with their losses."""
    trainer = trainer_of(protected, directory, overlap=overlap)
    protected.model.zero_grad()
    losses = [
        trainer.training_step(protected.model, dict(batch(rows)), torch.tensor(31)) for rows in (5, 2, 1)[:batches]
    ]
    found = {name: p.grad.clone() for name, p in protected.model.named_parameters() if p.grad is not None}
    return {**found, "losses": torch.stack(losses).double()}


@pytest.mark.parametrize("profile", ["balanced", "strict", "stream", "enclave"])
def test_gradients_of_the_whole_batch(worker: str, profile: str, tmp_path: Path) -> None:
    with protect(new_model(), profile=profile, worker="spawn" if profile == "enclave" else worker) as protected:
        whole = gradients(protected, tmp_path, overlap=False, batches=3)
        halves = gradients(protected, tmp_path, overlap=True, batches=3)
        assert whole.keys() == halves.keys()
        assert len(whole) > 16
        for name, expected in whole.items():
            bound = 1e-9 if profile == "strict" else TOLERANCE  # noise rows cost three digits, anew at each call
            bound = 1e-6 if name == "losses" else bound  # transformers sums them in float32, whatever the model's dtype
            assert (halves[name] - expected).abs().max() <= bound * expected.abs().max(), name
        again = gradients(protected, tmp_path, overlap=True, batches=3)
        if profile != "strict":
            assert all(torch.equal(halves[name], again[name]) for name in halves), "not the same every time"


@pytest.mark.slow
def test_both_halves_are_under_way_at_once(worker: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The control of what overlap is: a second request is sent before the first reply is read."""
    from obfuscatune.enclave.session import Session

    most = {False: 0, True: 0}
    submit = Session.submit
    for overlap in (False, True):

        def counting(self: Session, *args: Any, overlap: bool = overlap, **options: Any) -> Any:
            pending = submit(self, *args, **options)
            most[overlap] = max(most[overlap], len(self._under_way))
            return pending

        monkeypatch.setattr(Session, "submit", counting)
        with protect(new_model(), profile="balanced", worker=worker) as protected:
            gradients(protected, tmp_path, overlap=overlap)
    assert most == {False: 1, True: 2}


def test_both_halves_compute_on_as_many_threads_as_the_caller() -> None:
    """Torch gives a thread that begins the number that any thread has set last, which for small work is one."""
    before = torch.get_num_threads()
    other = threading.Thread(target=torch.set_num_threads, args=(1,))
    other.start()
    other.join()
    parameter = torch.nn.Parameter(torch.ones(3))
    found: list[int] = []

    def loss_of(half: dict[str, Any]) -> torch.Tensor:
        found.append(torch.get_num_threads())
        return (parameter * half["inputs_embeds"]).sum()

    step(loss_of, {"inputs_embeds": torch.ones(4, 2, 3)}, [parameter])
    assert found == [before] * 2 and before > 1
    assert parameter.grad is not None and torch.equal(parameter.grad, torch.full((3,), 8.0))


def test_rows_are_split_and_nothing_else() -> None:
    inputs = {**batch(5), "factor": torch.ones(2), "flag": True}
    first, second = halves_of(inputs)
    assert torch.equal(torch.cat([first["labels"], second["labels"]]), inputs["labels"])
    assert (len(first["input_ids"]), len(second["input_ids"])) == (3, 2)
    assert first["factor"] is second["factor"] is inputs["factor"]
    assert first["flag"] is second["flag"] is True
    masks = {"full_attention": torch.arange(20).view(5, 4), "sliding_attention": torch.ones(1, 4)}
    first, second = halves_of({**batch(5), "attention_mask": masks})
    parts = [half["attention_mask"]["full_attention"] for half in (first, second)]
    assert [len(part) for part in parts] == [3, 2] and torch.equal(torch.cat(parts), masks["full_attention"])
    assert second["attention_mask"]["sliding_attention"] is masks["sliding_attention"]
    embedded = {"inputs_embeds": torch.ones(5, 9, 16), "labels": batch(5)["labels"]}
    assert [len(half["inputs_embeds"]) for half in halves_of(embedded)] == [3, 2]
    assert halves_of({name: tensor[:1] for name, tensor in batch(5).items()})[0].keys() == batch(5).keys()


def test_what_it_would_change_is_refused(worker: str, tmp_path: Path) -> None:
    with (
        protect(new_model(dropout=0.1), profile="enclave") as protected,
        pytest.raises(UsageError, match=r"overlap does not fit dropout: got 0\.1"),
    ):
        trainer_of(protected, tmp_path, overlap=True)
    with (
        protect(new_model(), profile="paper", worker=worker) as protected,
        pytest.raises(UsageError, match="LoRA factors on the worker: got profile paper"),
    ):
        trainer_of(protected, tmp_path, overlap=True)
    with protect(new_model(), profile="enclave") as protected:
        for name, value in (("label_smoothing_factor", 0.1), ("neftune_noise_alpha", 5.0)):
            arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **{name: value})
            with pytest.raises(UsageError, match=f"overlap does not fit {name}: got {value}"):
                ProtectedTrainer(protected, kind="adamw", args=arguments, quiet=True, overlap=True)
        with pytest.raises(UsageError, match="overlap does not fit compute_loss_func: got a function"):
            trainer_of(protected, tmp_path, overlap=True, compute_loss_func=lambda *given: None)


def test_a_fault_in_one_half_is_the_steps_error(tmp_path: Path) -> None:
    with protect(new_model(), profile="balanced") as protected:
        trainer = trainer_of(protected, tmp_path, overlap=True)
        protected.session.process.kill()
        with pytest.raises(WorkerFault, match="is gone"):
            trainer.training_step(protected.model, dict(batch(4)), torch.tensor(31))


def test_the_first_fault_is_the_steps_error() -> None:
    """The half that does not see it finds the session ended, which tells of no cause."""
    raised = threading.Event()

    def loss_of(half: dict[str, Any]) -> torch.Tensor:
        if threading.current_thread() is threading.main_thread():
            assert raised.wait(60)
            raise UsageError("the session was ended by an earlier fault")
        try:
            raise WorkerFault("the worker is gone", worker="w", layer="l", call=7)
        finally:
            raised.set()

    with pytest.raises(WorkerFault, match="the worker is gone"):
        step(loss_of, {"inputs_embeds": torch.ones(4, 2, 3)}, [torch.nn.Parameter(torch.ones(3))])


def test_an_interrupt_waits_for_no_half() -> None:
    """The other half may wait for a worker that is silent, for as long as its timeout."""
    under_way, end = threading.Event(), threading.Event()
    main = threading.current_thread()
    daemons: list[bool] = []

    def loss_of(half: dict[str, Any]) -> torch.Tensor:
        if threading.current_thread() is main:
            assert under_way.wait(60)
            raise KeyboardInterrupt
        daemons.append(threading.current_thread().daemon)
        under_way.set()
        end.wait(5)
        raise ValueError

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        step(loss_of, {"inputs_embeds": torch.ones(4, 2, 3)}, [torch.nn.Parameter(torch.ones(3))])
    assert time.monotonic() - started < 4
    end.set()
    assert daemons == [True], "the process would not end before it"


# A slow link


@contextmanager
def slow_link(address: str, directory: Path, *, bytes_per_second: float, delay: float = 0.0) -> Iterator[str]:
    """A relay to the address that passes so many bytes a second on, in each direction, so many seconds late."""
    path = str(directory / "relay")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    ends: list[socket.socket] = []

    def pump(source: socket.socket, target: socket.socket) -> None:
        free = time.monotonic()  # when the last byte will be through
        with contextlib.suppress(OSError):
            while data := source.recv(2**20 if delay else 2**15):
                free = max(free, time.monotonic()) + len(data) / bytes_per_second
                time.sleep(max(0.0, free + delay - time.monotonic()))
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def serve() -> None:
        near = listener.accept()[0]
        far = socket.socket(socket.AF_UNIX)
        far.connect(address.removeprefix("unix://"))
        ends.extend((near, far))
        for pair in ((near, far), (far, near)):
            threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"unix://{path}"
    finally:
        listener.close()
        for end in ends:
            # A pump that waits in recv keeps its socket open past close, and the worker would keep the session.
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def measure(address: str, directory: Path, width: int = 64, **options: Any) -> dict[bool, float]:
    """Seconds of 3 steps, with overlap and without: the better of two rounds."""
    seconds: dict[bool, float] = {}
    with protect(new_model(width=width, layers=6), profile="balanced", worker=address, **options) as protected:
        for overlap in (False, True, False, True):
            trainer = trainer_of(protected, directory, overlap=overlap)
            started = time.monotonic()
            for _ in range(3):
                trainer.training_step(protected.model, batch(8, length=60), torch.tensor(31))
            seconds[overlap] = min(seconds.get(overlap, 1e9), time.monotonic() - started)
    print(f"{3 / seconds[False]:.2f} steps/s, with overlap {3 / seconds[True]:.2f} steps/s")
    return seconds


@pytest.mark.slow
def test_over_a_link_of_1_ms_and_1_gbit(worker: str, tmp_path: Path) -> None:
    """Measured, without a bound; `tests/deploy/test_two_machines.py` does the same where the kernel makes the link."""
    with slow_link(worker, tmp_path, bytes_per_second=125e6, delay=5e-4) as relay:
        assert set(measure(relay, tmp_path, width=128)) == {False, True}


@pytest.mark.slow
def test_a_slow_link_is_hidden_in_part(worker: str, tmp_path: Path) -> None:
    """One half's rows go out while the other's come back: the link is used in both directions at once.

    The bound leaves most of the gain to a busy machine.
    """
    with slow_link(worker, tmp_path, bytes_per_second=20e6) as relay:
        seconds = measure(relay, tmp_path)
    # 6 blocks, 2 calls each, forward and backward; 8 rows of 60 tokens of 64 numbers of 8 bytes, out and back.
    assert seconds[False] >= 3 * 24 * 2 * 8 * 60 * 64 * 8 / 20e6
    assert seconds[True] < 0.85 * seconds[False]
