"""Models to attack, trained in minutes: a public base, private models fine-tuned from it, and an unrelated one.

They are GPT-2 models, or Llama models with grouped kv heads.

Text that every Python has: the documentation strings of its standard library, in the bundled tokenizer's tokens. They
are cut into a public part, of which the base is made; a part like it, which the attacker has; a private one, on which
private models are fine-tuned and which sessions are about; and one of the unrelated model.
"""

import ast
import json
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from obfuscatune.enclave.families import read_decoder
from obfuscatune.errors import UsageError
from obfuscatune.studies.bundled import model_directory
from obfuscatune.studies.reports.files import write_bytes, write_text
from obfuscatune.training.loading import load_config, load_tokenizer

_CHARS = 4_000_000  # of documentation, at most; the standard library has about so much
_OUTLIER = 8.0  # size of the largest feature of the heads, in units of the others
_PARTS = {"public": 0.35, "corpus": 0.15, "private": 0.15, "unrelated": 0.35}


@dataclass(frozen=True, kw_only=True)
class FixtureSettings:
    """Sizes of the models, and how long they are trained; ``base_steps`` of the base and of the unrelated one.

    Attributes:
        architecture: one of `ARCHITECTURES`. kv_heads: of a model whose heads share keys and values.
        distance: of the private model from the base, ``|W - W0| / |W0|`` over all weights of its blocks together: what
            training has changed is scaled to it. None: as training leaves it.
    """

    architecture: str = "gpt2"
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    positions: int = 64
    base_steps: int = 500
    private_steps: int = 100
    batch_size: int = 32
    learning_rate: float = 2e-3
    private_learning_rate: float = 5e-4
    distance: float | None = None


_NEAR = FixtureSettings(width=256, layers=2, heads=8, kv_heads=4, positions=32, base_steps=150, private_steps=40)

# "large" trains for half an hour on two cores, and a cell of 100 tokens per width takes 16 GiB.
SETTINGS = {
    "tiny": FixtureSettings(width=64, layers=2, positions=32, base_steps=150, private_steps=40),
    "small": FixtureSettings(),
    "large": FixtureSettings(width=256, layers=6, heads=8, kv_heads=4, positions=128, base_steps=600),
    # With keys of blocks of 32 (`+key_block=32`), d / b^2 is a quarter; GPT-2 small with the default of 64 has .19.
    "near-0.5": replace(_NEAR, distance=0.005),
    "near-1.5": replace(_NEAR, distance=0.015),
    "near-3.5": replace(_NEAR, distance=0.035),
    "near-10": replace(_NEAR, distance=0.10),
}


def settings_of(model: str, architecture: str) -> FixtureSettings:
    """Return the sizes of that name, of models of that architecture."""
    return replace(SETTINGS[model], architecture=architecture)


@dataclass(frozen=True, repr=False)
class Fixtures:
    """The models of one seed, and text as tokens ``[rows, positions]`` by part."""

    settings: FixtureSettings
    base: Any
    private: Any
    unrelated: Any
    text: dict[str, Tensor]


def load_text(text_file: Path | None = None) -> str:
    """Return the text that fixtures are made of: a file's, or the standard library's documentation.

    Raises:
        UsageError: no such file, or too little in it.
    """
    if text_file is None:
        return "\n".join(_documentation())[:_CHARS]
    try:
        text = text_file.read_text(encoding="utf-8", errors="replace")[:_CHARS]
    except OSError as error:
        raise UsageError("cannot read the text", got=error.strerror, where=str(text_file)) from error
    if len(text) < _CHARS // 10:
        raise UsageError("too little text", got=f"{len(text)} characters", expected=f"{_CHARS // 10}")
    return text


def build(settings: FixtureSettings, seed: int, cache: Path, text: str) -> Fixtures:
    """Return the models of a seed, trained now or found in ``cache``; base and unrelated one serve all seeds."""
    tokens = _tokens(text, cache)
    parts = _split(tokens, settings.positions)
    trained_as = asdict(replace(settings, distance=None))  # one training serves all distances
    key = sha256((json.dumps(trained_as, sort_keys=True) + text).encode()).hexdigest()[:16]

    def trained(name: str, start: Any, part: str, steps: int, rate: float, seed: int) -> Any:
        directory = cache / key / name
        if not (directory / "model.safetensors").is_file():
            model = start()
            _train(name, model, parts[part], steps, rate, settings.batch_size, seed)
            model.config.save_pretrained(directory)
            tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
            write_bytes(directory / "model.safetensors", save(tensors))  # whole, or an interrupted run leaves none
        return _with_outliers(_load(directory)).eval()

    steps, rate = settings.base_steps, settings.learning_rate
    base = trained("base", lambda: _new(settings, 1), "public", steps, rate, 1)
    unrelated = trained("unrelated", lambda: _new(settings, 2), "unrelated", steps, rate, 2)
    private = trained(
        f"private-{seed}",
        lambda: _load(cache / key / "base"),
        "private",
        settings.private_steps,
        settings.private_learning_rate,
        100 + seed,
    )
    if settings.distance is not None:
        bring_near(private, base, settings.distance)
    return Fixtures(settings, base, private, unrelated, parts)


@torch.no_grad()
def bring_near(model: Any, base: Any, distance: float) -> None:
    """Scale what training has changed, so that the blocks' weights are at that relative distance from the base's."""
    pairs = {name: (tensor, base.get_parameter(name)) for name, tensor in model.named_parameters()}
    blocks = [pair for name, pair in pairs.items() if pair[0].ndim == 2 and any(p.isdecimal() for p in name.split("."))]
    moved = sum((ours - theirs).square().sum() for ours, theirs in blocks)
    size = sum(theirs.square().sum() for _, theirs in blocks)
    for ours, theirs in pairs.values():
        ours.copy_(theirs + (ours - theirs) * (distance * (size / moved).sqrt()))


def _load(directory: Path) -> Any:
    tensors = load_file(directory / "model.safetensors")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))  # type: ignore[no-untyped-call]
    model.load_state_dict(tensors, strict=False)  # the head is tied to the embeddings
    return model


@torch.no_grad()
def _with_outliers(model: Any) -> Any:
    """The same function, with one feature of each attention's heads several times as large as the others.

    Models of billions of parameters have such features (arXiv 2208.07339); small ones do not learn them.
    """
    for block in read_decoder(model).blocks:
        attention = block.attention
        if attention is None:
            continue
        shape, layer = attention.shape, attention.first[-1]  # the one with v, which has the last columns
        feature = 5 * block.index % shape.kv_width
        column = layer.shape[1] - shape.kv_width + feature
        layer.weight[:, column] *= _OUTLIER
        if layer.bias is not None:
            layer.bias[column] *= _OUTLIER
        head, place = divmod(feature, shape.head_dim)
        share = shape.heads // shape.kv_heads
        for reader in range(head * share, (head + 1) * share):
            attention.last.weight[reader * shape.head_dim + place] /= _OUTLIER
    return model


def _gpt2(settings: FixtureSettings, common: dict[str, Any]) -> PretrainedConfig:
    # Its attention dropout is off, as what runs outside needs it; so is all other, as models of today have none.
    return GPT2Config(
        n_positions=settings.positions,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **common,
    )


def _llama(settings: FixtureSettings, common: dict[str, Any]) -> PretrainedConfig:
    return LlamaConfig(
        max_position_embeddings=settings.positions,
        hidden_size=settings.width,
        intermediate_size=settings.width * 11 // 4,  # as large models have it: three weights in the MLP instead of two
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        tie_word_embeddings=True,
        **common,
    )


ARCHITECTURES = {"gpt2": _gpt2, "llama": _llama}


def _new(settings: FixtureSettings, seed: int) -> Any:
    common = {"vocab_size": load_config(str(model_directory())).vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    config = ARCHITECTURES[settings.architecture](settings, common)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


def _train(name: str, model: Any, rows: Tensor, steps: int, rate: float, batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in tqdm(range(steps), desc=f"training {name}", unit="step", leave=False):
        ids = rows[torch.randint(len(rows), (batch,), generator=generator)]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _tokens(text: str, cache: Path) -> Tensor:
    path = cache / f"tokens-{sha256(text.encode()).hexdigest()[:16]}.json"
    if not path.is_file():
        directory = str(model_directory())
        tokenizer = load_tokenizer(directory, load_config(directory))
        write_text(path, json.dumps(tokenizer(text, verbose=False)["input_ids"]))
    return torch.tensor(json.loads(path.read_text(encoding="utf-8")))


def _split(tokens: Tensor, positions: int) -> dict[str, Tensor]:
    """Parts take turns, in pieces of eight rows, so that each has all kinds of text and none has another's."""
    pieces = tokens[: len(tokens) // (8 * positions) * 8 * positions].view(-1, 8, positions)
    names = [name for name, share in _PARTS.items() for _ in range(round(share * 20))]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    places = [names[order[i % 20]] for i in range(len(pieces))]
    return {name: pieces[[i for i, place in enumerate(places) if place == name]].flatten(0, 1) for name in _PARTS}


def _documentation() -> Iterator[str]:
    """Documentation strings of the standard library, file after file, its tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if skipped & set(path.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield text
