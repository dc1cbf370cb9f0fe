"""Conversations from the command line: fine-tuned on, completed, and refused before anything is written."""

import json
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
USER, ASSISTANT = ({"role": role, "content": "zebra"} for role in ("user", "assistant"))


@pytest.fixture
def chat_dir(model_dir: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "chat"
    directory.mkdir()
    for file in model_dir.iterdir():
        (directory / file.name).symlink_to(file)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_conversation_is_learnt_and_asked_for(chat_dir: Path, worker: str, tmp_path: Path, run) -> None:
    rows = [{"messages": [USER, ASSISTANT] * 2}, {"prompt": [USER], "completion": [ASSISTANT]}]
    train, adapter = write(tmp_path / "train.jsonl", rows), tmp_path / "adapter"
    common = ["--model_name_or_path", chat_dir, "--worker", worker]
    steps = ["--max_steps", 2, "--learning_rate", 1e-2, "--lora_r", 2, "--max_length", 40]
    outcome = run("finetune", *common, "--train_file", train, "--output_dir", adapter, *steps)
    assert outcome.code == 0, outcome.err
    # Of the first row 36 tokens: two answers of five letters and an end.
    assert f"{train}: 2 rows, 54 tokens, 18 supervised tokens, 0 shortened prompts" in outcome.err

    prompts = write(tmp_path / "prompts.jsonl", [{"messages": [USER, ASSISTANT, USER]}, {"prompt": [USER]}])
    completed = tmp_path / "completed.jsonl"
    generate = ["generate", *common, "--adapter_name_or_path", adapter, "--max_new_tokens", 5, "--chat"]
    outcome = run(*generate, "--prompt", "zebra", "--prompt_file", prompts, "--output_file", completed)
    assert outcome.code == 0, outcome.err

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chat_dir), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(chat_dir)
    expected = []
    for turns in ([USER], [USER, ASSISTANT, USER], [USER]):
        batch = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=256)
        text = tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        expected.append({"prompt": turns, "completion": [{"role": "assistant", "content": text}]})
    assert [json.loads(line) for line in completed.read_text().splitlines()] == expected


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": [USER, ASSISTANT]}, {"messages": [USER]}], "nothing to learn from"),
        ([{"messages": [USER, ASSISTANT]}, {"messages": [ASSISTANT]}], "the assistant speaks first"),
        ([{"text": "fine"}, {"prompt": [USER], "completion": "zebra"}], "'prompt' has the wrong type"),
    ],
)
def test_a_bad_conversation_is_one_error_and_nothing_is_written(
    rows: list[object], message: str, chat_dir: Path, tmp_path: Path, run
) -> None:
    train, output = write(tmp_path / "train.jsonl", rows), tmp_path / "adapter"
    outcome = run(
        *("finetune", "--model_name_or_path", chat_dir, "--train_file", train, "--output_dir", output),
        *("--worker", f"unix://{tmp_path}/none"),
    )
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.count("error:") == 1 and message in outcome.err and f"{train}:2" in outcome.err
    assert "zebra" not in outcome.err and not output.exists()


def test_answers_that_end_nowhere_are_warned_of(chat_dir: Path, tmp_path: Path, run) -> None:
    train = write(tmp_path / "train.jsonl", [{"messages": [USER, ASSISTANT]}] * 2)
    command = [
        "finetune",
        "--model_name_or_path",
        chat_dir,
        "--train_file",
        train,
        "--worker",
        f"unix://{tmp_path}/none",
    ]
    marked = TEMPLATE.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    for template, count in ((TEMPLATE, 0), (marked, 2)):
        (chat_dir / "chat_template.jinja").write_text(template)
        outcome = run(*command, "--output_dir", tmp_path / f"{count}")
        assert f"{count} answers without end" in outcome.err
        assert ("may not learn to stop" in outcome.err) == (count > 0)


def test_messages_without_a_template_are_refused_before_the_worker_is_asked(
    model_dir: Path, tmp_path: Path, run
) -> None:
    completed = tmp_path / "completed.jsonl"
    common = ["--model_name_or_path", model_dir, "--worker", f"unix://{tmp_path}/none"]
    outcome = run("generate", *common, "--chat", "--prompt", "zebra", "--output_file", completed)
    assert outcome.code == 2 and "no chat template (at --prompt 1)" in outcome.err and not completed.exists()
    assert "hint: put a chat_template.jinja beside the tokenizer" in outcome.err and "zebra" not in outcome.err


def test_an_enclave_is_not_asked_with_messages(tmp_path: Path, run) -> None:
    outcome = run("generate", "--job", "job.json", "--chat", "--prompt", "zebra")
    assert outcome.code == 2 and "an enclave is asked with texts: got messages" in outcome.err
