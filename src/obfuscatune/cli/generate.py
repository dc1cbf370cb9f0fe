"""``obfuscatune generate``: complete private prompts with a protected model, here or in a job's enclave."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from obfuscatune.cli.connecting import SIMULATION_FLAG, SIMULATION_HELP, EnclaveOptions
from obfuscatune.cli.options import ConfigOptions, ProtectionOptions, expand_home, option, takes
from obfuscatune.durable import write_new
from obfuscatune.errors import ObfuscatuneError, ProtocolError, UsageError

EPILOG = (
    "Examples:\n\nobfuscatune generate --model_name_or_path gpt2 --prompt 'The enclave said'\n\n"
    "obfuscatune generate --model_name_or_path gpt2 --adapter_name_or_path adapter --prompt_file prompts.jsonl\n\n"
    "obfuscatune generate --enclave tls://HOST:7443 --job job.json --identity clinic.key --policy clinic.toml "
    "--prompt '...'"
)
_GENERATION: dict[str, Any] = {"rich_help_panel": "Generation"}
_ENCLAVE: dict[str, Any] = {"rich_help_panel": "With the model of a job, in the enclave that has run it"}


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ProtectionOptions, ConfigOptions):
    """Options of ``obfuscatune generate``; names as in transformers' ``GenerationConfig``."""

    model_name_or_path: str | None = option(
        "directory, or name on the hub, of a causal language model", None, callback=expand_home
    )
    dtype: Literal["float32", "float64", "bfloat16"] = option("dtype of its weights", "float32")
    adapter_name_or_path: str | None = option(
        "directory, or name on the hub, of a PEFT adapter", None, callback=expand_home
    )
    prompt: list[str] | None = option("text to complete; repeatable", None)
    prompt_file: Path | None = option("JSONL rows with a prompt", None)
    output_file: Path | None = option("new JSONL file of prompts and completions, mode 0600", None)
    batch_size: int = option("prompts completed together", 8, min=1)
    max_new_tokens: int = option("longest completion", 32, min=1, **_GENERATION)
    do_sample: bool = option("sample instead of taking the likeliest", False, flag="--do_sample", **_GENERATION)
    temperature: float | None = option("of sampling", None, **_GENERATION)
    top_p: float | None = option("of sampling", None, **_GENERATION)
    num_beams: int = option("beams of beam search", 1, min=1, **_GENERATION)
    seed: int = option("of sampling; keys are never seeded", 42, min=0, **_GENERATION)
    enclave: str | None = option("its address, tls://HOST:PORT", None, **_ENCLAVE)
    job: Path | None = option("the job file", None, **_ENCLAVE)
    identity: Path | None = option("your NAME.key", None, **_ENCLAVE)
    policy: Path | None = option("TOML file that says which enclaves you accept", None, **_ENCLAVE)
    allow_simulation: bool = option(SIMULATION_HELP, False, flag=SIMULATION_FLAG, **_ENCLAVE)


@takes(GenerateOptions)
def command(options: GenerateOptions) -> None:
    """Complete prompts. Completions go to stdout in the order of the prompts, all else to stderr."""
    if (options.temperature is not None or options.top_p is not None) and not options.do_sample:
        raise UsageError("temperature and top_p are of sampling", hint="add --do_sample")
    if options.output_file is not None:
        _check_output(options.output_file)
    if (options.enclave is None) == (options.model_name_or_path is None):
        raise UsageError("which model", expected="--model_name_or_path, or --enclave with --job")
    prompts = list(_prompts(options))
    if options.model_name_or_path is None:
        completions = _ask_enclave(options, [prompt for _, prompt in prompts])
    else:
        completions = _complete_here(options, options.model_name_or_path, prompts)
    if options.output_file is not None:
        rows = zip((prompt for _, prompt in prompts), completions, strict=True)
        _write(options.output_file, [{"prompt": prompt, "completion": text} for prompt, text in rows])


def _complete_here(options: GenerateOptions, name: str, prompts: list[tuple[str, str]]) -> list[str]:
    from transformers import set_seed

    from obfuscatune.enclave.protect import protect
    from obfuscatune.training.completion import complete
    from obfuscatune.training.loading import load_adapter, load_model, load_tokenizer

    completions: list[str] = []
    model = load_model(name, options.dtype)
    tokenizer = load_tokenizer(name, model.config)
    tokenizer.padding_side = "left"  # completions continue the last position of every row
    if options.adapter_name_or_path is not None:
        model = load_adapter(model, options.adapter_name_or_path)
    set_seed(options.seed)
    with protect(model.eval(), **options.protection(), progress=True) as protected:
        for start in range(0, len(prompts), options.batch_size):
            batch = prompts[start : start + options.batch_size]
            for text in complete(
                protected.model, tokenizer, batch, max_new_tokens=options.max_new_tokens, **_sampling(options)
            ):
                completions.append(text)
                print(text, flush=True)
        print(protected.report(), file=sys.stderr)
    return completions


def _ask_enclave(options: GenerateOptions, prompts: list[str]) -> list[str]:
    """Let the enclave that has run a job complete the prompts, greedily; prints as it goes."""
    if options.job is None or options.identity is None or options.policy is None:
        raise UsageError("an enclave is asked with a job", expected="--job, --identity and --policy")
    if options.do_sample or options.num_beams > 1 or options.adapter_name_or_path is not None:
        raise UsageError("an enclave completes greedily, with the adapter of the job")
    from obfuscatune.parties.job import SignedJob

    connecting = EnclaveOptions(
        enclave=options.enclave or "",
        identity=options.identity,
        policy=options.policy,
        allow_simulation=options.allow_simulation,
        timeout=options.timeout,
    )
    job = SignedJob.load(options.job).job
    completions: list[str] = []
    with connecting.connect(job.enclave) as channel:
        for start in range(0, len(prompts), options.batch_size):
            batch = json.dumps(prompts[start : start + options.batch_size]).encode()
            fields = {"op": "generate", "job": job.digest, "max_new_tokens": options.max_new_tokens}
            fields["wait"] = options.timeout
            _, payload = channel.request(fields, batch)
            for text in _completions(payload, len(prompts[start : start + options.batch_size])):
                completions.append(text)
                print(text, flush=True)
    return completions


def _completions(payload: bytes, count: int) -> list[str]:
    try:
        texts = json.loads(payload)
    except ValueError:
        texts = None
    if not isinstance(texts, list) or len(texts) != count or not all(isinstance(text, str) for text in texts):
        raise ProtocolError("enclave's reply is no list of completions", expected=f"{count} texts")
    return texts


def _check_output(path: Path) -> None:
    if path.exists() or not path.parent.is_dir():
        what = "file is there already" if path.exists() else "no such directory"
        raise UsageError(what, where=f"--output_file {path}")


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write JSONL for this user only; a new file, because an old one would keep its mode."""
    try:
        write_new(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    except OSError as error:
        raise ObfuscatuneError("cannot write the completions", got=error.strerror, where=str(path)) from error


def _prompts(options: GenerateOptions) -> Iterator[tuple[str, str]]:
    """Yield (where, prompt) of all prompts."""
    from obfuscatune.training.data import EXTRA_KEYS, check_keys, check_text, read_objects

    if not options.prompt and options.prompt_file is None:
        raise UsageError("no prompt", expected="--prompt TEXT or --prompt_file FILE")
    for number, prompt in enumerate(options.prompt or (), 1):
        yield f"--prompt {number}", check_text(prompt, "prompt", f"--prompt {number}")
    for where, row in read_objects(options.prompt_file) if options.prompt_file is not None else ():
        check_keys(row, frozenset({"prompt"}), EXTRA_KEYS | {"completion"}, where)
        yield where, check_text(row["prompt"], "prompt", where)


def _sampling(options: GenerateOptions) -> dict[str, Any]:
    sampling = {"temperature": options.temperature, "top_p": options.top_p} if options.do_sample else {}
    return {"do_sample": options.do_sample, "num_beams": options.num_beams, **sampling}
