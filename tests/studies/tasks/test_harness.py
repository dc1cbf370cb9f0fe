"""A protected model gets from the harness what the same checkpoint gets as the harness' own ``hf`` model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2Tokenizer, PreTrainedTokenizerFast

from obfuscatune.errors import NotFiniteError, UsageError
from obfuscatune.studies.bundled import model_directory
from obfuscatune.studies.tasks.catalogue import TASKS
from obfuscatune.studies.tasks.harness import ProtectedLM, TaskResult, evaluate, load_tasks, training_rows
from obfuscatune.training.encoding import IGNORED_LABEL, encode_rows

# Of log-likelihoods summed over a choice, in float32; measured 2e-5 on the tiny model and 6e-5 on the real one.
LIKELIHOOD_TOLERANCE = 5e-4
REAL_ROWS = 6
ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"}
WORDS = ("blue", "a red one", "green", "old", "the sea", "ice", "tin", "nine")


def rows(task: str, split: str, count: int = 6) -> list[dict[str, Any]]:
    """Invented questions, the same in each split but for their ids."""
    made = []
    for i in range(count):
        words = [WORDS[(i + 3 * k) % len(WORDS)] for k in range(4)]
        row: dict[str, Any] = {"id": f"{split}-{i}", "question": f"which {i}?"}
        if task == "webqs":
            row["answers"] = words[: 1 + i % 3]
        else:
            choices = words[: 2 if task == "piqa" else 4]
            row |= {"choices": choices, "answer": i % len(choices)}
        if task == "sciq":
            row["support"] = "" if i % 2 else " It is known."
        made.append(row)
    return made


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    for name, task in TASKS.items():
        (directory / task.folder).mkdir()
        for split in ("train", "validation"):
            lines = "".join(json.dumps(row) + "\n" for row in rows(name, split))
            (directory / task.folder / f"{split}.jsonl").write_text(lines)
    return directory


def _save(directory: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> Path:
    torch.manual_seed(seed)
    ends = {"bos_token_id": 257, "eos_token_id": 256, "initializer_range": 0.3}
    config = GPT2Config(
        **{"vocab_size": 258, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 192, "attn_pdrop": 0.0, **ends}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return _save(tmp_path_factory.mktemp("model"), tokenizer, seed=0)


@pytest.fixture(scope="session")
def adapter(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter whose factors are both far from zero."""
    directory = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def protected(model_dir: Path) -> Iterator[ProtectedLM]:
    with ProtectedLM(str(model_dir), batch_size=4, threads=1) as lm:
        yield lm


def hf(model: Path, adapter: Path | None = None, batch_size: int = 4) -> HFLM:
    lm = get_model("hf")(str(model), peft=adapter and str(adapter), device="cpu", batch_size=batch_size)
    assert type(lm) is HFLM
    return lm


def likelihoods(lm: HFLM, tasks: list[str], data_dir: Path, limit: int) -> torch.Tensor:
    """Log-likelihoods of all choices of all tasks, float64."""
    requests = []
    for task in load_tasks(tasks, data_dir).values():
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        requests += task.instances
    return torch.tensor([likelihood for likelihood, _ in lm.loglikelihood(requests)], dtype=torch.float64)


def check_parity(ours: HFLM, theirs: HFLM, data_dir: Path, limit: int) -> dict[str, TaskResult]:
    """Metrics, standard errors and every item's predictions are identical, likelihoods nearly so."""
    results = evaluate(ours, list(TASKS), data_dir=data_dir, limit=limit)
    assert results == evaluate(theirs, list(TASKS), data_dir=data_dir, limit=limit)
    names = list(TASKS)
    got, expected = (likelihoods(lm, names, data_dir, limit) for lm in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=0, atol=LIKELIHOOD_TOLERANCE)
    return results


def test_parity_with_hf_on_invented_rows(
    protected: ProtectedLM, model_dir: Path, data_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    results = check_parity(protected, hf(model_dir), data_dir, limit=6)
    assert {name: set(result.metrics) for name, result in results.items()} == {
        "webqs": {"exact_match"},
        **{name: {"acc", "acc_norm"} for name in ("openbookqa", "piqa", "sciq")},
    }
    assert [p.id for p in results["sciq"].predictions] == [f"validation-{i}" for i in range(6)]
    other = hf(_save(tmp_path / "other", tokenizer, seed=7))
    assert evaluate(other, list(TASKS), data_dir=data_dir) != results, "the comparison sees no difference"


@pytest.mark.parametrize("profile", ["balanced", "strict"])
def test_parity_with_hf_on_a_trained_llama(profile: str, data_dir: Path) -> None:
    model = model_directory("llama")
    with ProtectedLM(str(model), profile=profile, batch_size=4, threads=1) as ours:
        check_parity(ours, hf(model), data_dir, limit=3)


@pytest.mark.parametrize("profile", ["paper", "balanced"])
def test_parity_with_hf_under_an_adapter(profile: str, model_dir: Path, adapter: Path, data_dir: Path) -> None:
    theirs = hf(model_dir, adapter)
    with ProtectedLM(str(model_dir), peft=str(adapter), profile=profile, batch_size=4, threads=1) as ours:
        check_parity(ours, theirs, data_dir, limit=4)
        info = ours.get_model_info()
    assert info["profile"] == profile
    assert info["model_num_parameters"] == sum(
        p.numel() for name, p in theirs.model.named_parameters() if "lora_" not in name
    )
    plain, adapted = (likelihoods(lm, ["sciq"], data_dir, 2) for lm in (hf(model_dir), theirs))
    assert (plain - adapted).abs().max() > 1000 * LIKELIHOOD_TOLERANCE, "the adapter does nothing"


@pytest.mark.slow
def test_parity_with_hf_on_real_rows(shared: Path, tmp_path: Path) -> None:
    model, data = shared / "models" / "mini", shared / "data"
    for path in (model, data):
        if not path.is_dir():
            pytest.skip(f"there is no {path.name} in the folder 'shared'")
    for task in TASKS.values():  # the first rows alone: reading all takes longer than evaluating these
        validation = data / task.folder / "validation.jsonl"
        lines = (data / task.folder / "train.jsonl").read_text().splitlines(keepends=True)
        held_out = validation.read_text().splitlines(keepends=True) if validation.is_file() else lines[50:]
        (tmp_path / task.folder).mkdir()
        (tmp_path / task.folder / "train.jsonl").write_text("".join(lines[:50]))
        (tmp_path / task.folder / "validation.jsonl").write_text("".join(held_out[:REAL_ROWS]))
    theirs = hf(model, batch_size=8)
    with ProtectedLM(str(model), batch_size=8, threads=1) as ours:
        check_parity(ours, theirs, tmp_path, limit=REAL_ROWS)
        few_shot = [evaluate(lm, ["sciq"], data_dir=tmp_path, limit=3, num_fewshot=1) for lm in (ours, theirs)]
    assert few_shot[0] == few_shot[1]


def test_generation_and_rolling_likelihood_are_those_of_hf(protected: ProtectedLM, model_dir: Path) -> None:
    theirs = hf(model_dir)
    until = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
    texts = [Instance("generate_until", {}, (text, dict(until)), i) for i, text in enumerate(("a few", "words"))]
    rolling = [Instance("loglikelihood_rolling", {}, ("a longer line of text",), 0)]
    assert protected.generate_until(texts) == theirs.generate_until(texts)
    assert protected.loglikelihood_rolling(rolling) == pytest.approx(
        theirs.loglikelihood_rolling(rolling), abs=LIKELIHOOD_TOLERANCE
    )


def test_the_tokenizer_is_the_one_that_hf_has(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """One named apart, and a token before each text where the tokenizer has none by itself."""
    other = tmp_path / "other"
    vocab = {word: number for number, word in enumerate(["<s>", "</s>", "a", "b", "c", *(f"{i}" for i in range(250))])}
    GPT2Tokenizer(vocab=vocab, merges=[], **ENDS).save_pretrained(other)
    for add in (None, True, False):
        given = {"tokenizer": str(other), "add_bos_token": add, "device": "cpu"}
        with ProtectedLM(str(model_dir), profile="enclave", **given) as ours:
            theirs = HFLM(str(model_dir), **given)
            assert ours.tok_encode("abc") == theirs.tok_encode("abc") == [0] * bool(add) + [2, 3, 4]
            assert ours.tok_batch_encode(["abc"])[0].tolist() == theirs.tok_batch_encode(["abc"])[0].tolist()
    with pytest.raises(UsageError, match="tokenizer"):
        ProtectedLM(str(model_dir), profile="enclave", tokenizer=str(tmp_path / "nowhere"))


def test_prompts_beyond_the_context_get_a_warning(protected: ProtectedLM) -> None:
    fits, beyond = (("", ""), [1] * 192, [2]), (("", ""), [1] * 193, [2])
    with pytest.warns(UserWarning, match="1 of 2 prompts with a choice are beyond the model's 192 positions"):
        assert len(protected._loglikelihood_tokens([fits, beyond])) == 2
    protected._loglikelihood_tokens([fits])


def test_what_is_no_number_is_no_answer(model_dir: Path, data_dir: Path) -> None:
    with ProtectedLM(str(model_dir), profile="enclave") as lm:
        lm.protected.model.transformer.ln_f.weight.data[0] = float("nan")
        with pytest.raises(NotFiniteError, match="the logits of the model are not finite"):
            evaluate(lm, ["sciq"], data_dir=data_dir, limit=2)
        with pytest.raises(NotFiniteError, match="the logits of the model are not finite"):
            lm.generate_until([Instance("generate_until", {}, ("a", {"max_gen_toks": 2}), 0)])


def test_the_prompts_are_the_published_ones(data_dir: Path) -> None:
    expected = {
        "webqs": ("Question: which 1?\nAnswer:", " a red one"),
        "openbookqa": ("which 1?", " the sea"),
        "piqa": ("Question: which 1?\nAnswer:", " the sea"),
        "sciq": ("\nQuestion: which 1?\nAnswer:", " the sea"),
    }
    for task, (prompt, completion) in expected.items():
        row = training_rows(task, data_dir)[1]
        assert (row.prompt, row.completion) == (prompt, completion)
    assert training_rows("sciq", data_dir)[0].prompt == "It is known.\nQuestion: which 0?\nAnswer:"


@pytest.mark.parametrize("task", TASKS)
def test_training_rows_are_tokenized_as_the_harness_scores_them(
    task: str, protected: ProtectedLM, data_dir: Path
) -> None:
    """The rows of both splits differ in their ids alone here: the scored right choice is what is learnt."""
    made = training_rows(task, data_dir)
    assert [row.where for row in made] == [f"{task}, training row {i}" for i in range(6)]
    encoded, _ = encode_rows(made, protected.tokenizer, 192)
    loaded = load_tasks([task], data_dir)[task]
    loaded.set_config(key="num_fewshot", value=0)
    loaded.build_all_requests(limit=None, rank=0, world_size=1)
    for index, (document, example) in enumerate(zip(loaded.eval_docs, encoded, strict=True)):
        right = document["answers"][0] if task == "webqs" else None
        choices = loaded.doc_to_choice(document)
        right = right or choices[loaded.doc_to_target(document)]
        scored = [i.args for i in loaded.instances if i.doc_id == index and i.args[1] == f" {right}"]
        assert scored or task == "webqs"
        for context, continuation in scored:
            prompt, completion = protected._encode_pair(context, continuation)
            completion = [*completion, protected.tokenizer.eos_token_id]
            assert example["input_ids"] == prompt + completion
            assert example["labels"] == [IGNORED_LABEL] * len(prompt) + completion


def test_what_cannot_be_done_is_refused(
    model_dir: Path, data_dir: Path, protected: ProtectedLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for options in ({"parallelize": True}, {"load_in_4bit": True}, {"trust_remote_code": True}, {"backend": "seq2seq"}):
        with pytest.raises(UsageError, match=f"the protected model cannot do this: got {next(iter(options))}"):
            ProtectedLM(str(model_dir), **options)
    with pytest.raises(UsageError, match="dtype of the weights: got float16"):
        ProtectedLM(str(model_dir), dtype="float16")
    for name, value in [
        *{"timeout": "abc", "max_length": -3.0, "softmax_dtype": "floaty", "prefix_token_id": "a"}.items(),
        *(("batch_size", size) for size in ("all", "auto:x", "auto:", "auto:0", "autos")),
        ("max_batch_size", 0),
    ]:
        with pytest.raises(UsageError, match=f"value of {name}"):
            ProtectedLM(str(model_dir), **{name: value})
    for beside in ({"profile": "strict"}, {"dtype": "bfloat16"}, {"mlp": "enclave"}, {"worker": ["spawn"]}):
        with pytest.raises(UsageError, match=f"the model is protected already: got {next(iter(beside))}"):
            ProtectedLM(protected.protected, tokenizer=protected.tokenizer, **beside)
    with pytest.raises(UsageError, match="without a tokenizer"):
        ProtectedLM(protected.protected)
    with pytest.raises(UsageError, match="webqs has no few-shot prompt"):
        evaluate(protected, ["webqs"], data_dir=data_dir, num_fewshot=1)
    with pytest.raises(UsageError, match="no embedding of: got token 258, expected below 258"):
        protected._model_call(torch.tensor([[0, 258]]))
    with pytest.raises(UsageError, match="no embedding of"):
        protected._model_generate(torch.tensor([[0, 258]]), 4, [])
    with pytest.raises(UsageError, match="a choice has more tokens than the model has positions"):
        protected._loglikelihood_tokens([(("", ""), [1], [2] * (protected.max_length + 1))])
    with pytest.raises(UsageError, match="cannot load the data"):
        evaluate(protected, ["piqa"], limit=1)  # from the hub, which no test can reach
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text(json.dumps(rows("piqa", "validation", 1)[0]) + "\n")
    with pytest.raises(UsageError, match="no training rows of task piqa"):
        training_rows("piqa", tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        ProtectedLM(str(model_dir))
