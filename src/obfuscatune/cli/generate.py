"""``obfuscatune generate``: complete private prompts with a protected model, here or in a job's enclave."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from obfuscatune.cli.connecting import SIMULATION_FLAG, SIMULATION_HELP, EnclaveOptions
from obfuscatune.cli.options import CLAIMS, ConfigOptions, ProtectionOptions, expand_home, option, takes
from obfuscatune.cli.output import check_new_file
from obfuscatune.durable import write_new
from obfuscatune.errors import ObfuscatuneError, ProtocolError, UsageError

if TYPE_CHECKING:  # torch is not loaded for --help
    from obfuscatune.training.data import Prompt

EPILOG = CLAIMS + (
    "Examples:\n\nobfuscatune generate --model_name_or_path gpt2 --prompt 'The enclave said'\n\n"
    "obfuscatune generate --model_name_or_path gpt2 --adapter_name_or_path adapter --prompt_file prompts.jsonl\n\n"
    "obfuscatune generate --model_name_or_path DIR --chat --prompt 'Who wrote this letter?'\n\n"
    "obfuscatune generate --job job.json --prompt '...'"
)
_LONGEST = 32
_GENERATION: dict[str, Any] = {"rich_help_panel": "Generation"}
_OF_HERE = ("dtype", "profile", "worker", "insecure", "device", "threads")
_OF_ENCLAVE = ("party", "enclave", "policy", "allow_simulation")
_ENCLAVE: dict[str, Any] = {"rich_help_panel": "With the model of a job, in the enclave that ran it"}


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
    prompt_file: Path | None = option("JSONL rows with a prompt (a text, or a list of messages) or with messages", None)
    chat: bool = option("treat text prompts as a user's messages, in the model's chat template", False, flag="--chat")
    output_file: Path | None = option("new JSONL file of prompts and completions, mode 0600", None)
    batch_size: int = option("prompts completed together", 8, min=1)
    max_new_tokens: int | None = option(
        f"longest completion; {_LONGEST} if not given, or fewer where the job allows fewer", None, min=1, **_GENERATION
    )
    do_sample: bool = option("sample instead of taking the likeliest", False, flag="--do_sample", **_GENERATION)
    temperature: float | None = option("temperature of sampling, above 0", None, min=1e-6, ceiling=1e6, **_GENERATION)
    top_p: float | None = option("top-p of sampling, above 0 and at most 1", None, min=1e-6, ceiling=1, **_GENERATION)
    num_beams: int = option("beams of beam search", 1, min=1, ceiling=1024, **_GENERATION)
    seed: int = option("seed of sampling; keys are never seeded", 42, min=0, ceiling=2**32 - 1, **_GENERATION)
    job: Path | None = option("the job file", None, **_ENCLAVE)
    party: Path = option("your folder, whose party.toml names enclave, identity and policy", Path("."), **_ENCLAVE)
    enclave: str | None = option("its address, tls://HOST:PORT", None, **_ENCLAVE)
    policy: Path | None = option("TOML file that says which enclaves you accept", None, **_ENCLAVE)
    allow_simulation: bool = option(SIMULATION_HELP, False, flag=SIMULATION_FLAG, **_ENCLAVE)


@takes(GenerateOptions)
def command(options: GenerateOptions) -> None:
    """Complete prompts. Completions go to stdout in the order of the prompts, all else to stderr."""
    if (options.temperature is not None or options.top_p is not None) and not options.do_sample:
        raise UsageError("temperature and top_p are of sampling", hint="add --do_sample")
    check_new_file(options.output_file)
    if (options.job is None) == (options.model_name_or_path is None):
        raise UsageError("which model", expected="--model_name_or_path, or --job of an enclave")
    _check_side(options)
    prompts = _prompts(options)
    if options.model_name_or_path is None:
        completions = _ask_enclave(options, _texts(prompts))
    else:
        completions = _complete_here(options, options.model_name_or_path, prompts)
    if options.output_file is not None:
        from obfuscatune.training.data import completed_row

        rows = zip((prompt for _, prompt in prompts), completions, strict=True)
        _write(options.output_file, [completed_row(prompt, text) for prompt, text in rows])


def _check_side(options: GenerateOptions) -> None:
    """Refuse options of a model here where it is in an enclave, and the other way round: they would have no effect."""
    here = options.job is None
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    given = [name for name in (_OF_ENCLAVE if here else _OF_HERE) if getattr(options, name) != defaults[name]]
    if not here:
        given += [name for name, value in options.switches.items() if value is not None]
    if given:
        what = f"options of a model {'in an enclave' if here else 'here'}"
        expected = f"those of {'--model_name_or_path' if here else '--job'}"
        raise UsageError(what, got=", ".join(given), expected=expected)


def _complete_here(options: GenerateOptions, name: str, prompts: "list[tuple[str, Prompt]]") -> list[str]:
    from transformers import set_seed

    from obfuscatune.enclave.protect import protect
    from obfuscatune.training.completion import complete, prompt_ids
    from obfuscatune.training.loading import load, load_adapter, load_tokenizer

    completions: list[str] = []
    protection = options.protection()
    model = load(name, options.dtype, protection["profile"])
    tokenizer = load_tokenizer(name, model.config)
    tokenizer.padding_side = "left"  # completions continue the last position of every row
    longest = options.max_new_tokens or _LONGEST
    prompt_ids(model.config, tokenizer, prompts, longest)  # a bad prompt is refused before any is done
    if options.adapter_name_or_path is not None:
        model = load_adapter(model, options.adapter_name_or_path)
    set_seed(options.seed)
    with protect(model.eval(), **protection, progress=True) as protected:
        for start in range(0, len(prompts), options.batch_size):
            batch = prompts[start : start + options.batch_size]
            for text in complete(protected.model, tokenizer, batch, max_new_tokens=longest, **_sampling(options)):
                completions.append(text)
                print(text, flush=True)
        print(protected.report(), file=sys.stderr)
    return completions


def _ask_enclave(options: GenerateOptions, prompts: list[str]) -> list[str]:
    """Let the enclave that has run a job complete the prompts, greedily; prints as it goes."""
    if options.do_sample or options.num_beams > 1 or options.adapter_name_or_path is not None:
        hint = "obfuscatune connect samples"
        raise UsageError("an enclave completes greedily here, with the adapter of the job", hint=hint)
    from obfuscatune.parties.job import SignedJob

    connecting = EnclaveOptions(
        party=options.party,
        enclave=options.enclave,
        identity=options.identity,
        policy=options.policy,
        allow_simulation=options.allow_simulation,
        timeout=options.timeout,
    )
    job = SignedJob.load(options.job or Path()).job
    longest = options.max_new_tokens or min(_LONGEST, job.max_new_tokens)
    if longest > job.max_new_tokens:
        expected = f"at most {job.max_new_tokens}, as the job says"
        raise UsageError("longest completion", got=longest, expected=expected, where="--max_new_tokens")
    completions: list[str] = []
    with connecting.connect(job.enclave) as channel:
        for start in range(0, len(prompts), options.batch_size):
            batch = json.dumps(prompts[start : start + options.batch_size]).encode()
            fields = {"op": "generate", "job": job.digest, "max_new_tokens": longest}
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


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSONL for this user only; a new file, because an old one would keep its mode."""
    try:
        write_new(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    except OSError as error:
        raise ObfuscatuneError("cannot write the completions", got=error.strerror, where=str(path)) from error


def _prompts(options: GenerateOptions) -> "list[tuple[str, Prompt]]":
    """Return (where, prompt) of all prompts."""
    from obfuscatune.training.data import read_prompts
    from obfuscatune.training.jsonl import check_text

    if not options.prompt and options.prompt_file is None:
        raise UsageError("no prompt", expected="--prompt TEXT or --prompt_file FILE")
    found: list[tuple[str, Prompt]] = []
    for number, prompt in enumerate(options.prompt or (), 1):
        found.append((f"--prompt {number}", check_text(prompt, "prompt", f"--prompt {number}")))
    if options.prompt_file is not None:
        found += read_prompts(options.prompt_file)
    if options.chat:
        found = [(where, (("user", p),) if isinstance(p, str) else p) for where, p in found]
    return found


def _texts(prompts: "list[tuple[str, Prompt]]") -> list[str]:
    """Return the prompts for an enclave, which is asked with texts."""
    texts = [prompt for _, prompt in prompts if isinstance(prompt, str)]
    if len(texts) < len(prompts):
        hint = "seal the messages with `obfuscatune seal prompts`, for the job itself to complete"
        raise UsageError("an enclave is asked with texts", got="messages", hint=hint)
    return texts


def _sampling(options: GenerateOptions) -> dict[str, Any]:
    sampling = {"temperature": options.temperature, "top_p": options.top_p} if options.do_sample else {}
    return {"do_sample": options.do_sample, "num_beams": options.num_beams, **sampling}
