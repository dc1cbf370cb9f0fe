"""What people do with a model of transformers and PEFT: each use is run on the plain model and on the protected one.

A use gets a model with LoRA on all linear layers and returns a tensor. `REFUSED` says under which profiles it is
refused; under all others it is equal to the plain model. Reading uses leave a model as it was; changing ones do not.
"""

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from transformers import DataCollatorWithFlattening, DynamicCache, Trainer, TrainingArguments

from .families import adapted, model_of
from .models import randomize_lora, scalar, tokens

Use = Callable[[Any], Tensor]
READING: dict[str, Use] = {}
CHANGING: dict[str, Use] = {}
REFUSED: dict[str, frozenset[str]] = {}

ALL = frozenset({"plain", "naive", "paper", "balanced", "strict", "stream", "shared"})
WHOLE = frozenset({"plain", "balanced", "stream"})  # attention and MLP on the worker
STREAM = frozenset({"stream"})
HELD = frozenset({"paper", "naive"})  # LoRA trained on the worker
FOLDED = frozenset({"balanced", "stream"})
NOBODY: frozenset[str] = frozenset()


def use(refused: frozenset[str], *, reading: bool = False) -> Callable[[Use], Use]:
    def note(function: Use) -> Use:
        add(function.__name__, function, refused, reading=reading)
        return function

    return note


def add(name: str, function: Use, refused: frozenset[str], *, reading: bool = False) -> None:
    (READING if reading else CHANGING)[name] = function
    REFUSED[name] = refused


# A model's parts, by whatever name its family has for them


def base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_gpt2(model: Any) -> bool:
    return bool(base_of(model).config.model_type == "gpt2")


def blocks(model: Any) -> Any:
    base = base_of(model)
    return base.transformer.h if is_gpt2(model) else base.model.layers


def norm(model: Any) -> Any:
    block = blocks(model)[0]
    return block.ln_1 if is_gpt2(model) else block.input_layernorm


def attention(model: Any) -> Any:
    block = blocks(model)[0]
    return block.attn if is_gpt2(model) else block.self_attn


def loras(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def lora(model: Any, **options: Any) -> LoraConfig:
    targets = ["c_attn"] if is_gpt2(model) else ["q_proj"]
    return LoraConfig(**{"r": 2, "target_modules": targets, "fan_in_fan_out": is_gpt2(model), **options})


def logits(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens(2, 6), **more).logits
    return found


# Arguments of a forward


def argument(name: str, value: Any, refused: frozenset[str]) -> None:
    add(f"{name}={value}", lambda model: logits(model, **{name: value}), refused, reading=True)


argument("is_causal", False, WHOLE)
argument("is_causal", True, NOBODY)
argument("use_cache", False, NOBODY)
argument("logits_to_keep", 2, NOBODY)
argument("no_such_argument", False, WHOLE)
argument("tokenizer", "of stop_strings", NOBODY)
argument("seq_idx", 0, NOBODY)


@use(NOBODY, reading=True)
def position_ids(model: Any) -> Tensor:
    return logits(model, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]))


@use(NOBODY, reading=True)
def packed(model: Any) -> Tensor:
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)  # of TRL's packing, which has seq_idx too
    batch = collate([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6, 7]}])
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found


@use(NOBODY, reading=True)
def conversation(model: Any) -> Tensor:
    """Two turns of generation with one cache."""
    cache = DynamicCache(config=base_of(model).config)
    ids = model.generate(tokens(2, 6), max_new_tokens=3, past_key_values=cache, do_sample=False)
    ids = torch.cat([ids, tokens(2, 3, seed=4)], dim=1)
    found: Tensor = model.generate(ids, max_new_tokens=4, past_key_values=cache, do_sample=False)
    return found


@use(NOBODY, reading=True)
def assisted(model: Any) -> Tensor:
    draft = model_of("gpt2" if is_gpt2(model) else "llama", lora=False, seed=3)
    both = ((model, draft), (draft, base_of(model)))
    how: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    return torch.stack([one.generate(tokens(1, 6), assistant_model=other, **how) for one, other in both])


@use(NOBODY, reading=True)
def functional_call(model: Any) -> Tensor:
    values = {name: p.detach() * 1.5 for name, p in model.named_parameters() if "lora_" in name}
    with torch.no_grad():
        found: Tensor = torch.func.functional_call(model, values, (tokens(2, 6),)).logits
    return found


@use(ALL, reading=True)
def functional_gradient(model: Any) -> Tensor:
    values = {name: p.detach() for name, p in model.named_parameters() if "lora_B" in name}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return scalar(torch.func.functional_call(model, values, (tokens(2, 6),)).logits)

    return torch.cat([gradient.flatten() for gradient in torch.func.grad(loss)(values).values()])


@use(ALL, reading=True)
def forward_mode(model: Any) -> Tensor:
    rows = base_of(model).get_input_embeddings()(tokens(2, 6)).detach()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        found = model(inputs_embeds=forward_ad.make_dual(rows, rows.cos()), use_cache=False).logits
        tangent: Tensor = forward_ad.unpack_dual(found).tangent
    return tangent


def called_alone(name: str, find: Callable[[Any], nn.Module], refused: frozenset[str]) -> None:
    def call(model: Any) -> Tensor:
        rows, more = base_of(model).get_input_embeddings()(tokens(2, 6)), {}
        if not is_gpt2(model) and name != "an MLP":
            more = {"position_embeddings": base_of(model).model.rotary_emb(rows, torch.arange(6)[None])}
            more |= {"attention_mask": None}
        found = find(model)(rows, **more)
        return found[0] if isinstance(found, tuple) else found

    add(f"{name} alone", call, refused, reading=True)


called_alone("the first block", lambda model: blocks(model)[0], STREAM)
called_alone("the last block", lambda model: blocks(model)[-1], STREAM)
called_alone("an attention", lambda model: attention(model), FOLDED)
called_alone("an MLP", lambda model: blocks(model)[0].mlp, FOLDED)


@use(NOBODY, reading=True)
def labels(model: Any) -> Tensor:
    with torch.no_grad():
        loss: Tensor = model(input_ids=tokens(2, 6), labels=tokens(2, 6)).loss
    return loss


@use(WHOLE, reading=True)
def mask_of_each_head(model: Any) -> Tensor:
    mask = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(3)) > 0.5
    return logits(model, attention_mask=(mask | torch.eye(6).bool()).tril())


@use(NOBODY, reading=True)
def mask_of_each_row(model: Any) -> Tensor:
    mask = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(3)) > 0.5
    return logits(model, attention_mask=(mask | torch.eye(6).bool()).tril())


@use(STREAM, reading=True)
def hidden_states(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.stack(model(tokens(2, 6), output_hidden_states=True).hidden_states)


@use(NOBODY, reading=True)
def gradient_of_inputs(model: Any) -> Tensor:
    embedded = base_of(model).get_input_embeddings()(tokens(2, 6)).detach().requires_grad_()
    gradient: Tensor = torch.autograd.grad(model(inputs_embeds=embedded).logits.square().sum(), embedded)[0]
    return gradient


@use(NOBODY, reading=True)
def gradient_with_a_graph(model: Any) -> Tensor:
    embedded = base_of(model).get_input_embeddings()(tokens(2, 6)).detach().requires_grad_()
    value = model(inputs_embeds=embedded).logits.square().sum()
    gradient: Tensor = torch.autograd.grad(value, embedded, create_graph=True)[0].detach()
    return gradient


@use(WHOLE | HELD, reading=True)
def retained_graph(model: Any) -> Tensor:
    embedded = base_of(model).get_input_embeddings()(tokens(2, 6)).detach().requires_grad_()
    value = model(inputs_embeds=embedded).logits.square().sum()
    once, again = (torch.autograd.grad(value, embedded, retain_graph=keep)[0] for keep in (True, False))
    both: Tensor = once + again
    return both


@use(ALL)
def gradient_penalty(model: Any) -> Tensor:
    base_of(model).set_attn_implementation("eager")  # torch's fused attention has no second derivative
    embedded = base_of(model).get_input_embeddings()(tokens(2, 6)).detach().requires_grad_()
    value = model(inputs_embeds=embedded).logits.square().sum()
    (gradient,) = torch.autograd.grad(value, embedded, create_graph=True)
    second: Tensor = torch.autograd.grad(gradient.square().sum(), embedded)[0]
    return second


@use(HELD, reading=True)
def gradients_with_hooks(model: Any) -> Tensor:
    seen = []
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    handles = [p.register_hook(lambda gradient: 0.5 * gradient) for p in factors]
    handles += [p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.flatten())) for p in factors]
    try:
        scalar(model(tokens(2, 6)).logits).backward()
    finally:
        model.zero_grad()
        for handle in handles:
            handle.remove()
    return torch.stack(sorted(seen, key=lambda gradient: float(gradient.norm()))[-1:])


@use(NOBODY, reading=True)
def adapter_disabled(model: Any) -> Tensor:
    with model.disable_adapter():
        return logits(model)


@use(NOBODY, reading=True)
def scale_for_a_while(model: Any) -> Tensor:
    with rescale_adapter_scale(model, 0.3):
        scaled = logits(model)
    return torch.stack([scaled, logits(model)])


@use(ALL, reading=True)
def merged(model: Any) -> Tensor:
    model.merge_adapter()
    found = logits(model)
    model.unmerge_adapter()
    return found


# Copies, conversions and compilation


@use(ALL, reading=True)
def pickled(model: Any) -> Tensor:
    return logits(pickle.loads(pickle.dumps(model)))  # noqa: S301 - our own


@use(ALL, reading=True)
def saved_by_torch(model: Any) -> Tensor:
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return logits(torch.load(file, weights_only=False))


@use(ALL, reading=True)
def copied(model: Any) -> Tensor:
    return logits(copy.deepcopy(model))


@use(ALL, reading=True)
def compiled(model: Any) -> Tensor:
    torch.compiler.reset()  # after some refusals it would give up and run the model as it is, which is right too
    return logits(torch.compile(model, backend="eager"))


@use(ALL, reading=True)
def base_saved(model: Any) -> Tensor:
    with tempfile.TemporaryDirectory() as directory:
        base_of(model).save_pretrained(directory)
    return torch.ones(1)


@use(ALL, reading=True)
def converted(model: Any) -> Tensor:
    dtype = next(model.parameters()).dtype
    model.to(torch.float32 if dtype == torch.float64 else torch.float64)
    found = logits(model).to(dtype)
    model.to(dtype)
    return found


@use(ALL, reading=True)
def moved(model: Any) -> Tensor:
    model.to("meta")
    raise AssertionError("a model without numbers is not a result")


@use(NOBODY, reading=True)
def converted_to_what_it_is(model: Any) -> Tensor:
    return logits(model.to(next(model.parameters()).dtype).cpu())


@use(ALL, reading=True)
def base_weights_loaded(model: Any) -> Tensor:
    name = "transformer.h.0.mlp.c_fc" if is_gpt2(model) else "model.layers.0.mlp.up_proj"
    weight = model_of("gpt2" if is_gpt2(model) else "llama", lora=False, seed=5).get_submodule(name).weight
    model.load_state_dict({f"base_model.model.{name}.base_layer.weight": weight}, strict=False)
    return logits(model)


# Hooks, and modules that are changed


def hook(name: str, find: Callable[[Any], nn.Module], refused: frozenset[str]) -> None:
    def hooked(model: Any) -> Tensor:
        def triple(module: Any, args: Any, output: Any) -> Any:
            return (3 * output[0], *output[1:]) if isinstance(output, tuple) else 3 * output

        find(model).register_forward_hook(triple)
        return logits(model)

    add(f"hook on {name}", hooked, refused)


hook("a LoRA layer", lambda model: loras(model)[0], WHOLE)
hook("a layer in LoRA", lambda model: loras(model)[0].base_layer, WHOLE | HELD)
hook("A", lambda model: loras(model)[0].lora_A["default"], WHOLE | HELD)
hook("B", lambda model: loras(model)[-1].lora_B["default"], WHOLE | HELD)
hook("dropout of a last layer", lambda model: loras(model)[-1].lora_dropout["default"], WHOLE | HELD)
hook("dropout of a first layer", lambda model: loras(model)[0].lora_dropout["default"], STREAM | HELD)
hook("attention", attention, STREAM)
hook("a block", lambda model: blocks(model)[1], STREAM)
hook("a norm", norm, FOLDED)
hook("the embeddings", lambda model: base_of(model).get_input_embeddings(), NOBODY)


@use(ALL)
def hook_on_all_modules(model: Any) -> Tensor:
    handle = register_module_forward_hook(lambda module, args, output: 3 * output if type(output) is Tensor else None)
    try:
        return logits(model)
    finally:
        handle.remove()


@use(ALL)
def weights_drawn_anew(model: Any) -> Tensor:
    torch.manual_seed(0)
    base_of(model).init_weights()
    return logits(model)


@use(STREAM)
def block_removed(model: Any) -> Tensor:
    del blocks(model)[1]
    base_of(model).config.num_hidden_layers = 1
    return logits(model)


@use(STREAM)
def mlp_replaced(model: Any) -> Tensor:
    blocks(model)[0].mlp = nn.Identity()
    return logits(model)


@use(FOLDED)
def norm_scaled(model: Any) -> Tensor:
    with torch.no_grad():
        norm(model).weight.mul_(2)
    return logits(model)


@use(FOLDED)
def norm_scaled_behind_autograd(model: Any) -> Tensor:
    norm(model).weight.data.mul_(2)
    return logits(model)


@use(FOLDED)
def norm_replaced(model: Any) -> Tensor:
    norm(model).weight = nn.Parameter(norm(model).weight.detach() * 2)
    return logits(model)


@use(FOLDED)
def norm_trained(model: Any) -> Tensor:
    norm(model).weight.requires_grad_(True)
    scalar(model(tokens(2, 6)).logits).backward()
    gradient: Tensor = norm(model).weight.grad
    return gradient


@use(WHOLE)
def attention_scaled(model: Any) -> Tensor:
    attention(model).scaling = 0.123
    return logits(model)


@use(WHOLE)
def activation_replaced(model: Any) -> Tensor:
    setattr(blocks(model)[0].mlp, "act" if is_gpt2(model) else "act_fn", nn.ReLU())
    return logits(model)


@use(FOLDED)
def epsilon_of_a_norm(model: Any) -> Tensor:
    setattr(norm(model), "eps" if is_gpt2(model) else "variance_epsilon", 0.5)
    return logits(model)


@use(WHOLE)
def forward_of_a_lora_layer(model: Any) -> Tensor:
    layer = loras(model)[0]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: 3 * own(*args, **kwargs)
    return logits(model)


def trained(model: Any) -> Tensor:
    torch.manual_seed(3)
    return logits(model.train())


@use(WHOLE)
def attention_dropout(model: Any) -> Tensor:
    if is_gpt2(model):
        attention(model).attn_dropout.p = 0.3
    else:
        attention(model).attention_dropout = 0.3
    return trained(model)


@use(WHOLE | HELD)
def lora_dropout(model: Any) -> Tensor:
    for layer in loras(model):
        layer.lora_dropout["default"] = nn.Dropout(0.3)
    return trained(model)


@use(NOBODY)
def lora_dropout_of_evaluation(model: Any) -> Tensor:
    for layer in loras(model):
        layer.lora_dropout["default"] = nn.Dropout(0.3)
    return logits(model.eval())


@use(WHOLE | HELD)
def factor_with_a_bias(model: Any) -> Tensor:
    old = loras(model)[0].lora_B["default"]
    new = nn.Linear(old.in_features, old.out_features, dtype=old.weight.dtype)
    nn.init.constant_(new.weight, 0.1)
    nn.init.constant_(new.bias, 0.2)
    loras(model)[0].lora_B["default"] = new
    return logits(model)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@use(NOBODY)
def factor_with_a_parametrization(model: Any) -> Tensor:
    parametrize.register_parametrization(loras(model)[0].lora_B["default"], "weight", Doubled())
    return logits(model)


@use(NOBODY)
def head_replaced(model: Any) -> Tensor:
    before, head = logits(model), base_of(model).lm_head
    base_of(model).lm_head = other = nn.Linear(head.in_features, 5, dtype=head.weight.dtype)
    nn.init.constant_(other.weight, 0.3)
    nn.init.constant_(other.bias, 0.1)
    return torch.cat([before, logits(model)], dim=-1)


@use(HELD)
def resumed_and_the_best_loaded(model: Any) -> Tensor:
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 6, seed=5)]
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.3}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    with tempfile.TemporaryDirectory() as directory:
        for steps in (1, 3):
            arguments = TrainingArguments(
                directory, max_steps=steps, per_device_train_batch_size=2, save_steps=1, **best, **quiet
            )
            trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:2])
            trainer.train(resume_from_checkpoint=True if steps == 3 else None)
    return logits(model.eval())


@use(WHOLE)
def attention_in_both_directions(model: Any) -> Tensor:
    model.config.is_causal = False
    return logits(model)


@use(NOBODY)
def eager_attention(model: Any) -> Tensor:
    base_of(model).set_attn_implementation("eager")
    return logits(model)


@use(NOBODY)
def more_tokens(model: Any) -> Tensor:
    torch.manual_seed(0)
    base_of(model).resize_token_embeddings(41, mean_resizing=False)
    return logits(model)[..., :37]


@use(HELD)  # there a stock optimizer is refused, and what the worker trains has no gradient here
def half_of_lora_frozen(model: Any) -> Tensor:
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    scalar(model(tokens(2, 6)).logits).backward()
    optimizer.step()
    return logits(model)


@use(ALL)
def all_trained(model: Any) -> Tensor:
    for p in model.parameters():
        p.requires_grad_(True)
    scalar(model(tokens(2, 6)).logits).backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    return logits(model)


@use(HELD)
def clipped_by_value(model: Any) -> Tensor:
    trained = [p for p in model.parameters() if p.requires_grad]
    scalar(model(tokens(2, 6)).logits).backward()
    nn.utils.clip_grad_value_(trained, 0.01)
    torch.optim.SGD(trained, lr=0.01).step()
    return logits(model)


# Adapters that come, change and go


@use(NOBODY)
def unloaded(model: Any) -> Tensor:
    return logits(model.unload())


def after_a_prefix(model: Any, change: Callable[[], None]) -> Tensor:
    """Logits of tokens that go on from cached ones, one by one, with a change before the last."""
    ids = tokens(2, 6)
    with torch.no_grad():
        cache = model(ids[:, :3], use_cache=True).past_key_values
        found = [model(ids[:, 3:4], past_key_values=cache).logits]
        change()
        found += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in (4, 5)]
    return torch.cat(found, dim=1)


@use(NOBODY)
def factors_written_after_a_prefix(model: Any) -> Tensor:
    def change() -> None:
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.mul_(-2)

    return after_a_prefix(model, change)


@use(FOLDED)
def norm_written_after_a_prefix(model: Any) -> Tensor:
    def change() -> None:
        norm(model).weight.data.mul_(2)

    return after_a_prefix(model, change)


@use(NOBODY)
def factors_written_between_turns(model: Any) -> Tensor:
    cache, how = DynamicCache(config=base_of(model).config), {"max_new_tokens": 4, "do_sample": False}
    ids = model.generate(tokens(2, 6), past_key_values=cache, **how)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.mul_(-2)
    found: Tensor = model.generate(ids, past_key_values=cache, **how)
    return found


@use(NOBODY)
def scaled(model: Any) -> Tensor:
    logits(model)
    for layer in loras(model):
        layer.set_scale("default", 3.0)
    return logits(model)


@use(NOBODY)
def hot_swapped(model: Any) -> Tensor:
    other = adapted(model_of("gpt2" if is_gpt2(model) else "llama", lora=False), lora_alpha=11)
    randomize_lora(other, seed=31)
    logits(model)
    with tempfile.TemporaryDirectory() as directory:
        other.save_pretrained(directory)
        hotswap_adapter(model, directory, "default", torch_device="cpu")
    return logits(model)


def second_adapter(name: str, refused: frozenset[str], **options: Any) -> None:
    def added(model: Any) -> Tensor:
        model.add_adapter("second", lora(model, **options))
        randomize_lora(model, seed=9, adapter="second")
        for path, parameter in model.named_parameters():
            if ".second." in path and path.endswith("bias"):
                parameter.data.fill_(0.3)
            elif "modules_to_save.second" in path:
                parameter.data.mul_(2)
        model.set_adapter("second")
        return logits(model)

    add(f"adapter with {name}", added, refused)


second_adapter("fewer layers", HELD)
second_adapter("all layers", HELD, target_modules="all-linear")
second_adapter("rank-stabilized scale", HELD, use_rslora=True)
second_adapter("ranks of its own", HELD, rank_pattern={"h.0": 3, "layers.0": 3})
second_adapter("DoRA", ALL, use_dora=True)
second_adapter("a bias of LoRA", WHOLE | HELD | {"strict", "shared"}, lora_bias=True)
second_adapter("OLoRA's start", ALL, init_lora_weights="orthogonal")
second_adapter("activation by tokens", ALL, alora_invocation_tokens=[3])
second_adapter("a trained head", HELD, modules_to_save=["lm_head"])
second_adapter("trained tokens", HELD, trainable_token_indices=[1, 2])
second_adapter("a copy of an MLP", ALL, modules_to_save=["mlp"])


@use(FOLDED | HELD)
def adapter_with_trained_norms(model: Any) -> Tensor:
    name = "ln_1" if is_gpt2(model) else "input_layernorm"
    model.add_adapter("second", lora(model, modules_to_save=[name]))
    randomize_lora(model, seed=9, adapter="second")
    model.set_adapter("second")
    for path, parameter in model.named_parameters():
        if "modules_to_save.second" in path:
            parameter.data.mul_(2)
    return logits(model)


@use(WHOLE | HELD)
def two_adapters_at_once(model: Any) -> Tensor:
    model.add_adapter("second", lora(model))
    randomize_lora(model, seed=9, adapter="second")
    model.base_model.set_adapter(["default", "second"])
    return logits(model)


@use(HELD)
def adapters_joined(model: Any) -> Tensor:
    model.add_adapter("second", lora(model, r=3, target_modules="all-linear"))
    randomize_lora(model, seed=9, adapter="second")
    model.add_weighted_adapter(["default", "second"], [0.5, 0.7], "joined", combination_type="linear")
    model.set_adapter("joined")
    return logits(model)


@use(HELD)
def adapter_deleted(model: Any) -> Tensor:
    model.add_adapter("second", lora(model))
    randomize_lora(model, seed=9, adapter="second")
    model.set_adapter("second")
    model.delete_adapter("default")
    return logits(model)


def tuner(name: str, refused: frozenset[str], make: Callable[[Any], Any]) -> None:
    def tuned(model: Any) -> Tensor:
        base = model.unload()
        torch.manual_seed(0)
        other = get_peft_model(base, make(base)).to(next(base.parameters()).dtype)
        generator = torch.Generator().manual_seed(4)
        for path, parameter in other.named_parameters():
            if parameter.requires_grad and "anchor" not in path:
                parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return logits(other.eval())

    add(f"then {name}", tuned, refused)


CAUSAL = {"task_type": "CAUSAL_LM"}
tuner("LoRA anew", ALL, lora)
tuner("prompt tuning", NOBODY, lambda model: PromptTuningConfig(num_virtual_tokens=3, **CAUSAL))
tuner("p-tuning", NOBODY, lambda model: PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **CAUSAL))
tuner("prefix tuning", WHOLE, lambda model: PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL))
tuner("adaption prompt", ALL, lambda model: AdaptionPromptConfig(adapter_len=3, adapter_layers=1, **CAUSAL))
tuner(
    "IA3",
    ALL,
    lambda model: IA3Config(
        target_modules=["c_attn" if is_gpt2(model) else "k_proj"],
        feedforward_modules=[],
        fan_in_fan_out=is_gpt2(model),
    ),
)
tuner(
    "VeRA",
    ALL,
    lambda model: VeraConfig(
        r=2, target_modules=["c_attn" if is_gpt2(model) else "q_proj"], fan_in_fan_out=is_gpt2(model)
    ),
)
tuner(
    "trained norms",
    FOLDED,
    lambda model: LNTuningConfig(target_modules=["ln_1" if is_gpt2(model) else "input_layernorm"]),
)
tuner(
    "a trained last norm", NOBODY, lambda model: LNTuningConfig(target_modules=["ln_f" if is_gpt2(model) else "norm"])
)
