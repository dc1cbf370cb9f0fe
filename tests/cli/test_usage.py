"""Help, exit codes, config files: all that needs neither a model nor a worker."""

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.text import Text

from obfuscatune.cli import VERBS, build_app
from obfuscatune.errors import UsageError, WorkerFault


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_every_help_ends_with_examples_of_options_that_exist(verb: str, run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcome = run(*[verb] * bool(verb), "--help")
    assert outcome.code == 0
    assert "…" not in outcome.out, "an option's name is cut"
    options, _, examples = outcome.out.partition("Examples:")
    assert f"obfuscatune {verb}" in examples
    assert {word for word in examples.split() if word.startswith("--")} <= {*options.split(), "--help"}


def test_help_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; from obfuscatune.cli import main; code = main(['finetune', '--help'])\n"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'transformers', 'peft')))"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, timeout=60)  # noqa: S603
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (UsageError("bad", hint="try"), 2, "error: bad\nhint: try\n"),
        (
            WorkerFault("gone", worker="w", layer="h.0", call=3),
            1,
            "error: gone (at worker w, layer h.0, call 3)\nhint: start",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_exit_codes_without_a_traceback(
    raised: BaseException, code: int, message: str, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> dict[str, object]:
        raise raised

    monkeypatch.setattr("obfuscatune.cli.doctor.examine", fail)
    outcome = run("doctor")
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err.startswith(message)
    assert "Traceback" not in outcome.err


def test_core_dumps_are_off(run, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {}
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    assert run("--version").code == 0
    assert limits == {resource.RLIMIT_CORE: (0, 0)}


def test_a_home_directory_in_a_config_file_is_expanded(
    model_dir: Path, tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from obfuscatune.training.loading import load

    monkeypatch.setenv("HOME", str(model_dir.parent))
    names: list[str] = []
    monkeypatch.setattr(
        "obfuscatune.training.loading.load", lambda name, *more: names.append(name) or load(name, *more)
    )
    path = tmp_path / "run.yaml"
    path.write_text(f"model_name_or_path: ~/{model_dir.name}\nmax_new_tokens: 1\nprofile: enclave\nprompt: [a]\n")
    outcome = run("generate", "--config", path)
    assert (outcome.code, names) == (0, [str(model_dir)]), outcome.err


def test_what_another_library_raises_is_told_by_its_class_and_place(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obfuscatune.cli.doctor.examine", lambda: {}["zebra"])
    outcome = run("doctor")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: unexpected KeyError (at ") and "doctor.py:" in outcome.err
    assert "zebra" not in outcome.err and "Traceback" not in outcome.err


def test_the_end_of_a_file_in_a_library_is_no_interrupt(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, object]:
        raise EOFError

    monkeypatch.setattr("obfuscatune.cli.doctor.examine", fail)
    outcome = run("doctor")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: unexpected RuntimeError, from EOFError (at ")


def test_a_link_to_nowhere_is_an_output_file_that_is_there(tmp_path: Path, run) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    outcome = run("generate", "--model_name_or_path", "x", "--prompt", "a", "--output_file", tmp_path / "link")
    assert outcome.code == 2 and "file is there already" in outcome.err


@pytest.mark.parametrize("verb", ["generate", "serve", "finetune", "evaluate"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--worker", "carrier-pigeon"], "not an address"),
        (["--worker", "spawn", "--worker", "tcp://192.0.2.1:7000"], "neither encrypted nor authenticated"),
        (["--worker", f"tls://127.0.0.1:7000#{64 * 'a'}"], "tls:// needs an identity"),
        (["--worker", f"tls://127.0.0.1:7000#{64 * 'a'}", "--identity", "/dev/null/lab.key"], "/dev/null/lab.key"),
        (["--worker", "unix:///run/w", "--threads", "2"], "are set where it is started"),
        (["--profile", "shared", "--threshold", "0"], "the profile's switches do not fit"),
    ],
)
def test_what_is_wrong_with_a_worker_is_told_before_the_model_is_read(
    verb: str, options: list[str], message: str, model_dir: Path, tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("the model is read")

    for name in ("obfuscatune.studies.tasks.harness.load", "obfuscatune.training.loading.load"):
        monkeypatch.setattr(name, load)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    more = {
        "generate": ["--prompt", "a"],
        "serve": ["--port", "0"],
        "finetune": ["--train_file", tmp_path / "train.jsonl", "--output_dir", tmp_path / "out"],
        "evaluate": ["--task", "sciq"],
    }
    outcome = run(verb, "--model_name_or_path", model_dir, *more[verb], *options)
    assert outcome.code == 2 and message in outcome.err, outcome.err


FETCH = ["attest", "fetch", "--enclave", "tls://127.0.0.1:1", "--output", "e"]
SERVE = [
    "enclave",
    "serve",
    "--platform",
    "simulation:/dev/null/p",
    "--state",
    "/dev/null/s",
    "--parties",
    "/dev/null/p",
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["doctor", "--jsn"], "--json"),
        (["inspect"], "Missing option"),
        (["generate", "--model_name_or_path", "x", "--keys", "rot13"], "'haar'"),
        (["finetune", "--max_length", "1"], "--max_length"),
        (["worker", "--listen", "carrier-pigeon"], "not an address"),
        (["worker", "--listen", "tcp://0.0.0.0:7000"], "neither encrypted nor authenticated"),
        (["worker", "--listen", "tls://127.0.0.1:0"], "tls:// needs an identity"),
        (["worker", "--listen", "tls://127.0.0.1:0", "--allow", "lab.pub"], "expected --identity"),
        (["worker", "--listen", "unix://w", "--identity", "gpu1.key"], "expected --allow"),
        (["worker", "--listen", f"tls://127.0.0.1:0#{64 * 'a'}"], "has no fingerprint"),
        (["worker", "--listen", "unix://w", "--max_sessions", "0"], "--max_sessions"),
        (["generate", "--model_name_or_path", "x", "--top_p", "0.5"], "hint: add --do_sample"),
        (["generate", "--prompt", "a", "--temperature", "0"], "--temperature"),
        (["generate", "--prompt", "a", "--temperature", "nan"], "--temperature"),
        (["generate", "--prompt", "a", "--temperature", "inf"], "--temperature"),
        (["generate", "--prompt", "a", "--top_p", "-1"], "--top_p"),
        (["generate", "--prompt", "a", "--top_p", "2"], "'--top_p': 2.0 is above 1"),
        (["generate", "--prompt", "a", "--timeout", "nan"], "--timeout"),
        (["generate", "--prompt", "a", "--seed", str(2**32)], "--seed"),
        (["generate", "--prompt", "a", "--output_file", "a" * 300], "cannot write the file: got File name too long"),
        (["finetune", "--lora_dropout", "1"], "--lora_dropout"),
        (["finetune", "--per_device_train_batch_size", str(10**20)], "--per_device_train_batch_size"),
        (["finetune", "--learning_rate", "inf"], "--learning_rate"),
        ([*FETCH, "--timeout", "-1"], "--timeout"),
        ([*FETCH, "--timeout", "inf"], "--timeout"),
        ([*FETCH, "--timeout", "1e12"], "--timeout"),
        (["job", "propose", "--partner_input", "c", "--days", "inf"], "--days"),
        (["job", "watch", "--interval", "inf"], "--interval"),
        (["job", "run", "--patience", "inf"], "--patience"),
        ([*SERVE, "--max_store_gb", "inf"], "--max_store_gb"),
        ([*SERVE, "--timeout", "-5"], "--timeout"),
        (["worker", "--listen", "unix://w", "--memory_gb", "inf"], "--memory_gb"),
        ([*FETCH[:-1], "nodir/e"], "no such directory (at --output nodir/e)"),
        (
            ["attest", "collateral", "fetch", "u", "--quote", "q", "--output", "nodir/c"],
            "no such directory (at --output",
        ),
        (["identity", "revoke", "a.key", "--output", "nodir/a"], "no such directory (at --output nodir/a)"),
        (["identity", "new", "a", "--output_dir", "/dev/null/a"], "not an output directory"),
        (["sealed", "open", "f", "--identity", "k", "--output_dir", "/dev/null/a"], "not an output directory"),
        (["job", "propose", "--partner_input", "c", "--output", "nodir/j"], "no such directory (at --output nodir/j)"),
        (["seal", "data", "r", "--identity", "k", "--output", "nodir/x"], "no such directory (at --output nodir/x)"),
        (["log", "fetch", "nodir/l"], "no such directory (at FILE nodir/l)"),
        (["party", "admit", "p", "--output", "nodir/c"], "no such directory (at --output nodir/c)"),
        (["party", "remove", "p", "--output", "nodir/c"], "no such directory (at --output nodir/c)"),
        (["party", "upgrade", "p", "--file", "nodir/u"], "no such directory (at --file nodir/u)"),
        (["inspect", "--model_name_or_path", "./nowhere"], "no such model directory: got ./nowhere"),
    ],
)
def test_misuse_is_refused(arguments: list[str], message: str, run) -> None:
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ") and message in outcome.err


def test_what_yaml_reads_as_something_else_than_it_says_is_refused(tmp_path: Path, run) -> None:
    path = tmp_path / "run.yaml"
    lines = ("learning_rate: no", "output_dir: on", "seed: 1:30", "lora_r: 010", "overlap: true", "max_steps: true")
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())  # a BOM, which is read over
    outcome = run("finetune", "--config", path)
    assert outcome.code == 2
    for message in (
        "line 1: 'learning_rate': YAML reads no as false",
        "line 2: 'output_dir': YAML reads on as true",
        "line 3: 'seed': YAML reads 1:30 as 90",
        "line 4: 'lora_r': YAML reads 010 as 8",
        "line 6: 'max_steps' is true, and no option that is on or off",
    ):
        assert message in outcome.err
    assert "line 5" not in outcome.err and "unknown" not in outcome.err


def test_items_of_a_list_are_read_as_strictly_as_values(tmp_path: Path, run) -> None:
    path = tmp_path / "run.yaml"
    lines = ("lora_target_modules: [c_fc, on]", "worker: [tcp, 1:30]", "allow_changed: [seed, [data]]", "? [a, b]\n: 1")
    path.write_text("\n".join(lines))
    outcome = run("finetune", "--config", path)
    assert outcome.code == 2
    for message in (
        "line 1: 'lora_target_modules': YAML reads on as true",
        "line 2: 'worker': YAML reads 1:30 as 90",
        "line 3: 'allow_changed' is a list with something else than words and numbers in it",
        "line 4: unknown option 'a list or map'",
    ):
        assert message in outcome.err


def test_a_text_that_looks_like_a_number_stays_what_is_written(tmp_path: Path, run) -> None:
    path = tmp_path / "run.yaml"
    lines = (
        *(
            "adapter_name_or_path: 1.10",
            "prompt: [1.50, 12_345, 7, 1.5]",
            "device: +5",
            "model_name_or_path: 2024",
        ),
        *("max_new_tokens: +4", "temperature: .50", "timeout: 1_000", "top_p: !!float 1"),
    )
    path.write_text("\n".join(lines))
    outcome = run("generate", "--config", path)
    assert outcome.code == 2
    for message in (
        "line 1: 'adapter_name_or_path': YAML reads 1.10 as 1.1; write that, or put quotes around it",
        "line 2: 'prompt': YAML reads 1.50 as 1.5",
        "line 3: 'device': YAML reads +5 as 5",
    ):
        assert message in outcome.err
    assert not any(f"line {number}" in outcome.err for number in range(4, 9)), outcome.err


def test_a_config_file_is_refused_with_all_its_faults_by_line(tmp_path: Path, run) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "learning_rat: 3\nlora_r: many\nmlp: {a: 1}\nseed: 1\nseed: 2\nkeys: rot13\nmax_steps: [3]\nworker: {a: b}\n"
    )
    outcome = run("finetune", "--config", path)
    assert outcome.code == 2
    for message in (
        "line 1: unknown option 'learning_rat', did you mean 'learning_rate'?",
        "line 2: 'lora_r'",
        "line 3: 'mlp' is a map",
        "line 5: 'seed' is there twice",
        "line 6: 'keys'",
        "line 7: 'max_steps' is a list",
        "line 8: 'worker' is a map",
        f"(at {path})",
    ):
        assert message in outcome.err
    assert "line 4" not in outcome.err


@pytest.mark.parametrize(("text", "message"), [("a: [1\n", "run.yaml:2"), ("- a\n", "no map"), (None, "cannot read")])
def test_what_is_no_config_file_is_refused(text: str | None, message: str, tmp_path: Path, run) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    outcome = run("finetune", "--config", path)
    assert outcome.code == 2 and message in outcome.err


def test_the_command_line_wins_over_the_config_file(tmp_path: Path, run) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: ./from-file\ntrain_file: rows.jsonl\noutput_dir: out\nlearning_rate: 1e-3\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    outcome = run("finetune", "--config", path, "--output_dir", tmp_path / "taken")
    assert outcome.code == 2
    assert f"output directory is not empty (at {tmp_path / 'taken'})" in outcome.err


def test_options_of_the_other_side_are_refused(run) -> None:
    ask = ("generate", "--prompt", "a")
    outcome = run(*ask, "--model_name_or_path", "x", "--enclave", "tls://a:1", "--policy", "p", "--allow-simulation")
    assert outcome.code == 2
    assert "options of a model in an enclave: got enclave, policy, allow_simulation" in outcome.err
    outcome = run(*ask, "--job", "job.json", "--profile", "shared", "--mix_rows")
    assert (
        outcome.code == 2 and "options of a model here: got profile, mix_rows, expected those of --job" in outcome.err
    )


def test_no_help_loses_words_in_brackets() -> None:
    """Help is rich's markup, which takes ``[measurements]`` for a style and shows nothing of it."""
    commands, lost = [typer.main.get_command(build_app())], []
    while commands:
        command: Any = commands.pop()
        commands += getattr(command, "commands", {}).values()
        texts = [command.help, command.epilog, *(getattr(parameter, "help", None) for parameter in command.params)]
        lost += [text for text in texts if text and Text.from_markup(text).plain != text]
    assert lost == []
    assert Text.from_markup("a table [measurements] of it").plain != "a table [measurements] of it"
