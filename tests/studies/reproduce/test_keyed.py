"""The one-process form under keys is the plain model in float64, rounds where it says, and trains what it says."""

from typing import Any

import pytest
import torch

from obfuscatune.errors import UsageError
from obfuscatune.studies.bundled import model_directory
from obfuscatune.studies.reproduce.fidelity import compare
from obfuscatune.studies.reproduce.keyed import add_adapters, key_model, key_switches, product, rounded
from obfuscatune.studies.reproduce.lesson import Lesson, ask, teach
from obfuscatune.studies.reproduce.one_layer import EXPECTED, EXPECTED_WIDTH, layer_errors
from obfuscatune.training.loading import load_config, load_model, load_tokenizer

NAME = str(model_directory())
EXACT = 1e-9  # float64, Gaussian keys included; measured 4e-13
WINDOWS = torch.randint(2048, (1, 24), generator=torch.Generator().manual_seed(0))


def keyed(keys: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    model = load_model(NAME, "float32").eval()
    key_model(model, keys, dtype=dtype, seed=0, **options)
    return model


def error(model: Any) -> float:
    return compare(model, load_model(NAME, "float64").eval(), WINDOWS).error


@pytest.mark.parametrize("keys", ["none", "1", "160", "gaussian"])
def test_float64_is_the_plain_model(keys: str) -> None:
    assert error(keyed(keys)) < EXACT


def test_a_wrong_key_is_no_model() -> None:
    model = keyed("1")
    layer = model.transformer.h[0].attn.c_attn
    layer.encoding.copy_(layer.encoding[:, torch.randperm(layer.encoding.shape[1])])
    assert error(model) > 0.1


def test_only_the_layers_of_profile_paper_are_keyed_and_only_on_their_side() -> None:
    block = keyed("1").transformer.h[0]
    keyed_in = [layer.encoding is not None for layer in (block.attn.c_attn, block.attn.c_proj)]
    keyed_out = [layer.decoding is not None for layer in (block.mlp.c_fc, block.mlp.c_proj)]
    assert keyed_in == [True, False]
    assert keyed_out == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_is_the_rounded_product_of_rounded_factors(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, matrix = (torch.randn(16, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    found = product(x.to(dtype), rounded(matrix, dtype))
    exact = x.to(dtype).double() @ matrix.to(dtype).double()
    assert found.dtype == dtype
    assert torch.allclose(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert not torch.allclose(found.double(), x @ matrix, rtol=torch.finfo(torch.float32).eps)


def test_precision_and_condition_number_decide_the_error() -> None:
    low = [error(keyed(keys, torch.bfloat16)) for keys in ("1", "160", "1024")]
    assert low[0] < low[1] / 2 < low[2] / 4
    assert error(keyed("1024", torch.float32)) < low[0] / 10
    assert error(keyed("1024", torch.float16)) < low[2]
    assert error(keyed("160", torch.bfloat16, key_precision="same")) > low[1]


def first_losses(keys: str, optimizer: type[torch.optim.Optimizer], *, outside: bool) -> list[float]:
    model = load_model(NAME, "float32").eval()
    layers = key_model(model, keys, dtype=torch.float64, seed=0)
    trained = add_adapters(layers, r=4, alpha=8, seed=0, outside=outside)
    steps, losses = optimizer(trained, lr=0.05), []
    for _ in range(4):
        loss = model(input_ids=WINDOWS, labels=WINDOWS).loss
        losses.append(loss.item())
        steps.zero_grad()
        loss.backward()
        steps.step()
    return losses


def test_sgd_in_keyed_coordinates_is_that_in_plain_ones_where_keys_are_orthogonal() -> None:
    plain = first_losses("none", torch.optim.SGD, outside=True)
    assert plain[-1] < plain[0]
    assert first_losses("1", torch.optim.SGD, outside=True) == pytest.approx(plain, rel=1e-6)
    assert first_losses("gaussian", torch.optim.SGD, outside=True) != pytest.approx(plain, rel=1e-6)


def test_an_adapter_inside_does_not_feel_the_keys() -> None:
    plain = first_losses("none", torch.optim.AdamW, outside=False)
    assert first_losses("gaussian", torch.optim.AdamW, outside=False) == pytest.approx(plain, rel=1e-6)
    assert first_losses("gaussian", torch.optim.AdamW, outside=True) != pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_lesson_lowers_the_loss(dtype: torch.dtype) -> None:
    model = load_model(NAME, "float32").eval()
    trained = add_adapters(key_model(model, "1", dtype=dtype, seed=0), r=4, alpha=8, seed=0)
    lesson = Lesson(steps=4, facts=16, batch_size=4, warmup_steps=1)
    tokenizer = load_tokenizer(NAME, load_config(NAME))
    losses = teach(model, trained, tokenizer, lesson)
    assert len(losses) == lesson.steps
    assert losses[-1] < losses[0]
    assert 0 <= ask(model, tokenizer, lesson) <= 1


# Of one draw; what is expected is of another one, and of keys whose singular values may be spaced otherwise.
LIKE_EXPECTED = 0.5


def test_one_layer_is_as_expected() -> None:
    for keys in ("none", "8"):
        found = layer_errors(keys, width=EXPECTED_WIDTH, rows=64, seed=0)["errors"]
        assert found["bfloat16"]["same"] == pytest.approx(EXPECTED[keys]["bfloat16"], rel=LIKE_EXPECTED)
        assert found["float32"]["float32"] == pytest.approx(EXPECTED[keys]["float32"], rel=LIKE_EXPECTED)


def test_one_layer_under_arbitrary_matrices() -> None:
    errors = {keys: layer_errors(keys, width=96, rows=32, seed=0) for keys in ("1", "gaussian", "uniform")}
    conditions = [each["condition"] for each in errors.values()]
    assert conditions == sorted(conditions)
    low = [each["errors"]["bfloat16"]["float32"] for each in errors.values()]
    assert low == sorted(low)


def test_keys_have_three_names() -> None:
    assert key_switches("32") == {"keys": "conditioned", "kappa": 32.0}
    with pytest.raises(UsageError, match="keys to measure: got round"):
        key_switches("round")
