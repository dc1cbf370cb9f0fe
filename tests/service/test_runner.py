"""One job run in this process, with inputs, disk and surroundings that are against the enclave."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from obfuscatune.errors import BusyError, ConsentError, FormatError, ObfuscatuneError, SealError, UsageError
from obfuscatune.parties.identity import Identity
from obfuscatune.parties.job import Job, SignedJob
from obfuscatune.parties.sealed.archive import SealedArchive, seal_files
from obfuscatune.parties.sealed.header import read_header
from obfuscatune.parties.sealed.models import model_files
from obfuscatune.parties.sealed.reader import SealedReader
from obfuscatune.service.fine_tuning import Hooks
from obfuscatune.service.placement import Workers
from obfuscatune.service.queries import Query
from obfuscatune.service.runner import Runner
from obfuscatune.service.store import Store
from obfuscatune.service.turns import Turns
from obfuscatune.serving.sampling import Settings

from .jobs import terms_of

LAB, CLINIC, ENCLAVE = (Identity.generate(name, "x25519") for name in ("lab", "clinic", "enclave"))
ROWS = "".join(json.dumps({"prompt": f"row {i} is", "completion": f" {i}"}) + "\n" for i in range(4))
PROMPTS = "".join(json.dumps({"prompt": f"row {i} is"}) + "\n" for i in range(3))
SILENT = Hooks(progress=lambda step, steps: None, checkpoint=lambda step, digest: None, placed=lambda parts: None)
CONFIG = {"vocab_size": 258, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32, "eos_token_id": 256}


@dataclass
class Place:
    """A store with a model of one block, four rows and three prompts, and how to run a job on them."""

    store: Store
    model: Path

    def put(self, kind: Any, files: Any, sender: Identity, **more: Any) -> str:
        return self.store.put(
            kind,
            lambda path: seal_files(path, files, kind=kind, sender=sender, recipients=[ENCLAVE.public], **more),
        )

    def signed(
        self,
        *,
        terms: dict[str, Any] | None = None,
        held_out: dict[str, bytes] | None = None,
        of: dict[str, dict[str, Any]] | None = None,
        **changes: Any,
    ) -> SignedJob:
        given = {"model": terms or terms_of(), "data": terms_of(), "prompts": terms_of(), **(of or {})}
        fields = {
            "training": {"max_steps": 2, "save_steps": 1, "lora_r": 2, "max_length": 24},
            "profile": "enclave",
            "max_new_tokens": 1,
            "adapter_to": ("owner",),
            "generations_to": ("owner",),
            **changes,
        }
        job = Job(
            provider=LAB.public.fingerprint,
            owner=CLINIC.public.fingerprint,
            enclave=ENCLAVE.public.fingerprint,
            model=self.put("model", model_files(self.model), LAB, terms=given["model"]),
            data=self.put("data", {"data.jsonl": ROWS.encode(), **(held_out or {})}, CLINIC, terms=given["data"]),
            prompts=self.put("prompts", {"prompts.jsonl": PROMPTS.encode()}, CLINIC, terms=given["prompts"]),
            expires=int(time.time()) + 3600,
            **fields,
        )
        return SignedJob(job).sign(LAB).sign(CLINIC)

    def run(self, signed: SignedJob, checkpoint: str | None = None, hooks: Hooks = SILENT) -> dict[str, str]:
        runner = Runner(ENCLAVE, self.store, workers=Workers.parse(["spawn"]))
        try:
            return runner.run(signed, checkpoint, hooks)
        finally:
            runner.close()

    def files(self, digest: str) -> dict[str, bytes]:
        """What the owner finds in a result."""
        with SealedReader(self.store.path(digest), CLINIC) as reader:
            archive = SealedArchive(reader)
            return {name: archive.read(name, 1 << 24) for name in archive.names()}


@pytest.fixture
def place(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Place:
    torch.manual_seed(0)
    model = tmp_path / "model"
    GPT2LMHeadModel(GPT2Config(**CONFIG)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    return Place(Store(tmp_path / "store", 1 << 30), model)


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def recipients(place: Place, digest: str) -> set[str]:
    return {recipient.fingerprint for recipient in read_header(place.store.path(digest)).header.recipients}


def weights_in(place: Place, adapter: str) -> list[str]:
    """The names of tensors of the base model in an adapter."""
    tensors = safetensors.torch.load(place.files(adapter)["adapter_model.safetensors"])
    assert any("lora_B" in name for name in tensors)
    base = safetensors.torch.load_file(place.model / "model.safetensors")
    return [n for n, t in tensors.items() if "lora_" not in n or any(torch.equal(t, b) for b in base.values())]


def test_a_job_gives_adapter_and_generations(place: Place) -> None:
    signed = place.signed()
    results = place.run(signed)
    assert sorted(place.files(results["adapter"])) == ["adapter_config.json", "adapter_model.safetensors"]
    rows = place.files(results["output"])["generations.jsonl"].decode().splitlines()
    assert [json.loads(row)["prompt"] for row in rows] == [json.loads(line)["prompt"] for line in PROMPTS.splitlines()]
    assert weights_in(place, results["adapter"]) == []
    named = json.loads(place.files(results["adapter"])["adapter_config.json"])["base_model_name_or_path"]
    assert named == f"sealed:{signed.job.model}"


def test_the_owner_alone_is_told_whether_the_training_worked(place: Place) -> None:
    """By rows that were held out, before the first step and after the last, and by the losses."""
    training = {
        "max_steps": 6,
        "save_steps": 4,
        "logging_steps": 4,
        "lora_r": 2,
        "max_length": 24,
        "learning_rate": 0.1,
    }
    saved: list[str] = []
    hooks = replace(SILENT, checkpoint=lambda step, digest: saved.append(digest))
    signed = place.signed(held_out={"held_out.jsonl": ROWS.encode()}, training=training)
    whole = place.run(signed, hooks=hooks)
    assert recipients(place, whole["report"]) == {CLINIC.public.fingerprint}
    report = json.loads(place.files(whole["report"])["report.json"])
    assert [entry["step"] for entry in report["loss"]] == [1, 4, 6] and report["steps"] == 6  # the ends always
    assert report["held_out"]["loss_after"] < report["held_out"]["loss_before"]
    assert report["workers"] == [] and report["job"] == signed.job.digest and report["profile"] == "enclave"
    # One that was killed goes on from a checkpoint, which holds what was measured before.
    resumed = json.loads(place.files(place.run(signed, saved[0])["report"])["report.json"])
    assert resumed["loss"] == report["loss"] and resumed["held_out"] == report["held_out"]
    without = json.loads(place.files(place.run(place.signed())["report"])["report.json"])
    assert without["held_out"] is None


def test_rows_that_are_held_out_are_not_trained_on(place: Place) -> None:
    def weights(**more: Any) -> bytes:
        return place.files(place.run(place.signed(**more))["adapter"])["adapter_model.safetensors"]

    other = b'{"prompt": "other", "completion": " thing"}\n'
    assert weights(held_out={"held_out.jsonl": ROWS.encode()}) == weights(held_out={"held_out.jsonl": other})
    with pytest.raises(FormatError, match="of several files"):
        weights(held_out={"more.jsonl": ROWS.encode()})


def query_of(signed: SignedJob, *prompts: str, **chosen: Any) -> Query:
    return Query(signed.job.digest, CLINIC.public.fingerprint, list(prompts), Settings(**{"longest": 1, **chosen}))


def test_a_prompt_that_is_too_long_leaves_the_model_loaded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    signed = place.signed(queries_by=("owner",), max_queries=5)
    runner = Runner(ENCLAVE, place.store, workers=Workers.parse(["spawn"]))
    try:
        adapter = runner.run(signed, None, SILENT)["adapter"]
        monkeypatch.setattr("obfuscatune.service.runner.protect", None)  # it is not keyed again
        with pytest.raises(UsageError, match="too long"):
            runner.check(signed, adapter, query_of(signed, "row 1 is", "x" * 40))
        rows = runner.check(signed, adapter, query_of(signed, "row 1 is"))
        runner.answer(signed, adapter, rows, lambda steps, longest: False)
        assert [row.done for row in rows] == [True]
        # One that fits is completed as far as the context goes, whatever is asked for at most.
        (row,) = runner.check(signed, adapter, query_of(signed, "x" * 29, longest=20))
        room = CONFIG["n_positions"] - len(row.prompt)
        runner.answer(signed, adapter, [row], lambda steps, longest: False)
        assert 0 < room < 20 and (row.completion().tokens == room or row.completion().ended)
        # And leaves the context for nobody's sake whose answer goes on beside it.
        rows = runner.check(signed, adapter, query_of(signed, "x" * 29, "x" * 5, longest=20))
        while not all(row.done for row in rows):
            runner.answer(signed, adapter, rows, lambda steps, longest: False)
        assert rows[0].tokens == row.tokens and len(rows[1].tokens) > room
    finally:
        runner.close()


def test_an_answer_is_the_same_in_however_many_rounds(place: Place) -> None:
    """Alone, in a batch, and with a turn after every token; greedy ones are those that the job itself gives."""
    model = GPT2LMHeadModel.from_pretrained(place.model)
    with torch.no_grad():  # far from ties
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(place.model)
    signed = place.signed(queries_by=("owner",), max_new_tokens=12)
    prompts = [json.loads(row)["prompt"] for row in PROMPTS.splitlines()]
    runner = Runner(ENCLAVE, place.store, workers=Workers.parse(["spawn"]))

    def answers(*asked: str, enough: bool, **chosen: Any) -> list[str]:
        rows = runner.check(signed, results["adapter"], query_of(signed, *asked, longest=12, **chosen))
        while live := [row for row in rows if not row.done]:
            runner.answer(signed, results["adapter"], live, lambda steps, longest: enough)
        return [row.completion().text for row in rows]

    try:
        results = runner.run(signed, None, SILENT)
        lines = place.files(results["output"])["generations.jsonl"].decode().splitlines()
        own = [json.loads(line)["completion"] for line in lines]
        found = []
        for chosen in ({}, {"temperature": 1.5, "seed": 3}, {"stop": (own[0][2:4],)}):
            found.append(answers(*prompts, enough=False, **chosen))
            assert answers(*prompts, enough=True, **chosen) == found[-1]
            assert [answers(prompt, enough=True, **chosen)[0] for prompt in prompts] == found[-1]
        assert found[0] == own != found[1] and found[2][0] == own[0].split(own[0][2:4])[0]
    finally:
        runner.close()


def test_queries_between_steps_change_nothing_of_a_training(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with dropout, accumulated gradients and evaluations: another model is loaded, asked and sampled."""
    training = {"max_steps": 2, "gradient_accumulation_steps": 2, "lora_r": 2, "lora_dropout": 0.3, "max_length": 24}
    signed = place.signed(training=training, held_out={"held_out.jsonl": ROWS.encode()})
    asked = place.signed(queries_by=("owner",), max_queries=5)
    query = query_of(asked, "row 1 is", longest=4, temperature=1.0, seed=4)
    runner = Runner(ENCLAVE, place.store, workers=Workers.parse(["spawn"]))
    texts: list[str] = []

    def run(between: Callable[[], float]) -> tuple[bytes, dict[str, Any]]:
        results = runner.run(signed, None, replace(SILENT, between=between))
        report = json.loads(place.files(results["report"])["report.json"])
        return place.files(results["adapter"])["adapter_model.safetensors"], report

    def turn(seconds: float) -> None:
        rows = runner.check(asked, adapter, query)
        runner.answer(asked, adapter, rows, lambda steps, longest: False)
        texts.append(rows[0].completion().text)

    try:
        adapter = runner.run(asked, None, SILENT)["adapter"]
        plain, alone = run(lambda: 0.0)
        turns = Turns(turn, lambda: True)
        with_queries, report = run(turns)
        assert with_queries == plain and report["loss"] == alone["loss"] and report["held_out"] == alone["held_out"]
        assert len(texts) > 4 and len(set(texts)) == 1  # between batches too; one seed, one answer
        assert 0 < report["queries_of_other_jobs"]["seconds"] <= turns.seconds
        assert "10 s" in report["queries_of_other_jobs"]["bound"]
        assert run(lambda: float(torch.rand(1)))[0] != plain  # the control
        # Where memory is short it is the query that is refused, and only beside a job.
        refused: list[str] = []

        def refuse(seconds: float) -> None:
            with (
                monkeypatch.context() as patch,
                pytest.raises(BusyError, match="does not fit beside the job") as caught,
            ):
                patch.setattr("obfuscatune.service.memory.free_bytes", lambda: 1000)
                runner.check(asked, adapter, query)
            refused.append(str(caught.value))

        assert run(Turns(refuse, lambda: True))[0] == plain and refused
        turn(1.0)
    finally:
        runner.close()


@pytest.mark.slow
def test_a_query_does_not_wait_for_the_place_that_its_job_has_at_the_worker(place: Place, tmp_path: Path) -> None:
    change(place.model / "config.json", attn_pdrop=0.0)  # it is on the worker
    address = f"unix://{tmp_path}/w.sock"
    command = [sys.executable, "-m", "obfuscatune.worker", "--listen", address, "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:  # noqa: S603
        runner = Runner(ENCLAVE, place.store, workers=Workers.parse([address]))
        try:
            assert worker.stdout is not None and "1 session" in worker.stdout.readline()
            asked = place.signed(profile="balanced", queries_by=("owner",), max_queries=5)
            adapter = runner.run(asked, None, SILENT)["adapter"]
            refused: list[BusyError] = []

            def between() -> float:
                if not refused:
                    with pytest.raises(BusyError, match="no place for another session") as caught:
                        runner.check(asked, adapter, query_of(asked, "row 1 is"))
                    refused.append(caught.value)
                return 0.0

            runner.run(place.signed(profile="balanced"), None, replace(SILENT, between=between))
            assert refused and runner.check(asked, adapter, query_of(asked, "row 1 is"))  # it has the place now
        finally:
            runner.close()
            worker.terminate()
            assert worker.wait(30) == 0


@pytest.mark.parametrize("who", [("provider",), ("owner",), ("provider", "owner"), ()])
def test_results_are_sealed_to_those_whom_the_job_names_and_to_nobody_else(place: Place, who: tuple[Any, ...]) -> None:
    named = {{"provider": LAB, "owner": CLINIC}[role].public.fingerprint for role in who}
    own = ENCLAVE.public.fingerprint
    results = place.run(place.signed(adapter_to=who))
    assert recipients(place, results["adapter"]) == named | {own}  # the enclave answers queries with it
    assert recipients(place, results["output"]) == {CLINIC.public.fingerprint}
    results = place.run(place.signed(generations_to=who))
    assert recipients(place, results["output"]) == (named or {own})


def test_the_profile_in_force_is_the_signed_one(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    class SeenError(Exception):
        pass

    def see(model: Any, *, profile: Any, **_: Any) -> None:
        raise SeenError(profile.name)

    monkeypatch.setattr("obfuscatune.service.runner.protect", see)
    with pytest.raises(SeenError, match=r"^balanced\+mlp=enclave$"):
        place.run(place.signed(profile="balanced", switches={"mlp": "enclave"}))


@pytest.mark.parametrize("layer", ["lm_head", "wte"])
def test_lora_is_on_the_layers_of_the_blocks_only(place: Place, layer: str) -> None:
    training = {"max_steps": 1, "lora_r": 2, "lora_target_modules": ["c_attn", layer]}
    with pytest.raises(ConsentError, match="other layers"):
        place.run(place.signed(training=training))


def test_no_weight_of_the_model_leaves_for_a_file_in_the_operators_directory(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT compares the vocabulary with that of the model that it finds by name: here by the name "None"."""
    named = tmp_path / "cwd" / "None"
    named.mkdir(parents=True)
    GPT2Config(**{**CONFIG, "vocab_size": 5}).save_pretrained(named)
    monkeypatch.chdir(named.parent)
    assert weights_in(place, place.run(place.signed())["adapter"]) == []


def test_a_checkpoint_put_in_by_the_operator_is_not_resumed(place: Place) -> None:
    """He seals to the enclave, as anybody can, and would know the keys of what goes on from there."""
    saved: list[str] = []
    signed = place.signed()
    place.run(signed, hooks=replace(SILENT, checkpoint=lambda step, digest: saved.append(digest)))
    assert len(saved) == 2 and sorted(place.run(signed, saved[0])) == ["adapter", "output", "report"]
    with pytest.raises(UsageError, match="the checkpoint is of another run"):
        place.run(place.signed(), saved[0])
    forged = place.put("checkpoint", {"master_secret": b"known"}, Identity.generate("operator", "x25519"))
    place.store.path(forged).replace(place.store.path(saved[0]))
    with pytest.raises(SealError, match="exchanged"):
        place.run(signed, saved[0])


@pytest.mark.parametrize("how", ["diverges", "weight", "tokenizer"])
def test_a_job_without_a_result_is_not_done(how: str, place: Place) -> None:
    training: dict[str, Any] = {"max_steps": 2, "lora_r": 2, "max_length": 24}
    if how == "diverges":
        training["learning_rate"] = 1e30
    elif how == "weight":
        tensors = safetensors.torch.load_file(place.model / "model.safetensors")
        tensors["transformer.h.0.mlp.c_fc.weight"][0, 0] = math.nan
        safetensors.torch.save_file(tensors, place.model / "model.safetensors", metadata={"format": "pt"})
    else:
        for path in place.model.glob("tokenizer*"):
            path.unlink()
    message = {"diverges": "not finite \\(at step 2", "weight": "a weight is not finite", "tokenizer": "no tokenizer"}[
        how
    ]
    with pytest.raises(ObfuscatuneError, match=message):
        place.run(place.signed(training=training))


@pytest.mark.parametrize("kind", ["model", "data", "prompts"])
def test_an_input_exchanged_after_consent_is_refused(place: Place, kind: str) -> None:
    signed, other = place.signed(), place.signed()
    place.store.path(other.job.inputs[kind]).replace(place.store.path(signed.job.inputs[kind]))
    with pytest.raises(SealError, match="exchanged"):
        place.run(signed)


@pytest.mark.parametrize(("allowed", "later"), [(2, 0), (3, 0), (4, 2), (5, 2)])
def test_prompts_of_the_file_count_among_those_that_the_model_allows(place: Place, allowed: int, later: int) -> None:
    signed = place.signed(terms=terms_of("enclave", max_queries=allowed), max_queries=later)
    if 3 + later <= allowed:
        assert sorted(place.run(signed)) == ["adapter", "output", "report"]
    else:
        with pytest.raises(ConsentError, match=rf"model's terms: got {3 + later} \(3 in the file and {later} later"):
            place.run(signed)


@pytest.mark.parametrize(("kind", "whose"), [("data", "data's"), ("prompts", "prompts'")])
def test_prompts_of_the_file_are_counted_by_each_inputs_terms(place: Place, kind: str, whose: str) -> None:
    signed = place.signed(of={kind: terms_of("enclave", max_queries=2)})
    with pytest.raises(ConsentError, match=f"max_queries of the {whose} terms: got 3 .* expected at most 2"):
        place.run(signed)


def test_a_job_that_cannot_fit_fails_before_it_takes_the_enclaves_memory(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = place.signed()
    size = sum(place.store.path(file).stat().st_size for file in signed.job.inputs.values())
    monkeypatch.setattr("obfuscatune.service.memory.free_bytes", lambda: size - 1)
    monkeypatch.setattr("obfuscatune.service.runner.open_model", pytest.fail)
    with pytest.raises(BusyError, match="do not fit"):
        place.run(signed)


@pytest.mark.parametrize(
    ("quota", "training"),
    [
        ("max_training_tokens", {"num_train_epochs": 2.0, "per_device_train_batch_size": 2, "max_length": 24}),
        ("max_stored_bytes", {"max_steps": 1, "lora_r": 2, "max_length": 24}),
    ],
)
def test_a_job_ends_at_a_quota_of_the_terms(place: Place, quota: str, training: Any) -> None:
    """One that the job alone does not tell: of passes over rows that only the enclave counts, and of sealed sizes."""
    allowed = terms_of("enclave", **{quota: 2 * 2 * 2 * 24 if quota == "max_training_tokens" else 1 << 20})
    assert "adapter" in place.run(place.signed(terms=allowed, training=training))
    less = {"max_training_tokens": allowed["max_training_tokens"] - 1, "max_stored_bytes": 100}[quota]
    signed = place.signed(terms={**allowed, quota: less}, training=training)
    before = set(place.store.digests())
    with pytest.raises(ConsentError, match=f"{quota} of the model's terms") as caught:
        place.run(signed)
    assert caught.value.expected == f"at most {less:,}"
    assert set(place.store.digests()) == before  # nothing is kept that goes beyond it


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("config.json", {"model_type": "other", "auto_map": {"AutoConfig": "{code}--code.Config"}}),
        ("tokenizer_config.json", {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "{code}--code.T"]}}),
    ],
)
def test_code_of_a_model_is_not_run_whatever_the_operator_types(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, fields: dict[str, Any]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    code = tmp_path / "code"
    code.mkdir()
    (code / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    change(place.model / file, **json.loads(json.dumps(fields).replace("{code}", str(code))))
    run: Callable[[], object] = lambda: place.run(place.signed())  # noqa: E731
    if file == "config.json":
        with pytest.raises(UsageError):
            run()
    else:  # the family has a tokenizer of its own, which is taken
        run()
    assert not asked and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"attn_implementation": "somebody/kernel"}, "attention"),
        ({"_attn_implementation": "flash_attention_2"}, "attention"),
        ({"n_layer": 10**9}, "layers in the model's configuration"),
    ],
)
def test_configurations_that_ask_for_more_than_a_model_are_refused(
    place: Place, fields: dict[str, Any], said: str
) -> None:
    change(place.model / "config.json", **fields)
    with pytest.raises(UsageError, match=said):
        place.run(place.signed())


def test_messages_are_completed_by_the_model_s_template_and_end_where_its_settings_say(place: Place) -> None:
    turns = [{"role": "user", "content": "row 1"}]
    GPT2LMHeadModel(GPT2Config(**CONFIG, initializer_range=1.0)).save_pretrained(place.model)  # says more than its end
    (place.model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} is{% endfor %}")
    texts, chats = ({"prompt": prompt} for prompt in ("row 1 is", turns))
    rows = [json.dumps(row) + "\n" for row in (texts, chats)]

    def completions(**settings: Any) -> list[dict[str, Any]]:
        change(place.model / "generation_config.json", **settings)
        job = replace(
            place.signed(max_new_tokens=8).job,
            prompts=place.put("prompts", {"prompts.jsonl": "".join(rows).encode()}, CLINIC, terms=terms_of()),
        )
        results = place.run(SignedJob(job).sign(LAB).sign(CLINIC))
        lines = place.files(results["output"])["generations.jsonl"].decode().splitlines()
        return [json.loads(line) for line in lines]

    text, chat = completions()
    assert chat == {"prompt": turns, "completion": [{"role": "assistant", "content": text["completion"]}]}
    assert len(text["completion"]) > 1
    text, chat = completions(eos_token_id=[*range(257)])
    assert len(text["completion"]) == len(chat["completion"][0]["content"]) == 1
